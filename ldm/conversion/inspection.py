"""What is in a checkpoint: parts, sizes, stage, origin, what is missing, which YAML fits; and whether it is damaged."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.checkpoint import (
    NAMES,
    NEW_IN_UNET,
    PREFIXES,
    Checkpoint,
    parameter_table,
    read_checkpoint,
    summary,
    tensors_of,
)
from ldm.checkpoints.files import detect_format, verify
from ldm.checkpoints.fitting import check_architecture, check_finite, compare
from ldm.config import Architecture, load_config
from ldm.conversion.published import NAME, is_published, stable_diffusion_part
from ldm.core.errors import MedSoftError
from ldm.core.paths import SHIPPED
from ldm.core.schema import identity
from ldm.networks.model import skeleton

log = logging.getLogger(__name__)


def inspect_file(path: Path, as_json: bool) -> None:
    """Read every byte of a checkpoint and say what is in it, as text or JSON.

    Raises MedSoftError for a file that is damaged, unsafe or no checkpoint; after the description for one with values
    that are not finite.
    """
    checkpoint = read_checkpoint(path)
    found = describe(checkpoint, verify(path))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        log_text(found, checkpoint.state)
    check_finite(checkpoint.state, path)


def describe(checkpoint: Checkpoint, integrity: str) -> dict[str, Any]:
    """What is in the checkpoint, as it is printed with ``--json``; ``integrity``: what ``verify`` compared."""
    metadata = checkpoint.metadata
    return {
        "file": str(checkpoint.path),
        "kind": detect_format(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "integrity": integrity,
        "parts": summary(checkpoint.state),
        "missing": [part for part in PREFIXES if part not in checkpoint.parts()],
        "stage": metadata.get("stage"),
        "step": checkpoint.step,
        "complete": metadata.get("complete"),
        "origin": metadata.get("origin") or ({"layout": NAME} if is_published(checkpoint.state) else None),
        "biomedclip": metadata.get("biomedclip"),
        "foreign": checkpoint.external,
        "besides": sorted(str(key) for key in checkpoint.rest),
        **fits(checkpoint),
    }


def fits(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The shipped YAMLs whose sizes this file has, and those whose stage can start from it."""
    configs = {
        path.relative_to(SHIPPED).as_posix(): load_config(path) for path in sorted((SHIPPED / "models").glob("*.yaml"))
    }
    families = {name: config for name, config in configs.items() if not config.training.stage}
    found: dict[str, list[str]] = {"fits": [], "unconverted": [], "can_start": []}
    if is_published(checkpoint.state):
        checkpoint = dataclasses.replace(checkpoint, state=stable_diffusion_part(checkpoint.state))
    shapes = {name: identity(config, "architecture") for name, config in configs.items()}
    for family, sizes in families.items():
        state = part_states(checkpoint, sizes.architecture, skeleton(sizes.architecture))
        if not state or "other" in state.values():
            continue
        found["unconverted" if "unconverted" in state.values() else "fits"].append(family)
        whole = {part for part, kind in state.items() if kind == "whole"}
        for name, config in configs.items():
            needed = {part for part in config.training.builds if part != "biomedclip"}
            if needed and needed <= whole and shapes[name] == shapes[family] and name not in found["can_start"]:
                found["can_start"].append(name)
    return found


def part_states(checkpoint: Checkpoint, architecture: Architecture, expected: Mapping[str, Tensor]) -> dict[str, str]:
    """For each part in the file: whole, unconverted (a U-Net without third attention), or other (does not fit)."""
    states = {}
    for part in checkpoint.parts():
        wanted, offered = tensors_of(expected, [part]), tensors_of(checkpoint.state, [part])
        before = {key: value for key, value in wanted.items() if not NEW_IN_UNET.match(key)}
        states[part] = (
            "whole" if not compare(wanted, offered) else "other" if compare(before, offered) else "unconverted"
        )
    try:
        check_architecture(checkpoint, states, architecture)
    except MedSoftError:
        return dict.fromkeys(states, "other")
    return states


def log_text(found: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """``describe`` as text for people."""
    log.info("%s: %s, %.3f GB", found["file"], found["kind"], found["bytes"] / 1e9)
    log.info("integrity: %s", found["integrity"])
    for line in parameter_table(state):
        log.info("  %s", line)
    log.info("missing: %s", ", ".join(NAMES[part] for part in found["missing"]) or "nothing")
    log.info("stage: %s, step %s", found["stage"] or "not said", "not said" if found["step"] is None else found["step"])
    origin = found["origin"]
    for name, source in origin.items() if isinstance(origin, dict) and "file" not in origin else [("file", origin)]:
        said = source or "not said"
        if isinstance(source, dict):  # a file that was converted or merged, else the start of a stage
            more = f"SHA-256 {source['sha256']}" if "sha256" in source else f"stage {source.get('stage') or 'not said'}"
            said = f"{source['file']} ({more})"
        log.info("origin: %s%s", "" if name == "file" else f"{name} ", said)
    if found["foreign"]:
        log.info("objects of other programs, not run: %s", ", ".join(found["foreign"]))
    if found["besides"]:
        log.info("besides tensors: %s", ", ".join(found["besides"]))
    log.info("fits: %s", ", ".join(found["fits"]) or "none of the shipped YAMLs as it is")
    if found["unconverted"]:
        log.info("fits after tool/model_convert.py: %s", ", ".join(found["unconverted"]))
    log.info("can start: %s", ", ".join(found["can_start"]) or "no stage")
