"""The queue of drawings: one after the other, watched, cancelled between two steps, and what failed said once."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest

from ldm.core.errors import MedSoftError, UsageError
from ldm.workbench import jobs
from ldm.workbench.jobs import Queue, QueuedJob

Work = Callable[[str, QueuedJob], None]


class Steps:
    """Work of three steps, each of which waits until the test lets it go on."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Semaphore(0)

    def __call__(self, model: str, job: QueuedJob) -> None:
        assert model == "a model"
        for step in range(1, 4):
            self.begun.set()
            assert self.go.acquire(timeout=10)
            job.on_step(step)
        job.results.append("drawn")


@contextmanager
def queue(load: Callable[[], str] = lambda: "a model") -> Iterator[Queue[str]]:
    made = Queue(load)
    try:
        yield made
    finally:
        made.close()


def job(name: str) -> QueuedJob:
    return QueuedJob(name, "a document", images=1, steps=3)


def ended(made: QueuedJob) -> str:
    """Its state, once it has one that stays."""
    waiting = threading.Event()
    for _ in range(1000):
        if made.state in jobs.ENDED:
            break
        waiting.wait(0.01)
    return made.state


def test_one_job_after_the_other_and_each_says_how_far_it_is() -> None:
    first, work = job("first"), Steps()
    with queue() as made:
        made.put(first, work)
        second = made.put(job("second"), lambda model, job: None)
        assert work.begun.wait(10)
        assert (first.state, second.state, made.current()) == ("running", "queued", first)
        work.go.release(3)
        assert ended(first) == ended(second) == "done"
        assert first.told() | {"step": 3, "state": "done", "results": ["drawn"]} == first.told()
        assert made.current() is None


def test_a_job_ends_between_two_steps_and_one_that_waits_at_once() -> None:
    first, second, work = job("first"), job("second"), Steps()
    with queue() as made:
        made.put(first, work)
        made.put(second, work)
        assert work.begun.wait(10)
        made.cancel(second)
        assert second.state == "cancelled"
        made.cancel(first)
        work.go.release()
        assert ended(first) == "cancelled"
        assert (first.step, first.results) == (1, [])
        third = made.put(job("third"), lambda model, job: None)
        assert ended(third) == "done"  # the queue goes on


def test_what_fails_is_said_and_the_next_job_is_done() -> None:
    def full(model: str, job: QueuedJob) -> None:
        raise MedSoftError("drafts/a: could not be written (No space left on device)")

    with queue() as made:
        first = made.put(job("first"), full)
        second = made.put(job("second"), lambda model, job: None)
        assert (ended(first), ended(second)) == ("failed", "done")
        assert first.error == "drafts/a: could not be written (No space left on device)"


def test_a_model_that_cannot_be_loaded_is_said_to_whoever_asks() -> None:
    def load() -> str:
        raise MedSoftError("last.ckpt: is of another size")

    with queue(load) as made:
        with pytest.raises(MedSoftError, match="another size"):
            made.wait()
        assert (made.state, made.error) == ("failed", "last.ckpt: is of another size")
        with pytest.raises(MedSoftError, match="another size"):
            made.put(job("first"), lambda model, job: None)


def test_a_stop_ends_what_is_drawn_between_two_steps_and_waits_for_the_step() -> None:
    first, second, work = job("first"), job("second"), Steps()
    with queue() as made:
        made.put(first, work)
        made.put(second, work)
        assert work.begun.wait(10)
        made.stop()  # returns at once, while the step is going on
        assert (first.state, first.stop.is_set(), second.stop.is_set()) == ("running", True, True)
        work.go.release()
        made.close()
        assert (first.state, first.step, first.results) == ("cancelled", 1, [])


def test_a_stop_does_not_wait_for_a_model_that_is_being_loaded() -> None:
    begun, end = threading.Event(), threading.Event()

    def load() -> str:
        begun.set()
        assert end.wait(10)
        return "a model"

    made = Queue(load)
    assert begun.wait(10)
    made.close()
    assert made.state == "loading"
    end.set()
    assert made.wait() == "a model"


def test_a_loading_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = Queue(lambda: "a model", "{} is loaded".format)
    made.wait()
    made.close()
    assert caplog.messages == ["a model is loaded"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_loading_that_a_stop_has_not_waited_for_is_told_to_nobody(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The log's stream may be closed by then."""
    caplog.set_level(logging.INFO)
    begun, end = threading.Event(), threading.Event()

    def load() -> str:
        begun.set()
        assert end.wait(10)
        if fails:
            raise MedSoftError("last.ckpt: is of another size")
        return "a model"

    made = Queue(load, "{} is loaded".format)
    assert begun.wait(10)
    made.close()
    end.set()
    with pytest.raises(MedSoftError, match="another size") if fails else nullcontext():
        made.wait()
    assert caplog.messages == []


def test_too_many_waiting_jobs_are_refused_and_old_ones_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WAITING", 2)
    monkeypatch.setattr(jobs, "REMEMBERED", 3)
    work = Steps()
    with queue() as made:
        first = made.put(job("first"), work)
        assert work.begun.wait(10)
        waiting = [made.put(job(name), lambda model, job: None) for name in ("second", "third")]
        with pytest.raises(UsageError, match="2 drawings are waiting already"):
            made.put(job("fourth"), lambda model, job: None)
        made.cancel(waiting[0])  # as the line says
        waiting = [waiting[1], made.put(job("fifth"), lambda model, job: None)]
        work.go.release(3)
        assert [ended(each) for each in (first, *waiting)] == ["done"] * 3
        for k in range(4):
            assert ended(made.put(job(f"later{k}"), lambda model, job: None)) == "done"
        assert made.get("first") is None
        assert made.get("later3") is not None
