"""The table of sizes at true size: parameters, checkpoints of the stages, arithmetic of one call at 512 x 512.

    python tool/model_sizes.py                            # prints it
    python tool/model_sizes.py --output docs/sizes.md     # how docs/sizes.md was made

Nothing is downloaded and no weights are made: the networks of models/mldm_v15*.yaml are built on PyTorch's meta device.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.core.files import write_text


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print)")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.bench.sizes import document

    if args.output:
        write_text(args.output, document())
    else:
        print(document(), end="")
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
