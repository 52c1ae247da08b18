"""The split of a data set by patient, and the annotation files that hold it. No torch."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from ldm.core.errors import FileError, MedSoftError, UsageError, warn_of_first
from ldm.core.files import (
    JSON_LINES,
    content_id,
    fingerprint,
    json_text,
    named_seed,
    read_json,
    read_records,
    write_together,
)
from ldm.core.tables import counted
from ldm.data.annotations import annotation_texts, load_samples, rejects_text
from ldm.data.checks import annotation_rows, leaks, salted_digest, warn_of_similar_prompts
from ldm.data.samples import Reject, Sample, is_number, shown

log = logging.getLogger(__name__)

Stratum = tuple[int, str]  # 1 for a patient with a lesion, and its type

SPLITS = ("train", "val", "test")
SHOWN_REJECTS = 20


def split_by_patient(
    samples: Sequence[Sample],
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    kept: Mapping[str, str] | None = None,
) -> dict[str, list[Sample]]:
    """Split into train, val and test so that no patient is on two sides; stratified by class and lesion type.

    A patient with any lesion counts as diseased. ``kept`` gives the side of patients who have one already, by
    patient_id: they stay there, whoever comes in addition, and the others are dealt so that the shares of all come near
    ``fractions``. Deterministic for a seed and independent of the order of ``samples``. Train is never empty; val and
    test get a patient each as soon as there are enough. Raises UsageError for fractions that are not three shares of 1
    with something for train.
    """
    shares = _shares(fractions)
    patients: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.sample_id):
        patients.setdefault(sample.patient_id, []).append(sample)
    strata = {name: _stratum(group) for name, group in patients.items()}
    sides = {name: side for name, side in (kept or {}).items() if name in patients}
    sides |= _deal(strata, sides, shares, seed)
    result: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for patient, group in patients.items():
        result[sides[patient]].extend(group)
    return {name: sorted(group, key=lambda sample: sample.sample_id) for name, group in result.items()}


def _deal(
    strata: Mapping[str, Stratum], kept: Mapping[str, str], shares: Mapping[str, Fraction], seed: int
) -> dict[str, str]:
    """The sides of the patients in ``strata`` who have none in ``kept``.

    How many of a stratum go to each side is found by dealing: to the side that is furthest behind its share, which
    keeps every stratum near the shares. Who goes there follows a hash of seed and patient, in which a side is one
    interval: two deals whose patients are nearly the same agree on nearly all of them.
    """
    sizes = Counter(strata.values())
    totals, counts = Counter(kept.values()), Counter((strata[name], side) for name, side in kept.items())
    dealt: dict[Stratum, list[str]] = {}
    # Rare kinds come first: the first patients go to train.
    new = sorted(set(strata) - set(kept), key=lambda name: (sizes[strata[name]], strata[name]))
    for number, stratum in enumerate(map(strata.__getitem__, new), len(kept) + 1):
        behind = {side: shares[side] * number - totals[side] for side in SPLITS}
        if kept:  # strata whose patients come one by one stay near the shares too
            members = sum(counts[stratum, side] for side in SPLITS) + 1
            behind = {side: behind[side] + shares[side] * members - counts[stratum, side] for side in SPLITS}
        side = max(SPLITS, key=behind.__getitem__)
        totals[side] += 1
        counts[stratum, side] += 1
        dealt.setdefault(stratum, []).append(side)
    wanted = [side for side in SPLITS if shares[side] > 0]
    for side in wanted:
        spare = {stratum: given.count("train") for stratum, given in sorted(dealt.items())}
        if not totals[side] and len(strata) >= len(wanted) and any(spare.values()):
            # The commonest kind can spare one; on a tie, the healthy ones.
            given = dealt[max(spare, key=lambda stratum: spare[stratum])]
            given[given.index("train")] = side
            totals[side] += 1
    result: dict[str, str] = {}
    for stratum, given in dealt.items():
        names = (name for name in new if strata[name] == stratum)
        ordered = sorted(names, key=lambda name: (named_seed("split", seed, name), name))
        result |= dict(zip(ordered, sorted(given, key=SPLITS.index), strict=True))
    return result


def _shares(fractions: Sequence[float]) -> dict[str, Fraction]:
    valid = len(fractions) == 3 and all(is_number(value) and value >= 0 for value in fractions)
    if not valid or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        given = " ".join(str(value) for value in fractions)
        raise UsageError(
            f"fractions: expected three numbers (train above 0, val, test) that add up to 1, found {given}"
        )
    return {name: Fraction(value).limit_denominator(10**6) for name, value in zip(SPLITS, fractions, strict=True)}


def _stratum(samples: list[Sample]) -> Stratum:
    types = [sample.lesion_type or "" for sample in samples if not sample.healthy]
    return (1, max(sorted(set(types)), key=types.count)) if types else (0, "")


_CURE = "put it right, or remove the _train, _val and _test file so that every patient is dealt anew"


def prepare_dataset(
    root_dir: Path,
    output_file: Path,
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    strict: bool = False,
    synthetic: bool = False,
) -> list[Reject]:
    """Check every sample of a data source, write the annotation file and its split; returns the rejects.

    ``root_dir``: a dataset folder, or whatever else a source in ``ldm.data.annotations.SOURCES`` reads. Patients whom
    the files of an earlier split with this seed and these fractions name keep their sides, and so do those who were
    away for a time. Synthetic samples are left out, or, if ``synthetic``, go to the side of the real sample that they
    were made from. The rejects are listed in a file beside the others; all files appear together. Raises MedSoftError,
    with nothing written, if no sample can be used, or, if ``strict``, if one cannot, or if the split that is there is
    not whole; UsageError for wrong ``fractions`` or an ``output_file`` that is a folder.
    """
    if output_file.is_dir() or not output_file.name:
        raise UsageError(f"--output_file {output_file}: expected the name of a file to write, found a folder")
    paths = output_paths(output_file)
    _shares(fractions)  # wrong fractions show before minutes of reading
    settings = f"seed {seed}, fractions {' '.join(format(value, 'g') for value in fractions)}"
    earlier = _read_split(_earlier_paths(output_file))
    real, made, digests, rejects = _usable(root_dir, strict, synthetic)
    goes_on = earlier.settings in (None, settings)
    known = _with_returned(earlier, real)
    kept = _by_samples(real, known, digests) if goes_on else {}
    groups = split_by_patient([*real, *made], seed, fractions, kept)
    groups["all"] = sorted([*real, *made], key=lambda sample: sample.sample_id)
    absent = _without_present(known, groups["all"]) if goes_on else NOBODY
    _log_moves(groups, known, kept, len(known.sides) - len(earlier.sides))
    lines, files = output_file.suffix.lower() == JSON_LINES, dict[Path, Iterable[str]]()
    files |= {paths[name]: annotation_texts(paths[name], group, settings, digests) for name, group in groups.items()}
    if rejects:
        files[paths["rejects"]] = [rejects_text(rejects, lines)]
    if absent.patients or absent.samples:
        files[paths["absent"]] = [json_text({"split": settings, **absent._asdict()}, None if lines else 2)]
    write_together(files)
    for path in {paths["rejects"], paths["absent"]} - set(files):
        path.unlink(missing_ok=True)
    if rejects:
        log.warning("%s rejected, listed in %s", counted(len(rejects), "sample"), shown(paths["rejects"]))
    if absent.patients:
        log.info("the sides of those who are gone are kept in %s", shown(paths["absent"]))
    _log_counts(groups, paths)
    _warn_of_problems(groups, paths, digests, fractions)
    return rejects


def _usable(
    root_dir: Path, strict: bool, synthetic: bool
) -> tuple[list[Sample], list[Sample], dict[str, str], list[Reject]]:
    """The real samples, the synthetic ones that go with them, every image's SHA-256 by sample, and the rejects.

    Raises as ``prepare_dataset`` where nothing is left, or where ``strict`` allows no reject.
    """
    samples, rejects = load_samples(root_dir)
    real = [sample for sample in samples if not sample.synthetic]
    used = samples if synthetic else real
    digests = {s.sample_id: digest for s in used if (digest := s.image_sha256 or content_id(s.image))}
    made, orphans = _with_parents(real, [s for s in used if s.synthetic], digests)
    rejects = [*rejects, *orphans]
    if len(used) < len(samples):
        words = "are synthetic and left out; --synthetic takes them along, each on its parent's side"
        log.warning("%d of %d samples %s", len(samples) - len(real), len(samples), words)
    warn_of_first(log, (f"rejected: {reject}" for reject in rejects), shown=SHOWN_REJECTS)
    if not real:
        said = counted(len(samples), "usable sample is", "usable samples are")
        raise MedSoftError(f"{root_dir}: {said} synthetic, none is real; nothing was written")
    if rejects and strict:
        raise MedSoftError(
            f"{root_dir}: {counted(len(rejects), 'sample')} cannot be used and --strict was given; nothing written"
        )
    return real, made, digests, rejects


class Absent(NamedTuple):
    """The sides of those who were in an earlier data set and are not in this one, by the salted digests of their ids.

    No name is kept of somebody who was taken out of the data for good.
    """

    salt: str
    patients: dict[str, str]
    samples: dict[str, str]


class EarlierSplit(NamedTuple):
    """What the files of an earlier split say: the side of each patient_id and of each real sample_id, the sample_ids by
    the SHA-256 of their image, and the seed and fractions that it was made with (None where there is none, or an older
    version wrote it)."""

    sides: dict[str, str]
    places: dict[str, str]
    images: dict[str, list[str]]
    settings: str | None
    absent: Absent


NOBODY = Absent("", {}, {})


def _read_split(paths: Mapping[str, Path]) -> EarlierSplit:
    """The split at ``paths``; an empty one where there is none.

    Raises MedSoftError for a split that is not whole, has a patient on two sides, or names neither patients nor
    samples.
    """
    there = [name for name in SPLITS if paths[name].exists()]
    found = EarlierSplit({}, {}, {}, None, NOBODY)
    for name in SPLITS if there else ():
        if name not in there:
            raise MedSoftError(f"{paths[name]}: is missing beside {paths[there[0]].name}; {_CURE}")
        try:
            found = _with_part(found, name, paths[name])
        except FileError as error:
            raise MedSoftError(f"{error}; {_CURE}") from error
    if found.settings and paths["absent"].exists():
        found = found._replace(absent=_read_absent(paths["absent"], found.settings))
    return found


def _with_part(found: EarlierSplit, name: str, path: Path) -> EarlierSplit:
    """``found`` with what the file at ``path`` says of the part ``name``; FileError where that cannot be."""
    for place, record in read_records(path, "annotation file"):
        if not isinstance(record, dict):
            raise FileError(path, f"{place}: expected an object, found {type(record).__name__}")
        patient = str(record.get("patient_id") or record.get("sample_id") or "")
        if not patient:
            raise FileError(path, f"{place} has neither patient_id nor sample_id")
        if found.sides.setdefault(patient, name) != name:
            raise FileError(path, f"patient {patient} is in {found.sides[patient]} too")
        if not record.get("synthetic"):
            found.places[str(record.get("sample_id"))] = name
            found.images.setdefault(str(record.get("image_sha256")), []).append(str(record.get("sample_id")))
        found = found._replace(settings=record.get("split", found.settings))
    return found


def _read_absent(path: Path, settings: str) -> Absent:
    """Who is away, says the file at ``path``; nobody where it belongs to another split than that of ``settings``."""
    record = read_json(path, "record of absent patients")
    parts = [record.get(name) for name in ("patients", "samples")] if isinstance(record, dict) else [None]
    sound = all(isinstance(part, dict) and all(side in SPLITS for side in part.values()) for part in parts)
    if not sound or not isinstance(record.get("salt"), str):
        raise MedSoftError(f"{path}: is damaged; put it right, or remove it so that who was away is dealt anew")
    return Absent(record["salt"], *parts) if record.get("split") == settings else NOBODY


def _with_returned(earlier: EarlierSplit, real: Sequence[Sample]) -> EarlierSplit:
    """The earlier split with the names of those among ``real`` who had been away."""
    salt, patients, samples = earlier.absent
    returned = {s.patient_id: side for s in real if (side := patients.get(salted_digest(salt, s.patient_id)))}
    places = {s.sample_id: side for s in real if (side := samples.get(salted_digest(salt, s.sample_id)))}
    return earlier._replace(sides=returned | earlier.sides, places=places | earlier.places)


def _without_present(known: EarlierSplit, present: Sequence[Sample]) -> Absent:
    """Those of the earlier split who are not among the samples that are ``present``."""
    salt = known.absent.salt or fingerprint(["absent", *sorted(known.sides)])[:32]
    lost = []
    for earlier, sides, names in (
        (known.absent.patients, known.sides, {sample.patient_id for sample in present}),
        (known.absent.samples, known.places, {sample.sample_id for sample in present}),
    ):
        all_sides = earlier | {salted_digest(salt, name): side for name, side in sides.items()}
        here = {salted_digest(salt, name) for name in names}
        lost.append({digest: side for digest, side in sorted(all_sides.items()) if digest not in here})
    return Absent(salt, *lost)


def _by_samples(real: Sequence[Sample], known: EarlierSplit, digests: Mapping[str, str]) -> dict[str, str]:
    """The sides of the earlier split, and under a patient's new id that of the samples, which had another or none then.

    A sample is known by its name, or, where its folder was renamed, by its image, which only the sample had that is not
    there any more; ``digests``: sample_id -> SHA-256.

    Raises MedSoftError for patients whose samples lie on two sides now that they have one id; samples that come to a
    patient of another side are warned of.
    """
    sides, moved = dict(known.sides), []
    here = {sample.sample_id for sample in real}
    for sample in real:
        before = known.images.get(digests.get(sample.sample_id, ""), [])
        renamed = sample.sample_id not in known.places and len(before) == 1 and before[0] not in here
        side = known.places.get(before[0] if renamed else sample.sample_id)
        if side and sides.setdefault(sample.patient_id, side) != side:
            if sample.patient_id not in known.sides:
                raise MedSoftError(
                    f"{sample.image.parent}: its patient, {sample.patient_id}, has another id than in the earlier "
                    f"split, which has samples of this patient in {side} and in {sides[sample.patient_id]}; {_CURE}"
                )
            now, patient = sides[sample.patient_id], sample.patient_id
            moved.append(f"{sample.sample_id} from {side} to {now}, as a sample of {patient}")
    if moved:
        text = "warning: %s changed sides with their patient's id, the first: %s; what was trained on the earlier split"
        log.warning(f"{text} must not be judged on this split", counted(len(moved), "sample"), shown(moved[0]))
    return sides


def _with_parents(
    real: Sequence[Sample], made: Sequence[Sample], digests: Mapping[str, str]
) -> tuple[list[Sample], list[Reject]]:
    """Synthetic samples under the patient of the real one that they were made from; rejects where it is not here.

    What they say of the parent's image (its SHA-256, else its path) decides; ``digests``: sample_id -> SHA-256. A
    patient_id that real samples have, or a parent's name that nothing contradicts, does so with a warning.
    """
    named = {sample.patient_id for sample in real if sample.patient_id != sample.sample_id}
    placed: dict[str, Sample] = {}
    unsure: list[str] = []
    waiting = {sample.sample_id: sample for sample in made}
    before = -1
    while before < len(placed):  # what was made from synthetic samples comes after these
        before = len(placed)
        parents = _Parents([*real, *placed.values()], digests)
        for name, sample in list(waiting.items()):
            if patient := parents.patient_of(sample):
                placed[name] = replace(waiting.pop(name), patient_id=patient)
        for name, sample in list(waiting.items()) if len(placed) == before else ():
            patient = sample.patient_id if sample.patient_id in named else parents.namesake(sample)
            if patient:
                unsure.append(name)
                placed[name] = replace(waiting.pop(name), patient_id=patient)
    if unsure:
        said = counted(len(unsure), "synthetic sample says", "synthetic samples say")
        text = "warning: %s of the parent no more than its name or patient, which decides here; the first: %s"
        log.warning(text, said, shown(unsure[0]))
    rejects = []
    for sample in waiting.values():
        reason = f"synthetic, and neither its parent_id {sample.parent_id!r} nor its patient is a real sample's"
        if sample.parent_id in parents.by_name:
            reason = f"synthetic, and made from another image than that of {sample.parent_id} here"
        rejects.append(Reject(sample.sample_id, sample.image.with_name("meta.json"), reason))
    return list(placed.values()), rejects


class _Parents:
    """Samples by what a synthetic one may say of its parent: the digest of its image, its path, its name."""

    def __init__(self, samples: Sequence[Sample], digests: Mapping[str, str]) -> None:
        self.digests = digests
        self.by_name = {sample.sample_id: sample for sample in samples}
        self.by_path = {os.path.abspath(sample.image): sample for sample in samples}
        self.by_digest = {digests.get(sample.sample_id): sample for sample in samples}

    def patient_of(self, child: Sample) -> str | None:
        """The patient of the sample that this one was certainly made from; None if that is not here."""
        digest, found = str(child.meta.get("parent_sha256") or ""), self.by_path.get(_parent_path(child))
        if digest:
            equal = (found, self.by_name.get(child.parent_id or ""), self.by_digest.get(digest))
            found = next((each for each in equal if each and self.digests.get(each.sample_id) == digest), None)
        return found.patient_id if found else None

    def namesake(self, child: Sample) -> str | None:
        """The patient of the sample that has the parent's name, where nothing shows that it is another one."""
        contradicted = child.meta.get("parent_sha256") or os.path.isfile(_parent_path(child))
        found = None if contradicted else self.by_name.get(child.parent_id or "")
        return found.patient_id if found else None


def _parent_path(child: Sample) -> str:
    path = child.meta.get("parent_image")
    return os.path.abspath(child.image.parent / path) if isinstance(path, str) and path and "\0" not in path else ""


def _log_moves(groups: Mapping[str, list[Sample]], known: EarlierSplit, kept: Mapping[str, str], returned: int) -> None:
    """Say which patients of the split ``known`` kept their sides, moved, are gone, came back, or are new.

    ``kept``: the sides that were kept, empty where everybody was dealt anew.
    """
    sides = {sample.patient_id: name for name in SPLITS for sample in groups[name]}
    before = kept or known.sides
    old, new = set(before) & set(sides), Counter(side for patient, side in sides.items() if patient not in before)
    gone = len(set(known.sides) - set(sides) - {sample.sample_id for sample in groups["all"]})
    if kept:
        gone = max(0, gone - len(old - set(known.sides)))  # these have another name now
        added = ", ".join(f"{new[name]} in {name}" for name in SPLITS)
        stay = counted(len(old), "patient keeps their side", "patients keep their sides")
        went = counted(gone, "of the earlier split is gone", "of the earlier split are gone")
        log.info("%s, %s, %s (%s)", stay, went, counted(new.total(), "is new", "are new"), added)
        if returned:
            said = counted(returned, "patient is back on the side", "patients are back on the sides")
            log.info("%s that they had before", said)
        if gone > len(old) and new:
            message = "warning: %d of %d patients of the earlier split are gone and %d are new: where only the names of"
            counts = gone, len(known.sides), new.total()
            log.warning(f"{message} folders, ids or the root have changed, these patients were dealt anew", *counts)
    elif before:
        moved = sum(before[patient] != sides[patient] for patient in old)
        message = (
            "warning: another seed or other fractions: %d of %d patients are on another side than before; what was"
        )
        log.warning(f"{message} trained on the earlier split must not be judged on this one", moved, len(old))


def output_paths(output_file: Path) -> dict[str, Path]:
    """The files beside ``output_file``: all, each part, rejects and absent; different ones whatever its suffix is.

    They are JSON Lines if ``output_file`` ends with .jsonl, else JSON.
    """
    suffix = output_file.suffix.lower()
    base = output_file.stem if suffix in (".json", JSON_LINES) else output_file.name
    kind = JSON_LINES if suffix == JSON_LINES else ".json"
    names = (*SPLITS, "rejects", "absent")
    return {"all": output_file} | {name: output_file.with_name(f"{base}_{name}{kind}") for name in names}


def _earlier_paths(output_file: Path) -> dict[str, Path]:
    """Where the split before is: in the files that will be written, or, without those, in those of the other form."""
    paths, suffix = output_paths(output_file), output_file.suffix.lower()
    other = {".json": JSON_LINES, JSON_LINES: ".json"}.get(suffix)
    if other is None or any(paths[name].exists() for name in SPLITS):
        return paths
    twin = output_paths(output_file.with_suffix(other))
    if any(twin[name].exists() for name in SPLITS):
        log.info("patients keep the sides that %s and its parts give them", shown(twin["all"]))
    return twin


def _log_counts(groups: Mapping[str, list[Sample]], paths: Mapping[str, Path]) -> None:
    log.info("%-6s %8s %8s %9s %9s  %s", "", "samples", "healthy", "diseased", "patients", "file")
    for name, group in groups.items():
        healthy, patients = sum(sample.healthy for sample in group), len({sample.patient_id for sample in group})
        counts = (len(group), healthy, len(group) - healthy, patients)
        log.info("%-6s %8d %8d %9d %9d  %s", name, *counts, shown(paths[name]))


def _warn_of_problems(
    groups: Mapping[str, list[Sample]],
    paths: Mapping[str, Path],
    digests: Mapping[str, str],
    fractions: Sequence[float],
) -> None:
    """Say what the data lack for a later step: patients, masks, a split that is too small, and leaks between splits."""
    samples = groups["all"]
    nameless = sum(sample.patient_id == sample.sample_id for sample in samples)
    if nameless:
        which = "no meta.json names a" if nameless == len(samples) else f"{nameless} of {len(samples)} samples have no"
        log.info("%s patient_id: each such sample counts as a patient of its own in the split", which)
    nowhere = sum(s.healthy and s.anatomy is None and not any(s.box) for s in samples)
    if nowhere:
        said = counted(nowhere, "healthy sample has", "healthy samples have")
        log.info("%s neither a mask nor anatomy.png: for the classifier, not inpainted", said)
    for name, share in zip(SPLITS, fractions, strict=True):
        if not groups[name] and share:
            log.warning("%s is empty: too few patients (%d)", shown(paths[name]), len({s.patient_id for s in samples}))
    warn_of_similar_prompts(samples)
    shared = leaks(row for name in SPLITS for row in annotation_rows(name, groups[name], digests))
    warn_of_first(log, (f"warning: {leak}" for leak in shared), shown=SHOWN_REJECTS)
