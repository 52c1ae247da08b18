"""What the machine can do, and which of several processes this is."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

RANKS = ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """False in every process but one of a run on several devices (started by Lightning, torchrun or srun)."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANKS)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; for the CPU, what the kernel could give without swapping.

    A system that only tells how much memory there is (macOS) is taken at its word, one that does not tell at all
    (Windows) has no limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def all_memory(device: torch.device) -> int:
    """Bytes of a GPU, whoever uses them; a CPU's are without limit, since a system may swap."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else sys.maxsize


def peak_memory(device: torch.device) -> int:
    """The most bytes that torch has held on a GPU, or this process on the CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error: BaseException) -> bool:
    """True if the device or the machine had no memory left for what was asked."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    messages = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU's allocator, the driver, a library
    return full or (isinstance(error, RuntimeError) and any(message in str(error) for message in messages))


def half_is_fast() -> bool:
    """True if this machine multiplies bfloat16 in hardware: a GPU from Ampere on, or a CPU with AVX-512 BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def kernel_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The memory layout in which the U-Net's kernels of ``dtype`` are fastest on ``device``.

    Channels last on a GPU, as its libraries want it, and, in bfloat16, on a CPU with AMX (measured: 8 to 10 % of a call
    or training step); on a CPU without AMX it costs up to a third.
    """
    amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return torch.channels_last if device.type == "cuda" or amx else torch.contiguous_format


def resolve_precision(name: str) -> str:
    """``auto`` -> bf16-mixed or 32-true for this machine; Lightning's own names stay."""
    return ("bf16-mixed" if half_is_fast() else "32-true") if name == "auto" else name


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products and convolutions where that is fast; weights and sums stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half_is_fast())


def steps_behind(device: torch.device) -> int:
    """How many training steps later the numbers of a step are read: the host may hand a GPU the next one meanwhile."""
    return 1 if device.type == "cuda" else 0


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the CPU on ``device``; the host does not wait until a GPU has done what was queued before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def on_host(values: Tensor) -> Callable[[], Tensor]:
    """Start copying ``values`` to the CPU; what comes back waits for the copy, and for nothing that is queued later."""
    copy = values.detach().to("cpu", non_blocking=True)
    if values.device.type != "cuda":
        return lambda: copy
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait
