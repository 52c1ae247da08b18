"""One batch of pictures: the soft mask's four ways, plain inpainting against diffusers' own pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_attention import _no_gradients  # noqa: F401
from tiny import CLIP, PHANTOM, TRAIN, squares
from torch import Tensor

from ldm.bench.common import diffusers_pipeline
from ldm.config import load_config
from ldm.data.annotations import load_samples
from ldm.data.preparation import PreparedSample, prepare
from ldm.diffusion.noise import image_noise
from ldm.inference.inpainter import Inpainter, Job, load_inpainter
from ldm.networks.model import hide

OFF = [
    *("unet.soft_mask_channel=false", "unet.soft_mask_attention=false", "msc.soft_mask_mixing=false"),
    "sampling.differential=false",
    "sampling.guidance_rescale=0",
]
JOBS = [Job(3, "a", 0, "severe osteolytic lesion"), Job(3, "b", 0, "haemangioma of the L2 vertebra")]


def inpainter(ckpt: Path, overrides: Sequence[str] = ()) -> Inpainter:
    config = load_config(PHANTOM, ["sampling.steps=4", f"biomedclip.path={CLIP}", *overrides])
    return load_inpainter(ckpt, config, "cpu")


@pytest.fixture
def soft_pictures(world: Path) -> list[PreparedSample]:
    sick = [sample for sample in load_samples(world / TRAIN)[0] if not sample.healthy][:2]
    return [prepare(sample, load_config(PHANTOM).data, 0, 0) for sample in sick]


def hard_inputs() -> tuple[Tensor, Tensor]:
    """Two images and masks of the phantom model's size; the masks are hard and fill whole latent cells."""
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 16:40, 20:44] = mask[1, :, 8:16, 32:60] = 1
    return image, mask


def test_all_four_off_with_a_hard_mask_is_plain_inpainting(converted: Path) -> None:
    """A converted model, whose third attention is silent, against diffusers' StableDiffusionInpaintPipeline."""
    ours = inpainter(converted, [*OFF, "sampling.sampler=ddim", "sampling.spacing=leading"])
    image, mask = hard_inputs()
    generated = squares(ours, image, mask, JOBS)

    theirs = diffusers_pipeline(ours.net)
    text = ours.net.cond_stage_model([job.prompt for job in JOBS])
    empty = ours.net.cond_stage_model([""]).expand(2, -1, -1)
    scale = ours.net.architecture.diffusion.latent_scale
    result = theirs(
        image=(image + 1) / 2,
        mask_image=mask,
        # The pipeline draws from the posterior; the contract here is its mode.
        masked_image_latents=theirs.vae.encode(hide(image, mask)).latent_dist.mode() * scale,
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        latents=torch.stack([image_noise(3, name, 0, (4, 16, 16)) for name in ("a", "b")]),
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=ours.sampling.guidance_scale,
        output_type="pt",
    ).images
    assert (generated / 2 + 0.5 - result).abs().max() < 2e-3
    assert result.std() > 0.05
    # A hard mask, but held cells outside it.
    soft = squares(inpainter(converted, ["sampling.sampler=ddim", "sampling.spacing=leading"]), image, mask, JOBS)
    assert (soft / 2 + 0.5 - result).abs().max() > 2e-2


def test_each_of_the_four_ways_can_be_switched_off(final: Path, soft_pictures: list[PreparedSample]) -> None:
    drawn = {}
    for off in (None, *OFF):
        made = inpainter(final, [off] if off else [])
        assert all((picture.mask % 1).any() for picture in soft_pictures)
        drawn[off] = [result.generated for result in made.inpaint(soft_pictures, JOBS)]
    for off in OFF:
        for with_all, without in zip(drawn[None], drawn[off], strict=True):
            assert np.abs(with_all - without).max() > 1e-5, off
    for first in OFF:
        for second in OFF:
            assert first == second or not np.allclose(drawn[first][0], drawn[second][0], atol=1e-6)


def test_with_a_hard_mask_channel_and_mixing_change_nothing(final: Path) -> None:
    """They differ from plain only in how they treat values between 0 and 1."""
    image, mask = hard_inputs()
    plain = squares(inpainter(final), image, mask, JOBS)
    assert torch.equal(plain, squares(inpainter(final, OFF[0:1]), image, mask, JOBS))
    grid = load_config(PHANTOM).biomedclip.grid
    assert set(torch.nn.functional.adaptive_max_pool2d(mask, grid).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(plain, squares(inpainter(final, OFF[2:3]), image, mask, JOBS))


def test_a_closed_gate_leaves_the_prompts_tokens_without_effect(final: Path) -> None:
    """With no mask at all the third attention is silent: its tokens could be anything."""
    made = inpainter(final, ["sampling.guidance_scale=1", "sampling.differential=false"])
    image, mask = hard_inputs()
    nothing = torch.zeros_like(mask)
    plain = squares(made, image, nothing, JOBS)
    made.net.msc.spatial_head.weight.data.normal_()
    assert torch.equal(squares(made, image, nothing, JOBS), plain)
    assert not torch.equal(squares(made, image, mask, JOBS), squares(inpainter(final), image, mask, JOBS))
