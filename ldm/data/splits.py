"""The split of a data set by patient, and the annotation files that hold it. No torch."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id, named_seed, read_json, write_together
from ldm.data.annotations import annotations_text, load_samples, rejects_text
from ldm.data.checks import annotation_rows, leaks, warn_of_similar_prompts
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
    the files of an earlier split with this seed and these fractions name keep their sides. Synthetic samples are left
    out, or, if ``synthetic``, go to the side of the real sample that they were made from. The rejects are listed in a
    file beside the others; all files appear together. Raises MedSoftError, with nothing written, if no sample can be
    used, or, if ``strict``, if one cannot, or if the split that is there is not whole; UsageError for wrong
    ``fractions`` or an ``output_file`` that is a folder.
    """
    paths = output_paths(output_file)
    _shares(fractions)  # wrong fractions show before minutes of reading
    settings = f"seed {seed}, fractions {' '.join(format(value, 'g') for value in fractions)}"
    before, places, earlier = _read_split(paths)
    samples, rejects = load_samples(root_dir)
    real = [sample for sample in samples if not sample.synthetic]
    made, orphans = _with_parents(real, [s for s in samples if s.synthetic]) if synthetic else ([], [])
    rejects = [*rejects, *orphans]
    if len(real) < len(samples) and not synthetic:
        words = "are synthetic and left out; --synthetic takes them along, each on its parent's side"
        log.warning("%d of %d samples %s", len(samples) - len(real), len(samples), words)
    _log_rejects(rejects)
    if not real:
        raise MedSoftError(f"{root_dir}: all {len(samples)} usable samples are synthetic; nothing was written")
    if rejects and strict:
        raise MedSoftError(f"{root_dir}: {len(rejects)} samples cannot be used and --strict was given; nothing written")
    kept = _by_samples(real, before, places) if earlier in (None, settings) else {}
    groups = split_by_patient([*real, *made], seed, fractions, kept)
    groups["all"] = sorted([*real, *made], key=lambda sample: sample.sample_id)
    _log_moves(groups, before, kept)
    files = {paths[name]: annotations_text(group, settings) for name, group in groups.items()}
    if rejects:
        files[paths["rejects"]] = rejects_text(rejects)
    write_together(files)
    if rejects:
        log.warning("%d samples rejected, listed in %s", len(rejects), shown(paths["rejects"]))
    else:
        paths["rejects"].unlink(missing_ok=True)
    _log_counts(groups, paths)
    _warn_of_problems(groups, paths)
    return rejects


def _read_split(paths: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, str], str | None]:
    """The sides of patients and of samples in the split at ``paths``, and the seed and fractions that it was made with.

    ({}, {}, None) where there is none; None also where an older version wrote it. Raises MedSoftError for a split that
    is not whole, has a patient on two sides, or names neither patients nor samples.
    """
    there = [name for name in SPLITS if paths[name].exists()]
    sides: dict[str, str] = {}
    places: dict[str, str] = {}
    settings = None
    for name in SPLITS if there else ():
        if name not in there:
            raise MedSoftError(f"{paths[name]}: is missing beside {paths[there[0]].name}; {_CURE}")
        records = read_json(paths[name], "annotation file")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise MedSoftError(f"{paths[name]}: is no annotation file; {_CURE}")
        for record in records:
            patient = str(record.get("patient_id") or record.get("sample_id") or "")
            if not patient:
                raise MedSoftError(f"{paths[name]}: a record has neither patient_id nor sample_id; {_CURE}")
            if sides.setdefault(patient, name) != name:
                raise MedSoftError(f"{paths[name]}: patient {patient} is in {sides[patient]} too; {_CURE}")
            places[str(record.get("sample_id"))] = name
            settings = record.get("split", settings)
    return sides, places, settings


def _by_samples(real: Sequence[Sample], before: Mapping[str, str], places: Mapping[str, str]) -> dict[str, str]:
    """The sides ``before``, and under a patient's new id that of the samples, which had another id or none then.

    Raises MedSoftError for patients whose samples lie on two sides now that they have one id.
    """
    sides = dict(before)
    for sample in real:
        side = places.get(sample.sample_id)
        if side and sample.patient_id not in before and sides.setdefault(sample.patient_id, side) != side:
            raise MedSoftError(
                f"{sample.image.parent}: its patient, {sample.patient_id}, has another id than in the earlier split, "
                f"which has samples of this patient in {side} and in {sides[sample.patient_id]}; {_CURE}"
            )
    return sides


def _log_rejects(rejects: Sequence[Reject]) -> None:
    for reject in rejects[:SHOWN_REJECTS]:
        log.warning("rejected: %s", reject)
    if len(rejects) > SHOWN_REJECTS:
        log.warning("... and %d more", len(rejects) - SHOWN_REJECTS)


def _with_parents(real: Sequence[Sample], made: Sequence[Sample]) -> tuple[list[Sample], list[Reject]]:
    """Synthetic samples under the patient of the real one that they were made from; rejects where it is not here."""
    by_image = {os.path.abspath(sample.image): sample.patient_id for sample in real}
    patients = {sample.patient_id: sample.patient_id for sample in real}
    by_name = {sample.sample_id: sample.patient_id for sample in real}
    placed, rejects = [], []
    for sample in made:
        known = (
            by_image.get(os.path.abspath(sample.image.parent / str(sample.meta.get("parent_image")))),
            patients.get(sample.patient_id),
        )
        patient = next((name for name in (*known, by_name.get(sample.parent_id or "")) if name), None)
        if patient:
            placed.append(replace(sample, patient_id=patient))
        else:
            reason = f"synthetic, and neither its parent_id {sample.parent_id!r} nor its patient is a real sample's"
            rejects.append(Reject(sample.sample_id, sample.image.with_name("meta.json"), reason))
    return placed, rejects


def _log_moves(groups: Mapping[str, list[Sample]], before: Mapping[str, str], kept: Mapping[str, str]) -> None:
    """Say which patients of an earlier split kept their sides, moved, or are new."""
    sides = {sample.patient_id: name for name in SPLITS for sample in groups[name]}
    old, new = set(before) & set(sides), Counter(side for patient, side in sides.items() if patient not in before)
    moved = sum(before[patient] != sides[patient] for patient in old)
    added = ", ".join(f"{new[name]} in {name}" for name in SPLITS)
    if kept:
        message = "%d patients keep their sides, %d of the earlier split are gone, %d are new (%s)"
        log.info(message, len(old), len(before) - len(old), new.total(), added)
    elif before:
        message = (
            "warning: another seed or other fractions: %d of %d patients are on another side than before; what was"
        )
        log.warning(f"{message} trained on the earlier split must not be judged on this one", moved, len(old))


def output_paths(output_file: Path) -> dict[str, Path]:
    """The files beside ``output_file``: all, train, val, test, rejects; different ones whatever its suffix is."""
    if output_file.is_dir() or not output_file.name:
        raise UsageError(f"--output_file {output_file}: expected the name of a file to write, found a folder")
    base = output_file.stem if output_file.suffix.lower() == ".json" else output_file.name
    parts = {name: output_file.with_name(f"{base}_{name}.json") for name in (*SPLITS, "rejects")}
    return {"all": output_file, **parts}


def _log_counts(groups: Mapping[str, list[Sample]], paths: Mapping[str, Path]) -> None:
    log.info("%-6s %8s %8s %9s %9s  %s", "", "samples", "healthy", "diseased", "patients", "file")
    for name, group in groups.items():
        healthy, patients = sum(sample.healthy for sample in group), len({sample.patient_id for sample in group})
        counts = (len(group), healthy, len(group) - healthy, patients)
        log.info("%-6s %8d %8d %9d %9d  %s", name, *counts, shown(paths[name]))


def _warn_of_problems(groups: Mapping[str, list[Sample]], paths: Mapping[str, Path]) -> None:
    """Say what the data lack for a later step: patients, masks, a split that is too small, and leaks between splits."""
    samples = groups["all"]
    nameless = sum(sample.patient_id == sample.sample_id for sample in samples)
    if nameless:
        which = "no meta.json names a" if nameless == len(samples) else f"{nameless} of {len(samples)} samples have no"
        log.info("%s patient_id: each such sample counts as a patient of its own in the split", which)
    nowhere = sum(s.healthy and s.anatomy is None and not any(s.box) for s in samples)
    if nowhere:
        log.info("%d healthy samples have neither a mask nor anatomy.png: for the classifier, not inpainted", nowhere)
    for name in SPLITS:
        if not groups[name]:
            log.warning("%s is empty: too few patients (%d)", shown(paths[name]), len({s.patient_id for s in samples}))
    warn_of_similar_prompts(samples)
    digests = {sample.sample_id: digest for sample in samples if (digest := content_id(sample.image))}
    for leak in leaks(row for name in SPLITS for row in annotation_rows(name, groups[name], digests)):
        log.warning("warning: %s", leak)
