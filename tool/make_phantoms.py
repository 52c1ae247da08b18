"""Make a dataset folder of sagittal spine phantoms, healthy and with lesions.

    python tool/make_phantoms.py --output_dir phantoms --healthy 160 --diseased 40 --seed 7
    python tool/make_phantoms.py --output_dir large --healthy 160 --diseased 40 --seed 7 --size 512

Each image is a sample folder (image.png, anatomy.png, prompt.txt, meta.json and, when diseased, mask.png).
``--calibrate`` measures how hard the images are: the classifier with few and with many diseased patients.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("--output_dir", type=Path, help="dataset folder to write")
    made.add_argument("--healthy", type=cli.WHOLE, default=160, help="healthy images")
    text = "ones with a lesion; types and severities take turns"
    made.add_argument("--diseased", type=cli.WHOLE, default=40, help=text)
    made.add_argument("--seed", type=cli.SEED, default=0, help="the world: two seeds share no patient")
    made.add_argument("--per_patient", type=cli.COUNT, default=1, help="images of each patient")
    text = "pixels a side, 256 to 2048: a wide view with lesions as small as in CT (default: close up, 104 to 144)"
    made.add_argument("--size", type=cli.COUNT, help=text)
    text = "instead write the images that the BiomedCLIP stand-in was trained on"
    made.add_argument("--seen_by_biomedclip", action="store_true", help=text)
    made.add_argument("--overwrite", action="store_true", help="replace a phantom dataset made with other arguments")
    made.add_argument("--sheet", type=Path, metavar="PNG", help="also write a contact sheet to look at")
    made.add_argument(
        "--calibrate", action="store_true", help="train the classifier on few and many patients, print AUCs"
    )
    return made


def main(args: argparse.Namespace) -> int:
    if args.output_dir is None and args.sheet is None and not args.calibrate:
        raise UsageError("nothing to do; give --output_dir DIR, --sheet PNG or --calibrate")
    if args.size is not None and (args.seen_by_biomedclip or args.calibrate):
        raise UsageError("--size: not with --seen_by_biomedclip or --calibrate, which are about the default world")
    from ldm.phantom.dataset import write_biomedclip_pairs, write_dataset, write_sheet

    if args.output_dir is not None:
        if args.seen_by_biomedclip:
            made = write_biomedclip_pairs(args.output_dir, args.overwrite)
            count = "all that the BiomedCLIP stand-in has seen"
        else:
            counts = (args.healthy, args.diseased, args.per_patient)
            made = write_dataset(args.output_dir, args.seed, *counts, args.overwrite, args.size)
            count = f"{args.healthy} healthy and {args.diseased} diseased images, seed {args.seed}"
        print(f"{args.output_dir}: {count}" if made else f"{args.output_dir}: already complete ({count})")
    if args.sheet is not None:
        write_sheet(args.sheet, args.seed, size=args.size)
        print(f"{args.sheet}: contact sheet")
    if args.calibrate:
        from ldm.phantom.calibration import calibrate

        print(calibrate(args.seed))
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
