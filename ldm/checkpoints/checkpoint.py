"""Checkpoints: what is in them, the parts by key, strict loading of parts, writing.

A checkpoint is a dictionary with ``state_dict`` and, if made here, ``medsoft``: {"config", "stage", "step", "origin"}.
Keys equal those of ``sd-v1-5-inpainting.ckpt`` (see PREFIXES), plus ``attn3``, ``norm4`` in the U-Net and ``msc.*``.
How files are read safely and searched for damage: ``ldm.checkpoints.files``. The format: docs/checkpoints.md.
"""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import detect_format, read_pickle, read_safetensors, save_pickle, save_safetensors
from ldm.config import Config, config_from_dict
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_file, refuse_existing
from ldm.core.schema import identity

log = logging.getLogger(__name__)

PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
    "msc": "msc.",
}
NAMES = {"unet": "U-Net", "autoencoder": "autoencoder", "text": "text encoder", "msc": "MSC"}
NEW_IN_UNET = re.compile(r"^model\.diffusion_model\..*\.(attn3|norm4)\.")
NESTED = ("state_dict", "model_state_dict", "model", "module")  # where programs put the tensors


@dataclass
class Checkpoint:
    """What a file held: tensors by key, what our own files say about themselves, and the raw rest (optimizer, ...)."""

    path: Path
    state: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)  # classes of other programs that it names; never run

    def parts(self) -> list[str]:
        """Which of unet, autoencoder, text and msc have keys here."""
        return [part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in self.state)]

    @property
    def step(self) -> int | None:
        """Optimizer steps behind the weights, if the file says (ours, or Lightning's ``global_step``)."""
        found = self.about.get("step", self.rest.get("global_step"))
        return found if isinstance(found, int) else None

    @property
    def config(self) -> Config | None:
        """The configuration the file was made with, if it says."""
        return config_from_dict(self.about["config"], str(self.path)) if "config" in self.about else None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.ckpt`` (zip or legacy pickle) or a ``.safetensors`` file; which it is, its first bytes tell.

    Tensors are memory-mapped (a legacy pickle's are not). Nothing foreign is run; see ``ldm.checkpoints.files``.
    Raises MedSoftError for a missing, empty, damaged, foreign or unsafe file, saying which.
    """
    path = Path(path)
    kind = detect_format(path)
    if kind == "safetensors":
        state, metadata = read_safetensors(path)
        return Checkpoint(path, state, _about(path, metadata.get("medsoft", "{}")))
    content, foreign = read_pickle(path, kind)
    if not isinstance(content, dict):
        raise MedSoftError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    state, rest = _tensors_of(content)
    if not state:
        raise MedSoftError(f"{path}: holds no tensors; expected a model checkpoint with a `state_dict`")
    about = rest.pop("medsoft", {})
    return Checkpoint(path, state, about if isinstance(about, dict) else {}, rest, foreign)


def _about(path: Path, text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except json.JSONDecodeError as error:
        raise MedSoftError(f"{path}: damaged, its metadata `medsoft` is not JSON ({error.msg})") from error
    return about if isinstance(about, dict) else {}


def _tensors_of(content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by key, looked for in ``state_dict`` and the other places where programs nest them; and the rest."""
    for name in NESTED:
        if isinstance(content.get(name), dict):
            state, inner = _tensors_of(content[name])
            if state:
                return state, {**inner, **{key: value for key, value in content.items() if key != name}}
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return state, {key: value for key, value in content.items() if key not in state}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Only the tensors of ``read_checkpoint``."""
    return read_checkpoint(path).state


def write_checkpoint(path: str | Path, state: dict[str, Tensor], about: dict[str, Any], **rest: Any) -> None:
    """Write atomically: safetensors if the suffix says so, else a ``.ckpt`` for ``torch.load(weights_only=True)``.

    ``about`` (plain values) is kept as ``medsoft``. Memory-mapped tensors go from file to file: the whole is never
    held in memory.
    """
    with atomic_file(path) as handle:
        if Path(path).suffix == ".safetensors":
            save_safetensors(state, {"medsoft": json.dumps(about)}, handle)
        else:
            save_pickle({"state_dict": state, "medsoft": about, **rest}, handle)


def part_of(key: str) -> str:
    """The reader's name of the part a key belongs to: one of NAMES' values, "third attention" or "other"."""
    if NEW_IN_UNET.match(key):
        return "third attention"
    return next((NAMES[part] for part, prefix in PREFIXES.items() if key.startswith(prefix)), "other")


def summary(state: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """For each part in ``state``: number of tensors and parameters, bytes, data types."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        row = rows.setdefault(part_of(key), {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []})
        row["tensors"] += 1
        row["parameters"] += value.numel()
        row["bytes"] += value.numel() * value.element_size()
        row["dtypes"] = sorted({*row["dtypes"], str(value.dtype).removeprefix("torch.")})
    order = [NAMES["unet"], "third attention", NAMES["autoencoder"], NAMES["text"], NAMES["msc"], "other"]
    return {name: rows[name] for name in order if name in rows}


def parameter_table(state: dict[str, Tensor]) -> list[str]:
    """``summary`` as aligned lines of text."""
    return [
        f"{name:<16} {row['tensors']:5d} tensors {row['parameters'] / 1e6:9.2f} M parameters "
        f"{row['bytes'] / 1e9:7.3f} GB  {', '.join(row['dtypes'])}"
        for name, row in summary(state).items()
    ]


def parts_of(checkpoint: Checkpoint, parts: Iterable[str], config: Config, expected: dict[str, Tensor]) -> dict:
    """The tensors of exactly ``parts``; each of ``expected`` must be there, fit and be finite, and none be left over.

    Raises MedSoftError saying what is missing, left over, of another shape or not finite, and what to do.
    """
    parts = list(parts)
    prefixes = tuple(PREFIXES[part] for part in parts)
    offered = {key: value for key, value in checkpoint.state.items() if key.startswith(prefixes)}
    offered = {key: value for key, value in offered.items() if not key.endswith("embeddings.position_ids")}
    problems = compare(expected, offered)
    if problems:
        hint = _hint(checkpoint, parts, config)
        raise MedSoftError(f"{checkpoint.path}: does not fit this configuration: {'; '.join(problems)}. {hint}")
    check_architecture(checkpoint, parts, config)
    check_finite(offered, checkpoint.path)
    return offered


def check_finite(state: dict[str, Tensor], path: str | Path) -> None:
    """MedSoftError naming ``path`` and the first tensor of its ``state`` that holds NaN or infinite values."""
    bad = not_finite(state)
    if bad:
        raise MedSoftError(f"{path}: {len(bad)} tensors hold NaN or infinite values, first {bad[0]}")


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Keys of the tensors that hold NaN or infinite values."""

    def finite(value: Tensor) -> bool:
        if value.numel() == 0 or not value.is_floating_point():
            return True
        value = value.float() if value.element_size() == 1 else value  # float8 has no extremes of its own
        # NaN and infinities reach the extremes; looking at these two is ten times faster than at every value.
        return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())

    return [key for key, value in state.items() if not finite(value)]


def load_parts(model: nn.Module, checkpoint: Checkpoint, parts: list[str], config: Config) -> None:
    """Load exactly ``parts`` (keys of PREFIXES) into a MedSoftModel; raises as ``parts_of`` does."""
    prefixes = tuple(PREFIXES[part] for part in parts)
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}
    offered = parts_of(checkpoint, parts, config, expected)
    model.load_state_dict({**model.state_dict(), **offered}, strict=True)


def check_architecture(checkpoint: Checkpoint, parts: Iterable[str], config: Config) -> None:
    """Refuse a checkpoint whose parts were made for other sizes, such as a number of heads, which no shape shows."""
    theirs = checkpoint.config
    if theirs is None:
        return
    made, asked = (identity(each, "architecture") for each in (theirs, config))
    parts = set(parts)
    for section in [item.name for item in fields(Config) if item.metadata.get("part") in parts]:
        for key, value in made[section].items():
            if asked[section][key] != value:
                raise MedSoftError(
                    f"{checkpoint.path}: was made with {section}.{key}={value}, this configuration has "
                    f"{asked[section][key]}; use the YAML it was made with"
                )


def check_preparation(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse weights that were trained with another fit, feather or noise schedule than ``config`` asks for.

    Lesions would have another scale than the networks learned. A converted file was not trained: it agrees with
    everything. Another setting of one of the soft mask's switches is a known ablation, and only said.
    """
    theirs = checkpoint.config
    if theirs is None or checkpoint.about.get("stage") == "converted":
        return
    made, here = (identity(each, "images") for each in (theirs, config))
    for section in ("data", "diffusion"):
        for key, value in made[section].items():
            asked = here[section][key]
            if asked != value:
                raise UsageError(
                    f"{checkpoint.path}: was trained with {section}.{key}={value}, this configuration has {asked}; add "
                    f"{section}.{key}={value} to the command, or use the YAML it was trained with"
                )
    shapes = identity(config, "architecture")
    switches = [(section, name) for section in shapes for name in made[section] if name not in shapes[section]]
    for section, name in switches:
        trained, asked = made[section][name], here[section][name]
        if trained != asked:
            words = (checkpoint.path, section, name, trained, asked)
            log.warning("warning: %s was trained with %s.%s=%s, this run has %s", *words)


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
    if theirs and identity(theirs, "architecture") != identity(config, "architecture"):
        return "It was made with another model configuration; use the YAML it was made with"
    return "Use the YAML it was made for, or convert it again with tool/model_convert.py"


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
        about = read_checkpoint(path).about
        same = all(about.get(name) == value for name, value in made.items())
    except MedSoftError:
        same = False
    if not same:
        refuse_existing(path, overwrite)
    return same
