"""Merge for step 2: the Medical Semantic Controller of one checkpoint, everything else of the other.

    python ./tool/tool_merge_for_stage2.py --stage1_path stage1/last.ckpt --input_path unet_only/last.ckpt \\
        --output_path ckpt_for_stage2.ckpt --config ./models/mldm_v15.yaml

Both files are searched for damage first. Tensors go from file to file: neither is held in memory as a whole.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--stage1_path", type=Path, required=True, help="checkpoint of stage1: gives the MSC")
    parser.add_argument("--input_path", type=Path, required=True, help="checkpoint of unet_only: gives all the rest")
    parser.add_argument("--output_path", type=Path, required=True, help="checkpoint to write (.ckpt or .safetensors)")
    parser.add_argument("--config", type=Path, required=True, help="model YAML: models/mldm_v15.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from something else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.config import load_config
    from ldm.conversion.merge import merge_files

    config = load_config(args.config, args.overrides)
    merge_files(args.stage1_path, args.input_path, args.output_path, config, args.overwrite)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
