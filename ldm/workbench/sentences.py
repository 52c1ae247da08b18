"""The sentences that the model was trained with, found by menus, and what its encoders make of a new one."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from ldm.core.tables import shortened
from ldm.data.samples import Sample, plain, prompt_fault
from ldm.inference.prompts import ImageFacts, agreeing, levels_named
from ldm.levels import NAMES
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.text_encoder import PromptReading, clip_reading

ANY_BONE = ImageFacts("L1", "lumbar", None)  # with which sentences are compared that differ in the vertebra alone
KEYS = ("lesion_type", "severity", "level")  # of meta.json, by which sentences are found
LISTED = 64  # sentences in an answer: as many as somebody may step through
GRADES = ("subtle", "minimal", "mild", "slight", "moderate", "marked", "severe", "extreme")  # any other word comes last
Read = Callable[[str], PromptReading | None]  # how an encoder reads a prompt, where it says so
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Sentences:
    """Those of the diseased training samples that are no drawings, the most frequent first."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        used = [sample for sample in samples if not sample.healthy and not sample.synthetic]
        self._by_prompt = {sample.prompt: sample for sample in reversed(used)}
        forms = {prompt: _form(prompt) for prompt in self._by_prompt}
        self._by_form = {forms[sample.prompt]: sample for sample in reversed(used)}
        counts = Counter((sample.prompt, *(getattr(sample, key) for key in KEYS)) for sample in used)
        self._known = [dict(zip(("prompt", *KEYS), each, strict=True)) for each, _ in counts.most_common()]
        self._counts = [count for _, count in counts.most_common()]
        # Of sentences that differ in the vertebra alone one, to put another vertebra into.
        others = {(forms[each["prompt"]], *(each[key] for key in KEYS[:2])): each for each in reversed(self._known)}
        self._others = [each for each in reversed(others.values()) if each["level"]]
        self._types = Counter(sample.lesion_type for sample in used if sample.lesion_type)
        self._words = {word for sample in samples for word in _words(sample.prompt)}

    def menus(self, level: str | None = None) -> dict[str, Any]:
        """The types (the most frequent first), severities and vertebrae there are, and how many sentences.

        ``level``: the vertebra of an image, which is among them whether a sentence is about it or not.
        """
        values = {key: {each[key] for each in self._known if each[key]} for key in KEYS}
        values["level"] |= {level} if level else set()
        return {
            "types": [name for name, _ in self._types.most_common()],
            "severities": sorted(values["severity"], key=_by_grade),
            "levels": sorted(values["level"], key=_along_the_spine),
            "count": len(self._by_prompt),
        }

    def matching(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """The sentences of training samples that have the values of the KEYS in ``asked``; an empty one is any.

        ``count`` of them there are; ``sentences`` are the first LISTED. Where none is about the vertebra that is asked
        for, those about others that are the same with its name put in: then ``borrowed``, and only the listed count.
        """
        asked = {key: value for key, value in asked.items() if value}
        found: dict[str, dict[str, Any]] = {}
        counts: Counter[str] = Counter()
        for each, count in zip(self._known, self._counts, strict=True):
            if _has(each, asked):
                found.setdefault(each["prompt"], each)
                counts[each["prompt"]] += count
        sentences, borrowed = [found[prompt] for prompt, _ in counts.most_common()], False
        level = asked.get("level")
        if not found and level:
            others = {key: value for key, value in asked.items() if key != "level"}
            sentences = [*islice(self._borrowed(others, level), LISTED)]
            borrowed = bool(sentences)
        return {"count": len(sentences), "sentences": sentences[:LISTED], "borrowed": borrowed}

    def _borrowed(self, asked: Mapping[str, str], level: str) -> Iterator[dict[str, Any]]:
        """The sentences about other vertebrae than ``level`` with its name put in, each once."""
        named, said = levels_named(f"{level} vertebra"), set()
        if len(named) != 1:
            return
        facts = ImageFacts(named[0], None, None)
        for each in self._others:
            prompt = agreeing(each["prompt"], facts) if _has(each, asked) else None
            if prompt and prompt not in said and {*levels_named(prompt, facts.level)} == {*named}:
                said.add(prompt)
                yield each | {"prompt": prompt, "level": level}

    def source(self, prompt: str) -> Sample | None:
        """The training sample with this sentence, or with one that names another vertebra and says the same."""
        return self._by_prompt.get(prompt) or self._by_form.get(_form(prompt))

    def unknown(self, prompt: str) -> list[str]:
        """The words that no training sentence holds; none where there are no training sentences."""
        return [word for word in _WORD.findall(prompt) if plain(word) not in self._words] if self._words else []


def _has(sentence: Mapping[str, Any], asked: Mapping[str, str]) -> bool:
    return all(sentence[key] == value for key, value in asked.items())


def _form(prompt: str) -> str:
    return plain(agreeing(prompt, ANY_BONE) or prompt)


def _words(prompt: str) -> list[str]:
    return [plain(word) for word in _WORD.findall(prompt)]


def _by_grade(severity: str) -> tuple[int, str]:
    return (GRADES.index(plain(severity)) if plain(severity) in GRADES else len(GRADES), severity)


def _along_the_spine(level: str) -> tuple[int, str]:
    """By the first vertebra that is named; what names none comes last."""
    named = levels_named(f"{level} vertebra")
    return (NAMES.index(named[0]) if named else len(NAMES), level)


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
