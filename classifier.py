"""Train, test and apply the diagnosis classifier described by a JSON file."""

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.core import cli
from ldm.core.errors import UsageError

if TYPE_CHECKING:
    from ldm.classifier.config import ClassifierConfig

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parent / "configs" / "classifier"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        "Train a healthy/diseased (or lesion type) classifier on real and synthetic images, test it once, predict."
    )
    parser.add_argument(
        "args", metavar="ARGS.json", help="configuration; a bare name is looked up in configs/classifier/ first"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of the JSON (value in JSON; may be repeated), for instance --set EPOCHS=5",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results of another run in output_dir")
    return parser


def find_config(name: str) -> Path:
    """The JSON that ``name`` means; raises UsageError listing what there is."""
    path = Path(name)
    shipped = CONFIGS / name
    if path.name == name and shipped.is_file():
        return shipped
    if path.is_file():
        return path
    known = ", ".join(sorted(item.name for item in CONFIGS.glob("*.json")))
    raise UsageError(f"{name}: no such configuration here; shipped in {CONFIGS}: {known}")


def prepare_data(config: "ClassifierConfig") -> int:
    """Where the three annotation files are missing and their folder holds samples, write them; returns an exit code.

    That is ``ver_openImagesDatasets.py`` with its defaults, so the split is the one that command gives.
    """
    if not (config.train_json or "").endswith("_train.json"):
        return cli.DONE
    family = Path(config.train_json.removesuffix("_train.json") + ".json")
    from ldm.data.splits import output_paths, prepare_dataset

    paths = output_paths(family)
    named = {"train": config.train_json, "val": config.val_json, "test": config.test_json}
    if any(path is None or Path(path) != paths[name] or paths[name].exists() for name, path in named.items()):
        return cli.DONE
    if family.parent == Path() or not any(family.parent.rglob("prompt.txt")):
        return cli.DONE
    log.info("%s: no annotation files yet; making them from its samples", family.parent)
    return cli.SOME_REJECTED if prepare_dataset(family.parent, family) else cli.DONE


def main(args: argparse.Namespace) -> int:
    """Run; 3 when some samples were rejected (listed in rejects.csv or predictions.json of the output folder)."""
    from ldm.classifier.config import load_classifier_config

    overrides = [*args.set, *(["overwrite=true"] if args.overwrite else [])]
    config = load_classifier_config(find_config(args.args), overrides)
    prepared = prepare_data(config) if config.train else cli.DONE

    # Read by OpenMP when torch is loaded. Spinning threads make training ten times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ldm.classifier.run import run_classifier

    return cli.SOME_REJECTED if run_classifier(config)["n_rejected"] else prepared


if __name__ == "__main__":
    cli.run(build_parser(), main)
