"""Is a faster way of sampling as good? Inpaint the same images with 50 steps of DDIM and with the fast setting.

    python tool/compare_samplers.py --ckpt stage2_2/last.ckpt --config models/mldm_v15.yaml --data dataset \\
        --judge classifier_judge/classifier.safetensors --output_dir samplers

The two settings are fixed, those that docs/inference.md measures: DDIM with 50 steps and guidance at all of them, and
DPM-Solver++(2M) with 20 steps and guidance from 15 % on. Other samplers: dataset_infer.py and tool/evaluate.py.

Inpaints the healthy samples of --data, with prompts of its diseased ones that are not subtle, once for each of several
seeds and each setting: masks, prompts and noise of a seed are the same for both. Measured for each seed: the Frechet
distance of the inpainted crops to the crops of those diseased samples, in BiomedCLIP's features; how often the judge (a
saved classifier that knows lesion types) calls an image diseased; and how often the lesion type it finds is the
prompt's. Of each, comparison.json gives the difference of fast minus DDIM, paired by seed, with its 95 % interval
(Student's t over the seeds; more seeds make it narrower). An interval that holds 0 shows no difference, and no equality
either: its worse end is how much worse the fast setting may be. How much faster it is: `tool/bench.py inference`.
Everything is kept in --output_dir; the same command goes on where it was. Exit code 3: images could not be inpainted;
the others are compared.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.inference.options import InferenceOptions


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="a final checkpoint")
    parser.add_argument("--config", type=Path, required=True, help="model YAML")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or JSON, healthy and diseased samples")
    parser.add_argument("--judge", type=Path, required=True, help="classifier.safetensors of classifier.py, task type")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for images and comparison.json")
    parser.add_argument("--seeds", type=cli.Number(int, 2, 1000), default=3, help="how many, from 0 on")
    parser.add_argument("--limit", type=cli.COUNT, help="at most so many healthy samples")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    options = InferenceOptions(
        output_dir=args.output_dir,
        ckpt=args.ckpt,
        config=args.config,
        data=args.data,
        choose="healthy",
        limit=args.limit,
        device=args.device,
        overrides=tuple(args.overrides),
    )
    from ldm.bench.samplers import compare_samplers

    return cli.DONE if compare_samplers(options, args.judge, args.seeds) else cli.SOME_REJECTED


if __name__ == "__main__":
    cli.run(build_parser(), main)
