"""What a training run will need, before it needs it: memory by kind, and disk."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.config import Architecture, TrainingConfig
from ldm.networks.model import MedSoftModel, skeleton
from ldm.networks.msc import input_shapes
from ldm.training.dataset import Batch
from ldm.training.groups import group_of
from ldm.training.stage import STEP_PARTS, Stage

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a stage trains. ``activations``: what is kept for the backward pass, for one batch."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """The sum; the allocator, temporary results and the libraries come on top."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations


def stage_memory(
    architecture: Architecture, training: TrainingConfig, batch: int, half: bool, device: str = "cpu"
) -> Memory:
    """Memory of a stage for ``batch`` items per device, with ``half`` in bf16-mixed. Nothing is allocated.

    ``device`` is cpu or cuda, whose autocast runs the norms in float32 and so keeps a third more of the U-Net's.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stage = fake_stage(architecture, replace(training, compile=False), half)
        trained = sum(value.numel() for value in stage.trained.values())
        parameters = sum(value.numel() * value.element_size() for value in stage.net.parameters())
        with NormsInFloat32() if half and device == "cuda" else nullcontext():
            activations = saved_bytes(stage, fake_batch(architecture, batch), half)
    average = 4 * trained if training.ema_decay else 0
    return Memory(parameters, 4 * trained, 8 * trained, average, activations)


class NormsInFloat32(TorchFunctionMode):
    """What a GPU's autocast does and a CPU's does not, for shapes that are computed without a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes at most: checkpoints in the run's folder (one more is there while it is replaced)."""

    last: int
    best: int
    features: int

    @property
    def total(self) -> int:
        """The most that lies there at once."""
        return 2 * self.last + self.best + self.features


def stage_disk(architecture: Architecture, training: TrainingConfig, features: int) -> Disk:
    """Disk of a stage's run; ``features`` are the bytes of its cached features."""
    tensors = skeleton(architecture, training.builds)
    weights = 4 * sum(value.numel() for value in tensors.values())
    trained = [value for key, value in tensors.items() if group_of(key, training.objective) in training.rates]
    state = (12 if training.ema_decay else 8) * sum(value.numel() for value in trained)
    best = (training.keep_best + 1) * weights if training.keep_best else 0
    return Disk(weights + state, best, features)


def step_operations(architecture: Architecture, training: TrainingConfig, batch: int) -> int:
    """Floating-point operations of the forward and the backward pass of a step, two for each multiplication that is
    added. What activation checkpointing or fused attention compute once more is not counted."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    training = replace(training, activation_checkpointing=False, compile=False)
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), counter:
        fake_stage(architecture, training, False)(fake_batch(architecture, batch), 0.0)[0].mean().backward()
    return counter.get_total_flops()


def fake_stage(architecture: Architecture, training: TrainingConfig, half: bool) -> Stage:
    """The stage with the networks that a step runs; under FakeTensorMode it weighs nothing."""
    net = MedSoftModel(architecture, [part for part in training.builds if part in STEP_PARTS])
    empty = torch.zeros(1, architecture.text_encoder.max_length, architecture.text_encoder.width)
    return Stage(training, net, {}, empty, half)


def fake_batch(sizes: Architecture, batch: int) -> Batch:
    """Features of ``batch`` items, of the right shapes; random."""
    latent = (batch, sizes.autoencoder.latent_channels, sizes.latent_size, sizes.latent_size)
    inputs = input_shapes(sizes.biomedclip, batch, sizes.image_size)
    shapes = {
        **inputs,
        "target_tokens": inputs["context_tokens"],
        "target_global": inputs["context_global"],
        "text": (batch, sizes.text_encoder.max_length, sizes.text_encoder.width),
        **dict.fromkeys(("latent_mean", "latent_logvar", "masked_latent", "posterior_noise", "noise"), latent),
        **dict.fromkeys(("t", "coin"), (batch,)),
    }
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def saved_bytes(stage: Stage, batch: Batch, half: bool) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters not counted.

    With activation checkpointing the share of the block that is just computed again comes on top.
    """
    kept: dict[int, Tensor] = {}
    own = {value.untyped_storage()._cdata for value in stage.net.parameters()}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage()._cdata not in own:
            kept[value.untyped_storage()._cdata] = value
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = stage(batch, 0.0)[0].mean()  # noqa: F841 (what it keeps is counted while it is there)
    return sum(value.untyped_storage().nbytes() for value in kept.values())
