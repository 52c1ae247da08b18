"""A sample, a sample that cannot be used, and what the values of ``meta.json`` may be."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.core.schema import Rule

HEALTHY = "healthy"
META_TEXTS = ("patient_id", "parent_id", "lesion_type", "level", "severity")


@dataclass(frozen=True)
class Sample:
    """One image with its mask and prompt. Paths are absolute; ``box`` is x, y, w, h as fractions of the image."""

    sample_id: str
    image: Path
    mask: Path | None
    prompt: str
    box: tuple[float, float, float, float]
    patient_id: str
    anatomy: Path | None = None
    soft_mask: Path | None = None
    parent_id: str | None = None
    lesion_type: str | None = None
    level: str | None = None
    severity: str | None = None
    synthetic: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether the prompt is the word ``healthy``."""
        return self.prompt.strip().lower() == HEALTHY

    @property
    def files(self) -> tuple[Path | None, ...]:
        """Every file that it is read from; None for one that it does not have."""
        return self.image, self.mask, self.soft_mask, self.anatomy


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used: its id, the file at fault (as the user named its folder) and the reason."""

    sample_id: str
    file: Path
    reason: str

    def __str__(self) -> str:
        return shown(f"{self.file}: {self.reason}")


def shown(text: object) -> str:
    """``text`` on one printable line, whatever characters a folder name contains."""
    text = str(text)
    return text if text.isprintable() else ascii(text)[1:-1]


def wrong_value(
    values: Mapping[str, Any], rules: Mapping[str, Rule], required: Sequence[str] = ()
) -> tuple[str, str] | None:
    """The first key whose value breaks its rule, and what was expected and found there.

    Null and empty text are as good as no key, which is wrong for the keys ``required`` only.
    """
    for key, rule in rules.items():
        value = values.get(key)
        if key in required if value in (None, "") else not rule.holds(value):
            found = f"{value!r}"[:80] if key in values else "nothing"
            return key, f"expected {rule.expected}, found {found}"
    return None


def text_of(value: str | int | None) -> str | None:
    """An id or a class as text without spaces around it; None if nothing is left."""
    return None if value is None else str(value).strip() or None


def is_number(value: Any) -> bool:
    """True for a finite int or float; JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_spacing(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) in (1, 2) and all(is_number(number) and number > 0 for number in numbers)


def _is_window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] < value[1]


def is_trained_on(value: Any) -> bool:
    """True for groups of digests as ``ldm.data.checks.trained_on`` makes them."""

    def texts(found: Any) -> bool:
        return isinstance(found, list) and all(isinstance(each, str) for each in found)

    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("salt"), str)
        and texts(group.get("steps"))
        and texts(group.get("patients"))
        for group in value
    )


def is_box(value: Any) -> bool:
    """True for [x, y, w, h], fractions inside an image."""
    numbers = isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
    return numbers and min(value) >= 0 and value[0] + value[2] <= 1 + 1e-6 and value[1] + value[3] <= 1 + 1e-6


META_RULES = {
    **dict.fromkeys(
        META_TEXTS, Rule(lambda value: isinstance(value, (str, int)) and not isinstance(value, bool), "text")
    ),
    "synthetic": Rule(lambda value: isinstance(value, bool), "true or false"),
    "spacing_mm": Rule(_is_spacing, "one or two positive numbers"),
    "window": Rule(_is_window, "two numbers [low, high] with low < high"),
    "trained_on": Rule(is_trained_on, "a list of {salt, steps, patients}, as results have it"),
}
