"""`medsoft serve`: lesions drawn for other programs over HTTP. docs/workbench.md describes the calls.

POST /draw is our own call: what it gives is what ``dataset_infer.py --image --mask --prompt`` writes, bit for bit. GET
/info/ and POST /infer/MODEL follow MONAI Label's, whose other calls are answered in one line. One drawing is made at a
time. Of a request nothing stays on the disk, and no name, path or sentence of it is logged.
"""

import dataclasses
import io
import json
import logging
import math
import re
import secrets
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

import medsoft
from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import Contents
from ldm.core.paths import shipped, software_version
from ldm.core.schema import identity
from ldm.data.images import read_image
from ldm.data.masks import read_mask
from ldm.data.preparation import PreparedSample
from ldm.data.samples import Sample
from ldm.inference.inpainter import Job
from ldm.inference.options import InferenceOptions
from ldm.inference.preparing import warn_if_mostly_marked, with_fixed_mask
from ldm.inference.results import Result, provenance_of, result_of
from ldm.inference.run import advice_on_memory
from ldm.inference.single import single_sample
from ldm.inference.tasks import MaskOrigin, Task, too_long
from ldm.workbench.intake import Turns, Upload, Warnings, check_pixels, keep, read_form, texts_and_files
from ldm.workbench.options import ServeOptions
from ldm.workbench.sentences import Sentences, encoders_of, read_prompt
from ldm.workbench.server import STOPPED, Address, listening, make_app, serve

log = logging.getLogger(__name__)

MODEL = "lesion_inpainting"  # as MONAI Label's clients call it
MOST_IMAGES, MOST_DRAWN = 16, 2**26  # images of a request, and their pixels together
# What MONAI Label's own clients add to the params of every call.
IGNORED = ("client_id", "result_extension", "result_dtype", "result_compress", "restore_label_idx", "label_info")
ABSENT = {
    "activelearning": "no samples to choose from",
    "batch": "no images of its own",
    "datastore": "no images of its own",
    "download": "no files of its own",
    "login": "no users",
    "logs": "no log to show",
    "ohif": "no viewer",
    "proxy": "no DICOMweb behind it",
    "scoring": "no scoring",
    "session": "no sessions: send the image with each call, as the file `file`",
    "train": "no training: ver_train.py trains",
    "wsi": "no slides",
}


class DrawParams(BaseModel):
    """What both calls are asked for, under the names of dataset_infer.py's flags."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=1000, description="one sentence")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise")
    feather_mm: float | None = Field(None, ge=0, le=1000, description="of a hard mask (default: the checkpoint's)")
    plane: Literal["sagittal", "coronal", "axial"] | None = Field(None, description="of a volume")
    slice: int | None = Field(None, ge=0, description="of a volume (default: where the mask is largest)")
    window: str | None = Field(None, max_length=80, description="bone, soft_tissue, LOW HIGH; of a volume file, body")
    spacing_mm: str | None = Field(None, max_length=80, description="mm between pixels, or between rows and columns")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "DrawParams":
        """From the parts of a form, or from JSON. UsageError, in one line, for what cannot be meant."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))[:60]
            known = f"; expected {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise UsageError(f"{name}: {first['msg']}{known}") from None


class DrawForm(DrawParams):
    """The text parts of POST /draw."""

    n: int = Field(1, ge=1, le=MOST_IMAGES, description="images, each with noise of its own")
    format: Literal["png", "zip"] | None = Field(
        None, description="png: the image; zip: folder drawn with a sample folder for each (default: png of one image)"
    )


class Drawn(NamedTuple):
    """What was drawn: results, in ``folder / "drawn"`` until the request is answered, and what a caller has to know."""

    folder: Path
    results: list[Result]
    warnings: list[str]

    def png(self) -> bytes:
        """The file of the first image."""
        return (self.folder / "drawn" / self.results[0].task.name / "image.png").read_bytes()

    def archive(self) -> bytes:
        """What dataset_infer.py would leave of these results, as a zip: folder drawn, of a volume drawn.input too."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as packed:
            for path in sorted(self.folder.glob("drawn*/**/*")):
                if path.is_file() and path.name != ".lock":
                    packed.write(path, path.relative_to(self.folder))
        return buffer.getvalue()

    def headers(self) -> dict[str, str]:
        """The warnings, where there are any."""
        return {"X-Warnings": json.dumps(self.warnings[:5])} if self.warnings else {}

    def told(self) -> dict[str, Any]:
        """What is said of the first image, as JSON."""
        result = self.results[0]
        height, width = result.image.result.shape[:2]
        names: tuple[str, ...] = ("sample_id", "prompt", "seed", "variant", "synthetic", "changed_outside_pixels")
        names += ("checkpoint_sha256", "spacing_mm", "window")
        about = {name: result.metadata[name] for name in names if name in result.metadata}
        return about | {"width": width, "height": height, "warnings": self.warnings}


class Drawer:
    """The model, and requests drawn with it. MedSoftError or UsageError where it cannot be loaded."""

    def __init__(self, options: ServeOptions) -> None:
        self.ckpt = options.ckpt
        self.yaml = shipped(options.config) if options.config else options.ckpt.with_name("config.yaml")
        self.overrides = list(options.overrides)
        checkpoint = read_checkpoint(self.ckpt)
        self.model = medsoft.load(checkpoint, options.config, self.overrides, options.device)
        self.config = load_config(self.yaml, self.overrides)
        if self.config.sampling.init == "paste":
            raise UsageError(
                "sampling.init=paste pastes the lesion that a prompt was written about; here there is none"
            )
        about = provenance_of(checkpoint, self.yaml, identity(self.config, "images"), self.overrides, exact=False)
        self.provenance = about | {"command": "medsoft serve"}
        if self.config.sampling.init != "noise":
            self.provenance |= {"init": self.config.sampling.init, "strength": self.config.sampling.strength}
        self.turns, self.warnings = Turns(options.per_minute), Warnings()
        self._closing = threading.Event()

    def close(self) -> None:
        """End what is being drawn between two sampling steps, and draw nothing of what waits."""
        self._closing.set()

    def _check(self, *done: int) -> None:
        """HTTPException 503 where the server is being stopped; also told how many sampling steps are ``done``."""
        if self._closing.is_set():
            raise HTTPException(503, STOPPED)

    def _unread(self, prompt: str) -> list[str]:
        """What the encoders have no token for, as a warning. UsageError for a prompt of which they read a part only."""
        limit = self.model.inpainter.net.cond_stage_model.max_length
        found = read_prompt(prompt, Sentences([]), encoders_of(limit, self.model.inpainter.encoder))
        if found["fault"]:
            raise UsageError(f"prompt: {found['fault']}")
        return [f"prompt: the encoders have no token for {', '.join(found['unknown'])}"] if found["unknown"] else []

    @contextmanager
    def drawn(
        self, image: UploadFile, mask: UploadFile, parts: tuple[str, str], asked: DrawParams, n: int
    ) -> Iterator[Drawn]:
        """What is asked for, for the block; then its files are gone. ``parts``: what the two files are called.

        UsageError, about these parts and without a path, for what cannot be drawn.
        """
        with (
            self.turns.taken(n),
            self.warnings.collected() as said,
            tempfile.TemporaryDirectory(prefix="medsoft-", ignore_cleanup_errors=True) as name,
        ):
            self._check()
            folder = Path(name).resolve()
            try:
                said += self._unread(asked.prompt)
                with advice_on_memory(self.config.sampling):
                    sent = keep(image, parts[0], folder), keep(mask, parts[1], folder)
                    results = self._draw(folder, *sent, asked, n)
            except MedSoftError as error:
                raise UsageError(_plain(str(error), folder)) from error
            yield Drawn(folder, results, [_plain(text, folder) for text in said])

    def _draw(self, folder: Path, image: Upload, mask: Upload, asked: DrawParams, n: int) -> list[Result]:
        home = folder / "drawn"
        window, spacing = (asked.window or "").split(), [_length(text) for text in (asked.spacing_mm or "").split()]
        options = InferenceOptions(
            output_dir=home,
            ckpt=self.ckpt,
            config=self.yaml,
            image=image.path,
            mask=mask.path,
            prompt=asked.prompt,
            plane=asked.plane,
            slice=asked.slice,
            window=window or None,
            spacing=spacing or None,
        )
        options.validate()
        read = single_sample(options)
        called = image.sample_id(read.meta)
        sample = dataclasses.replace(read, sample_id=called, patient_id=called)
        prepared = self._prepared(sample, asked.feather_mm)
        height, width = prepared.original.shape[:2]
        check_pixels(image.path.stem, height, width)
        if n * height * width > MOST_DRAWN:
            raise UsageError(
                f"n: {n} images of {width} x {height} pixels; at most {MOST_DRAWN} pixels are drawn at once"
            )
        own = MaskOrigin("own")
        tasks = [Task(sample, variant, asked.prompt, asked.seed, fixed_mask=True, mask=own) for variant in range(n)]
        if reason := too_long(home / tasks[-1].name):
            raise UsageError(f"{image.path.stem}: {reason}")
        jobs = [Job(task.seed, sample.sample_id, task.variant, task.prompt) for task in tasks]
        size, pixels = self.config.sampling.batch_size, []
        for first in range(0, n, size):
            pixels += self.model.inpainter.draw(prepared, jobs[first : first + size], self._check)
        results = []
        for task, drawn in zip(tasks, pixels, strict=True):
            result = result_of(home, task, prepared, drawn, self.provenance, Contents())
            if not image.is_volume:  # whose slice goes with it; an image the caller has
                metadata = {**result.metadata, "parent_image": f"../../{image.called}"}
                result = dataclasses.replace(result, metadata=metadata)
            result.write(home)
            results.append(result)
        return results

    def _prepared(self, sample: Sample, feather_mm: float | None) -> PreparedSample:
        """The image with its mask, which gets another feather than the checkpoint's where one is given."""
        assert sample.mask is not None  # the options name one
        data = self.config.data
        if feather_mm is not None:
            if read_mask(sample.mask, read_image(sample.image).shape).soft:
                raise UsageError("feather_mm: the mask is soft already and is used as it is; send a hard one")
            data = dataclasses.replace(data, feather=feather_mm, feather_unit="mm")
        prepared = with_fixed_mask(sample, sample.image, sample.mask, data)
        warn_if_mostly_marked(sample.mask, prepared)
        return prepared

    def information(self) -> dict[str, Any]:
        """GET /info/, as MONAI Label's clients read it."""
        model = {
            "type": "others",
            "labels": [],
            "dimension": 2,
            "description": f"Draws the lesion of a sentence into a mask ({self.ckpt.parent.name}/{self.ckpt.name})",
            "config": {"prompt": "", "seed": 0},
        }
        return {
            "name": "MedSoft-Diffusion",
            "description": "Synthetic vertebral lesions; not for clinical use",
            "version": software_version(),
            "labels": [],
            "models": {MODEL: model},
            **{name: {} for name in ("trainers", "strategies", "scoring", "train_stats", "datastore")},
        }


def _plain(text: str, folder: Path) -> str:
    """A message about a request without the folder of its files and without the dashes of flags."""
    return re.sub(r"--(?=[a-z])", "", text.replace(f"{folder}/", ""))


def _length(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.001 <= value <= 1000:
        raise UsageError(f"spacing_mm: expected one or two numbers of mm from 0.001 to 1000, found {text[:40]}")
    return value


def _schema(kind: type[BaseModel], files: Mapping[str, str], required: tuple[str, ...]) -> dict[str, Any]:
    """What OpenAPI says of a multipart request with the text parts of ``kind``."""
    made = kind.model_json_schema()
    binary = {name: {"type": "string", "format": "binary", "description": text} for name, text in files.items()}
    schema = {"type": "object", "properties": {**binary, **made["properties"]}, "required": [*required]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _both(sent: Mapping[str, UploadFile], image: str, mask: str) -> tuple[UploadFile, UploadFile]:
    for name in (image, mask):
        if name not in sent:
            raise UsageError(f"{name}: is missing; curl -F {name}=@FILE sends it")
    return sent[image], sent[mask]


Form = Annotated[FormData, Depends(read_form)]
FILES = {
    "image": "PNG, JPEG, BMP, TIFF, DICOM or NIfTI",
    "mask": "white (1) is drawn; of a volume also NIfTI or DICOM SEG",
}


def own_routes(drawer: Drawer) -> APIRouter:
    """POST /draw."""
    router = APIRouter()

    @router.post(
        "/draw",
        summary="Lesions drawn into an image",
        response_class=Response,
        responses={200: {"content": {"image/png": {}, "application/zip": {}}}},
        openapi_extra=_schema(DrawForm, FILES, ("image", "mask", "prompt")),
    )
    def draw(form: Form) -> Response:
        texts, sent = texts_and_files(form, "image", "mask")
        image, mask = _both(sent, "image", "mask")
        asked = DrawForm.read(texts)
        assert isinstance(asked, DrawForm)
        kind = asked.format or ("png" if asked.n == 1 else "zip")
        if kind == "png" and asked.n > 1:
            raise UsageError(f"format: png holds one image, n asks for {asked.n}; ask for zip")
        with drawer.drawn(image, mask, ("image", "mask"), asked, asked.n) as found:
            if kind == "png":
                return Response(found.png(), media_type="image/png", headers=found.headers())
            named = {"Content-Disposition": 'attachment; filename="drawn.zip"'}
            return Response(found.archive(), media_type="application/zip", headers=named | found.headers())

    return router


def monai_routes(drawer: Drawer) -> APIRouter:
    """What of MONAI Label's calls can be answered, and one line for the others."""
    router = APIRouter()

    @router.get("/info/", summary="MONAI Label: the server and its model")
    def info() -> dict[str, Any]:
        return drawer.information()

    params = {"file": FILES["image"], "label": FILES["mask"]}
    schema = _schema(DrawParams, params, ("params", "file", "label"))
    fields = schema["requestBody"]["content"]["multipart/form-data"]["schema"]
    inner = {name: fields["properties"].pop(name) for name in DrawParams.model_fields}
    fields["properties"]["params"] = {"type": "string", "description": f"JSON object: {', '.join(inner)}"}

    @router.post(
        "/infer/{model}", summary="MONAI Label: one image drawn", response_class=Response, openapi_extra=schema
    )
    def infer(model: str, form: Form, image: str = "", output: str = "all", session_id: str = "") -> Response:
        if model != MODEL:
            raise HTTPException(404, f"there is no model {model[:40]}; expected {MODEL}")
        if output not in ("image", "json", "all"):
            raise HTTPException(501, f"output {output[:40]} is not given; expected image, json or all")
        if session_id:
            raise HTTPException(501, "there are no sessions; send the image as the file `file`")
        texts, sent = texts_and_files(form, "file", "label")
        if image and "file" not in sent:
            raise HTTPException(404, "there is no datastore with images; send the image as the file `file`")
        both = _both(sent, "file", "label")
        asked = _params(texts)
        with drawer.drawn(*both, ("file", "label"), asked, 1) as found:
            if output == "json":
                return JSONResponse(found.told())
            if output == "image":
                named = {"Content-Disposition": 'attachment; filename="drawn.png"'}
                return Response(found.png(), media_type="image/png", headers=named | found.headers())
            return _multipart(json.dumps(found.told()), found.png())

    for name, reason in ABSENT.items():
        _add_absent(router, name, reason)
    return router


def _params(texts: Mapping[str, str]) -> DrawParams:
    """The params of MONAI Label's call, without what its clients add to each."""
    if others := {*texts} - {"params"}:
        raise UsageError(f"{min(others)[:40]}: expected the text part params, JSON, and nothing else")
    try:
        given = json.loads(texts.get("params") or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UsageError("params: expected a JSON object")
    return DrawParams.read({name: value for name, value in given.items() if name not in IGNORED})


def _multipart(params: str, png: bytes) -> Response:
    """As MONAI Label answers: the part params is JSON, the part image a file."""
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
        f'{params}\r\n--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="drawn.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = head.encode() + png + f"\r\n--{boundary}--\r\n".encode()
    return Response(body, media_type=f"multipart/form-data; boundary={boundary}")


def _add_absent(router: APIRouter, name: str, reason: str) -> None:
    def absent() -> Response:
        raise HTTPException(501, f"/{name}: this server has {reason}; it draws: POST /draw, POST /infer/{MODEL}")

    for path in (f"/{name}", f"/{name}/", f"/{name}/{{rest:path}}"):
        router.add_api_route(path, absent, methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)


def application(drawer: Drawer, address: Address, debug: bool = False) -> FastAPI:
    """All calls, and their description in /openapi.json."""
    routers = own_routes(drawer), monai_routes(drawer)
    app = make_app(*routers, page=None, address=address, for_programs=True, debug=debug)
    app.title, app.version = "MedSoft-Diffusion", software_version()
    app.add_api_route("/openapi.json", app.openapi, include_in_schema=False)
    return app


def serve_lesions(options: ServeOptions, debug: bool = False) -> None:
    """Serve until Ctrl-C. UsageError or MedSoftError where the model cannot be loaded or the port cannot be had."""
    address = Address.of(options)
    with listening(address) as listener:  # had before the model is loaded
        drawer = Drawer(options)
        if address.token:
            log.info("callers send the header Authorization: Bearer %s", address.token)
        app = application(drawer, address, debug)
        serve(app, address, open_browser=False, listener=listener, on_stop=drawer.close)
