"""Turn a Stable Diffusion 1.5 inpainting checkpoint into the checkpoint that the four stages start from.

    python ./tool/model_convert.py --input_path sd-v1-5-inpainting.ckpt --output_path ckpt_for_stage1.ckpt \\
        --config ./models/mldm_v15.yaml

U-Net, autoencoder and text encoder are taken as they are; the third attention (silent at first) and the Medical
Semantic Controller are new.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import MedSoftError

log = logging.getLogger("model_convert")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--input_path", type=Path, required=True, help="sd-v1-5-inpainting.ckpt (or .safetensors)")
    parser.add_argument("--output_path", type=Path, required=True, help="checkpoint to write (.ckpt or .safetensors)")
    parser.add_argument("--config", type=Path, required=True, help="model YAML: models/mldm_v15.yaml")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new parameters (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from something else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    import dataclasses

    from ldm.checkpoint import already_made, read_checkpoint, write_checkpoint
    from ldm.config import load_config
    from ldm.files import fingerprint, sha256_file

    config = load_config(args.config, args.overrides)
    source = read_checkpoint(args.input_path)
    _check_kind(source)
    digest = sha256_file(args.input_path)
    run = fingerprint(["convert", digest, config.architecture(), args.seed])
    if already_made(args.output_path, run, args.overwrite, args.input_path):
        log.info("%s: already complete", args.output_path)
        return cli.DONE
    state, new, left = convert(source, config, args.seed)
    log.info("taken from %s: %d tensors", args.input_path, len(state) - len(new))
    for name, members in _by_part(new).items():
        log.info(
            "new: %s, %d tensors, %.2f M parameters", name, len(members), sum(state[k].numel() for k in members) / 1e6
        )
    if left:
        log.info(
            "left behind: %d tensors that the networks do not have (%s%s)",
            len(left),
            ", ".join(left[:3]),
            ", ..." if len(left) > 3 else "",
        )
    origin = {"file": args.input_path.name, "sha256": digest}
    about = {"config": dataclasses.asdict(config), "stage": "converted", "step": 0, "origin": origin, "run": run}
    write_checkpoint(args.output_path, state, about)
    log.info("written: %s", args.output_path)
    return cli.DONE


def convert(source, config, seed: int):
    """(state of the whole model, new keys, keys left behind). Raises MedSoftError where the source does not fit."""
    import torch

    from ldm.checkpoint import NEW_IN_UNET, PREFIXES, compare
    from ldm.model import MedSoftModel

    torch.manual_seed(seed)
    state = MedSoftModel(config).state_dict()
    new = [key for key in state if NEW_IN_UNET.match(key) or key.startswith(PREFIXES["msc"])]
    expected = {key: value for key, value in state.items() if key not in set(new)}
    offered = {key: value for key, value in source.state.items() if key in expected}
    problems = compare(expected, offered)
    if problems:
        raise MedSoftError(
            f"{source.path}: does not fit this configuration: {'; '.join(problems)}. Use the YAML of this model's size "
            "(models/mldm_v15.yaml for Stable Diffusion 1.5, models/phantom.yaml for the phantom base)"
        )
    for key, value in offered.items():
        if not torch.isfinite(value).all():
            raise MedSoftError(f"{source.path}: {key} holds NaN or infinite values; download the file again")
        state[key] = value.to(state[key].dtype)
    left = [key for key in source.state if key not in expected]
    return state, new, left


def _check_kind(source) -> None:
    """Name the usual mistakes: a text-to-image model, another model family, a checkpoint that is converted already."""
    stem = source.state.get("model.diffusion_model.input_blocks.0.0.weight")
    if stem is None:
        raise MedSoftError(
            f"{source.path}: has no model.diffusion_model.input_blocks.0.0.weight, so it is not a Stable "
            "Diffusion checkpoint in the original layout; expected sd-v1-5-inpainting.ckpt"
        )
    if stem.shape[1] != 9:
        raise MedSoftError(
            f"{source.path}: its first convolution reads {stem.shape[1]} channels, an inpainting model's "
            "reads 9; this is a text-to-image checkpoint. Download sd-v1-5-inpainting.ckpt"
        )
    if any(key.startswith("msc.") for key in source.state):
        raise MedSoftError(f"{source.path}: is converted already (it has msc.* keys); use it as it is")


def _by_part(keys) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault("Medical Semantic Controller" if key.startswith("msc.") else "third attention", []).append(key)
    return found


if __name__ == "__main__":
    cli.run(build_parser(), main)
