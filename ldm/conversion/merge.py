"""The Medical Semantic Controller of one checkpoint and everything else of another, as one file."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.checkpoint import (
    NAMES,
    PREFIXES,
    Checkpoint,
    already_made,
    parameter_table,
    read_checkpoint,
    tensors_of,
    write_checkpoint,
)
from ldm.checkpoints.files import verify
from ldm.checkpoints.fitting import check_preparation, parts_of
from ldm.config import Config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import check_target, fingerprint
from ldm.core.schema import identity
from ldm.data.checks import TRAINED_ON, groups_of, trained_on
from ldm.networks.model import skeleton
from ldm.networks.opening import ENCODER_KEYS

log = logging.getLogger(__name__)


def merge_files(stage1_path: Path, input_path: Path, output_path: Path, config: Config, overwrite: bool) -> None:
    """Write a checkpoint with the MSC of ``stage1_path`` and all the rest of ``input_path``.

    Tensors go from file to file: neither is held in memory as a whole. An output that was made from the same files is
    left as it is. Raises MedSoftError for files that are damaged or do not fit each other or ``config``, UsageError
    for swapped ones and for an output that was made from something else.
    """
    expected = skeleton(config.architecture)
    size = sum(value.numel() * value.element_size() for value in expected.values())
    size = size if overwrite or not output_path.exists() else 0
    check_target(output_path, size, stage1_path, input_path)
    controller, rest = read_checkpoint(stage1_path), read_checkpoint(input_path)
    check_roles(controller, rest, config)
    architecture = identity(config, "architecture")
    asked = fingerprint(["merge", [c.path.stat().st_size for c in (controller, rest)], architecture])
    already_made(output_path, overwrite, asked=asked)
    digests = [controller.sha256(), rest.sha256()]
    files = zip(("stage1_path", "input_path"), (controller, rest), digests, strict=True)
    sources = {flag: {"file": c.path.name, "sha256": digest} for flag, c, digest in files}
    run = fingerprint(["merge", digests, architecture])
    if already_made(output_path, overwrite, run=run):
        log.info("%s: already complete", output_path)
        return
    encoders: dict[str, Any] = {}
    for key in ENCODER_KEYS:
        for value in (each.metadata.get(key) for each in (controller, rest)):
            if value and encoders.setdefault(key, value) != value:
                raise MedSoftError(
                    f"{stage1_path} and {input_path} were trained with different BiomedCLIP folders; train one of "
                    "the two stages again"
                )
    state: dict[str, Tensor] = {}
    for source, parts in ((controller, ["msc"]), (rest, [part for part in PREFIXES if part != "msc"])):
        log.info("checked: %s, %s", source.path, verify(source.path))
        state |= parts_of(source, parts, config.architecture, tensors_of(expected, parts))
    log_sources(controller, rest, state)
    metadata = {"config": dataclasses.asdict(config), "stage": "merged", "step": 0, "origin": sources}
    metadata |= {"asked": asked, "run": run, **encoders}
    metadata[TRAINED_ON] = trained_on("merged", (), *(groups_of(c.metadata, c.path) for c in (controller, rest)))
    write_checkpoint(output_path, {key: state[key] for key in expected}, metadata, controller, rest)
    log.info("written: %s", output_path)


def check_roles(controller: Checkpoint, rest: Checkpoint, config: Config) -> None:
    """Refuse swapped arguments and files prepared otherwise; warn of unexpected stages and of older files."""
    made = (controller.metadata.get("stage"), rest.metadata.get("stage"))
    has_msc = ("msc" in controller.parts(), "msc" in rest.parts())
    if has_msc == (False, True) or made == ("unet_only", "stage1"):
        which = f"--stage1_path {controller.path}", f"--input_path {rest.path}"
        raise UsageError(
            f"{which[0]} has no MSC and {which[1]} has one: the two are swapped"
            if not has_msc[0]
            else f"{which[0]} was left by unet_only and {which[1]} by stage1: the two are swapped"
        )
    for checkpoint, flag, stage in ((controller, "--stage1_path", "stage1"), (rest, "--input_path", "unet_only")):
        left_by = checkpoint.metadata.get("stage")
        if left_by not in (None, stage):
            log.warning("warning: %s %s was left by %s, expected %s", flag, checkpoint.path, left_by, stage)
        check_preparation(checkpoint, config)
        warn_of_newer(checkpoint)


def warn_of_newer(checkpoint: Checkpoint) -> None:
    """Warn of a ``last-v1.ckpt`` (and so on) beside the file that is newer: Lightning's second run in one folder."""
    age = checkpoint.path.stat().st_mtime
    for other in sorted(checkpoint.path.parent.glob("last-v*.ckpt")):
        if other.stat().st_mtime > age and other != checkpoint.path:
            try:
                step = read_checkpoint(other).step
            except MedSoftError:
                continue
            older = f"{checkpoint.path} (step {checkpoint.step}, {_clock(age)})"
            newer = f"{other.name} beside it (step {step}, {_clock(other.stat().st_mtime)})"
            log.warning("warning: %s is older than %s; is it the one you mean?", older, newer)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def log_sources(controller: Checkpoint, rest: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Say which part comes from which file, and what of the files is left out."""
    for line in parameter_table(state):
        source = controller if line.startswith(NAMES["msc"]) else rest
        log.info("%s  from %s (step %s)", line, source.path, source.step)
    for source in (controller, rest):
        names = [name for name in ("optimizer_states", "optimizer", "lr_schedulers", "loops") if name in source.rest]
        if names:
            log.info("left out of %s: %s (training state)", source.path, ", ".join(names))
