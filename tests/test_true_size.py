"""The true-size networks against diffusers; several GB of memory, so only in ``make test-full``."""

import pytest
import torch
from test_networks import noise, relative_error
from tiny import ROOT
from torch import nn

from ldm.attention import Conditioning
from ldm.config import load_config
from ldm.model import MedSoftModel


@torch.no_grad()
def typical(module: nn.Module) -> nn.Module:
    """Random parameters of the size that trained ones have, also where a layer starts at zero or one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(drawn / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * drawn + (parameter == 1))
    return module.eval()


@pytest.mark.slow
@torch.no_grad()
def test_true_size_agrees_with_diffusers() -> None:
    """About 10 GB of memory and a minute or two: models/mldm_v15.yaml with random weights, at 512 x 512."""
    from ldm.benchmark import diffusers_twins

    config = load_config(ROOT / "models" / "mldm_v15.yaml")
    model = typical(MedSoftModel(config, ["unet", "autoencoder"]))
    unet, autoencoder = diffusers_twins(model, config)

    x, text, t = noise(1, 9, 64, 64), noise(1, 77, 768), torch.tensor([501])
    expected = unet(x, t, text).sample
    assert expected.std() > 1e-2
    assert relative_error(model.unet(x, t, Conditioning(text)), expected) < 1e-4
    closed = Conditioning(text, noise(1, 49, 768), torch.zeros(1, 1, 64, 64))
    assert relative_error(model.unet(x, t, closed), expected) < 1e-4
    del unet, model.model

    image, latent = noise(1, 3, 512, 512).clamp(-1, 1), noise(1, 4, 64, 64)
    expected = autoencoder.encode(image).latent_dist
    found = model.first_stage_model.encode(image)
    assert relative_error(found.mode, expected.mode()) < 1e-4
    spread = noise(1, 4, 64, 64, seed=1)
    assert relative_error(found.sample(spread), expected.mean + expected.std * spread) < 1e-4
    assert relative_error(model.first_stage_model.decode(latent), autoencoder.decode(latent).sample) < 1e-4
