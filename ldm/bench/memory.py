"""Memory of each stage: what is computed from the networks' shapes, and what one optimizer step really takes.

The step runs in a process of its own, with random weights and cached features, with activation checkpointing; nothing
but the networks of a step is there, as in training.
"""

import dataclasses
import logging
import multiprocessing
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ldm.bench.common import BenchOptions, this_machine
from ldm.bench.training import optimizer_step
from ldm.config import stage_configs
from ldm.core.devices import half_is_fast, peak_memory, resolve_precision
from ldm.core.tables import markdown_head, markdown_row
from ldm.training.estimates import GIB, fake_batch, fake_stage, stage_memory

log = logging.getLogger("bench")

COLUMNS = ("parameters", "gradients", "optimizer", "activations", "total")


def main(options: BenchOptions) -> dict[str, Any]:
    """Log the Markdown tables; returns the numbers for JSON."""
    stages = stage_configs(options.config, options.overrides)
    device, name = this_machine()
    results: list[dict[str, Any]] = []
    log.info("%s", markdown_head(("stage", "precision", "checkpointing", *COLUMNS)))
    for (stage, config), half, again in product(stages.items(), (False, True), (False, True)):
        training = dataclasses.replace(config.training, activation_checkpointing=again)
        memory = stage_memory(config.architecture, training, options.batch_size, half, device.type)
        precision = "bf16-mixed" if half else "32-true"
        shown = [f"{getattr(memory, name) / GIB:.2f}" for name in COLUMNS]
        log.info("%s", markdown_row((stage, precision, "yes" if again else "no", *shown)))
        results.append({"stage": stage, "precision": precision, "checkpointing": again, **vars(memory)})
    measured = []
    log.info("\n%s", markdown_head(("stage", "one step, measured", "computed", "seconds")))
    for stage in stages:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its peak is its own
            row = pool.apply(one_step, (options.config, stage, options.overrides, options.batch_size))
        measured.append(row)
        numbers = f"{row['peak'] / GIB:.2f}", f"{row['computed'] / GIB:.2f}", f"{row['seconds']:.0f}"
        log.info("%s", markdown_row((stage, *numbers)))
    where = f"{name}, {resolve_precision('auto')}, activation checkpointing, torch {torch.__version__}"
    log.info("in GiB, batch %d; measured: the most that the process ever held (%s)", options.batch_size, where)
    return {"where": where, "batch_size": options.batch_size, "computed": results, "measured": measured}


def one_step(path: Path, stage: str, overrides: list[str], batch_size: int) -> dict[str, Any]:
    """Build the stage and take one optimizer step; its loss, and memory in bytes."""
    config = stage_configs(path, overrides)[stage]
    architecture = config.architecture
    training = dataclasses.replace(config.training, activation_checkpointing=True, compile=False)
    device, half = this_machine()[0], half_is_fast()
    computed = stage_memory(architecture, training, batch_size, half, device.type).total
    start = time.perf_counter()
    with device:
        made, batch = fake_stage(architecture, training, half).to(device), fake_batch(architecture, batch_size)
    loss = float(optimizer_step(made, made.adamw(), batch, half))
    seconds = time.perf_counter() - start
    return {"stage": stage, "peak": peak_memory(device), "computed": computed, "seconds": seconds, "loss": loss}
