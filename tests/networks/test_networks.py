"""The networks, the schedule and the losses, against independent implementations and hand-written formulas."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.config import (
    AutoencoderConfig,
    BiomedClipConfig,
    Config,
    MSCConfig,
    TextEncoderConfig,
    TrainingConfig,
    UNetConfig,
)
from ldm.diffusion.schedule import diffusion_loss
from ldm.networks.attention import Conditioning
from ldm.networks.autoencoder import Autoencoder
from ldm.networks.model import MedSoftModel, hide
from ldm.networks.msc import (
    ControllerInputs,
    MedicalSemanticController,
    input_shapes,
    masked_cosine,
    msc_loss,
    patch_mask,
    semantic_tokens,
)
from ldm.networks.unet import UNet
from ldm.training.stage import training_groups

ROOT = Path(__file__).resolve().parents[2]
UNET = UNetConfig(
    model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_levels=[1], num_heads=4, context_dim=24,
    semantic_dim=16,
)  # fmt: skip
AUTOENCODER = AutoencoderConfig(channels=32, channel_mult=[1, 1, 2], num_res_blocks=1)
TEXT = TextEncoderConfig(width=24, layers=2, heads=2)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scrambled(module: nn.Module) -> nn.Module:
    """Every parameter random, also those that start at zero or one: nothing may agree by being silent."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + (parameter == 1))
    return module.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------- against diffusers, transformers


def test_unet_agrees_with_diffusers() -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = scrambled(UNet(UNET))
    theirs = UNet2DConditionModel(
        in_channels=9,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, in spite of its name
        cross_attention_dim=24,
    ).eval()
    state = {
        f"model.diffusion_model.{key}": value
        for key, value in ours.state_dict().items()
        if ".attn3." not in key and ".norm4." not in key
    }
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, dict(theirs.config)), strict=True)

    x, text, t = noise(2, 9, 8, 12), noise(2, 77, 24), torch.tensor([1, 981])
    expected = theirs(x, t, text).sample
    assert relative_error(ours(x, t, Conditioning(text)), expected) < 1e-5
    # A closed gate silences the third attention, whatever its weights and tokens.
    closed = Conditioning(text, noise(2, 9, 16), torch.zeros(2, 1, 8, 12))
    assert relative_error(ours(x, t, closed), expected) < 1e-5
    opened = Conditioning(text, noise(2, 9, 16), torch.ones(2, 1, 8, 12))
    assert relative_error(ours(x, t, opened), expected) > 1e-3


def test_activation_checkpointing_changes_nothing() -> None:
    unet = scrambled(UNet(UNET))
    x, t = noise(1, 9, 8, 8), torch.tensor([500])
    cond = Conditioning(noise(1, 5, 24), noise(1, 4, 16), torch.ones(1, 1, 8, 8))
    gradients = []
    with torch.enable_grad():
        for unet.activation_checkpointing in (False, True):
            unet.zero_grad()
            unet(x, t, cond).square().mean().backward()
            gradients.append(unet.input_blocks[0][0].weight.grad.clone())
    assert torch.equal(*gradients)


def test_autoencoder_agrees_with_diffusers() -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours = scrambled(Autoencoder(AUTOENCODER))
    theirs = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()
    state = {f"first_stage_model.{key}": value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_vae_checkpoint(state, dict(theirs.config)), strict=True)

    image = noise(2, 3, 32, 24).clamp(-1, 1)
    posterior, expected = ours.encode(image), theirs.encode(image).latent_dist
    assert relative_error(posterior.mean, expected.mode()) < 1e-5
    spread = posterior.sample(noise(2, 4, 8, 6))
    assert relative_error(spread, expected.mean + expected.std * noise(2, 4, 8, 6)) < 1e-5
    assert relative_error(ours.decode(spread), theirs.decode(spread).sample) < 1e-5


def test_stable_diffusions_layout_agrees_with_diffusers() -> None:
    """Levels, blocks, attentions and heads of the true size, a tenth of its width; the sizes above are others."""
    from ldm.bench.common import diffusers_twins

    config = Config(unet=UNetConfig(model_channels=32), autoencoder=AutoencoderConfig(channels=32))
    model = scrambled(MedSoftModel(config.architecture, ["unet", "autoencoder"]))
    unet, autoencoder = diffusers_twins(model)
    x, text, t = noise(2, 9, 16, 8), noise(2, 77, 768), torch.tensor([1, 981])
    assert relative_error(model.unet(x, t, Conditioning(text)), unet(x, t, text).sample) < 1e-5
    image, latent = noise(1, 3, 64, 32).clamp(-1, 1), noise(1, 4, 8, 4)
    found, expected = model.encode(image), autoencoder.encode(image).latent_dist
    assert relative_error(found.mean, expected.mean) < 1e-5
    assert relative_error(found.logvar, expected.logvar) < 1e-5
    assert relative_error(model.first_stage_model.decode(latent), autoencoder.decode(latent).sample) < 1e-5


# ------------------------------------------------------------------------------------------------- MSC and losses


def test_semantic_tokens_mix_then_pool() -> None:
    seen, inside = noise(2, 16, 3), noise(2, 16, 3, seed=1)
    soft = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    expected = np.zeros((2, 4, 3))
    for row in range(4):
        for column in range(4):
            patch = 4 * row + column
            share = soft[:, patch, None].numpy()
            mixed = share * inside[:, patch].numpy() + (1 - share) * seen[:, patch].numpy()
            expected[:, 2 * (row // 2) + column // 2] += mixed / 4
    np.testing.assert_allclose(semantic_tokens(seen, inside, soft).numpy(), expected, atol=1e-6)
    assert torch.allclose(semantic_tokens(seen, inside, torch.zeros(2, 16)), semantic_tokens(seen, seen, soft))


def test_msc_loss_formula() -> None:
    tokens, target, token, goal = noise(2, 9, 5), noise(2, 9, 5, seed=1), noise(2, 5, seed=2), noise(2, 5, seed=3)
    soft = torch.rand(2, 9, generator=torch.Generator().manual_seed(4))
    for item in range(2):
        error = ((tokens - target)[item].numpy() ** 2).mean(axis=1)
        weights = soft[item].numpy()
        expected = (error * weights).sum() / weights.sum() + ((token - goal)[item].numpy() ** 2).mean()
        assert float(msc_loss(tokens, target, token, goal, soft)[item]) == pytest.approx(expected, rel=1e-5)


def test_msc_loss_does_not_depend_on_the_lesion_size() -> None:
    tokens, target, token = torch.ones(2, 196, 5), torch.zeros(2, 196, 5), torch.zeros(2, 5)
    soft = torch.zeros(2, 196)
    soft[0, 7] = 1  # one patch
    soft[1, :98] = 1  # half of them
    small, large = msc_loss(tokens, target, token, token, soft)
    assert float(small) == pytest.approx(float(large))
    assert masked_cosine(tokens, tokens, soft).tolist() == pytest.approx([1.0, 1.0])


def test_controller_sees_how_much_of_a_patch_is_drawn() -> None:
    clip = BiomedClipConfig(grid=4, token_dim=16, text_dim=8)
    msc = scrambled(MedicalSemanticController(MSCConfig(width=32, layers=2, heads=4), clip))
    inputs = noise(2, 16, 16), noise(2, 16), noise(2, 8)
    outputs = [msc(ControllerInputs(*inputs, torch.full((2, 1, 8, 8), value))) for value in (0.0, 0.5, 1.0)]
    assert outputs[0][0].shape == (2, 16, 16)
    assert outputs[0][1].shape == (2, 16)
    assert len({round(float(tokens.sum()), 4) for tokens, _ in outputs}) == 3
    # Half drawn is the mean of both embeddings.
    msc.mask_embedding[:] = msc.mask_embedding.mean(dim=0)
    assert torch.allclose(msc(ControllerInputs(*inputs, torch.ones(2, 1, 8, 8)))[0], outputs[1][0], atol=1e-5)


def test_frozen_msc_in_half_precision_takes_full_inputs() -> None:
    """As in a bf16-mixed stage that uses the MSC but does not train it."""
    clip = BiomedClipConfig(grid=4, token_dim=8, text_dim=6)
    msc = MedicalSemanticController(MSCConfig(width=32, layers=1, heads=4), clip)
    inputs = ControllerInputs(*map(torch.rand, input_shapes(clip, batch=2, pixels=8).values()))
    whole = msc(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        halved = msc.bfloat16()(inputs)[0]
    assert torch.allclose(halved.float(), whole, atol=0.05 * float(whole.abs().max()))


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_diffusion_loss_formula(weight: float) -> None:
    predicted, truth = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    soft = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    scale = 1 + weight * np.broadcast_to(soft.numpy(), (2, 4, 3, 3))
    error = (predicted - truth).numpy() ** 2
    expected = (scale * error).mean(axis=(1, 2, 3)) / scale.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(diffusion_loss(predicted, truth, soft, weight).numpy(), expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the model


def test_hidden_is_the_lesion_and_mid_grey() -> None:
    image = noise(1, 3, 4, 4).clamp(-1, 1)
    soft = torch.zeros(1, 1, 4, 4)
    soft[..., 0, :] = torch.tensor([0.2, 0.49, 0.5, 1.0])
    hidden = hide(image, soft)
    assert (hidden[:, :, 0, 2:] == 0).all()
    assert torch.equal(hidden[:, :, 0, :2], image[:, :, 0, :2])
    assert torch.equal(hidden[:, :, 1:], image[:, :, 1:])


@pytest.fixture
def small_model() -> MedSoftModel:
    config = Config(
        unet=UNET,
        autoencoder=AUTOENCODER,
        text_encoder=TEXT,
        biomedclip=BiomedClipConfig(grid=4, token_dim=16, text_dim=8),
        msc=MSCConfig(width=32, layers=1, heads=4),
    )
    config.data.image_size = 32
    return MedSoftModel(config.architecture, ["unet", "autoencoder", "msc"])


def test_unet_input_order_and_gate(small_model: MedSoftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Conditioning]] = []
    monkeypatch.setattr(small_model.unet, "forward", lambda x, t, cond: calls.append((x, cond)) or x)
    noisy, masked, mask = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1), torch.rand(1, 1, 8, 8)
    for soft in (True, False):
        unet = small_model.architecture.unet
        unet.soft_mask_attention = unet.soft_mask_channel = soft
        small_model.predict_noise(noisy, torch.tensor([5]), mask, masked, noise(1, 77, 24), noise(1, 4, 16))
    (x, cond), (plain, ungated) = calls
    assert torch.equal(x[:, :4], noisy)
    assert torch.equal(x[:, 4:5], mask)
    assert torch.equal(x[:, 5:], masked)
    assert torch.equal(cond.soft_mask, mask)
    assert ungated.soft_mask is None
    assert torch.equal(plain[:, 4:5], (mask >= 0.5).float())
    assert torch.equal(plain[:, 5:], masked)


def test_mask_embeddings_are_mixed_or_chosen(small_model: MedSoftModel) -> None:
    scrambled(small_model.msc)
    soft = noise(1, 1, 32, 32).abs().clamp(0, 1) * torch.linspace(0, 1, 32)
    inputs = ControllerInputs(noise(1, 16, 16), noise(1, 16), noise(1, 8), soft)
    mixed, hard = small_model.msc(inputs)[0], inputs._replace(mask=(soft >= 0.5).float())
    small_model.architecture.msc.soft_mask_mixing = False
    chosen, of_hard = small_model.msc(inputs)[0], small_model.msc(hard)[0]
    assert not torch.allclose(chosen, mixed, atol=1e-3)
    assert torch.equal(small_model.patch_mask(soft), patch_mask(soft, 4))  # the loss stays soft
    small_model.architecture.msc.soft_mask_mixing = True
    assert torch.equal(chosen, small_model.msc(hard)[0])
    assert torch.equal(of_hard, small_model.msc(hard)[0])


def test_latent_scale_is_applied_once_each_way(small_model: MedSoftModel) -> None:
    latent = noise(1, 4, 8, 8)
    assert torch.allclose(small_model.scaled(latent), 0.18215 * latent)
    plain = small_model.first_stage_model.decode(latent).clamp(-1, 1)
    assert torch.allclose(small_model.decode(small_model.scaled(latent)), plain, atol=1e-5)


def test_groups_share_no_parameter_and_leave_out_the_frozen_parts(small_model: MedSoftModel) -> None:
    rates = {"msc": 1e-4, "attn3": 1e-4, "unet": 1e-5}
    groups = training_groups(small_model, TrainingConfig(rates=rates, objective="diffusion"))
    everything = {key for key, _ in small_model.named_parameters()}
    chosen = set().union(*groups.values())
    assert sum(map(len, groups.values())) == len(chosen)
    frozen = everything - chosen
    assert all(key.startswith(("first_stage_model.", "msc.global_head.")) for key in frozen)
    assert any(key.startswith("msc.global_head.") for key in frozen)
    assert all(".attn3." in key or ".norm4." in key for key in groups["attn3"])
    alone = training_groups(small_model, TrainingConfig(rates={"msc": 1e-4}, objective="msc"))
    assert "msc.global_head.weight" in alone["msc"]
