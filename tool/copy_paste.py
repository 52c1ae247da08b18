"""Paste the lesions of training images into healthy ones: the control that any generator has to beat.

    python tool/copy_paste.py --train_json openimages_format_train.json --output_dir pasted

The results are those of dataset_infer.py with the same seed, without a network: the same images, prompts and masks, and
in each mask the pixels of the lesion that the prompt was written about, turned and scaled with it, its contrast brought
to the image's. The same command again finishes what is missing.
"""

import argparse

from ldm.core import cli
from ldm.inference.options import PasteOptions


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    cli.add_flags(parser, PasteOptions)
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.inference.run import copy_paste

    return copy_paste(cli.options(PasteOptions, args))


if __name__ == "__main__":
    cli.run(build_parser(), main)
