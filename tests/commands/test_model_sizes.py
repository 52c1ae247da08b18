"""tool/model_sizes.py: every true-size YAML builds, docs/sizes.md is what the command says, and that is so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, ROOT, STAGES, call

from ldm.bench import sizes
from ldm.bench.common import BIOMEDBERT, BIOMEDCLIP
from ldm.config import load_config
from ldm.networks.biomedclip import build_clip
from ldm.networks.model import MedSoftModel
from tool import model_sizes

SD_UNET = 859_535_364
# 16 blocks; in each q and out: d * d, k and v: 768 * d, out's bias and norm4: 3 * d.
THIRD = sum(blocks * (2 * d * d + 2 * 768 * d + 3 * d) for d, blocks in ((320, 5), (640, 5), (1280, 6)))
HEAD = (
    768 * 768 + 768
)  # a linear layer of the MSC: 24 blocks of 12 * W * W + 13 * W, 8 layers, what is learned by itself
MSC = 24 * (12 * 768**2 + 13 * 768) + 7 * HEAD + (512 * 768 + 768) + (196 + 2 + 2) * 768
U, A, T, M = "unet", "autoencoder", "text", "msc"


def test_documented_sizes_are_those_of_the_command(tmp_path: Path) -> None:
    assert call(model_sizes, "--output", tmp_path / "sizes.md") == 0
    assert (tmp_path / "sizes.md").read_text() == (ROOT / "docs" / "sizes.md").read_text()


@pytest.fixture(scope="module")
def true_size() -> tuple[Any, Any, Any]:
    """Configuration, MedSoftModel and BiomedCLIP on the meta device."""
    config = load_config(MODELS / "mldm_v15.yaml")
    with torch.device("meta"):
        return config, MedSoftModel(config.architecture), build_clip(BIOMEDCLIP, BIOMEDBERT)


def test_parameters_are_those_of_the_published_models(true_size: tuple[Any, Any, Any]) -> None:
    _, model, clip = true_size
    found = dict(sizes.parameters(model, clip))
    assert found["U-Net (Stable Diffusion 1.5 inpainting)"] == SD_UNET
    assert found["autoencoder: encoder"] + found["autoencoder: decoder"] == 83_653_863
    assert found["text encoder (CLIP ViT-L/14)"] == 123_060_480
    assert found["third attention"] == THIRD
    assert found["Medical Semantic Controller"] == MSC
    assert 160e6 < MSC < 180e6
    # ViT-B/16 without its classifier; BERT-base without its pooler; the two projections to 512.
    assert found["BiomedCLIP: image tower"] == 85_798_656 + 768 * 512
    assert found["BiomedCLIP: text tower"] == 109_482_240 - (768 * 768 + 768) + 768 * 640 + 640 * 512
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert sum(count for name, count in found.items() if "BiomedCLIP" not in name) == everything


def test_operations_of_the_published_models(true_size: tuple[Any, Any, Any]) -> None:
    _, model, clip = true_size
    with torch.device("meta"), torch.no_grad():
        found = dict(sizes.operations(model, clip))
    assert found["U-Net, third attention silent"] == pytest.approx(803.4e9, abs=0.05e9)
    assert found["autoencoder: decode"] == pytest.approx(2514.5e9, abs=0.05e9)
    assert found["autoencoder: encode"] == pytest.approx(1116.7e9, abs=0.05e9)
    assert found["BiomedCLIP: image"] == pytest.approx(35.1e9, abs=0.05e9)


@pytest.mark.parametrize(
    ("stage", "parts", "trained"),
    [
        ("stage1", [M], MSC),
        ("unet_only", [U, A, T], THIRD),
        ("stage2_1", [U, A, T, M], MSC - HEAD),
        ("stage2_2", [U, A, T, M], SD_UNET + THIRD + MSC - HEAD),
    ],
)
def test_every_true_size_stage_builds(stage: str, parts: list[str], trained: int) -> None:
    config = load_config(MODELS / f"mldm_v15_{stage}.yaml")
    found = sizes.stage_sizes(config.architecture, config.training)
    assert found["parts"] == parts
    assert found["trained"] == trained


@pytest.mark.parametrize("stage", STAGES)
def test_sizes_of_finished_checkpoints_are_those_on_the_disk(stage: str, trained: dict[str, Any]) -> None:
    config = load_config(MODELS / f"phantom_{stage}.yaml")
    found = sizes.stage_sizes(config.architecture, config.training)
    assert trained[stage].last.stat().st_size == pytest.approx(found["weights"], rel=0.05)
