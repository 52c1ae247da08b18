"""`medsoft review`: a queue of drawn images in the browser, one at a time beside its parent, and its routes.

Every verdict is a row of review.csv (``ldm.reviews.table``) before the page is told that it was kept, so a reload, a
restart or a crash goes on with the first image that this reviewer has not judged. Several tabs, reviewers and servers
may use one file. Nobody is shown what others said. Each reviewer's order is a shuffle of its own, a function of code
and names, so that two of them do not tire on the same images.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from pydantic import BaseModel, Field

from ldm.core.errors import MedSoftError, UsageError, warn_of_first
from ldm.core.files import Contents, check_target, fingerprint, named_seed
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.folders import parent_image
from ldm.data.images import open_image, read_image
from ldm.data.masks import read_mask
from ldm.data.samples import Sample
from ldm.reviews.choice import match_reviews, verdicts_about
from ldm.reviews.table import REJECT, Review, add_review, check_value, now, read_reviews
from ldm.workbench.options import ReviewOptions
from ldm.workbench.server import Address, make_app, raw, serve
from ldm.workbench.sources import Document, open_sample

log = logging.getLogger("review")

KEPT = 8  # images in memory
MOST_SECONDS = 86400


class VerdictRequest(BaseModel):
    """What a page says about the image that it has shown; ``sha256``: of that image's file."""

    reviewer: str
    sha256: str
    verdict: Literal["accept", "reject", "flag"]
    reason: str = Field("", max_length=2000)
    seconds: float | None = Field(None, ge=0, le=1e9)


class Shown(NamedTuple):
    """A drawn image with what it is compared with. ``parent``: the pixels, or None and why in ``fault``."""

    document: Document
    parent: np.ndarray | None
    fault: str | None
    soft: np.ndarray | None


def review(options: ReviewOptions, debug: bool = False) -> None:
    """Serve the page until Ctrl-C. UsageError or MedSoftError where there is nothing to review, or nowhere to write."""
    queue = Queue(options.results, options.files[0], options.reviewer)
    address = Address.of(options)
    app = make_app(routes(queue), page="review.html", address=address, debug=debug)
    try:
        serve(app, address, not options.no_browser)
    finally:
        log.info("%s in %s", counted(len(queue.rows()), "row"), queue.file)


def routes(queue: "Queue") -> APIRouter:
    """All routes of the review below /api."""
    router = APIRouter(prefix="/api")

    @router.get("/review")
    def state(reviewer: str = "") -> dict[str, Any]:
        return queue.state(reviewer)

    @router.get("/verdicts")
    def verdicts(reviewer: str) -> dict[str, Any]:
        return queue.verdicts(queue.spelled(reviewer))

    @router.get("/items/{name}")
    def item(name: str) -> dict[str, Any]:
        found = queue.shown(name)
        about = found.document.described()
        more = {"sha256": found.document.digest, "has_parent": found.parent is not None, "fault": found.fault}
        return about | more | {"id": name, "has_soft": found.soft is not None}

    @router.get("/items/{name}/{what}")
    def array(name: str, what: Literal["levels", "parent", "mask", "soft"]) -> Response:
        found = queue.shown(name)
        arrays = {"levels": found.document.pixels, "parent": found.parent, "soft": found.soft}
        pixels = found.document.mask if what == "mask" else arrays[what]
        if pixels is None:
            raise HTTPException(404, found.fault if what == "parent" and found.fault else f"there is no {what}")
        return raw(pixels)

    @router.post("/items/{name}/verdict")
    def judge(name: str, asked: VerdictRequest) -> dict[str, Any]:
        return queue.judge(name, asked)

    return router


class Queue:
    """The images of ``results``, in any thread; ``file``: their review.csv; ``reviewer``: a code that is given."""

    def __init__(self, results: Path, file: Path, reviewer: str | None = None) -> None:
        loaded, rejects = load_samples(results)
        drawn = [sample for sample in loaded if not sample.healthy]
        warn_of_first(log, (f"skipped: {reject}" for reject in rejects))
        if len(drawn) < len(loaded):
            log.info("%s not shown", counted(len(loaded) - len(drawn), "healthy sample is", "healthy samples are"))
        if not drawn:
            raise MedSoftError(f"{results}: holds no image with a lesion; expected results of dataset_infer.py")
        if real := sum(not sample.synthetic for sample in drawn):
            text = "warning: %s: %d of %d samples do not say that they are synthetic: are they real ones?"
            log.warning(text, results, real, len(drawn))
        self.results, self.file, self.reviewer = results, file, reviewer
        self.samples = {fingerprint(sample.sample_id)[:16]: sample for sample in drawn}
        self.digests = {name: str(sample.image_sha256 or "") for name, sample in self.samples.items()}
        self._lock = threading.RLock()
        self._known: tuple[tuple[int, int] | None, list[Review]] = (None, [])
        self._kept: OrderedDict[str, tuple[tuple[int, int], Shown]] = OrderedDict()
        if self.rows():
            match_reviews([file], drawn, Contents(), redrawn=True)
        elif not file.parent.is_dir():
            raise UsageError(f"--review {file}: the folder {file.parent} does not exist")
        check_target(file, 1)
        if reviewer is not None:
            self.spelled(reviewer)
        for name, sample in self.samples.items():
            if not self.digests[name]:  # of an annotation file, which is read without its images
                self.digests[name] = hashlib.sha256(open_image(sample.image).data).hexdigest()

    def state(self, reviewer: str = "") -> dict[str, Any]:
        """What the page begins with; without a reviewer there are no items, and the page asks for a code."""
        code = self.spelled(reviewer or self.reviewer or "") if reviewer or self.reviewer else None
        about = {"name": self.results.resolve().name, "results": str(self.results), "file": str(self.file)}
        told: dict[str, Any] = about | {"reviewer": code, "items": []}
        if code is None:
            return told
        order = sorted(self.samples, key=lambda name: named_seed("order of a review", code.casefold(), name))
        items = [self._described(name, self.samples[name]) for name in order]
        return told | {"items": items} | self.verdicts(code)

    @staticmethod
    def _described(name: str, sample: Sample) -> dict[str, Any]:
        about = {key: getattr(sample, key) for key in ("sample_id", "prompt", "lesion_type", "severity", "level")}
        return {"id": name, **about}

    def spelled(self, reviewer: str) -> str:
        """The code as the file has it; MedSoftError for one that cannot stand there."""
        code = reviewer.strip()
        check_value("reviewer", code)
        same = (row.reviewer for row in self.rows() if row.reviewer.casefold() == code.casefold())
        return next(same, code)

    def verdicts(self, reviewer: str) -> dict[str, Any]:
        """What this reviewer has said about the images as they are: {"verdicts": {item: [verdict, reason]}}."""
        with self._lock:
            rows = [row for row in self.rows() if row.reviewer == reviewer]
            images = {name: (sample.sample_id, self.digests[name]) for name, sample in self.samples.items()}
            said = {name: found[-1] for name, found in verdicts_about(rows, images).items()}
            return {"verdicts": {name: [row.verdict, row.reason] for name, row in said.items()}}

    def shown(self, name: str) -> Shown:
        """An image with its parent and its soft mask, read again where a file has changed."""
        sample = self._sample(name)
        with self._lock:
            try:
                stamp = _stamp(sample.image)
            except OSError as error:
                raise HTTPException(410, f"{sample.image}: is not there any more ({error.strerror})") from error
            known = self._kept.get(name)
            if known is None or known[0] != stamp:
                known = self._kept[name] = stamp, _open(sample)
                self.digests[name] = known[1].document.digest
            self._kept.move_to_end(name)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return known[1]

    def judge(self, name: str, asked: VerdictRequest) -> dict[str, Any]:
        """Write a verdict down; returns this reviewer's verdicts. 409 where the image is no longer what was shown."""
        reason = " ".join(asked.reason.split())
        if asked.verdict == REJECT and not reason:
            raise MedSoftError("reason: expected why the image is rejected, found nothing")
        sample, code = self._sample(name), self.spelled(asked.reviewer)
        with self._lock:
            if self.shown(name).document.digest != asked.sha256:
                raise HTTPException(409, f"{sample.sample_id}: has changed since it was shown; look at it again")
            seconds = None if asked.seconds is None else min(asked.seconds, MOST_SECONDS)
            add_review(self.file, Review(sample.sample_id, code, asked.verdict, asked.sha256, reason, seconds, now()))
            return self.verdicts(code)

    def _sample(self, name: str) -> Sample:
        if name not in self.samples:
            raise HTTPException(404, "no such image is in this review; load the page again")
        return self.samples[name]

    def rows(self) -> list[Review]:
        """The rows of the file, read again where it has changed."""
        with self._lock:
            try:
                stamp = _stamp(self.file)
            except FileNotFoundError:
                return []
            if self._known[0] != stamp:
                self._known = stamp, read_reviews(self.file)
            return self._known[1]


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_mtime_ns, about.st_size


def _open(sample: Sample) -> Shown:
    """Read all that is shown of a sample; what is wrong with its parent or soft mask is a line, no error."""
    document = open_sample(sample)
    parent, soft, faults = None, None, []
    try:
        found = read_image(parent_image(sample))
        if found.shape == document.pixels.shape and found.dtype == document.pixels.dtype:
            parent = found
        else:
            kinds = [f"{each.shape[1]} x {each.shape[0]}, {each.dtype}" for each in (found, document.pixels)]
            faults.append(f"its parent is of another kind: {kinds[0]}, not {kinds[1]}")
    except MedSoftError as error:
        faults.append(f"its parent cannot be shown: {error}")
    try:
        if sample.soft_mask is not None:
            soft = read_mask(sample.soft_mask, document.pixels.shape, soft=True).values
    except MedSoftError as error:
        faults.append(f"its soft mask cannot be shown: {error}")
    return Shown(document, parent, "; ".join(faults) or None, soft)
