"""Worlds of a study side by side: a process for each, its words in a log file of its own. No torch."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import MedSoftError
from ldm.core.paths import ROOT, shipped
from ldm.core.threads import cores
from ldm.workflow.plan_run import stop_all
from ldm.workflow.plans import DONE_CODES

LOOKS = 0.2  # seconds between two looks at the processes
SHOWN_LINES = 3  # of a failed world's log
PR_SET_PDEATHSIG = 1  # of prctl(2)


class WorldProcess:
    """One world of the study in a process of its own."""

    def __init__(self, world: str, words: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.world, self.log, self.start = world, log, time.monotonic()
        self.skip = log.stat().st_size if log.exists() else 0
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                # A process group of its own: Ctrl-C reaches it once, from here.
                call, ending = [sys.executable, *words], _ends_with(os.getpid())
                self.process = subprocess.Popen(
                    call, env=environment, stdout=file, stderr=file, process_group=0, preexec_fn=ending
                )
        except OSError as error:
            raise MedSoftError(f"{log}: could not be written ({error.strerror or error})") from error

    def report(self, code: int) -> None:
        """Say how it ended; of a failure also the end of its log."""
        if code in DONE_CODES:
            rejected = " (some inputs were rejected)" if code == cli.SOME_REJECTED else ""
            print(f"{self.world} ... done in {time.monotonic() - self.start:.0f} s{rejected}", flush=True)
            return
        said = self.log.read_bytes()[self.skip :].decode("utf-8", "replace").splitlines()[-SHOWN_LINES:]
        print(f"error: {self.world} failed (exit code {code}); {self.log} ends with:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in said), file=sys.stderr, flush=True)


def _ends_with(parent: int) -> Callable[[], None] | None:
    """What a new process calls to get SIGTERM when ``parent`` is no more, even if that was killed; Linux only."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # opened here: little may be done between fork and exec

    def ask() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before this process could ask
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def run_side_by_side(path: Path, output_dir: str, worlds: Iterable[str], jobs: int, overwrite: bool) -> int:
    """Run so many worlds of a study at a time; 0, 3 if inputs were rejected, or the code of the first that failed.

    Each gets its share of the processors as threads, unless OMP_NUM_THREADS is set. After a failure the worlds that
    run end, and no other begins. A signal that ends this process ends them first; on Linux SIGKILL ends them, too.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    waiting = list(worlds)
    running: list[WorldProcess] = []
    codes: list[int] = []
    try:
        while running or (waiting and all(code in DONE_CODES for code in codes)):
            while waiting and len(running) < jobs and all(code in DONE_CODES for code in codes):
                world = waiting.pop(0)
                log = ROOT / output_dir / f"{world}.log"
                words = [str(shipped(ROOT / "tool/study.py")), str(path), "--worlds", world]
                words += ["--overwrite"] if overwrite else []
                running.append(WorldProcess(world, words, log, {**threads, **os.environ}))
                print(f"--- {world}: running, its log is {log}", flush=True)
            time.sleep(LOOKS)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                code = each.process.returncode
                codes.append(code if code >= 0 else 128 - code)
                each.report(codes[-1])
    except (KeyboardInterrupt, cli.Terminated) as stop:
        stop_all([each.process for each in running], stop)
        raise
    failed = [code for code in codes if code not in DONE_CODES]
    return failed[0] if failed else max(codes, default=cli.DONE)
