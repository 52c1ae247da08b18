"""Train a healthy/diseased (or lesion type) classifier on real and synthetic images, test it once, predict."""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError

CONFIGS = Path(__file__).resolve().parent / "configs" / "classifier"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    text = "configuration; a bare name is looked up in configs/classifier/ first"
    parser.add_argument("args", metavar="ARGS.json", help=text)
    text = "replace a key of the JSON (value in JSON; may be repeated), for instance --set EPOCHS=5"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
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
    config = load_classifier_config(find_config(args.args), overrides)
    rejects = prepare_annotations(config) if config.train else []
    from ldm.classifier.run import run_classifier  # loads torch, which the checks above need not wait for

    return cli.SOME_REJECTED if run_classifier(config)["n_rejected"] or rejects else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
