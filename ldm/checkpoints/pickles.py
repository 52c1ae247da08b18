"""Pickled checkpoints, read without running anything that they name.

Nothing is ever unpickled unsafely. A pickle may name classes of the program that wrote it (Lightning, numpy); those
are neither imported nor run: an inert placeholder stands where each of their objects was. A pickle that names anything
else is refused, and nothing in it runs. See docs/checkpoints.md.
"""

import pickle
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING
from pathlib import Path
from typing import Any

import torch

from ldm.core.devices import out_of_memory
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
    stand_ins: dict[str, type] = {}  # for the classes of other programs that torch's restricted reader has met so far
    while True:
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()]):
                return _load(path, kind), list(stand_ins)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            module, dot, inner = (found[1] if found else "").rpartition(".")
            asked = f"{IMPORT_MAPPING.get(module, module)}{dot}{inner}"  # Python 3's name for it
            name = asked if dot else f"builtins.{asked}"  # torch's message leaves ``builtins`` out
            if name in stand_ins or not EXTERNAL.fullmatch(name):
                what = f"it asks for {asked}" if found else "it holds more than tensors, or is damaged"
                raise MedSoftError(
                    f"{path}: refused, {what}; nothing in it was run. Use a file with plain tensors"
                ) from error
            stand_ins[name] = DictionaryPlaceholder if EXTERNAL_DICTIONARIES.fullmatch(name) else Placeholder


def _load(path: Path, kind: str) -> Any:
    try:
        if path.suffix == ".safetensors":  # torch.load would go by the name; only a path can be mapped
            with open(path, "rb") as handle:
                return torch.load(handle, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # on damaged bytes torch raises whatever the bytes lead to
        if out_of_memory(error):
            raise MedSoftError(f"{path}: there is too little memory to read it ({first_line(error)})") from error
        found = f"{path.stat().st_size} bytes; {first_line(error)}"
        raise MedSoftError(
            f"{path}: {_other_archive(path)}damaged or cut short ({found}); copy or download it again"
        ) from error


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
