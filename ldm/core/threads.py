"""Threads for reading and decoding files. No torch."""

import os
from concurrent.futures import ThreadPoolExecutor


def thread_pool() -> ThreadPoolExecutor:
    """A pool of one thread for each processor, eight at most: disks give no more to more."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))
