"""Training speed: items per second of each stage, with the cache, the freezing and the precision each on and off.

The variants of a stage take turns on the same networks (random weights) and the same items, so their ratios hold on a
machine that does other things too. One step is forward, backward, clipping and AdamW, as in training. A step with
features on the fly runs the frozen encoders first: in float32, which gives the features that the cache holds, or, which
is cheaper and less exact, in the step's bfloat16.
"""

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.bench.common import BenchOptions, random_biomedclip, this_machine
from ldm.config import Architecture, TrainingConfig, stage_configs
from ldm.core.devices import peak_memory, resolve_precision
from ldm.features.build import compute_features
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel
from ldm.networks.opening import open_encoder
from ldm.training.estimates import GIB, fake_batch, step_operations
from ldm.training.stage import Stage, for_steps

log = logging.getLogger("bench")

PROMPT = "osteolytic lesion with a pathological fracture of the vertebral body"


class Variant(NamedTuple):
    """How a step differs from the step as trained."""

    around: Callable[[], AbstractContextManager]  # what it prepares is not timed
    half: bool  # the step in bfloat16 and float32 (mixed), else all in float32
    encoders: torch.dtype | None = None  # of the encoders that run in the step; None: features come from the cache


class Steps:
    """A stage on one device, with steps in several variants."""

    def __init__(
        self,
        architecture: Architecture,
        training: TrainingConfig,
        clip: ImageTextEncoder,
        batch_size: int,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.clip = device, clip.to(device)
        self.half = resolve_precision(training.precision) == "bf16-mixed"
        if self.half:  # as the other frozen networks: else they would be cast at every use
            for_steps(self.clip, True)
        net = MedSoftModel(architecture, training.builds).to(device)
        empty = None
        if "text" in net.parts:
            with torch.no_grad():
                empty = net.cond_stage_model([""])
        self.stage = Stage(training, net, {}, empty, self.half).to(device)
        self.optimizer = self.stage.adamw()
        with device:
            self.batch = fake_batch(architecture, batch_size)
        self.batch["mask"] = (self.batch["mask"] > 0.9).float()
        self.image = torch.rand(batch_size, 3, architecture.image_size, architecture.image_size, device=device) * 2 - 1

    def variants(self) -> dict[str, Variant]:
        """By name. Features on the fly are those that the cache holds, or cheaper ones of encoders in bfloat16."""
        found = {"as trained": Variant(nullcontext, self.half)}
        found["features on the fly"] = Variant(self._float32_encoders, self.half, torch.float32)
        if self.half:
            found["features on the fly, bf16"] = Variant(nullcontext, True, torch.bfloat16)
        if any(not value.requires_grad for value in self._step_parameters()):
            found["nothing frozen"] = Variant(self._unfrozen, self.half)
        if self.half:
            found["float32"] = Variant(lambda: self._in_float32(self.stage.net), False)
        return found

    def step(self, variant: Variant) -> None:
        """One optimizer step, its features computed first where the variant says so; waits until it is done."""
        batch: Mapping[str, object] = self.batch
        if variant.encoders:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=variant.encoders == torch.bfloat16):
                batch = {**self.batch, **self._encoded()}
        optimizer_step(self.stage, self.optimizer, batch, variant.half)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def _encoded(self) -> dict[str, torch.Tensor]:
        net, prompts = self.stage.net, [PROMPT] * len(self.image)
        seen = self.image, self.batch["mask"]
        made = compute_features(net, self.clip, *seen, whole=seen)
        found = {name: value.float() for kind in made.values() for name, value in kind.items()}
        if "msc" in net.parts:
            found["prompt_embedding"] = self.clip.encode_text(prompts).float()
        if "text" in net.parts:
            found["text"] = net.cond_stage_model(prompts).float()
        return found

    def _step_parameters(self) -> list[torch.nn.Parameter]:
        """Of the networks that a step differentiates through."""
        return [value for key, value in self.stage.net.named_parameters() if key.startswith(("model.", "msc."))]

    @contextmanager
    def _unfrozen(self) -> Iterator[None]:
        frozen = [value for value in self._step_parameters() if not value.requires_grad]
        for value in frozen:
            value.requires_grad_(True)
        yield
        for value in frozen:
            value.requires_grad_(False).grad = None

    def _float32_encoders(self) -> AbstractContextManager:
        net = self.stage.net
        homes = {"autoencoder": "first_stage_model", "text": "cond_stage_model"}
        return self._in_float32(self.clip, *(getattr(net, home) for part, home in homes.items() if part in net.parts))

    @contextmanager
    def _in_float32(self, *networks: torch.nn.Module) -> Iterator[None]:
        """The block sees the halved weights as they are without halving."""
        for network in networks:
            for_steps(network.float(), False)
        yield
        for network in networks:
            for_steps(network, self.half)


def optimizer_step(
    stage: Stage, optimizer: torch.optim.Optimizer, batch: Mapping[str, object], half: bool
) -> torch.Tensor:
    """Forward, backward, clipping and the optimizer on one batch of cached features, as in training; the loss.

    A GPU may still be computing when this returns.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(stage.device.type, torch.bfloat16, enabled=half):
        loss = stage(batch, 0.0)[0].mean()
    loss.backward()
    stage.clip(stage.gradient_norms()[1])
    optimizer.step()
    return loss.detach()


def measure(steps: Steps, repeats: int, warm_up: int = 1) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds of all cores) of each step of each variant, after the warm-up; the variants take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps.variants()}
    for turn in range(repeats + warm_up):
        for name, variant in steps.variants().items():
            with variant.around():
                start, cores = time.perf_counter(), time.process_time()
                steps.step(variant)
                elapsed = time.perf_counter() - start, time.process_time() - cores
            if turn >= warm_up:
                found[name].append(elapsed)
    return found


def main(options: BenchOptions) -> dict[str, Any]:
    """Measure the stages one after another; logs the numbers and returns them for JSON."""
    device, where = this_machine()
    configs = stage_configs(options.config, options.overrides)
    precision = resolve_precision(next(iter(configs.values())).training.precision)
    log.info("%s, torch %s, %s, batch %d", where, torch.__version__, precision, options.batch_size)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for stage, config in configs.items():
            config.biomedclip.path = str(random_biomedclip(config.biomedclip, Path(scratch)))
            clip = open_encoder(config.biomedclip)
            asked = config.architecture, config.training
            times = measure(Steps(*asked, clip, options.batch_size, device), options.repeats)
            results += report(stage, times, options.batch_size, step_operations(*asked, options.batch_size))
            gc.collect()
    peak = peak_memory(device)
    log.info("most memory: %.1f GiB", peak / GIB)
    return {"where": where, "precision": precision, "peak_bytes": peak, "stages": results}


def report(
    stage: str, times: dict[str, list[tuple[float, float]]], batch_size: int, operations: int
) -> list[dict[str, Any]]:
    """Log the rows of a stage: items per second, and how many times faster a step as trained is.

    The second ratio is that of the cores' own time, which other programs on the machine disturb less. Last, the
    floating-point ``operations`` of a step as trained per second.
    """
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        # Turn by turn: both steps of a pair ran at about the same moment.
        pairs = list(zip(taken, times["as trained"], strict=True))
        ratio, cores = (statistics.median(other[k] / ours[k] for other, ours in pairs) for k in (0, 1))
        speed = batch_size / statistics.median(seconds for seconds, _ in taken)
        row = {"stage": stage, "variant": name, "items_per_second": speed, "ratio": ratio, "ratio_of_core_time": cores}
        rows.append({**row, "seconds": [seconds for seconds, _ in taken]})
        form = "%-10s %-26s %8.3f items/s   %5.2f times as long (%.2f in core time)"
        log.info(form, *row.values())
    trained = rows[0]
    trained["operations_per_second"] = operations * trained["items_per_second"] / batch_size
    log.info("%-10s %.3f TFLOP/s as trained", stage, trained["operations_per_second"] / 1e12)
    return rows
