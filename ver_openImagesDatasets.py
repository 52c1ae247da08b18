"""Check a dataset folder and write its annotation file and its split by patient."""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "Check every sample folder below ROOT_DIR (image.png, mask.png, prompt.txt; optional anatomy.png, "
        "soft_mask.png, meta.json) and write the annotation file with its _train, _val and _test split. Samples that "
        "cannot be used are listed in the _rejects file (exit code 3). When the folder has grown, run it again: the "
        "files are replaced."
    )
    parser.add_argument("--root_dir", type=Path, required=True, help="dataset folder, searched recursively")
    parser.add_argument("--output_file", type=Path, default="openimages_format.json", help="annotation file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        default=(0.7, 0.1, 0.2),
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the patients",
    )
    parser.add_argument(
        "--strict", action="store_true", help="one unusable sample is an error: exit 1, nothing written"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.data.splits import prepare_dataset

    rejects = prepare_dataset(args.root_dir, args.output_file, args.seed, args.fractions, args.strict)
    return cli.SOME_REJECTED if rejects else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
