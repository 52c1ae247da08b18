"""Measure how visible the border of synthetic lesions is: inpaint diseased samples again in their own masks.

    python tool/measure_seam.py --ckpt stage2_2/last.ckpt --config models/mldm_v15.yaml \\
        --data openimages_format_test.json --output seam.json

The mean gradient across the mask's border in the result, over that of the real image at the same place, with a 95 %
interval over patients. The control pastes the same image with a hard mask (soft >= 0.5). Of a soft mask the border is
the band in which its value changes, or the contour where it crosses 0.5; both are measured.
"""

import argparse
from pathlib import Path

from ldm.config import load_config
from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="a final checkpoint")
    parser.add_argument("--config", type=Path, required=True, help="model YAML")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or JSON with diseased samples")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=cli.COUNT, help="at most so many samples")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from ldm.evaluation.seam import measure_seam

    measure_seam(args.ckpt, config, args.data, args.output, args.limit, args.seed, args.device)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
