"""`medsoft edit`: the editor behind its routes. docs/workbench.md has them in a table."""

import json
import logging
import shlex
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response

from ldm.core.locks import exclusive
from ldm.core.tables import counted
from ldm.data.images import read_image
from ldm.workbench.drafts import Drafts
from ldm.workbench.editor import (
    DrawRequest,
    Editor,
    GoRequest,
    OpenRequest,
    RejectRequest,
    SuggestionRequest,
    TokensRequest,
)
from ldm.workbench.finding import find
from ldm.workbench.jobs import QueuedJob
from ldm.workbench.options import EditOptions
from ldm.workbench.server import Address, RawBody, listening, make_app, raw, serve

log = logging.getLogger(__name__)


def edit(options: EditOptions, debug: bool = False) -> None:
    """Serve the editor until Ctrl-C. UsageError or MedSoftError where there is nothing to draw with, or nowhere to."""
    found = find(options)
    home, address = options.output_dir, Address.of(options)
    busy = f"{home}: another medsoft edit writes here at this moment; end it, or give another --output_dir"
    with exclusive(home / ".lock", busy), listening(address) as listener:
        editor = Editor(found, Drafts(home), options)
        try:
            app = make_app(routes(editor), page="edit.html", address=address, debug=debug)
            serve(app, address, not options.no_browser, listener, on_stop=editor.queue.stop)
        finally:
            editor.queue.close()
            log.info("%s", kept(editor.drafts))


def kept(drafts: Drafts) -> str:
    """What is said at the end: what was accepted so far, and what can be done with it."""
    accepted = len([*drafts.accepted.glob("*/meta.json")])
    drawn = len([*drafts.drafts.glob("*/meta.json")])
    if not accepted:
        return f"{counted(drawn, 'drawing')} kept in {drafts.drafts}, none accepted yet"
    said = f"{counted(accepted, 'accepted drawing')} in {drafts.accepted}"
    return f"{said}; for a second look by somebody else: medsoft review {shlex.quote(str(drafts.accepted))}"


def routes(editor: Editor) -> APIRouter:
    """All routes of the editor below /api."""
    router = APIRouter(prefix="/api")
    _add_documents(router, editor)
    _add_masks(router, editor)
    _add_drawings(router, editor)
    _add_results(router, editor)
    return router


def _add_documents(router: APIRouter, editor: Editor) -> None:
    @router.get("/state")
    def state(document: str | None = None) -> dict[str, Any]:
        return editor.state(document)

    @router.post("/open")
    def open_path(asked: OpenRequest) -> dict[str, Any]:
        return editor.state(editor.open(asked).id)

    @router.post("/go")
    def go(asked: GoRequest) -> dict[str, Any]:
        return editor.state(editor.opened.go(asked.index, asked.document).id)

    @router.get("/collection")
    def collection(document: str, words: str = "") -> dict[str, Any]:
        return editor.matching(document, words)

    @router.get("/documents/{name}")
    def document(name: str) -> dict[str, Any]:
        return editor.described(editor.document(name))

    @router.get("/documents/{name}/levels")
    def levels(name: str) -> Response:
        return raw(editor.document(name).pixels)

    @router.get("/documents/{name}/{region}")
    def region(name: str, region: str) -> Response:
        document = editor.document(name)
        known = {"body": lambda: document.body, "mask": lambda: document.mask}
        found = known[region]() if region in known else None
        if found is None:
            raise HTTPException(404, f"{document.path}: has no {region[:40]}")
        return raw(found)


def _add_masks(router: APIRouter, editor: Editor) -> None:
    @router.post("/documents/{name}/suggestion")
    def suggestion(name: str, asked: SuggestionRequest) -> Response:
        return raw(editor.suggestion(editor.document(name), asked))

    @router.post("/documents/{name}/soft")
    def soft(name: str, body: RawBody, feather_mm: float | None = None) -> Response:
        document = editor.document(name)
        hard = editor.hard(document, body)
        facts = editor.facts(document, hard, feather_mm)
        return raw(editor.soft(document, hard, feather_mm), {"X-Facts": json.dumps(facts)})

    @router.get("/sentences")
    def sentences(lesion_type: str = "", severity: str = "", level: str = "") -> dict[str, Any]:
        return editor.sentences.matching({"lesion_type": lesion_type, "severity": severity, "level": level})

    @router.post("/tokens")
    def tokens(asked: TokensRequest) -> dict[str, Any]:
        return editor.read(asked.prompt, asked.document)


def _add_drawings(router: APIRouter, editor: Editor) -> None:
    def job(name: str) -> QueuedJob:
        found = editor.queue.get(name)
        if found is None:
            raise HTTPException(404, f"no job {name[:40]} is known; the history has what it has drawn")
        return found

    @router.post("/draw")
    def draw(asked: DrawRequest) -> dict[str, Any]:
        return editor.draw(asked).told()

    @router.get("/jobs/{name}")
    def progress(name: str) -> dict[str, Any]:
        return job(name).told()

    @router.post("/jobs/{name}/cancel")
    def cancel(name: str) -> dict[str, Any]:
        editor.queue.cancel(job(name))
        return job(name).told()


def _add_results(router: APIRouter, editor: Editor) -> None:
    @router.get("/history")
    def history(before: str | None = None) -> list[dict[str, Any]]:
        try:
            return editor.drafts.items(before)
        except KeyError as error:
            raise HTTPException(404, f"no drawing {str(before)[:40]} is known") from error

    @router.get("/results/{name}")
    def item(name: str) -> dict[str, Any]:
        return editor.item(name)

    @router.get("/results/{name}/levels")
    def levels(name: str) -> Response:
        return raw(read_image(editor.result(name) / "image.png"))

    @router.get("/results/{name}/soft")
    def soft(name: str) -> Response:
        return raw(read_image(editor.result(name) / "soft_mask.png"))

    @router.get("/results/{name}/mask")
    def mask(name: str) -> Response:
        return raw(read_image(editor.result(name) / "mask.png"))

    @router.get("/results/{name}/thumbnail.png")
    def thumbnail(name: str, longer: Annotated[int, Query(ge=16, le=512)] = 128) -> Response:
        return Response(editor.thumbnail(name, longer), media_type="image/png")

    @router.post("/results/{name}/accept")
    def accept(name: str) -> dict[str, Any]:
        editor.item(name)
        return editor.drafts.judge(name, "accepted")

    @router.post("/results/{name}/reject")
    def reject(name: str, asked: RejectRequest) -> dict[str, Any]:
        editor.item(name)
        return editor.drafts.judge(name, "rejected", asked.reason)

    @router.post("/results/{name}/undo")
    def undo(name: str) -> dict[str, Any]:
        editor.item(name)
        return editor.drafts.judge(name, "new")
