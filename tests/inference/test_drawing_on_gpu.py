"""Drawing on a GPU that is there: the pictures of a CPU, whatever makes it fast, and a host that never waits.

The twin of training/test_on_gpu.py. What docs/inference.md says of a GPU is tested here, on spines of the small world.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import DEVICES, no_waits
from tiny import CLIP, PHANTOM, SD, Small, awake, convert, edit, squares, stacked, whole_samples
from torch import Tensor

from ldm.bench.inference import levels, wake
from ldm.config import Config, load_config
from ldm.inference import inpainter as drawing
from ldm.inference.inpainter import Inpainter, Job, load_inpainter
from ldm.networks.model import MedSoftModel
from ldm.networks.opening import open_encoder
from ldm.networks.sampling import sample_latent
from ldm.phantom.base_data import healthy_crops

GUIDED = ("sampling.differential=true", "sampling.guidance_scale=7.5", "sampling.guidance_rescale=0.7")
PROMPTS = ("severe osteolytic lesion of the L3 vertebra", "haemangioma of the L2 vertebra", "mild sclerotic lesion")
JOBS = [Job(3, f"spine {index}", 0, prompt) for index, prompt in enumerate(PROMPTS)]

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """An inpainter on a GPU lets all products be TF32: the next test begins as a process does."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom base after conversion, its third attention no longer silent."""
    folder = tmp_path_factory.mktemp("drawing")
    assert convert(SD, folder / "silent.ckpt") == 0
    return edit(folder / "silent.ckpt", folder / "base.ckpt", keep=awake)


@pytest.fixture(scope="module")
def spines() -> tuple[Tensor, Tensor]:
    """Three healthy spines (3, 3, 64, 64) in [-1, 1], and soft masks (3, 1, 64, 64) in the shape of lesions."""
    crops, masks = healthy_crops(load_config(PHANTOM).data, 3, 1)
    return crops.expand(-1, 3, -1, -1) * 2 - 1, masks


def configured(*words: str) -> Config:
    return load_config(PHANTOM, [f"biomedclip.path={CLIP}", "sampling.steps=4", *GUIDED, *words])


def one_by_one(checkpoint: Path, spines: tuple[Tensor, Tensor], *words: str) -> Tensor:
    """The reference: each spine on its own, on a CPU, in float32; (3, 3, 64, 64) in [-1, 1]."""
    made = load_inpainter(checkpoint, configured(*words), "cpu")
    rows = [slice(index, index + 1) for index in range(3)]
    return torch.cat([squares(made, *(value[row] for value in spines), JOBS[row]) for row in rows])


def apart(one: Tensor, other: Tensor) -> Tensor:
    """By how many grey levels of 255 two pictures differ, at each pixel."""
    return (levels(one) - levels(other)).abs()


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_pictures_are_those_of_a_cpu(
    device: str, sampler: str, checkpoint: Path, spines: tuple[Tensor, Tensor]
) -> None:
    """In float32, a GPU's products in TF32, and in one batch."""
    expected = one_by_one(checkpoint, spines, f"sampling.sampler={sampler}")
    found = squares(load_inpainter(checkpoint, configured(f"sampling.sampler={sampler}"), device), *spines, JOBS)
    assert apart(found, expected).max() <= 2
    assert apart(found, spines[0])[(spines[1] == 1).expand(found.shape)].float().mean() > 20  # something is drawn


def test_half_precision_is_as_near_as_documented(device: str, checkpoint: Path, spines: tuple[Tensor, Tensor]) -> None:
    words = "sampling.sampler=ddim", "sampling.steps=20"
    expected = one_by_one(checkpoint, spines, *words)
    made = load_inpainter(checkpoint, configured(*words, "sampling.precision=bf16-true"), device)
    differences = apart(squares(made, *spines, JOBS), expected)
    assert differences.max() <= 6
    assert 0 < differences[(spines[1] >= 0.5).expand(differences.shape)].float().mean() <= 1


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1), ("dpmpp_2m", 0)])
def test_the_host_never_waits_while_sampling(
    device: str,
    sampler: str,
    eta: int,
    checkpoint: Path,
    spines: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch itself says where it would. The first batch loads kernels and memory that later ones have."""
    made = load_inpainter(checkpoint, configured(f"sampling.sampler={sampler}", f"sampling.eta={eta}"), device)
    before = squares(made, *spines, JOBS)
    runs = watched(monkeypatch, device)
    assert apart(squares(made, *spines, JOBS), before).max() <= 1
    assert runs == [(3, 4, 16, 16)]


def watched(monkeypatch: pytest.MonkeyPatch, device: str) -> list[tuple[int, ...]]:
    """From here on no sampling run may wait; the shapes of their latents are collected in what is returned."""
    shapes: list[tuple[int, ...]] = []

    def sampled(*given: Any, **more: Any) -> Tensor:
        with no_waits(device):
            latent = sample_latent(*given, **more)
        shapes.append(tuple(latent.shape))
        return latent

    monkeypatch.setattr(drawing, "sample_latent", sampled)
    return shapes


def small_inpainter(device: str, compiled: bool) -> Inpainter:
    """Few layers and random weights, the same ones each time: compiled in seconds."""
    config = configured(*Small.sizes, f"sampling.compile={str(compiled).lower()}")
    torch.manual_seed(0)
    net = MedSoftModel(config.architecture)
    wake(net)
    return Inpainter(net, open_encoder(config.biomedclip), config.sampling, device)


def in_batches(made: Inpainter, spines: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """Three pictures in a batch and one in the next, which is begun before anything of the first is read."""
    samples = whole_samples(*spines)
    begun: list[Callable] = made.begin(samples, JOBS)
    begun += made.begin(samples[:1], [Job(seed, "again", 0, PROMPTS[2])])
    return stacked([finish() for finish in begun])


def test_compiled_pictures_are_the_eager_ones(
    device: str, spines: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a short batch is filled up, and, on a GPU, when CUDA graphs are recorded and when they run again."""
    if device == "cpu":
        monkeypatch.setattr(drawing, "BACKEND", "eager")  # traced only: a C++ compiler would take minutes
    plain, compiled = small_inpainter(device, False), small_inpainter(device, True)
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):  # what hinders graphs is said
        for made in (plain, compiled):
            in_batches(made, spines, 5)
        runs = watched(monkeypatch, device)
        for seed in (6, 7):
            difference = apart(in_batches(compiled, spines, seed), in_batches(plain, spines, seed))
            assert difference.max() <= 2
    assert [shape[0] for shape in runs] == [3, 3, 3, 1] * 2
    assert "cannot be compiled" not in caplog.text
