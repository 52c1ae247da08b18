"""Which real and which drawn samples a reader study shows: chosen in pairs that differ in who made the lesion alone.

A pair has one value of each matched key and two patients. Chosen are samples of patients that the study does not show
yet, and of those the ones that a seeded order of names puts first: never the better looking ones.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError
from ldm.core.files import Contents, named_seed, read_json
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import TRAINED_ON, check_synthetic, real_ones, salted_digest
from ldm.data.samples import Reject, Sample, plain
from ldm.readers.pictures import CONTEXT, LEAST_CROP, Look, look_at
from ldm.reviews.choice import apply_review

log = logging.getLogger("reader_study")

ALWAYS = ("lesion_type", "severity")  # matched wherever both sides know them
UNKNOWN = "unknown"
ENOUGH = 60  # pairs, where no number is asked for

Pair = tuple[Sample, Sample]  # real, drawn


@dataclass(frozen=True)
class LeftOut:
    """A sample that could be read and is not shown, and why."""

    sample: Sample
    why: str


class Candidates:
    """The samples that can still be chosen; what has been read of them is remembered."""

    def __init__(self, real: Sequence[Sample], drawn: Sequence[Sample]) -> None:
        self.real, self.drawn = list(real), list(drawn)
        self.looks: dict[Path, Look] = {}
        self.left_out: list[LeftOut] = []
        self.rejects: list[Reject] = []
        self.review: dict[str, Any] | None = None  # what ``apply_review`` says of the drawn ones

    def drop(self, sample: Sample, why: str) -> None:
        """Leave a sample out."""
        self.left_out.append(LeftOut(sample, why))
        self._remove(sample)

    def _remove(self, sample: Sample) -> None:
        self.real = [each for each in self.real if each is not sample]
        self.drawn = [each for each in self.drawn if each is not sample]

    def look(self, samples: Iterable[Sample]) -> bool:
        """Read those that were not read yet; whether all of them can be shown. Those that cannot are dropped."""
        fine = True
        for sample in samples:
            if sample.image in self.looks:
                continue
            try:
                self.looks[sample.image] = look = look_at(sample)
            except MedSoftError as error:
                fine = False
                self.rejects.append(Reject(sample.sample_id, sample.image, error.cause(sample.image)))
                self._remove(sample)
                continue
            if look.second:
                fine = False
                self.drop(sample, f"{look.second}, which would give the answer away")
        return fine


def read_candidates(
    results: Sequence[Path], real: Sequence[Path], review: Sequence[Path], content: Contents
) -> Candidates:
    """Diseased drawn and real samples of all sources, without drawn ones that the files ``review`` reject.

    MedSoftError where a source is not what it is given as.
    """
    drawn, rejects = [], []
    for path in results:
        found, more = load_samples(path)
        rejects += more
        _check_results(path, found, more)
        drawn += found
    theirs = []
    for path in real:
        found, more = load_samples(path)
        rejects += more
        theirs += real_ones(f"--real {path}", found)
    made = Candidates([each for each in theirs if not each.healthy], [each for each in drawn if not each.healthy])
    made.rejects = list(dict.fromkeys(rejects))
    for sample in [each for each in drawn if each.healthy]:
        made.left_out.append(LeftOut(sample, "it was drawn healthy and shows no lesion"))
    if review:
        choice = apply_review(review, made.drawn, content)
        made.review = choice.record
        for sample in [each for each in made.drawn if each.image in choice.rejected]:
            made.drop(sample, "it was rejected in review")
    _leave_second_lesions_out(made)
    for name, samples in (("--real", made.real), ("RESULTS", made.drawn)):
        if len(samples) < 2:
            raise MedSoftError(f"{name}: expected at least 2 diseased samples that can be shown, found {len(samples)}")
    return made


def _check_results(path: Path, samples: Sequence[Sample], rejects: Sequence[Reject]) -> None:
    """MedSoftError for real samples among results and for a run that is not finished; a warning for what it lacks."""
    check_synthetic(path, samples)
    record = path / "inference.json"
    if record.is_file():
        known = read_json(record, "record of results")
        if isinstance(known, dict) and known.get("complete") is False:
            raise MedSoftError(
                f"{record}: these results are not complete, and the patients that are missing may be the difficult "
                "ones; run the same dataset_infer.py again, then make the study"
            )
    missing = path / "rejects.json"
    if missing.is_file():
        count = len(read_json(missing, "list of rejected samples"))
        said = counted(count, "picture")
        log.warning("warning: %s: %s could not be drawn, so these patients are missing", missing, said)
    if rejects:
        said = counted(len(rejects), "sample")
        log.warning("warning: %s: %s cannot be read, so these patients are missing", path, said)


def _leave_second_lesions_out(made: Candidates) -> None:
    """Drop real images with several lesions' samples, and drawn ones whose parent has a lesion of its own."""
    files = Counter(str(sample.image.resolve()) for sample in made.real)
    digests = Counter(sample.image_sha256 for sample in made.real if sample.image_sha256)
    for sample in list(made.real):
        if files[str(sample.image.resolve())] > 1 or digests[sample.image_sha256 or ""] > 1:
            made.drop(sample, "its image has more than one annotated lesion, which would give the answer away")
    for sample in list(made.drawn):
        parent = sample.meta.get("parent_image")
        path = str((sample.image.parent / parent).resolve()) if isinstance(parent, str) else ""
        ill = path in files or sample.meta.get("parent_sha256") in digests
        if ill and sample.meta.get("mask_from") != "own":
            made.drop(sample, "its parent has a lesion of its own, which would give the answer away")


def matched_keys(made: Candidates, asked: Sequence[str]) -> list[str]:
    """The keys by which pairs are matched. MedSoftError for an asked one that one side does not know at all."""
    keys = []
    for key in dict.fromkeys((*ALWAYS, *asked)):
        unknown = [
            name
            for name, samples in (("real", made.real), ("drawn", made.drawn))
            if all(value_of(sample, key) == UNKNOWN for sample in samples)
        ]
        if unknown and key in asked:
            raise MedSoftError(f"--match {key}: no {unknown[0]} sample has this key in its meta.json")
        if not unknown:
            keys.append(key)
        elif len(unknown) == 1:
            log.warning("warning: %s is known of no %s sample, so pictures are not matched by it", key, unknown[0])
    return keys


def value_of(sample: Sample, key: str) -> str:
    """The value of a key of meta.json as it is compared, ``unknown`` where there is none."""
    value = getattr(sample, key) if key in ("lesion_type", "severity", "level") else sample.meta.get(key)
    return UNKNOWN if value is None else plain(value if isinstance(value, str) else json.dumps(value))


def choose(
    real: Sequence[Sample], drawn: Sequence[Sample], keys: Sequence[str], count: int | None, seed: int
) -> list[Pair]:
    """Pairs of one stratum each, the strata taking turns; see the module's text.

    With ``count`` None they end, at ENOUGH at the latest, where a patient would be shown again; else where no sample is
    left or there are ``count``.
    """

    def strata(samples: Sequence[Sample]) -> dict[tuple[str, ...], list[Sample]]:
        """The samples by their values of ``keys``, each list in an order that ``seed`` gives."""
        found: dict[tuple[str, ...], list[Sample]] = {}
        for sample in sorted(samples, key=lambda each: named_seed(seed, "reader study", each.sample_id)):
            found.setdefault(tuple(value_of(sample, key) for key in keys), []).append(sample)
        return found

    theirs, ours = strata(real), strata(drawn)
    shown: Counter[str] = Counter()
    pairs: list[Pair] = []
    queue = sorted(theirs.keys() & ours.keys())
    while queue and len(pairs) < (count or ENOUGH):
        stratum = queue.pop(0)
        pair = _next_pair(theirs[stratum], ours[stratum], lambda sample: shown[sample.patient_id])
        if pair is None or (count is None and any(shown[sample.patient_id] for sample in pair)):
            continue
        theirs[stratum].remove(pair[0])
        ours[stratum].remove(pair[1])
        shown.update(sample.patient_id for sample in pair)
        pairs.append(pair)
        queue.append(stratum)
    return pairs


def _next_pair(real: Sequence[Sample], drawn: Sequence[Sample], shown: Callable[[Sample], int]) -> Pair | None:
    """The first pair of two patients who were shown the least often; None if there is none."""
    for first in sorted(real, key=shown):
        for second in sorted(drawn, key=shown):
            if first.patient_id != second.patient_id:
                return first, second
    return None


def choose_shown(
    made: Candidates, keys: Sequence[str], count: int | None, seed: int, crop: int | None
) -> tuple[list[Pair], int]:
    """Pairs that can all be shown in one size, and that size in native pixels; what cannot be shown is dropped."""
    while True:
        pairs = choose(made.real, made.drawn, keys, count, seed)
        if not pairs:
            raise MedSoftError(
                f"no real and no drawn sample of two patients have the same {', '.join(keys) or 'key'}: nothing can be "
                "compared; draw the types and severities that the real samples have, or give other --real samples"
            )
        samples = [sample for pair in pairs for sample in pair]
        if not made.look(samples):
            continue
        looks = [made.looks[sample.image] for sample in samples]
        wanted = max(LEAST_CROP, round(CONTEXT * max(look.lesion for look in looks)))
        side = crop or min(wanted, *(min(look.shape) for look in looks))
        unfit = [each for each, look in zip(samples, looks, strict=True) if not min(look.shape) >= side > look.lesion]
        if not unfit:
            return pairs, side
        for sample in unfit:
            made.drop(sample, f"its image or lesion does not fit into a picture of {side} pixels")


def seen_in_training(pairs: Sequence[Pair]) -> int:
    """How many of the real samples are of patients that a generator of the drawn ones has learned from."""
    groups = {json.dumps(group): group for _, drawn in pairs for group in drawn.meta.get(TRAINED_ON, [])}
    return sum(
        any(salted_digest(group["salt"], real.patient_id) in group["patients"] for group in groups.values())
        for real, _ in pairs
    )


def strata_counts(pairs: Sequence[Pair], keys: Sequence[str]) -> Mapping[str, int]:
    """How many pairs there are of each stratum, by its values in words."""
    return dict(Counter(", ".join(value_of(drawn, key) for key in keys) or "all" for _, drawn in pairs))
