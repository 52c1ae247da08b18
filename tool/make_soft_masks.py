"""Make soft masks for a dataset: from its lesion masks, anatomy labels or boxes, or lesion-shaped ones.

    python tool/make_soft_masks.py --data dataset --output_dir softened --source mask --feather 6 --feather_unit pixels
    python tool/make_soft_masks.py --data dataset --output_dir drawable --source lesion --size 0.3 0.5 --side left

The output is a dataset folder again: image, prompt and meta.json as they were, mask.png and soft_mask.png new.
dataset_infer.py inpaints in these masks, in healthy images too. The same command again finishes what is missing.
"""

import argparse
from pathlib import Path
from typing import get_args

from ldm.config import FeatherUnit
from ldm.core import cli

SOURCES = ("mask", "anatomy", "box", "lesion")
SIDES = ("left", "right", "top", "bottom")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or annotation JSON")
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder to write")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="mask",
        help="mask: the lesion's mask; anatomy: labels of anatomy.png; box: the annotation's box or --boxes; lesion: a "
        "lesion-shaped mask inside the vertebra's label, mask or box",
    )
    parser.add_argument(
        "--labels", type=cli.Number(int, 0, 4), nargs="+", default=[1], help="labels of anatomy.png (default: 1)"
    )
    parser.add_argument("--boxes", type=Path, help="JSON: sample_id -> box or boxes, [x, y, w, h] as fractions")
    border = parser.add_argument_group("soft border")
    border.add_argument("--feather", type=cli.AMOUNT, default=0.25, help="its width")
    border.add_argument(
        "--feather_unit",
        choices=get_args(FeatherUnit),
        default="diameter",
        help="diameter: a fraction of the region's equivalent diameter; mm needs spacing_mm in meta.json",
    )
    shape = parser.add_argument_group("lesion-shaped masks")
    text = "diameter, relative to the smaller side of the vertebra's bounding box (default: 0.35 0.7)"
    shape.add_argument("--size", type=cli.SHARE, nargs=2, default=[0.35, 0.7], metavar=("FROM", "TO"), help=text)
    shape.add_argument("--side", choices=SIDES, help="half of the vertebra, in the image (default: anywhere)")
    shape.add_argument("--irregularity", type=cli.SHARE, help="0, an ellipse, to 1 (default: varies)")
    shape.add_argument("--seed", type=cli.SEED, default=0, help="seed of the shapes")
    parser.add_argument("--overwrite", action="store_true", help="replace masks made with other settings")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.transfer.soft_masks import SoftMaskOptions, make_soft_masks

    return make_soft_masks(args.data, args.output_dir, cli.options(SoftMaskOptions, args), args.overwrite)


if __name__ == "__main__":
    cli.run(build_parser(), main)
