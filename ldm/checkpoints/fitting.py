"""Whether the tensors of a checkpoint fit a configuration: strictly, naming what is missing, left over or other."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints.checkpoint import Checkpoint, tensors_of
from ldm.config import Architecture, Config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.schema import identity
from ldm.core.tables import counted

log = logging.getLogger(__name__)

# By name: transformers puts its own functions in the place of those of torch.nn.init.
RANDOM = {"uniform_", "normal_", "trunc_normal_", "orthogonal_", "sparse_", "erfinv_"}  # the last for timm's own
RANDOM |= {f"{scheme}_{kind}_" for scheme in ("xavier", "kaiming") for kind in ("uniform", "normal")}


def parts_of(
    checkpoint: Checkpoint, parts: Iterable[str], architecture: Architecture, expected: Mapping[str, Tensor]
) -> dict:
    """The tensors of exactly ``parts``; each of ``expected`` must be there, fit and be finite, and none be left over.

    Raises MedSoftError saying what is missing, left over, of another shape or not finite, and what to do.
    """
    parts = list(parts)
    offered = tensors_of(checkpoint.state, parts)
    problems = compare(expected, offered)
    if problems:
        hint = _hint(checkpoint, parts)
        raise MedSoftError(f"{checkpoint.path}: does not fit this configuration: {'; '.join(problems)}. {hint}")
    check_architecture(checkpoint, parts, architecture)
    check_finite(offered, checkpoint.path)
    return offered


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """MedSoftError naming ``path`` and the first tensor of its ``state`` that holds NaN or infinite values."""
    bad = not_finite(state)
    if bad:
        raise MedSoftError(
            f"{path}: {counted(len(bad), 'tensor holds', 'tensors hold')} NaN or infinite values, first {bad[0]}"
        )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors that hold NaN or infinite values."""

    def finite(value: Tensor) -> bool:
        if value.numel() == 0 or not value.is_floating_point():
            return True
        value = value.float() if value.element_size() == 1 else value  # float8 has no extremes of its own
        # NaN and infinities reach the extremes; looking at these two is ten times faster than at every value.
        return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())

    return [key for key, value in state.items() if not finite(value)]


class NoRandomWeights(TorchFunctionMode):
    """Networks built in this context have memory, but no random numbers in it.

    For networks whose weights are all loaded next: drawing random ones first takes longer than loading, at the size of
    Stable Diffusion 1.5 more than ten seconds. Filling a tensor leaves torch's generator as it was; what makes a new
    one (torch.randn) still draws from it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_parts(model: nn.Module, checkpoint: Checkpoint, parts: list[str], architecture: Architecture) -> None:
    """Load exactly ``parts`` (keys of PREFIXES) into a MedSoftModel; raises as ``parts_of`` does.

    And a FileError where the checkpoint was changed since it was read.
    """
    offered = parts_of(checkpoint, parts, architecture, tensors_of(model.state_dict(), parts))
    model.load_state_dict({**model.state_dict(), **offered}, strict=True)
    checkpoint.file.check()


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: str | Path, to: str, cure: str) -> None:
    """Fill ``network`` with exactly the tensors of ``state``, read from ``path``; ``to``: what says what they must be.

    MedSoftError, ending with ``cure``, where one is missing, left over or of another shape, or holds no numbers.
    """
    if problems := compare(network.state_dict(), state):
        raise MedSoftError(f"{path}: does not fit {to}: {'; '.join(problems)}; {cure}")
    check_finite(state, path)
    network.load_state_dict(state)


def check_architecture(checkpoint: Checkpoint, parts: Iterable[str], architecture: Architecture) -> None:
    """Refuse a checkpoint whose parts were made for other sizes, such as a number of heads, which no shape shows."""
    theirs = checkpoint.config
    if theirs is None:
        return
    made, asked = (identity(each, "architecture") for each in (theirs.architecture, architecture))
    parts = set(parts)
    for section in [item.name for item in fields(Architecture) if item.metadata.get("part") in parts]:
        for key in made[section] | asked[section]:
            value, here = (getattr(getattr(each, section), key) for each in (theirs, architecture))
            if here != value:
                raise MedSoftError(
                    f"{checkpoint.path}: was made with {section}.{key}={value}, this configuration has {here}; use the "
                    "YAML it was made with"
                )


def check_preparation(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse weights that were trained with another fit, feather or noise schedule than ``config`` asks for.

    Lesions would have another scale than the networks learned. A converted file was not trained: it agrees with
    everything. Another setting of one of the soft mask's switches is a known ablation, and only said; so are weights of
    a training that has not ended.
    """
    theirs = checkpoint.config
    if theirs is None or checkpoint.metadata.get("stage") == "converted":
        return
    if checkpoint.unfinished:
        text = "warning: %s: its training has not ended (step %s), and these are the weights of that moment; run that"
        log.warning(f"{text} command again first, or give a best_*.ckpt beside it", checkpoint.path, checkpoint.step)
    made, here = (identity(each, "images") for each in (theirs, config))
    wanted = [(section, key) for section in ("data", "diffusion") for key in made[section] | here[section]]
    for section, key in [*wanted, ("biomedclip", "view")]:
        value, asked = (getattr(getattr(each, section), key) for each in (theirs, config))
        if asked != value:
            raise UsageError(
                f"{checkpoint.path}: was trained with {section}.{key}={value}, this configuration has {asked}; add "
                f"{section}.{key}={value} to the command, or use the YAML it was trained with"
            )
    shapes = identity(theirs, "architecture")
    switches = [(section, key) for section in ("unet", "msc") for key in made[section] if key not in shapes[section]]
    for section, name in switches:
        trained, asked = made[section][name], here[section][name]
        if trained != asked:
            details = (checkpoint.path, section, name, trained, asked)
            log.warning("warning: %s was trained with %s.%s=%s, this run has %s", *details)


def compare(expected: Mapping[str, Tensor], offered: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``offered`` from filling ``expected``: missing and left-over keys, differing shapes (short texts)."""

    def some(label: str, names: list[str]) -> list[str]:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return [f"{len(names)} {label} ({', '.join(names[:2])}{more})"] if names else []

    shapes = [
        f"{key} {tuple(offered[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in offered and offered[key].shape != expected[key].shape
    ]
    whole = [
        f"{key} {offered[key].dtype} instead of {expected[key].dtype}"
        for key in expected
        if key in offered and expected[key].is_floating_point() and not offered[key].is_floating_point()
    ]
    return [
        *some("missing", [key for key in expected if key not in offered]),
        *some("left over", [key for key in offered if key not in expected]),
        *some("of another size", shapes),
        *some("quantised to whole numbers", whole),
    ]


def _hint(checkpoint: Checkpoint, parts: list[str]) -> str:
    """What to do about a checkpoint whose tensors do not fit."""
    missing = [part for part in parts if part not in checkpoint.parts()]
    stage = checkpoint.metadata.get("stage")
    if missing:
        made = f" (it was left by {stage})" if stage else ""
        return (
            f"It holds {', '.join(checkpoint.parts()) or 'none of our parts'}{made}; needed: {', '.join(parts)}. "
            "Convert with tool/model_convert.py, or merge with tool/tool_merge_for_stage2.py, first"
        )
    return "Use the YAML it was made with, or convert it again with tool/model_convert.py"
