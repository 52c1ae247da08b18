"""Turn a Stable Diffusion 1.5 inpainting checkpoint into the checkpoint that the four stages start from.

    python ./tool/model_convert.py --input_path sd-v1-5-inpainting.ckpt --output_path ckpt_for_stage1.ckpt \\
        --config ./models/mldm_v15.yaml

The input is a .ckpt, a .safetensors, or a diffusers folder. U-Net, autoencoder and text encoder are taken as they are;
the third attention (silent at first) and the Medical Semantic Controller are new. A folder that
tool/export_diffusers.py has written gives back the checkpoint it was made from.
"""

import argparse
import logging
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import MedSoftError
from ldm.core.paths import shipped

log = logging.getLogger("model_convert")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument(
        "--input_path",
        type=shipped,
        required=True,
        help="sd-v1-5-inpainting.ckpt (or .safetensors, or a diffusers folder)",
    )
    parser.add_argument("--output_path", type=Path, required=True, help="checkpoint to write (.ckpt or .safetensors)")
    parser.add_argument("--config", type=Path, required=True, help="model YAML: models/mldm_v15.yaml")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new parameters (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from something else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    import dataclasses

    from ldm.checkpoints.checkpoint import already_made, write_checkpoint
    from ldm.checkpoints.files import verify
    from ldm.config import load_config
    from ldm.conversion.sd_layouts import check_kind
    from ldm.core.files import check_target, fingerprint
    from ldm.core.schema import identity
    from ldm.networks.model import skeleton

    config = load_config(args.config, args.overrides)
    expected = skeleton(config)
    size = sum(value.numel() * value.element_size() for value in expected.values())
    check_target(args.output_path, size if args.overwrite or not args.output_path.exists() else 0, args.input_path)
    source = read_source(args.input_path, config, expected)
    check_kind(source, config)
    sizes = [file.stat().st_size for file in weight_files(args.input_path)]
    architecture = identity(config, "architecture")
    asked = fingerprint(["convert", sizes, architecture, args.seed])
    already_made(args.output_path, args.overwrite, asked=asked)
    origin = origin_of(args.input_path)
    run = fingerprint(["convert", origin["sha256"], architecture, args.seed])
    if already_made(args.output_path, args.overwrite, run=run):
        log.info("%s: already complete", args.output_path)
        return cli.DONE
    for file in weight_files(args.input_path):
        log.info("checked: %s, %s", file, verify(file))
    state, new = convert(source, config, expected, args.seed)
    report(source, state, new)
    about = {"config": dataclasses.asdict(config), "stage": "converted", "step": 0}
    about = {**(source.own["about"] if source.own else about), "origin": origin, "asked": asked, "run": run}
    write_checkpoint(args.output_path, state, about)
    log.info("written: %s", args.output_path)
    return cli.DONE


def read_source(path: Path, config, expected):
    """The input's tensors under our keys (a ``sd_layouts.Source``), whatever kind of file or folder it is."""
    from ldm.checkpoints.checkpoint import PREFIXES, read_checkpoint
    from ldm.conversion.diffusers_folder import from_folder
    from ldm.conversion.sd_layouts import from_checkpoint

    if path.is_dir():
        return from_folder(path, config, expected)
    return from_checkpoint(read_checkpoint(path), [key for key in expected if key.startswith(PREFIXES["unet"])])


def weight_files(path: Path) -> list[Path]:
    """The files that hold the input's tensors."""
    from ldm.conversion.diffusers_folder import files_of

    return files_of(path) if path.is_dir() else [path]


def origin_of(path: Path) -> dict:
    """Name and SHA-256 of the input; of a folder, those of its weight files and one over them all."""
    from ldm.core.files import fingerprint, sha256_file

    if not path.is_dir():
        return {"file": path.name, "sha256": sha256_file(path)}
    files = {file.relative_to(path).as_posix(): sha256_file(file) for file in weight_files(path)}
    return {"file": path.resolve().name, "sha256": fingerprint(files), "files": files}


def convert(source, config, expected, seed: int):
    """(state of the whole model, new keys). Raises MedSoftError where the source does not fit.

    A folder that we exported gives exactly what it has; from all others the weights become float32, as the networks
    are trained, and third attention and MSC are new.
    """
    from ldm.checkpoints.checkpoint import PREFIXES, compare, not_finite

    if source.own is None:
        fresh = new_parameters(config, seed)
        wanted = {key: value for key, value in expected.items() if key not in fresh}
    else:
        fresh, parts = {}, source.own["parts"]
        wanted = {key: value for key, value in expected.items() if key.startswith(tuple(PREFIXES[p] for p in parts))}
    offered = {key: value for key, value in source.state.items() if key in wanted}
    problems = compare(wanted, offered)
    if problems:
        raise MedSoftError(
            f"{source.path}: does not fit this configuration: {'; '.join(problems)}. Use the YAML of this model's size "
            "(models/mldm_v15.yaml for Stable Diffusion 1.5, models/phantom.yaml for the phantom base)"
        )
    for bad in not_finite(offered):
        raise MedSoftError(f"{source.path}: {bad} holds NaN or infinite values; download the file again")
    if source.own is None:
        other = {str(value.dtype) for key, value in offered.items() if value.dtype != expected[key].dtype}
        if other:
            source.notes.append(f"weights in {', '.join(sorted(other))} brought to torch.float32")
        offered = {key: value.to(expected[key].dtype) for key, value in offered.items()}
    both = {**fresh, **offered}
    return {key: both[key] for key in expected if key in both}, list(fresh)


def new_parameters(config, seed: int):
    """First values of what Stable Diffusion does not have: attn3 and norm4 of every block, and the MSC."""
    import torch

    from ldm.checkpoints.checkpoint import PREFIXES
    from ldm.networks.attention import CrossAttention, TransformerBlock
    from ldm.networks.msc import MedicalSemanticController
    from ldm.networks.unet import UNet

    torch.manual_seed(seed)
    with torch.device("meta"):
        blocks = {n: block for n, block in UNet(config.unet).named_modules() if isinstance(block, TransformerBlock)}
    made = {}
    for name, block in blocks.items():
        dim = block.norm4.normalized_shape[0]
        attention = CrossAttention(dim, config.unet.semantic_dim, block.attn3.heads, zero_output=True)
        for part, module in (("attn3", attention), ("norm4", torch.nn.LayerNorm(dim))):
            for key, value in module.state_dict(prefix=f"{PREFIXES['unet']}{name}.{part}.").items():
                made[key] = value
    made |= MedicalSemanticController(config.msc, config.biomedclip).state_dict(prefix=PREFIXES["msc"])
    return made


def report(source, state, new: list[str]) -> None:
    """Print what was taken, what is new, what was left behind and why."""
    from ldm.checkpoints.checkpoint import parameter_table
    from ldm.conversion.sd_layouts import left_behind

    for note in source.notes:
        log.info("note: %s", note)
    log.info("taken from %s:", source.path)
    for line in parameter_table({key: value for key, value in state.items() if key not in set(new)}):
        log.info("  %s", line)
    log.info("new:%s", "" if new else " nothing")
    for line in parameter_table({key: state[key] for key in new}):
        log.info("  %s", line)
    for reason, keys in left_behind([key for key in source.state if key not in state]).items():
        log.info("left: %d (%s%s): %s", len(keys), ", ".join(keys[:2]), ", ..." if len(keys) > 2 else "", reason)


if __name__ == "__main__":
    cli.run(build_parser(), main)
