"""The true-size networks against their originals; much memory, so only in ``make test-full``.

Random weights of models/mldm_v15.yaml, float32, 512 x 512: about 13 GB of memory and four minutes on two free cores.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from downloads import BIOMEDBERT, RELEASED, write_download
from test_encoders import PROMPTS, agrees_with_open_clip, open_clip_text
from test_networks import noise, relative_error
from tiny import MODELS, STAGES
from torch import nn

from ldm.config import Config, load_config
from ldm.data.png import write_png
from ldm.data.preparation import prepare
from ldm.data.samples import Sample
from ldm.inference.inpainter import Inpainter, Job
from ldm.networks.attention import Conditioning
from ldm.networks.biomedclip import BiomedClip, build_clip
from ldm.networks.biomedclip_folder import bert_config
from ldm.networks.model import MedSoftModel

pytestmark = pytest.mark.slow


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


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(MODELS / "mldm_v15.yaml")


@pytest.fixture(scope="module")
def model(config: Config) -> MedSoftModel:
    """All parts, 5.1 GB."""
    return typical(MedSoftModel(config.architecture))


def test_unet_and_autoencoder_agree_with_diffusers(model: MedSoftModel) -> None:
    from ldm.bench.common import diffusers_twins

    unet, autoencoder = diffusers_twins(model)
    x, text, t = noise(1, 9, 64, 64), noise(1, 77, 768), torch.tensor([501])
    expected = unet(x, t, text).sample
    assert expected.std() > 1e-2
    assert relative_error(model.unet(x, t, Conditioning(text)), expected) < 1e-4
    closed = Conditioning(text, noise(1, 49, 768), torch.zeros(1, 1, 64, 64))
    assert relative_error(model.unet(x, t, closed), expected) < 1e-4
    del unet

    image, latent = noise(1, 3, 512, 512).clamp(-1, 1), noise(1, 4, 64, 64)
    expected = autoencoder.encode(image).latent_dist
    found = model.first_stage_model.encode(image)
    assert relative_error(found.mean, expected.mode()) < 1e-4
    spread = noise(1, 4, 64, 64, seed=1)
    assert relative_error(found.sample(spread), expected.mean + expected.std * spread) < 1e-4
    assert relative_error(model.first_stage_model.decode(latent), autoencoder.decode(latent).sample) < 1e-4


def test_text_encoder_agrees_with_transformers_and_open_clip(model: MedSoftModel) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    ours = model.cond_stage_model
    # openai/clip-vit-large-patch14's text tower, as in the text_encoder folder of Stable Diffusion 1.5.
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    theirs = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="quick_gelu", projection_dim=768)).eval()
    stored = {key.removeprefix("transformer.text_model."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict({key: stored[key.removeprefix("text_model.")] for key in theirs.state_dict()})
    found, ids = ours(PROMPTS), ours.tokenize(PROMPTS)
    assert found.shape == (len(PROMPTS), 77, 768)
    assert relative_error(found, theirs(input_ids=ids).last_hidden_state) < 1e-4
    del theirs
    assert relative_error(found, open_clip_text(ours, heads=12)(ids)) < 1e-4


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of BiomedCLIP's size and layout (0.8 GB) with random weights and invented words."""
    clip = typical(build_clip(RELEASED["model_cfg"], BIOMEDBERT))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,;()-"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["lesion", "vertebra", "##lytic"]
    folder = tmp_path_factory.mktemp("hub") / "biomedclip"
    yield write_download(folder, RELEASED, clip.state_dict(), words)
    shutil.rmtree(folder)  # pytest keeps the temporary folders of three runs


def test_biomedclip_agrees_with_open_clip(biomedclip: Path, config: Config, tmp_path: Path) -> None:
    ours = agrees_with_open_clip(biomedclip, tmp_path / "theirs", BIOMEDBERT, PROMPTS, 1e-4)
    ours.check(config.biomedclip)
    tokens, token = ours.encode_image(noise(1, 3, 512, 512).clamp(-1, 1))
    assert (tokens.shape, token.shape) == ((1, 196, 768), (1, 768))
    assert ours.encode_text(["healthy"]).shape == (1, 512)
    published = {key: value for key, value in BIOMEDBERT.items() if key in bert_config(ours.clip.state_dict())}
    assert bert_config(ours.clip.state_dict()) == published


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_builds(stage: str) -> None:
    config = load_config(MODELS / f"mldm_v15_{stage}.yaml")
    net = MedSoftModel(config.architecture, config.training.builds)
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())
    if "unet" in net.parts:
        silent = [value for key, value in net.named_parameters() if ".attn3.to_out." in key]
        assert len(silent) == 32
        assert not any(value.any() for value in silent)


def test_the_whole_model_draws(model: MedSoftModel, biomedclip: Path, config: Config, tmp_path: Path) -> None:
    """Every part at its true size in one picture: two steps with guidance, soft mask, third attention awake."""
    image = np.random.default_rng(0).integers(0, 256, (600, 520), dtype=np.uint8)
    mask = np.zeros_like(image)
    mask[250:330, 200:300] = 255
    write_png(tmp_path / "image.png", image)
    write_png(tmp_path / "mask.png", mask)
    sample = Sample("s", tmp_path / "image.png", tmp_path / "mask.png", "lesion", (0.4, 0.4, 0.2, 0.2), "p")
    picture = prepare(sample, config.data, seed=0, variant=0)
    assert picture.image.shape == (3, 512, 512)
    config.sampling.steps = 2
    (made,) = Inpainter(model, BiomedClip(biomedclip), config.sampling).inpaint([picture], [Job(0, "s", 0, PROMPTS[2])])
    drawn = made.pixels
    assert drawn.shape == image.shape
    outside = picture.soft == 0
    assert np.array_equal(drawn[outside], image[outside])
    assert (drawn[mask > 0] != image[mask > 0]).mean() > 0.5
