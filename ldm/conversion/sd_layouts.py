"""Stable Diffusion checkpoints as people have them, brought to the keys of ``sd-v1-5-inpainting.ckpt``.

Also names what a file is when it is not an SD 1.5 inpainting model. The diffusers folder is read by
``ldm.conversion.diffusers_folder``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.checkpoint import PREFIXES, Checkpoint
from ldm.config import UNetConfig
from ldm.core.errors import MedSoftError

STEM = PREFIXES["unet"] + "input_blocks.0.0.weight"
TEXT_KEYS = PREFIXES["unet"] + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
WRAPPERS = {"module", "_orig_mod"}  # levels that DistributedDataParallel and torch.compile put into keys
SHORT_TEXT = re.compile(r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")
SCHEDULE = re.compile(r"^(\w*alphas_cumprod\w*|betas|logvar|posterior_\w+)$")
LEFT = (  # why a tensor is left behind
    ("noise schedule, computed from the YAML", SCHEDULE),
    ("position numbers, made by the text encoder itself", re.compile(r"\.position_ids$")),
    ("moving averages; the plain weights are taken", re.compile(r"^model_ema\.diffusion_model")),
    ("counters of the moving averages", re.compile(r"^model_ema\.")),
    ("not part of any network here", re.compile(r"")),
)


@dataclass
class SourceCheckpoint:
    """What conversion starts from: tensors under the original layout's keys, and what was done to get there.

    ``files`` hold the tensors of ``path``, a file or a folder.
    ``own`` is ``medsoft/config.json`` of a folder that we exported; None for everybody else's files.
    """

    path: Path
    state: dict[str, Tensor]
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    own: dict | None = None


def from_checkpoint(checkpoint: Checkpoint, expected: Iterable[str]) -> SourceCheckpoint:
    """The checkpoint's tensors under the original layout's keys; ``expected``: those that the networks need.

    Wrapper levels (``module.``, ``_orig_mod.``) are dropped, the shorter text-encoder names of transformers >= 5.6
    accepted. Weights are the plain ones; moving averages (``model_ema.*``) only if the U-Net is there in no other form.
    """
    notes = []
    if checkpoint.external:
        names = ", ".join(checkpoint.external[:3]) + (", ..." if len(checkpoint.external) > 3 else "")
        notes.append(f"objects of other programs, neither imported nor used: {names}")
    state: dict[str, Tensor] = {}
    renamed = 0
    for key, value in checkpoint.state.items():
        plain = ".".join(level for level in key.split(".") if level not in WRAPPERS)
        plain = SHORT_TEXT.sub(PREFIXES["text"], plain)
        if plain in state:
            raise MedSoftError(f"{checkpoint.path}: {key} is there twice, with and without the level its program added")
        renamed += plain != key
        state[plain] = value
    if renamed:
        notes.append(f"{renamed} keys brought to the original layout (levels added by other programs)")
    # LDM's moving average keeps ``model.diffusion_model.*`` without its dots.
    needed = [key for key in expected if key.startswith(PREFIXES["unet"])]
    averages = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in needed}
    if not any(key.startswith(PREFIXES["unet"]) for key in state) and averages.get(STEM) in state:
        state |= {key: state.pop(average) for key, average in averages.items() if average in state}
        notes.append("U-Net taken from the moving averages (model_ema.*): the file has no plain U-Net")
    return SourceCheckpoint(checkpoint.path, state, [checkpoint.path], notes)


def check_kind(source: SourceCheckpoint, unet: UNetConfig) -> None:
    """Raise a MedSoftError that names the usual mistakes: another model family, a text-to-image model, our own file."""
    state, path = source.state, source.path
    if any(key.startswith(("conditioner.embedders.", PREFIXES["unet"] + "label_emb.")) for key in state):
        raise MedSoftError(f"{path}: is a Stable Diffusion XL model; download sd-v1-5-inpainting.ckpt")
    width = state[TEXT_KEYS].shape[1] if TEXT_KEYS in state else None
    if width != unet.context_dim and (width == 1024 or any(k.startswith("cond_stage_model.model.") for k in state)):
        raise MedSoftError(
            f"{path}: is a Stable Diffusion 2 model (OpenCLIP text encoder); download sd-v1-5-inpainting.ckpt"
        )
    stem = state.get(STEM)
    if stem is None:
        alone = any(key.startswith("down_blocks.") for key in state)
        raise MedSoftError(
            f"{path}: has no {STEM}, so it is not a Stable Diffusion checkpoint in the original layout; expected "
            + ("the whole diffusers folder (unet/, vae/, text_encoder/)" if alone else "sd-v1-5-inpainting.ckpt")
        )
    if stem.shape[1] != unet.in_channels:
        raise MedSoftError(
            f"{path}: its first convolution reads {stem.shape[1]} channels, an inpainting model's reads "
            f"{unet.in_channels}; this is a text-to-image checkpoint. Download sd-v1-5-inpainting.ckpt"
        )
    if source.own is None and any(key.startswith(PREFIXES["msc"]) for key in state):
        raise MedSoftError(f"{path}: is converted already (it has msc.* keys); use it as it is")


def left_behind(keys: list[str]) -> dict[str, list[str]]:
    """Keys that no network here has, by the reason why."""
    found: dict[str, list[str]] = {}
    for key in keys:
        reason = next(reason for reason, pattern in LEFT if pattern.search(key))
        found.setdefault(reason, []).append(key)
    return found
