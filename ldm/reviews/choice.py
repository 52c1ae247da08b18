"""Which drawn images are left out because somebody rejected them, and what a run's record says about it. No torch.

Rows of several reviewers, and of several files, are joined: an image that any of them rejected is left out, one that
somebody flagged and nobody rejected stays and is counted, and so does one that nobody has judged. A verdict is about a
picture, by its SHA-256, and follows it to another name: a rejected one cannot come back in a folder that was renamed.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import REPLACED, Contents, sha256_file, unchanged
from ldm.core.tables import counted
from ldm.data.samples import Sample, shown
from ldm.reviews.table import FLAG, REJECT, Review, latest, one_spelling, read_reviews

log = logging.getLogger("review")

K = TypeVar("K")


@dataclass(frozen=True)
class Judged:
    """What review files say of drawn images.

    ``reviews``: the ones that count, by the image's file. ``renamed``: sample_ids under which an image was judged that
    has another one now. ``changed``: samples that were judged when their image was another one. ``unknown``:
    sample_ids that are judged, but neither they nor their images are among the samples. ``files``: what was read,
    with the SHA-256 of each, for a record.
    """

    reviews: dict[Path, list[Review]]
    renamed: list[str]
    changed: list[str]
    unknown: list[str]
    files: Sequence[Mapping[str, str]] = ()


def verdicts_about(
    reviews: Sequence[Review], images: Mapping[K, tuple[str, str | None]], copies_too: bool = True
) -> dict[K, list[Review]]:
    """The review of each reviewer that counts about each of ``images`` (sample_id, SHA-256), where there is one.

    That is the last row with this SHA-256 under this name or under one that no image of this content has any more. A
    copy beside the judged image is a sample of its own, with a sentence of its own; until its reviewer judges it, only
    that the picture was rejected holds for it too; without ``copies_too`` nothing does.
    """
    names: dict[str | None, set[str]] = {}
    for sample_id, digest in images.values():
        names.setdefault(digest, set()).add(sample_id)
    rows: dict[str | None, list[Review]] = {}
    for each in reviews:
        rows.setdefault(each.image_sha256, []).append(each)
    found = {}
    for key, (sample_id, digest) in images.items():
        said = rows.get(digest, [])
        copies = names[digest] - {sample_id}
        beside = [each for each in latest(said).values() if each.sample_id in copies and each.verdict == REJECT]
        counts = {each.reviewer: each for each in beside} if copies_too else {}
        counts |= {each.reviewer: each for each in said if each.sample_id not in copies}
        if counts:
            found[key] = list(counts.values())
    return found


def match_reviews(
    files: Sequence[Path], samples: Sequence[Sample], content: Contents, redrawn: bool = False, copies_too: bool = True
) -> Judged:
    """Bring the rows of review files together with the samples: by the SHA-256 of the image, see ``verdicts_about``.

    ``content`` takes it, so that who reads the images later can ask it whether they still are the ones judged.

    Raises FileError for a file without a row, and for one of which no row is about an image of these samples (with
    ``redrawn`` one that names samples of which all images are others now is taken), for one that is written meanwhile,
    and for an image that was replaced since its sample was read; what else cannot be used is logged.
    """
    content.read(each.image for each in samples)
    for each in samples:
        if each.image_sha256 not in (None, content(each.image)):
            raise FileError(each.image, REPLACED)
    images = {(each.sample_id, each.image): (each.sample_id, content(each.image)) for each in samples}
    names = {sample_id for sample_id, _ in images}
    places: dict[str | None, list[str]] = {}
    for sample_id, digest in images.values():
        places.setdefault(digest, []).append(sample_id)
    rows: list[Review] = []
    digests = []
    for path in files:
        with unchanged(path):  # somebody may be reviewing at this moment
            found = read_reviews(path)
            digests.append({"file": str(path), "sha256": sha256_file(path)})
        if not found:
            raise FileError(path, "holds no verdict; review the images first (medsoft review RESULTS)")
        usable = any(each.image_sha256 in places for each in found)
        known = {each.sample_id for each in found} & names
        if not usable and not known:
            rows_here = f"{counted(len(found), 'row')}, the first about {shown(found[0].sample_id)}"
            raise FileError(path, f"is the review of other images: has {rows_here}, none about these")
        if not usable and not redrawn:
            said = counted(len(known), "image that it judges has", "images that it judges have")
            raise FileError(path, f"{said} changed since, and no other is judged; review again")
        rows += found
    rows = one_spelling(rows)
    reviews: dict[Path, list[Review]] = {}
    judged = set()
    for (sample_id, image), verdicts in verdicts_about(rows, images, copies_too).items():
        judged.add(sample_id)
        reviews[image] = list(dict.fromkeys([*reviews.get(image, []), *verdicts]))
    now = sorted({(each.sample_id, *places[each.image_sha256]) for each in rows if each.image_sha256 in places})
    renamed = {name: others[0] for name, *others in now if name not in others}
    lost = {each.sample_id for each in rows if each.image_sha256 not in places}
    changed, unknown = sorted(lost & names - judged), sorted(lost - names - renamed.keys())
    pairs = [f"{name} (now {other})" for name, other in renamed.items()]
    _warn("judged under another name, and the verdict counts", pairs)
    _warn("changed since the verdict, which no longer counts", changed)
    _warn("judged, but not among these samples", unknown)
    return Judged(reviews, list(renamed), changed, unknown, digests)


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

    def kept(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that stay."""
        return [sample for sample in samples if sample.image not in self.rejected]


def apply_review(files: Sequence[str | Path], samples: Sequence[Sample], content: Contents) -> Choice:
    """Find the images that were rejected among the diseased ``samples``, which ``content`` reads.

    The record: ``files`` with their SHA-256, ``reviewers`` with the number of images each has judged, ``samples``,
    ``left_out``, ``flagged`` and ``never_reviewed`` as numbers, ``renamed``, ``changed`` and ``unknown`` as sample_ids.
    Raises MedSoftError where every image is rejected, and as ``match_reviews`` does.
    """
    drawn = [sample for sample in samples if not sample.healthy]
    found = match_reviews([Path(path) for path in files], drawn, content)
    rejected = {}
    for image, reviews in found.reviews.items():
        if reasons := [f"{r.reviewer}: {r.reason}" if r.reason else r.reviewer for r in reviews if r.verdict == REJECT]:
            rejected[image] = "; ".join(reasons)
    if len(rejected) == len({sample.image for sample in drawn}):
        raise MedSoftError(f"{files[0]}: every image ({len(rejected)}) is rejected; nothing is left to use")
    flagged = {image for image, reviews in found.reviews.items() if any(r.verdict == FLAG for r in reviews)}
    record = {
        "files": list(found.files),
        "reviewers": dict(sorted(Counter(r.reviewer for each in found.reviews.values() for r in each).items())),
        "samples": len(drawn),
        "left_out": sum(sample.image in rejected for sample in drawn),
        "flagged": sum(sample.image in flagged - rejected.keys() for sample in drawn),
        "never_reviewed": sum(sample.image not in found.reviews for sample in drawn),
        "renamed": found.renamed,
        "changed": found.changed,
        "unknown": found.unknown,
    }
    log.info("%s", sentence(record))
    return Choice(rejected, record)


def without_rejected(
    files: Sequence[Path], samples: Sequence[Sample], content: Contents
) -> tuple[list[Sample], dict[str, Any]]:
    """The samples that no review among ``files`` rejects, and its record, see ``apply_review``; empty without files."""
    if not files:
        return list(samples), {}
    choice = apply_review(files, samples, content)
    return choice.kept(samples), choice.record


def review_settings(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a review's record, if there is one, decides a run: the content of its files."""
    return {"review_sha256": [each["sha256"] for each in record["files"]]} if record else {}


def sentence(record: dict[str, Any]) -> str:
    """What a page or the screen says of a review."""
    who = ", ".join(f"{name} ({count})" for name, count in record["reviewers"].items())
    images = counted(record["samples"], "synthetic image")
    text = f"Review by {who}: of {images}, {record['left_out']} rejected and left out"
    flagged = f", {record['flagged']} flagged and kept" if record["flagged"] else ""
    missing = f", {record['never_reviewed']} not reviewed and kept" if record["never_reviewed"] else ""
    return f"{text}{flagged}{missing}."
