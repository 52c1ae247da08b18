"""From a Stable Diffusion 1.5 inpainting checkpoint to the one that the four stages start from."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import (
    PREFIXES,
    THUMBNAIL,
    already_made,
    parameter_table,
    read_checkpoint,
    tensors_of,
    write_checkpoint,
)
from ldm.checkpoints.files import verify
from ldm.checkpoints.fitting import check_finite, compare
from ldm.config import Architecture, Config
from ldm.conversion.agreement import check_agreement
from ldm.conversion.diffusers_folder import from_folder
from ldm.conversion.published import NAME, log_meaning, set_aside
from ldm.conversion.sd_layouts import (
    UNKNOWN,
    SourceCheckpoint,
    check_kind,
    check_left_over,
    check_quantised,
    from_checkpoint,
    left_behind,
)
from ldm.core.errors import MedSoftError
from ldm.core.files import check_target, fingerprint, named_seed
from ldm.core.schema import identity
from ldm.networks.attention import CrossAttention, TransformerBlock
from ldm.networks.model import skeleton
from ldm.networks.msc import MedicalSemanticController
from ldm.networks.unet import UNet

log = logging.getLogger(__name__)


def convert_file(input_path: Path, output_path: Path, config: Config, seed: int, overwrite: bool) -> None:
    """Write the checkpoint of the whole model from ``input_path``: a .ckpt, a .safetensors or a diffusers folder.

    U-Net, autoencoder and text encoder are the input's; what Stable Diffusion does not have is new, random by
    ``seed``. An output that was made from the same input is left as it is. Raises MedSoftError for an input that is
    damaged or does not fit ``config``, UsageError for an output that was made from something else.
    """
    expected = skeleton(config.architecture)
    size = sum(value.numel() * value.element_size() for value in expected.values())
    check_target(output_path, size if overwrite or not output_path.exists() else 0, input_path)
    if input_path.is_dir():
        source = from_folder(input_path, config.architecture, expected)
    else:
        source = from_checkpoint(read_checkpoint(input_path), expected)
    set_aside(source)
    check_kind(source, config.unet)
    check_agreement(source, config.architecture)
    architecture = identity(config, "architecture")
    asked = fingerprint(["convert", [file.path.stat().st_size for file in source.files], architecture, seed])
    already_made(output_path, overwrite, asked=asked)
    origin = origin_of(source)
    run = fingerprint(["convert", origin["sha256"], architecture, seed])
    if already_made(output_path, overwrite, run=run):
        log.info("%s: already complete", output_path)
        return
    for file in source.files:
        log.info("checked: %s, %s", file.path, verify(file.path))
    state, new = convert(source, config.architecture, expected, seed)
    log_origin(source, state, new)
    log_meaning(source, config.unet.semantic_dim)
    converted = {"config": dataclasses.asdict(config), "stage": "converted", "step": 0}
    metadata = source.own["about"] if source.own else converted
    write_checkpoint(output_path, state, {**metadata, "origin": origin, "asked": asked, "run": run}, *source.files)
    log.info("written: %s", output_path)


def origin_of(source: SourceCheckpoint) -> dict[str, Any]:
    """Name and SHA-256 of the input; of a folder, those of its weight files and one over them all."""
    path, digests = source.path, {file.path: file.sha256() for file in source.files}
    if path in digests:
        published = {"layout": NAME} if source.aside else {}
        return {"file": path.name, "sha256": digests[path], **published}
    files = {file.relative_to(path).as_posix(): digest for file, digest in digests.items()}
    return {"file": path.resolve().name, "sha256": fingerprint(files), "files": files}


def convert(
    source: SourceCheckpoint, architecture: Architecture, expected: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """(state of the whole model, new keys). Raises MedSoftError where the source does not fit.

    A folder that we exported gives exactly what it has; from all others the weights become float32, as the networks
    are trained, and third attention and MSC are new.
    """
    fresh: dict[str, Tensor] = {}
    if source.own is None:
        fresh = new_parameters(architecture, seed)
        wanted = {key: value for key, value in expected.items() if key not in fresh}
    else:
        wanted = tensors_of(expected, source.own["parts"])
    offered = {key: value for key, value in source.state.items() if key in wanted}
    if source.own is None:
        check_quantised(source, offered)
    problems = compare(wanted, offered)
    if problems:
        raise MedSoftError(
            f"{source.path}: does not fit this configuration: {'; '.join(problems)}. Use the YAML of this model's size "
            "(models/mldm_v15.yaml for Stable Diffusion 1.5, models/phantom.yaml for the phantom base)"
        )
    check_finite(offered, source.path)
    if source.own is None:
        check_left_over(source, offered)
        other = {str(value.dtype) for key, value in offered.items() if value.dtype != expected[key].dtype}
        if other:
            source.notes.append(f"weights in {', '.join(sorted(other))} brought to torch.float32")
        offered = {key: value.to(expected[key].dtype) for key, value in offered.items()}
    both = {**fresh, **offered}
    return {key: both[key] for key in expected if key in both}, list(fresh)


def new_parameters(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """First values of what Stable Diffusion does not have: attn3, norm4, the MSC, a control's own."""
    # torch takes 32 bits of a seed: other ones are mixed, so that two seeds do not give the same weights.
    torch.manual_seed(seed if 0 <= seed < 2**32 else named_seed("new parameters", seed))
    with torch.device("meta"):
        blocks = {
            n: block for n, block in UNet(architecture.unet).named_modules() if isinstance(block, TransformerBlock)
        }
    made: dict[str, Tensor] = {}
    for name, block in blocks.items():
        dim = block.norm4.normalized_shape[0]
        attention = CrossAttention(dim, architecture.unet.semantic_dim, block.attn3.heads, zero_output=True)
        for part, module in (("attn3", attention), ("norm4", torch.nn.LayerNorm(dim))):
            made |= module.state_dict(prefix=f"{PREFIXES['unet']}{name}.{part}.")
    made |= MedicalSemanticController(architecture.msc, architecture.biomedclip).state_dict(prefix=PREFIXES["msc"])
    if architecture.unet.third_attention == "table":
        size = architecture.pooled_tokens, architecture.unet.semantic_dim
        made[PREFIXES["unet"] + "attn3_table"] = torch.randn(size)
    if architecture.unet.thumbnail:
        convolution = torch.nn.Conv2d(architecture.unet.out_channels, architecture.unet.model_channels, 3)
        made |= convolution.state_dict(prefix=THUMBNAIL)
    return made


def log_origin(source: SourceCheckpoint, state: Mapping[str, Tensor], new: Sequence[str]) -> None:
    """Say what was taken, what is new, what was left behind and why."""
    for note in source.notes:
        log.info("note: %s", note)
    log.info("taken from %s:", source.path)
    for line in parameter_table({key: value for key, value in state.items() if key not in set(new)}):
        log.info("  %s", line)
    log.info("new:%s", "" if new else " nothing")
    for line in parameter_table({key: state[key] for key in new}):
        log.info("  %s", line)
    for reason, keys in left_behind([key for key in source.state if key not in state]).items():
        shown = (len(keys), ", ".join(keys[:2]), ", ..." if len(keys) > 2 else "", reason)
        log.log(logging.WARNING if reason == UNKNOWN else logging.INFO, "left: %d (%s%s): %s", *shown)
