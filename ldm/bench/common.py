"""What the speed measurements share: the same networks in diffusers, and two calls that take turns."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoints.checkpoint import NEW_IN_UNET
from ldm.config import BiomedClipConfig
from ldm.conversion.diffusers_folder import autoencoder_configuration, scheduler_configuration, unet_configuration
from ldm.core.files import write_json
from ldm.core.paths import SHIPPED
from ldm.core.threads import processor
from ldm.networks.biomedclip import build_clip
from ldm.networks.model import MedSoftModel

PHANTOM_CLIP = SHIPPED / "models" / "phantom_base" / "biomedclip"

# The network of microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224: model_cfg of its open_clip_config.json. The
# sizes of its text tower, microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract, are BERT's defaults.
BIOMEDCLIP: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {
        "timm_model_name": "vit_base_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 224,
    },
    "text_cfg": {
        "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 256,
    },
}
BIOMEDBERT = {"model_type": "bert"}


@dataclass(frozen=True)
class BenchOptions:
    """What a measurement is told; the flags of tool/bench.py."""

    config: Path
    batch_size: int
    repeats: int
    precision: str
    steps: int
    sizes: str | None
    compile: bool
    samples: int
    overrides: list[str]


def this_machine() -> tuple[torch.device, str]:
    """The device that is measured, and its name; of a CPU also the number of threads."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    return torch.device("cpu"), f"{processor()}, {torch.get_num_threads()} threads"


def diffusers_twins(model: MedSoftModel) -> tuple[Any, Any]:
    """UNet2DConditionModel and AutoencoderKL of the same sizes, with the model's weights, on its device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    state = {key: value for key, value in model.state_dict().items() if not NEW_IN_UNET.match(key)}
    unet = UNet2DConditionModel.from_config(unet_configuration(model.architecture))
    unet.load_state_dict(convert_ldm_unet_checkpoint(state, dict(unet.config)))
    vae = AutoencoderKL.from_config(autoencoder_configuration(model.architecture))
    vae.load_state_dict(convert_ldm_vae_checkpoint(state, dict(vae.config)))
    device = next(model.parameters()).device
    return unet.to(device).eval(), vae.to(device).eval()


def diffusers_pipeline(model: MedSoftModel) -> Any:
    """StableDiffusionInpaintPipeline of the same weights with DDIM, for text-encoder states given as prompt_embeds."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    unet, vae = diffusers_twins(model)
    scheduler = DDIMScheduler.from_config(scheduler_configuration(model.architecture.diffusion))
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, **absent}
    # What diffusers shows to a type checker is its placeholder for a missing package, which has no methods.
    made: Any = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def measure_alternately(
    calls: Sequence[Callable], repeats: int, device: torch.device, warm_up: int = 2
) -> tuple[np.ndarray, ...]:
    """(seconds, seconds of all cores) of each of the ``calls``, medians of what is counted after ``warm_up`` rounds.

    They take turns. The cores' own time, which other programs disturb less, says nothing where a GPU does the work.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for index in range(repeats + warm_up):
        for call, kept in zip(calls, times, strict=True):
            start, cores = time.perf_counter(), time.process_time()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= warm_up:
                kept.append((time.perf_counter() - start, time.process_time() - cores))
    return tuple(np.median(each, axis=0) for each in times)


def random_biomedclip(sizes: BiomedClipConfig, scratch: Path) -> Path:
    """A folder with a BiomedCLIP of the size that is asked for: the phantoms', or one of the released sizes with
    random weights (0.8 GB), made in ``scratch``."""
    target = PHANTOM_CLIP if sizes.token_dim != 768 else scratch / "biomedclip"
    if target.is_dir():
        return target
    shutil.copytree(PHANTOM_CLIP, target, ignore=shutil.ignore_patterns("*.bin", "config.json"))
    write_json(target / "open_clip_config.json", {"model_cfg": BIOMEDCLIP, "preprocess_cfg": {}})
    torch.save(build_clip(BIOMEDCLIP, BIOMEDBERT).state_dict(), target / "open_clip_pytorch_model.bin")
    return target
