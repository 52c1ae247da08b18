"""Train the two small pretrained models of the phantom world and write them where ``models/phantom.yaml`` expects them.

    OUTPUT/biomedclip/                  knows lesions, as BiomedCLIP does: contrastive on phantom image-prompt pairs
    OUTPUT/sd-phantom-inpainting.ckpt   has never seen a lesion or a lesion word, as Stable Diffusion has not: trained
                                        on generic images with plain words and healthy spines; half precision, in the
                                        key layout of sd-v1-5-inpainting.ckpt (autoencoder, U-Net, text encoder)
    OUTPUT/training_log.csv             part, step, mean loss since the row before, seconds, and the batch's
                                        PSNR (autoencoder) or share of hits (clip)

    OUTPUT/training.json                the settings of each part

It takes about 45 minutes on two cores. After an interruption the command goes on, without --overwrite, with the part
that was not finished.

    python tool/train_phantom_base.py --parts clip --world words --output_dir words_base

trains a BiomedCLIP stand-in that knows the lesions and sentences of another world (docs/worlds.md), for --biomedclip.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("models/phantom_base"), help="where the models go")
    parser.add_argument("--config", type=Path, default=Path("models/phantom.yaml"), help="sizes of the networks")
    parser.add_argument("--autoencoder_steps", type=cli.COUNT, default=900, help="steps of 16 crops")
    parser.add_argument("--clip_steps", type=cli.COUNT, default=1200, help="steps of 64 image-prompt pairs")
    parser.add_argument("--unet_steps", type=cli.COUNT, default=1500, help="steps of 32 crops")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of weights, order and noise")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["autoencoder", "clip", "unet"],
        default=["autoencoder", "clip", "unet"],
        help="train only these parts (unet needs autoencoder)",
    )
    parser.add_argument("--world", default="standard", help="with --parts clip: that of its pairs (docs/worlds.md)")
    parser.add_argument("--overwrite", action="store_true", help="train parts again that are already there")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.config import load_config
    from ldm.phantom.base_training import train_base

    steps = {part: getattr(args, f"{part}_steps") for part in args.parts}
    train_base(load_config(args.config), args.output_dir, steps, args.seed, args.overwrite, args.world)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
