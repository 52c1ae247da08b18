"""Conversion and merging of true-size files: bytes, memory, time. About 25 GB of disk; only in ``make test-full``."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden import original, save_original
from tiny import ROOT

from ldm.checkpoints.checkpoint import NEW_IN_UNET, read_checkpoint, write_checkpoint
from ldm.checkpoints.files import verify

YAML = ROOT / "models" / "mldm_v15.yaml"


def measured(*command: object) -> tuple[float, float, float]:
    """(peak memory in bytes, seconds, processor seconds) of a command that must succeed.

    Mapped file pages count as memory. Processor seconds are what a machine that does nothing else would take.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, command)])
    while True:
        # Not ru_maxrss: a child inherits its parent's through fork and exec.
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            assert status == 0
            return peak, time.perf_counter() - start, usage.ru_utime + usage.ru_stime
        time.sleep(0.05)


def check(label: str, size: int, plain: float, used: tuple[float, float, float], limit: float) -> None:
    """Print the figures; memory below ``limit`` times the file, at most 60 s beyond copying."""
    peak, seconds, processor = used
    print(
        f"\n{label}: {size / 1e9:.2f} GB, peak {peak / size:.2f} x, {seconds:.1f} s ({processor:.1f} s of processor), "
        f"copying {plain:.1f} s"
    )
    assert peak < limit * size
    assert seconds - plain < 60


def copying(source: Path, target: Path) -> float:
    """Seconds to read a file and write it to the same disk."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as handle:
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("true_size") / "sd-v1-5-inpainting.ckpt", original())


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """Converted in time and memory: 1.6 times the file, 60 s beyond reading and writing."""
    output = source.parent / "ckpt_for_stage1.ckpt"
    flags = ["--input_path", source, "--output_path", output, "--config", YAML]
    used = measured(ROOT / "tool" / "model_convert.py", *flags)
    assert source.stat().st_size > 4.2e9
    check("conversion", source.stat().st_size, copying(output, source.parent / "copy"), used, 1.6)
    return output


@pytest.mark.slow
def test_true_size_conversion_keeps_every_byte(source: Path, converted: Path) -> None:
    before, after = read_checkpoint(source).state, read_checkpoint(converted)
    networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    kept = [key for key in before if key.startswith(networks) and not key.endswith(".position_ids")]
    assert len(kept) == 686 + 248 + 196
    assert all(torch.equal(before[key].view(torch.int32), after.state[key].view(torch.int32)) for key in kept)
    new = set(after.state) - set(kept)
    assert all(NEW_IN_UNET.match(key) or key.startswith("msc.") for key in new)
    assert after.metadata["origin"]["file"] == source.name


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_true_size_merge(converted: Path, suffix: str) -> None:
    """The stage1 file carries an optimizer's state twice as large as its weights."""
    folder = converted.parent
    found = read_checkpoint(converted)
    controller = {key: value for key, value in found.state.items() if key.startswith("msc.")}
    moments = {"exp_avg": list(controller.values()), "exp_avg_sq": [value.square() for value in controller.values()]}
    stage1, unet_only = folder / "stage1.ckpt", folder / "unet_only.ckpt"
    write_checkpoint(stage1, controller, {**found.metadata, "stage": "stage1"}, optimizer_states=[moments])
    rest = {key: value for key, value in found.state.items() if key not in controller}
    write_checkpoint(unet_only, rest, {**found.metadata, "stage": "unet_only"})
    output = folder / f"ckpt_for_stage2.{suffix}"
    flags = ["--stage1_path", stage1, "--input_path", unet_only, "--output_path", output, "--config", YAML]
    used = measured(ROOT / "tool" / "tool_merge_for_stage2.py", *flags)
    check(f"merge to .{suffix}", output.stat().st_size, copying(output, folder / "copy"), used, 1.3)
    merged = read_checkpoint(output)
    assert all(torch.equal(merged.state[key], value) for key, value in found.state.items())
    print(verify(output))
    output.unlink()
