"""The networks, the schedule and the losses, against independent implementations and hand-written formulas."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.attention import Conditioning, TransformerBlock
from ldm.autoencoder import Autoencoder
from ldm.config import (
    AutoencoderConfig,
    BiomedClipConfig,
    Config,
    DiffusionConfig,
    MSCConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldm.diffusion import NoiseSchedule, diffusion_loss, picture_noise
from ldm.model import MedSoftModel, hide
from ldm.msc import MedicalSemanticController, masked_cosine, msc_loss, patch_mask, semantic_tokens
from ldm.samplers import DifferentialMask, ddim
from ldm.unet import UNet

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tool"))

UNET = UNetConfig(
    model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_levels=[1], num_heads=4, context_dim=24,
    semantic_dim=16,
)  # fmt: skip
AUTOENCODER = AutoencoderConfig(channels=32, channel_mult=[1, 1, 2], num_res_blocks=1)
TEXT = TextEncoderConfig(width=24, layers=2, heads=2)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.0120, "beta_schedule": "scaled_linear"}


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
    assert relative_error(posterior.mode, expected.mode()) < 1e-5
    spread = posterior.sample(noise(2, 4, 8, 6))
    assert relative_error(spread, expected.mean + expected.std * noise(2, 4, 8, 6)) < 1e-5
    assert relative_error(ours.decode(spread), theirs.decode(spread).sample) < 1e-5


def test_stable_diffusions_layout_agrees_with_diffusers() -> None:
    """Levels, blocks, attentions and heads of the true size, a tenth of its width; the sizes above are others."""
    from bench import diffusers_twins

    config = Config(unet=UNetConfig(model_channels=32), autoencoder=AutoencoderConfig(channels=32))
    model = scrambled(MedSoftModel(config, ["unet", "autoencoder"]))
    unet, autoencoder = diffusers_twins(model, config)
    x, text, t = noise(2, 9, 16, 8), noise(2, 77, 768), torch.tensor([1, 981])
    assert relative_error(model.unet(x, t, Conditioning(text)), unet(x, t, text).sample) < 1e-5
    image, latent = noise(1, 3, 64, 32).clamp(-1, 1), noise(1, 4, 8, 4)
    found, expected = model.encode(image), autoencoder.encode(image).latent_dist
    assert relative_error(found.mean, expected.mean) < 1e-5
    assert relative_error(found.logvar, expected.logvar) < 1e-5
    assert relative_error(model.first_stage_model.decode(latent), autoencoder.decode(latent).sample) < 1e-5


# ---------------------------------------------------------------------------------------------- schedule and sampling


def diffusers_ddim(steps: int):
    from diffusers import DDIMScheduler

    made = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SCHEDULE)
    made.set_timesteps(steps)
    return made


def test_noise_schedule_agrees_with_diffusers() -> None:
    ours, theirs = NoiseSchedule(DiffusionConfig()), diffusers_ddim(50)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6)
    z, e, t = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999])
    assert torch.allclose(ours.add_noise(z, e, t), theirs.add_noise(z, e, t), atol=1e-6)


@pytest.mark.parametrize(("steps", "eta"), [(50, 0.0), (50, 1.0), (7, 0.5), (250, 0.0)])
def test_ddim_agrees_with_diffusers_step_by_step(steps: int, eta: float) -> None:
    theirs = diffusers_ddim(steps)
    visited: list[tuple[int, Tensor]] = []

    def predict(x: Tensor, t: int) -> Tensor:
        visited.append((t, x.clone()))
        return torch.tanh(x.roll(1, dims=-1) + t / 1000)

    def step_noise(index: int) -> Tensor:
        return noise(2, 4, 2, 2, seed=100 + index)

    last = ddim(predict, noise(2, 4, 2, 2), NoiseSchedule(DiffusionConfig()), steps, eta, step_noise=step_noise)
    x = noise(2, 4, 2, 2)
    assert [t for t, _ in visited] == theirs.timesteps.tolist()
    for index, (t, ours) in enumerate(list(visited)):
        assert relative_error(ours, x) < 1e-5, f"step {index}"
        added = step_noise(index) if eta > 0 else None
        x = theirs.step(predict(x, t), t, x, eta=eta, variance_noise=added).prev_sample
    assert relative_error(last, x) < 1e-5


def test_ddim_takes_every_number_of_steps_the_configuration_allows() -> None:
    short = DiffusionConfig(timesteps=10)
    for steps in range(1, 10):
        drawn = ddim(lambda x, t: 0.1 * x, noise(1, 4, 2, 2), NoiseSchedule(short), steps)
        assert torch.isfinite(drawn).all(), steps


def test_ddim_with_eta_asks_for_noise() -> None:
    with pytest.raises(ValueError, match="step_noise"):
        ddim(lambda x, t: x, noise(1, 4, 2, 2), NoiseSchedule(DiffusionConfig()), 2, eta=1.0)


def test_differential_mask_releases_cells_by_their_soft_value() -> None:
    steps, schedule = 10, NoiseSchedule(DiffusionConfig())
    soft = torch.tensor([0.0, 0.05, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 5)
    original, start = noise(1, 4, 1, 5, seed=3), noise(1, 4, 1, 5, seed=4)
    seen: list[tuple[int, Tensor]] = []

    def predict(x: Tensor, t: int) -> Tensor:  # each cell on its own, so that cells can be compared
        seen.append((t, x.clone()))
        return torch.tanh(x)

    free = ddim(predict, start, schedule, steps)
    seen.clear()
    held = ddim(predict, start, schedule, steps, differential=DifferentialMask(soft, original, start))

    for index, (t, x) in enumerate(seen):
        alpha = float(schedule.alphas_cumprod[t])
        path = alpha**0.5 * original + (1 - alpha) ** 0.5 * start
        for cell, value in enumerate(soft.flatten().tolist()):
            on_path = torch.allclose(x[..., cell], path[..., cell], atol=1e-6)
            assert on_path == (index / steps < 1 - value - 1e-6), (index, value)
    assert torch.equal(held[..., :2], original[..., :2])  # never released: exactly the input
    assert torch.allclose(held[..., 4], free[..., 4], atol=1e-6)  # free from the start
    assert not torch.allclose(held[..., 2:4], original[..., 2:4], atol=1e-2)


def test_picture_noise_depends_on_names_only() -> None:
    first = picture_noise(0, "patient/a", 0, (4, 8, 8))
    assert torch.equal(first, picture_noise(0, "patient/a", 0, (4, 8, 8)))
    for other in ((1, "patient/a", 0), (0, "patient/b", 0), (0, "patient/a", 1)):
        assert not torch.equal(first, picture_noise(*other, (4, 8, 8)))


# --------------------------------------------------------------------------------------------- the third attention


def test_third_attention_starts_silent() -> None:
    unet = UNet(UNET).eval()
    for block in unet.modules():  # a residual block starts silent too; here only attn3 may be
        if isinstance(block, nn.Conv2d) and not block.weight.any():
            nn.init.normal_(block.weight, std=0.1)
    x, text, t = noise(1, 9, 8, 8), noise(1, 77, 24), torch.tensor([300])
    plain = unet(x, t, Conditioning(text))
    steered = unet(x, t, Conditioning(text, noise(1, 9, 16), torch.ones(1, 1, 8, 8)))
    assert torch.equal(plain, steered)
    assert plain.std() > 0


def test_gate_confines_the_third_attention() -> None:
    block = scrambled(TransformerBlock(dim=32, heads=4, text_dim=24, semantic_dim=16))
    x, text, tokens = noise(2, 6, 32), noise(2, 5, 24), noise(2, 9, 16)
    gate = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.0, 1.0]).reshape(1, 6, 1).expand(2, -1, -1)
    plain = block(x, Conditioning(text), None)
    gated = block(x, Conditioning(text, tokens), gate)
    outside = gate[0, :, 0] == 0
    assert torch.equal(plain[:, outside], gated[:, outside])
    assert ((plain - gated).abs().amax(dim=-1)[:, ~outside] > 1e-3).all()
    ungated = block(x, Conditioning(text, tokens), None)
    assert torch.allclose(ungated[:, 2], gated[:, 2], atol=1e-6)


def test_any_number_of_zero_tokens_is_the_same_condition() -> None:
    block = scrambled(TransformerBlock(dim=32, heads=4, text_dim=24, semantic_dim=16))
    x, text = noise(1, 6, 32), noise(1, 5, 24)
    one, many = (block(x, Conditioning(text, torch.zeros(1, count, 16)), None) for count in (1, 49))
    assert torch.allclose(one, many, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, 127), column=st.integers(0, 127), value=st.floats(0.01, 1))
def test_one_pixel_lesion_survives_every_reduction(row: int, column: int, value: float) -> None:
    soft = torch.zeros(1, 1, 128, 128)
    soft[0, 0, row, column] = value
    value = float(soft.max())
    latent = nn.functional.adaptive_max_pool2d(soft, 16)
    cond = Conditioning(torch.zeros(1, 1, 1), None, latent)
    for side in (16, 8, 4, 2):
        gate = cond.gate(side, side)
        assert gate.shape == (1, side * side, 1)
        assert gate.max() == value
        assert gate.reshape(side, side)[row * side // 128, column * side // 128] == value
    for grid in (14, 10):
        assert patch_mask(soft, grid).max() == value


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
    outputs = [msc(*inputs, torch.full((2, 16), value)) for value in (0.0, 0.5, 1.0)]
    assert outputs[0][0].shape == (2, 16, 16)
    assert outputs[0][1].shape == (2, 16)
    assert len({round(float(tokens.sum()), 4) for tokens, _ in outputs}) == 3
    # Half drawn is the mean of both embeddings.
    msc.mask_embedding[:] = msc.mask_embedding.mean(dim=0)
    assert torch.allclose(msc(*inputs, torch.ones(2, 16))[0], outputs[1][0], atol=1e-5)


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
    return MedSoftModel(config, ["unet", "autoencoder", "msc"])


def test_unet_input_order_and_gate(small_model: MedSoftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Conditioning]] = []
    monkeypatch.setattr(small_model.unet, "forward", lambda x, t, cond: calls.append((x, cond)) or x)
    noisy, masked, mask = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1), torch.rand(1, 1, 8, 8)
    for gated in (True, False):
        small_model.config.unet.soft_mask_attention = gated
        small_model.predict_noise(noisy, torch.tensor([5]), mask, masked, noise(1, 77, 24), noise(1, 4, 16))
    (x, cond), (_, ungated) = calls
    assert torch.equal(x[:, :4], noisy)
    assert torch.equal(x[:, 4:5], mask)
    assert torch.equal(x[:, 5:], masked)
    assert torch.equal(cond.soft_mask, mask)
    assert ungated.soft_mask is None


def test_latent_scale_is_applied_once_each_way(small_model: MedSoftModel) -> None:
    latent = noise(1, 4, 8, 8)
    assert torch.allclose(small_model.scaled(latent), 0.18215 * latent)
    plain = small_model.first_stage_model.decode(latent).clamp(-1, 1)
    assert torch.allclose(small_model.decode(small_model.scaled(latent)), plain, atol=1e-5)


def test_groups_share_no_parameter_and_leave_out_the_frozen_parts(small_model: MedSoftModel) -> None:
    groups = {name: set(found) for name, found in small_model.groups(("msc", "attn3", "unet")).items()}
    everything = {key for key, _ in small_model.named_parameters()}
    chosen = set().union(*groups.values())
    assert sum(map(len, groups.values())) == len(chosen)
    frozen = everything - chosen
    assert all(key.startswith(("first_stage_model.", "msc.global_head.")) for key in frozen)
    assert any(key.startswith("msc.global_head.") for key in frozen)
    assert all(".attn3." in key or ".norm4." in key for key in groups["attn3"])
    small_model.config.training.objective = "msc"
    assert "msc.global_head.weight" in small_model.groups(["msc"])["msc"]
