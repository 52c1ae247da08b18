"""The split of a data set by patient, and the annotation files that hold it. No torch."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id, named_seed
from ldm.data.annotations import load_samples, write_annotations, write_rejects
from ldm.data.checks import annotation_rows, leaks, warn_of_similar_prompts
from ldm.data.samples import Reject, Sample, is_number, shown

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
SHOWN_REJECTS = 20


def split_by_patient(
    samples: Sequence[Sample], seed: int = 0, fractions: Sequence[float] = (0.7, 0.1, 0.2)
) -> dict[str, list[Sample]]:
    """Split into train, val and test so that no patient is on two sides; stratified by class and lesion type.

    A patient with any lesion counts as diseased. Deterministic for a seed and independent of the order of ``samples``.
    Train is never empty; val and test get a patient each as soon as there are enough. Raises UsageError for fractions
    that are not three shares of 1 with something for train.
    """
    shares = _shares(fractions)
    patients: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.sample_id):
        patients.setdefault(sample.patient_id, []).append(sample)
    strata = {name: _stratum(group) for name, group in patients.items()}
    sizes = Counter(strata.values())
    # Rare kinds come first: the first patients go to train.
    ordered = sorted(patients, key=lambda name: (sizes[strata[name]], strata[name], named_seed("split", seed, name)))
    sides: dict[str, list[str]] = {name: [] for name in SPLITS}
    for number, patient in enumerate(ordered, 1):
        # Each patient goes to the side that is furthest behind its share, which keeps every stratum near the shares.
        side = max(SPLITS, key=lambda name: shares[name] * number - len(sides[name]))
        sides[side].append(patient)
    wanted = [name for name in SPLITS if shares[name] > 0]
    for name in wanted:
        if not sides[name] and len(ordered) >= len(wanted):
            trained = Counter(strata[patient] for patient in sides["train"])
            # The commonest kind can spare one; on a tie, the healthy ones.
            commonest = max(sorted(trained), key=lambda stratum: trained[stratum])
            moved = next(patient for patient in reversed(sides["train"]) if strata[patient] == commonest)
            sides["train"].remove(moved)
            sides[name].append(moved)
    members = {patient: name for name, group in sides.items() for patient in group}
    result: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for patient in sorted(patients):
        result[members[patient]].extend(patients[patient])
    return {name: sorted(group, key=lambda sample: sample.sample_id) for name, group in result.items()}


def _shares(fractions: Sequence[float]) -> dict[str, Fraction]:
    valid = len(fractions) == 3 and all(is_number(value) and value >= 0 for value in fractions)
    if not valid or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        given = " ".join(str(value) for value in fractions)
        raise UsageError(
            f"fractions: expected three numbers (train above 0, val, test) that add up to 1, found {given}"
        )
    return {name: Fraction(value).limit_denominator(10**6) for name, value in zip(SPLITS, fractions, strict=True)}


def _stratum(samples: list[Sample]) -> tuple[int, str]:
    types = [sample.lesion_type or "" for sample in samples if not sample.healthy]
    return (1, max(sorted(set(types)), key=types.count)) if types else (0, "")


def prepare_dataset(
    root_dir: Path,
    output_file: Path,
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    strict: bool = False,
) -> list[Reject]:
    """Check every sample of a data source, write the annotation file and its split; returns the rejects.

    ``root_dir``: a dataset folder, or whatever else a source in ``ldm.data.annotations.SOURCES`` reads.

    The rejects are listed in a file beside the others. Raises MedSoftError, with nothing written, if no sample can be
    used, or, if ``strict``, if one cannot; UsageError for wrong ``fractions`` or an ``output_file`` that is a folder.
    """
    paths = output_paths(output_file)
    _shares(fractions)  # wrong fractions show before minutes of reading
    samples, rejects = load_samples(root_dir)
    for reject in rejects[:SHOWN_REJECTS]:
        log.warning("rejected: %s", reject)
    if len(rejects) > SHOWN_REJECTS:
        log.warning("... and %d more", len(rejects) - SHOWN_REJECTS)
    if rejects and strict:
        raise MedSoftError(f"{root_dir}: {len(rejects)} samples cannot be used and --strict was given; nothing written")
    groups = {**split_by_patient(samples, seed, fractions), "all": samples}
    for name, group in groups.items():
        write_annotations(paths[name], group)
    write_rejects(paths["rejects"], rejects)
    _log_counts(groups, paths)
    _warn_of_problems(groups, paths)
    if rejects:
        log.warning("%d samples rejected, listed in %s", len(rejects), shown(paths["rejects"]))
    return rejects


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
    if all(sample.patient_id == sample.sample_id for sample in samples):
        log.info("no meta.json names a patient_id: each sample counts as a patient of its own in the split")
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
