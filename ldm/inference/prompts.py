"""Prompts that agree with the image they are given to: its vertebra, its region of the spine, its modality. No torch.

``meta.json`` says which vertebra an image is about (``level``), and perhaps the ``region`` of the spine and the
``modality``. A prompt agrees with it if it names none of them, or the same.
"""

import logging
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from ldm.core.errors import UsageError
from ldm.core.tables import counted
from ldm.data.samples import META_TEXTS, Sample, plain, text_of
from ldm.levels import NAMES, REGIONS, SPINE, VARIANTS, Mention, mentions

log = logging.getLogger(__name__)

MATCHES = ("level", "replace", "none")  # how the prompts of healthy images are made to agree, see ``PromptPool``
DEFAULT_MATCH = ("level",)  # the words of --match where nothing is said

MODALITIES = {
    "CT": r"CT|computed tomography",
    "MR": r"MRI?|magnetic resonance|T[12][\s-]?(?:wi?|weighted)|STIR",
    "XR": r"x-?rays?|XR|CR|DX|radiographs?",
}
# Elsewhere in a prompt these words may mean other things: cervical carcinoma, the sacral promontory.
_REGION = rf"\b({SPINE})\b(?=\s+(?:spine|spinal|vertebra|body|level|segment|column|lesion))"
STEMS = {"C": "cervic", "T": "thorac", "L": "lumb", "S": "sacr"}  # also of thoracolumbar, and of sacrum
# T1 and T2 are also MR sequences: what follows them tells.
_SEQUENCE = re.compile(r"[\s-]?(?:wi?\b|weight|image|signal|sequence|hyper|hypo|iso|bright|dark|relax)", re.IGNORECASE)
_BONE = re.compile(r"\s*(?:vertebra|bod(?:y|ies)\b|level|椎)", re.IGNORECASE)  # behind it, or before it:
_BONE_BEFORE = re.compile(r"\b(?:vertebrae?|bod(?:y|ies)|levels?)\s+$", re.IGNORECASE)
REMEMBERED = 1 << 17  # prompts whose names of vertebrae, regions and modalities are kept: each meets many images


class ImageFacts(NamedTuple):
    """What is known of an image: ``level`` as in "L3", ``region`` as in "lumbar", ``modality`` as in "MR".

    Texts that are none of these stay as they are, in lower case.
    """

    level: str | None
    region: str | None
    modality: str | None


class MatchedPrompt(NamedTuple):
    """A prompt for an image, the sample it comes from, if any, and in words what was done so that it agrees."""

    prompt: str
    source: Sample | None
    how: str | None


class Match(NamedTuple):
    """How prompts of healthy images are chosen: ``how`` of MATCHES; ``keys`` of ``meta.json``, see ``PromptPool``."""

    how: str
    keys: tuple[str, ...] = ()

    @classmethod
    def read(cls, words: Sequence[str]) -> "Match":
        """From the words of --match: at most one of MATCHES (default: level), the others are keys of ``meta.json``."""
        hows = [word for word in words if word in MATCHES]
        if len(hows) > 1 or not words:
            raise UsageError(f"--match: expected one of {', '.join(MATCHES)}, found {' and '.join(hows) or 'nothing'}")
        return cls(hows[0] if hows else MATCHES[0], tuple(dict.fromkeys(word for word in words if word not in MATCHES)))

    def __str__(self) -> str:
        return " ".join([self.how, *self.keys])


def value_of(sample: Sample, key: str) -> str | None:
    """What ``meta.json`` says of a sample under ``key``, as it is compared; None for nothing."""
    text = text_of(getattr(sample, key) if key in META_TEXTS else sample.meta.get(key))
    return text and plain(text)


def image_facts(sample: Sample) -> ImageFacts:
    """What ``meta.json`` says of the image; the level of a diseased sample without one is that in its prompt."""
    named = sorted(set(levels_named(f"{sample.level} vertebra" if sample.level else sample.prompt)))
    level = named[0] if len(named) == 1 else sample.level and sample.level.casefold()
    region, modality = (str(sample.meta.get(key) or "").strip() for key in ("region", "modality"))
    words = sorted(_regions(region)) if len(_regions(region)) == 1 else [region.casefold() or None]
    return ImageFacts(level, words[0], next(iter(_modalities(modality)), modality.casefold() or None))


def levels_named(prompt: str, level: str | None = None) -> list[str]:
    """The vertebrae that a prompt names, as in ["L3"], in its order, see ``ldm.levels``; ``level``: the image's own.

    T1 and T2 count only before "vertebra" and the like, or where they are ``level``; T13 and L6 of a range only there.
    """
    return [name for mention in _mentions(prompt, level) for name in mention.names]


def contradiction(prompt: str, facts: ImageFacts) -> str | None:
    """What the prompt names otherwise than the image's ``meta.json``, in words; None if they agree."""
    levels, modalities, here = levels_named(prompt, facts.level), _modalities(prompt), _regions_of(facts)
    regions = _spinal(prompt) | {REGIONS[name[0]] for name in levels}
    own = _bones(facts.level)
    if levels and facts.level and not own & {*levels} and (own or facts.level not in prompt.casefold()):
        return f"the prompt names {levels[0]}, the image's level is {facts.level}"
    if here and regions and not here & regions:
        return f"the prompt names the {min(regions)} spine, the image's region is {' or '.join(sorted(here))}"
    if facts.modality in MODALITIES and modalities and facts.modality not in modalities:
        return f"the prompt names {modalities[0]}, the image's modality is {facts.modality}"
    return None


def agreeing(prompt: str, facts: ImageFacts) -> str | None:
    """The prompt with the names of its vertebra and region replaced by the image's; None if that cannot be done."""
    found = _mentions(prompt, facts.level)
    named = {name for mention in found for name in mention.names}
    if facts.level and not all(mention.names for mention in found):
        return None  # nobody knows which vertebra it names
    if facts.level in NAMES and len(named) == 1 and named != {facts.level}:
        for mention in reversed(found):
            prompt = prompt[: mention.start] + facts.level + prompt[mention.end :]
    here, words = _regions_of(facts), _spinal(prompt)
    if len(here) == 1 and len(words) == 1 and words != here:
        prompt = re.sub(_REGION, lambda _: min(here), prompt, flags=re.IGNORECASE)
    return prompt if contradiction(prompt, facts) is None else None


class PromptPool:
    """The prompts of diseased samples, for healthy images.

    ``match`` "level": from a sample of the same level; where there is none, and with "replace" always, from any sample
    whose prompt agrees once its level and region are replaced by the image's. Both take samples of another modality, or
    of no matching region as long as there are others, for none of these. With "none" any sample's prompt as it is.
    Of these samples, ``keys`` come first: for each in turn, only samples that have the image's value there, where there
    are some.
    """

    def __init__(self, sources: Sequence[Sample], match: Match) -> None:
        self.sources, self.match = [(source, image_facts(source)) for source in sources], match
        self.candidates = cache(self._candidates)

    def _candidates(self, facts: ImageFacts, values: tuple[str | None, ...]) -> list[tuple[Sample, ImageFacts]]:
        if self.match.how == "none":
            return self._of_the_same(self.sources, values)
        usable = [
            (source, own)
            for source, own in self.sources
            if _compatible(own.modality, facts.modality)
            and agreeing(source.prompt, facts) is not None
            and not _another_bone(source, own, facts)
        ]
        usable = self._of_the_same(usable, values)
        usable = [pair for pair in usable if _compatible(pair[1].region, facts.region)] or usable
        same = [pair for pair in usable if self.match.how == "level" and facts.level and pair[1].level == facts.level]
        return same or usable

    def _of_the_same(
        self, pairs: list[tuple[Sample, ImageFacts]], values: tuple[str | None, ...]
    ) -> list[tuple[Sample, ImageFacts]]:
        """Those with the image's ``values`` of the keys; of a key that none of them shares, all."""
        for key, value in zip(self.match.keys, values, strict=True):
            pairs = [pair for pair in pairs if value is not None and value_of(pair[0], key) == value] or pairs
        return pairs

    def choose(self, sample: Sample, number: int) -> MatchedPrompt | None:
        """The prompt for a healthy image, by a random number; None if no sample's prompt can be made to agree."""
        values = tuple(value_of(sample, key) for key in self.match.keys)
        candidates = self.candidates(image_facts(sample), values)
        if not candidates:
            return None
        source, _ = candidates[number % len(candidates)]  # each is as likely: lesion types keep their frequencies
        same = [
            key for key, value in zip(self.match.keys, values, strict=True) if value and value_of(source, key) == value
        ]
        found = MatchedPrompt(source.prompt, source, "not matched")
        if self.match.how != "none":
            found = matched(source.prompt, sample, source) or found  # a candidate's can be made to agree
        return found._replace(how=", ".join([str(found.how), *(f"same {key}" for key in same)]))


def check_keys(match: Match, healthy: tuple[Path, Sequence[Sample]], diseased: tuple[Path, Sequence[Sample]]) -> None:
    """UsageError for a key that no healthy sample, or no diseased one that gives prompts, has in its ``meta.json``.

    Both with the path that they come from.
    """
    for key in match.keys:
        if not diseased[1]:
            raise UsageError(f"--match {key} chooses the prompts of healthy samples; none of these gets one")
        for adjective, (path, samples) in {"healthy": healthy, "diseased": diseased}.items():
            if all(value_of(sample, key) is None for sample in samples):
                known = {each for sample in samples for each in (*META_TEXTS, *sample.meta) if value_of(sample, each)}
                there = f"the keys there are {', '.join(sorted(known))}" if known else "it has none"
                raise UsageError(f"--match {key}: no {adjective} sample of {path} has this key in meta.json; {there}")


def warn_of_unmatched(match: Match, pairs: Sequence[tuple[Sample, Sample | None]]) -> None:
    """One warning for each key whose value healthy samples do not share with the samples of their prompts."""
    for key in match.keys:
        values = [(sample, value_of(sample, key), source and value_of(source, key)) for sample, source in pairs]
        others = [sample.sample_id for sample, own, given in values if own is None or own != given]
        if others:
            text = "warning: --match %s: for %d of %s no diseased sample has the same; the first: %s"
            log.warning(text, key, len(others), counted(len(pairs), "image"), others[0])


def matched(prompt: str, sample: Sample, source: Sample | None = None) -> MatchedPrompt | None:
    """A prompt, which may come from another sample, made to agree with an image; None if that cannot be done."""
    facts = image_facts(sample)
    levels, agreed = levels_named(prompt, facts.level), agreeing(prompt, facts)
    if agreed is None:
        return None
    if agreed != prompt:
        named = [name for name in (*levels, *sorted(_spinal(prompt))) if name not in {facts.level, *_regions_of(facts)}]
        how = f"{named[0]} replaced by {facts.level or facts.region}"
    elif not facts.level or (levels and not {*levels} & {*levels_named(f"{facts.level} vertebra")}):
        how = "level unknown"
    else:
        how = "same level" if levels or (source and image_facts(source).level == facts.level) else "no level named"
    return MatchedPrompt(agreed, source, how)


def _another_bone(source: Sample, own: ImageFacts, facts: ImageFacts) -> bool:
    """Whether T1 or T2 in the prompt is the source's vertebra, which for another image reads as an MR sequence."""
    return (
        own.level in ("T1", "T2") and own.level != facts.level and own.level in levels_named(source.prompt, own.level)
    )


def _compatible(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other


def _mentions(prompt: str, level: str | None) -> Sequence[Mention]:
    """Each place where vertebrae are named."""
    return _places(prompt, level if level in ("T1", "T2", *VARIANTS) else None)


@lru_cache(REMEMBERED)
def _places(prompt: str, level: str | None) -> Sequence[Mention]:
    return tuple(each for each in mentions(prompt, level) if not _sequences(each, prompt, level))


def _sequences(mention: Mention, prompt: str, level: str | None) -> bool:
    """Whether a mention of T1 or T2 means MR sequences, or may mean them and not the image's ``level``."""
    if not mention.names or not {*mention.names} <= {"T1", "T2"}:
        return False
    if _BONE.match(prompt, mention.end):
        return False
    bone = level in mention.names or _BONE_BEFORE.search(prompt, 0, mention.start)
    return not bone or bool(_SEQUENCE.match(prompt, mention.end))


def _regions(text: str) -> set[str]:
    return {word.lower() for word in re.findall(rf"\b(?:{SPINE})\b", text, re.IGNORECASE)}


@lru_cache(REMEMBERED)
def _spinal(prompt: str) -> frozenset[str]:
    """The regions of the spine that a prompt names, as in "lumbar vertebra"."""
    return frozenset(word.lower() for word in re.findall(_REGION, prompt, re.IGNORECASE))


@lru_cache(REMEMBERED)
def _bones(level: str | None) -> frozenset[str]:
    """The vertebrae that a level may mean: those that it names, else all of its regions ("lumbar spine", "sacrum")."""
    named = levels_named(f"{level} vertebra") if level else []
    return frozenset(named or [name for name in NAMES if level and STEMS[name[0]] in level.casefold()])


def _regions_of(facts: ImageFacts) -> set[str]:
    """The regions of the spine that the image may show: those of its level, else its own; none where nobody knows."""
    return {REGIONS[name[0]] for name in _bones(facts.level)} or {*REGIONS.values()} & {facts.region}


@lru_cache(REMEMBERED)
def _modalities(text: str) -> Sequence[str]:
    whole = {name: rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])" for name, words in MODALITIES.items()}
    return tuple(name for name, words in whole.items() if re.search(words, text, re.IGNORECASE))
