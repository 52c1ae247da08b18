"""Make a dataset folder of sagittal spine phantoms, healthy and with lesions.

    python tool/make_phantoms.py --output_dir phantoms --healthy 160 --diseased 40 --seed 7
    python tool/make_phantoms.py --output_dir large --healthy 160 --diseased 40 --seed 7 --size 512
    python tool/make_phantoms.py --output_dir edges --world edge --lesions_per_type 8 --seed 7
    python tool/make_phantoms.py --output_dir twins --twins_of phantoms

Each image is a sample folder (image.png, anatomy.png, prompt.txt, meta.json and, when diseased, mask.png).
``--calibrate`` measures how hard the images are: the classifier with few and with many diseased patients.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError
from ldm.core.tables import counted


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("--output_dir", type=Path, help="dataset folder to write")
    made.add_argument("--healthy", type=cli.WHOLE, help="healthy images (default: 160)")
    made.add_argument("--diseased", type=cli.WHOLE, help="ones with a lesion; types take turns (default: 40)")
    made.add_argument("--lesions_per_type", type=cli.COUNT, help="instead of --diseased: so many lesions of each type")
    made.add_argument("--seed", type=cli.SEED, help="whose patients: two seeds share none (default: 0)")
    made.add_argument("--per_patient", type=cli.COUNT, help="images of each patient (default: 1)")
    made.add_argument("--size", type=cli.COUNT, help="pixels a side, 256 to 2048: a wide view (default: 104 to 144)")
    text = "standard, edge, elsewhere, words, shape, scanner or second_scanner: docs/worlds.md says what each changes"
    made.add_argument("--world", default="standard", help=text)
    text = "instead write a diseased twin, a synthetic sample, of each healthy phantom of a folder or annotation file"
    made.add_argument("--twins_of", type=Path, metavar="PATH", help=text)
    made.add_argument("--limit", type=cli.COUNT, help="with --twins_of: so many twins at most")
    made.add_argument("--seen_by_biomedclip", action="store_true", help="instead the images of the BiomedCLIP stand-in")
    made.add_argument("--overwrite", action="store_true", help="replace a phantom dataset made with other arguments")
    made.add_argument("--sheet", type=Path, metavar="PNG", help="also write a contact sheet to look at, PNG or JPEG")
    made.add_argument("--calibrate", action="store_true", help="train classifiers on few and many patients, print AUCs")
    return made


def check(args: argparse.Namespace) -> None:
    """UsageError for flags that do not go together."""
    if args.output_dir is None and args.sheet is None and not args.calibrate:
        raise UsageError("nothing to do; give --output_dir DIR, --sheet PNG or --calibrate")
    if args.size is not None and (args.seen_by_biomedclip or args.calibrate):
        raise UsageError("--size: not with --seen_by_biomedclip or --calibrate, which are about the default world")
    if args.lesions_per_type and args.diseased is not None:
        raise UsageError("--lesions_per_type: says how many lesions there are, as --diseased does; give one of them")
    if args.limit and not args.twins_of:
        raise UsageError("--limit: only with --twins_of")
    if args.twins_of and {args.healthy, args.diseased, args.lesions_per_type, args.per_patient, args.seed} != {None}:
        raise UsageError("--twins_of: leave out --healthy, --diseased, --lesions_per_type, --per_patient and --seed")
    if args.twins_of and (args.world != "standard" or args.size or args.seen_by_biomedclip or not args.output_dir):
        raise UsageError("--twins_of: needs --output_dir, and takes world and size from the record of the phantoms")


def main(args: argparse.Namespace) -> int:
    check(args)
    from ldm.phantom.dataset import write_biomedclip_pairs, write_dataset, write_sheet
    from ldm.phantom.twins import write_twins
    from ldm.phantom.worlds import world_of

    output, seed, world, rejected = args.output_dir, args.seed or 0, args.world, False
    if args.twins_of:
        made, count, rejects = write_twins(args.twins_of, output, args.limit, args.overwrite)
        said, rejected = f"twins of {count} healthy phantoms", bool(rejects)
        for reject in rejects:
            print(f"no twin of {reject.sample_id}: {reject}")
    elif output and args.seen_by_biomedclip:
        made, said = write_biomedclip_pairs(output, args.overwrite, world), "all that the BiomedCLIP stand-in has seen"
    elif output:
        of_types = args.lesions_per_type * len(world_of(world).lesion_types) if args.lesions_per_type else args.diseased
        healthy, diseased = (default if n is None else n for n, default in ((args.healthy, 160), (of_types, 40)))
        each, size = args.per_patient or 1, args.size
        made = write_dataset(output, seed, healthy, diseased, each, args.overwrite, size, world)
        said = f"{healthy} healthy and {counted(diseased, 'diseased image')}, seed {seed}"
    if output:
        print(f"{output}: {said}" if made else f"{output}: already complete ({said})")
    if args.sheet:
        write_sheet(args.sheet, seed, args.size, world)
        print(f"{args.sheet}: contact sheet")
    if args.calibrate:
        from ldm.phantom.calibration import calibrate

        print(calibrate(seed, world))
    return cli.SOME_REJECTED if rejected else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
