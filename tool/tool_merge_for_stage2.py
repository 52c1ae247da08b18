"""Merge for step 2: the Medical Semantic Controller of one checkpoint, everything else of the other.

    python ./tool/tool_merge_for_stage2.py --stage1_path stage1/last.ckpt --input_path unet_only/last.ckpt \\
        --output_path ckpt_for_stage2.ckpt --config ./models/mldm_v15.yaml

Both files are searched for damage first. Tensors go from file to file: neither is held in memory as a whole.
"""

import argparse
import logging
import time
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

log = logging.getLogger("tool_merge_for_stage2")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--stage1_path", type=Path, required=True, help="checkpoint of stage1: gives the MSC")
    parser.add_argument("--input_path", type=Path, required=True, help="checkpoint of unet_only: gives all the rest")
    parser.add_argument("--output_path", type=Path, required=True, help="checkpoint to write (.ckpt or .safetensors)")
    parser.add_argument("--config", type=Path, required=True, help="model YAML: models/mldm_v15.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from something else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    import dataclasses

    from ldm.checkpoints.checkpoint import PREFIXES, already_made, parts_of, read_checkpoint, write_checkpoint
    from ldm.checkpoints.files import verify
    from ldm.config import load_config
    from ldm.core.files import check_target, fingerprint, sha256_file
    from ldm.core.schema import identity
    from ldm.networks.model import skeleton

    config = load_config(args.config, args.overrides)
    expected = skeleton(config)
    size = sum(value.numel() * value.element_size() for value in expected.values())
    size = size if args.overwrite or not args.output_path.exists() else 0
    check_target(args.output_path, size, args.stage1_path, args.input_path)
    controller, rest = read_checkpoint(args.stage1_path), read_checkpoint(args.input_path)
    check_roles(args, controller, rest, config)
    architecture = identity(config, "architecture")
    asked = fingerprint(["merge", [c.path.stat().st_size for c in (controller, rest)], architecture])
    already_made(args.output_path, args.overwrite, asked=asked)
    digests = [sha256_file(controller.path), sha256_file(rest.path)]
    files = zip(("stage1_path", "input_path"), (controller, rest), digests, strict=True)
    sources = {flag: {"file": c.path.name, "sha256": digest} for flag, c, digest in files}
    run = fingerprint(["merge", digests, architecture])
    if already_made(args.output_path, args.overwrite, run=run):
        log.info("%s: already complete", args.output_path)
        return cli.DONE
    known = [c.about["biomedclip"] for c in (controller, rest) if c.about.get("biomedclip")]
    if len(set(known)) > 1:
        raise MedSoftError(
            f"{args.stage1_path} and {args.input_path} were trained with different BiomedCLIP folders; train one of "
            "the two stages again"
        )
    state = {}
    for source, parts in ((controller, ["msc"]), (rest, [part for part in PREFIXES if part != "msc"])):
        log.info("checked: %s, %s", source.path, verify(source.path))
        prefixes = tuple(PREFIXES[part] for part in parts)
        wanted = {key: value for key, value in expected.items() if key.startswith(prefixes)}
        state |= parts_of(source, parts, config, wanted)
    report(controller, rest, state)
    about = {"config": dataclasses.asdict(config), "stage": "merged", "step": 0, "origin": sources}
    about |= {"asked": asked, "run": run}
    about |= {"biomedclip": known[0]} if known else {}
    write_checkpoint(args.output_path, {key: state[key] for key in expected}, about)
    log.info("written: %s", args.output_path)
    return cli.DONE


def check_roles(args: argparse.Namespace, controller, rest, config) -> None:
    """Refuse swapped arguments and files prepared otherwise; warn of unexpected stages and of older files."""
    from ldm.checkpoints.checkpoint import check_preparation

    made = (controller.about.get("stage"), rest.about.get("stage"))
    has_msc = ("msc" in controller.parts(), "msc" in rest.parts())
    if has_msc == (False, True) or made == ("unet_only", "stage1"):
        which = f"--stage1_path {args.stage1_path}", f"--input_path {args.input_path}"
        raise UsageError(
            f"{which[0]} has no MSC and {which[1]} has one: the two are swapped"
            if not has_msc[0]
            else f"{which[0]} was left by unet_only and {which[1]} by stage1: the two are swapped"
        )
    for checkpoint, flag, stage in ((controller, "--stage1_path", "stage1"), (rest, "--input_path", "unet_only")):
        left_by = checkpoint.about.get("stage")
        if left_by not in (None, stage):
            log.warning("warning: %s %s was left by %s, expected %s", flag, checkpoint.path, left_by, stage)
        check_preparation(checkpoint, config)
        warn_of_newer(checkpoint)


def warn_of_newer(checkpoint) -> None:
    """Warn of a ``last-v1.ckpt`` (and so on) beside the file that is newer: Lightning's second run in one folder."""
    from ldm.checkpoints.checkpoint import read_checkpoint

    age = checkpoint.path.stat().st_mtime
    for other in sorted(checkpoint.path.parent.glob("last-v*.ckpt")):
        if other.stat().st_mtime > age and other != checkpoint.path:
            try:
                step = read_checkpoint(other).step
            except MedSoftError:
                continue
            log.warning(
                "warning: %s (step %s, %s) is older than %s beside it (step %s, %s); is it the one you mean?",
                checkpoint.path,
                checkpoint.step,
                _clock(age),
                other.name,
                step,
                _clock(other.stat().st_mtime),
            )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def report(controller, rest, state) -> None:
    """Print which part comes from which file, and what of the files is left out."""
    from ldm.checkpoints.checkpoint import NAMES, parameter_table

    for line in parameter_table(state):
        source = controller if line.startswith(NAMES["msc"]) else rest
        log.info("%s  from %s (step %s)", line, source.path, source.step)
    for source in (controller, rest):
        names = [name for name in ("optimizer_states", "optimizer", "lr_schedulers", "loops") if name in source.rest]
        if names:
            log.info("left out of %s: %s (training state)", source.path, ", ".join(names))


if __name__ == "__main__":
    cli.run(build_parser(), main)
