"""Reading, drawing and writing at the same time: nobody waits for more than the batch before."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny import TRAIN, infer, metas

import ldm.inference.inpainter
from ldm.inference.inpainter import InpaintedImage, Inpainter
from ldm.inference.results import FolderResults, Result

SECONDS = 120  # then what is waited for is taken never to come


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[threading.Event]:
    """Four events: the drawing of that batch has been begun."""
    events = [threading.Event() for _ in range(4)]
    plain, count = Inpainter.begin, iter(events)

    def begin(self: Inpainter, samples: Sequence, jobs: Sequence) -> list[Callable[[], InpaintedImage]]:
        next(count).set()
        return plain(self, samples, jobs)

    monkeypatch.setattr(Inpainter, "begin", begin)
    return events


def draw(final: Path, output: Path, world: Path) -> None:
    """Four diseased samples, one at a time."""
    given = ["--data", world / TRAIN, "--train_json", world / TRAIN, "--choose", "diseased", "--batch_size", 1]
    assert infer(final, output, *given) == 0
    assert len(metas(output)) == 4


def test_drawing_does_not_wait_for_the_writing_of_the_batch_before(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[threading.Event]
) -> None:
    """Each result is written only after the next batch has begun, and before the one after that does."""
    plain, written = FolderResults.write, []

    def late(self: FolderResults, result: Result) -> None:
        number = len(written)
        if number < 3:
            assert begun[number + 1].wait(SECONDS), "the next batch was not begun while this result was being written"
        assert number >= 2 or not begun[number + 2].is_set(), "drawing runs ahead of writing by more than a batch"
        plain(self, result)
        written.append(result.task.name)

    monkeypatch.setattr(FolderResults, "write", late)
    draw(final, tmp_path / "out", world)
    assert len(set(written)) == 4


def test_the_next_batch_is_handed_over_before_the_device_is_done_with_this_one(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[threading.Event]
) -> None:
    """A device that gives no result of a batch before it was given the next one, as a busy GPU may."""

    def slow(values: torch.Tensor) -> Callable[[], torch.Tensor]:
        number = sum(event.is_set() for event in begun)  # of the batch that follows

        def wait() -> torch.Tensor:
            assert number == 4 or begun[number].wait(SECONDS), "the host waits for the device"
            return values

        return wait

    monkeypatch.setattr(ldm.inference.inpainter, "on_host", slow)
    draw(final, tmp_path / "out", world)
