"""Checkpoints: what is in them, the parts by key, writing. Whether they fit: ``ldm.checkpoints.fitting``.

A checkpoint is a dictionary with ``state_dict`` and, if made here, ``medsoft``: {"config", "stage", "step", "origin"}.
Keys equal those of ``sd-v1-5-inpainting.ckpt`` (see PREFIXES), plus ``attn3``, ``norm4`` in the U-Net and ``msc.*``.
How files are read safely and searched for damage: ``ldm.checkpoints.files``. The format: docs/checkpoints.md.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.files import detect_format, read_safetensors, save_pickle, save_safetensors
from ldm.checkpoints.pickles import read_pickle
from ldm.config import Config, config_from_dict
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import HeldFile, atomic_file, unchanged

PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
    "msc": "msc.",
}
NAMES = {"unet": "U-Net", "autoencoder": "autoencoder", "text": "text encoder", "msc": "MSC"}
THUMBNAIL = "model.diffusion_model.input_blocks.0.0.thumbnail."
NEW_IN_UNET = re.compile(rf"^model\.diffusion_model\.(.*\.(attn3|norm4)\.|attn3_table$)|^{re.escape(THUMBNAIL)}")
WRAPPERS = {"module", "_orig_mod", "base_layer"}  # levels that DDP, torch.compile and peft put into keys
NESTED = ("state_dict", "model_state_dict", "model", "module")  # where programs put the tensors


@dataclass
class Checkpoint:
    """What a file held: tensors by key, what our own files say about themselves, and the raw rest (optimizer, ...)."""

    path: Path
    file: HeldFile  # that was read; its tensors may be mapped from it
    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    external: list[str] = field(default_factory=list)  # classes of other programs that it names; never run
    header: dict[str, str] = field(default_factory=dict)  # text metadata of a .safetensors file

    def parts(self) -> list[str]:
        """Which of unet, autoencoder, text and msc have keys here."""
        return [part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in self.state)]

    def sha256(self) -> str:
        """Of the file that was read; MedSoftError if another one has its name by now."""
        return self.file.sha256()

    @property
    def step(self) -> int | None:
        """Optimizer steps behind the weights, if the file says (ours, or Lightning's ``global_step``)."""
        found = self.metadata.get("step", self.rest.get("global_step"))
        return found if isinstance(found, int) else None

    @property
    def unfinished(self) -> bool:
        """Whether it is the ``last.ckpt`` of a training that has not ended."""
        return "progress" in self.rest

    @property
    def config(self) -> Config | None:
        """The configuration the file was made with, if it says."""
        return config_from_dict(self.metadata["config"], str(self.path)) if "config" in self.metadata else None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.ckpt`` (zip or legacy pickle) or a ``.safetensors`` file; which it is, its first bytes tell.

    Tensors are memory-mapped (a legacy pickle's are not). Nothing of other programs is run; see
    ``ldm.checkpoints.pickles``.
    Raises MedSoftError for a missing, empty, damaged, unknown or unsafe file, saying which, and for one that is
    replaced meanwhile.
    """
    path = Path(path)
    with unchanged(path):
        return _read(path)


def _read(path: Path) -> Checkpoint:
    kind = detect_format(path)
    file = HeldFile(path)
    if kind == "safetensors":
        state, header = read_safetensors(path)
        return Checkpoint(path, file, state, _parse_metadata(path, header.get("medsoft", "{}")), header=header)
    content, external = read_pickle(path, kind)
    if not isinstance(content, dict):
        raise MedSoftError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    state, rest = _tensors_of(content)
    if not state:
        raise MedSoftError(f"{path}: holds no tensors; expected a model checkpoint with a `state_dict`")
    metadata = rest.pop("medsoft", {})
    return Checkpoint(path, file, state, metadata if isinstance(metadata, dict) else {}, rest, external)


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise MedSoftError(f"{path}: damaged, its metadata `medsoft` is not JSON ({error.msg})") from error
    return metadata if isinstance(metadata, dict) else {}


def _tensors_of(content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by key, looked for in ``state_dict`` and the other places where programs nest them; and the rest."""
    for name in NESTED:
        if isinstance(content.get(name), dict):
            state, inner = _tensors_of(content[name])
            if state:
                return state, {**inner, **{key: value for key, value in content.items() if key != name}}
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return state, {key: value for key, value in content.items() if key not in state}


def plain_keys(path: Path, state: Mapping[str, Tensor], respell: Callable[[str], str] = str) -> dict[str, Tensor]:
    """``state`` without the levels that wrappers put into its keys, which ``respell`` may change further.

    Raises MedSoftError for a key that is there twice then.
    """
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name = respell(".".join(level for level in key.split(".") if level not in WRAPPERS))
        if name in plain:
            raise MedSoftError(f"{path}: {key} is there twice, with and without the level its program added")
        plain[name] = value
    return plain


def write_checkpoint(
    path: str | Path, state: dict[str, Tensor], metadata: dict[str, Any], *sources: Checkpoint, **rest: Any
) -> None:
    """Write atomically: safetensors if the suffix says so, else a ``.ckpt`` for ``torch.load(weights_only=True)``.

    ``metadata`` (plain values) is kept as ``medsoft``. Memory-mapped tensors go from file to file: the whole is never
    held in memory. Nothing is written where one of ``sources``, which they come from, was changed since it was read.
    """
    with atomic_file(path) as handle:
        if Path(path).suffix == ".safetensors":
            save_safetensors(state, {"medsoft": json.dumps(metadata)}, handle)
        else:
            save_pickle({"state_dict": state, "medsoft": metadata, **rest}, handle)
        for source in sources:
            source.file.check()


def tensors_of(state: Mapping[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """The entries of ``state`` that belong to ``parts`` (keys of PREFIXES), without CLIP's stored position numbers."""
    prefixes = tuple(PREFIXES[part] for part in parts)
    return {k: v for k, v in state.items() if k.startswith(prefixes) and not k.endswith(".position_ids")}


def part_of(key: str) -> str:
    """The reader's name of the part a key belongs to.

    One of NAMES' values, "third attention", "thumbnail" or "other".
    """
    if key.startswith(THUMBNAIL):
        return "thumbnail"
    if NEW_IN_UNET.match(key):
        return "third attention"
    return next((NAMES[part] for part, prefix in PREFIXES.items() if key.startswith(prefix)), "other")


def summary(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """For each part in ``state``: number of tensors and parameters, bytes, data types."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        row = rows.setdefault(part_of(key), {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []})
        row["tensors"] += 1
        row["parameters"] += value.numel()
        row["bytes"] += value.numel() * value.element_size()
        row["dtypes"] = sorted({*row["dtypes"], str(value.dtype).removeprefix("torch.")})
    order = [NAMES["unet"], "third attention", "thumbnail", NAMES["autoencoder"], NAMES["text"], NAMES["msc"], "other"]
    return {name: rows[name] for name in order if name in rows}


def parameter_table(state: Mapping[str, Tensor]) -> list[str]:
    """``summary`` as aligned lines of text."""
    return [
        f"{name:<16} {row['tensors']:5d} tensors {row['parameters'] / 1e6:9.2f} M parameters "
        f"{row['bytes'] / 1e9:7.3f} GB  {', '.join(row['dtypes'])}"
        for name, row in summary(state).items()
    ]


def already_made(path: str | Path, overwrite: bool, **made: str) -> bool:
    """True if ``path`` is a finished output that says ``made`` of itself (fingerprints by name).

    Conversion and merging ask twice: for ``asked`` (command, sizes of the inputs, architecture) before gigabytes are
    read, and for ``run`` (their SHA-256 instead of sizes) after. Raises UsageError if ``path`` is a folder, or exists,
    was made otherwise and may not be replaced.
    """
    if Path(path).is_dir():
        raise UsageError(f"{path}: is a folder; give the name of a file to write")
    if overwrite or not Path(path).exists():
        return False
    try:
        metadata = read_checkpoint(path).metadata
        same = all(metadata.get(name) == value for name, value in made.items())
    except MedSoftError:
        same = False
    if not same:
        raise UsageError(f"{path}: already exists; give another path, or --overwrite to replace it")
    return same
