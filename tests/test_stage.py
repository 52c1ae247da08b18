"""One training stage without a run: frozen weights in half precision, and clipping."""

import pytest
import torch
from tiny import MODELS

from ldm.config import load_config
from ldm.model import MedSoftModel
from ldm.training import Stage


@pytest.mark.parametrize("amx", [False, True])
def test_halved_kernels_lie_as_the_cpu_reads_them_fastest(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    config = load_config(MODELS / "phantom_unet_only.yaml", [])
    net = MedSoftModel(config, ["unet"])
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    stage = Stage(config, net, {}, {}, torch.zeros(1, 77, config.text_encoder.width), half_frozen=True)
    layouts = set()
    for key, value in net.named_parameters():
        halved = key not in stage.trained and value.ndim > 1
        assert value.dtype == (torch.bfloat16 if halved else torch.float32)
        assert torch.equal(value, before[key].to(value.dtype))
        if halved and value.ndim == 4 and min(value.shape[1:]) > 1:  # of others both layouts are the same
            layouts.add(value.is_contiguous(memory_format=torch.channels_last))
    assert layouts == {amx}


@pytest.mark.parametrize(("most", "norm"), [(0.5, 0.5), (2.0, 1.0), (0.0, 1.0)])
def test_gradients_are_scaled_down_to_the_norm_of_the_yaml(most: float, norm: float) -> None:
    torch.manual_seed(0)
    config = load_config(MODELS / "phantom_stage1.yaml", [f"training.clip_norm={most}"])
    stage = Stage(config, MedSoftModel(config, ["msc"]), {}, {}, None)
    count = sum(value.numel() for value in stage.trained.values())
    for value in stage.trained.values():
        value.grad = torch.where(torch.rand_like(value) > 0.5, 1.0, -1.0) / count**0.5
    before = {key: value.grad.clone() for key, value in stage.trained.items()}
    norms, total = stage.gradient_norms()
    assert float(total) == pytest.approx(1.0, rel=1e-4)
    assert float(norms["msc"]) == float(total)
    stage.clip(total)
    for key, value in stage.trained.items():
        torch.testing.assert_close(value.grad, before[key] * norm, rtol=1e-4, atol=0)
