"""Turn a Stable Diffusion 1.5 inpainting checkpoint into the checkpoint that the four stages start from.

    python ./tool/model_convert.py --input_path sd-v1-5-inpainting.ckpt --output_path ckpt_for_stage1.ckpt \\
        --config ./models/mldm_v15.yaml

The input is a .ckpt, a .safetensors, or a diffusers folder. U-Net, autoencoder and text encoder are taken as they are;
the third attention (silent at first) and the Medical Semantic Controller are new. A folder that
tool/export_diffusers.py has written gives back the checkpoint it was made from.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.core.paths import shipped


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    text = "sd-v1-5-inpainting.ckpt (or .safetensors, or a diffusers folder)"
    parser.add_argument("--input_path", type=shipped, required=True, help=text)
    parser.add_argument("--output_path", type=Path, required=True, help="checkpoint to write (.ckpt or .safetensors)")
    parser.add_argument("--config", type=Path, required=True, help="model YAML: models/mldm_v15.yaml")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the new parameters")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from something else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.config import load_config
    from ldm.conversion.convert import convert_file

    config = load_config(args.config, args.overrides)
    convert_file(args.input_path, args.output_path, config, args.seed, args.overwrite)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
