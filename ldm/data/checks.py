"""Checks of whole data sets, for preparation, training, tool/doctor.py and the classifier: leaks between splits,
classes and prompts. No file is decoded here; no torch."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm.core.errors import FileError, MedSoftError, warn_of_first
from ldm.core.files import fingerprint
from ldm.core.tables import counted, shortened
from ldm.core.threads import thread_pool
from ldm.data.images import check_ends
from ldm.data.samples import Reject, Sample, contradicts_type, is_trained_on, plain, probably_healthy, shown

log = logging.getLogger(__name__)

SHOWN = 10
FEWEST_PATIENTS = 10  # of a class; an interval over fewer says nothing
SEPARATES, CHANCE = 0.75, 0.02  # AUC of one attribute from which it is warned of, if chance does so in fewer cases
PERMUTATIONS, VALUES = 500, 6
LARGEST = 1e300  # numbers beyond are compared as texts
UNKNOWN = "unknown"
# Keys of meta.json that describe the acquisition, in lower case and without other signs than letters.
ACQUISITION = re.compile(
    "(site|cent(er|re)|hospital|institution(name)?|scanner|device|stationname|manufacturer(smodelname|modelname)?|model"
    "|modality|region|bodypart(examined)?|level|sequence(name)?|series(description)?|protocol(name)?|plane|view"
    "|orientation|(magnetic)?fieldstrength|kvp?|(convolution)?kernel|contrast|slicethickness(mm)?|spacingmm|unit|window"
    "|(patient)?(sex|age)|gender)"
)
_DAY, _MONTH, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
_DATE = re.compile(
    rf"(?<!\d)(?:{_YEAR}([-_./]){_MONTH}\1{_DAY}|{_DAY}([-_./]){_MONTH}\2{_YEAR}|{_YEAR}(?:0[1-9]|1[0-2])[0-3]\d)(?!\d)"
)
# Two words that begin with a capital, which these seldom do together with a name.
_PERSON = re.compile(r"(?<![A-Za-z])([A-ZÀ-Þ][a-zà-ÿ]+|[A-Z]{2,})[ _,]+([A-ZÀ-Þ][a-zà-ÿ]+)(?![A-Za-z])")
_NO_PERSON = re.compile(
    "Patient|Case|Sample|Subject|Image|Slice|Series|Study|Scan|Spine|Lesion|Vertebra|Body|Level|Healthy|Diseased|Control|"
    "Lumbar|Thoracic|Cervical|Sacral|Sagittal|Axial|Coronal|Left|Right|Test|Train|Val|Group|Site|Hospital|Data.*|Part"
)
_PERSONAL_KEY = re.compile(
    r"(patients?)?_?(name|birth_?(date|day)|date_?of_?birth|address|phone|email)|(study|series|acquisition|scan)?_?date",
    re.IGNORECASE,
)


class Row(NamedTuple):
    """A sample as the leak checks see it: its set, names, and a hash of its image (None = not known)."""

    group: str
    sample_id: str
    patient_id: str
    digest: str | None


def annotation_rows(group: str, samples: Iterable[Sample], digests: Mapping[str, str]) -> list[Row]:
    """The rows of the set ``group``; ``digests``: sample_id -> hash of its image."""
    return [Row(group, s.sample_id, s.patient_id, digests.get(s.sample_id)) for s in samples]


def leaks(rows: Iterable[Row]) -> list[str]:
    """A sentence for every patient and every identical image that two sets share (once for each pair of sets)."""
    patients: dict[str, str] = {}
    images: dict[str, Row] = {}
    found: dict[tuple, str] = {}
    for row in rows:
        other = patients.setdefault(row.patient_id, row.group)
        if other != row.group:
            found[row.patient_id, other, row.group] = (
                f"patient {row.patient_id} is in the {other} set and in the {row.group} set (sample {row.sample_id}); "
                "one patient belongs to one set: split by patient_id again"
            )
        twin = images.setdefault(row.digest, row) if row.digest else row
        if twin.group != row.group:
            found[row.digest, twin.group, row.group] = (
                f"sample {twin.sample_id} of the {twin.group} set and sample {row.sample_id} of the {row.group} set "
                "are the same image, pixel for pixel; remove one of them"
            )
    return list(found.values())


def check_disjoint(rows: Iterable[Row]) -> None:
    """Raise MedSoftError, by name, when two sets share a patient or an identical image; warn of nearly equal ids."""
    rows = list(rows)
    for leak in leaks(rows):
        raise MedSoftError(leak)
    _warn("one patient in two sets?", near_leaks(rows))


TRAINED_ON = "trained_on"  # where checkpoints, results and classifiers keep what ``trained_on`` returns


def trained_on(step: str, patients: Iterable[str], *earlier: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which patients are behind what ``step`` has made: groups {"salt", "steps", "patients"} of salted digests.

    ``patients``: those that the step itself learned from; ``earlier``: the groups of what went into it. No name of a
    patient is stored, but whoever knows one can ask for it. The salt follows from the patients, so the same ones make
    the same group, which is kept once with all its steps.
    """
    names = sorted(set(patients))
    salt = fingerprint([TRAINED_ON, names])[:32]
    own = {"salt": salt, "steps": [step], "patients": sorted(salted_digest(salt, name) for name in names)}
    groups: dict[str, dict[str, Any]] = {}
    for group in [*(group for each in earlier for group in each), *([own] if names else [])]:
        known = groups.setdefault(group["salt"], {**group, "steps": []})
        known["steps"] = sorted({*known["steps"], *group["steps"]})
    return [groups[salt] for salt in sorted(groups)]


def salted_digest(salt: str, name: str) -> str:
    """What stands for the name of a patient or a sample in a file: whoever knows the name can ask for it."""
    return fingerprint([salt, name])[:16]


def groups_of(metadata: Mapping[str, Any], source: object) -> list[dict[str, Any]]:
    """The groups that the ``metadata`` of ``source`` carries; one that was trained and has none is warned of."""
    groups = metadata.get(TRAINED_ON)
    if groups is None and metadata.get("stage") == "converted":
        return []
    if groups is None:
        log.warning("warning: %s does not say which patients it was trained on, so nobody can check for them", source)
    elif not is_trained_on(groups):
        raise MedSoftError(f"{source}: its `{TRAINED_ON}` is damaged; expected a list of {{salt, steps, patients}}")
    return groups or []


def groups_of_samples(name: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The groups of the generators that made the synthetic ones of ``samples``; a warning where they do not say."""
    synthetic = [sample for sample in samples if sample.synthetic]
    silent = sum(TRAINED_ON not in sample.meta for sample in synthetic)
    if silent:
        what = "synthetic samples do not say which patients their generator was trained on"
        log.warning("warning: %s: %d of %d %s, so nobody can check for them", name, silent, len(synthetic), what)
    return trained_on("", (), *(sample.meta.get(TRAINED_ON, []) for sample in synthetic))


def drawn_by(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """What drew the synthetic ones among ``samples``, as their meta.json say it, and how many of them each drew.

    [{"checkpoint_sha256": ..., "method": ..., "samples": 12}], the most first; None for what a meta.json does not say:
    copy-paste has a method and no checkpoint, other programs' images perhaps neither.
    """
    keys = ("checkpoint_sha256", "method")
    counts = Counter(tuple(sample.meta.get(key) for key in keys) for sample in samples if sample.synthetic)
    return [dict(zip(keys, found, strict=True)) | {"samples": count} for found, count in counts.most_common()]


def real_ones(source: object, samples: Sequence[Sample]) -> list[Sample]:
    """Those of ``samples`` that are real, where real ones are measured; the others are counted in a warning."""
    real = [sample for sample in samples if not sample.synthetic]
    if len(real) < len(samples):
        said = counted(len(samples) - len(real), "synthetic sample is", "synthetic samples are")
        log.warning("warning: %s: %s left out, as real ones are measured here", source, said)
    return real


def check_synthetic(source: object, samples: Sequence[Sample]) -> None:
    """MedSoftError if some of ``samples`` are real, where only inpainted ones are meant."""
    if real := [sample for sample in samples if not sample.synthetic]:
        count = f"{len(real)} of {len(samples)} samples do not say that they are synthetic"
        raise MedSoftError(f"{source}: {count} (the first: {real[0].sample_id}); give results of dataset_infer.py")


def check_unseen(held_out: str, samples: Iterable[Sample], groups: Sequence[Mapping[str, Any]], source: object) -> None:
    """MedSoftError, by name, if patients of a validation or test set, ``held_out``, are among ``groups``."""
    patients = {sample.patient_id: sample for sample in samples}
    met, steps = set(), set()
    for group in groups:
        digests = set(group["patients"])
        found = {name for name in patients if salted_digest(group["salt"], name) in digests}
        met |= found
        steps |= set(group["steps"]) if found else set()
    if met:
        names = sorted(met)
        some = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        unnamed = all(patients[name].sample_id == name for name in names)
        hint = "; give other patients of the same folder names a patient_id in meta.json" if unnamed else ""
        raise MedSoftError(
            f"{held_out}: {len(met)} of its {len(patients)} patients ({some}) are among those that "
            f"{', '.join(sorted(steps))} learned from, says {source}; split by patient once, before the first "
            f"training, and keep to that split{hint}"
        )


def check_classes(source: str, samples: Sequence[Sample]) -> None:
    """A training set needs diseased samples (MedSoftError); one without healthy ones is warned about."""
    healthy = sum(sample.healthy for sample in samples)
    if healthy == len(samples):
        said = "the only sample that can be used is" if healthy == 1 else f"all {healthy} samples that can be used are"
        raise MedSoftError(
            f"{source}: {said} healthy; there is no lesion to learn from. Diseased "
            "samples need a mask and a prompt that is not `healthy`"
        )
    if healthy == 0:
        log.warning("warning: %s has no healthy sample: the prompt `healthy` will not be learned", source)


def check_rejected(rejects: Sequence[Reject], total: int, allowed: float) -> None:
    """MedSoftError when more than the share ``allowed`` of ``total`` samples cannot be read."""
    count = len({(reject.sample_id, str(reject.file)) for reject in rejects})
    if count > allowed * total:
        raise MedSoftError(
            f"{count} of {total} samples cannot be read, more than training.max_rejected={allowed:g} allows; the "
            f"first: {rejects[0]}. Look at the data with tool/doctor.py, or prepare it again"
        )


def damaged_files(samples: Sequence[Sample]) -> list[Reject]:
    """The samples with a file whose beginning or end shows that it cannot be read (see ``check_ends``)."""
    with thread_pool() as pool:
        return [reject for reject in pool.map(_damage, samples) if reject is not None]


def _damage(sample: Sample) -> Reject | None:
    """The first file of a sample that cannot be read."""
    for path in sample.files:
        try:
            if path is not None:
                check_ends(path)
        except FileError as error:
            return Reject(sample.sample_id, error.path, error.reason)
    return None


def similar(texts: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """Groups of distinct texts that are equal under ``key``, each with the most frequent text first."""
    groups: dict[str, Counter] = {}
    for text in texts:
        groups.setdefault(key(text), Counter())[text] += 1
    return [[text for text, _ in group.most_common()] for group in groups.values() if len(group) > 1]


def same_patient(patient_id: str) -> str:
    """An id as it is compared with others: tables write 017 as 17 or 17.0, and P-1 as P_1."""
    text = re.sub(r"(?<=\d)\.0$", "", plain(patient_id))
    return re.sub(r"[-_ ]+", " ", re.sub(r"(?<!\d)0+(?=\d)", "", text))


def near_leaks(rows: Iterable[Row]) -> list[str]:
    """A sentence for patients of two sets whose ids are the same but for case, zeros or the form of characters."""
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row.patient_id, set()).add(row.group)
    pairs = similar(groups, same_patient)
    return [
        f"patients {_listed(names)} are in different sets, but for case or the form of characters they are the same"
        for names in pairs
        if len(set().union(*(groups[name] for name in names))) > 1
    ]


def similar_prompts(samples: Iterable[Sample]) -> list[list[str]]:
    """Distinct prompts that differ only in case, spaces, punctuation or the form of accents."""
    return similar((sample.prompt for sample in samples), lambda text: " ".join(re.findall(r"\w+", plain(text))))


def looks_personal(name: str) -> str | None:
    """ "a date" or "a person's name" where a part of a path or an id looks like one; None where nothing does."""
    if _DATE.search(name):
        return "a date"
    if "^" in name:
        return "a person's name"
    pairs = (pair for pair in _PERSON.findall(name) if not any(map(_NO_PERSON.fullmatch, pair)))
    return "a person's name" if any(pairs) else None


def personal_keys(meta: Mapping[str, object]) -> list[str]:
    """The keys of a ``meta.json`` that say who somebody is, or when an image was taken, and hold something."""
    return [key for key, value in meta.items() if value and _PERSONAL_KEY.fullmatch(key)]


def warn_of_similar_prompts(samples: Iterable[Sample]) -> None:
    """One warning line for each of the first groups of near-duplicate prompts."""
    _warn("nearly the same prompt, learned as different ones", map(_listed, similar_prompts(samples)))


def doubtful_texts(samples: Sequence[Sample]) -> Iterator[tuple[str, list[str]]]:
    """What the ids, classes and prompts of a data set are probably not meant to be: each doubt, and whom it concerns.

    That is: ids or classes that differ only in case or in the form of their characters, prompts that say that there is
    no lesion in other words than ``healthy``, or contradict the lesion type.
    """
    named = any(sample.patient_id != sample.sample_id for sample in samples)
    names: list[tuple[str, Iterable[str], Callable[[str], str]]] = [
        ("patients", (s.patient_id for s in samples if named), same_patient),
        ("samples", (s.sample_id for s in samples), plain),
        ("lesion types", (s.lesion_type for s in samples if s.lesion_type), plain),
    ]
    for what, texts, key in names:
        alike = [_listed(found) for found in similar(texts, key)]
        yield f"different {what}, but for case or the form of characters the same", alike
    first = {sample.prompt: shown(sample.sample_id) for sample in reversed(samples)}
    unclear = {prompt: name for prompt, name in reversed(first.items()) if probably_healthy(prompt)}
    meaning = "counts as diseased but reads as healthy; write `healthy` if there is no lesion"
    yield f"a prompt {meaning}", [f"{name}: {prompt!r}" for prompt, name in unclear.items()]
    opposed = [sample for sample in samples if contradicts_type(sample)]
    words = "prompt and lesion_type in meta.json contradict each other; which of them is wrong?"
    yield words, [f"{shown(sample.sample_id)}: {sample.prompt!r}, {sample.lesion_type!r}" for sample in opposed]


def warn_of_texts(samples: Sequence[Sample]) -> None:
    """Warning lines for the doubtful texts of a data set, and one for each thing noted when its files were read."""
    for what, members in doubtful_texts(samples):
        _warn(what, members)
    noted: dict[str, list[Sample]] = {}
    for sample in samples:
        for note in dict.fromkeys(sample.notes):
            noted.setdefault(note, []).append(sample)
    for what, those in noted.items():  # however many: each is another fault, and none stands for the others
        more = f" (and {counted(len(those) - 1, 'more sample')})" if len(those) > 1 else ""
        log.warning("warning: %s%s: %s", shown(those[0].sample_id), more, what)


def _listed(names: Sequence[str]) -> str:
    return " | ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _warn(what: str, members: Iterable[str]) -> None:
    warn_of_first(log, (f"warning: {what}: {member}" for member in members), shown=SHOWN)


class Separation(NamedTuple):
    """How far one attribute alone, of the file or of meta.json, tells the diseased samples of a set from the healthy.

    ``auc``: area under the ROC curve of guessing by the share of diseased samples among those of the same value, 0.5 to
    1. ``p_value``: how often labels dealt at random do as well. ``values``: what most samples of each class have.
    """

    attribute: str
    auc: float
    p_value: float
    values: str

    @property
    def suspicious(self) -> bool:
        """Whether it separates the classes, and not by chance."""
        return self.auc >= SEPARATES and self.p_value <= CHANCE

    @property
    def warning(self) -> str:
        """What a reader should know of it."""
        return (
            f"{self.attribute} alone tells diseased from healthy samples (AUC {self.auc:.2f}; {self.values}); "
            "what a network learns from such a set, and its test numbers, may be that and not the lesion. Balance it, "
            "or compare samples of one value only"
        )


def sample_attributes(sample: Sample, pixels: np.ndarray) -> dict[str, float | str]:
    """What may set classes apart besides lesions: the file's properties and what meta.json says of the acquisition.

    ``pixels``: the image as read, HxW or HxWxC. A key of meta.json that a sample lacks has the value ``unknown``.
    """
    height, width = pixels.shape[:2]
    found: dict[str, float | str] = {
        "size in pixels": float(np.sqrt(height * width)),
        "width / height": width / height,
        "bits": 8.0 * pixels.dtype.itemsize,
        "colour": "colour" if pixels.ndim == 3 else "grey",
        "file format": sample.image.suffix.lower(),
    }
    given = {**sample.meta, "level": sample.level}
    for key, value in given.items():
        if ACQUISITION.fullmatch(re.sub(r"[^a-z]", "", key.lower())) and value is not None:
            mean = np.mean(value) if key == "spacing_mm" else value
            number = isinstance(mean, int | float) and not isinstance(mean, bool) and abs(mean) < LARGEST
            found[key] = float(mean) if number else " ".join(str(mean).casefold().split())
    return found


def separations(
    samples: Sequence[Sample],
    attributes: Sequence[Mapping[str, float | str]],
    first: Sequence[bool] | None = None,
    names: tuple[str, str] = ("healthy", "diseased"),
) -> list[Separation]:
    """Every attribute of ``sample_attributes`` that is not the same for all, the one that separates most first.

    ``first``: whether each sample is of the first of the two classes ``names``; by default the healthy ones are. A
    patient counts once for each class and value. Numbers of many values are cut into VALUES groups of equal size, and
    texts that occur once are one group. Empty unless there are two samples of each class.
    """
    found = []
    of_first = [sample.healthy for sample in samples] if first is None else first
    for name in dict.fromkeys(name for each in attributes for name in each):
        values = [each.get(name, UNKNOWN) for each in attributes]
        known = [place for place, value in enumerate(values) if name != "level" or value != UNKNOWN]
        groups = _value_groups([values[place] for place in known])
        rows = {(samples[place].patient_id, of_first[place], group) for place, group in zip(known, groups, strict=True)}
        second = np.array([not each for _, each, _ in sorted(rows)])
        codes = np.array([group for _, _, group in sorted(rows)])
        if len(set(groups)) < 2 or min(second.sum(), (~second).sum()) < 2:
            continue
        rng = np.random.default_rng(0)
        dealt = np.stack([second, *(rng.permutation(second) for _ in range(PERMUTATIONS))])
        aucs = _group_aucs(dealt, codes)
        p_value = float((1 + (aucs[1:] >= aucs[0] - 1e-9).sum()) / (1 + PERMUTATIONS))
        usual = [_usual([values[p] for p in known if of_first[p] == each]) for each in (True, False)]
        told = ", ".join(f"{who}: {what}" for who, what in zip(names, usual, strict=True))
        found.append(Separation(name, float(aucs[0]), p_value, told))
    return sorted(found, key=lambda each: (-each.auc, each.attribute))


def _value_groups(values: Sequence[float | str]) -> list[int]:
    """A group number for each value; see ``separations``."""
    counts = Counter(values)
    numbers = np.array([value for value in values if not isinstance(value, str)])
    edges = np.unique(np.quantile(numbers, np.arange(1, VALUES) / VALUES)) if len(set(numbers)) > VALUES else None
    names: dict[Any, int] = {}

    def group(value: float | str) -> Any:
        """What the values of one group have in common."""
        if isinstance(value, str):
            return value if counts[value] > 1 else "a value of its own"
        return value if edges is None else int(np.searchsorted(edges, value, side="right"))

    return [names.setdefault((type(value), group(value)), len(names)) for value in values]


def _group_aucs(diseased: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """AUC (P,) of guessing each of the labellings ``diseased`` (P, N) by its share within the groups (N,)."""
    positive = np.stack([np.bincount(groups, labels, minlength=groups.max() + 1) for labels in diseased])
    negative = np.bincount(groups) - positive
    positive, negative = positive[:, np.bincount(groups) > 0], negative[:, np.bincount(groups) > 0]
    order = np.argsort(positive / (positive + negative), axis=1)
    positive, negative = (np.take_along_axis(each, order, axis=1) for each in (positive, negative))
    beaten = negative.cumsum(axis=1) - negative / 2
    return (positive * beaten).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _usual(values: Sequence[float | str]) -> str:
    """What most of a class's values are: the median of numbers, else the most frequent one with its share."""
    value, count = Counter(values).most_common(1)[0]
    if 2 * count < len(values) and not any(isinstance(each, str) for each in values):
        return f"{np.median(values):.4g} (median)"  # type: ignore[arg-type]
    return f"{shortened(value) if isinstance(value, str) else f'{value:.4g}'} ({count} of {len(values)})"
