"""The training loop, from top to bottom: forward, backward, clip, step, average, record, validate, save, stop.

The launch of several processes, the devices and the exchange of gradients are Lightning Fabric's; everything that
decides the weights is on this page.
"""

import logging
import math
import signal
import threading
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.core import cli
from ldm.core.devices import out_of_memory, steps_behind
from ldm.core.errors import MedSoftError
from ldm.core.tables import shortened
from ldm.training.dataset import Batch, Loader
from ldm.training.previews import Previews
from ldm.training.records import Records
from ldm.training.saving import Checkpoints
from ldm.training.stage import Stage
from ldm.training.steps import MovementWatch, StepQueue, of_everyone

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


class Training:
    """One run of a stage, from where ``checkpoints.progress`` says to the last epoch.

    A step does not wait for a GPU: its numbers are read while the next one is computed (see steps.py).
    """

    def __init__(
        self,
        stage: Stage,
        fabric: "Fabric",
        precision: str,
        loaders: tuple[Loader, Loader],
        checkpoints: Checkpoints,
        records: Records,
        previews: Previews | None,
    ) -> None:
        """``precision``: 32-true, bf16-mixed or 16-mixed. ``loaders``: training and validation."""
        self.stage, self.fabric, self.precision, self.config = stage, fabric, precision, stage.training_config
        self.train_loader, self.val_loader = loaders
        self.checkpoints, self.records, self.previews = checkpoints, records, previews
        self.progress = checkpoints.progress
        # What is shared out exchanges gradients by itself.
        self.model = stage if stage.sharded else fabric.setup_module(stage, _reapply_compile=False)
        self.optimizer, self.scaler = checkpoints.optimizer, checkpoints.scaler
        self.queue = StepQueue(stage.groups, fabric.world_size, precision == "16-mixed")
        self.movement = MovementWatch(stage.groups, self.progress.step)
        self.requests = Requests()
        self.tried = False  # to compile
        self.steps_in_all = self.config.max_epochs * -(-len(self.train_loader) // self.config.accumulate)

    def run(self) -> None:
        """Train to the end. Raises Terminated after SIGTERM (saved), KeyboardInterrupt after Ctrl-C (not saved)."""
        with self.requests:
            self.records.open(self.progress.step, self.steps_in_all)
            try:
                if not self.progress.batches:
                    self.preview()  # of an epoch at whose end the run was stopped
                while self.progress.epoch < self.config.max_epochs:
                    self.train_epoch()
                    self.end_epoch(self.validate())
                self.movement.look_at_weights(self.progress.step, last=True)
            except BaseException as error:
                with suppress(MedSoftError):  # a full disk has been reported
                    self.record()  # up to the step that went wrong
                traceback.clear_frames(error.__traceback__)  # in which a data loader's iterator lives
                raise
            finally:
                self.records.close()
                # The processes of a data loader end with its iterator. They ignore signals, so that Python would wait
                # for them forever at its exit.
                del self.train_loader, self.val_loader
            self.checkpoints.finish()

    def train_epoch(self) -> None:
        """The rest of the epoch, from the batch that ``progress`` names."""
        self.train_loader.sampler.epoch = self.progress.epoch
        self.records.start_epoch()
        for batch in self.train_loader:
            self.requests.raise_if_interrupted()
            self.requests.save = self.fabric.is_global_zero and self.checkpoints.due()
            last = self.progress.batches + 1 == len(self.train_loader)
            closes_step = last or (self.progress.batches + 1) % self.config.accumulate == 0
            with self.without_exchange() if not closes_step else nullcontext():
                self.forward_backward(self.fabric.to_device(batch))
            self.progress.batches += 1
            if closes_step:
                self.optimizer_step()
                # Before a checkpoint all numbers are read: one that is not finite must not be saved.
                if last or self.queue.save_requested or self.queue.stop_requested:
                    self.queue.read()
                    self.record()
                if not last and (self.queue.save_requested or self.queue.stop_requested):
                    self.save_and_stop_if_requested()

    def without_exchange(self) -> AbstractContextManager:
        """In the block every process adds up gradients of its own, unless none of them has room for whole gradients."""
        # A sharded stage is not wrapped by Fabric.
        return nullcontext() if isinstance(self.model, Stage) else self.fabric.no_backward_sync(self.model)

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of this process's share of a global batch."""
        whole = len(batch["mask"]) == self.config.batch_size // self.fabric.world_size
        if whole and self.stage.compiled and not self.tried:
            self.compile_networks(batch)
        with self.autocast(), nullcontext() if whole and self.stage.compiled else self.stage.uncompiled():
            losses = self.model(batch, self.config.condition_dropout)[0]
        weight = batch["weight"].to(losses)
        loss = (weight * losses).mean()
        # One exchange tells all processes the loss of the global batch, its size, and what one of them requests.
        mean = loss.detach().double()
        requests = [mean.new_full((), value) for value in (self.requests.stop, self.requests.save)]  # no host copy
        row = self.summed(torch.stack([mean, (weight > 0).double().sum(), *requests]))
        self.queue.add_batch(batch["sample_id"], losses, row)
        self.fabric.backward(self.scaler.scale(loss / self.config.accumulate))

    def compile_networks(self, batch: Batch) -> None:
        """Compile on a first full batch, whose gradients are thrown away; where that fails, go on uncompiled."""
        self.tried, fault = True, ""
        try:
            with self.without_exchange():
                with self.autocast():
                    losses = self.model(batch, self.config.condition_dropout)[0]
                self.fabric.backward(losses.mean())
        except Exception as error:  # whatever the compiler and its tools raise; other faults come again uncompiled
            if out_of_memory(error):
                raise
            fault = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 200)
        self.optimizer.zero_grad()
        if fault := next(filter(None, of_everyone(fault)), ""):
            self.stage.compiled = False
            if self.fabric.is_global_zero:
                text = "warning: the networks of a step cannot be compiled (%s); the run goes on uncompiled"
                log.warning(text, fault)

    def optimizer_step(self) -> None:
        """Clip, step, average. Raises MedSoftError for a loss or gradient that is not finite (see StepQueue)."""
        step, groups = self.progress.step, self.optimizer.param_groups
        for group in groups:
            group["lr"] = self.config.rates[group["name"]] * self.rate_factor(step)
        self.scaler.unscale_(self.optimizer)
        self.movement.look_at_gradients()
        norms, total = self.stage.gradient_norms()
        self.stage.clip(total)
        rates = {group["name"]: group["lr"] for group in groups}
        self.queue.close_step(step + 1, self.progress.epoch, rates, norms, total)
        self.queue.read(steps_behind(self.stage.device))
        self.record()
        self.scaler.step(self.optimizer)  # the fp16 scaler skips steps whose gradients are not finite
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.step = step + 1
        self.stage.average.update(self.progress.step)
        self.movement.look_at_weights(self.progress.step)

    def rate_factor(self, step: int) -> float:
        """By what the learning rates are multiplied in the step that follows ``step`` others."""
        warm = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        if self.config.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps_in_all))))
        return warm

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and cosine on masked patches of the moving average, over the validation set and over its diseased items,
        by their names in ``metrics.csv``; nan where there is none. A diseased item's loss is that inside its mask."""
        sums = torch.zeros(2, 3, dtype=torch.float64, device=self.stage.device)  # all items, diseased ones
        with self.stage.average.swapped(), self.stage.uncompiled():
            for batch in self.val_loader:
                self.requests.raise_if_interrupted()
                batch = self.fabric.to_device(batch)
                with self.autocast():
                    losses, cosine, inside, published = self.stage(batch, dropout=0.0)
                losses = losses if published is None else published
                real = (batch["weight"] > 0).to(losses)
                rows = [(losses, real), (losses if inside is None else inside, real * batch["diseased"])]
                cosines = torch.full_like(losses, math.nan) if cosine is None else cosine
                sums += torch.stack(
                    [torch.stack([(each * of).sum(), (cosines * of).sum(), of.sum()]) for each, of in rows]
                )
        (loss, cosine, count), (lesion_loss, lesion_cosine, diseased) = self.summed(sums).tolist()
        found = {"val_loss": loss / count, "val_cosine": cosine / count}
        each = diseased or math.nan
        return found | {"val_lesion_loss": lesion_loss / each, "val_lesion_cosine": lesion_cosine / each}

    def end_epoch(self, validated: dict[str, float]) -> None:
        """Records, the best weights, ``last.ckpt``, previews; ``validated``: what ``validate`` found."""
        self.records.end_epoch(self.progress, validated)
        # Invariant: the best weights of all epochs in last.ckpt are on disk before last.ckpt is replaced.
        self.checkpoints.keep_if_best(validated[self.config.best_by])
        self.progress.end_epoch()
        self.save_and_stop_if_requested(epoch_ended=True)
        self.preview()

    def preview(self) -> None:
        """Previews of the epoch that has ended, in the process that makes them: in all where weights are shared out."""
        if self.previews:
            due = self.previews.due(self.config.max_epochs, self.progress)
            if of_everyone(due)[0] if self.stage.sharded else due:
                self.previews.make(self.progress, self.autocast())

    def save_and_stop_if_requested(self, epoch_ended: bool = False) -> None:
        """Write ``last.ckpt``; Terminated if one of the processes was asked to stop."""
        self.records.keep()
        self.checkpoints.save(epoch_ended)
        self.queue.save_requested = False
        if epoch_ended:  # also what came in during validation
            asked = torch.tensor([float(self.requests.stop)], device=self.stage.device)
            self.queue.stop_requested |= bool(self.summed(asked)[0])
        if self.queue.stop_requested:
            log.info("asked to stop: %s is saved; the same command goes on from there", self.checkpoints.path)
            raise cli.Terminated(cli.TERMINATED)

    def record(self) -> None:
        """Count the steps whose numbers have been read, and write them down."""
        if steps := self.queue.take():
            self.progress.count(steps)
            self.records.add(steps)

    def autocast(self) -> AbstractContextManager:
        """The block multiplies matrices in half precision, if the run does."""
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return torch.autocast(self.stage.device.type, half) if half else nullcontext()

    def summed(self, values: Tensor) -> Tensor:
        """The sum of every process's ``values``, of any shape. Fabric's own would wait for the device."""
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


class Requests:
    """What signals ask of this process, noted by handlers and acted on between two batches.

    Python raises KeyboardInterrupt between any two instructions, also where a lock has just been taken and nobody will
    release it: TensorBoard's writer then waited for itself forever. So the first Ctrl-C is noted only, and the loop
    raises at the next batch; a second one, for whoever does not want to wait for that, ends the process at once.
    """

    def __init__(self) -> None:
        self.stop = self.save = self.interrupted = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            self.before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate)}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it is ignored
                self.before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.interrupted:
            self.before.pop(signal.SIGINT)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _terminate(self, signum: int, frame: Any) -> None:
        self.stop = True

    def _interrupt(self, signum: int, frame: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def raise_if_interrupted(self) -> None:
        """KeyboardInterrupt after a Ctrl-C."""
        if self.interrupted:
            raise KeyboardInterrupt
