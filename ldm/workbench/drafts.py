"""Drawings on the disk: OUTPUT_DIR/drafts, OUTPUT_DIR/accepted and history.jsonl, which tells what was tried.

A drawing is a whole result folder from the first moment, and the folder that holds it says whether it is accepted:
nothing lives in memory only. To accept is to rename, which happens or does not.
"""

import itertools
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any

from ldm.core.errors import FewWarnings, MedSoftError
from ldm.core.files import PARTIAL_PREFIX, check_target, fingerprint, json_text, read_json, sync, sync_folder
from ldm.inference.results import is_whole

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
PAGE = 64  # drawings that are told at once: as many as one request may ask for
SHOWN: tuple[str, ...] = ("id", "job", "document", "name", "prompt", "seed", "variant", "feather_mm", "state")
SHOWN += ("reason", "when", "width", "height")
Kinds = Mapping[str, type | UnionType]  # what the values of a record may be, by key
_KINDS: Kinds = {
    **{"id": str, "name": str, "prompt": str, "seed": int, "variant": int, "document": str | None, "job": str | None},
    **{"state": str | None, "reason": str | None, "origin": dict | None, "feather_mm": float | int | None},
}
_ORIGIN: Kinds = {"path": str, "sample_id": str, "plane": str | None, "slice": int | None}
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_OWN = re.compile(r".*_([0-9a-f]{12})__v(\d+)", re.DOTALL)


class Drafts:
    """The drawings of one output folder, by id. In any thread. MedSoftError where the folder cannot be written.

    The folder's lock is held by whoever makes one.
    """

    def __init__(self, output_dir: Path) -> None:
        self.home = output_dir.absolute()
        self.drafts, self.accepted = self.home / "drafts", self.home / "accepted"
        self._file = self.home / HISTORY
        self._items: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()
        check_target(self._file, 0)
        for folder in self.drafts.glob(f"{PARTIAL_PREFIX}*"):  # of a drawing that a crash has stopped
            if folder.suffix != ".before":
                shutil.rmtree(folder, ignore_errors=True)
        self._passed_over = FewWarnings(log, "what is passed over of earlier drawings")
        for record in self._records():
            self._items[record["id"]] = record
        for name in self._unlisted():
            self._adopt(name)
        self._passed_over.close()

    def items(self, before: str | None = None) -> list[dict[str, Any]]:
        """What the page is told of the last PAGE drawings that are there, in the order in which they were drawn.

        ``before``: of the last ones before the drawing with this id. KeyError for one that is not known.
        """
        with self._lock:
            newest = reversed(self._items.values())
            if before is not None:
                known = self._items[before]
                newest = itertools.islice(itertools.dropwhile(lambda each: each is not known, newest), 1, None)
            there = (told for each in newest if (told := self._told(each)))
            return [*itertools.islice(there, PAGE)][::-1]

    def item(self, name: str) -> dict[str, Any] | None:
        """The same of one; None for one that is not there."""
        with self._lock:
            return self._told(self._items[name]) if name in self._items else None

    def origin(self, document: str) -> dict[str, Any] | None:
        """Where a document lies that something was drawn into, by its id."""
        with self._lock:
            drawn = [each for each in self._items.values() if each.get("document") == document and each.get("origin")]
        there = [each["origin"] for each in drawn if Path(each["origin"]["path"]).exists()]
        return there[-1] if there else drawn[-1]["origin"] if drawn else None

    def is_there(self, folder_name: str) -> bool:
        """Whether a drawing with this folder's name is there, as draft or accepted."""
        return self._place(folder_name) is not None

    def add(self, item: dict[str, Any]) -> str:
        """Note a drawing whose folder is written, if it is not known yet; returns its id."""
        with self._lock:
            if item["id"] not in self._items:
                made = {"state": "new", "reason": None, "when": _now(), **item}
                self._append(made)
                self._items[item["id"]] = made
            return item["id"]

    def judge(self, name: str, state: str, reason: str | None = None) -> dict[str, Any]:
        """Set a drawing's state, perhaps after it was judged otherwise; what the page is told of it then.

        ``state``: accepted, rejected, or new where a judgement is taken back. The folder is renamed and the history
        gets a line, both or neither.
        """
        with self._lock:
            before = self._items[name]
            now = before | {"state": state, "reason": reason, "judged": _now()}
            home = self.accepted if state == "accepted" else self.drafts
            source, target = self._place(before["name"]), home / before["name"]
            if source is None:
                raise MedSoftError(f"{self.drafts / before['name']}: is no longer there, so it cannot be judged")
            _move(source, target)
            try:
                self._append(now)
            except MedSoftError:
                _move(target, source)
                raise
            self._items[name] = now
            told = self._told(now)
            assert told is not None  # it has just been moved
            return told

    def _place(self, folder_name: str) -> Path | None:
        return next((home / folder_name for home in (self.accepted, self.drafts) if is_whole(home / folder_name)), None)

    def _told(self, item: dict[str, Any]) -> dict[str, Any] | None:
        place = self._place(item["name"])
        if place is None:  # somebody has deleted or moved it
            return None
        told = {key: item.get(key) for key in SHOWN}
        if place.parent == self.accepted:
            told["state"] = "accepted"
        elif told["state"] == "accepted":  # moved back by hand
            told["state"] = "new"
        return told | {"folder": str(place), "thumbnail": f"/api/results/{item['id']}/thumbnail.png"}

    def _append(self, record: dict[str, Any]) -> None:
        """One more line of the history, on the disk. MedSoftError, with the file as it was, where that fails."""
        size = self._file.stat().st_size if self._file.exists() else 0
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with self._file.open("a+b") as file:
                file.seek(max(size - 1, 0))
                if size and file.read(1) != b"\n":  # a crash has cut the last line short
                    file.write(b"\n")
                file.write(json_text(record, None).encode())
                file.flush()
                sync(file.fileno())
        except OSError as error:
            if self._file.exists() and self._file.stat().st_size > size:
                os.truncate(self._file, size)
            cause = error.strerror or error
            raise MedSoftError(f"{self._file}: could not be written ({cause}); nothing was changed") from error

    def _records(self) -> Iterator[dict[str, Any]]:
        """The lines of the history; what a crash has cut short, or others wrote, is passed over with a warning."""
        if not self._file.exists():
            return
        for number, line in enumerate(self._file.read_bytes().split(b"\n"), 1):
            if (record := _record(line)) is not None:
                yield record
            elif line.strip():
                self._passed_over.warn(f"warning: {self._file}: line {number} tells of no drawing and is passed over")

    def _unlisted(self) -> list[str]:
        """The folders of whole drawings that the history does not know, because a crash came between the two."""
        known = {each["name"] for each in self._items.values()}
        folders = [each for home in (self.drafts, self.accepted) if home.is_dir() for each in sorted(home.iterdir())]
        return [each.name for each in folders if each.name not in known and each.name[0] != "." and is_whole(each)]

    def _adopt(self, folder_name: str) -> None:
        """List a whole drawing by its meta.json; with a warning not, where that cannot be read."""
        place = self._place(folder_name)
        assert place is not None
        own = _OWN.fullmatch(folder_name)
        name = f"{own[1]}-{own[2]}" if own else fingerprint(folder_name)[:16]
        made: dict[str, Any] = {"id": name, "name": folder_name, "job": None}
        try:
            meta = read_json(place / "meta.json", "meta.json of a result")
            made |= {key: meta[key] for key in ("prompt", "seed", "variant")}
            image, parent = (place / meta["parent_image"]).resolve(), meta["parent_id"]
            made["document"] = document_id(parent, meta["parent_sha256"])
            made["origin"] = {"path": str(image), "sample_id": parent, "plane": None, "slice": None}
            if _record(json_text(made, None).encode()) is None:
                raise ValueError("of another form")
        except (MedSoftError, KeyError, TypeError, ValueError) as error:
            reason = f"its meta.json is not that of a drawing ({error})"
            self._passed_over.warn(f"warning: {place}: is not shown, {reason}")
            return
        self.add(made)


def document_id(sample_id: str, digest: str) -> str:
    """The id of a document: a name for it that another content, or a sample of another name, does not have."""
    return fingerprint([sample_id, digest])[:16]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the history; None for what tells of no drawing."""
    try:
        found = json.loads(line)
        sound = isinstance(found, dict) and _is_of(found, _KINDS)
        if sound and (origin := found.get("origin")):  # which is opened again by it
            sound = {*_ORIGIN} <= {*origin} and _is_of(origin, _ORIGIN)
        json_text(found, None).encode()  # neither NaN nor half a character, which no page could be told of
    except (ValueError, RecursionError):
        return None
    return found if sound and _ID.fullmatch(found["id"]) and Path(found["name"]).name == found["name"] else None


def _is_of(found: dict[str, Any], kinds: Kinds) -> bool:
    """Whether each value, None where there is none, is of its kind."""
    return all(isinstance(found.get(key), kind) for key, kind in kinds.items())


def _move(source: Path, target: Path) -> None:
    """Rename a folder, durably. MedSoftError, with nothing changed, where that fails."""
    if source == target:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
    except OSError as error:
        raise MedSoftError(
            f"{target}: could not be written ({error.strerror or error}); nothing was changed"
        ) from error
    sync_folder(target.parent)
    sync_folder(source.parent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
