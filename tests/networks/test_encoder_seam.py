"""Another image-text encoder takes BiomedCLIP's place by being named in ``open_encoder`` alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import PHANTOM, infer, metas, tensors, train
from torch import Tensor, nn

from ldm.config import BiomedClipConfig, load_config
from ldm.core.errors import MedSoftError
from ldm.evaluation.metrics import image_embeddings, text_embeddings
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.opening import open_encoder


class ColourEncoder(ImageTextEncoder):
    """Tokens are mean colours, prompts are counted letters; both go through one random projection."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.folder, self.fingerprint = Path(source), "colours"
        self.grid, self.token_dim, self.text_dim = 10, 64, 64
        self.project = nn.Linear(3, 64)
        nn.init.normal_(self.project.weight, generator=torch.Generator().manual_seed(0))
        self.freeze()

    def encode_image(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shown = image if hidden is None else image * (hidden <= 0)
        colours = F.adaptive_avg_pool2d(shown, self.grid).flatten(2).transpose(1, 2)
        return self.project(colours), self.project(colours.mean(dim=1))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        counts = torch.tensor([[prompt.count(letter) for letter in "aeo"] for prompt in prompts], device=self.device)
        return self.project(counts.float())

    def embed_image(self, image: Tensor) -> Tensor:
        return self.encode_image(image)[1]


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.networks.opening.BiomedClip", ColourEncoder)


def test_another_encoder_trains_the_msc_and_inpaints(world: Path, converted: Path, one: Path, tmp_path: Path) -> None:
    assert train("stage1", converted, tmp_path / "stage1", world, "--cache_dir", tmp_path / "features") == 0
    content = torch.load(tmp_path / "stage1" / "last.ckpt", weights_only=True)
    assert content["medsoft"]["biomedclip"] == "colours"
    assert any(key.startswith("msc.") for key in tensors(tmp_path / "stage1" / "last.ckpt"))
    assert infer(converted, tmp_path / "out", "--data", one) == 0
    assert len(metas(tmp_path / "out")) == 1


def test_another_encoder_measures(tmp_path: Path) -> None:
    encoder = open_encoder(load_config(PHANTOM).biomedclip)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cosines = image_embeddings(encoder, images) @ text_embeddings(encoder, ["lesion", "healthy"]).T
    assert cosines.shape == (2, 2)
    assert cosines.abs().max() <= 1 + 1e-9


def test_its_sizes_are_checked_as_biomedclips_are() -> None:
    with pytest.raises(MedSoftError, match=r"elsewhere: biomedclip\.token_dim is 64, the configuration expects 768"):
        open_encoder(BiomedClipConfig(path="elsewhere", grid=10))
