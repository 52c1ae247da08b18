"""Look at everything before a training: data, splits, prompts, checkpoint, installation, disk and memory.

    python tool/doctor.py --config models/mldm_v15_stage1.yaml --ckpt ckpt_for_stage1.ckpt --save_path stage1_MSC
    python tool/doctor.py --data /path/to/dataset

Every file of the data is decoded. A page shows 300 samples of each data set, and 300 more with a finding, with the
outlines of masks and label maps: look at it, as a mirrored or shifted mask is a sound file. Nothing else is written
but, with --output, the findings as JSON. Exit code 0: fit to train (perhaps with warnings), 3: some samples cannot be
used, 1: training would stop or learn something wrong.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError
from ldm.core.files import write_json

SPLITS = {split: Path(f"openimages_format_{split}.json") for split in ("train", "val", "test")}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--data", type=Path, help="a dataset folder or annotation file to look at by itself")
    for split, default in SPLITS.items():
        parser.add_argument(f"--{split}_json", type=Path, help=f"annotations of a split (default: {default}, if there)")
    parser.add_argument("--config", type=Path, help="stage YAML: checks sizes, disk and memory against it")
    parser.add_argument("--ckpt", type=Path, help="checkpoint that --config shall start from")
    parser.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    parser.add_argument("--save_path", type=Path, default=Path("."), help="where the run will be saved")
    parser.add_argument("--devices", type=cli.PROCESSES, default=1, help="devices that share a batch")
    parser.add_argument("--workers", type=cli.PROCESSES, help="processes that read files (default: one per core)")
    parser.add_argument("--output", type=Path, help="JSON file for all findings")
    page = Path("doctor_overlays.html")
    parser.add_argument("--overlays", type=Path, default=page, help="page of samples with their outlines")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    if args.ckpt and not args.config:
        raise UsageError(f"--ckpt {args.ckpt}: give the --config it shall be used with")
    sets = {"data": args.data} if args.data else {}
    for split, default in SPLITS.items():
        given = getattr(args, f"{split}_json")
        if not args.data and (given or default.exists()):
            sets[split] = given or default
    if not sets:
        raise UsageError("no data to look at: give --data, or --train_json and --val_json")
    from ldm.config import load_config
    from ldm.doctor.datasets import check_data, inspect_data, log_findings
    from ldm.doctor.installation import check_installation, check_torchvision

    given = [f"biomedclip.path={args.biomedclip}"] if args.biomedclip else []
    config = load_config(args.config, [*given, *args.overrides]) if args.config else None
    inspected, found = inspect_data(sets, args.workers, args.overlays)
    found += check_data(sets, inspected)
    samples = {name: each.samples for name, each in inspected.items() if not each.error}
    del inspected  # what was kept of each sample makes room for torch
    machine = list(check_installation())
    if config:
        machine += check_torchvision()
        from ldm.doctor.stage import check_stage

        machine += check_stage(config, args.ckpt, samples, args.save_path, args.devices)
    found = [*machine, *found]
    counts = log_findings(found)
    if args.output:
        write_json(args.output, [vars(finding) for finding in found])
    return cli.FAILED if counts["error"] else cli.SOME_REJECTED if counts["sample"] else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
