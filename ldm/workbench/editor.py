"""What the editor's page asks for: documents, masks, sentences, and drawings in a queue (see ``jobs``)."""

import base64
import dataclasses
import logging
import secrets
import threading
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
from fastapi import HTTPException
from pydantic import BaseModel, Field

import medsoft
from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.errors import MedSoftError, UsageError, first_line
from ldm.core.files import Contents, fingerprint, read_json
from ldm.core.schema import identity
from ldm.core.tables import shortened
from ldm.data.annotations import read_annotations
from ldm.data.images import ImageFile, intensity_range_of, pixel_digest, read_image, to_unit
from ldm.data.masks import Feather, Mask, equivalent_diameter, extents, lesion_shaped, read_mask, soft_mask_for
from ldm.data.png import encode_png
from ldm.data.preparation import PreparedSample, fit_sample
from ldm.data.samples import prompt_fault
from ldm.inference.inpainter import Job
from ldm.inference.preparing import MOSTLY
from ldm.inference.prompts import contradiction, image_facts
from ldm.inference.results import provenance_of, result_of
from ldm.inference.run import advice_on_memory
from ldm.inference.tasks import MaskOrigin, Task, too_long
from ldm.networks.text_encoder import clip_tokenizer
from ldm.workbench.drafts import Drafts
from ldm.workbench.finding import Found
from ldm.workbench.jobs import Queue, QueuedJob
from ldm.workbench.options import EditOptions
from ldm.workbench.sentences import Sentences, encoders_of, read_prompt
from ldm.workbench.server import STOPPED
from ldm.workbench.sources import Document, Opened

log = logging.getLogger(__name__)

SEEDS = 2**53  # the first whole number that JavaScript does not tell from the next one
VARIANTS = 64
OUTSIDE = 0.5  # more of a mask outside its image's vertebra than this is no lesion that has grown beyond it


class OpenRequest(BaseModel):
    """POST /api/open."""

    path: str = Field(min_length=1, max_length=4096)
    plane: str | None = None
    slice: int | None = Field(None, ge=0)


class GoRequest(BaseModel):
    """POST /api/go: to the image with this number, of the collection that ``document`` is of."""

    index: int = Field(ge=0)
    document: str | None = None


class SuggestionRequest(BaseModel):
    """POST /api/documents/ID/suggestion; see ``lesion_shaped``."""

    size: tuple[Annotated[float, Field(ge=0.02, le=1)], Annotated[float, Field(ge=0.02, le=1)]] = (0.35, 0.7)
    side: Annotated[str, Field(pattern="^(left|right|top|bottom)$")] | None = None
    irregularity: float | None = Field(None, ge=0, le=1)
    seed: int = Field(ge=0, lt=SEEDS)


class TokensRequest(BaseModel):
    """POST /api/tokens; ``document``: the image that the prompt is for."""

    prompt: str = Field(max_length=10_000)
    document: str | None = None


class DrawRequest(BaseModel):
    """POST /api/draw."""

    document: str
    mask: str
    prompt: str = Field(max_length=10_000)
    n: int = Field(1, ge=1, le=VARIANTS)
    seed: int = Field(0, ge=0, lt=SEEDS)
    feather_mm: float | None = Field(None, ge=0, le=1000)


class RejectRequest(BaseModel):
    """POST /api/results/ID/reject."""

    reason: str | None = Field(None, max_length=1000)


class Editor:
    """What is open, what can be written, and what draws. In any thread."""

    def __init__(self, found: Found, drafts: Drafts, options: EditOptions) -> None:
        self.found, self.drafts, self.options = found, drafts, options
        self.config = found.config
        samples = read_annotations(found.train_json)[0] if found.train_json else []
        self.sentences = Sentences(samples)
        self.opened = Opened()
        if found.path is not None:
            self.opened.open(found.path)
        self.provenance: dict[str, Any] = {}
        self._started = secrets.token_hex(4)  # another one after each start, so that a page knows of it
        self._of_ckpt = found.ckpt.stat().st_mtime_ns  # of the one that is loaded, whatever it is replaced by later
        log.info("checkpoint: %s", found.ckpt)
        log.info("sentences: %s", found.train_json or "none; --train_json names training annotations")
        log.info("drawings: %s", drafts.home)
        self._tokenizer_there = threading.Event()
        self.queue: Queue[medsoft.LesionModel] = Queue(
            self._load, lambda model: f"the model is loaded, on {model.inpainter.device}"
        )

    def _load(self) -> medsoft.LesionModel:
        import torch

        try:
            clip_tokenizer()  # imports transformers, of which a thread that imports it at the same time sees a half
        finally:
            self._tokenizer_there.set()
        found = self.found
        torch.set_num_threads(1)  # of this thread, which draws: only then --replay gives the same file everywhere
        settings = identity(self.config, "images")
        checkpoint = read_checkpoint(found.ckpt)
        self.provenance = provenance_of(checkpoint, found.yaml, settings, found.overrides, exact=True)
        sampling = self.config.sampling
        if sampling.init != "noise":
            self.provenance |= {"init": sampling.init, "strength": sampling.strength}
        return medsoft.load(checkpoint, found.yaml, found.overrides, self.options.device)

    # ------------------------------------------------------------------------------------------------------- documents

    def state(self, document: str | None = None) -> dict[str, Any]:
        """All that a page needs to begin with, about one document or the one opened last."""
        shown = self._there(document) if document else None
        shown = shown or (self.opened.get(self.opened.current) if self.opened.current else None)
        described = shown and self.described(shown)
        job = self.queue.current()
        data = self.config.data
        return {
            "model": self.model(),
            "document": described,
            "collection": described and described["collection"],
            "passed": self.opened.passed(shown.id if shown else None),
            "sentences": self.sentences.menus(shown.sample.level if shown else None),
            "feather": {"value": data.feather, "unit": data.feather_unit},
            "output_dir": str(self.drafts.home),
            "job": job and job.told(),
            "history": self.drafts.items(),
        }

    def model(self) -> dict[str, Any]:
        """What draws, and whether it is loaded."""
        return {
            "name": str(self.found.ckpt),
            "image_size": self.config.data.image_size,
            "steps": self.config.sampling.steps,
            "token_limit": self.config.text_encoder.max_length - 2,
            "device": str(self.queue.model.inpainter.device) if self.queue.model else self.options.device,
            "state": self.queue.state,
            "error": self.queue.error,
            "started": self._started,
        }

    def described(self, document: Document) -> dict[str, Any]:
        """What the page is told of a document, and its place in the collection that it is of."""
        collection, index = self.opened.collection(document.id)
        place = collection and {"name": collection.name, "count": len(collection.entries), "index": index}
        return document.described() | {"collection": place}

    def matching(self, name: str, words: str) -> dict[str, Any]:
        """The documents of the collection of this one that some words describe; none where it is of no collection."""
        collection, _ = self.opened.collection(name)
        count, items = collection.matching(words) if collection else (0, [])
        return {"count": count, "items": items}

    def _there(self, name: str) -> Document | None:
        try:
            return self._find(name)
        except MedSoftError:  # it is gone or has changed; the document's own route says so
            return None

    def _find(self, name: str) -> Document | None:
        found = self.opened.get(name)
        origin = self.drafts.origin(name) if found is None else None
        return self.opened.reopen(name, origin) if origin else found

    def document(self, name: str) -> Document:
        """A document by its id. 404 for one that nobody has opened, 410 for one that is gone or has changed."""
        try:
            found = self._find(name)
        except MedSoftError as error:
            raise HTTPException(410, str(error)) from error
        if found is None:
            raise HTTPException(404, f"no document {name[:40]} is open; open it again")
        return found

    def open(self, asked: OpenRequest) -> Document:
        """Open a path of this machine; for others than this machine only below the folder that the command named."""
        text = asked.path.strip()
        if not text:
            raise UsageError("path: is empty; name an image, a folder, a volume or an annotation file")
        try:
            path = Path(text).expanduser()
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"{shortened(text)}: names nothing that can be opened ({first_line(error)})") from error
        if not self.options.is_local:
            given = self.options.path or Path()
            root = (given if given.is_dir() else given.parent).resolve()
            if not real.is_relative_to(root):
                raise HTTPException(403, f"{path}: does not lie in {root}; over the network nothing else is opened")
        return self.opened.open(path, asked.plane, asked.slice)

    # ---------------------------------------------------------------------------------------------- masks and sentences

    def hard(self, document: Document, data: bytes) -> np.ndarray:
        """The mask (bool HxW) that a page sends; UsageError for another size.

        One byte a pixel, from 128 on marked; or one bit a pixel, eight in a byte, the first one in its highest bit.
        """
        height, width = document.pixels.shape[:2]
        values = np.frombuffer(data, np.uint8)
        if values.size == (height * width + 7) // 8:
            return np.unpackbits(values, count=height * width).reshape(height, width).astype(bool)
        if values.size != height * width:
            raise UsageError(f"the mask has {values.size} bytes; expected {width} x {height}, a byte or a bit a pixel")
        return values.reshape(height, width) >= 128

    def feather(self, document: Document, feather_mm: float | None) -> Feather:
        """The checkpoint's feather, or one in mm. MedSoftError for that where nobody knows how large a pixel is."""
        if feather_mm is None:
            return Feather(self.config.data.feather, self.config.data.feather_unit)
        if document.spacing is None:
            raise UsageError(f"{document.path}: says no spacing_mm, so no feather in mm is possible; leave it out")
        return Feather(feather_mm, "mm")

    def soft(self, document: Document, hard: np.ndarray, feather_mm: float | None) -> np.ndarray:
        """The soft mask (float32 HxW) with which the mask is drawn."""
        mask = Mask(hard.astype(np.float32))
        return soft_mask_for(mask, self.feather(document, feather_mm), document.sample.meta.get("spacing_mm"))

    def facts(self, document: Document, hard: np.ndarray, feather_mm: float | None) -> dict[str, Any]:
        """How large a mask and its border are; ``note``: what speaks against drawing inside it, or None."""
        spacing, pixels = document.spacing, int(np.count_nonzero(hard))
        widths = self.feather(document, feather_mm).pixels(hard, document.sample.meta.get("spacing_mm"))
        return {
            "pixels": pixels,
            "area_mm2": round(pixels * spacing[0] * spacing[1], 2) if spacing else None,
            "diameter_px": round(equivalent_diameter(hard), 2),
            "feather_px": round(max(widths), 2),
            "note": _doubt(hard, document),
        }

    def suggestion(self, document: Document, asked: SuggestionRequest) -> np.ndarray:
        """A lesion-shaped mask (bool HxW) inside the vertebra. UsageError where nothing says where that is."""
        if document.body is None:
            reason = "nothing says where its vertebra is (an anatomy.png with label 1), so no mask can be suggested"
            raise UsageError(f"{document.path}: {reason}; paint one")
        low, high = sorted(asked.size)
        return lesion_shaped(document.body, asked.seed, (low, high), asked.side, asked.irregularity)

    def read(self, prompt: str, document: str | None = None) -> dict[str, Any]:
        """What the encoders make of a prompt, BiomedCLIP once it is loaded; how it contradicts a document, if it does.

        503 where the server is being stopped meanwhile.
        """
        facts = image_facts(self.document(document).sample) if document else None
        while not self._tokenizer_there.wait(0.1):
            if self.queue.closed:
                raise HTTPException(503, STOPPED)
        return self._read(prompt) | {"contradiction": facts and contradiction(prompt, facts)}

    def _read(self, prompt: str) -> dict[str, Any]:
        model, limit = self.queue.model, self.config.text_encoder.max_length
        return read_prompt(prompt, self.sentences, encoders_of(limit, model.inpainter.encoder if model else None))

    # --------------------------------------------------------------------------------------------------------- drawings

    def draw(self, asked: DrawRequest) -> QueuedJob:
        """Queue n drawings. UsageError for a mask or a prompt that cannot be drawn."""
        document, prompt = self.document(asked.document), asked.prompt.strip()
        try:
            hard = self.hard(document, base64.b64decode(asked.mask, validate=True))
        except ValueError as error:
            raise UsageError(f"mask: expected base64, found something else ({error})") from error
        if not hard.any():
            raise UsageError("the mask is empty; paint the region to draw into, or have one suggested")
        if hard.all():
            raise UsageError("the mask marks the whole image, of which nothing would stay; erase a part of it")
        if fault := prompt_fault(prompt):
            raise UsageError(f"prompt: {fault}")
        if fault := self.read(prompt)["fault"]:
            raise UsageError(f"prompt: {fault}")
        soft = self.soft(document, hard, asked.feather_mm)
        png = encode_png(np.rint(soft * 255).astype(np.uint8))
        read_mask(ImageFile(Path("mask"), png, "PNG"), soft.shape, soft=True)  # as whoever reads the result will
        known = [document.id, pixel_digest(hard), pixel_digest(soft), prompt, asked.seed]
        name = fingerprint([*known, self._of_ckpt, identity(self.config, "images")])[:12]
        flat = document.sample.sample_id.replace("/", "_").replace("\\", "_").lstrip(".")  # else it would be hidden
        folder = f"{flat}_{name}__v"
        if reason := too_long(self.drafts.drafts / f"{folder}{asked.n - 1}"):
            raise UsageError(reason)
        job = QueuedJob(secrets.token_hex(8), document.id, asked.n, self.config.sampling.steps)
        request = _Request(document, hard, soft, prompt, asked.seed, asked.feather_mm, name, folder)
        return self.queue.put(job, partial(self._draw, request))

    def _draw(self, asked: "_Request", model: medsoft.LesionModel, job: QueuedJob) -> None:
        """Draw a job's images, one after the other; each is a whole folder in drafts before the next one begins."""
        if fault := self._read(asked.prompt)["fault"]:  # again: BiomedCLIP may not have been there
            raise UsageError(f"prompt: {fault}")
        document, data = asked.document, model.data
        parent = document.stored(self.drafts.home / "sources")
        hidden = dataclasses.replace(parent, prompt="lesion", soft_mask=None)  # the painted mask is meant, no other
        mask = Mask(asked.hard.astype(np.float32))
        prepared = fit_sample(hidden, document.pixels, mask, data, soft=asked.soft)
        source, own = self.sentences.source(asked.prompt), MaskOrigin("own")
        for variant in range(job.images):
            job.image, job.step = variant, 0
            job.check()
            name = f"{asked.folder}{variant}"
            task = Task(parent, variant, asked.prompt, asked.seed, source, fixed_mask=True, mask=own, folder=name)
            if not self.drafts.is_there(task.name):
                self._draw_one(task, prepared, model, job)
            height, width = asked.hard.shape
            item: dict[str, Any] = {"id": f"{asked.name}-{variant}", "job": job.id, "document": document.id}
            item |= {"name": task.name, "prompt": asked.prompt, "seed": asked.seed, "variant": variant}
            item |= {"feather_mm": asked.feather_mm, "width": width, "height": height, "origin": document.origin}
            job.results.append(self.drafts.add(item))

    def _draw_one(self, task: Task, prepared: PreparedSample, model: medsoft.LesionModel, job: QueuedJob) -> None:
        noise = Job(task.seed, task.sample.sample_id, task.variant, task.prompt)
        with advice_on_memory(self.config.sampling):
            (pixels,) = model.inpainter.draw(prepared, [noise], job.on_step)
        home = self.drafts.drafts
        result_of(home, task, prepared, pixels, self.provenance, Contents()).write(home)

    # ---------------------------------------------------------------------------------------------------------- results

    def item(self, name: str) -> dict[str, Any]:
        """What the page is told of a drawing by its id; 404 for one that is not there."""
        found = self.drafts.item(name)
        if found is None:
            raise HTTPException(404, f"no drawing {name[:40]} is there")
        return found

    def result(self, name: str) -> Path:
        """The folder of a drawing by its id; 404 for one that is not there."""
        return Path(self.item(name)["folder"])

    def thumbnail(self, name: str, longer: int) -> bytes:
        """A PNG of what was drawn and what is around it; its longer side has so many pixels."""
        folder = self.result(name)
        image = read_image(folder / "image.png")
        meta = read_json(folder / "meta.json")
        soft = read_mask(folder / "soft_mask.png", image.shape, soft=True).values
        (top, bottom), (left, right) = extents(soft > 0)
        reach = max(bottom - top, right - left)
        rows = slice(max((top + bottom) // 2 - reach, 0), (top + bottom) // 2 + reach)
        columns = slice(max((left + right) // 2 - reach, 0), (left + right) // 2 + reach)
        unit = to_unit(image[rows, columns], intensity_range_of(image, meta.get("window")))
        scale = longer / max(unit.shape[:2])
        size = (max(1, round(unit.shape[1] * scale)), max(1, round(unit.shape[0] * scale)))
        small = cv2.resize(unit, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        return encode_png(np.rint(small * 255).astype(np.uint8))


def _doubt(hard: np.ndarray, document: Document) -> str | None:
    """What speaks against drawing inside a mask: that it is probably the wrong part of the image; None for nothing."""
    marked, pixels = hard.mean(), np.count_nonzero(hard)
    if marked > MOSTLY:
        return f"{100 * marked:.0f} % of the image is marked: marked is what is drawn anew"
    outside = np.count_nonzero(hard & ~document.body) / pixels if pixels and document.body is not None else 0
    if outside <= OUTSIDE:
        return None
    part = "the mask" if outside == 1 else f"{100 * outside:.0f} % of the mask"
    return f"{part} lies outside the image's own vertebra{f', {level}' if (level := document.sample.level) else ''}"


class _Request(NamedTuple):
    """What is to be drawn. ``name``: a digest of all that decides it; ``folder``: how the result folders begin."""

    document: Document
    hard: np.ndarray
    soft: np.ndarray
    prompt: str
    seed: int
    feather_mm: float | None
    name: str
    folder: str
