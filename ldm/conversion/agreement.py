"""What a Stable Diffusion model says of itself, and whether the configuration says the same.

The shapes of the weights do not show what a U-Net predicts, on which noise schedule, with how many heads or behind
which activation: with other ones the weights load, and the images are wrong. Read are the JSON files of a diffusers
folder, the text metadata of ``.safetensors`` files (modelspec, kohya's ``ss_*``), the schedule and the marks among the
tensors, and a Stable Diffusion YAML of the same name beside a file.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.config import Architecture
from ldm.conversion.diffusers_folder import autoencoder_configuration, scheduler_configuration, unet_configuration
from ldm.conversion.sd_layouts import SourceCheckpoint
from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, read_text
from ldm.diffusion.schedule import NoiseSchedule
from ldm.networks.text_encoder import clip_settings

MARKS = {  # keys that programs add to a state_dict to say how the model was trained
    "v_pred": "v-prediction",
    "ztsnr": "a noise schedule of zero terminal signal-to-noise ratio",
    "edm_mean": "EDM's parametrisation",
    "edm_vpred.sigma_max": "EDM's v-prediction",
}
NO = ("", "false", "none", "null", "0")
TEXTS = {  # metadata by the last part of its key: what the method can take, in lower case
    "prediction_type": ("epsilon", "eps", *NO),
    "parameterization": ("eps", "epsilon", *NO),
    "zero_terminal_snr": NO,
    "v_parameterization": NO,
    "v_pred": NO,
    "v2": NO,
}
UNET = {  # what diffusers can build otherwise, and the U-Net here cannot
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_scale_factor": 1,
    "transformer_layers_per_block": 1,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "attention_type": "default",
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_embedding_type": "positional",
    "time_cond_proj_dim": None,
    "timestep_post_act": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
}
AUTOENCODER = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
SCHEDULER = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def check_agreement(source: SourceCheckpoint, architecture: Architecture) -> None:
    """MedSoftError naming what the source says of itself otherwise than the configuration, and where it says so.

    What a folder does not say, because a JSON file is not there, is noted.
    """
    problems, missing = _of_folder(source.path, architecture) if source.path.is_dir() else ([], [])
    problems += _of_metadata(source) + _of_tensors(source.state, architecture)
    problems += [] if source.path.is_dir() else _of_yaml(source.path.with_suffix(".yaml"), architecture)
    if problems:
        raise MedSoftError(
            f"{source.path}: is another model than the configuration describes: {'; '.join(problems)}. Take a Stable "
            "Diffusion 1.5 inpainting model, or set the YAML to what it says where the YAML has such a key"
        )
    if missing:
        source.notes.append(f"{', '.join(missing)} not there: what it would say is taken from the configuration")


def _of_folder(folder: Path, architecture: Architecture) -> tuple[list[str], list[str]]:
    """What the JSON files of a diffusers folder say otherwise, and those that are not there."""
    noise = scheduler_configuration(architecture.diffusion)
    text = {key: value for key, value in clip_settings(architecture.text_encoder).items() if "_id" not in key}
    expected = {
        "scheduler/scheduler_config.json": {
            **{key: noise[key] for key in SCHEDULER},
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
        },
        "unet/config.json": {**unet_configuration(architecture), **UNET},
        "vae/config.json": {**autoencoder_configuration(architecture), **AUTOENCODER},
        "text_encoder/config.json": {**text, "layer_norm_eps": 1e-5},
    }
    problems, missing = [], []
    for name, wanted in expected.items():
        if not (folder / name).is_file():
            missing.append(name)
            continue
        said = read_json(folder / name, "configuration")
        if not isinstance(said, dict):
            raise MedSoftError(f"{folder / name}: expected keys with values, found {type(said).__name__}")
        if said.get("num_attention_heads") is not None and name.startswith("unet"):
            said["attention_head_dim"] = said["num_attention_heads"]  # which diffusers prefers
        wanted = {key: value for key, value in wanted.items() if key not in ("sample_size", "projection_dim")}
        problems += _differences(f"{name} says", said, {**wanted, "quantization_config": None})
        if name.startswith("scheduler") and "FlowMatch" in str(said.get("_class_name")):
            problems.append(f"{name} says _class_name={said['_class_name']}, and this model was not trained with flows")
    return problems, missing


def _of_metadata(source: SourceCheckpoint) -> list[str]:
    """What the text metadata of the files says that the method cannot take."""
    problems = []
    for key, text in source.header.items():
        allowed, plain = TEXTS.get(key.rpartition(".")[2].removeprefix("ss_")), text.strip().lower()
        if allowed and plain not in allowed:
            problems.append(f"its metadata says {key}={text}, expected {allowed[0] or 'false'}")
        other = plain.startswith("stable-diffusion-") and not plain.startswith("stable-diffusion-v1")
        if key == "modelspec.architecture" and other:
            problems.append(f"its metadata says {key}={text}, expected stable-diffusion-v1")
        if "quant" in key.lower() and plain not in (*NO, "{}"):
            problems.append(f"its metadata says {key}, so its weights are quantised")
    return problems


def _of_tensors(state: Mapping[str, Tensor], architecture: Architecture) -> list[str]:
    """What marks, noise schedule and latent scale among the tensors say otherwise."""
    marks = {key: MARKS[name] for key in state if (name := key.rpartition("/")[2]) in MARKS}
    problems = [f"it holds the key {key}, the mark of {meaning}" for key, meaning in marks.items()]
    found = state.get("alphas_cumprod")
    if found is None and "betas" in state:
        found = torch.cumprod(1 - state["betas"].double(), dim=0)
    if found is not None:
        found, here = found.double(), NoiseSchedule(architecture.diffusion).alphas_cumprod.double()
        if found.shape != here.shape or not torch.allclose(found, here, rtol=0.01, atol=1e-4):
            ends = [f"{each.numel()} steps, {each[0]:.5g} to {each[-1]:.5g}" for each in (found.flatten(), here)]
            problems.append(f"its noise schedule (alphas_cumprod) has {ends[0]}, the configuration's {ends[1]}")
    scale, ours = state.get("scale_factor"), architecture.diffusion.latent_scale
    if scale is not None and not math.isclose(float(scale), ours, rel_tol=1e-3):
        problems.append(f"its scale_factor is {float(scale):.5g}, diffusion.latent_scale is {ours}")
    return problems


def _of_yaml(file: Path, architecture: Architecture) -> list[str]:
    """What ``model.params`` of a Stable Diffusion YAML says otherwise, if there is one."""
    if not file.is_file():
        return []
    try:
        model = (yaml.safe_load(read_text(file)) or {}).get("model") or {}
        params = model["params"]
        unet = (params.get("unet_config") or {}).get("params") or {}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []  # a YAML of something else
    noise = architecture.diffusion
    wanted = {
        "parameterization": "eps",
        "timesteps": noise.timesteps,
        "linear_start": noise.beta_start,
        "linear_end": noise.beta_end,
        "scale_factor": noise.latent_scale,
    }
    said = f"{file.name} beside it says"
    return _differences(said, params, wanted) + _differences(said, unet, {"num_heads": architecture.unet.num_heads})


def _differences(said: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{said} {key}={found[key]}, the configuration {value}"
        for key, value in wanted.items()
        if key in found and not _same(found[key], value)
    ]


def _same(found: Any, wanted: Any) -> bool:
    """Whether two settings mean the same: one number for every level is a list of equal ones, no is no."""
    if isinstance(found, list) and not isinstance(wanted, list):
        return all(_same(each, wanted) for each in found)
    if found in (None, False, {}) and wanted in (None, False):
        return True
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted or (found, wanted) == ("swish", "silu")
