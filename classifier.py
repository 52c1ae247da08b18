"""Train a healthy/diseased (or lesion type) classifier on real and synthetic images, test it once, predict."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError
from ldm.reviews.options import REVIEW_HELP

CONFIGS = Path(__file__).resolve().parent / "configs" / "classifier"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    text = "configuration; a bare name is looked up in configs/classifier/ first"
    parser.add_argument("args", metavar="ARGS.json", help=text)
    text = "replace a key of the JSON (value in JSON; may be repeated), for instance --set EPOCHS=5"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "one classifier for each seed, in output_dir/seed_N"
    parser.add_argument("--seeds", type=cli.SEED, nargs="+", metavar="N", help=text)
    parser.add_argument("--review", action="append", default=[], metavar="FILE", help=REVIEW_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace the results of another run in output_dir")
    return parser


def find_config(name: str) -> Path:
    """The JSON that ``name`` means; raises UsageError listing what there is."""
    path, shipped = Path(name), CONFIGS / name
    if path.name == name and shipped.is_file():
        return shipped
    if path.is_file():
        return path
    known = ", ".join(sorted(item.name for item in CONFIGS.glob("*.json")))
    raise UsageError(f"{name}: no such configuration here; shipped in {CONFIGS}: {known}")


def main(args: argparse.Namespace) -> int:
    from ldm.classifier.config import load_classifier_config
    from ldm.classifier.data import prepare_annotations

    overrides = [*args.set, *(["overwrite=true"] if args.overwrite else [])]
    overrides += [f"review={json.dumps(args.review)}"] if args.review else []
    config = load_classifier_config(find_config(args.args), overrides)
    configs = [config]
    if args.seeds:
        if len(set(args.seeds)) < len(args.seeds):
            raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: expected each seed once")
        configs = [replace(config, seed=n, output_dir=str(config.output / f"seed_{n}")) for n in args.seeds]
    rejected = len(prepare_annotations(config)) if config.train else 0
    from ldm.classifier.run import run_classifier  # loads torch, which the checks above need not wait for

    for each in configs:
        rejected += run_classifier(each)["n_rejected"]
    return cli.SOME_REJECTED if rejected else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
