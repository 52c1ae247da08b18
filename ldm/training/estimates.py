"""What a training run will need, before it needs it: memory by kind, and disk."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config import Architecture, TrainingConfig
from ldm.core.devices import all_memory, free_memory
from ldm.core.errors import MedSoftError
from ldm.core.files import free_bytes
from ldm.features.names import Item
from ldm.features.sizes import cache_size, encoder_memory, image_memory
from ldm.networks.model import MedSoftModel, skeleton
from ldm.networks.msc import input_shapes
from ldm.training.alignment import projection_values
from ldm.training.dataset import Batch
from ldm.training.saving import LAST
from ldm.training.sharding import roots
from ldm.training.stage import STEP_PARTS, Stage, group_of

log = logging.getLogger("ver_train")

GIB = 2**30
ERROR = 0.1  # of the estimate of a step's memory on a GPU, as a share


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a stage trains. ``activations``: what is kept for the backward pass, for one batch."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    gathered: int = 0  # fsdp: whole blocks, the one that is computed and the next, and the first one's gradients

    @property
    def total(self) -> int:
        """The sum; the allocator, temporary results and the libraries come on top."""
        return sum(vars(self).values())


def stage_memory(
    architecture: Architecture,
    training: TrainingConfig,
    batch: int,
    half: bool,
    device: str = "cpu",
    devices: int = 1,
) -> Memory:
    """Memory of a stage for ``batch`` items on each of ``devices``, with ``half`` in bf16-mixed. Nothing is allocated.

    ``device`` is cpu or cuda, whose autocast runs the norms in float32 and so keeps a third more of the U-Net's.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stage = fake_stage(architecture, replace(training, compile=False), half)
        trained = sum(value.numel() for value in stage.trained.values())
        parameters = sum(value.numel() * value.element_size() for value in stage.net.parameters())
        with NormsInFloat32() if half and device == "cuda" else nullcontext():
            activations = saved_bytes(stage, fake_batch(architecture, batch), half)
        blocks = [largest_block(network, members) for network, members in roots(stage.net)]
    average = 4 if training.ema_decay else 0
    if training.strategy == "fsdp" and devices > 1:
        parameters -= 4 * (trained - trained // devices)
        gradients, optimizer, averaged = (each * trained // devices for each in (4, 8, average))
        return Memory(parameters, gradients, optimizer, averaged, activations, 12 * max(blocks))
    return Memory(parameters, 4 * trained, 8 * trained, average * trained, activations)


def largest_block(root: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """Trained values of the largest of the blocks that are gathered one at a time, and of what ``root`` has besides."""
    counts = [sum(each.numel() for each in block.parameters() if each.requires_grad) for block in (root, *blocks)]
    return max([counts[0] - sum(counts[1:]), *counts[1:]])


class NormsInFloat32(TorchFunctionMode):
    """What a GPU's autocast does and a CPU's does not, for shapes that are computed without a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def stage_disk(architecture: Architecture, training: TrainingConfig) -> tuple[int, int]:
    """Bytes of ``last.ckpt`` while a stage trains, and of the weights of its best epochs together, at most."""
    tensors = skeleton(architecture, training.builds)
    weights = 4 * sum(value.numel() for value in tensors.values())
    trained = [value for key, value in tensors.items() if group_of(key, training) in training.rates]
    beside = projection_values(architecture) if training.alignment_weight else 0
    state = (12 if training.ema_decay else 8) * (sum(value.numel() for value in trained) + beside) + 4 * beside
    return weights + state, (training.keep_best + 1) * weights if training.keep_best else 0


def check_disk(folder: Path, architecture: Architecture, training: TrainingConfig, items: Sequence[Item]) -> str:
    """Log what a run will write into ``folder``; what to warn of, or "". MedSoftError if two checkpoints do not fit."""
    last, best = stage_disk(architecture, training)
    features = cache_size(architecture, training.builds, items)
    free, old, most = free_bytes(folder), folder / LAST, 2 * last + best + features
    log.info(
        "disk: at most %s (last.ckpt %s, twice while it is replaced; best epochs %s; features %s); %s free",
        *map(size, (most, last, best, features, free)),
    )
    there = old.stat().st_size if old.exists() else 0
    if free < 2 * last - there:
        raise MedSoftError(
            f"{folder}: {size(free)} are free, but saving takes {size(2 * last - there)} (the new checkpoint "
            "beside the old one); make room, or give a --save_path on another disk"
        )
    lacks = free < most - there
    return f"{size(free)} are free, the run and its features take up to {size(most)}" if lacks else ""


def check_memory(
    architecture: Architecture,
    training: TrainingConfig,
    devices: int,
    device: torch.device,
    half: bool,
    begun: bool = False,
) -> str:
    """Log what a step needs on each of ``devices`` like ``device``; what to warn of where it will not fit, else "".

    Raises MedSoftError for a GPU that would be too small if nothing else were on it.
    """
    batch = max(1, training.batch_size // devices)
    memory, free = stage_memory(architecture, training, batch, half, device.type, devices), free_memory(device)
    parts = ", ".join(f"{name} {size(count)}" for name, count in vars(memory).items() if count)
    log.info("memory on %s: about %s (%s); %s free", device.type, size(memory.total), parts, size(free))
    encoders, images = feature_memory(architecture, training)
    shown = size(encoders + images), size(encoders), training.feature_batch, size(images)
    log.info("memory for features, before: about %s (encoders %s, %d items at a time %s)", *shown)
    cures, there = memory_cures(training, half, begun), all_memory(device)
    if memory.total * (1 - ERROR) > there:
        raise MedSoftError(f"a step needs about {size(memory.total)}, the whole device has {size(there)}: {cures}")
    lacks = []
    if memory.total > free:
        lacks.append(f"a step needs about {size(memory.total)}, {size(free)} are free: {cures}")
    if encoders + images > free:
        cure = "training.feature_batch=1" if training.feature_batch > 1 else "a device with more memory"
        lacks.append(f"computing features needs about {shown[0]}, {size(free)} are free: {cure} helps")
    return "; ".join(lacks)


def feature_memory(architecture: Architecture, training: TrainingConfig) -> tuple[int, int]:
    """Bytes that features take on a device while they are computed: networks, and what the items hold at once."""
    images = training.feature_batch * image_memory(architecture, training.builds)
    return encoder_memory(architecture, training.builds), images


def memory_cures(training: TrainingConfig, half: bool, begun: bool) -> str:
    """What makes a training step smaller. A run that has ``begun`` keeps its batches: other ones are another run."""
    cures = {
        "a smaller --batch_size with training.accumulate": training.batch_size > 1 and not begun,
        "training.activation_checkpointing=true": not training.activation_checkpointing,
        "--precision bf16-mixed": not half,
    }
    last = "a device with more memory" + " or more --devices with training.strategy=fsdp" * (not training.compile)
    return f"{' or '.join(cure for cure, helps in cures.items() if helps) or last} helps"


def size(count: int) -> str:
    """Bytes for reading: 1.5 GiB, 12.3 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


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
    channels, side = sizes.autoencoder.latent_channels, sizes.latent_size
    latent = batch, channels, side, side
    inputs = input_shapes(sizes.biomedclip, batch, sizes.image_size)
    shapes = {
        **inputs,
        "target_tokens": inputs["context_tokens"],
        "target_global": inputs["context_global"],
        "text": (batch, sizes.text_encoder.max_length, sizes.text_encoder.width),
        **dict.fromkeys(("latent_mean", "latent_logvar", "posterior_noise", "noise"), latent),
        "masked_latent": (batch, channels * (2 if sizes.unet.thumbnail else 1), side, side),
        **dict.fromkeys(("t", "coin"), (batch,)),
    }
    # A cast, since whatever else the controller reads is one more entry.
    return cast(Batch, {name: torch.rand(shape) for name, shape in shapes.items()})


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
