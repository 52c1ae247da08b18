"""Look at everything before a training: data, splits, prompts, checkpoint, installation, disk and memory.

    python tool/doctor.py --config models/mldm_v15_stage1.yaml --ckpt ckpt_for_stage1.ckpt --save_path stage1_MSC
    python tool/doctor.py --data /path/to/dataset

Every file of the data is decoded. Nothing is written but, with --output, the findings as JSON. Exit code 0: fit to
train (perhaps with warnings), 3: some samples cannot be used, 1: training would stop or learn something wrong.
"""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core import cli
from ldm.core.errors import UsageError

if TYPE_CHECKING:
    from ldm.training.doctor import Finding

log = logging.getLogger("doctor")

SHOWN = 20  # findings of one level
LEVELS = {"error": "errors", "sample": "samples that cannot be used", "warning": "warnings"}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--data", type=Path, help="a dataset folder or annotation file to look at by itself")
    for split in ("train", "val", "test"):
        default = Path(f"openimages_format_{split}.json")
        parser.add_argument(f"--{split}_json", type=Path, help=f"annotations of a split (default: {default}, if there)")
    parser.add_argument("--config", type=Path, help="stage YAML: checks sizes, disk and memory against it")
    parser.add_argument("--ckpt", type=Path, help="checkpoint that --config shall start from")
    parser.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    parser.add_argument("--save_path", type=Path, default=Path("."), help="where the run will be saved")
    parser.add_argument("--devices", type=int, default=1, help="devices that share a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that read files (default: one per core)")
    parser.add_argument("--output", type=Path, help="JSON file for all findings")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the checks; the exit code says how it stands."""
    if args.ckpt and not args.config:
        raise UsageError(f"--ckpt {args.ckpt}: give the --config it shall be used with")
    sets = data_sets(args)
    start = time.monotonic()
    found = list(findings(args, sets))
    for level, words in LEVELS.items():
        members = [finding for finding in found if finding.level == level]
        for finding in members[:SHOWN]:
            log.info("%s: %s: %s", level, finding.where, finding.text)
        if len(members) > SHOWN:
            log.info("... %d more %s", len(members) - SHOWN, words)
    counts = Counter(finding.level for finding in found)
    said = ", ".join(f"{counts[level]} {words}" for level, words in LEVELS.items())
    log.info("%s (%.0f s)", said, time.monotonic() - start)
    if args.output:
        from ldm.core.files import write_json

        write_json(args.output, [vars(finding) for finding in found])
    return cli.FAILED if counts["error"] else cli.SOME_REJECTED if counts["sample"] else cli.DONE


def data_sets(args: argparse.Namespace) -> dict[str, Path]:
    """Name -> dataset folder or annotation file; the default splits only where they are there."""
    if args.data:
        return {"data": args.data}
    found = {}
    for split in ("train", "val", "test"):
        default, given = Path(f"openimages_format_{split}.json"), getattr(args, f"{split}_json")
        if given or default.exists():
            found[split] = given or default
    if not found:
        raise UsageError("no data to look at: give --data, or --train_json and --val_json")
    return found


def findings(args: argparse.Namespace, sets: dict[str, Path]) -> "Iterator[Finding]":
    """All checks that the arguments allow; the quick ones first."""
    from ldm.training import doctor

    yield from doctor.check_installation()
    if args.config:
        from ldm.config import load_config

        given: list[Any] = [f"biomedclip.path={args.biomedclip}"] if args.biomedclip else []
        config = load_config(args.config, [*given, *args.overrides])
        misfits = list(doctor.check_checkpoint(config, args.ckpt, "biomedclip" in config.training.builds))
        yield from misfits
        if config.training.stage and not misfits:
            trained = {name: path for name, path in sets.items() if name != "test"}
            yield from doctor.check_disk_and_memory(config, trained, args.save_path, args.devices)
    yield from doctor.check_data(sets, args.workers)


if __name__ == "__main__":
    cli.run(build_parser(), main)
