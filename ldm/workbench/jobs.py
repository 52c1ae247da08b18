"""The model, loaded beside the server, and a queue of drawings in one thread; each can be watched and cancelled."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ldm.core.errors import MedSoftError, UsageError, first_line

log = logging.getLogger(__name__)

WAITING = 16  # drawings that may wait
REMEMBERED = 64  # jobs that are done and can still be asked for
ENDED = ("done", "cancelled", "failed")
LONGEST_STEP = 60.0  # seconds that a stop waits for a sampling step, or a file, that was begun

Model = TypeVar("Model")


class Cancelled(Exception):
    """Raised between two sampling steps of a job that somebody has cancelled."""


@dataclass
class QueuedJob:
    """One request to draw ``images`` pictures, and how far it is: the image, from 0, and its sampling steps."""

    id: str
    document: str
    images: int
    steps: int
    state: str = "queued"
    image: int = 0
    step: int = 0
    error: str | None = None
    results: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def on_step(self, step: int) -> None:
        """Note a step; raises Cancelled where the job is to end."""
        self.step = step
        self.check()

    def check(self) -> None:
        """Raises Cancelled where the job is to end."""
        if self.stop.is_set():
            raise Cancelled

    def told(self) -> dict[str, Any]:
        """What the page is told of it."""
        names = ("id", "document", "state", "image", "images", "step", "steps", "error")
        return {name: getattr(self, name) for name in names} | {"results": list(self.results)}


class Queue(Generic[Model]):
    """Loads a model with ``load`` in a thread of its own and runs jobs there, one after the other."""

    def __init__(self, load: Callable[[], Model], loaded: Callable[[Model], str] = lambda model: "") -> None:
        """``loaded``: what is logged of the model once it is there, if anything."""
        self.model: Model | None = None
        self.error: str | None = None
        self._load, self._about, self._loaded = load, loaded, threading.Event()
        self._jobs: OrderedDict[str, QueuedJob] = OrderedDict()
        self._waiting: deque[tuple[QueuedJob, Callable[[Model, QueuedJob], None]]] = deque()
        self._wake = threading.Condition()
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """Of the model: loading, ready or failed."""
        return "failed" if self.error else "ready" if self._loaded.is_set() else "loading"

    def wait(self) -> Model:
        """The model, once it is there. MedSoftError with the reason where it cannot be loaded."""
        self._loaded.wait()
        if self.model is None:
            raise MedSoftError(self.error or "the server is being stopped")
        return self.model

    def put(self, job: QueuedJob, work: Callable[[Model, QueuedJob], None]) -> QueuedJob:
        """Have ``work`` done after what is waiting already. UsageError where too much is waiting, or no model is."""
        if self.error:
            raise MedSoftError(self.error)
        with self._wake:
            if len(self._waiting) >= WAITING:
                raise UsageError(
                    f"{WAITING} drawings are waiting already; try again when some are done, or cancel some"
                )
            self._jobs[job.id] = job
            for old in [name for name, each in self._jobs.items() if each.state in ENDED][:-REMEMBERED]:
                del self._jobs[old]
            self._waiting.append((job, work))
            self._wake.notify()
        return job

    def get(self, name: str) -> QueuedJob | None:
        """The job with this id."""
        return self._jobs.get(name)

    def current(self) -> QueuedJob | None:
        """The job that is running, or else the next one."""
        with self._wake:
            going = [job for job in self._jobs.values() if job.state not in ENDED]
        return next((job for job in going if job.state == "running"), going[0] if going else None)

    def cancel(self, job: QueuedJob) -> None:
        """End a job, between two sampling steps if it is running. What it has drawn stays."""
        job.stop.set()
        with self._wake:
            if job.state == "queued":
                job.state = "cancelled"
                self._waiting = deque(each for each in self._waiting if each[0] is not job)

    def stop(self) -> None:
        """Begin to end all jobs, the running one between two sampling steps."""
        with self._wake:
            self.closed = True
            for job in self._jobs.values():
                job.stop.set()
            self._wake.notify()

    def close(self) -> None:
        """End all jobs and the thread, unless that loads the model still, of which nothing is lost and nothing told."""
        self.stop()
        if self._loaded.is_set():
            self._thread.join(LONGEST_STEP)

    def _run(self) -> None:
        try:
            self.model = self._load()
        except Exception as error:  # a thread has nobody to tell but the page and the terminal
            self.error = _line(error)
        with self._wake:
            if not self.closed:  # else whoever closed it has not waited, and the log's stream may be gone
                self._tell()
        self._loaded.set()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self.closed)
                if self.closed:
                    return
                job, work = self._waiting.popleft()
            self._do(job, work)

    def _tell(self) -> None:
        if self.error:
            log.error("error: %s", self.error)
        elif self.model is not None and (about := self._about(self.model)):
            log.info("%s", about)

    def _do(self, job: QueuedJob, work: Callable[[Model, QueuedJob], None]) -> None:
        try:
            job.check()
            if self.model is None:
                raise MedSoftError(self.error or "there is no model")
            job.state = "running"
            work(self.model, job)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except Exception as error:
            job.error = _line(error)
            job.state = "failed"
            log.error("error: %s", job.error)


def _line(error: Exception) -> str:
    return str(error) if isinstance(error, MedSoftError) else f"{type(error).__name__}: {first_line(error)}"
