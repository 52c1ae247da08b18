"""One training stage: its networks, what of them is trained, and its weights under the checkpoint's names."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ldm.checkpoints.checkpoint import NEW_IN_UNET, THUMBNAIL
from ldm.config import TrainingConfig
from ldm.core.devices import kernel_layout
from ldm.core.errors import UsageError
from ldm.networks.model import MedSoftModel
from ldm.networks.weight_average import WeightAverage
from ldm.training.alignment import NAME as ALIGNMENT
from ldm.training.alignment import projection_for
from ldm.training.dataset import Batch
from ldm.training.objectives import OBJECTIVES, Losses
from ldm.training.sharding import gathered, own_part, roots, shard

STEP_PARTS = ("unet", "msc")  # what a training step runs; the other parts only make features


def group_of(key: str, training: TrainingConfig) -> str | None:
    """The group of a parameter: ``msc``, ``attn3`` (third attention, norm and table), ``unet`` (the rest of the U-Net).
    The projection of ``training.alignment_weight`` learns with the third attention, or else with the rest.

    The MSC's global head has no part in the diffusion loss: it belongs to no group where that is all.
    """
    if key.startswith("msc.global_head.") and training.objective == "diffusion" and not training.msc_weight:
        return None
    if key.startswith("msc."):
        return "msc"
    if key.startswith(f"{ALIGNMENT}."):
        return "attn3" if "attn3" in training.rates else "unet"
    if key.startswith("model.diffusion_model."):
        return "attn3" if NEW_IN_UNET.match(key) and not key.startswith(THUMBNAIL) else "unet"
    return None


def training_groups(net: nn.Module, training: TrainingConfig) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each group in ``training.rates``, by checkpoint key; UsageError for one that has none."""
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in training.rates}
    for key, parameter in net.named_parameters():
        group = group_of(key, training)
        if group in groups:
            groups[group][key] = parameter
    for name, members in groups.items():
        if not members:
            parts = ", ".join(getattr(net, "parts", ()))
            raise UsageError(f"training.rates.{name}: no parameter of the parts {parts} is in it")
    if not groups:
        raise UsageError("training.rates: names no group, so nothing would be trained; give at least one of msc, attn3")
    return groups


class Stage(nn.Module):
    """Trains the groups named in ``training.rates`` of a MedSoftModel on cached features.

    ``net`` holds the parts that a step runs (and an autoencoder, if previews are made). What is trained comes from
    ``net``, what is frozen from ``frozen``, the tensors of the first checkpoint, as they were. So frozen weights may
    lie in memory in half precision (``half_frozen``) or not at all. What is not trained has no gradients.
    """

    def __init__(
        self,
        training: TrainingConfig,
        net: MedSoftModel,
        frozen: dict[str, Tensor],
        empty_text: Tensor | None,
        half_frozen: bool = False,
    ) -> None:
        """``empty_text``: text states (1, 77, D) of the empty prompt; None for a stage without a U-Net."""
        super().__init__()
        self.training_config, self.net, self.frozen = training, net, frozen
        if empty_text is None:
            self.empty_text = torch.empty(0)  # Without a U-Net nothing reads it.
        else:
            self.register_buffer("empty_text", empty_text, persistent=False)
        if training.alignment_weight and "unet" in net.parts:
            device = next(net.unet.parameters()).device
            net.add_module(ALIGNMENT, projection_for(net.architecture, training.seed, device))
        net.requires_grad_(False).eval()
        for members in training_groups(net, training).values():
            for parameter in members.values():
                parameter.requires_grad_(True)
        for_steps(net, half_frozen)
        if "unet" in net.parts:
            net.unet.activation_checkpointing = training.activation_checkpointing
        self.compiled = training.compile
        if training.compile:
            from torch._dynamo import config as compiler

            # With activation checkpointing each block is a graph of its own, and has a shape of its own.
            compiler.recompile_limit = 64
            for network, _ in roots(net):
                network.compile(dynamic=False)
        self.sharded = False
        self.groups, self.trained = self._find_trained()
        if training.strategy != "fsdp":
            self.average = WeightAverage(self.trained, training.ema_decay)

    def _find_trained(self) -> tuple[dict[str, dict[str, nn.Parameter]], dict[str, nn.Parameter]]:
        groups = training_groups(self.net, self.training_config)
        return groups, {key: value for members in groups.values() for key, value in members.items()}

    def share_out(self, processes: int) -> None:
        """With fsdp, leave this one of so many processes its part of what is trained; the optimizer comes later."""
        if self.training_config.strategy != "fsdp":
            return
        if processes > 1:
            shard(self.net)
            self.sharded = True
            self.groups, self.trained = self._find_trained()
        # Not before: a copy of whole weights might not fit.
        self.average = WeightAverage(self.trained, self.training_config.ema_decay)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(iter(self.trained.values())).device

    def train(self, mode: bool = True) -> "Stage":
        """The networks stay in evaluation mode: nothing here behaves differently in training."""
        super().train(mode)
        self.net.eval()
        return self

    @property
    def projection(self) -> dict[str, Tensor]:
        """What is trained and is no part of the model: the projection of ``training.alignment_weight``, if any."""
        return {key: value.detach() for key, value in self.trained.items() if key.startswith(f"{ALIGNMENT}.")}

    def weights(self, keep: bool = True) -> dict[str, Tensor]:
        """Every tensor of the model in float32 on the CPU, trained or not, whatever its type and layout in memory.

        Where weights are shared out, every process must call this; without ``keep`` nothing is returned.
        """
        ours = {key: value for key, value in self.trained.items() if not key.startswith(f"{ALIGNMENT}.")}
        found = gathered({**self.frozen, **ours}, keep)
        return {key: value.detach().float().cpu().contiguous() for key, value in found.items()}

    def forward(self, batch: Batch, dropout: float) -> Losses:
        """What the stage's objective says of each sample; the first entry is the loss that is minimised."""
        training = self.training_config
        return OBJECTIVES[training.objective](self.net, batch, training, dropout, self.empty_text)

    def uncompiled(self) -> AbstractContextManager:
        """The block runs the networks as they are. Compiling takes minutes: once is enough, for full batches."""
        return torch.compiler.set_stance("force_eager") if self.training_config.compile else nullcontext()

    def adamw(self, fused: bool = True) -> torch.optim.AdamW:
        """AdamW with a learning rate for each group. A ``fused`` step makes no temporary copies."""
        rates = self.training_config.rates
        groups = [{"params": [*self.groups[name].values()], "lr": rates[name], "name": name} for name in rates]
        return torch.optim.AdamW(groups, weight_decay=self.training_config.weight_decay, fused=fused)

    def gradient_norms(self) -> tuple[dict[str, Tensor], Tensor]:
        """The norm of each group's gradients, and of all."""
        norms = {}
        for name, members in self.groups.items():
            found = [own_part(parameter.grad) for parameter in members.values() if parameter.grad is not None]
            norms[name] = get_total_norm(found) if found else torch.zeros((), device=self.device)
        if self.sharded:
            squares = torch.stack([*norms.values()]).square()
            torch.distributed.all_reduce(squares)
            norms = dict(zip(norms, squares.sqrt().unbind(), strict=True))
        return norms, get_total_norm(list(norms.values()))

    def clip(self, total: Tensor) -> None:
        """Scale gradients whose norm is ``total`` down to ``training.clip_norm``, if it is larger (0: never)."""
        most = self.training_config.clip_norm
        # A GPU would wait for a look at the norm. On a CPU gradients that need no clipping are left alone.
        if most and (total.is_cuda or total > most):
            clip_grads_with_norm_(self.trained.values(), most, total)


def for_steps(net: nn.Module, half: bool) -> None:
    """Bring the weights into the type and the memory layout in which training steps are fastest on their device.

    ``half``: frozen matrices and kernels in bfloat16, as autocast would cast them at every use; norms and biases stay.
    """
    for parameter in net.parameters():
        if parameter.ndim > 1:
            dtype = torch.bfloat16 if half and not parameter.requires_grad else parameter.dtype
            layout = kernel_layout(parameter.device, dtype) if parameter.ndim == 4 else torch.contiguous_format
            parameter.data = parameter.data.to(dtype, memory_format=layout)
