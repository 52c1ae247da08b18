"""Checks of whole data sets, for preparation, training, tool/doctor.py and the classifier: leaks between splits,
classes and prompts. No file is decoded here; no torch."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ldm.core.errors import FileError, MedSoftError
from ldm.core.threads import thread_pool
from ldm.data.images import check_ends
from ldm.data.samples import Reject, Sample

log = logging.getLogger(__name__)

SIMILAR_SHOWN = 5


class Row(NamedTuple):
    """A sample as the leak checks see it: its set, names, and a hash of its image (None = not known)."""

    group: str
    sample_id: str
    patient_id: str
    digest: str | None


def annotation_rows(group: str, samples: Iterable[Sample], digests: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of the set ``group``; ``digests``: sample_id -> hash of its image."""
    return [Row(group, s.sample_id, s.patient_id, (digests or {}).get(s.sample_id)) for s in samples]


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
    """Raise MedSoftError, by name, when two sets share a patient or an identical image."""
    for leak in leaks(rows):
        raise MedSoftError(leak)


def check_classes(source: str, samples: Sequence[Sample], balance: bool) -> None:
    """A training set needs diseased samples (MedSoftError); one without healthy ones is warned about, or refused if
    the classes are to be balanced."""
    healthy = sum(sample.healthy for sample in samples)
    if healthy == len(samples):
        raise MedSoftError(
            f"{source}: all {healthy} samples that can be used are healthy; there is no lesion to learn from. Diseased "
            "samples need a mask and a prompt that is not `healthy`"
        )
    if healthy == 0 and balance:
        raise MedSoftError(
            f"{source}: none of its {len(samples)} samples that can be used is healthy, so the classes cannot be "
            "balanced; add healthy samples, or set training.balance=false"
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

    def look(sample: Sample) -> Reject | None:
        for path in sample.files:
            try:
                if path is not None:
                    check_ends(path)
            except FileError as error:
                return Reject(sample.sample_id, error.path, error.reason)
        return None

    with thread_pool() as pool:
        return [reject for reject in pool.map(look, samples) if reject is not None]


def similar_prompts(samples: Iterable[Sample]) -> list[list[str]]:
    """Distinct prompts that differ only in case, spaces, punctuation or the form of accents."""
    groups: dict[str, Counter] = {}
    for sample in samples:
        plain = unicodedata.normalize("NFKC", sample.prompt).casefold()
        groups.setdefault(" ".join(re.findall(r"\w+", plain)), Counter())[sample.prompt] += 1
    return [[prompt for prompt, _ in group.most_common()] for group in groups.values() if len(group) > 1]


def warn_of_similar_prompts(samples: Iterable[Sample]) -> None:
    """One warning line for each of the first groups of near-duplicate prompts."""
    found = similar_prompts(samples)
    for group in found[:SIMILAR_SHOWN]:
        log.warning("warning: nearly the same prompt, learned as different ones: %s", " | ".join(map(repr, group[:4])))
    if len(found) > SIMILAR_SHOWN:
        log.warning("... and %d more groups of prompts like that", len(found) - SIMILAR_SHOWN)
