"""One training stage: the LightningModule with its parameter groups, losses and optimizer."""

import logging
import math
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from ldm.checkpoints.checkpoint import PREFIXES, Checkpoint
from ldm.config import Config
from ldm.core.devices import kernel_layout, on_host, steps_behind
from ldm.core.errors import MedSoftError, UsageError
from ldm.diffusion.schedule import diffusion_loss
from ldm.networks.model import MedSoftModel
from ldm.networks.msc import ControllerInputs, masked_cosine, msc_loss
from ldm.training.dataset import EpochOrder, StageData

log = logging.getLogger(__name__)

STEP_PARTS = ("unet", "msc")  # what a training step runs; the other parts only make features
EMA_WARM_UP = 10  # steps: the average follows closely at first, when it holds the starting weights


class PendingStep(NamedTuple):
    """An optimizer step whose numbers may still be on their way from the device."""

    step: int  # counted from 1
    epoch: int
    learning_rates: dict[str, float]
    batches: list[tuple[list[str], Tensor]]  # this process's (sample ids, losses), for each batch of the step
    numbers: Callable[[], Tensor]  # of each batch (loss, items, stop, save), then the norm of each group, then of all


class TrainingStep(NamedTuple):
    """What is known of an optimizer step. Loss and items are those of the global batches."""

    step: int  # counted from 1
    epoch: int
    learning_rates: dict[str, float]
    grad_norms: dict[str, float]
    batches: list[tuple[float, int]]  # (mean loss, items)


class Stage(pl.LightningModule):
    """Trains the groups named in ``config.training.rates`` of a MedSoftModel on cached features.

    ``net`` holds the parts that a step runs (and an autoencoder, if pictures are drawn). Its state is that of the
    whole stage, under the checkpoint's names: what is trained comes from ``net``, what is frozen from ``frozen``, the
    tensors of the first checkpoint, as they were. So frozen weights may lie in memory in half precision
    (``half_frozen``) or not at all. What is not trained has no gradients.

    A step does not wait for a GPU: its numbers (loss, norms, what other processes want) are read while the next one is
    computed, and ``read(0)`` waits for all of them. On a CPU they are read before the weights change.
    """

    def __init__(
        self,
        config: Config,
        net: MedSoftModel,
        frozen: dict[str, Tensor],
        about: dict[str, Any],
        empty_text: Tensor | None,
        half_frozen: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.net, self.about, self.frozen = config, net, about, frozen
        self.register_buffer("empty_text", empty_text, persistent=False)
        self.groups = training_groups(net, config)
        net.requires_grad_(False).eval()
        for members in self.groups.values():
            for parameter in members.values():
                parameter.requires_grad_(True)
        for_steps(net, half_frozen)
        if "unet" in net.parts:
            net.unet.activation_checkpointing = config.training.activation_checkpointing
            if config.training.compile:
                net.unet.compile(dynamic=False)
        self.trained = {key: value for members in self.groups.values() for key, value in members.items()}
        decay = config.training.ema_decay
        self.average = {key: value.detach().clone() for key, value in self.trained.items()} if decay else None
        self.batches: list[tuple[list[str], Tensor, Tensor]] = []  # since the last step: (ids, losses, numbers)
        self.taken: deque[PendingStep] = deque()
        self.steps: list[TrainingStep] = []  # read, and not yet recorded
        self.stop_asked = self.save_asked = False  # what this process wants
        self.stop_agreed = self.save_agreed = False  # what one of the processes wants

    def train(self, mode: bool = True) -> "Stage":
        """The networks stay in evaluation mode: nothing here behaves differently in training."""
        super().train(mode)
        self.net.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Every tensor of the stage in float32, trained or not, whatever its type and layout in memory."""
        return {key: value.detach().float() for key, value in {**self.frozen, **self.trained}.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Called when a run is resumed; the frozen tensors are those of the first checkpoint already."""
        for key, parameter in self.trained.items():
            parameter.copy_(state[key])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The block sees the moving average of the trained weights, if there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for key, value in (self.average or {}).items():
            parameter = self.trained[key]
            parameter.data, self.average[key] = value, parameter.data

    # ------------------------------------------------------------------------------------------------ losses

    def losses(self, batch: dict[str, Any], dropout: float) -> tuple[Tensor, Tensor | None]:
        """(loss of each sample (B,), cosine on masked patches (B,) or None) for a batch of StageData."""
        if self.config.training.objective == "msc":
            tokens, global_token = self.net.msc(controller_inputs(batch))
            soft = self.net.patch_mask(batch["mask"])
            loss = msc_loss(tokens, batch["true"], global_token, batch["true_global"], soft)
            return loss, masked_cosine(tokens.detach(), batch["true"], soft)
        deviation = torch.exp(0.5 * batch["latent_logvar"])
        latent = self.net.scaled(batch["latent_mean"] + deviation * batch["posterior_noise"])
        steps = self.net.schedule.timesteps
        t = (batch["t"] * steps).long().clamp(max=steps - 1)  # a share just below 1 may be rounded up
        noisy = self.net.schedule.add_noise(latent, batch["noise"], t)
        semantic = self.semantic(batch)
        kept = (batch["coin"] >= dropout).float()[:, None, None]  # one coin drops text and MSC tokens together
        text = torch.where(kept > 0, batch["text"], self.empty_text)
        mask = self.net.latent_mask(batch["mask"])
        predicted = self.net.predict_noise(noisy, t, mask, batch["masked_latent"], text, semantic * kept)
        return diffusion_loss(predicted, batch["noise"], mask, self.config.training.mask_weight), None

    def uncompiled(self) -> AbstractContextManager:
        """The block runs the U-Net as it is. Compiling takes minutes: once is enough, for full training batches."""
        return torch.compiler.set_stance("force_eager") if self.config.training.compile else nullcontext()

    def semantic(self, batch: dict[str, Any]) -> Tensor:
        """The tokens of the third attention (B, N / 4, D), as this stage makes them."""
        inside = batch["true"]
        if self.config.training.inside != "true":
            inside, _ = self.net.msc(controller_inputs(batch))
        return self.net.semantic(batch["seen"], inside, batch["mask"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The mean loss of this process's share."""
        training = self.config.training
        whole = len(batch["mask"]) == training.batch_size // self.trainer.world_size
        with nullcontext() if whole else self.uncompiled():
            losses, _ = self.losses(batch, training.condition_dropout)
        weight = batch["weight"].to(losses)
        loss = (weight * losses).mean()
        # One exchange tells all processes the loss of the global batch, its size, and what one of them wants.
        mean = loss.detach().double()
        wants = [mean.new_full((), asked) for asked in (self.stop_asked, self.save_asked)]  # no copy from the host
        told = self.summed(torch.stack([mean, (weight > 0).double().sum(), *wants]))
        self.batches.append((batch["sample_id"], losses.detach(), told))
        return loss

    def summed(self, values: Tensor) -> Tensor:
        """The sum of every process's ``values``. Lightning's own would wait for the device."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._swap()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with self.uncompiled():
            losses, cosine = self.losses(batch, dropout=0.0)
        real = (batch["weight"] > 0).to(losses)
        sums = [
            (losses * real).sum(),
            (torch.zeros_like(losses) if cosine is None else cosine * real).sum(),
            real.sum(),
        ]
        self._sums += torch.stack(sums)

    def on_validation_epoch_end(self) -> None:
        self._swap()
        loss, cosine, count = self.summed(self._sums).tolist()
        self.log("val_loss", loss / count)
        if self.config.training.objective == "msc":
            self.log("val_cosine", cosine / count)

    # ------------------------------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        """Fused AdamW with a learning rate per group, and its schedule by steps."""
        training = self.config.training
        # With a gradient scaler a fused step would hide the unscaled gradients.
        optimizer = self.adamw(fused=self.trainer.precision != "16-mixed")
        total = max(1, self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
            if training.schedule == "cosine":
                return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            return warm

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def adamw(self, fused: bool = True) -> torch.optim.AdamW:
        """AdamW with a learning rate per group; a fused step makes no temporary copies."""
        training = self.config.training
        groups = [
            {"params": list(members.values()), "lr": training.rates[name], "name": name}
            for name, members in self.groups.items()
        ]
        return torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=fused)

    def on_train_start(self) -> None:
        """Moments from a checkpoint lie as the device that saved them laid its kernels: bring them to this one's."""
        for parameter, kept in self.trainer.optimizers[0].state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in kept and kept[name].stride() != parameter.stride():
                    kept[name] = _laid_as(parameter, kept[name])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradient norms of each group, and clipping by the norm of all: Lightning refuses to clip for fused AdamW."""
        norms, total = self.gradient_norms()
        self.clip(total)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        numbers = [told for _, _, told in self.batches] + [torch.stack([*norms.values(), total]).double()]
        shares = [(ids, losses) for ids, losses, _ in self.batches]
        self.taken.append(
            PendingStep(self.global_step + 1, self.current_epoch, rates, shares, on_host(torch.cat(numbers)))
        )
        self.batches = []
        self.read(steps_behind(self.device))

    def read(self, behind: int) -> None:
        """Read the numbers of the steps taken but the last ``behind``; MedSoftError where one is not finite."""
        while len(self.taken) > behind:
            taken = self.taken.popleft()
            found = taken.numbers()
            split = 4 * len(taken.batches)
            batches, (*norms, total) = found[:split].view(-1, 4).tolist(), found[split:].tolist()
            world = self.trainer.world_size
            self._refuse_not_finite(taken, [loss / world for loss, *_ in batches], total)
            self.stop_agreed |= any(stop > 0 for _, _, stop, _ in batches)
            self.save_agreed |= any(save > 0 for *_, save in batches)
            means = [(loss / world, int(items)) for loss, items, *_ in batches]
            named = dict(zip(self.groups, norms, strict=True))
            self.steps.append(TrainingStep(taken.step, taken.epoch, taken.learning_rates, named, means))

    def _refuse_not_finite(self, taken: PendingStep, batch_losses: list[float], norm: float) -> None:
        """MedSoftError if a loss of the global batches or the norm of all gradients is not finite."""
        wrong = next((loss for loss in batch_losses if not math.isfinite(loss)), None)
        if wrong is not None:
            each = [(name, value) for ids, losses in taken.batches for name, value in zip(ids, losses, strict=True)]
            what, ids = f"the loss became {wrong}", [name for name, value in each if not torch.isfinite(value)]
        elif not math.isfinite(norm) and self.trainer.precision != "16-mixed":  # whose scaler leaves such a step out
            what, ids = f"a gradient became {norm}", [name for ids, _ in taken.batches for name in ids]
        else:
            return
        raise MedSoftError(
            f"{what} in step {taken.step} (samples {self._named(ids)}); the last good checkpoint is kept. Lower "
            "training.rates, or look at these samples"
        )

    def _named(self, sample_ids: list[str]) -> str:
        """A few of all processes' ``sample_ids``."""
        if self.trainer.world_size > 1:
            shares: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, sample_ids)
            sample_ids = [name for share in shares for name in share]
        return ", ".join(sample_ids[:4])

    def gradient_norms(self) -> tuple[dict[str, Tensor], Tensor]:
        """The norm of each group's gradients, and of all."""
        norms = {}
        for name, members in self.groups.items():
            found = [parameter.grad for parameter in members.values() if parameter.grad is not None]
            norms[name] = get_total_norm(found) if found else torch.zeros((), device=self.device)
        return norms, get_total_norm(list(norms.values()))

    def clip(self, total: Tensor) -> None:
        """Scale gradients whose norm is ``total`` down to ``training.clip_norm``, if it is larger (0: never)."""
        most = self.config.training.clip_norm
        # A GPU would wait for a look at the norm. On a CPU gradients that need no clipping are left alone.
        if most and (total.is_cuda or total > most):
            clip_grads_with_norm_(self.trained.values(), most, total)

    @torch.no_grad()
    def update_average(self) -> None:
        """After an optimizer step: the moving average follows the weights."""
        if self.average is not None:
            step = self.global_step
            decay = min(self.config.training.ema_decay, step / (EMA_WARM_UP + step))
            torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), 1 - decay)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the file says about itself (configuration, stage, step, origin), and the moving average."""
        checkpoint["medsoft"] = {**self.about, "step": self.global_step, "epoch": self.current_epoch}
        if self.average is not None:
            checkpoint["average"] = self.average

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.average is not None:
            kept = checkpoint["average"]
            self.average = {key: _laid_as(value, kept[key]) for key, value in self.trained.items()}

    def on_fit_start(self) -> None:
        if self.average is not None:
            self.average = {key: value.to(self.device) for key, value in self.average.items()}


def controller_inputs(batch: dict[str, Tensor]) -> ControllerInputs:
    """What the MSC reads of a batch."""
    return ControllerInputs(batch["seen"], batch["seen_global"], batch["clip_text"], batch["mask"])


def training_groups(net: MedSoftModel, config: Config) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each group in ``training.rates``; UsageError for one that has none."""
    groups = net.groups(list(config.training.rates))
    for name, members in groups.items():
        if not members:
            raise UsageError(f"training.rates.{name}: no parameter of the parts {', '.join(net.parts)} is in it")
    if not groups:
        raise UsageError("training.rates: names no group, so nothing would be trained; give at least one of msc, attn3")
    return groups


def _laid_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` on the device and in the memory layout of ``parameter``."""
    return torch.empty_like(parameter).copy_(value)


def for_steps(net: nn.Module, half: bool) -> None:
    """Bring the weights into the type and the memory layout in which training steps are fastest on their device.

    ``half``: frozen matrices and kernels in bfloat16, as autocast would cast them at every use; norms and biases stay.
    """
    for parameter in net.parameters():
        if parameter.ndim > 1:
            dtype = torch.bfloat16 if half and not parameter.requires_grad else parameter.dtype
            layout = kernel_layout(parameter.device, dtype) if parameter.ndim == 4 else torch.contiguous_format
            parameter.data = parameter.data.to(dtype, memory_format=layout)


def frozen_tensors(checkpoint: Checkpoint, config: Config) -> dict[str, Tensor]:
    """The tensors of ``checkpoint`` (memory-mapped) that belong to the parts of the stage."""
    with torch.device("meta"):
        wanted = MedSoftModel(config, config.training.builds).state_dict()
    prefixes = tuple(PREFIXES[part] for part in config.training.builds if part in PREFIXES)
    return {key: value for key, value in checkpoint.state.items() if key in wanted and key.startswith(prefixes)}


def quiet_lightning() -> None:
    """Keep Lightning's advertising and its remarks on our own, deliberate choices off the screen; warnings stay."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
        for child in logging.root.manager.loggerDict:
            if child.startswith(name + "."):
                logging.getLogger(child).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*resuming from a checkpoint that ended before the epoch ended.*")
    warnings.filterwarnings("ignore", message=r".*in eval mode at the start of training.*")


def loader(data: StageData, config: Config, shuffle: bool, rank: int = 0, world: int = 1, start: int = 0) -> DataLoader:
    """Batches of one process; ``start`` samples of the first epoch have been seen already."""
    order = EpochOrder(data, config.training, shuffle, rank, world)
    order.start = start
    workers = config.training.workers
    if workers < 0:  # a GPU would wait while its own process reads
        workers = 2 if torch.cuda.is_available() else 0
    return DataLoader(
        data,
        batch_size=config.training.batch_size // world,
        sampler=order,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        persistent_workers=workers > 0 and shuffle,  # those of validation are gone while training goes on
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    """A cluster signals every process of a job; the one that trains decides what happens, and ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def resume_position(checkpoint_rest: dict[str, Any]) -> tuple[int, int]:
    """(epoch, batches of it already done) at which a Lightning checkpoint goes on."""
    loops = checkpoint_rest["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    if batches["is_last_batch"]:
        return loops["epoch_progress"]["current"]["processed"], 0
    return loops["epoch_progress"]["current"]["processed"], batches["current"]["completed"]
