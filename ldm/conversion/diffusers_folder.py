"""The diffusers folder of an inpainting model: our keys by diffusers' names, reading such a folder, writing one.

    unet/  vae/  text_encoder/          weights and config.json, as StableDiffusionInpaintPipeline expects them
    tokenizer/  scheduler/  model_index.json
    medsoft/                            ours: attention.safetensors (NEW_IN_UNET), msc.safetensors, config.json

Tensors are the checkpoint's own, bit for bit; three projections of the autoencoder's attention change their shape from
(C, C, 1, 1) to (C, C).
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.checkpoint import NEW_IN_UNET, PREFIXES, plain_keys, read_checkpoint
from ldm.checkpoints.files import save_safetensors
from ldm.config import Architecture, DiffusionConfig, UNetConfig
from ldm.conversion.sd_layouts import SourceCheckpoint
from ldm.core.errors import MedSoftError
from ldm.core.files import atomic_file, read_json, write_json, write_text
from ldm.networks.text_encoder import END, SPECIAL, START, clip_settings, clip_vocabulary

FOLDERS = {"unet": "unet", "autoencoder": "vae", "text": "text_encoder"}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
OURS = "medsoft"
VARIANTS = ("", ".fp16", ".bf16", ".non_ema")  # between the name of a weight file and its suffix
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {  # the U-Net's layers outside its blocks
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.13


def diffusers_name(key: str, architecture: Architecture) -> tuple[str, str]:
    """(folder, name) of one of our base keys, such as ("unet", "down_blocks.0.resnets.0.norm1.weight")."""
    part = next(part for part, prefix in PREFIXES.items() if key.startswith(prefix))
    inner = key.removeprefix(PREFIXES[part])
    if part == "unet":
        return FOLDERS[part], _unet_name(inner, architecture.unet)
    if part == "autoencoder":
        return FOLDERS[part], _autoencoder_name(inner, len(architecture.autoencoder.channel_mult))
    return FOLDERS[part], "text_model." + inner


def _unet_name(inner: str, unet: UNetConfig) -> str:
    for ours, theirs in ENDS.items():
        if inner.startswith(ours + "."):
            return theirs + inner.removeprefix(ours)
    if inner.startswith("middle_block."):
        _, position, rest = inner.split(".", 2)
        return f"mid_block.{MIDDLE[position]}.{_resnet(rest)}"
    blocks, number, position, rest = inner.split(".", 3)
    down = blocks == "input_blocks"
    level, index = divmod(int(number) - down, unet.num_res_blocks + 1)  # the first input block is conv_in
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    return f"{block}.{'resnets' if position == '0' else 'attentions'}.{index}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    """A layer of a residual block by diffusers' name; a transformer's layers have the same names on both sides."""
    layer, kind = rest.rsplit(".", 1)
    return f"{RESNET.get(layer, layer)}.{kind}"


def _autoencoder_name(inner: str, levels: int) -> str:
    inner = inner.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    inner = re.sub(r"mid\.block_(\d)", lambda found: f"mid_block.resnets.{int(found[1]) - 1}", inner)
    inner = re.sub(r"mid\.attn_1\.(\w+)", lambda found: f"mid_block.attentions.0.{ATTENTION[found[1]]}", inner)
    inner = re.sub(r"down\.(\d+)\.block", r"down_blocks.\1.resnets", inner)
    inner = re.sub(r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", inner)
    inner = re.sub(r"up\.(\d+)\.block", lambda found: f"up_blocks.{levels - 1 - int(found[1])}.resnets", inner)
    return re.sub(r"up\.(\d+)\.upsample", lambda found: f"up_blocks.{levels - 1 - int(found[1])}.upsamplers.0", inner)


def files_of(folder: Path) -> list[Path]:
    """The weight files of a diffusers folder, ours in ``medsoft/`` too; MedSoftError where a part has none."""
    if (folder / "text_encoder_2").exists():
        raise MedSoftError(f"{folder}: is a Stable Diffusion XL model; download Stable Diffusion 1.5 inpainting")
    parts = [file for name in WEIGHTS for file in _weights(folder / name)]
    return parts + sorted((folder / OURS).glob("*.safetensors"))


def _weights(folder: Path) -> list[Path]:
    """The file with the weights of one part, or the shards that an index lists; variants only where nothing else is."""
    stem = WEIGHTS[folder.name]
    stems = {"safetensors": stem, "bin": {"model": "pytorch_model"}.get(stem, stem)}
    for variant in VARIANTS:
        for suffix, stem in stems.items():
            if (folder / f"{stem}{variant}.{suffix}").is_file():
                return [folder / f"{stem}{variant}.{suffix}"]
            if (folder / f"{stem}.{suffix}.index{variant}.json").is_file():
                return _shards(folder / f"{stem}.{suffix}.index{variant}.json")
    raise MedSoftError(
        f"{folder}: no weights; expected a diffusers folder with unet/, vae/ and text_encoder/, each with "
        f"{' or '.join(f'{stem}.{suffix}' for suffix, stem in stems.items())}, their shards and index, or a variant "
        f"({', '.join(VARIANTS[1:])})"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names; MedSoftError for an index that is none, and for a shard that is not there."""
    content = read_json(index, "index of shards")
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise MedSoftError(f"{index}: expected `weight_map`, which names a file for each tensor; download it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise MedSoftError(f"{index}: names the shard {file.name}, which is not beside it; download all shards")
    return files


def from_folder(folder: Path, architecture: Architecture, expected: Mapping[str, Tensor]) -> SourceCheckpoint:
    """The tensors of a diffusers folder under our keys; ``expected`` gives keys and shapes that are asked for.

    Both spellings of the autoencoder's attention, linear and 1x1-convolution weights, and the text encoder's names with
    and without ``text_model.`` are accepted. ``medsoft/`` is read if it is there.
    """
    base = [key for key in expected if not NEW_IN_UNET.match(key) and not key.startswith(PREFIXES["msc"])]
    ours = {diffusers_name(key, architecture): key for key in base}
    state: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    files, read = files_of(folder), []
    for file in files:
        checkpoint, part = read_checkpoint(file), file.parent.name
        read.append(checkpoint)
        header |= checkpoint.header
        for name, value in plain_keys(file, checkpoint.state, partial(_current, part)).items():
            key = name if part == OURS else ours.get((part, name), f"{part}/{name}")
            state[key] = _fitted(value, expected.get(key))
    notes = [f"diffusers folder: {', '.join(file.relative_to(folder).as_posix() for file in files)}"]
    if any(".non_ema." in file.name for file in files):
        notes.append("non_ema: the weights themselves, of which the folder has no moving average")
    beside = [
        file
        for name in WEIGHTS
        for file in sorted((folder / name).iterdir())
        if file.suffix in (".safetensors", ".bin")
    ]
    if unread := [file.relative_to(folder).as_posix() for file in beside if file not in files]:
        notes.append(f"other weights in the folder, not read: {', '.join(unread)}")
    layers = {f"{part}/{name}".rpartition(".")[0] for part, name in ours}
    own = _own_configuration(folder / OURS / "config.json")
    return SourceCheckpoint(folder, state, read, layers, header, None, notes, own)


def _own_configuration(path: Path) -> dict[str, Any] | None:
    """What our export says about itself, checked; None where there is none."""
    if not path.is_file():
        return None
    found = read_json(path, "MedSoft configuration")
    found = found if isinstance(found, dict) else {}
    parts = found.get("parts")
    known = isinstance(parts, list) and parts and all(part in PREFIXES for part in parts)
    if not isinstance(found.get("about"), dict) or not known:
        raise MedSoftError(
            f"{path}: expected `about` (a dictionary) and `parts` (some of {', '.join(PREFIXES)}) as "
            f"tool/export_diffusers.py writes them; export again, or delete {path.parent} to convert the base alone"
        )
    return found


def _current(part: str, name: str) -> str:
    """A name as current diffusers and older transformers spell it."""
    if part == "vae":
        return re.sub(
            r"(attentions\.0\.)(query|key|value|proj_attn)\.", lambda m: m[1] + OLD_ATTENTION[m[2]] + ".", name
        )
    if part == "text_encoder" and not name.startswith("text_model."):
        return "text_model." + name
    return name


def _fitted(value: Tensor, wanted: Tensor | None) -> Tensor:
    """Linear weights (C, D) as the 1x1 convolution (C, D, 1, 1) that is wanted, and the other way round."""
    if wanted is not None and value.shape != wanted.shape and value.numel() == wanted.numel():
        longer, shorter = sorted((tuple(value.shape), tuple(wanted.shape)), key=len, reverse=True)
        if longer == (*shorter, 1, 1):
            return value.reshape(wanted.shape)
    return value


def write_folder(folder: Path, state: Mapping[str, Tensor], ours: dict[str, Any], architecture: Architecture) -> None:
    """Write the whole diffusers folder into the existing, empty ``folder``.

    ``state``: our keys; the MSC may be missing. ``ours`` becomes ``medsoft/config.json``: what a checkpoint says about
    itself (``about``), its ``parts``, and ``exported_from``.
    """
    shares: dict[Path, dict[str, Tensor]] = {}
    for key, value in state.items():
        if NEW_IN_UNET.match(key):
            file, name = Path(OURS, "attention.safetensors"), key
        elif key.startswith(PREFIXES["msc"]):
            file, name = Path(OURS, "msc.safetensors"), key
        else:
            part, name = diffusers_name(key, architecture)
            file = Path(part, WEIGHTS[part] + ".safetensors")
            if part == "vae" and ".attentions." in name and value.ndim == 4:
                value = value.flatten(1)
        shares.setdefault(file, {})[name] = value
    for file, tensors in shares.items():
        with atomic_file(folder / file) as handle:
            save_safetensors(tensors, {"format": "pt"}, handle)
    for name, values in {**_configurations(architecture), f"{OURS}/config.json": ours}.items():
        write_json(folder / name, values)
    _write_tokenizer(folder / "tokenizer", architecture.text_encoder.max_length)


def _configurations(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """What diffusers and transformers need to build the same networks; all else is their default."""
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionInpaintPipeline",
            "_diffusers_version": "0.36.0",  # from_pretrained asks for it
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        },
        "unet/config.json": unet_configuration(architecture),
        "vae/config.json": autoencoder_configuration(architecture),
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **clip_settings(architecture.text_encoder),
        },
        "scheduler/scheduler_config.json": scheduler_configuration(architecture.diffusion),
    }


def unet_configuration(architecture: Architecture) -> dict[str, Any]:
    """unet/config.json."""
    unet = architecture.unet
    cross = [level in unet.attention_levels for level in range(len(unet.channel_mult))]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": architecture.latent_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": [unet.model_channels * mult for mult in unet.channel_mult],
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(cross)],
        "attention_head_dim": unet.num_heads,  # diffusers means the number of heads here
        "cross_attention_dim": unet.context_dim,
    }


def autoencoder_configuration(architecture: Architecture) -> dict[str, Any]:
    """vae/config.json."""
    vae = architecture.autoencoder
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": architecture.image_size,
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "layers_per_block": vae.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
        "scaling_factor": architecture.diffusion.latent_scale,
    }


def scheduler_configuration(noise: DiffusionConfig) -> dict[str, Any]:
    """scheduler/scheduler_config.json."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": noise.timesteps,
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def _write_tokenizer(folder: Path, length: int) -> None:
    """CLIP's vocabulary, which ships with open_clip_torch, as the files of transformers' CLIPTokenizer."""
    vocabulary, merges = clip_vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    start, end = SPECIAL[START], SPECIAL[END]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    write_json(folder / "tokenizer_config.json", settings)
