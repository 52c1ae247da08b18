"""Diffusers folders that are not what their shapes suggest: JSON files, shards, variants, quantised weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import changed, convert, export, refused, tensors

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import Config
from ldm.conversion.agreement import check_agreement
from ldm.conversion.sd_layouts import SourceCheckpoint
from ldm.core.errors import MedSoftError


@pytest.fixture(scope="module")
def exported(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims") / "exported"
    assert export(converted, folder) == 0
    shutil.rmtree(folder / "medsoft")
    return folder


@pytest.fixture
def theirs(exported: Path, tmp_path: Path) -> Path:
    """A diffusers folder of somebody else, whose files may be changed."""
    return Path(shutil.copytree(exported, tmp_path / "theirs"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ------------------------------------------------------------------------------------------------- a folder's JSON


SAID = [
    ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
    ("scheduler/scheduler_config.json", "prediction_type", "sample"),
    ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
    ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
    ("scheduler/scheduler_config.json", "beta_end", 0.02),
    ("scheduler/scheduler_config.json", "trained_betas", [0.1, 0.2]),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 500),
    ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
    ("unet/config.json", "attention_head_dim", 16),
    ("unet/config.json", "attention_head_dim", [5, 10, 20, 20]),
    ("unet/config.json", "act_fn", "gelu"),
    ("unet/config.json", "norm_num_groups", 16),
    ("unet/config.json", "time_cond_proj_dim", 256),
    ("unet/config.json", "quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ("vae/config.json", "scaling_factor", 0.13025),
    ("vae/config.json", "shift_factor", 0.1159),
    ("vae/config.json", "act_fn", "relu"),
    ("text_encoder/config.json", "hidden_act", "gelu"),
    ("text_encoder/config.json", "num_attention_heads", 4),
    ("text_encoder/config.json", "num_hidden_layers", 11),
]


@pytest.mark.parametrize(("file", "key", "value"), SAID, ids=[f"{key}={value}"[:40] for _, key, value in SAID])
def test_what_a_folder_says_must_agree(theirs: Path, file: str, key: str, value: Any) -> None:
    change(theirs / file, **{key: value})
    refused(theirs, rf"{file} says {key}=")


def test_heads_under_the_other_name(theirs: Path) -> None:
    heads = json.loads((theirs / "unet" / "config.json").read_text())["attention_head_dim"]
    change(theirs / "unet" / "config.json", attention_head_dim=64, num_attention_heads=heads + 1)
    refused(theirs, rf"unet/config\.json says attention_head_dim={heads + 1}, the configuration {heads}")


EQUAL = {
    "one number for each level": ("unet", lambda c: {"attention_head_dim": [c["attention_head_dim"]] * 2}),
    "the same number in another form": ("vae", lambda c: {"scaling_factor": c["scaling_factor"] + 1e-9}),
    "swish": ("unet", lambda c: {"act_fn": "swish", "mid_block_scale_factor": 1.0, "class_embed_type": None}),
    "no quantisation": ("unet", lambda c: {"quantization_config": None, "sample_size": 96}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_other_spellings_of_the_same_agree(theirs: Path, tmp_path: Path, name: str) -> None:
    part, values = EQUAL[name]
    file = theirs / part / "config.json"
    change(file, **values(json.loads(file.read_text())))
    assert convert(theirs, tmp_path / "out.ckpt") == 0


def test_the_yaml_may_say_the_same(theirs: Path, tmp_path: Path) -> None:
    change(theirs / "scheduler" / "scheduler_config.json", beta_end=0.02)
    change(theirs / "vae" / "config.json", scaling_factor=0.2)
    given = ["diffusion.beta_end=0.02", "diffusion.latent_scale=0.2"]
    assert convert(theirs, tmp_path / "out.ckpt", *given) == 0


def test_json_that_is_missing_is_noted(theirs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shutil.rmtree(theirs / "scheduler")
    assert convert(theirs, tmp_path / "out.ckpt") == 0
    assert "scheduler/scheduler_config.json not there" in caplog.text


def test_json_that_is_a_list(theirs: Path) -> None:
    (theirs / "unet" / "config.json").write_text("[]")
    with pytest.raises(MedSoftError, match=r"unet/config\.json: expected keys with values, found list"):
        convert(theirs, theirs.parent / "out.ckpt")


# ------------------------------------------------------------------------------------------------- a folder's files


def shards(folder: Path, form: str, variant: str = "") -> list[Path]:
    """The U-Net's weights in two files and an index, as diffusers saves large models."""
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state, files, weight_map = load_file(whole), [], {}
    whole.unlink()
    for number, keys in enumerate((list(state)[::2], list(state)[1::2]), 1):
        name = f"diffusion_pytorch_model{variant}-0000{number}-of-00002.{form}"
        part = {key: state[key] for key in keys}
        save_file(part, folder / "unet" / name) if form == "safetensors" else torch.save(part, folder / "unet" / name)
        weight_map |= dict.fromkeys(keys, name)
        files.append(folder / "unet" / name)
    index = folder / "unet" / f"diffusion_pytorch_model.{form}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return [index, *files]


@pytest.mark.parametrize(("form", "variant"), [("safetensors", ""), ("bin", ""), ("safetensors", ".fp16")])
def test_sharded_folder(theirs: Path, converted: Path, tmp_path: Path, form: str, variant: str) -> None:
    _, *files = shards(theirs, form, variant)
    assert convert(theirs, tmp_path / "out.ckpt") == 0
    expected, found = tensors(converted), read_checkpoint(tmp_path / "out.ckpt")
    assert all(torch.equal(value, found.state[key]) for key, value in expected.items())
    assert {f"unet/{file.name}" for file in files} < set(found.metadata["origin"]["files"])


def test_shard_that_is_missing_is_named(theirs: Path) -> None:
    index, first, _ = shards(theirs, "safetensors")
    first.unlink()
    with pytest.raises(MedSoftError, match=rf"{index}: names the shard {first.name}, which is not beside it"):
        convert(theirs, theirs.parent / "out.ckpt")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, []])
def test_index_that_is_none(theirs: Path, content: Any) -> None:
    index, *_ = shards(theirs, "safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(MedSoftError, match=r"index\.json: expected `weight_map`"):
        convert(theirs, theirs.parent / "out.ckpt")


def test_index_that_names_a_file_elsewhere(theirs: Path, tmp_path: Path) -> None:
    index, first, _ = shards(theirs, "safetensors")
    shutil.move(first, tmp_path / "outside.safetensors")
    content = json.loads(index.read_text())["weight_map"]
    moved = {key: "../../outside.safetensors" if name == first.name else name for key, name in content.items()}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(MedSoftError, match=r"names the shard outside\.safetensors, which is not beside it"):
        convert(theirs, tmp_path / "out.ckpt")


def test_non_ema_alone_is_read_and_said(
    theirs: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = theirs / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".non_ema.safetensors"))
    assert convert(theirs, tmp_path / "out.ckpt") == 0
    assert not changed(tensors(converted), tensors(tmp_path / "out.ckpt"))
    assert "non_ema: the weights themselves" in caplog.text


def test_other_weights_beside_are_named(theirs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file = theirs / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".non_ema.safetensors"))
    assert convert(theirs, tmp_path / "out.ckpt") == 0
    assert "not read: unet/diffusion_pytorch_model.non_ema.safetensors" in caplog.text


def test_metadata_and_marks_of_a_folder(theirs: Path) -> None:
    file = theirs / "unet" / "diffusion_pytorch_model.safetensors"
    state = {**load_file(file), "v_pred": torch.zeros(0)}
    save_file(state, file, metadata={"modelspec.prediction_type": "v"})
    refused(theirs, r"its metadata says modelspec\.prediction_type=v, .*the key unet/v_pred")


def test_quantised_folder(theirs: Path) -> None:
    file = theirs / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("attn2.to_q.weight"))
    save_file({**state, key + "_scale": torch.ones(1)}, file)
    refused(theirs, rf"beside weights stands 1 tensor \(unet/{key}_scale\)")


# -------------------------------------------------------------------------------------------- as the hub has the model

LEVELS = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu"}
HUB = {  # of stable-diffusion-inpainting, in the form of diffusers 0.6
    "unet/config.json": {
        **LEVELS,
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0.dev0",
        "attention_head_dim": 8,
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 9,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae/config.json": {
        **LEVELS,
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 512,
        "vocab_size": 49408,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
}


def hub_folder(folder: Path, **changed: dict[str, Any]) -> SourceCheckpoint:
    for name, values in HUB.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps({**values, **changed.get(name.split("/")[0], {})}))
    return SourceCheckpoint(folder, {}, [], set(), {})


def test_json_of_the_published_inpainting_model_agrees(tmp_path: Path) -> None:
    source = hub_folder(tmp_path)
    check_agreement(source, Config().architecture)
    assert not source.notes


def test_json_of_its_relatives_does_not(tmp_path: Path) -> None:
    """What sets Stable Diffusion 2 apart, where only the U-Net's folder was exchanged."""
    source = hub_folder(tmp_path, unet={"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024})
    with pytest.raises(MedSoftError, match=r"attention_head_dim=\[5, 10, 20, 20\].*cross_attention_dim=1024"):
        check_agreement(source, Config().architecture)
