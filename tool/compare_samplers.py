"""Is a faster way of sampling as good? Inpaint the same images with several settings, and measure what differs.

    python tool/compare_samplers.py --ckpt stage2_2/last.ckpt --config models/mldm_v15.yaml --data dataset \\
        --judge classifier_judge/classifier.safetensors --output_dir samplers \\
        --setting "ddim50 sampler=ddim steps=50 spacing=leading" --setting "seven steps=7"

A setting is a name and keys of the YAML's section `sampling`; what it does not name is the YAML's. The first one is
what the others are compared with. Without --setting: 50 steps of DDIM, and the YAML's own way.

Inpaints the healthy samples of --data, with prompts of its diseased ones that are not subtle, once for each of
several seeds and each setting, and once with very many steps of DDIM: masks, prompts and noise of a seed are the same
for all. Measured for each image: the distance to the one with many steps, the root mean square inside the mask in
grey levels (of 255), which tells settings apart that the other measures cannot. For each seed: the Frechet distance
of the inpainted crops to the crops of those diseased samples, in BiomedCLIP's features; how often the judge (a saved
classifier that knows lesion types) calls an image diseased; and how often the lesion type it finds is the prompt's.
comparison.json has each with its difference from the first setting and the difference's 95 % interval (Student's t,
paired by image or by seed; more of them make it narrower), distances.csv every image's distance. An interval that
holds 0 shows no difference, and no equality either: its worse end is how much worse the setting may be. A setting's
cost is its half-calls, how often the U-Net sees an image; in seconds: `tool/bench.py inference`. Everything is kept
in --output_dir; the same command goes on where it was. Exit code 3: images could not be inpainted; the others are
compared.
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
    parser.add_argument(
        "--setting", action="append", default=[], metavar='"NAME KEY=VALUE ..."', help="once for each way of sampling"
    )
    parser.add_argument(
        "--many_steps", type=cli.COUNT, default=200, help="steps of DDIM of the images to which distances are measured"
    )
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

    whole = compare_samplers(options, args.judge, args.seeds, args.setting, args.many_steps)
    return cli.DONE if whole else cli.SOME_REJECTED


if __name__ == "__main__":
    cli.run(build_parser(), main)
