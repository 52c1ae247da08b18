"""Which of its two conditions draws the lesion, the text or the MSC's tokens? And what do the tokens hold?

    python tool/measure_paths.py --ckpt stage2_2/last.ckpt --config models/mldm_v15.yaml --data dataset \\
        --judge classifier_judge/classifier.safetensors --output paths.json

--data holds healthy and diseased samples that no stage was trained on, the diseased ones with lesion types; those
that are `subtle` are left out. Three parts:

drawings: lesions are drawn into the healthy samples, each four times with the same mask and noise: by text and tokens
of one prompt (both), by the text alone (tokens zero), by the tokens alone (empty text), and crossed, by the text of one
prompt and the tokens of another, of a different type. The judge (a saved classifier that knows lesion types) says how
often a lesion is seen, and how often its type is that of the prompt and that of the other one.

redrawn: the diseased samples' lesions are drawn anew in their own masks, by what the MSC predicts (both), by a prompt
of another type, which then is the other one (swapped), and by the tokens of the image with its lesion (true_tokens);
the judge reads these and the lesions themselves. Where a swapped prompt is still drawn as the mask's type, the form of
the mask has become a part of the prompt; where true tokens draw no better, it is not the MSC that limits the drawings.

held_out: on the diseased samples, the cosine of the predicted tokens to those of the image with its lesion, inside the
mask, beside that of the mean token of the other samples of the type; and the diffusion loss inside the mask with the
model's own inputs, and how much it rises when one of them is another: what a condition is worth to the U-Net.

The same command gives the same numbers. Exit code 3: samples could not be used, the others are measured.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint of the whole model")
    parser.add_argument("--config", type=Path, required=True, help="model YAML")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or JSON, healthy and diseased samples")
    parser.add_argument("--judge", type=Path, required=True, help="classifier.safetensors of classifier.py, task type")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--limit", type=cli.COUNT, default=100, help="at most so many samples of either part")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="of masks and noise")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.mechanism.paths import PathOptions, measure_paths

    options = PathOptions(**{name: value for name, value in vars(args).items() if name != "debug"})
    return cli.DONE if measure_paths(options) else cli.SOME_REJECTED


if __name__ == "__main__":
    cli.run(build_parser(), main)
