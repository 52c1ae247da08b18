"""Merge for step 2: the Medical Semantic Controller of one checkpoint, everything else of the other.

    python ./tool/tool_merge_for_stage2.py --stage1_path stage1/last.ckpt --input_path unet_only/last.ckpt \\
        --output_path ckpt_for_stage2.ckpt --config ./models/mldm_v15.yaml
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import MedSoftError, UsageError

log = logging.getLogger("tool_merge_for_stage2")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage1_path", type=Path, required=True, help="checkpoint of stage1: gives the MSC")
    parser.add_argument("--input_path", type=Path, required=True, help="checkpoint of unet_only: gives all the rest")
    parser.add_argument("--output_path", type=Path, required=True, help="checkpoint to write (.ckpt or .safetensors)")
    parser.add_argument("--config", type=Path, required=True, help="model YAML: models/mldm_v15.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from something else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    import dataclasses

    from ldm.checkpoint import PREFIXES, already_made, check_preparation, load_parts, read_checkpoint, write_checkpoint
    from ldm.config import load_config
    from ldm.files import fingerprint, sha256_file
    from ldm.model import MedSoftModel

    config = load_config(args.config, args.overrides)
    controller, rest = read_checkpoint(args.stage1_path), read_checkpoint(args.input_path)
    if "msc" not in controller.parts() and "msc" in rest.parts():
        raise UsageError(
            f"--stage1_path {args.stage1_path} has no MSC and --input_path {args.input_path} has one: "
            "the two are swapped"
        )
    for checkpoint, flag, stages in ((controller, "--stage1_path", "stage1"), (rest, "--input_path", "unet_only")):
        made = checkpoint.about.get("stage")
        if made not in (None, stages):
            log.warning("warning: %s %s was left by %s, expected %s", flag, checkpoint.path, made, stages)
    for checkpoint in (controller, rest):
        check_preparation(checkpoint, config)
    digests = [sha256_file(controller.path), sha256_file(rest.path)]
    files = zip(("stage1_path", "input_path"), (controller, rest), digests, strict=True)
    sources = {flag: {"file": c.path.name, "sha256": digest} for flag, c, digest in files}
    run = fingerprint(["merge", digests, config.architecture()])
    if already_made(args.output_path, run, args.overwrite, args.stage1_path, args.input_path):
        log.info("%s: already complete", args.output_path)
        return cli.DONE
    model = MedSoftModel(config)
    others = [part for part in PREFIXES if part != "msc"]
    load_parts(model, controller, ["msc"], config)
    load_parts(model, rest, others, config)
    for part in PREFIXES:
        source = controller if part == "msc" else rest
        count = sum(value.numel() for key, value in model.state_dict().items() if key.startswith(PREFIXES[part]))
        log.info(
            "%-12s %8.2f M parameters from %s (step %s)", part, count / 1e6, source.path, source.about.get("step", "?")
        )
    known = [c.about["biomedclip"] for c in (controller, rest) if c.about.get("biomedclip")]
    if len(set(known)) > 1:
        raise MedSoftError(
            f"{args.stage1_path} and {args.input_path} were trained with different BiomedCLIP folders; train one of "
            "the two stages again"
        )
    about = {"config": dataclasses.asdict(config), "stage": "merged", "step": 0, "origin": sources, "run": run}
    about |= {"biomedclip": known[0]} if known else {}
    write_checkpoint(args.output_path, model.state_dict(), about)
    log.info("written: %s", args.output_path)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
