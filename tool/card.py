"""Write the model card of a checkpoint, a data card and the CLAIM checklist, from run records alone.

    python tool/card.py stage2_2/last.ckpt --output_dir card --name my-model --license cc-by-nc-4.0 \\
        --train openimages_format_train.json --test openimages_format_test.json --results evaluation

README.md has the front matter that the Hugging Face hub reads. What no record says is said to be unknown: edit it
before you share it, and read it whole, as warnings of evaluations may name scanners or sites.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("ckpt", metavar="CKPT", type=Path, help="checkpoint that a command of this repository left")
    made.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    made.add_argument("--name", default="MedSoft-Diffusion", help="title of the card")
    made.add_argument("--license", default="", help="licence of the weights, such as cc-by-nc-4.0 (default: unknown)")
    made.add_argument("--train", type=Path, help="training set: annotation file or folder, counted for DATA.md")
    made.add_argument("--val", type=Path, help="validation set")
    made.add_argument("--test", type=Path, help="test set")
    text = "evaluation.json or metrics.json, or a folder with one; may be given several"
    made.add_argument("--results", type=Path, nargs="+", default=[], help=text)
    made.add_argument("--overwrite", action="store_true", help="replace a card that is there")
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.sharing.card import CardOptions, write_cards

    write_cards(cli.options(CardOptions, args))
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
