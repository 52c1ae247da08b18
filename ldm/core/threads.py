"""Threads for reading and decoding files. No torch."""

import os
from concurrent.futures import ThreadPoolExecutor


def thread_pool(workers: int | None = None) -> ThreadPoolExecutor:
    """A pool of ``workers`` threads; by default one for each processor, eight at most: disks give no more to more."""
    return ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
