"""Measure how visible the border of drawn lesions is: redraw diseased samples in their own masks.

    python tool/measure_seam.py --ckpt stage2_2/last.ckpt --config models/mldm_v15.yaml \
        --data openimages_format_test.json --output seam.json

The mean gradient across the mask's border in the result, over that of the real image at the same place, with a 95 %
interval over pictures. The control pastes the same drawing with a hard mask (soft >= 0.5). Of a soft mask the border is
the band in which its value changes, or the contour where it crosses 0.5; both are measured.
"""

import argparse
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

if TYPE_CHECKING:
    from ldm.data.samples import Sample
    from ldm.inference.inpainter import Inpainter

log = logging.getLogger("measure_seam")

BORDERS = ("band", "contour")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--ckpt", type=Path, required=True, help="a final checkpoint")
    parser.add_argument("--config", type=Path, required=True, help="model YAML")
    parser.add_argument(
        "--data", type=Path, required=True, help="dataset folder or annotation JSON with diseased samples"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int, help="at most so many samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def gradients(inpainter: "Inpainter", samples: "list[Sample]", seed: int) -> dict[str, dict[str, list[float]]]:
    """Mean gradient across each mask's band and contour: in the real image, in the result, in the hard composite."""
    from tqdm import tqdm

    from ldm.data.images import to_unit
    from ldm.data.preparation import prepare
    from ldm.data.seam import border_gradient, hard_composite
    from ldm.inference.inpainter import Job

    found = {border: {"real": [], "result": [], "hard": []} for border in BORDERS}
    size = inpainter.config.sampling.batch_size
    for first in tqdm(range(0, len(samples), size), "redrawing", unit=" batches"):
        batch = samples[first : first + size]
        pictures = [prepare(sample, inpainter.config.data, seed, 0) for sample in batch]
        drawn = inpainter.draw(pictures, [Job(seed, sample.sample_id, 0, sample.prompt) for sample in batch])
        for sample, picture, result in zip(batch, pictures, drawn, strict=True):
            if result.fault:
                raise MedSoftError(f"{sample.sample_id}: values that are not numbers appeared {result.fault}")
            real = to_unit(picture.original, picture.intensity_range)
            pasted = hard_composite(real, result.generated, picture.soft)
            values = [real, to_unit(result.pixels, picture.intensity_range), pasted]
            for border, soft in (("band", picture.soft), ("contour", picture.soft >= 0.5)):
                across = [border_gradient(value, soft) for value in values]
                if math.isfinite(across[0]):  # a mask that covers the picture has no border
                    for kept, value in zip(found[border].values(), across, strict=True):
                        kept.append(value)
    return found


def main(args: argparse.Namespace) -> int:
    from ldm.config import load_config
    from ldm.core.distributed import start_processes
    from ldm.core.files import sha256_file, write_json
    from ldm.data.annotations import load_samples
    from ldm.data.seam import gradient_ratio
    from ldm.inference.inpainter import load_inpainter

    config = load_config(args.config, args.overrides)
    if args.limit is not None and args.limit < 1:
        raise UsageError("--limit: expected at least 1")
    sick = [sample for sample in load_samples(args.data)[0] if not sample.healthy][: args.limit]
    if not sick:
        raise MedSoftError(f"{args.data}: has no diseased sample; they are redrawn in their own masks")
    found = gradients(load_inpainter(args.ckpt, config, start_processes(args.device, 1, 1).device), sick, args.seed)
    if not any(found["contour"]["real"]):
        raise MedSoftError(f"{args.data}: no mask has a border with a gradient in the real image")
    ratios = {
        border: {name: asdict(gradient_ratio(values[name], values["real"])) for name in ("result", "hard")}
        for border, values in found.items()
    }
    rows: dict[str, Any] = {**ratios, "data": str(args.data), "checkpoint_sha256": sha256_file(args.ckpt)}
    write_json(args.output, rows)
    for border in BORDERS:
        for name, text in (("result", "soft composite"), ("hard", "hard composite (control)")):
            r = ratios[border][name]
            shown = border, text, r["value"], r["low"], r["high"], r["pictures"]
            log.info("%-8s %-25s %.3f of the real gradient, 95 %% [%.3f, %.3f], %d pictures", *shown)
    log.info("%s", args.output)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
