"""Stable Diffusion checkpoints as people have them, brought to the keys of ``sd-v1-5-inpainting.ckpt``.

Also names what a file is when it is not an SD 1.5 inpainting model. The diffusers folder is read by
``ldm.conversion.diffusers_folder``.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.checkpoint import NAMES, NEW_IN_UNET, PREFIXES, Checkpoint, plain_keys
from ldm.config import UNetConfig
from ldm.core.errors import MedSoftError
from ldm.core.tables import counted

log = logging.getLogger(__name__)

STEM = PREFIXES["unet"] + "input_blocks.0.0.weight"
TEXT_KEYS = PREFIXES["unet"] + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SHORT_TEXT = re.compile(r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")
SCHEDULE = re.compile(r"^(\w*alphas_cumprod\w*|betas|logvar|posterior_\w+)$")
CLIP_ONLY = r"^cond_stage_model\..*(text_projection|logit_scale)|^text_encoder/text_projection\."
LORA = re.compile(r"lora|lycoris|hada_|lokr_|oft_blocks|dora_scale", re.IGNORECASE)
LEFT = (  # why a tensor is left behind
    ("noise schedule, computed from the YAML", SCHEDULE),
    ("position numbers, made by the text encoder itself", re.compile(r"\.position_ids$")),
    ("moving averages; the plain weights are taken", re.compile(r"^model_ema\.diffusion_model")),
    ("counters of the moving averages", re.compile(r"^model_ema\.")),
    ("loss of the autoencoder's training", re.compile(r"^first_stage_model\.(loss|model_ema)\.")),
    ("a LoRA that is not merged", LORA),
    ("CLIP's comparison of texts with images, which Stable Diffusion does not read", re.compile(CLIP_ONLY)),
)
UNKNOWN = "not part of any network here"
PUBLISHED = ("fusion_model.", "cond_stage_model2.")  # where CAT-Diffusion and the published code keep them


@dataclass
class SourceCheckpoint:
    """What conversion starts from: tensors under the original layout's keys, and what was done to get there.

    files:  what was read of ``path``, a file or the files of a folder.
    layers: the modules whose weights are looked for, as the files spell them.
    header: the text metadata of ``.safetensors`` files.
    stage:  which stage left it, if a checkpoint of this method says so.
    own:    ``medsoft/config.json`` of a folder that we exported; None for everybody else's files.
    aside:  tensors of the published code that cannot be taken, by the reason (``ldm.conversion.published``).
    """

    path: Path
    state: dict[str, Tensor]
    files: list[Checkpoint]
    layers: set[str]
    header: dict[str, str]
    stage: str | None = None
    notes: list[str] = field(default_factory=list)
    own: dict | None = None
    aside: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def from_checkpoint(checkpoint: Checkpoint, expected: Iterable[str]) -> SourceCheckpoint:
    """The checkpoint's tensors under the original layout's keys; ``expected``: those that the networks need.

    Wrapper levels (``module.``, ``_orig_mod.``) are dropped, the shorter text-encoder names of transformers >= 5.6
    accepted. Weights are the plain ones; moving averages (``model_ema.*``) only if the U-Net is there in no other form.
    """
    notes = []
    if checkpoint.external:
        names = ", ".join(checkpoint.external[:3]) + (", ..." if len(checkpoint.external) > 3 else "")
        notes.append(f"objects of other programs, neither imported nor used: {names}")
    state = plain_keys(checkpoint.path, checkpoint.state, lambda key: SHORT_TEXT.sub(PREFIXES["text"], key))
    renamed = len(state.keys() - checkpoint.state.keys())
    if renamed:
        notes.append(f"{counted(renamed, 'key')} brought to the original layout (levels added by other programs)")
    # LDM's moving average keeps ``model.diffusion_model.*`` without its dots.
    needed = [key for key in expected if key.startswith(PREFIXES["unet"])]
    averages = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in needed}
    if not any(key.startswith(PREFIXES["unet"]) for key in state) and averages.get(STEM) in state:
        state |= {key: state.pop(average) for key, average in averages.items() if average in state}
        notes.append("U-Net taken from the moving averages (model_ema.*): the file has no plain U-Net")
    layers = {key.rpartition(".")[0] for key in expected}
    about = checkpoint.header, checkpoint.metadata.get("stage")
    return SourceCheckpoint(checkpoint.path, state, [checkpoint], layers, *about, notes)


def check_kind(source: SourceCheckpoint, unet: UNetConfig) -> None:
    """Raise a MedSoftError that names the usual mistakes: another model family, a text-to-image model, our own file."""
    state, path = source.state, source.path
    if source.own is None:
        _check_untrained(source)
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
    for part in ("autoencoder", "text"):
        if source.own is None and not any(key.startswith(PREFIXES[part]) for key in state):
            name = NAMES[part] + (" (VAE)" if part == "autoencoder" else "")
            raise MedSoftError(
                f"{path}: holds no {name}, no key begins with {PREFIXES[part]}; some programs leave it out. Take the "
                "file that has it, such as sd-v1-5-inpainting.ckpt"
            )


def _check_untrained(source: SourceCheckpoint) -> None:
    """Refuse what has a trained third attention or MSC, which a conversion would replace by new ones."""
    state, path = source.state, source.path
    msc = any(key.startswith(PREFIXES["msc"]) for key in state)
    if source.stage or msc:
        found = f"it was left by {source.stage}" if source.stage else "it has msc.* keys"
        raise MedSoftError(
            f"{path}: is converted already ({found}); give it to ver_train.py or dataset_infer.py as it is, or join "
            "what stage1 and unet_only left with tool/tool_merge_for_stage2.py"
        )
    trained = [key for key in state if NEW_IN_UNET.match(key) or key.startswith(PUBLISHED)]
    if trained:
        raise MedSoftError(
            f"{path}: holds {_some(trained)} of a third attention or semantic inpainter, and does not say that a stage "
            "of this repository left them; nor is it a whole checkpoint of CAT-Diffusion or the published "
            "MedSoft_Diffusion. What they read is not known, so they are not taken; nor are they thrown away. Give the "
            "file that the stage left; of another program's, convert the Stable Diffusion checkpoint that its training "
            "started from, and train the stages"
        )


def check_quantised(source: SourceCheckpoint, taken: Mapping[str, Tensor]) -> None:
    """MedSoftError if ``taken``, which goes into the networks, holds whole numbers or is scaled by other tensors."""
    path, left = source.path, [key for key in source.state if key not in taken and not LORA.search(key)]
    beside = [key for key in left if any(level in source.layers for level in _levels(key))]
    whole = [key for key, value in taken.items() if not value.is_floating_point()]
    if beside or whole:
        stand = "stands" if len(beside) == 1 else "stand"
        scales = f"beside weights {stand} {_some(beside)}" if beside else "their scales are not there"
        hold = "holds" if len(whole) == 1 else "hold"
        kind = f"{_some(whole)} {hold} whole numbers ({taken[whole[0]].dtype}), and " if whole else ""
        raise MedSoftError(
            f"{path}: {kind}{scales}: its weights are quantised or scaled, which is not undone here. Take the model in "
            "float32, float16 or bfloat16"
        )


def check_left_over(source: SourceCheckpoint, taken: Mapping[str, Tensor]) -> None:
    """Refuse a source whose U-Net has more layers than ours, for they would be lost; warn of a LoRA that is not merged.

    ``taken``: the tensors that go into the networks.
    """
    path, left = source.path, [key for key in source.state if key not in taken]
    lora = [key for key in left if LORA.search(key)]
    more = [key for key in left if key not in set(lora) and key.startswith((PREFIXES["unet"], "unet/"))]
    if more:
        raise MedSoftError(
            f"{path}: its U-Net has layers that Stable Diffusion 1.5's has not, {_some(more)}; without them it would "
            "compute something else. Take the model that they were added to"
        )
    if lora:
        log.warning(
            "warning: %s: a LoRA that is not merged, %s, is left out; to have it in the model, merge "
            "it first, in the program that trained it",
            *(path, _some(lora)),
        )


def _levels(key: str) -> list[str]:
    """The modules above a tensor, the nearest last."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _some(keys: Sequence[str]) -> str:
    return f"{counted(len(keys), 'tensor')} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"


def left_behind(keys: list[str]) -> dict[str, list[str]]:
    """Keys that no network here has, by the reason why."""
    found: dict[str, list[str]] = {}
    for key in keys:
        reason = next((reason for reason, pattern in LEFT if pattern.search(key)), UNKNOWN)
        found.setdefault(reason, []).append(key)
    return found
