"""What is in a checkpoint: parts, sizes, stage, origin, what is missing, which YAML fits; and whether it is damaged.

    python ./tool/inspect_checkpoint.py stage2_2/last.ckpt
    python ./tool/inspect_checkpoint.py sd-v1-5-inpainting.ckpt --json

Every byte is read. A damaged, unsafe or foreign file ends with exit code 1 and one line that says what is wrong.
"""

import argparse
import json
import logging
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import MedSoftError
from ldm.core.paths import SHIPPED

log = logging.getLogger("inspect_checkpoint")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("ckpt", type=Path, help="checkpoint (.ckpt or .safetensors)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.checkpoints.checkpoint import check_finite, read_checkpoint
    from ldm.checkpoints.files import verify

    checkpoint = read_checkpoint(args.ckpt)
    integrity = verify(args.ckpt)
    found = describe(checkpoint, integrity)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_text(found, checkpoint.state)
    check_finite(checkpoint.state, args.ckpt)
    return cli.DONE


def describe(checkpoint, integrity: str) -> dict:
    """Everything this command prints, as plain values."""
    from ldm.checkpoints.checkpoint import PREFIXES, summary
    from ldm.checkpoints.files import detect_format

    about = checkpoint.about
    return {
        "file": str(checkpoint.path),
        "kind": detect_format(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "integrity": integrity,
        "parts": summary(checkpoint.state),
        "missing": [part for part in PREFIXES if part not in checkpoint.parts()],
        "stage": about.get("stage"),
        "step": checkpoint.step,
        "complete": about.get("complete"),
        "origin": about.get("origin"),
        "biomedclip": about.get("biomedclip"),
        "foreign": checkpoint.foreign,
        "besides": sorted(str(key) for key in checkpoint.rest),
        **fits(checkpoint),
    }


def fits(checkpoint) -> dict[str, list[str]]:
    """The shipped YAMLs whose sizes this file has, and those whose stage can start from it."""
    from ldm.config import load_config
    from ldm.core.schema import identity
    from ldm.networks.model import skeleton

    configs = {
        path.relative_to(SHIPPED).as_posix(): load_config(path) for path in sorted((SHIPPED / "models").glob("*.yaml"))
    }
    families = {name: config for name, config in configs.items() if not config.training.stage}
    found: dict[str, list[str]] = {"fits": [], "unconverted": [], "can_start": []}
    shapes = {name: identity(config, "architecture") for name, config in configs.items()}
    for family, sizes in families.items():
        state = part_states(checkpoint, sizes, skeleton(sizes))
        if not state or "other" in state.values():
            continue
        found["unconverted" if "unconverted" in state.values() else "fits"].append(family)
        whole = {part for part, kind in state.items() if kind == "whole"}
        for name, config in configs.items():
            needed = {part for part in config.training.builds if part != "biomedclip"}
            if needed and needed <= whole and shapes[name] == shapes[family]:
                found["can_start"].append(name)
    return found


def part_states(checkpoint, config, expected) -> dict[str, str]:
    """For each part in the file: whole, unconverted (a U-Net without third attention), or other (does not fit)."""
    from ldm.checkpoints.checkpoint import NEW_IN_UNET, PREFIXES, check_architecture, compare

    states = {}
    for part in checkpoint.parts():
        wanted = {key: value for key, value in expected.items() if key.startswith(PREFIXES[part])}
        offered = {key: value for key, value in checkpoint.state.items() if key.startswith(PREFIXES[part])}
        offered = {key: value for key, value in offered.items() if not key.endswith(".position_ids")}
        before = {key: value for key, value in wanted.items() if not NEW_IN_UNET.match(key)}
        states[part] = (
            "whole" if not compare(wanted, offered) else "other" if compare(before, offered) else "unconverted"
        )
    try:
        check_architecture(checkpoint, states, config)
    except MedSoftError:
        return dict.fromkeys(states, "other")
    return states


def print_text(found: dict, state) -> None:
    """The description as lines of text."""
    from ldm.checkpoints.checkpoint import NAMES, parameter_table

    log.info("%s: %s, %.3f GB", found["file"], found["kind"], found["bytes"] / 1e9)
    log.info("integrity: %s", found["integrity"])
    for line in parameter_table(state):
        log.info("  %s", line)
    log.info("missing: %s", ", ".join(NAMES[part] for part in found["missing"]) or "nothing")
    log.info("stage: %s, step %s", found["stage"] or "not said", "not said" if found["step"] is None else found["step"])
    origin = found["origin"]
    for name, source in origin.items() if isinstance(origin, dict) and "file" not in origin else [("file", origin)]:
        said = f"{source['file']} (SHA-256 {source['sha256']})" if isinstance(source, dict) else source or "not said"
        log.info("origin: %s%s", "" if name == "file" else f"{name} ", said)
    if found["foreign"]:
        log.info("objects of other programs, not run: %s", ", ".join(found["foreign"]))
    if found["besides"]:
        log.info("besides tensors: %s", ", ".join(found["besides"]))
    log.info("fits: %s", ", ".join(found["fits"]) or "none of the shipped YAMLs as it is")
    if found["unconverted"]:
        log.info("fits after tool/model_convert.py: %s", ", ".join(found["unconverted"]))
    log.info("can start: %s", ", ".join(found["can_start"]) or "no stage")


if __name__ == "__main__":
    cli.run(build_parser(), main)
