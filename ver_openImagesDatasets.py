"""Check a dataset folder and write its annotation file and its split by patient.

Looked at is every sample folder below ROOT_DIR (image.png, mask.png, prompt.txt; optional anatomy.png, soft_mask.png,
meta.json); beside the annotation file come its _train, _val and _test split. Samples that cannot be used are listed in
the _rejects file (exit code 3). When the folder has grown, run it again: the files are replaced, and every patient
stays on their side of the split.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--root_dir", type=Path, required=True, help="dataset folder, searched recursively")
    parser.add_argument("--output_file", type=Path, default="openimages_format.json", help="annotation file to write")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the split")
    sides, default = ("TRAIN", "VAL", "TEST"), (0.7, 0.1, 0.2)
    parser.add_argument(
        "--fractions", type=cli.SHARE, nargs=3, default=default, metavar=sides, help="shares of the patients"
    )
    parser.add_argument("--strict", action="store_true", help="one unusable sample is an error: nothing is written")
    words = "take synthetic samples along, each on the side of its parent (else they are left out)"
    parser.add_argument("--synthetic", action="store_true", help=words)
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.data.splits import prepare_dataset

    rejects = prepare_dataset(args.root_dir, args.output_file, args.seed, args.fractions, args.strict, args.synthetic)
    return cli.SOME_REJECTED if rejects else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
