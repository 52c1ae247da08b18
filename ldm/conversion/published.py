"""Checkpoints of the published code, CAT-Diffusion and MedSoft_Diffusion: what can be taken of them, and what it means.

Names and shapes are those of the two public repositories (Nnn-s/CATdiffusion, DaniellaHe/MedSoft_Diffusion), read in
their sources; no weights of theirs were at hand. Beside Stable Diffusion's keys they have

    model.diffusion_model.*.attn3.*, .norm4.*  a third attention in each block, where ours is, but without a gate, over
                                               64 tokens of CLIP ViT-L/14 (to_k: 1024 columns)
    fusion_model.*                             the semantic inpainter that predicts these tokens (CLIP's own layers)
    cond_stage_model2.*                        the frozen image encoder

An attention's keys and values mean something for the tokens it was trained on only, and the inpainter's for that
encoder. So neither goes into a network that reads BiomedCLIP, whatever its width.
"""

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoints.checkpoint import NEW_IN_UNET, PREFIXES
from ldm.conversion.sd_layouts import SourceCheckpoint
from ldm.core.errors import MedSoftError

log = logging.getLogger(__name__)

NAME = "CAT-Diffusion or MedSoft_Diffusion (published code)"
INPAINTER = (
    "fusion_model.embeddings.mask_embedding.weight",
    "fusion_model.embeddings.position_embedding.weight",
    "fusion_model.encoder.layers.0.self_attn.q_proj.weight",
    "fusion_model.spatial_mlp.fc1.weight",
)
THEIR_TEXT = "cond_stage_model.model."  # open_clip's BiomedCLIP, in stage 1 of MedSoft_Diffusion
LEFT = (
    ("third attention without a gate, over tokens of another encoder; a new, silent one takes its place", NEW_IN_UNET),
    ("semantic inpainter of that encoder's tokens; a new MSC takes its place", re.compile(r"^fusion_model\.")),
    ("image encoder; BiomedCLIP is read from its folder", re.compile(r"^cond_stage_model2\.")),
)


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors lie as the published code saves them: its semantic inpainter beside a third attention."""
    ours = any(key.startswith(PREFIXES["msc"]) for key in state)
    return not ours and all(key in state for key in INPAINTER) and any(".attn3.to_k." in key for key in state)


def stable_diffusion_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint that are Stable Diffusion's: all but those of ``LEFT``."""
    return {key: value for key, value in state.items() if not any(pattern.search(key) for _, pattern in LEFT)}


def set_aside(source: SourceCheckpoint) -> None:
    """Where ``source`` is a checkpoint of the published code, leave its Stable Diffusion part in ``source.state``.

    What is not Stable Diffusion's goes to ``source.aside``, by the reason why it cannot be taken. Raises MedSoftError
    for one whose text encoder is BiomedCLIP's.
    """
    if source.stage or not is_published(source.state):
        return
    text = any(key.startswith(PREFIXES["text"]) for key in source.state)
    if not text and any(key.startswith(THEIR_TEXT) for key in source.state):
        raise MedSoftError(
            f"{source.path}: is a checkpoint of MedSoft_Diffusion's stage 1, whose text encoder is BiomedCLIP's "
            f"({THEIR_TEXT}*); the U-Net reads CLIP's, which is not in the file. That stage trains the semantic "
            "inpainter alone, which cannot be taken: nothing is lost by converting sd-v1-5-inpainting.ckpt instead"
        )
    kept = stable_diffusion_part(source.state)
    for reason, pattern in LEFT:
        found = {key: value for key, value in source.state.items() if pattern.search(key)}
        if found:
            source.aside[reason] = found
    source.state = kept


def log_meaning(source: SourceCheckpoint, semantic_dim: int) -> None:
    """Say what was set aside of a published checkpoint, and what the converted file is and is not, in warnings."""
    if not source.aside:
        return
    for reason, found in source.aside.items():
        log.warning("left: %d (%s, ...): %s", len(found), next(iter(found)), reason)
    keys = next(value for tensors in source.aside.values() for key, value in tensors.items() if ".attn3.to_k." in key)
    log.warning(
        "warning: %s: lies as a checkpoint of %s. Its third attention reads tokens of %d channels, here they have %d. "
        "Taken is its Stable Diffusion part alone: a U-Net that was trained beside what is left out, and draws neither "
        "what that model draws nor what Stable Diffusion does until unet_only has trained it again. It is a start for "
        "the four stages, not that model",
        *(source.path, NAME, keys.shape[1], semantic_dim),
    )
    log.warning(
        "warning: %s: does not say which patients are behind it, so nothing will keep these out of validation and test "
        "sets; nor how its masks were meant: MedSoft_Diffusion's loader blackens what lies outside the mask, here the "
        "inside is hidden",
        source.path,
    )
