"""Pickled checkpoints, read without running anything that they name.

Nothing is ever unpickled unsafely. A pickle may name classes of the program that wrote it (Lightning, numpy); those
are neither imported nor run: an inert placeholder stands where each of their objects was. A pickle that names anything
else is refused, and nothing in it runs. See docs/checkpoints.md.
"""

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.core.errors import MedSoftError, first_line

# What training programs leave in checkpoints beside the tensors; only the names are looked at.
EXTERNAL = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)(\.\w+)*\._?[A-Z]\w*"
    r"|numpy\._?core\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|numpy\.dtypes\.\w+DType"
    r"|argparse\.Namespace|pathlib\.(Pure)?(Posix|Windows)?Path|collections\.defaultdict|typing\.Any"
    r"|builtins\.(dict|list|tuple|int|float|str|bool)"
)
EXTERNAL_DICTIONARIES = re.compile(r".*\.(\w*Dict|defaultdict)")


class Placeholder:
    """Stands for an object of a class that is not imported: accepts whatever a pickle does with it, keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class DictionaryPlaceholder(Placeholder):
    """The same for classes derived from dict, whose entries a pickle writes one by one: a plain dictionary."""

    def __new__(cls, *_: Any) -> dict:  # type: ignore[misc]  # on purpose: nothing of the class is left
        return {}


def read_pickle(path: Path, kind: str) -> tuple[Any, list[str]]:
    """The content of a zip (memory-mapped) or legacy pickle checkpoint, and the names of other programs in it.

    Raises MedSoftError for a file that is damaged, or names what neither tensors nor known training programs need.
    """
    try:
        return _load(path, kind), []
    except pickle.UnpicklingError as error:
        found = [name for name in _global_names(path, kind) if EXTERNAL.fullmatch(name)]
        if not found:
            raise _refusal(path, error) from error
    # Still safe: the same restricted reader, told to put a placeholder where a known class of another program is named.
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (DictionaryPlaceholder if EXTERNAL_DICTIONARIES.fullmatch(name) else Placeholder, name) for name in found
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return _load(path, kind), found
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: pickle.UnpicklingError) -> MedSoftError:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    module, dot, name = (found[1] if found else "").rpartition(".")
    what = f"it asks for {IMPORT_MAPPING.get(module, module)}{dot}{name}" if found else "it holds more than tensors"
    return MedSoftError(f"{path}: refused, {what}; nothing in it was run. Use a file with plain tensors")


def _load(path: Path, kind: str) -> Any:
    try:
        if path.suffix == ".safetensors":  # torch.load would go by the name; only a path can be mapped
            with open(path, "rb") as handle:
                return torch.load(handle, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # on damaged bytes torch raises whatever the bytes lead to
        raise _damaged(path, _other_archive(path), error) from error


def _damaged(path: Path, before: str, error: Exception) -> MedSoftError:
    found = f"{path.stat().st_size} bytes; {first_line(error)}"
    return MedSoftError(f"{path}: {before}damaged or cut short ({found}); copy or download it again")


def _other_archive(path: Path) -> str:
    """A word in front of "damaged" if the file is a whole zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""
    if "constants.pkl" in names:
        return "a TorchScript archive, not a checkpoint (save its state_dict instead), or "
    return "" if "data.pkl" in names else "a zip archive that is not a checkpoint (unpack it first), or "


def _global_names(path: Path, kind: str) -> list[str]:
    """Every global that the file's pickles name, found by reading the opcodes without executing them."""
    names: list[str] = []
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as archive:
                pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(pickled) as handle:
                    _collect_names(handle, names)
        else:
            with open(path, "rb") as handle:
                for _ in range(4):  # magic number, protocol, system information, content; then come the raw storages
                    _collect_names(handle, names)
    except Exception as error:  # opcodes that are none
        raise _damaged(path, "", error) from error
    return names


def _collect_names(handle: Any, names: list[str]) -> None:
    for opcode, argument, _ in pickletools.genops(handle):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            # Pickles of protocol 2 spell the standard library as Python 2 did.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            if f"{module}.{name}" not in names:
                names.append(f"{module}.{name}")
