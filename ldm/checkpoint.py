"""Checkpoints: safe reading, the key map, strict loading of parts, atomic writing.

A checkpoint is a dictionary with ``state_dict`` and, if made here, ``medsoft``: {"config", "stage", "step", "origin"}.
Keys equal those of ``sd-v1-5-inpainting.ckpt`` (see PREFIXES), plus ``attn3``, ``norm4`` in the U-Net and ``msc.*``.
Nothing is ever unpickled unsafely: files that need more than tensors and plain containers are refused.
"""

import logging
import pickle
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import ITEM_COUNTS, SWITCHES, Config, config_from_dict
from ldm.errors import MedSoftError, UsageError
from ldm.files import atomic_file, refuse_existing

log = logging.getLogger(__name__)

PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
    "msc": "msc.",
}
NEW_IN_UNET = re.compile(r"^model\.diffusion_model\..*\.(attn3|norm4)\.")


@dataclass
class Checkpoint:
    """What a file held: tensors by key, what our own files say about themselves, and the raw rest (optimizer, ...)."""

    path: Path
    state: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> list[str]:
        """Which of unet, autoencoder, text and msc have keys here."""
        return [part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in self.state)]

    @property
    def config(self) -> Config | None:
        """The configuration the file was made with, if it says."""
        return config_from_dict(self.about["config"], str(self.path)) if "config" in self.about else None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.ckpt`` (zip or legacy pickle, tensors and plain containers only) or a ``.safetensors`` file.

    The kind of file is told from its first bytes, not from its name. Tensors of a zip file are memory-mapped.
    Raises MedSoftError for a missing, empty, damaged, foreign or unsafe file, saying which.
    """
    path = Path(path)
    if sniff(path) == "safetensors":
        return _read_safetensors(path)
    content = _load_pickle(path, mmap=sniff(path) == "zip")
    if not isinstance(content, dict):
        raise MedSoftError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    state = content.pop("state_dict", None)
    if state is None:
        state = {key: content.pop(key) for key in list(content) if isinstance(content[key], Tensor)}
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise MedSoftError(f"{path}: holds no tensors; expected a model checkpoint with a `state_dict`")
    return Checkpoint(path, state, content.pop("medsoft", {}), content)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Only the tensors of ``read_checkpoint``."""
    return read_checkpoint(path).state


def sniff(path: Path) -> str:
    """zip, pickle (legacy) or safetensors, from the first bytes; anything else is a MedSoftError that names it."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(64)
    except FileNotFoundError as error:
        raise MedSoftError(f"{path}: this checkpoint does not exist") from error
    except IsADirectoryError as error:
        raise MedSoftError(f"{path}: expected a checkpoint file, found a folder") from error
    except OSError as error:
        raise MedSoftError(f"{path}: could not be read ({error.strerror or error})") from error
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if not head:
        kind = "an empty file (an interrupted download?)"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer, not the file itself; run `git lfs pull`"
    elif head.lstrip()[:1] == b"<":
        kind = "a web page; the download needs a login or another address"
    else:
        kind = f"bytes that start with {head[:8]!r}"
    raise MedSoftError(f"{path}: expected a checkpoint (.ckpt or .safetensors), found {kind}")


def _read_safetensors(path: Path) -> Checkpoint:
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            about = json.loads((file.metadata() or {}).get("medsoft", "{}"))
    except SafetensorError as error:
        raise MedSoftError(f"{path}: damaged safetensors file ({error}); copy or download it again") from error
    return Checkpoint(path, state, about)


def _load_pickle(path: Path, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class)\s+`?([\w.]+\.[\w]+)", str(error))
        what = f"it asks for {found.group(1)}" if found else "it holds more than tensors"
        raise MedSoftError(f"{path}: refused, {what}; nothing in it was run. Use a file with plain tensors") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MedSoftError(
            f"{path}: damaged or cut short ({size} bytes; {reason}); copy or download it again"
        ) from error


def write_checkpoint(path: str | Path, state: dict[str, Tensor], about: dict[str, Any], **rest: Any) -> None:
    """Write atomically: safetensors if the suffix says so, else a ``.ckpt`` for ``torch.load(weights_only=True)``.

    ``about`` (plain values) is kept as ``medsoft``. Tensors that share memory are written once each.
    """
    with atomic_file(path) as handle:
        if Path(path).suffix == ".safetensors":
            import json

            from safetensors.torch import save

            plain = {key: value.detach().contiguous() for key, value in state.items()}
            handle.write(save(plain, metadata={"medsoft": json.dumps(about)}))
        else:
            torch.save({"state_dict": state, "medsoft": about, **rest}, handle)


def load_parts(model: nn.Module, checkpoint: Checkpoint, parts: list[str], config: Config) -> None:
    """Load exactly ``parts`` (keys of PREFIXES) into a MedSoftModel; every parameter must be there and fit.

    Raises MedSoftError listing what is missing, left over or of another shape, and what to do.
    """
    prefixes = tuple(PREFIXES[part] for part in parts)
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}
    offered = {key: value for key, value in checkpoint.state.items() if key.startswith(prefixes)}
    offered = {key: value for key, value in offered.items() if not key.endswith("embeddings.position_ids")}
    problems = compare(expected, offered)
    if problems:
        hint = _hint(checkpoint, parts, config)
        raise MedSoftError(f"{checkpoint.path}: does not fit this configuration: {'; '.join(problems)}. {hint}")
    bad = [key for key, value in offered.items() if not torch.isfinite(value).all()]
    if bad:
        raise MedSoftError(f"{checkpoint.path}: {len(bad)} tensors hold NaN or infinite values, first {bad[0]}")
    model.load_state_dict({**model.state_dict(), **offered}, strict=True)


def check_preparation(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse weights that were trained with another fit, feather or noise schedule than ``config`` asks for.

    Lesions would have another scale than the networks learned. A converted file was not trained: it agrees with
    everything. Another setting of one of the soft mask's switches is a known ablation, and only said.
    """
    theirs = checkpoint.config
    if theirs is None or checkpoint.about.get("stage") == "converted":
        return
    for section in ("data", "diffusion"):
        for key, value in asdict(getattr(theirs, section)).items():
            asked = getattr(getattr(config, section), key)
            if asked != value and key not in ITEM_COUNTS:
                raise UsageError(
                    f"{checkpoint.path}: was trained with {section}.{key}={value}, this configuration has {asked}; add "
                    f"{section}.{key}={value} to the command, or use the YAML it was trained with"
                )
    for section, switch in SWITCHES:
        trained, asked = (getattr(getattr(each, section), switch) for each in (theirs, config))
        if trained != asked:
            log.warning(
                "warning: %s was trained with %s.%s=%s, this run has %s",
                checkpoint.path,
                section,
                switch,
                trained,
                asked,
            )


def compare(expected: dict[str, Tensor], offered: dict[str, Tensor]) -> list[str]:
    """What keeps ``offered`` from filling ``expected``: missing and left-over keys, differing shapes (short texts)."""

    def some(label: str, names: list[str]) -> list[str]:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return [f"{len(names)} {label} ({', '.join(names[:2])}{more})"] if names else []

    shapes = [
        f"{key} {tuple(offered[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in offered and offered[key].shape != expected[key].shape
    ]
    return [
        *some("missing", [key for key in expected if key not in offered]),
        *some("left over", [key for key in offered if key not in expected]),
        *some("of another size", shapes),
    ]


def _hint(checkpoint: Checkpoint, parts: list[str], config: Config) -> str:
    missing = [part for part in parts if part not in checkpoint.parts()]
    stage = checkpoint.about.get("stage")
    if missing:
        made = f" (it was left by {stage})" if stage else ""
        return (
            f"It holds {', '.join(checkpoint.parts()) or 'none of our parts'}{made}; needed: {', '.join(parts)}. "
            "Convert with tool/model_convert.py, or merge with tool/tool_merge_for_stage2.py, first"
        )
    theirs = checkpoint.config
    if theirs and theirs.architecture() != config.architecture():
        return "It was made with another model configuration; use the YAML it was made with"
    return "Use the YAML it was made for, or convert it again with tool/model_convert.py"


def already_made(path: str | Path, run: str, overwrite: bool, *inputs: str | Path) -> bool:
    """True if ``path`` is the finished output of this very run (its fingerprint says so).

    Raises UsageError if ``path`` is one of the inputs, or exists, was made otherwise and may not be replaced.
    """
    for source in inputs:
        if Path(source).resolve() == Path(path).resolve():
            raise UsageError(f"{path}: is also the input {source}; give another output path")
    if overwrite or not Path(path).exists():
        return False
    try:
        same = read_checkpoint(path).about.get("run") == run
    except MedSoftError:
        same = False
    if not same:
        refuse_existing(path, overwrite)
    return same
