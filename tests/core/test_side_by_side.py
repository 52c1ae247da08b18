"""Many items in processes, few in threads: the same results in the same order, and one line when a process is lost."""

import os
import signal

import pytest

from ldm.core.errors import MedSoftError
from ldm.core.threads import FEW, side_by_side


def squared(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def lost(number: int) -> int:
    if number == 700:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def failing(number: int) -> int:
    if number == 5:
        raise MedSoftError("number 5: is wrong")
    return number


@pytest.mark.parametrize(("count", "workers", "apart"), [(50, 2, False), (FEW, 2, True), (FEW, 1, False)])
def test_results_come_in_the_order_of_the_items(count: int, workers: int, apart: bool) -> None:
    found = list(side_by_side(squared, range(count), workers))
    assert [result for result, _ in found] == [number * number for number in range(count)]
    assert (os.getpid() not in {process for _, process in found}) == apart


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(MedSoftError, match=r"^a process of the reading was killed \(is there eno"):
        list(side_by_side(lost, range(FEW), 2))


@pytest.mark.parametrize("count", [50, FEW])
def test_an_error_of_one_item_is_raised_as_it_is(count: int) -> None:
    with pytest.raises(MedSoftError, match=r"^number 5: is wrong$"):
        list(side_by_side(failing, range(count), 2))
