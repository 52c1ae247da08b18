"""Judging drawn lesions before they are kept (``dataset_infer.py --check``), by what real training lesions are like.

Each number of a drawn lesion has to lie where a further real one would lie with the probability LEVEL, by Student's
prediction interval over the training lesions: those of its type, or all of them where its type has fewer than FEWEST.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.stats import t as student

from ldm.config import DataConfig
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import fingerprint
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import salted_digest
from ldm.data.masks import Mask
from ldm.data.preparation import PreparedSample, described_identity, fit_sample, prepare
from ldm.data.samples import HEALTHY, Reject, Sample
from ldm.evaluation.choice import type_direction
from ldm.evaluation.copies import copy_thresholds, nearest_of, reaches
from ldm.evaluation.information import asked_type
from ldm.evaluation.lesions import BATCH, Lesion, grey_of, lesions_of, ring_around
from ldm.evaluation.metrics import text_embeddings
from ldm.evaluation.seam import border_over_surroundings
from ldm.inference.drawing import Verdict
from ldm.inference.results import Result
from ldm.networks.encoder import ImageTextEncoder

log = logging.getLogger(__name__)

LEVEL, FEWEST = 0.95, 5
ALL = "all types"
DIGITS = 4  # of numbers in records
MEANING = {
    "change": "mean change inside the mask, of the grey range; for a real lesion, its mean distance to the grey around",
    "seam": "mean gradient across the mask's border over that right outside",
    "agreement": "BiomedCLIP's cosine with the prompts of its type, minus the highest with another type's and healthy",
    "contrast": "mean grey inside the mask minus that around it, of the grey range",
}
SIDES = {"change": (True, False), "seam": (False, True), "agreement": (True, False), "contrast": (True, True)}
LOGARITHMIC = ("change", "seam")  # positive numbers with a long tail


class Judge(Protocol):
    """A classifier that looks at drawn images."""

    @property
    def name(self) -> str:
        """Its file's."""
        ...

    @property
    def sha256(self) -> str:
        """Its file's."""
        ...

    @property
    def classes(self) -> list[str]:
        """What it may say, ``healthy`` among it."""
        ...

    def __call__(self, samples: Sequence[Sample], pixels: Sequence[np.ndarray]) -> list[str]:
        """The class of each image, which stands in place of that of its sample."""
        ...


Numbers = dict[str, float | None]  # by name; None for what cannot be measured
TrainingLesion = tuple[Lesion, Numbers]  # and what was measured of its image, which is not kept


class Bound(NamedTuple):
    """Where a number has to lie; None where a side is open."""

    low: float | None = None
    high: float | None = None

    def fault(self, value: float | None) -> str | None:
        """What is wrong with ``value``, None where it cannot be measured, in words; None where nothing is."""
        if value is None:
            return None if self == Bound() else "cannot be measured: too little lies around the mask to compare with"
        if self.low is not None and value < self.low:
            return f"{value:.3f}, expected at least {self.low:.3f}"
        if self.high is not None and value > self.high:
            return f"{value:.3f}, expected at most {self.high:.3f}"
        return None


def prediction_bound(values: Sequence[float], sides: tuple[bool, bool], logarithmic: bool = False) -> Bound:
    """Where one more value lies with the probability LEVEL, of values that are normal, or whose logarithms are.

    ``sides``: whether there is a lower and an upper bound; two share what LEVEL leaves. No bounds of less than two
    values.
    """
    numbers = np.log(np.maximum(values, 1e-6)) if logarithmic else np.asarray(values, float)
    count = len(numbers)
    if count < 2:
        return Bound()
    reach = student.ppf(1 - (1 - LEVEL) / sum(sides), count - 1) * numbers.std(ddof=1) * math.sqrt(1 + 1 / count)
    ends = [float(numbers.mean() + sign * reach) for sign in (-1, 1)]
    ends = [math.exp(end) for end in ends] if logarithmic else ends
    return Bound(*(round(end, DIGITS) if given else None for end, given in zip(ends, sides, strict=True)))


def bound_of(name: str, rows: Sequence[Mapping[str, float | None]]) -> Bound:
    """``prediction_bound`` of the number ``name`` of SIDES, by the rows in which it could be measured."""
    values = [value for row in rows if (value := row[name]) is not None]
    return prediction_bound(values, SIDES[name], name in LOGARITHMIC)


@dataclasses.dataclass(frozen=True)
class LesionChecks:
    """What ``--check`` asks for: at most ``tries`` drawings of each task, judged by lesions of ``train_json``."""

    train_json: Path
    tries: int
    judge: Judge | None = None

    def training_lesions(
        self, groups: Sequence[Mapping[str, Any]], source: object
    ) -> tuple[list[Sample], list[Reject]]:
        """The real diseased samples of ``train_json`` of patients that ``source`` has learned from, by its ``groups``,
        and the entries of ``train_json`` that cannot be read.

        Without groups all of them. Raises MedSoftError where fewer than two are left.
        """
        if not self.train_json.exists():
            raise UsageError(f"{self.train_json}: does not exist; --check compares with the lesions of --train_json")
        samples, rejects = load_samples(self.train_json)
        lesions = [s for s in samples if s.mask and not s.healthy and not s.synthetic]
        digests = [(group["salt"], set(group["patients"])) for group in groups]

        def seen(patient: str) -> bool:
            return not digests or any(salted_digest(salt, patient) in there for salt, there in digests)

        known = {patient: seen(patient) for patient in {sample.patient_id for sample in lesions}}
        kept = [sample for sample in lesions if known[sample.patient_id]]
        if others := len(lesions) - len(kept):
            text = "warning: --check: %d of %d lesions of %s are of patients that %s has not learned from: left out"
            log.warning(text, others, len(lesions), self.train_json, source)
        if len(kept) < 2:
            found = f"{counted(len(kept), 'real lesion')} of patients that {source} has learned from"
            raise MedSoftError(f"{self.train_json}: {found}, --check needs at least 2; give --train_json")
        return kept, rejects

    def settings(self, lesions: Sequence[Sample]) -> dict[str, Any]:
        """What decides the verdicts, for a run's identity."""
        digest = fingerprint([described_identity(sample) for sample in lesions])
        found = {"tries": self.tries, "level": LEVEL, "lesions": digest}
        return found | ({"judge": self.judge.sha256} if self.judge else {})

    def start(
        self, lesions: Sequence[Sample], rejects: Sequence[Reject], encoder: ImageTextEncoder, data: DataConfig
    ) -> "LesionCheck":
        """The check, with thresholds from ``lesions``; those that cannot be read join ``rejects`` in check.json."""
        read: list[TrainingLesion] = []
        rejects = [*rejects]
        for start in range(0, len(lesions), BATCH):
            images = []
            for sample in lesions[start : start + BATCH]:
                try:
                    images.append((sample, prepare(sample, data, 0, 0)))
                except MedSoftError as error:
                    rejects.append(Reject(sample.sample_id, sample.image, str(error)))
            found = lesions_of(images, encoder) if images else []
            read += [(lesion, _of_image(image)) for lesion, (_, image) in zip(found, images, strict=True)]
        if rejects:
            said = counted(len(rejects), "entry", "entries")
            text = (
                "warning: --check: %s of %s cannot be read, no bounds come from there (the first: %s); see check.json"
            )
            log.warning(text, said, self.train_json, rejects[0])
        if len(read) < 2:
            raise MedSoftError(
                f"{self.train_json}: {counted(len(read), 'lesion')} can be read, --check needs at least 2"
            )
        log.info("checking by %s of %s", counted(len(read), "training lesion"), self.train_json)
        check = LesionCheck(self, read, encoder, data)
        check.thresholds["left_out"] = [dataclasses.asdict(reject) | {"file": str(reject.file)} for reject in rejects]
        return check


class LesionCheck:
    """Judges results. ``thresholds``: by what, for check.json."""

    def __init__(
        self, checks: LesionChecks, read: Sequence[TrainingLesion], encoder: ImageTextEncoder, data: DataConfig
    ) -> None:
        self.judge, self.encoder, self.data = checks.judge, encoder, data
        self.lesions = [lesion for lesion, _ in read]
        places: dict[str, list[int]] = {}
        for place, lesion in enumerate(self.lesions):
            places.setdefault(asked_type(lesion.sample) or "", []).append(place)
        places.pop("", None)
        self.directions = {
            kind: type_direction([self.lesions[k] for k in each], encoder) for kind, each in places.items()
        }
        self.healthy = text_embeddings(encoder, [HEALTHY])[0]
        rows = [numbers | self._of_lesion(lesion) for lesion, numbers in read]
        of = {kind: [rows[k] for k in each] for kind, each in sorted(places.items()) if len(each) >= FEWEST}
        of[ALL] = rows
        self.bounds = {name: {kind: bound_of(name, each) for kind, each in of.items()} for name in SIDES}
        lying, turned, _ = copy_thresholds(self.lesions, turned=True)
        self.copy = round(lying, DIGITS), round(turned, DIGITS)
        self.thresholds: dict[str, Any] = {
            "level": LEVEL,
            "tries": checks.tries,
            "train_json": str(checks.train_json),
            "lesions": {kind: len(each) for kind, each in sorted(places.items())} | {ALL: len(rows)},
            "bounds": {name: {kind: each._asdict() for kind, each in of.items()} for name, of in self.bounds.items()},
            "copy": self.copy[0],
            "copy_turned": self.copy[1],  # with the lesion whose mask it has, or that it began with
            "judge": checks.judge and checks.judge.name,
            "meaning": MEANING,
        }

    def __call__(self, results: Sequence[tuple[Result, PreparedSample]]) -> list[Verdict]:
        """The numbers of each result, which was drawn into what stands beside it, and what is wrong with them."""
        read = [as_drawn(result, prepared, self.data) for result, prepared in results]
        lesions = lesions_of(read, self.encoder)
        copies = nearest_of(lesions, self.lesions, "copies")
        verdicts = []
        for k, (result, prepared) in enumerate(results):
            values, failures = self._compared(lesions[k], read[k][1], prepared if result.task.sample.healthy else None)
            if not lesions[k].sample.healthy:
                values["copy"] = round(copies[k].correlation, DIGITS)
                if reaches(copies[k], *self.copy):
                    match = copies[k].match.sample.sample_id
                    failures["copy"] = (
                        f"{copies[k].correlation:.3f} with {match}, expected less than {self.copy[0]:.3f}"
                    )
            if self.judge:
                values["type"], fault = self._called(lesions[k].sample, result.image.result)
                failures |= {"type": fault} if fault else {}
            verdicts.append(Verdict(values, failures))
        return verdicts

    def _compared(
        self, lesion: Lesion, image: PreparedSample, parent: PreparedSample | None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The numbers of a drawn lesion, and which of them are out of bounds; ``parent``: the healthy one, if it is."""
        numbers = _of_image(image) | self._of_lesion(lesion)
        del numbers["change"]  # which a drawn lesion has as what differs from its parent
        if parent is not None:
            changed = np.abs(grey_of(image) - grey_of(parent))[image.soft >= 0.5]
            numbers["change"] = float(changed.mean()) if changed.size else None
        if lesion.sample.healthy:  # no lesion was asked for
            numbers = {name: value for name, value in numbers.items() if name == "seam"}
        kind, failures = asked_type(lesion.sample) or "", {}
        for name, value in numbers.items():
            bounds = self.bounds[name]
            if fault := bounds.get(kind, bounds[ALL]).fault(value):
                failures[name] = fault
        return {name: None if value is None else round(value, DIGITS) for name, value in numbers.items()}, failures

    def _of_lesion(self, lesion: Lesion) -> Numbers:
        """Those of MEANING that the lesion alone decides."""
        return {"agreement": self._agreement(lesion), "contrast": lesion.contrast}

    def _agreement(self, lesion: Lesion) -> float:
        """The margin of ``ldm.evaluation.choice.score``, with the training lesions' prompts.

        Of a type that these do not have its own prompt counts; where no type is known, the only other one is healthy.
        """
        kind = asked_type(lesion.sample) or ""
        own = self.directions.get(kind)
        if own is None:
            own = text_embeddings(self.encoder, [lesion.sample.prompt])[0]
        others = [each for name, each in self.directions.items() if kind and name != kind]
        cosines = [float(lesion.embedding @ each) for each in (own, self.healthy, *others)]
        return cosines[0] - max(cosines[1:])

    def _called(self, sample: Sample, pixels: np.ndarray) -> tuple[str | None, str | None]:
        """What the judge sees in a drawn image, and what is wrong with it, in words."""
        assert self.judge
        try:
            (seen,) = self.judge([sample], [pixels])
        except MedSoftError as error:
            return None, f"cannot be judged: {error}"
        kind, known = asked_type(sample), {name.lower() for name in self.judge.classes}
        if sample.healthy or kind in known:
            wanted = HEALTHY if sample.healthy else str(kind)
            return seen, None if seen.lower() == wanted else f"{seen}, expected {wanted}"
        return seen, "healthy, expected a lesion" if seen == HEALTHY else None


def _of_image(image: PreparedSample) -> Numbers:
    """Those of MEANING that need the image of a lesion, which is real."""
    grey, ring = grey_of(image), ring_around(image.hard)
    surrounded = ring.any() and image.hard.any()
    change = float(np.abs(grey[image.hard] - grey[ring].mean()).mean()) if surrounded else None
    return {"change": change, "seam": border_over_surroundings(grey, image.soft)}


def as_drawn(result: Result, prepared: PreparedSample, data: DataConfig) -> tuple[Sample, PreparedSample]:
    """A result, before it is written, as the sample that it is going to be, and what the networks see of it."""
    task, meta = result.task, dict(result.metadata)
    sample = dataclasses.replace(
        task.sample,
        sample_id=task.name,
        parent_id=task.sample.sample_id,
        prompt=task.prompt,
        lesion_type=meta.get("lesion_type"),
        soft_mask=None,
        synthetic=True,
        meta=meta,
    )
    mask = Mask(prepared.hard.astype(np.float32))
    return sample, fit_sample(sample, result.image.result, mask, data, soft=prepared.soft)
