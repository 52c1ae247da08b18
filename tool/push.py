"""Share a checkpoint with its card: into a folder, or to the Hugging Face hub (private unless --public).

    python tool/push.py stage2_2/last.ckpt card --to_folder shared
    python tool/push.py stage2_2/last.ckpt card --repo OWNER/NAME

Shared are model.safetensors (no optimizer), the card of tool/card.py, without which nothing is shared, and SHA256SUMS.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("ckpt", metavar="CKPT", type=Path, help="checkpoint that a command of this repository left")
    made.add_argument("card", metavar="CARD", type=Path, help="folder that tool/card.py wrote for it")
    target = made.add_mutually_exclusive_group(required=True)
    target.add_argument("--to_folder", type=Path, help="folder to write")
    target.add_argument("--repo", metavar="OWNER/NAME", help="repository of the hub, made if it is not there")
    made.add_argument("--public", action="store_true", help="everybody may read it: makes a new repository public")
    made.add_argument("--with_images", action="store_true", help="share other files of CARD too, such as images")
    made.add_argument(
        "--with_patients", action="store_true", help="share the salted digests of patients behind the weights"
    )
    made.add_argument("--overwrite", action="store_true", help="replace a folder that push wrote")
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.sharing.transfer import PushOptions, push

    push(cli.options(PushOptions, args))
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
