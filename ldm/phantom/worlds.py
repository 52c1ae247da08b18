"""Worlds of phantoms: what their lesions look like, what sentences say of them, and what a scanner makes of the images.

A world changes one thing of the standard one, which a part of the method answers to (docs/worlds.md). Patients are the
same in all of them: one name is one spine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from ldm.core.errors import UsageError
from ldm.core.files import named_seed
from ldm.phantom.findings import SHAPES, draw_ramped, draw_shaped
from ldm.phantom.lesions import LESION_TYPES, Body, Lesion, draw_lesion

STANDARD = "standard"
TYPED = 0.2  # share of the sentences of the world `elsewhere` that name the type
_TEMPLATES = (
    "a {severity} {finding} in the {level} vertebral body",
    "{severity} {finding} of the {level} vertebra",
    "sagittal view of {level} with a {severity} {finding}",
    "the {level} vertebral body shows a {severity} {finding}",
)
_UNTYPED = (
    "a lesion of {level}",
    "a lesion in the {level} vertebral body",
    "sagittal view of {level} with a lesion",
    "the {level} vertebral body shows a lesion",
)
# Names of the four kinds. No word is one of the plain ones that the phantom base has seen (ldm.phantom.shapes).
_NAMES = {
    "osteolytic": """osteolytic lytic lucent destructive punched-out radiolucent rarefying erosive hypodense cavitary
        resorptive moth-eaten""",
    "osteoblastic": """osteoblastic blastic sclerotic dense radiodense hyperdense ivory eburnated bone-forming
        condensing productive opaque""",
    "salt-and-pepper": """salt-and-pepper mottled mixed granular stippled dappled patchy flecked grainy variegated
        heterogeneous pepper-pot""",
    "haemangioma": """haemangioma vascular angiomatous striated corduroy jail-bar polka-dot honeycomb trabeculated
        columnar cavernous venous""",
}
SYNONYMS = {lesion_type: tuple(names.split()) for lesion_type, names in _NAMES.items()}

Draw = Callable[[np.random.Generator, str, str, np.ndarray, Body], Lesion]
Say = Callable[[np.random.Generator, str, str, str], str]


def lesion_prompt(lesion_type: str, severity: str, level: str, variant: int) -> str:
    """The lesion in words; ``variant`` chooses the wording (any integer)."""
    own_noun = lesion_type in SHAPES and lesion_type not in LESION_TYPES
    finding = lesion_type if own_noun else f"{lesion_type} lesion"
    return _TEMPLATES[variant % len(_TEMPLATES)].format(finding=finding, severity=severity, level=level)


def _say_all(rng: np.random.Generator, lesion_type: str, severity: str, level: str) -> str:
    return lesion_prompt(lesion_type, severity, level, int(rng.integers(len(_TEMPLATES))))


def _say_little(rng: np.random.Generator, lesion_type: str, severity: str, level: str) -> str:
    """Mostly only that there is a lesion."""
    if rng.random() < TYPED:
        return _say_all(rng, lesion_type, severity, level)
    return _UNTYPED[rng.integers(len(_UNTYPED))].format(level=level)


def _say_otherwise(rng: np.random.Generator, lesion_type: str, severity: str, level: str) -> str:
    """One of the type's names, all equally likely."""
    return _say_all(rng, SYNONYMS[lesion_type][rng.integers(len(SYNONYMS[lesion_type]))], severity, level)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


class Scanner(TypedDict, total=False):
    """What of the acquisition is the patient's own: fields of a spine."""

    blur: float
    sharp: float
    reach: int
    noise: float
    grain: float
    gain: float
    offset: float


def _scanners(rng: np.random.Generator) -> Scanner:
    """A scanner of the patient's own: soft or sharp, clean or noisy, of low or high contrast."""
    blur = rng.uniform(0.4, 1.6)
    return {
        "blur": blur,
        "reach": max(2, math.ceil(2.2 * blur)),
        "noise": _log_uniform(rng, 0.008, 0.07),
        "grain": rng.uniform(0.8, 1.9),
        "gain": _log_uniform(rng, 0.6, 1.6),
        "offset": rng.normal(0, 0.08),
    }


def _second_scanner(rng: np.random.Generator) -> Scanner:
    """One that no patient of the world `scanner` has seen: edges enhanced, low contrast, fine and strong noise."""
    return {
        "blur": rng.uniform(0.5, 0.7),
        "sharp": rng.uniform(0.8, 1.3),
        "reach": 4,
        "noise": rng.uniform(0.035, 0.06),
        "grain": 0.7,
        "gain": rng.uniform(0.4, 0.55),
        "offset": rng.normal(0.08, 0.03),
    }


@dataclass(frozen=True)
class World:
    """What sets a world apart.

    ``draw`` and ``say`` take (rng, lesion type, severity, ...) and give a lesion in a body, and a sentence about one
    of a level. ``signs``: every patient shows a disease in other vertebrae, whose lesion the target has or not.
    """

    name: str
    lesion_types: tuple[str, ...] = LESION_TYPES
    draw: Draw = draw_lesion
    say: Say = _say_all
    scanner: Callable[[np.random.Generator], Scanner] | None = None
    signs: bool = False

    @property
    def same_images(self) -> bool:
        """Whether the images are those of the standard world."""
        return self.draw is draw_lesion and not self.scanner and not self.signs

    def sign_of(self, seed: int, index: int, lesion_type: str | None) -> str | None:
        """The type that the patient ``index`` shows elsewhere: its lesion's; a healthy target says nothing of it."""
        if not self.signs:
            return None
        rng = np.random.default_rng(named_seed("phantom disease", seed, index))
        return lesion_type or self.lesion_types[rng.integers(len(self.lesion_types))]


WORLDS = {
    world.name: world
    for world in (
        World(STANDARD),
        World("edge", draw=draw_ramped),
        World("elsewhere", say=_say_little, signs=True),
        World("words", say=_say_otherwise),
        World("shape", lesion_types=SHAPES, draw=draw_shaped),
        World("scanner", scanner=_scanners),
        World("second_scanner", scanner=_second_scanner),
    )
}


def world_of(name: str) -> World:
    """The world of this name; UsageError for another."""
    if name not in WORLDS:
        raise UsageError(f"world: expected one of {', '.join(WORLDS)}, found {name!r}")
    return WORLDS[name]


def named(world: str) -> dict[str, str]:
    """What a record says of the world: nothing of the standard one, as when there were no others."""
    return {} if world == STANDARD else {"world": world}
