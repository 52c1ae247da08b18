"""The sentences that the model was trained with, as menus, and what its encoders make of a new one."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ldm.core.tables import shortened
from ldm.data.samples import Sample, plain, prompt_fault
from ldm.inference.prompts import ImageFacts, agreeing
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.text_encoder import PromptReading, clip_reading

ANY_BONE = ImageFacts("L1", "lumbar", None)  # with which sentences are compared that differ in the vertebra alone
GRADES = ("subtle", "minimal", "mild", "slight", "moderate", "marked", "severe", "extreme")  # any other word comes last
Read = Callable[[str], PromptReading | None]  # how an encoder reads a prompt, where it says so
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Sentences:
    """Those of the diseased training samples that are no drawings."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        used = [sample for sample in samples if not sample.healthy and not sample.synthetic]
        self._by_prompt: dict[str, Sample] = {}
        self._by_form: dict[str, Sample] = {}
        for sample in used:
            self._by_prompt.setdefault(sample.prompt, sample)
            self._by_form.setdefault(_form(sample.prompt), sample)
        self._words = {word for sample in samples for word in _words(sample.prompt)}

    def menus(self) -> dict[str, Any]:
        """The types, severities and vertebrae there are, and each sentence once."""
        used = self._by_prompt.values()
        prompts = [
            {"prompt": each.prompt, "lesion_type": each.lesion_type, "severity": each.severity, "level": each.level}
            for each in used
        ]
        return {
            "types": sorted({each.lesion_type for each in used if each.lesion_type}),
            "severities": sorted({each.severity for each in used if each.severity}, key=_by_grade),
            "levels": sorted({each.level for each in used if each.level}, key=_along_the_spine),
            "prompts": prompts,
        }

    def source(self, prompt: str) -> Sample | None:
        """The training sample with this sentence, or with one that names another vertebra and says the same."""
        return self._by_prompt.get(prompt) or self._by_form.get(_form(prompt))

    def unknown(self, prompt: str) -> list[str]:
        """The words that no training sentence holds; none where there are no training sentences."""
        return [word for word in _WORD.findall(prompt) if plain(word) not in self._words] if self._words else []


def _form(prompt: str) -> str:
    return plain(agreeing(prompt, ANY_BONE) or prompt)


def _words(prompt: str) -> list[str]:
    return [plain(word) for word in _WORD.findall(prompt)]


def _by_grade(severity: str) -> tuple[int, str]:
    return (GRADES.index(plain(severity)) if plain(severity) in GRADES else len(GRADES), severity)


def _along_the_spine(level: str) -> tuple[int, int, str]:
    region, number = level[:1].upper(), re.sub(r"\D", "", level)
    return ("CTLS".find(region) if region in "CTLS" else 9, int(number or 0), level)


def encoders_of(max_length: int, encoder: ImageTextEncoder | None = None) -> list[tuple[str, Read]]:
    """The names of a model's text encoders, and how each reads a prompt; BiomedCLIP's once ``encoder`` is loaded.

    ``max_length``: of Stable Diffusion's, which is not needed itself.
    """
    found: list[tuple[str, Read]] = [("Stable Diffusion's text encoder", partial(clip_reading, max_length=max_length))]
    return [*found, ("BiomedCLIP", encoder.reading)] if encoder else found


def read_prompt(prompt: str, sentences: Sentences, encoders: Sequence[tuple[str, Read]]) -> dict[str, Any]:
    """What is told of a prompt: how many tokens it has, how many there may be, unknown words, and what is wrong.

    ``encoders``: their names, and how each reads a prompt; the first one's tokens are counted.
    """
    found = {name: reading for name, read in encoders if (reading := read(prompt)) is not None}
    unknown = sentences.unknown(prompt)
    fault = prompt_fault(prompt.strip())
    for name, reading in found.items():
        unknown += [prompt[start:end] for start, end in reading.unknown]
        if reading.tokens > reading.room and fault is None:
            lost = shortened(prompt[reading.read :])
            fault = f'{name} reads {reading.room} of the {reading.tokens} tokens; lost is "{lost}". '
            fault += "Shorten it; it has to be English"
    counted = next(iter(found.values()), None)
    return {
        "count": counted.tokens if counted else len(_words(prompt)),
        "limit": counted.room if counted else None,
        "unknown": list(dict.fromkeys(unknown)),
        "fault": fault,
    }
