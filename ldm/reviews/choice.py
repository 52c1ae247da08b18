"""Which drawn images are left out because somebody rejected them, and what a run's record says about it. No torch.

Rows of several reviewers, and of several files, are joined: an image that any of them rejected is left out, one that
somebody flagged and nobody rejected stays and is counted, and so does one that nobody has judged.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import content_id, sha256_file
from ldm.core.tables import counted
from ldm.data.samples import Sample, shown
from ldm.reviews.table import FLAG, REJECT, Review, latest, one_spelling, read_reviews

log = logging.getLogger("review")


@dataclass(frozen=True)
class Judged:
    """What review files say of drawn images.

    ``reviews``: the ones that count, by the image's file. ``changed``: samples that were judged when their image was
    another one. ``unknown``: sample_ids that are judged, but not among the samples.
    """

    reviews: dict[Path, list[Review]]
    changed: list[str]
    unknown: list[str]


def match_reviews(files: Sequence[Path], samples: Sequence[Sample], redrawn: bool = False) -> Judged:
    """Bring the rows of review files together with the samples: by sample_id and the SHA-256 of the image.

    Raises FileError for a file without a row, and for one of which no row is about an image of these samples (with
    ``redrawn`` one that names samples of which all images are others now is taken); what else cannot be used is logged.
    """
    by_id: dict[str, dict[str | None, list[Path]]] = {}
    for sample in samples:
        digest = sample.image_sha256 or content_id(sample.image)
        by_id.setdefault(sample.sample_id, {}).setdefault(digest, []).append(sample.image)
    rows: list[Review] = []
    for path in files:
        found = read_reviews(path)
        if not found:
            raise FileError(path, "holds no verdict; review the images first (medsoft review RESULTS)")
        known = [each for each in found if each.sample_id in by_id]
        if not known:
            rows_here = f"{counted(len(found), 'row')}, the first about {shown(found[0].sample_id)}"
            raise FileError(path, f"is the review of other images: has {rows_here}, none about these")
        if not redrawn and not any(each.image_sha256 in by_id[each.sample_id] for each in known):
            count = len({each.sample_id for each in known})
            said = counted(count, "image that it judges has", "images that it judges have")
            raise FileError(path, f"{said} changed since, and no other is judged; review again")
        rows += found
    reviews: dict[Path, list[Review]] = {}
    before: set[str] = set()
    for each in latest(one_spelling(rows)).values():
        images = by_id.get(each.sample_id, {})
        before |= {each.sample_id} if images and each.image_sha256 not in images else set()
        for image in images.get(each.image_sha256, []):
            reviews.setdefault(image, []).append(each)
    judged = {sample.sample_id for sample in samples if sample.image in reviews}
    changed = sorted(before - judged)
    unknown = sorted({each.sample_id for each in rows} - by_id.keys())
    _warn("changed since the verdict, which no longer counts", changed)
    _warn("judged, but not among these samples", unknown)
    return Judged(reviews, changed, unknown)


def _warn(what: str, names: Sequence[str]) -> None:
    if names:
        log.warning("warning: review: %s %s: %s", counted(len(names), "image"), what, listed(names))


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


@dataclass(frozen=True)
class Choice:
    """``rejected``: by the image's file, who rejected it and why. ``record``: what a run's record says."""

    rejected: dict[Path, str]
    record: dict[str, Any]

    def kept(self, samples: Sequence[Sample]) -> list[int]:
        """The positions of the samples that stay."""
        return [place for place, sample in enumerate(samples) if sample.image not in self.rejected]


def apply_review(files: Sequence[str | Path], samples: Sequence[Sample]) -> Choice:
    """Find the images that were rejected among the diseased ``samples``.

    The record: ``files`` with their SHA-256, ``reviewers`` with the number of images each has judged, ``samples``,
    ``left_out``, ``flagged`` and ``never_reviewed`` as numbers, ``changed`` and ``unknown`` as sample_ids. Raises
    MedSoftError where every image is rejected, and as ``match_reviews`` does.
    """
    drawn = [sample for sample in samples if not sample.healthy]
    found = match_reviews([Path(path) for path in files], drawn)
    rejected = {}
    for image, reviews in found.reviews.items():
        if reasons := [f"{r.reviewer}: {r.reason}" if r.reason else r.reviewer for r in reviews if r.verdict == REJECT]:
            rejected[image] = "; ".join(reasons)
    if len(rejected) == len({sample.image for sample in drawn}):
        raise MedSoftError(f"{files[0]}: every image ({len(rejected)}) is rejected; nothing is left to use")
    flagged = {image for image, reviews in found.reviews.items() if any(r.verdict == FLAG for r in reviews)}
    record = {
        "files": [{"file": str(path), "sha256": sha256_file(path)} for path in files],
        "reviewers": dict(sorted(Counter(r.reviewer for each in found.reviews.values() for r in each).items())),
        "samples": len(drawn),
        "left_out": sum(sample.image in rejected for sample in drawn),
        "flagged": sum(sample.image in flagged - rejected.keys() for sample in drawn),
        "never_reviewed": sum(sample.image not in found.reviews for sample in drawn),
        "changed": found.changed,
        "unknown": found.unknown,
    }
    log.info("%s", sentence(record))
    return Choice(rejected, record)


def sentence(record: dict[str, Any]) -> str:
    """What a page or the screen says of a review."""
    who = ", ".join(f"{name} ({count})" for name, count in record["reviewers"].items())
    images = counted(record["samples"], "synthetic image")
    text = f"Review by {who}: of {images}, {record['left_out']} rejected and left out"
    flagged = f", {record['flagged']} flagged and kept" if record["flagged"] else ""
    missing = f", {record['never_reviewed']} not reviewed and kept" if record["never_reviewed"] else ""
    return f"{text}{flagged}{missing}."
