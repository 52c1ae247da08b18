"""Let a classifier of lesion types read drawn lesions: are they seen, are they what was asked for, does a border show?

    python tool/judge_results.py results --judge classifier_judge/classifier.safetensors --output judged.json

RESULTS is a folder or annotation file; its diseased images are judged. The type asked for is `sign` of meta.json where
it is given (the world elsewhere), else `lesion_type`. Into the JSON: detection, agreement, asked_drawn (bits), seam,
seam_error (its distance from 1), changed_outside (pixels), and a row an image. Exit code 3: some could not be read.
"""

import argparse
from functools import partial
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("results", metavar="RESULTS", type=Path, help="drawings: a folder or an annotation file")
    made.add_argument(
        "--judge", type=Path, required=True, help="classifier.safetensors of a classifier with task: type"
    )
    text = "real lesions, folder or annotation file: the seam is the gradient at the drawings' contours over theirs"
    made.add_argument("--real", type=Path, help=text)
    made.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.classifier.run import predict
    from ldm.evaluation.drawings import judge_results

    rejected = judge_results(args.results, args.judge, partial(predict, args.judge), args.real, args.output)
    return cli.SOME_REJECTED if rejected else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
