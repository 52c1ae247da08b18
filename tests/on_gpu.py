"""What the tests of a GPU share. A CPU takes the same tests every day: nothing in them can be wrong unseen."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """On a GPU PyTorch itself refuses, in this block, whatever the host would wait for. On a CPU nothing is refused."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
