"""A whole inpainting run against diffusers' StableDiffusionInpaintPipeline with the same weights and noise."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from downloads import sd_tokenizer_folder
from PIL import Image
from tiny import CLIP, MODELS, SD, convert, squares

from ldm.checkpoints.checkpoint import PREFIXES, read_checkpoint
from ldm.checkpoints.fitting import load_parts
from ldm.config import Config, load_config
from ldm.data.png import write_png
from ldm.data.preparation import PreparedSample, prepare
from ldm.data.samples import Sample
from ldm.diffusion.noise import image_noise
from ldm.inference.inpainter import Inpainter, Job
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel

PROMPTS = ["severe osteolytic lesion of the L3 vertebra", "Métastase ostéoblastique — T11"]


@pytest.fixture(scope="module")
def config() -> Config:
    """Phantom sizes with what diffusers does not have switched off: soft border, differential mask."""
    off = ["data.fit=resize", "data.feather=0", "sampling.differential=false"]
    return load_config(
        MODELS / "phantom.yaml",
        [
            *off,
            "sampling.sampler=ddim",
            "sampling.spacing=leading",
            "sampling.steps=10",
            "sampling.guidance_scale=7.5",
            "sampling.guidance_rescale=0",
        ],
    )


@pytest.fixture(scope="module")
def net(config: Config, tmp_path_factory: pytest.TempPathFactory) -> MedSoftModel:
    """The phantom base after conversion: trained weights, the third attention still silent."""
    path = tmp_path_factory.mktemp("pipeline") / "converted.ckpt"
    assert convert(SD, path) == 0
    model = MedSoftModel(config.architecture).eval()
    load_parts(model, read_checkpoint(path), list(PREFIXES), config.architecture)
    return model


@pytest.fixture(scope="module")
def pipeline(net: MedSoftModel, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ldm.bench.common import diffusers_twins

    unet, vae = diffusers_twins(net)
    unet.register_to_config(sample_size=64)  # the pipeline wants to know it; height and width are given anyhow
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    )
    stored = net.cond_stage_model.state_dict()
    names = {key: f"transformer.text_model.{key.removeprefix('text_model.')}" for key in text.state_dict()}
    text.load_state_dict({key: stored[name] for key, name in names.items()})
    schedule = {"beta_start": 0.00085, "beta_end": 0.0120, "beta_schedule": "scaled_linear"}
    made = StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(sd_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def picture(config: Config, tmp_path_factory: pytest.TempPathFactory) -> PreparedSample:
    """A smooth colour picture of the model's size, with a hard mask along the latent grid."""
    folder, side, cell = tmp_path_factory.mktemp("sample"), config.data.image_size, config.autoencoder.factor
    coarse = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    write_png(folder / "image.png", np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)))
    mask = np.zeros((side, side), np.uint8)
    mask[4 * cell : 11 * cell, 3 * cell : 9 * cell] = 255
    write_png(folder / "mask.png", mask)
    sample = Sample("s", folder / "image.png", folder / "mask.png", "lesion", (0.2, 0.2, 0.5, 0.5), "p")
    made = prepare(sample, config.data, seed=0, variant=0)
    assert set(np.unique(made.soft)) == {0.0, 1.0}
    return made


def drawn_by_diffusers(
    pipeline: Any, picture: PreparedSample, jobs: list[Job], config: Config, strength: float = 1.0
) -> np.ndarray:
    """(B, S, S, 3) in [0, 1]. The latents of the image and of the masked one are modes, which diffusers would sample.

    ``strength`` below 1: it begins with the image, noised as its own scheduler noises it.
    """
    side = config.data.image_size
    image = Image.fromarray(picture.original)
    masked = pipeline.image_processor.preprocess(image, height=side, width=side)
    masked = masked * ~torch.from_numpy(picture.hard)
    latent = pipeline.vae.encode(masked).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = [image_noise(job.seed, job.sample_id, job.variant, tuple(latent.shape[1:])) for job in jobs]
    latents = torch.stack(noise)
    if strength < 1:
        pipeline.scheduler.set_timesteps(config.sampling.steps)
        times, _ = pipeline.get_timesteps(config.sampling.steps, strength, "cpu")
        whole = pipeline.vae.encode(pipeline.image_processor.preprocess(image, height=side, width=side)).latent_dist
        clean = (whole.mode() * pipeline.vae.config.scaling_factor).expand_as(latents)
        latents = pipeline.scheduler.add_noise(clean, latents, times[:1].repeat(len(jobs)))
    return pipeline(
        prompt=[job.prompt for job in jobs],
        image=[image] * len(jobs),
        mask_image=[Image.fromarray(picture.hard.astype(np.uint8) * 255)] * len(jobs),
        masked_image_latents=latent.expand(len(jobs), -1, -1, -1),
        latents=latents,
        strength=strength,
        height=side,
        width=side,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        eta=config.sampling.eta,
        output_type="np",
    ).images


@torch.no_grad()
def test_inpainting_agrees_with_diffusers(
    net: MedSoftModel, pipeline: Any, picture: PreparedSample, config: Config
) -> None:
    jobs = [Job(seed=3, sample_id="s", variant=index, prompt=prompt) for index, prompt in enumerate(PROMPTS)]
    expected = drawn_by_diffusers(pipeline, picture, jobs, config)
    inpainter = Inpainter(net, BiomedClip(CLIP), config.sampling)

    square = squares(inpainter, torch.stack([picture.image] * 2), torch.stack([picture.mask] * 2), jobs)
    found = (square / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected[0] - expected[1]).max() > 0.05  # noise and prompt matter

    inside = picture.hard
    for drawn, theirs in zip(inpainter.inpaint([picture] * 2, jobs), expected, strict=True):
        result = drawn.pixels
        grey_values = np.abs(result.astype(int) - np.round(255 * theirs).astype(int))
        assert grey_values[inside].max() <= 1
        assert np.array_equal(result[~inside], picture.original[~inside])
        assert (result[inside] != picture.original[inside]).mean() > 0.5


@torch.no_grad()
def test_beginning_with_the_image_agrees_with_diffusers(
    net: MedSoftModel, pipeline: Any, picture: PreparedSample, config: Config
) -> None:
    jobs = [Job(seed=3, sample_id="s", variant=0, prompt=PROMPTS[0])]
    expected = drawn_by_diffusers(pipeline, picture, jobs, config, strength=0.5)
    image, mask = picture.image[None], picture.mask[None]

    def drawn(strength: float, start: torch.Tensor | None = None) -> np.ndarray:
        init = "image" if start is None else "paste"
        sampling = dataclasses.replace(config.sampling, init=init, strength=strength)
        square, _ = Inpainter(net, BiomedClip(CLIP), sampling)._generate(image, mask, jobs, pasted=start)
        return (square / 2 + 0.5).permute(0, 2, 3, 1).numpy()

    assert np.abs(drawn(0.5) - expected).max() < 1e-4
    assert np.abs(drawn(1.0) - expected).max() > 0.02
    decoded = net.decode(net.scaled(net.encode(image).mean)) / 2 + 0.5
    assert np.abs(drawn(0.0) - decoded.permute(0, 2, 3, 1).numpy()).max() < 1e-5  # through the autoencoder alone
    flipped = image.flip(3)
    decoded = net.decode(net.scaled(net.encode(flipped).mean)) / 2 + 0.5
    assert np.abs(drawn(0.0, flipped) - decoded.permute(0, 2, 3, 1).numpy()).max() < 1e-5


@torch.no_grad()
def test_prompt_and_third_attention_change_the_picture(
    net: MedSoftModel, picture: PreparedSample, config: Config
) -> None:
    """What the agreement above would not notice if it were ignored on both sides."""
    inpainter = Inpainter(net, BiomedClip(CLIP), config.sampling)

    def drawn(prompt: str) -> np.ndarray:
        return inpainter.inpaint([picture], [Job(3, "s", 0, prompt)])[0].pixels.astype(int)

    plain = drawn(PROMPTS[0])
    assert np.abs(plain - drawn("healthy")).max() > 1
    silent = {key: value.clone() for key, value in net.state_dict().items() if ".attn3.to_out." in key}
    generator = torch.Generator().manual_seed(0)
    try:
        for key, value in silent.items():
            net.get_parameter(key).copy_(0.1 * torch.randn(value.shape, generator=generator))
        assert np.abs(plain - drawn(PROMPTS[0])).max() > 1
    finally:
        net.load_state_dict(silent, strict=False)
