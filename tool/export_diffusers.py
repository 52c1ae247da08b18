"""Write a checkpoint as a diffusers folder, for programs that know Stable Diffusion but not this method.

    python ./tool/export_diffusers.py --ckpt stage2_2/last.ckpt --output_dir exported

diffusers' StableDiffusionInpaintPipeline.from_pretrained("exported") loads U-Net, autoencoder, text encoder, tokenizer
and scheduler, offline. What it does not know, the third attention and the Medical Semantic Controller, lies in
exported/medsoft/. tool/model_convert.py --input_path exported makes the checkpoint again, bit for bit.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint made by this repository")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder exported from something else")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.conversion.export import export_folder

    export_folder(args.ckpt, args.output_dir, args.overwrite)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
