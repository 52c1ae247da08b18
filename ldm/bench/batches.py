"""Training steps of growing batches: time, throughput, share of the chip's speed, memory.

Random weights and cached features; a step is forward, backward, clipping and fused AdamW, as in training, compiled if
``training.compile`` says so; a GPU is handed the next one before the loss is read. The chip's speed is that of a large
matrix product in bfloat16, measured first.
"""

import gc
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ldm.bench.common import BenchOptions, this_machine
from ldm.bench.training import optimizer_step
from ldm.config import Architecture, TrainingConfig, stage_configs
from ldm.core.devices import on_host, out_of_memory, resolve_precision, steps_behind
from ldm.core.errors import UsageError
from ldm.core.tables import markdown_head, markdown_row
from ldm.training.estimates import GIB, fake_batch, fake_stage, step_operations

log = logging.getLogger("bench")

COLUMNS = ("stage", "compiled", "batch", "first step, s", "a step, ms", "items/s", "TFLOP/s", "of peak", "GiB")
WARM_UP = 2  # steps after the first


def main(options: BenchOptions) -> dict[str, Any]:
    """Log one Markdown row for each stage and batch size, until memory is full; returns the numbers for JSON."""
    device, where = this_machine()
    configs = stage_configs(options.config, options.overrides)
    sizes = batch_sizes(options.sizes)
    precision = resolve_precision(next(iter(configs.values())).training.precision)
    peak = matrix_speed(device)
    log.info("%s, torch %s, %s, peak %.0f TFLOP/s", where, torch.__version__, precision, peak / 1e12)
    log.info("\n%s", markdown_head(COLUMNS))
    rows: list[dict[str, Any]] = []
    for stage, config in configs.items():
        asked = config.architecture, config.training
        operations = step_operations(*asked, 1)
        for batch in sizes:
            torch.compiler.reset()
            try:
                row = measure(*asked, batch, options.repeats, device, precision == "bf16-mixed")
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                log.info("| %s | batch %d: out of memory |", stage, batch)
                break
            finally:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            compiled = config.training.compile
            rows.append({"stage": stage, "compiled": compiled, **row, "operations": operations * batch})
            log.info("%s", as_line(rows[-1], peak))
    return {"where": where, "torch": torch.__version__, "precision": precision, "peak": peak, "steps": rows}


def batch_sizes(text: str | None) -> list[int]:
    """``1,8,32`` -> those; None -> 1, 2, 4 and so on, more than any memory holds."""
    if text is None:
        return [2**power for power in range(16)]
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise UsageError(f"--sizes {text}: expected batch sizes with commas between them, such as 1,8,32")
    return [int(size) for size in sizes]


def matrix_speed(device: torch.device) -> float:
    """Floating-point operations per second of a product of two large random matrices in bfloat16."""
    side, turns = (8192, 20) if device.type == "cuda" else (2048, 5)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times)


def measure(
    architecture: Architecture, training: TrainingConfig, batch: int, repeats: int, device: torch.device, half: bool
) -> dict[str, Any]:
    """Seconds of the first step and of ``repeats`` later ones, and on a GPU the most memory that was allocated.

    A later step's time is that from one loss read to the next.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with device:
        stage = fake_stage(architecture, training, half).to(device)
        items = fake_batch(architecture, batch)
    optimizer = stage.adamw()
    times: list[float] = []
    losses: deque[Callable[[], torch.Tensor]] = deque()
    for _ in range(1 + WARM_UP + repeats):
        start = time.perf_counter()
        losses.append(on_host(optimizer_step(stage, optimizer, items, half)))
        while len(losses) > (steps_behind(device) if times else 0):
            losses.popleft()()
        times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"batch": batch, "first": times[0], "seconds": times[1 + WARM_UP :], "memory": memory}


def as_line(row: dict[str, Any], peak: float) -> str:
    """The Markdown row of ``COLUMNS``; ``peak``: the chip's floating-point operations per second."""
    seconds = statistics.median(row["seconds"])
    speed = row["operations"] / seconds
    times = f"{row['first']:.1f}", f"{1000 * seconds:.1f}", f"{row['batch'] / seconds:.2f}"
    memory = "-" if row["memory"] is None else f"{row['memory'] / GIB:.1f}"
    compiled = "yes" if row["compiled"] else "no"
    speeds = f"{speed / 1e12:.1f}", f"{speed / peak:.0%}"
    return markdown_row((row["stage"], compiled, row["batch"], *times, *speeds, memory))
