"""Threads and processes for reading and decoding files. No torch."""

import multiprocessing
import os
import platform
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from ldm.core.errors import MedSoftError

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8  # threads or processes: disks give no more to more
FEW = 2000  # items for which it is not worth it to start processes, each of which loads its packages
CHUNK = 16  # items that a process gets at a time
AHEAD = 4  # such parts for each process that are begun before the one whose turn it is has been taken


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The kind of processor that computes, as the system names it."""
    system = Path("/proc/cpuinfo")  # Linux; elsewhere the architecture must do
    names = re.findall(r"model name\s*: (.+)", system.read_text()) if system.exists() else []
    return names[0] if names else platform.machine()


def thread_pool() -> ThreadPoolExecutor:
    """A pool of one thread for each processor, eight at most."""
    return ThreadPoolExecutor(min(MOST, cores()))


def side_by_side(
    function: Callable[[Item], Result], items: Collection[Item], workers: int | None = None
) -> Iterator[Result]:
    """``function`` of each item, in their order: many items in processes, few in threads of this one.

    ``workers``: how many of them, by default one for each processor, eight at most; one works here without either.
    ``function`` and the items must be picklable. MedSoftError if a process is killed.
    """
    workers = workers or min(MOST, cores())
    if workers == 1:
        yield from map(function, items)
        return
    if len(items) >= FEW:
        yield from in_processes(function, items, workers=workers, what="reading", chunk=CHUNK)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted command does not read the rest


def in_processes(
    function: Callable[..., Result], *items: Collection[Any], workers: int, what: str, chunk: int = 1
) -> Iterator[Result]:
    """``function`` of the items, as ``map`` takes them, in their order, in ``workers`` processes.

    Ctrl+C and SIGTERM are for this process, which ends the others; so does its death. MedSoftError, naming ``what``,
    if one of them is killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would keep this process's locks when it is killed
    pool = ProcessPoolExecutor(workers, context, _end_with_parent)
    try:
        rows, waiting = zip(*items, strict=True), deque[Future[list[Result]]]()
        while part := list(islice(rows, chunk)):
            with _without_interrupts():  # as a process may start that inherits this
                waiting.append(pool.submit(_each, function, part))
            if len(waiting) > AHEAD * workers:  # what is not asked for yet does not fill the memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        time.sleep(0.2)  # what signals every process of a job has then reached this one too, which ends by that
        reason = f"a process of the {what} was killed (is there enough memory?)"
        raise MedSoftError(f"{reason}; run the same command again to go on") from error
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted command does not do the rest


def _each(function: Callable[..., Result], rows: Sequence[tuple[Any, ...]]) -> list[Result]:
    return [function(*row) for row in rows]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl+C waits until the block has ended, on systems that can do that."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a process of the pool: leave Ctrl+C to the parent, and end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
