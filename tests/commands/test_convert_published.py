"""Checkpoints that lie as CAT-Diffusion and MedSoft_Diffusion save them, made small: converted, or refused."""

from pathlib import Path

import pytest
import torch
from test_inspect import FITS, inspected
from tiny import SD, changed, convert, refused, tensors

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.files import sha256_file

State = dict[str, torch.Tensor]
WIDTH = 96  # of their tokens: 1024 at true size


@pytest.fixture(scope="module")
def source() -> State:
    return {key: value.float() for key, value in read_checkpoint(SD).state.items()}


def linear(name: str, rows: int, columns: int) -> State:
    return {f"{name}.weight": torch.ones(rows, columns), f"{name}.bias": torch.ones(rows)}


def inpainter(layers: int = 2) -> State:
    """The keys of their VisionFusionTransformer."""
    found = {
        "embeddings.position_embedding.weight": torch.ones(16, WIDTH),
        "embeddings.mask_embedding.weight": torch.ones(2, WIDTH),
        **{f"post_layernorm.{part}": torch.ones(WIDTH) for part in ("weight", "bias")},
    }
    for name, columns in (("label_mlp", 32), ("spatial_mlp", WIDTH), ("global_mlp", WIDTH)):
        found |= linear(f"{name}.fc1", 4 * WIDTH, columns) | linear(f"{name}.fc2", WIDTH, 4 * WIDTH)
    for layer in range(layers):
        stem = f"encoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found |= linear(f"{stem}.self_attn.{name}", WIDTH, WIDTH)
        found |= linear(f"{stem}.mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{stem}.mlp.fc2", WIDTH, 4 * WIDTH)
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{stem}.{name}.{part}": torch.ones(WIDTH) for part in ("weight", "bias")}
    return {f"fusion_model.{key}": value for key, value in found.items()}


def published(source: State) -> State:
    """Stable Diffusion trained on, beside a third attention, the inpainter and CLIP's image encoder."""
    state = {key: value + 0.001 if key.startswith("model.") else value for key, value in source.items()}
    for block in {key.partition(".attn2.")[0] for key in source if ".attn2.to_k." in key}:
        dim = source[f"{block}.attn2.to_q.weight"].shape[0]
        state |= {f"{block}.attn3.to_{name}.weight": torch.ones(dim, WIDTH) for name in "kv"}
        state |= {f"{block}.attn3.to_q.weight": torch.ones(dim, dim), **linear(f"{block}.attn3.to_out.0", dim, dim)}
        state |= {f"{block}.norm4.{part}": torch.ones(dim) for part in ("weight", "bias")}
    vision = "cond_stage_model2.encoder.vision_model"
    return {**state, **inpainter(), f"{vision}.pre_layrnorm.weight": torch.ones(WIDTH), "logvar": torch.zeros(1000)}


def test_stable_diffusion_part_is_taken(
    converted: Path, source: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The trained U-Net bit for bit; third attention and MSC as in every conversion; the rest named, with a reason."""
    state = published(source)
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 0
    made, plain = tensors(tmp_path / "out.ckpt"), tensors(converted)
    assert made.keys() == plain.keys()
    assert all(torch.equal(made[key], state[key]) for key in source if not key.endswith("position_ids"))
    new = {key: made[key] for key in made if key not in source}
    assert not changed(plain, new)
    for words in ("third attention without a gate", "semantic inpainter of that encoder", "image encoder; BiomedCLIP"):
        assert words in caplog.text
    assert "tokens of 96 channels, here they have 64" in caplog.text
    assert "does not say which patients are behind it" in caplog.text
    origin = read_checkpoint(tmp_path / "out.ckpt").metadata["origin"]
    assert origin["sha256"] == sha256_file(tmp_path / "in.ckpt")
    assert origin["layout"].startswith("CAT-Diffusion or MedSoft_Diffusion")


def test_inspection_says_what_it_is(source: State, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"state_dict": published(source)}, tmp_path / "in.ckpt")
    found = inspected(tmp_path / "in.ckpt", capsys)
    assert found["origin"]["layout"].startswith("CAT-Diffusion")
    assert (found["fits"], found["unconverted"], found["can_start"]) == ([], FITS, [])


def test_biomedclip_as_text_encoder(source: State, tmp_path: Path) -> None:
    """What MedSoft_Diffusion's stage 1 saves: the U-Net has no text encoder that it was trained with."""
    state = {key: value for key, value in published(source).items() if not key.startswith("cond_stage_model.")}
    state["cond_stage_model.model.text.transformer.embeddings.word_embeddings.weight"] = torch.ones(8, 8)
    torch.save({"state_dict": state}, tmp_path / "in.ckpt")
    refused(tmp_path / "in.ckpt", r"stage 1, whose text encoder is BiomedCLIP's .*convert.*sd-v1-5-inpainting\.ckpt")


def test_inpainter_alone(tmp_path: Path) -> None:
    torch.save({"state_dict": inpainter()}, tmp_path / "in.ckpt")
    refused(tmp_path / "in.ckpt", r"nor is it a whole checkpoint of CAT-Diffusion")
