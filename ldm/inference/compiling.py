"""Networks compiled for sampling; what cannot be compiled is named and runs as it is."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.core.devices import out_of_memory
from ldm.core.errors import first_line
from ldm.networks.model import MedSoftModel

log = logging.getLogger(__name__)

BACKEND = "inductor"


class CompiledForward:
    """The forward of a network, compiled at the first call with inputs of a shape; it returns one tensor.

    On a GPU its kernels are recorded as a CUDA graph too (torch's ``reduce-overhead``), so that a call costs the host
    next to nothing; what is returned is a copy, since the next call writes over the graph's own output.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        device = next(network.parameters()).device
        self.name, self.plain, self.on_gpu = name, network.forward, device.type == "cuda"
        mode = "reduce-overhead" if self.on_gpu and BACKEND == "inductor" else None
        compiled = torch.compile(network.forward, dynamic=False, fullgraph=True, backend=BACKEND, mode=mode)
        self.compiled: Callable[..., Tensor] | None = compiled

    def __call__(self, *inputs: Any) -> Tensor:
        if self.compiled is None:
            return self.plain(*inputs)
        try:
            if not self.on_gpu:
                return self.compiled(*inputs)
            torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(*inputs).clone()
        except Exception as error:  # compilers fail in many ways, and each may be overcome by doing without
            if out_of_memory(error):
                raise
            self.compiled = None
            error = getattr(error, "inner_exception", error)  # torch's own says only that a backend failed
            message = "warning: %s cannot be compiled (%s: %s); the run goes on with it uncompiled"
            log.warning(message, self.name, type(error).__name__, first_line(error))
            return self.plain(*inputs)


def compile_networks(net: MedSoftModel) -> None:
    """Let U-Net and autoencoder compile themselves at their first calls; names and weights stay as they are.

    The whole U-Net is one graph: compiling its blocks one by one is done sooner, but leaves the host some sixty calls
    to make in each step, and batches of one image are bound by that.
    """
    coder = net.first_stage_model
    for name, network in (("the U-Net", net.unet), ("the encoder", coder.encoder), ("the decoder", coder.decoder)):
        network.forward = CompiledForward(name, network)  # type: ignore[method-assign]
