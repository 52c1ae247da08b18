"""Files that are not what their shapes suggest: metadata, marks, schedules, quantised weights, trained attentions."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import SD, changed, convert, edit, refused, tensors

from ldm.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from ldm.config import DiffusionConfig
from ldm.diffusion.schedule import NoiseSchedule

UNET = "model.diffusion_model."
LAYER = UNET + "input_blocks.3.1.transformer_blocks.0.attn2.to_q"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source() -> State:
    return {key: value.float() for key, value in read_checkpoint(SD).state.items()}


# -------------------------------------------------------------------------------------- metadata, marks, a YAML beside


METADATA = {
    "modelspec.prediction_type": "v",
    "modelspec.architecture": "stable-diffusion-v2-768-v",
    "ss_zero_terminal_snr": "True",
    "ss_v2": "True",
    "_quantization_metadata": '{"layers": {}}',
}


@pytest.mark.parametrize("key", METADATA)
def test_metadata_of_a_file(source: State, tmp_path: Path, key: str) -> None:
    save_file(source, tmp_path / "in.safetensors", metadata={key: METADATA[key]})
    refused(tmp_path / "in.safetensors", rf"its metadata says {key}")


def test_metadata_that_agrees(source: State, tmp_path: Path) -> None:
    agreeing = {
        "modelspec.prediction_type": "epsilon",
        "modelspec.architecture": "stable-diffusion-v1/inpainting",
        "modelspec.title": "a v prediction of nothing",
        "ss_v2": "False",
        "format": "pt",
    }
    save_file(source, tmp_path / "in.safetensors", metadata=agreeing)
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.ckpt") == 0


@pytest.mark.parametrize("key", ["v_pred", "ztsnr", "edm_mean", "module.v_pred"])
def test_marks_among_the_tensors(source: State, tmp_path: Path, key: str) -> None:
    torch.save({"state_dict": {**source, key: torch.zeros(0)}}, tmp_path / "in.ckpt")
    refused(tmp_path / "in.ckpt", rf"it holds the key {key.removeprefix('module.')}, the mark of")


def alphas(**settings: float) -> torch.Tensor:
    return NoiseSchedule(DiffusionConfig(**settings)).alphas_cumprod


SCHEDULES: dict[str, tuple[State, str]] = {
    "other betas": ({"alphas_cumprod": alphas(beta_end=0.02)}, r"noise schedule \(alphas_cumprod\) has 1000 steps"),
    "zero terminal": ({"alphas_cumprod": torch.cat([alphas()[:-1], torch.zeros(1)])}, r"has 1000 steps, .* to 0, the"),
    "other steps": ({"alphas_cumprod": alphas()[:500]}, r"has 500 steps"),
    "betas alone": ({"betas": torch.linspace(1e-4, 0.02, 1000)}, r"noise schedule"),
    "latent scale": (
        {"scale_factor": torch.tensor(0.13025)},
        r"scale_factor is 0\.13025, diffusion\.latent_scale is 0",
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_and_scale_among_the_tensors(source: State, tmp_path: Path, name: str) -> None:
    added, message = SCHEDULES[name]
    torch.save({"state_dict": {**source, **added}}, tmp_path / "in.ckpt")
    refused(tmp_path / "in.ckpt", message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_method_s_own_schedule_agrees(source: State, tmp_path: Path, dtype: torch.dtype) -> None:
    own = {"alphas_cumprod": alphas().to(dtype), "scale_factor": torch.tensor(0.18215).to(dtype)}
    torch.save({"state_dict": {**source, **own}}, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0


YAML = "model:\n  params: {parameterization: PARAM, linear_start: 0.00085, unet_config: {params: {num_heads: HEADS}}}\n"


@pytest.mark.parametrize(
    ("kind", "heads", "message"),
    [("v", 2, r"in\.yaml beside it says parameterization=v"), ("eps", 99, r"in\.yaml beside it says num_heads=99")],
)
def test_yaml_of_the_same_name(tmp_path: Path, kind: str, heads: int, message: str) -> None:
    shutil.copy(SD, tmp_path / "in.ckpt")
    (tmp_path / "in.yaml").write_text(YAML.replace("PARAM", kind).replace("HEADS", str(heads)))
    refused(tmp_path / "in.ckpt", message)


@pytest.mark.parametrize("text", ["- a list", "model: text", "a: [", "", "model: {params: {parameterization: eps}}"])
def test_yaml_of_something_else_or_that_agrees(tmp_path: Path, text: str) -> None:
    shutil.copy(SD, tmp_path / "in.ckpt")
    (tmp_path / "in.yaml").write_text(text)
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0


# ---------------------------------------------------------------------------------------------- quantised, incomplete


def int8(state: State, scale: str | None) -> State:
    """Linear weights of the U-Net as whole numbers, their scales beside them."""
    made = {}
    for key, value in state.items():
        if key.startswith(UNET) and key.endswith(".weight") and value.ndim == 2:
            step = value.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            made[key] = torch.round(value / step).to(torch.int8)
            if scale:
                made[key.removesuffix("weight") + scale] = step
        else:
            made[key] = value
    return made


def fp8(state: State, scale: str) -> State:
    made = dict(state)
    for key, value in state.items():
        if key.startswith(UNET) and key.endswith(".weight") and value.ndim == 2:
            made[key] = (value / value.abs().max() * 448).to(torch.float8_e4m3fn)
            made[key.removesuffix("weight") + scale] = value.abs().max().reshape(1) / 448
    return made


def gptq(state: State) -> State:
    """No weight is left under its own name."""
    packed = {key: key.replace(".weight", ".qweight") for key in state if ".attn1." in key and key.endswith(".weight")}
    return {packed.get(key, key): value.to(torch.int32) if key in packed else value for key, value in state.items()}


QUANTISED: dict[str, tuple[Callable[[State], State], str]] = {
    "int8": (lambda state: int8(state, "weight_scale"), r"whole numbers \(torch\.int8\), and beside .*weight_scale"),
    "int8 as bitsandbytes": (lambda state: int8(state, "SCB"), r"beside weights stand \d+ tensors \(.*\.SCB"),
    "int8 without scales": (
        lambda state: int8(state, None),
        r"whole numbers \(torch\.int8\), and their scales are not",
    ),
    "fp8": (lambda state: fp8(state, "scale_weight"), r"beside weights stand \d+ tensors \(.*\.scale_weight"),
    "GPTQ": (lambda state: gptq(state), r"beside weights stand \d+ tensors \(.*\.qweight"),
    "one scale": (
        lambda state: {**state, LAYER + ".weight_scale": torch.ones(1)},
        r"beside weights stands 1 tensor \(.*weight_scale",
    ),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(source: State, tmp_path: Path, name: str) -> None:
    quantise, message = QUANTISED[name]
    save_file(quantise(source), tmp_path / "in.safetensors")
    refused(tmp_path / "in.safetensors", message + ".*quantised or scaled")


def test_fp8_without_scales_is_read_and_said(source: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rounded = {key: value.to(torch.float8_e4m3fn) if key.startswith(UNET) else value for key, value in source.items()}
    save_file(rounded, tmp_path / "in.safetensors")
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.ckpt") == 0
    assert "weights in torch.float8_e4m3fn brought to torch.float32" in caplog.text
    assert torch.equal(tensors(tmp_path / "out.ckpt")[LAYER + ".weight"], rounded[LAYER + ".weight"].float())


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "in.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "in.gguf", "found a GGUF file, whose weights are quantised")


@pytest.mark.parametrize(
    ("prefix", "name"), [("first_stage_model.", r"autoencoder \(VAE\)"), ("cond_stage_model.", "text encoder")]
)
def test_checkpoint_without_a_part_says_so(tmp_path: Path, prefix: str, name: str) -> None:
    bad = edit(SD, tmp_path / "in.ckpt", keep=lambda key, v: None if key.startswith(prefix) else v)
    refused(bad, rf"holds no {name}, no key begins with {prefix}")


LORAS = {
    "kohya": ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", LAYER),
    "peft": (LAYER + ".lora_A.default.weight", LAYER + ".base_layer"),
    "processor": (LAYER.replace("to_q", "processor.to_q_lora.down.weight"), LAYER),
}


@pytest.mark.parametrize("name", LORAS)
def test_unmerged_lora_is_a_warning(
    source: State, converted: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    added, layer = LORAS[name]
    state = {key.replace(LAYER + ".", layer + "."): value for key, value in source.items()}
    torch.save({"state_dict": {**state, added: torch.ones(4, 4)}}, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0
    assert not changed(tensors(converted), tensors(tmp_path / "out.ckpt"))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"a LoRA that is not merged, 1 tensor ({added}), is left out" in warning


def test_parts_that_no_network_here_has_are_a_warning(
    source: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict": {**source, "control_model.out.weight": torch.ones(1)}}, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "left: 1 (control_model.out.weight): not part of any network here"


def test_layers_that_the_unet_here_has_not(source: State, tmp_path: Path) -> None:
    added = {UNET + "input_blocks.3.1.adapter.weight": torch.ones(1)}
    torch.save({"state_dict": {**source, **added}}, tmp_path / "in.ckpt")
    refused(tmp_path / "in.ckpt", r"its U-Net has layers .*1 tensor \(.*adapter\.weight\)")


# -------------------------------------------------------------------------------------------- already trained here


def left_by(converted: Path, path: Path, stage: str | None, parts: tuple[str, ...]) -> Path:
    found = read_checkpoint(converted)
    state = {key: value.clone() for key, value in found.state.items() if key.startswith(parts)}
    write_checkpoint(path, state, {**found.metadata, "stage": stage} if stage else {})
    return path


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    ("stage", "parts"),
    [("unet_only", ("model.", "first_", "cond_")), ("stage1", ("msc.",)), ("stage2_2", ("",)), ("merged", ("",))],
)
def test_what_a_stage_left_is_not_converted(
    converted: Path, tmp_path: Path, stage: str, parts: tuple[str, ...], suffix: str
) -> None:
    bad = left_by(converted, tmp_path / f"in.{suffix}", stage, parts)
    refused(bad, rf"is converted already \(it was left by {stage}\); give it to ver_train\.py .*tool_merge_for_stage2")


def foreign(source: State) -> dict[str, State]:
    """A third attention, an inpainter of tokens or both, which are not as the published code saves them."""
    blocks = {key.partition(".attn2.")[0] for key in source if ".attn2.to_k." in key}
    attention = {f"{block}.attn3.to_k.weight": torch.ones(8, 8) for block in blocks}
    inpainter = {"fusion_model.blocks.0.attn.in_proj_weight": torch.ones(8)}
    return {"whole": {**source, **attention, **inpainter}, "U-Net": {**source, **attention}, "MSC": inpainter}


@pytest.mark.parametrize("kind", ["whole", "U-Net", "MSC"])
def test_third_attention_of_another_program(source: State, tmp_path: Path, kind: str) -> None:
    torch.save({"state_dict": foreign(source)[kind], "global_step": 7}, tmp_path / "in.ckpt")
    message = (
        r"holds \d+ tensors? .*of a third attention or semantic inpainter.*convert the Stable Diffusion checkpoint"
    )
    refused(tmp_path / "in.ckpt", message)


def test_third_attention_that_lost_its_origin(converted: Path, tmp_path: Path) -> None:
    """Saved again by another program, without what our checkpoints say of themselves."""
    bad = left_by(converted, tmp_path / "in.safetensors", None, ("model.", "first_", "cond_"))
    refused(bad, r"holds 28 tensors .*attn3.*does not say that a stage of this repository left them")
