"""All that a GPU is asked about, in steps of a minute or two: training, drawing, the tests that need one.

Each step runs in a process of its own and leaves a JSON file, so that one that fails or takes too long costs no other
one its numbers, and a repeated command goes on with what is missing. Networks have random weights, made on the device.
"""

import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ldm.bench import batches
from ldm.bench.common import this_machine
from ldm.bench.gpu_document import parts_of_page, write_document
from ldm.bench.inference import drawing
from ldm.config import load_config, stage_configs
from ldm.core.devices import free_memory, half_is_fast
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import read_json, write_json
from ldm.core.paths import SHIPPED
from ldm.training.estimates import size, stage_memory

log = logging.getLogger("gpu")

SLACK = 10  # seconds that must be left for a step to begin
REFERENCE = {"sampler": "ddim", "steps": 50, "guidance_interval": [0.0, 1.0]}
STEPS_20 = REFERENCE | {"sampler": "dpmpp_2m", "steps": 20}


@dataclass(frozen=True)
class GpuOptions:
    """What the measurement is told; the flags of tool/gpu.py."""

    config: Path
    output_dir: Path
    document: Path
    minutes: float
    repeats: int
    only: list[str]
    step: str | None


@dataclass(frozen=True)
class Step:
    """One measurement. ``batch``: on a CPU at most two, and fewer where memory does not suffice.

    A CPU compiles for minutes: there ``compiled`` says nothing, steps that are not ``small`` are left out, and the
    others have five times the ``seconds``.
    """

    name: str
    seconds: float  # after which it is stopped
    stage: str = ""
    batch: int = 16
    compiled: bool = False
    sampling: dict[str, Any] | None = None  # of a drawing; what it does not name is the YAML's
    small: bool = True

    def about(self) -> dict[str, Any]:
        """What is measured, for the JSON file."""
        named = {"stage": self.stage} if self.stage else {"sampling": self.sampling}
        return {"step": self.name, **named, "compiled": self.compiled}


STEPS = (
    Step("unet_only", 60, "unet_only"),
    Step("unet_only_compiled", 200, "unet_only", compiled=True, small=False),
    Step("stage2_2", 60, "stage2_2"),
    Step("stage2_2_compiled", 240, "stage2_2", compiled=True, small=False),
    Step("drawing_ddim50", 90, batch=8, sampling=REFERENCE),
    Step("drawing_ddim50_compiled", 240, batch=8, compiled=True, sampling=REFERENCE, small=False),
    Step("drawing_20_compiled", 240, batch=8, compiled=True, sampling=STEPS_20),
    Step("drawing_fast_compiled", 240, batch=8, compiled=True, sampling={}),
    Step("latency_compiled", 240, batch=1, compiled=True, sampling=REFERENCE),
    Step("stage1", 60, "stage1", 64),
    Step("stage1_compiled", 120, "stage1", 64, compiled=True, small=False),
    Step("stage2_1", 60, "stage2_1"),
    Step("stage2_1_compiled", 240, "stage2_1", compiled=True, small=False),
    Step("stage2_2_64_compiled", 300, "stage2_2", 64, compiled=True, small=False),
    Step("unet_only_64_compiled", 300, "unet_only", 64, compiled=True, small=False),
    Step("tests", 240),
)


def main(options: GpuOptions) -> int:
    """Take the steps that are missing, in their order, until the time is up; the number of those that failed."""
    if options.step:
        write_json(options.output_dir / f"{options.step}.json", take(options))
        return 0
    about, end = identity(options), time.monotonic() + 60 * options.minutes
    parts_of_page(options.document)  # else it would be found out when all has been measured
    for step in chosen(options.only, about["kind"]):
        file = options.output_dir / f"{step.name}.json"
        stored = stored_result(file, about)
        if stored and "failed" not in stored:
            log.info("%s: measured already", step.name)
            continue
        left = end - time.monotonic()
        if left < SLACK:
            log.info("%s: no time is left; the same command goes on here", step.name)
            continue
        log.info("%s: at most %.0f s", step.name, min(left, step.seconds))
        if fault := in_own_process(step, options, about["kind"], min(left, step.seconds)):
            log.warning("warning: %s: %s", step.name, fault)
            write_json(file, {**step.about(), "about": about, "failed": fault})
    steps = chosen([], about["kind"])
    results = [found for step in steps if (found := stored_result(options.output_dir / f"{step.name}.json", about))]
    write_document(options.document, about, results)
    failed = sum("failed" in found for found in results)
    log.info("%s: %d of %d steps measured, %d failed", options.document, len(results) - failed, len(steps), failed)
    return failed


def chosen(names: Sequence[str], device: str) -> list[Step]:
    """The steps of these ``names``, all without names; UsageError for one that is none on the kind of ``device``."""
    gpu = device == "cuda"
    known = [step if gpu else replace(step, compiled=False, seconds=5 * step.seconds) for step in STEPS]
    known = [step for step in known if gpu or step.small]
    for name in names:
        if name not in [step.name for step in known]:
            raise UsageError(f"--only {name}: expected one of {', '.join(step.name for step in known)}")
    return [step for step in known if not names or step.name in names]


def identity(options: GpuOptions) -> dict[str, Any]:
    """What two results must share to stand in one table: device, versions, networks."""
    device, name = this_machine()
    found = {"device": name, "kind": device.type, "torch": torch.__version__, "config": options.config.name}
    call = ["git", "-C", str(SHIPPED), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # no checkout
    return {**found, "commit": commit}


def stored_result(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier command has measured, if it was the same; None without it."""
    try:
        found = read_json(file) if file.exists() else {}
    except MedSoftError:
        return None  # is measured again
    return found if isinstance(found, dict) and found.get("about") == about else None


def in_own_process(step: Step, options: GpuOptions, device: str, seconds: float) -> str:
    """Take a step, which leaves its JSON file; why it failed, or ""."""
    words = [sys.executable, SHIPPED / "tool" / "gpu.py", "--step", step.name, "--device", device]
    words += ["--config", options.config, "--output_dir", options.output_dir, "--repeats", options.repeats]
    started = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # with the processes of compilers and tests
        started.communicate()
        return f"stopped after {seconds:.0f} s"
    except BaseException:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    lines = [line for line in said.splitlines() if line.strip()]
    return (lines or [f"ended with {started.returncode}"])[-1].removeprefix("error: ") if started.returncode else ""


def take(options: GpuOptions) -> dict[str, Any]:
    """Measure one step, in this process; what its JSON file says."""
    device = this_machine()[0]
    (step,) = chosen([options.step or ""], device.type)
    if step.stage:
        found = training(step, options, device)
    elif step.sampling is not None:
        found = pictures(step, options, device)
    else:
        found = tests()
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return {**step.about(), "about": identity(options), "date": when, **found}


def training(step: Step, options: GpuOptions, device: torch.device) -> dict[str, Any]:
    """Items a second of a stage, and the memory of its step beside the estimate."""
    config = stage_configs(options.config, [f"training.compile={str(step.compiled).lower()}"])[step.stage]
    given, half, free = (config.architecture, config.training), half_is_fast(), free_memory(device)
    for batch in halved(step.batch if device.type == "cuda" else 2):
        estimate = stage_memory(*given, batch, half, device.type).total
        if estimate <= free:
            break
    else:
        raise MedSoftError(f"a step with one item needs about {size(estimate)}, {size(free)} are free")
    row = batches.measure(*given, batch, options.repeats, device, half)
    return {**row, "estimate": estimate, "per_second": batch / statistics.median(row["seconds"])}


def halved(batch: int) -> Iterator[int]:
    """``batch``, half of it, and so on down to 1."""
    while batch:
        yield batch
        batch //= 2


def pictures(step: Step, options: GpuOptions, device: torch.device) -> dict[str, Any]:
    """Pictures a second with a sampling setting, in bfloat16, and how far they are from eager float32."""
    config = load_config(options.config)
    changes = {**(step.sampling or {}), "precision": "bf16-true", "compile": step.compiled}
    config.sampling = replace(config.sampling, **changes)
    batch = step.batch if device.type == "cuda" else min(2, step.batch)
    row = drawing(config, device, batch, max(2, options.repeats // 3))
    return {
        **row,
        "batch": batch,
        "steps": config.sampling.steps,
        "per_second": batch / statistics.median(row["seconds"]),
    }


def tests() -> dict[str, Any]:
    """The tests that need a GPU: how many passed, failed and were skipped."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    done = subprocess.run(words, cwd=SHIPPED, env=environment, stdout=subprocess.PIPE, text=True)
    counts = {
        name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-400:])
    }
    if done.returncode or not counts:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        raise MedSoftError(f"{counts or 'no test was found'}: {', '.join(failed[:4])}")
    return {"counts": counts}
