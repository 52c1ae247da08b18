"""What an interrupted run has left in a file to go on from: every entry is looked at before any of them is used.

Without that a missing key would be a traceback, and a tensor of another shape would be spread over the memory into
which it is copied.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ldm.checkpoints.fitting import not_finite
from ldm.core.errors import MedSoftError
from ldm.core.schema import Rule
from ldm.core.tables import shortened

WHOLE = Rule(lambda value: type(value) is int and value >= 0, "a whole number from 0 on")
NUMBER = Rule(lambda value: type(value) in (int, float) and math.isfinite(value), "a number")
POSITIVE = Rule(lambda value: NUMBER.holds(value) and value > 0, "a number above 0")
DICTIONARY = Rule(lambda value: isinstance(value, dict), "a dictionary")
STEPS = torch.zeros(())  # what AdamW counts with


def exactly(value: str | int) -> Rule:
    """No other value will do."""
    return Rule(lambda found: type(found) is type(value) and found == value, repr(value))


@dataclass(frozen=True)
class Unfinished:
    """The entries of a file; ``cure``: what to do about one that does not fit, the end of every message."""

    path: Path
    content: Mapping[str, Any]
    cure: str

    def entry(self, name: str, expected: Any) -> Any:
        """The entry ``name``; MedSoftError unless it is like ``expected``.

        That is a tensor, of whose shape and type it must be, and as finite; a Rule; None for no entry; or a dictionary
        of these, whose keys it must have, and no others.
        """
        return self.fitting(name, expected, self.content.get(name))

    def fitting(self, where: str, expected: Any, found: Any) -> Any:
        """``found``, which stands ``where`` in the file; MedSoftError unless it is like ``expected``, see ``entry``."""
        faults = list(_faults(where, expected, found))
        if faults:
            self.refuse(faults[0] + (f" (the first of {len(faults)} such entries)" if len(faults) > 1 else ""))
        return found

    def refuse(self, fault: str) -> NoReturn:
        """Raise MedSoftError for an entry that does not fit: where it is, what was expected, what was found."""
        raise MedSoftError(f"{self.path}: an interrupted run cannot go on from this file: {fault}; {self.cure}")

    def moments(
        self, where: str, found: Any, groups: Mapping[str | None, Sequence[Tensor]]
    ) -> dict[int, dict[str, Tensor]]:
        """The ``state`` of an AdamW of these ``groups`` of parameters by name, from what ``state_dict`` of one gave.

        Groups are known by their names, wherever they stand: the order in which a configuration lists them is
        nobody's promise. A parameter that never had a gradient has no entry.
        """
        self.fitting(where, DICTIONARY, found)
        state, listed = self.fitting(f"{where}[state]", DICTIONARY, found.get("state")), found.get("param_groups")
        rule = Rule(_is_list_of_groups, "a list of groups")
        self.fitting(f"{where}[param_groups]", rule, listed)
        numbers = {group.get("name"): group["params"] for group in listed}
        counts = [{name: len(members) for name, members in each.items()} for each in (groups, numbers)]
        if counts[0] != counts[1]:
            self.refuse(f"{where}[param_groups]: expected tensors by group {counts[0]}, found {counts[1]}")
        pairs = [pair for name, members in groups.items() for pair in zip(numbers[name], members, strict=True)]
        expected = {
            number: {"step": STEPS, "exp_avg": parameter, "exp_avg_sq": parameter}
            for number, parameter in pairs
            if number in state
        }
        self.fitting(f"{where}[state]", expected, state)
        for number, kept in state.items():
            if not WHOLE.holds(int(kept["step"])) or kept["step"] % 1:
                self.refuse(f"{where}[state][{number}][step]: expected {WHOLE.expected}, found {float(kept['step'])}")
        return {place: state[number] for place, (number, _) in enumerate(pairs) if number in state}


def _is_list_of_groups(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) and _is_group(each) for each in value)


def _is_group(group: Mapping[str, Any]) -> bool:
    params = group.get("params")
    named = isinstance(group.get("name"), str | None)
    return named and isinstance(params, list) and all(type(number) is int for number in params)


def _faults(where: str, expected: Any, found: Any) -> Iterator[str]:
    """What of ``found`` is not like ``expected``, one line each."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in {**expected, **found}:
            yield from _faults(f"{where}[{key}]", expected.get(key), found.get(key))
        return
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        same = expected.shape == found.shape and expected.dtype == found.dtype
        if same and not_finite({"": found}) and not not_finite({"": expected}):
            yield f"{where}: expected numbers, found NaN or infinite values"
    else:
        same = bool(expected.holds(found)) if isinstance(expected, Rule) else expected is found is None
    if not same:
        yield f"{where}: expected {_described(expected)}, found {_described(found)}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Rule):
        return value.expected
    if value is None:
        return "nothing"
    return "a dictionary" if isinstance(value, Mapping) else shortened(repr(value))
