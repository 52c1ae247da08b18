"""Batches of tasks drawn, judged where that is asked for, and written; the next batch is read while the model works."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ldm.config import DataConfig
from ldm.core.files import Contents
from ldm.core.tables import counted
from ldm.data.preparation import PreparedSample
from ldm.data.samples import Reject, Sample
from ldm.inference.inpainter import InpaintedImage, Job
from ldm.inference.preparing import Preparation, PreparedTask
from ldm.inference.results import FolderResults, NotAccepted, Result, read_refused, result_of, write_refused
from ldm.inference.tars import TarResults
from ldm.inference.tasks import Task
from ldm.networks.encoder import ImageTextEncoder

FURTHER = 1_000_000  # from the seed of one try to that of the next: runs with --seed 0, 1, ... share no image


class BatchMaker(Protocol):
    """Makes a batch of images in two halves, as ``Inpainter`` does."""

    def begin(self, samples: Sequence[PreparedSample], jobs: Sequence[Job]) -> list[Callable[[], InpaintedImage]]:
        """See ``Inpainter.begin``."""
        ...


class Verdict(NamedTuple):
    """What a check says of a drawn image: its numbers by name, and, by the same names, what is wrong, in words."""

    values: Mapping[str, Any]
    failures: Mapping[str, str]


class Check(Protocol):
    """Judges drawn images; ``thresholds``: by what, for check.json."""

    thresholds: dict[str, Any]

    def __call__(self, results: Sequence[tuple[Result, PreparedSample]]) -> list[Verdict]:
        """A verdict on each result, which was drawn into what stands beside it."""
        ...


class Checks(Protocol):
    """What is asked of drawn images before the model is there."""

    @property
    def tries(self) -> int:
        """How often each task is drawn at most."""
        ...

    def training_lesions(
        self, groups: Sequence[Mapping[str, Any]], source: object
    ) -> tuple[list[Sample], list[Reject]]:
        """The real lesions that thresholds come from, of patients that ``source``, with its ``groups``, has seen; and
        what cannot be read."""
        ...

    def settings(self, lesions: Sequence[Sample]) -> dict[str, Any]:
        """What decides the verdicts, for a run's identity."""
        ...

    def start(
        self, lesions: Sequence[Sample], rejects: Sequence[Reject], encoder: ImageTextEncoder, data: DataConfig
    ) -> Check:
        """The check, once there is an encoder; of ``rejects`` it is said that they set no thresholds."""
        ...


@dataclass
class Round:
    """What one round over the tasks leaves: rejects of tasks, and the names of the tasks to draw again."""

    rejects: list[tuple[Task, Reject]] = field(default_factory=list)
    again: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Drawing:
    """Draws tasks with ``inpainter`` and writes into ``results``; ``provenance``, ``content``: see ``result_of``.

    With a ``check`` only what that accepts is written. The rest is drawn again with the same prompt and another seed:
    with other noise, and in another mask where that is made. What is not accepted in ``tries`` is rejected. What was
    not accepted is kept in the folder, so that a command that goes on with the run does not draw it once more.
    """

    inpainter: BatchMaker
    prepare: Preparation
    results: FolderResults | TarResults
    provenance: dict[str, Any]
    content: Contents
    batch_size: int
    check: Check | None = None
    tries: int = 1

    def __call__(self, tasks: Sequence[Task], done: Callable[[int], object]) -> list[Reject]:
        """Draw all of them and return the rejects; ``done`` is told how many more have come to their end."""
        # By the task's name: the seeds that were not accepted, and why.
        refused = {task.name: read_refused(self.results.path, task.name) if self.check else [] for task in tasks}
        rejects: list[Reject] = []
        never: list[Task] = []
        with ThreadPoolExecutor(4) as pool:
            while tasks:
                never += [task for task in tasks if len(refused[task.name]) >= self.tries]
                tasks = [task for task in tasks if len(refused[task.name]) < self.tries]
                seeds = [task.seed + len(refused[task.name]) * FURTHER for task in tasks]
                seeded = [dataclasses.replace(task, seed=seed) for task, seed in zip(tasks, seeds, strict=True)]
                left = self._round(pool, seeded, refused, done)
                rejects += [_with_tries(reject, refused[task.name]) for task, reject in left.rejects]
                tasks = [task for task in tasks if task.name in left.again]
        done(len(never))
        return rejects + [_not_accepted(task, refused[task.name]) for task in never]

    def _round(
        self,
        pool: ThreadPoolExecutor,
        tasks: Sequence[Task],
        refused: dict[str, list[dict[str, Any]]],
        done: Callable[[int], object],
    ) -> Round:
        """Draw each task once; ``refused`` gets what is not accepted.

        The last batch is written, and judged, while the model works on the next one.
        """
        size, left = self.batch_size, Round()
        batches = [tasks[first : first + size] for first in range(0, len(tasks), size)]

        def settle(waiting: list[tuple[Task, Future]]) -> None:
            """Wait until a batch is written, note its rejects, and what is to be drawn again."""
            made = [(task, future.result()) for task, future in waiting]
            left.rejects.extend((task, each) for task, each in made if isinstance(each, Reject))
            found = [each for _, each in made if isinstance(each, tuple)]
            if self.check and found:
                left.again.update(self._judged(self.check, pool, found, refused))

        before: list[tuple[Task, Future]] = []
        for batch, prepared in _ahead(pool, self.prepare, batches):
            sound = [each for each in prepared if not isinstance(each, Reject)]
            jobs = [Job(task.seed, task.sample.sample_id, task.variant, task.prompt) for task, _ in sound]
            begun = self.inpainter.begin([sample for _, sample in sound], jobs) if sound else []
            count = len(left.again)
            settle(before)
            before = [(one[0], pool.submit(self._made, *one, finish)) for one, finish in zip(sound, begun, strict=True)]
            failed = [(task, each) for task, each in zip(batch, prepared, strict=True) if isinstance(each, Reject)]
            left.rejects.extend(failed)
            done(len(batch) - (len(left.again) - count))
        count = len(left.again)
        settle(before)
        done(count - len(left.again))
        return left

    def _made(
        self, task: Task, sample: PreparedSample, finish: Callable[[], InpaintedImage]
    ) -> tuple[Result, PreparedSample] | Reject | None:
        """What ``finish`` makes, written if nobody judges it, or why there is nothing. Runs in another thread."""
        image = finish()
        if image.pixels is None:
            reason = f"variant {task.variant}: {image.error}; nothing was written"
            return Reject(task.sample.sample_id, task.sample.image, reason)
        result = result_of(self.results.path, task, sample, image.pixels, self.provenance, self.content)
        if self.check:
            return result, sample
        self.results.write(result)
        return None

    def _judged(
        self,
        check: Check,
        pool: ThreadPoolExecutor,
        found: Sequence[tuple[Result, PreparedSample]],
        refused: dict[str, list[dict[str, Any]]],
    ) -> set[str]:
        """Write what ``check`` accepts, with its record. Returns the names of the other tasks."""
        accepted, again = [], set()
        for (result, _), verdict in zip(found, check(found), strict=True):
            task = result.task
            before = refused[task.name]
            if verdict.failures:
                before.append({"seed": task.seed, "reasons": dict(verdict.failures)})
                write_refused(self.results.path, task.name, before)
                again.add(task.name)
                continue
            record = {"try": len(before) + 1, "values": dict(verdict.values), "rejected": before}
            accepted.append(dataclasses.replace(result, metadata={**result.metadata, "check": record}))
        list(pool.map(self.results.write, accepted))
        return again


def _not_accepted(task: Task, tries: Sequence[Mapping[str, Any]]) -> Reject:
    texts = ["; ".join(f"{name} {text}" for name, text in each["reasons"].items()) for each in tries]
    said = ", then ".join(texts[-1:] if len(set(texts)) == 1 else texts)
    reason = f"variant {task.variant}: not accepted in {counted(len(tries), 'try', 'tries')}: {said}"
    return _with_tries(Reject(task.sample.sample_id, task.sample.image, reason), tries)


def _with_tries(reject: Reject, tries: Sequence[Mapping[str, Any]]) -> Reject:
    """The reject of a task some of whose drawings were not accepted, with what these did not meet."""
    if not tries:
        return reject
    return NotAccepted(reject.sample_id, reject.file, reject.reason, tuple(tuple(each["reasons"]) for each in tries))


def _ahead(
    pool: ThreadPoolExecutor, prepare: Preparation, batches: Sequence[Sequence[Task]]
) -> Iterator[tuple[Sequence[Task], list[PreparedTask | Reject]]]:
    """Each batch with what ``prepare`` made of it; the next batch is prepared while the caller works on this one."""
    coming = [pool.submit(prepare, task) for task in batches[0]] if batches else []
    for batch, after in zip(batches, [*batches[1:], []], strict=False):  # one more where there is no batch
        current, coming = coming, [pool.submit(prepare, task) for task in after]
        yield batch, [future.result() for future in current]
