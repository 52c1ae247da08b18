"""Inpaint lesions over a dataset folder; only the soft-masked region may change.

    python dataset_infer.py --ckpt stage2_2/last.ckpt --output_dir results --config ./models/mldm_v15.yaml

Without --data it inpaints the healthy samples of openimages_format_train.json, with prompts of its diseased ones. The
output is a dataset folder again: one sample folder <sample_id>__v<k> per image. The same command again finishes what is
missing; --replay makes one image again from its meta.json.
"""

import argparse

from ldm.core import cli
from ldm.inference.options import TRIES, InferenceOptions


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    cli.add_flags(parser, InferenceOptions)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    args.overrides = [word for word in args.match if "=" in word] + args.overrides  # which stand behind --match
    args.match = tuple(word for word in args.match if "=" not in word)
    options = cli.options(InferenceOptions, args)
    options.validate()
    from ldm.inference.run import run

    if not options.check:
        return run(options)
    from ldm.classifier.run import load_judge
    from ldm.evaluation.check import LesionChecks

    judge = load_judge(options.judge, options.device) if options.judge else None
    return run(options, LesionChecks(options.train_json, options.tries or TRIES, judge))


if __name__ == "__main__":
    cli.run(build_parser(), main)
