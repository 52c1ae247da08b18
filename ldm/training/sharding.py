"""Trained weights shared out among processes, ``training.strategy=fsdp`` (ZeRO stage 3: Rajbhandari et al. 2020).

Every process holds a part of each trained tensor, of its gradient, its moments and its moving average. A block's
tensors are gathered while the block is computed, and its gradients are averaged and shared out again. What is frozen
has neither gradients nor moments and stays whole in every process. The parts are PyTorch's DTensors, made by its
``fully_shard``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.networks.model import MedSoftModel
from ldm.training.alignment import NAME as ALIGNMENT


def shard(net: MedSoftModel) -> None:
    """Leave each process its part of what is trained in ``net``, whose parameters are replaced.

    U-Net and controller are separate roots, so that the U-Net can also be called alone, for previews.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.contiguous()  # the only layout in which parts can be cut off
    device = next(net.parameters()).device
    given: dict[str, Any] = {
        "reshard_after_forward": True,  # of a root too: else its gathered weights would outlive a validation
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "ignored_params": {parameter for parameter in net.parameters() if not parameter.requires_grad},
    }
    for root, blocks in roots(net):
        for module in (*blocks, root):
            fully_shard(module, **given)


@contextmanager
def all_gathered(net: MedSoftModel) -> Iterator[None]:
    """In the block, until they are run, networks that are shared out hold their whole weights: every process calls it.

    For what uses a block's weights before the block itself is run, as sampling does.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def roots(net: MedSoftModel) -> list[tuple[torch.nn.Module, list[torch.nn.Module]]]:
    """The networks that a step runs, each with the blocks that are gathered one at a time."""
    found: list[tuple[torch.nn.Module, list[torch.nn.Module]]] = []
    if "unet" in net.parts:
        found.append((net.unet, [*net.unet.input_blocks, net.unet.middle_block, *net.unet.output_blocks]))
    if "msc" in net.parts:
        found.append((net.msc, [*net.msc.blocks]))
    if hasattr(net, ALIGNMENT):
        found.append((getattr(net, ALIGNMENT), []))
    return found


def own_part(value: Tensor) -> Tensor:
    """What of ``value`` lies in this process, without a copy; all of it unless it is shared out."""
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """``values``, those that are shared out whole and on the CPU: then every process must call this. Empty without
    ``keep``."""
    found = {}
    for name, value in values.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.cpu() if isinstance(value, DTensor) else value
    return found
