"""tool/export_diffusers.py and the way back, with diffusers and transformers reading and writing the folders."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SD, awake, convert, edit, export

from ldm.checkpoints.checkpoint import PREFIXES, read_checkpoint, write_checkpoint
from ldm.checkpoints.fitting import load_parts
from ldm.core.errors import MedSoftError, UsageError
from ldm.networks.attention import Conditioning
from ldm.networks.model import MedSoftModel

PROMPTS = ["lytic lesion in L3, T2-weighted", "", "café naïve — sclérose 12mm²", "a very long sentence " * 40]


@pytest.fixture(scope="module")
def trained_like(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted base whose third attention is awake, and which says that it was trained."""
    path = edit(converted, tmp_path_factory.mktemp("export") / "final.ckpt", keep=awake)
    found = read_checkpoint(path)
    state = {key: value.clone() for key, value in found.state.items()}
    write_checkpoint(path, state, {**found.metadata, "stage": "stage2_2", "step": 40, "complete": True})
    return path


@pytest.fixture(scope="module")
def exported(trained_like: Path) -> Path:
    assert export(trained_like, trained_like.parent / "exported") == 0
    return trained_like.parent / "exported"


@pytest.fixture(scope="module")
def pipeline(exported: Path) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return StableDiffusionInpaintPipeline.from_pretrained(exported, local_files_only=True)


@torch.no_grad()
def test_pipeline_computes_what_the_checkpoint_computes(trained_like: Path, pipeline: Any) -> None:
    found = read_checkpoint(trained_like)
    model = MedSoftModel(found.config.architecture).eval()
    load_parts(model, found, list(PREFIXES), found.config.architecture)
    ids = pipeline.tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    assert torch.equal(ids, model.cond_stage_model.tokenize(PROMPTS))
    text = model.cond_stage_model(PROMPTS[:2])
    assert torch.allclose(pipeline.text_encoder(ids[:2])[0], text, atol=1e-5)
    x, t = torch.randn(2, 9, 16, 16), torch.tensor([500])
    assert torch.allclose(pipeline.unet(x, t, text).sample, model.unet(x, t, Conditioning(text)), atol=1e-5)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    latent = pipeline.vae.encode(image).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.allclose(latent, model.scaled(model.encode(image).mean), atol=1e-5)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, model.schedule.alphas_cumprod)


def test_pipeline_draws(pipeline: Any) -> None:
    """The base model alone, by diffusers, offline; the picture changes inside the mask."""
    image, mask = np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask), "height": 64, "width": 64}
    drawn = pipeline("a dark disc", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **given).images[
        0
    ]
    assert np.asarray(drawn)[16:48, 16:48].std() > 0


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_back_again_bit_for_bit(trained_like: Path, exported: Path, tmp_path: Path, suffix: str) -> None:
    assert convert(exported, tmp_path / f"back.{suffix}") == 0
    before, after = read_checkpoint(trained_like), read_checkpoint(tmp_path / f"back.{suffix}")
    assert list(before.state) == list(after.state) or suffix == "safetensors"
    assert before.state.keys() == after.state.keys()
    assert all(value.numpy().tobytes() == after.state[key].numpy().tobytes() for key, value in before.state.items())
    kept = ("stage", "step", "complete", "config")
    assert {key: after.metadata[key] for key in kept} == {key: before.metadata[key] for key in kept}
    assert after.metadata["origin"]["file"] == "exported"
    assert set(after.metadata["origin"]["files"]) >= {"medsoft/msc.safetensors", "medsoft/attention.safetensors"}


def test_without_controller_and_back(trained_like: Path, tmp_path: Path) -> None:
    """What unet_only leaves has no MSC; none is made on the way back."""
    ckpt = edit(trained_like, tmp_path / "in.ckpt", keep=lambda key, v: None if key.startswith("msc.") else v)
    assert export(ckpt, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "medsoft" / "msc.safetensors").exists()
    assert convert(tmp_path / "out", tmp_path / "back.ckpt") == 0
    before, after = (read_checkpoint(tmp_path / name).state for name in ("in.ckpt", "back.ckpt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_folder_that_diffusers_wrote(pipeline: Any, converted: Path, tmp_path: Path) -> None:
    """Under the names that the installed diffusers and transformers give; the rest is new, as from the checkpoint."""
    pipeline.save_pretrained(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "out.ckpt") == 0
    expected, found = read_checkpoint(converted), read_checkpoint(tmp_path / "out.ckpt")
    assert found.metadata["stage"] == "converted"
    assert expected.state.keys() == found.state.keys()
    assert all(torch.equal(value, found.state[key]) for key, value in expected.state.items())


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    for new, old in OLD.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name, value


def convolutions(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value


def linear(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, value[:, :, 0, 0] if "proj_in" in name and value.ndim == 4 else value


def short_text(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name.removeprefix("text_model."), value


SPELLINGS = {
    "old attention names": ("vae/diffusion_pytorch_model", old_names),
    "attention as convolutions": ("vae/diffusion_pytorch_model", convolutions),
    "linear proj_in": ("unet/diffusion_pytorch_model", linear),
    "text without text_model": ("text_encoder/model", short_text),
}


@pytest.fixture
def theirs(exported: Path, tmp_path: Path) -> Path:
    """A folder without our parts."""
    folder = tmp_path / "theirs"
    shutil.copytree(exported, folder)
    shutil.rmtree(folder / "medsoft")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_folder(theirs: Path, converted: Path, tmp_path: Path, name: str, form: str) -> None:
    stem, change = SPELLINGS[name]
    file = theirs / f"{stem}.safetensors"
    before = load_file(file)
    after = dict(change(key, value.contiguous()) for key, value in before.items())
    assert any(key not in before or before[key].shape != value.shape for key, value in after.items())
    file.unlink()
    if form == "bin":
        torch.save(after, theirs / f"{stem}.bin".replace("text_encoder/model", "text_encoder/pytorch_model"))
    else:
        save_file({key: value.contiguous() for key, value in after.items()}, file)
    assert convert(theirs, tmp_path / "out.ckpt") == 0
    expected, found = read_checkpoint(converted).state, read_checkpoint(tmp_path / "out.ckpt").state
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_half_precision_file_names(theirs: Path, converted: Path, tmp_path: Path, form: str) -> None:
    """The folder of the half-precision variant, with ``.fp16.`` in its names."""
    for file in theirs.glob("*/*.safetensors"):
        state = {key: value.half() for key, value in load_file(file).items()}
        file.unlink()
        if form == "safetensors":
            save_file(state, file.with_suffix(".fp16.safetensors"))
        else:
            stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
            torch.save(state, file.with_name(f"{stem}.fp16.bin"))
    assert convert(theirs, tmp_path / "out.ckpt") == 0
    expected, found = read_checkpoint(converted).state, read_checkpoint(tmp_path / "out.ckpt").state
    assert all(torch.equal(value.half(), found[key].half()) for key, value in expected.items())


def no_text(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def xl(folder: Path) -> None:
    (folder / "text_encoder_2").mkdir()


def four_channels(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "conv_in.weight": torch.ones(64, 4, 3, 3)}, file)


def lost_key(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != "quant_conv.bias"}, file)


FOLDERS = {
    "no text encoder": (no_text, r"text_encoder: no weights; expected a diffusers folder"),
    "SDXL": (xl, r"theirs: is a Stable Diffusion XL model"),
    "text-to-image": (four_channels, r"theirs: its first convolution reads 4 channels.*text-to-image"),
    "lost key": (
        lost_key,
        r"theirs: does not fit .*: 1 missing \(first_stage_model\.quant_conv\.bias\)",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_unfit_folder_is_refused(theirs: Path, tmp_path: Path, name: str) -> None:
    change, message = FOLDERS[name]
    change(theirs)
    with pytest.raises(MedSoftError, match=message):
        convert(theirs, tmp_path / "out.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


FORMS = {
    "a list": [],
    "no parts": {"about": {}},
    "unknown part": {"about": {}, "parts": ["unet", "vae"]},
    "about is text": {"about": "x", "parts": ["unet"]},
    "no part": {"about": {}, "parts": []},
}


@pytest.mark.parametrize("form", FORMS)
def test_configuration_of_ours_that_was_edited(exported: Path, tmp_path: Path, form: str) -> None:
    shutil.copytree(exported, tmp_path / "in")
    (tmp_path / "in" / "medsoft" / "config.json").write_text(json.dumps(FORMS[form]))
    with pytest.raises(MedSoftError, match=r"medsoft/config\.json: expected `about` .* and `parts`"):
        convert(tmp_path / "in", tmp_path / "out.ckpt")


def test_folder_of_ours_that_lost_a_file(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "in")
    (tmp_path / "in" / "medsoft" / "msc.safetensors").unlink()
    with pytest.raises(MedSoftError, match=r"does not fit this configuration: 68 missing \(msc\."):
        convert(tmp_path / "in", tmp_path / "out.ckpt")


def test_damaged_file_in_a_folder(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "in")
    file = tmp_path / "in" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(MedSoftError, match=r"vae/diffusion_pytorch_model\.safetensors: damaged, its SHA-256"):
        convert(tmp_path / "in", tmp_path / "out.ckpt")


# ----------------------------------------------------------------------------------------------- refusals of the export


def test_export_again_is_complete(trained_like: Path, exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert export(trained_like, exported) == 0
    assert "already complete" in caplog.text


def test_export_of_another_file_needs_overwrite(converted: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    with pytest.raises(UsageError, match=r"out: holds the export of another file; .*--overwrite"):
        export(converted, tmp_path / "out")
    assert export(converted, tmp_path / "out", "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "medsoft" / "config.json").read_text())["about"]["stage"] == "converted"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_export_never_replaces_a_folder_of_somebody_else(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="already exists and was not exported by this command"):
        export(converted, tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_export_needs_a_whole_base(trained_like: Path, tmp_path: Path) -> None:
    only = edit(trained_like, tmp_path / "in.ckpt", keep=lambda key, v: v if key.startswith("msc.") else None)
    with pytest.raises(MedSoftError, match=r"in\.ckpt: holds no U-Net, autoencoder, text encoder; a pipeline"):
        export(only, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_needs_to_know_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match="does not say which configuration it has; convert it"):
        export(SD, tmp_path / "out")


def test_export_that_fails_keeps_the_old_one(
    converted: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename of the new folder fails after the old one was moved aside: the old one comes back."""
    shutil.copytree(exported, tmp_path / "out")
    before = sorted(file.relative_to(exported) for file in exported.rglob("*"))
    rename = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == "out" and not str(source).endswith(".before"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(MedSoftError, match=r"out: could not be written \(Input/output error\); nothing was changed"):
        export(converted, tmp_path / "out", "--overwrite")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert sorted(file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*")) == before


def test_export_of_a_full_disk_is_complete_if_it_was(
    trained_like: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    assert export(trained_like, exported) == 0
    with pytest.raises(MedSoftError, match=r"exported: needs \d"):
        export(trained_like, exported, "--overwrite")


def test_interrupted_export_leaves_nothing(trained_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.conversion.diffusers_folder._write_tokenizer", full)
    with pytest.raises(MedSoftError, match=r"out: could not be written \(No space left"):
        export(trained_like, tmp_path / "out")
    assert not list(tmp_path.iterdir())
