"""tool/model_convert.py and tool/tool_merge_for_stage2.py through their command lines."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import MODELS, SD, awake, call, changed, convert, edit, merge, model_convert, tensors

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import sha256_file
from ldm.networks.attention import Conditioning
from ldm.networks.unet import UNet

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in read_checkpoint(SD).state.items()}


def is_new(key: str) -> bool:
    return ".attn3." in key or ".norm4." in key or key.startswith("msc.")


# --------------------------------------------------------------------------------------------------------- convert


def test_only_the_third_attention_and_the_controller_are_new(converted: Path, source: dict) -> None:
    state = tensors(converted)
    assert {key for key in state if not is_new(key)} == set(source)
    assert not changed(state, source)
    assert {key.split(".")[0] for key in state if is_new(key)} == {"model", "msc"}
    assert all(torch.isfinite(value).all() for value in state.values())


def unet_of(state: dict[str, torch.Tensor], strict: bool) -> UNet:
    unet = UNet(load_config(MODELS / "phantom.yaml").unet).eval()
    inner = {key.removeprefix(UNET): value for key, value in state.items() if key.startswith(UNET)}
    missing, extra = unet.load_state_dict(inner, strict=strict)
    assert not extra
    assert all(is_new(UNET + key) for key in missing)
    return unet


def test_unet_computes_the_same_before_and_after(converted: Path, source: dict) -> None:
    """The source without third attention against the converted model with semantic tokens and a mask: equal."""
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 9, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    tokens, gate = torch.randn(2, 25, 64), torch.rand(2, 1, 16, 16)
    after = unet_of(tensors(converted), strict=True)
    with torch.no_grad():
        plain = unet_of(source, strict=False)(x, t, Conditioning(text, None, None))
        assert torch.equal(after(x, t, Conditioning(text, tokens, gate)), plain)
        for key, parameter in after.named_parameters():
            parameter.copy_(awake(key, parameter))
        assert not torch.equal(after(x, t, Conditioning(text, tokens, gate)), plain)  # the comparison can fail


def test_seed_decides_the_new_parameters(converted: Path, tmp_path: Path) -> None:
    assert convert(SD, tmp_path / "same.ckpt") == 0
    assert not changed(tensors(converted), tensors(tmp_path / "same.ckpt"))
    for seed in (1, 2**32):  # of which torch would read the lower 32 bits, 0
        assert convert(SD, tmp_path / f"{seed}.ckpt", "--seed", seed) == 0
        different = changed(tensors(converted), tensors(tmp_path / f"{seed}.ckpt"))
        assert different
        assert all(is_new(key) for key in different)


def test_safetensors_in_and_out(converted: Path, tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in read_checkpoint(SD).state.items()}, tmp_path / "sd.ckpt")
    assert convert(tmp_path / "sd.ckpt", tmp_path / "out.safetensors") == 0  # the content counts, not the name
    found = read_checkpoint(tmp_path / "out.safetensors")
    assert not changed(tensors(converted), found.state)
    assert found.config == load_config(MODELS / "phantom.yaml")
    assert found.metadata["stage"] == "converted"


def test_zip_under_the_name_of_safetensors(converted: Path, tmp_path: Path) -> None:
    shutil.copy(SD, tmp_path / "sd.safetensors")
    assert convert(tmp_path / "sd.safetensors", tmp_path / "out.ckpt") == 0
    assert not changed(tensors(converted), tensors(tmp_path / "out.ckpt"))


def test_convert_again_is_complete(converted: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = converted.read_bytes()
    assert convert(SD, converted) == 0
    assert "already complete" in caplog.text
    assert converted.read_bytes() == before


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    output = tmp_path / "out.ckpt"
    output.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"out\.ckpt: already exists; .*--overwrite"):
        convert(SD, output)
    assert output.read_bytes() == b"mine"
    assert convert(SD, output, "--overwrite") == 0
    assert read_checkpoint(output).metadata["stage"] == "converted"


def no_reading(*_: Any) -> None:
    raise AssertionError("a file was read as a whole")


@pytest.mark.parametrize("made_from", ["something else", "another seed"])
def test_existing_output_is_refused_before_anything_large_is_read(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_from: str
) -> None:
    shutil.copy(SD if made_from == "something else" else converted, tmp_path / "out.ckpt")
    monkeypatch.setattr("ldm.core.files.sha256_file", no_reading)
    with pytest.raises(UsageError, match=r"out\.ckpt: already exists; .*--overwrite"):
        convert(SD, tmp_path / "out.ckpt", "--seed", 5)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_conversion_again_is_byte_identical(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        assert convert(SD, tmp_path / f"{name}.{suffix}") == 0
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_output_may_not_be_the_input(tmp_path: Path) -> None:
    shutil.copy(SD, tmp_path / "sd.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "sd.ckpt")
    with pytest.raises(UsageError, match="is also the input"):
        convert(tmp_path / "sd.ckpt", tmp_path / "link.ckpt", "--overwrite")
    assert (tmp_path / "sd.ckpt").read_bytes() == SD.read_bytes()


STEM = UNET + "input_blocks.0.0.weight"
REFUSED_TENSORS = {
    "text-to-image model": (lambda key, v: v[:, :4].clone() if key == STEM else v, r"reads 4 channels.*text-to-image"),
    "converted already": (lambda key, v: v, None),  # filled in by the test
    "NaN": (lambda key, v: v * float("nan") if key == STEM else v, rf"1 tensor holds NaN or .* first {STEM}"),
    "missing keys": (
        lambda key, v: None if key.endswith("proj_in.weight") else v,
        r"\d missing \(model\.diff.*proj_in",
    ),
    "no U-Net": (lambda key, v: None if key.startswith(UNET) else v, r"not a Stable Diffusion checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_unfit_checkpoint_is_refused(converted: Path, tmp_path: Path, name: str) -> None:
    keep, message = REFUSED_TENSORS[name]
    if message is None:
        bad, message = converted, r"is converted already"
    else:
        bad = edit(SD, tmp_path / "in.ckpt", keep=keep)
    with pytest.raises(MedSoftError, match=message) as caught:
        convert(bad, tmp_path / "out.ckpt")
    assert str(caught.value).startswith(str(bad))
    assert not [file.name for file in tmp_path.iterdir() if file != bad]


def test_other_size_names_the_yaml(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"of another size .*models/phantom\.yaml for the phantom base"):
        convert(SD, tmp_path / "out.ckpt", "unet.model_channels=32")
    assert not list(tmp_path.iterdir())


class Runs:
    """Unpickled, it would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


REFUSED_FILES = {
    "text": (b"hello, this is not a model", r"expected a checkpoint .*found bytes that start with"),
    "web page": (b"<!DOCTYPE html><html>sign in</html>", r"found a web page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", r"Git LFS pointer"),
    "empty": (b"", r"found an empty file"),
    "truncated": (None, r"damaged or cut short \(1000000 bytes"),
    "truncated safetensors": ((200).to_bytes(8, "little") + b'{"a":', r"damaged safetensors file"),
    "list instead of a dictionary": ("list", r"expected a dictionary of tensors, found list"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_foreign_file_is_refused(tmp_path: Path, name: str) -> None:
    content, message = REFUSED_FILES[name]
    bad = tmp_path / "in.ckpt"
    if content == "list":
        torch.save([1, 2], bad)
    else:
        bad.write_bytes(SD.read_bytes()[:1_000_000] if content is None else content)
    with pytest.raises(MedSoftError, match=message) as caught:
        convert(bad, tmp_path / "out.ckpt")
    assert str(bad) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in.ckpt"]


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, form: str) -> None:
    bad, trace = tmp_path / "in.ckpt", tmp_path / "trace"
    content: Any = {"state_dict": {STEM: torch.zeros(1)}, "callbacks": Runs(f"touch {trace}")}
    torch.save(content, bad, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(MedSoftError, match=r"in\.ckpt: refused, it asks for posix\.system; nothing in it was run"):
        convert(bad, tmp_path / "out.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["in.ckpt"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"none\.ckpt: this checkpoint does not exist"):
        convert(tmp_path / "none.ckpt", tmp_path / "out.ckpt")
    with pytest.raises(MedSoftError, match=r"no weights; expected a diffusers folder with unet/"):
        convert(tmp_path, tmp_path / "out.ckpt")


def test_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.checkpoints.files.torch.save", full)
    with pytest.raises(MedSoftError, match=r"out\.ckpt: could not be written \(No space left"):
        convert(SD, tmp_path / "out.ckpt")
    assert not list(tmp_path.iterdir())


def test_true_size_yaml_names_itself_to_the_phantom_base(tmp_path: Path) -> None:
    """The wrong YAML, with the real one's names but few layers: refused before anything is written."""
    flags = ["--input_path", SD, "--output_path", tmp_path / "out.ckpt", "--config", MODELS / "mldm_v15.yaml"]
    small = ["unet.model_channels=32", "autoencoder.channels=32", "msc.layers=1", "text_encoder.layers=1"]
    with pytest.raises(MedSoftError, match="Use the YAML of this model's size"):
        call(model_convert, *flags, *small)


# ------------------------------------------------------------------------------------------- relatives of the original


def averages(key: str) -> str:
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def unet_as_averages(state: dict) -> dict:
    return {averages(key) if key.startswith(UNET) else key: value for key, value in state.items()}


RELATIVES = {
    "module": (lambda state: {f"module.{key}": value for key, value in state.items()}, "keys brought to the original"),
    "_orig_mod": (
        lambda state: {key.replace(UNET, UNET + "_orig_mod."): value for key, value in state.items()},
        "keys brought to the original",
    ),
    "averages beside": (
        lambda state: {**state, **{averages(k): v + 1 for k, v in state.items() if k.startswith(UNET)}},
        r"moving averages; the plain weights are taken",
    ),
    "averages only": (unet_as_averages, r"U-Net taken from the moving averages"),
    "text without text_model": (
        lambda state: {key.replace(".text_model.", "."): value for key, value in state.items()},
        "keys brought to the original",
    ),
    "bfloat16": (lambda state: {key: value.bfloat16() for key, value in state.items()}, "torch.bfloat16 brought to"),
    "float64": (lambda state: {key: value.double() for key, value in state.items()}, "torch.float64 brought to"),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relative_gives_the_same(
    converted: Path, source: dict, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    change, said = RELATIVES[name]
    torch.save({"state_dict": change(source)}, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0
    found = tensors(tmp_path / "out.ckpt")
    if name == "bfloat16":
        found = {key: value if is_new(key) else value.bfloat16() for key, value in found.items()}
        expected = {key: value if is_new(key) else value.bfloat16() for key, value in tensors(converted).items()}
    else:
        expected = tensors(converted)
    assert not changed(expected, found)
    assert said in caplog.text


NESTS = {
    "bare": lambda state: state,
    "nested twice": lambda state: {"model": {"state_dict": state}, "epoch": 3},
    "with a remark inside": lambda state: {"state_dict": {**state, "remark": "hello"}},
}


@pytest.mark.parametrize("name", NESTS)
def test_tensors_are_found_where_programs_nest_them(converted: Path, source: dict, tmp_path: Path, name: str) -> None:
    torch.save(NESTS[name](source), tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0
    assert not changed(tensors(converted), tensors(tmp_path / "out.ckpt"))


def test_legacy_pickle_of_the_original(converted: Path, source: dict, tmp_path: Path) -> None:
    torch.save({"state_dict": source}, tmp_path / "in.ckpt", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0
    assert not changed(tensors(converted), tensors(tmp_path / "out.ckpt"))


def test_half_precision_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert convert(SD, tmp_path / "out.safetensors") == 0
    assert "weights in torch.float16 brought to torch.float32" in caplog.text
    about = read_checkpoint(tmp_path / "out.safetensors").metadata
    assert about["origin"] == {"file": SD.name, "sha256": sha256_file(SD)}


K = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FAMILIES = {
    "SDXL": ({"conditioner.embedders.0.transformer.x": torch.ones(1)}, "is a Stable Diffusion XL model"),
    "SDXL U-Net": ({UNET + "label_emb.0.0.weight": torch.ones(1)}, "is a Stable Diffusion XL model"),
    "SD 2": ({"cond_stage_model.model.ln_final.weight": torch.ones(1)}, "is a Stable Diffusion 2 model"),
    "SD 2 U-Net": ({K: torch.ones(320, 1024)}, "is a Stable Diffusion 2 model"),
    "diffusers U-Net alone": ({"down_blocks.0.x": torch.ones(1)}, r"expected the whole diffusers folder \(unet/"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_family_is_named(source: dict, tmp_path: Path, name: str) -> None:
    """With the true-size YAML; its stem has 4 channels, as theirs have, and the family is named first."""
    state, message = FAMILIES[name]
    stem = {} if "alone" in name else {STEM: torch.ones(320, 4, 3, 3)}
    torch.save({**stem, **state}, tmp_path / "in.ckpt")
    flags = ["--input_path", tmp_path / "in.ckpt", "--output_path", tmp_path / "out.ckpt"]
    with pytest.raises(MedSoftError, match=message):
        call(model_convert, *flags, "--config", MODELS / "mldm_v15.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["in.ckpt"]


def test_half_the_keys_missing(source: dict, tmp_path: Path) -> None:
    torch.save(dict(list(source.items())[::2]), tmp_path / "in.ckpt")
    with pytest.raises(MedSoftError, match=rf"does not fit this configuration: {len(source) // 2} missing \("):
        convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["in.ckpt"]


def test_key_that_is_there_twice(source: dict, tmp_path: Path) -> None:
    torch.save({**source, f"module.{STEM}": torch.ones(1)}, tmp_path / "in.ckpt")
    with pytest.raises(MedSoftError, match=rf"module\.{STEM} is there twice"):
        convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt")


# --------------------------------------------------------------------------------------- the output, before the reading


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, reading any checkpoint is a failure of the test."""

    def fail(*_: Any) -> None:
        raise AssertionError("the input was read")

    monkeypatch.setattr("ldm.checkpoints.checkpoint.read_pickle", fail)
    monkeypatch.setattr("ldm.core.files.sha256_file", fail)


def test_full_disk_is_seen_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(MedSoftError, match=r"out\.ckpt: needs 0\.04 GB, 0\.01 GB are free on that disk; make room"):
        convert(SD, tmp_path / "out.ckpt")
    assert not list(tmp_path.iterdir())


def test_place_that_cannot_be_written_is_seen_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable(monkeypatch)
    (tmp_path / "file").write_text("x")
    with pytest.raises(MedSoftError, match=r"out\.ckpt: cannot be written there \(.*file: Not a directory\)"):
        convert(SD, tmp_path / "file" / "out.ckpt")
    with pytest.raises(MedSoftError, match=r"out\.ckpt: cannot be written there \(/proc: "):
        convert(SD, Path("/proc/new/out.ckpt"))  # a folder in which nobody, not even root, can make files


def test_output_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; give the name of a file"):
        convert(SD, tmp_path, "--overwrite")


def test_missing_output_folder_is_made(tmp_path: Path) -> None:
    assert convert(SD, tmp_path / "new" / "deep" / "out.ckpt") == 0
    assert read_checkpoint(tmp_path / "new" / "deep" / "out.ckpt").metadata["stage"] == "converted"


# ----------------------------------------------------------------------------------------------------------- merge


@pytest.fixture
def sources(trained: dict) -> tuple[Path, Path]:
    return trained["stage1"].last, trained["unet_only"].last


def test_controller_of_one_and_the_rest_of_the_other(sources: tuple[Path, Path], world: Path) -> None:
    merged = read_checkpoint(world / "ckpt_for_stage2.ckpt")
    stage1, unet_only = (tensors(path) for path in sources)
    assert set(merged.state) == set(stage1) | set(unet_only)
    assert not changed(stage1, {key: v for key, v in merged.state.items() if key.startswith("msc.")})
    assert not changed(unet_only, {key: v for key, v in merged.state.items() if not key.startswith("msc.")})
    assert merged.metadata["stage"] == "merged"
    digests = {flag: made["sha256"] for flag, made in merged.metadata["origin"].items()}
    assert digests == {"stage1_path": sha256_file(sources[0]), "input_path": sha256_file(sources[1])}


def test_merge_again_is_complete(sources: tuple[Path, Path], world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert merge(*sources, world / "ckpt_for_stage2.ckpt") == 0
    assert "already complete" in caplog.text


def test_swapped_arguments_are_recognised(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no MSC and .* has one: the two are swapped"):
        merge(sources[1], sources[0], tmp_path / "out.ckpt")
    assert not list(tmp_path.iterdir())


def test_merge_with_another_preparation(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"was trained with data\.context=2\.0, this configuration has 3\.0"):
        merge(*sources, tmp_path / "out.ckpt", "data.context=3.0")
    assert not list(tmp_path.iterdir())


def test_merge_of_another_size(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"stage1/last\.ckpt: .*of another size.*Use the YAML it was made with"):
        merge(*sources, tmp_path / "out.ckpt", "msc.width=64")
    assert not list(tmp_path.iterdir())


def test_merge_with_a_value_that_is_not_a_number(sources: tuple[Path, Path], tmp_path: Path) -> None:
    bad = edit(sources[0], tmp_path / "nan.ckpt", keep=lambda key, v: v * float("inf") if key == "msc.position" else v)
    with pytest.raises(MedSoftError, match=r"nan\.ckpt: 1 tensor holds NaN"):
        merge(bad, sources[1], tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_merge_output_may_not_be_an_input(sources: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="is also the input"):
        merge(*sources, sources[0], "--overwrite")


def test_merge_refuses_stages_of_different_biomedclips(sources: tuple[Path, Path], tmp_path: Path) -> None:
    content = torch.load(sources[0], weights_only=True)
    content["medsoft"]["biomedclip"] = "another"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(MedSoftError, match="trained with different BiomedCLIP folders"):
        merge(tmp_path / "other.ckpt", sources[1], tmp_path / "out.ckpt")


def test_merge_warns_of_unexpected_stages(
    sources: tuple[Path, Path], converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert merge(converted, sources[1], tmp_path / "out.ckpt") == 0
    assert "was left by converted, expected stage1" in caplog.text
