"""What is in a checkpoint: parts, sizes, stage, origin, what is missing, which YAML fits; and whether it is damaged.

    python ./tool/inspect_checkpoint.py stage2_2/last.ckpt
    python ./tool/inspect_checkpoint.py sd-v1-5-inpainting.ckpt --json

Every byte is read. A damaged, unsafe or foreign file ends with exit code 1 and one line that says what is wrong.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("ckpt", type=Path, help="checkpoint (.ckpt or .safetensors)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.conversion.inspection import inspect_file

    inspect_file(args.ckpt, args.json)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
