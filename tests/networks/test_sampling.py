"""The sampling loop as a GPU sees it: the host hands over one step after another and never waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_networks import AUTOENCODER, TEXT, UNET
from test_train_without_waiting import Waits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.config import Config, SamplingConfig
from ldm.diffusion.noise import step_noise
from ldm.networks.model import MedSoftModel
from ldm.networks.sampling import guidance_conditions, sample_latent

GUIDED = SamplingConfig(steps=4, guidance_interval=[0.0, 0.8], guidance_rescale=0.7)


class Traffic(TorchDispatchMode):
    """Collects the operators that move tensors between the host and the device, which stands for a GPU.

    The device is meta: there whatever needs a value on the host (item, bool, nonzero, tolist) raises an error.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {value.device.type for value in args if isinstance(value, Tensor) and value.ndim}
        made = {result.device.type} if isinstance(result, Tensor) else set()
        if len(given | made) > 1 and self.device in given | made:
            self.found.append(str(func))
        return result


class Made(TorchFunctionMode):
    """Collects the tensors that are made of the host's numbers on the device: a copy, although no operator shows it."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and result.device.type != "cpu":
            self.found.append(func.__name__)
        return result


@contextmanager
def no_traffic() -> Iterator[None]:
    with Traffic("meta") as traffic, Made(traffic.found):
        yield
    assert not traffic.found


def sample(sampling: SamplingConfig) -> None:
    """A whole run on a device without values."""
    config = replace(Config(), unet=UNET, autoencoder=AUTOENCODER, text_encoder=TEXT)
    with torch.device("meta"):
        net = MedSoftModel(config.architecture, ["unet"]).eval()
        latent, mask = torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
        text, tokens = torch.zeros(2, 77, 24), torch.zeros(2, 9, 16)
        broken = torch.zeros(2, dtype=torch.bool)

    def watch(index: int, x: Tensor) -> None:
        broken.logical_or_(~torch.isfinite(x).flatten(1).all(dim=1))

    with torch.inference_mode(), no_traffic():
        conditions = guidance_conditions(net, mask, text, text[:1], tokens)
        found = sample_latent(net, sampling, latent, mask, latent, latent, conditions, on_step=watch)
    assert found.shape == latent.shape


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_the_host_never_waits_for_the_device_while_sampling(sampler: Any) -> None:
    sample(replace(GUIDED, sampler=sampler))


def test_the_noise_of_a_step_is_handed_over_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a GPU that is not there, on tensors without content."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda values: values)  # needs the driver
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        noise = step_noise(0, [(1, "a", 0), (1, "b", 0)], torch.empty(2, 4, 8, 8, device="cuda"))
    assert (noise.device.type, tuple(noise.shape)) == ("cuda", (2, 4, 8, 8))
    assert not waits.found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: bool(x.sum() > 0), "meta"),
        (lambda x: x.sum().item(), "meta"),
        (lambda x: x.nonzero(), "meta"),
        (lambda x: x.cpu(), None),
        (lambda x: torch.tensor([3], device="meta"), None),
        (lambda x: x * torch.arange(2.0).to("meta"), None),
    ],
)
def test_what_would_wait_is_noticed(what: Any, message: str | None) -> None:
    x = torch.zeros(2, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=message), no_traffic():
        what(x)
