"""Files that appear whole or not at all, and fingerprints of what they hold. No torch here."""

import codecs
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.threads import thread_pool

PARTIAL_PREFIX = ".partial-"
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)  # what mounts answer that cannot do it
UNSURE = "it is there, but may not outlast a power cut"
MOST_LEVELS = 64  # of a JSON file
REPLACED = "was replaced or changed after it had been read; run the same command again when nobody writes it"
FileState = tuple[int, int, int, int]  # tells a file from another one of its name, and from itself before a change


@contextmanager
def atomic_file(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for writing bytes; it becomes ``path`` only if the block succeeds.

    ``mode``: the most rights that it gives, before the umask takes some; 0o600 for its owner alone.

    The bytes are on the disk (fsync) before the rename, and the rename itself is made durable, so a crash at any
    moment leaves either the old file or the new one. The parent folder is created. An OSError (full disk, missing
    rights) becomes a MedSoftError that names the file.
    """
    path = Path(path)
    temporary, state = None, "nothing was changed there"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Its rights are those that the umask gives to a new file: mkstemp would need chmod, which some mounts refuse.
        with open(
            path.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}", "xb", opener=partial(os.open, mode=mode)
        ) as handle:
            temporary = Path(handle.name)
            yield handle
            handle.flush()
            sync(handle.fileno())
        os.replace(temporary, path)
        temporary, state = None, UNSURE
        sync_folder(path.parent)
    except OSError as error:
        cause = error.strerror or error
        raise MedSoftError(f"{path}: could not be written ({cause}); {state}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill; it replaces ``path`` only if the block succeeds.

    A folder that was there is moved aside, and goes only when the new one is in its place; if that fails it comes back
    (after a crash between the two, with the next call). An OSError (full disk, missing rights) becomes a MedSoftError
    that names the folder.
    """
    path = Path(path)
    partial = path.parent / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}"  # nobody else's, however long the name is
    before = path.parent / f"{PARTIAL_PREFIX}{named_seed(path.name):016x}.before"  # found again after a crash
    state = "nothing was changed there. Free some space or choose another place, then run the same command again"
    try:
        if before.exists() and not path.exists():
            os.replace(before, path)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            os.replace(path, before)
        os.replace(partial, path)
        state = UNSURE
        sync_folder(path.parent)
    except OSError as error:
        if before.exists() and not path.exists():
            os.replace(before, path)
        raise MedSoftError(f"{path}: could not be written ({error.strerror or error}); {state}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(before, ignore_errors=True)


def sync(descriptor: int) -> None:
    """Have the disk keep what was written (fsync), on file systems that can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, where a directory can be opened for that: not on Windows."""
    if os.name == "nt":
        return
    with suppress(PermissionError):  # one may write into some folders without reading them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def remove_partials(folder: Path) -> int:
    """Delete what an interrupted ``atomic_file`` left in ``folder``; returns how many files that were."""
    orphans = [path for path in folder.glob(PARTIAL_PREFIX + "*") if path.is_file()]
    for orphan in orphans:
        orphan.unlink()
    return len(orphans)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as handle:
        handle.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as ``json_text``, atomically."""
    write_text(path, json_text(value))


def json_text(value: Any, indent: int | None = 2) -> str:
    """``value`` as JSON, indented, or with None on one line. ValueError for NaN, which is not JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_together(texts: Mapping[Path, Iterable[str]]) -> None:
    """Write UTF-8 files of one folder that belong together, given as pieces: all, or, after an error, none.

    They lie whole and on the disk in a folder beside before the first of them gets its name. Raises MedSoftError.
    """
    path, state = next(iter(texts)), "nothing was changed there"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=path.parent) as staging:
            for path, pieces in texts.items():
                with (Path(staging) / path.name).open("wb") as handle:
                    handle.writelines(piece.encode("utf-8") for piece in pieces)
                    handle.flush()
                    sync(handle.fileno())
                if path.is_dir():
                    raise IsADirectoryError(None, "a folder has this name")
            for path in texts:
                os.replace(Path(staging) / path.name, path)
        state = UNSURE
        sync_folder(path.parent)
    except OSError as error:
        raise MedSoftError(f"{path}: could not be written ({error.strerror or error}); {state}") from error


def read_text(path: str | Path, what: str = "file") -> str:
    """Read UTF-8 text (a byte-order mark is accepted); any error becomes a FileError naming file and cause."""
    with _reading(path, what), open(path, "rb") as handle:
        data = handle.read()
    return _text(path, data.removeprefix(codecs.BOM_UTF8))


@contextmanager
def _reading(path: str | Path, what: str) -> Iterator[None]:
    """A file that cannot be opened or read becomes a FileError."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileError(path, f"this {what} does not exist") from error
    except IsADirectoryError as error:
        raise FileError(path, f"expected a {what}, found a folder") from error
    except OSError as error:
        raise FileError(path, f"this {what} could not be read ({error.strerror or error})") from error


def _text(path: str | Path, data: bytes, where: str = "") -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise FileError(path, f"{where}not UTF-8 text ({byte}); save it as UTF-8") from error
    if "\0" in text:
        raise FileError(path, f"{where}holds zero bytes, so it is no text (or UTF-16 without a mark); save it as UTF-8")
    return text


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Read a JSON file; a syntax error names the line and column.

    A FileError too: what Python reads, but others do not or differently (NaN, Infinity, numbers that no float holds,
    a key that stands twice, half of a surrogate pair), and more than 64 levels.
    """
    text = read_text(path, what)
    value, end = _json_value(path, text, _after_spaces(text, 0))
    _check_end(path, text, end)
    return value


JSON_LINES = ".jsonl"  # the suffix of files with one JSON value a line


def read_records(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list, or of each line of a file whose name ends with .jsonl, and where each stands.

    That is "record 0" or "line 1". One value after the other is read, so only the text of a list, or one line, is in
    memory. Blank lines are passed over. FileError as from ``read_json``, for a line that is cut short, and for one
    kind of file under the name of the other.
    """
    if Path(path).suffix.lower() == JSON_LINES:
        yield from _lines(path, what)
        return
    text = read_text(path, what)
    place = _after_spaces(text, 0)
    if text[place : place + 1] != "[":
        value, end = _json_value(path, text, place)
        if isinstance(value, dict) and text[_after_spaces(text, end) :][:1] == "{":
            raise FileError(path, "holds one record a line (JSON Lines), not a JSON list; name it .jsonl")
        found = type(read_json(path, what)).__name__
        raise FileError(path, f"expected a JSON list of records, found {found}")
    index, place = 0, _after_spaces(text, place + 1)
    more = text[place : place + 1] != "]"
    while more:
        value, place = _json_value(path, text, place, levels=MOST_LEVELS - 1)
        yield f"record {index}", value
        index, place = index + 1, _after_spaces(text, place)
        more = text[place : place + 1] == ","
        if more:
            place = _after_spaces(text, place + 1)
    if text[place : place + 1] != "]":
        raise _syntax_error(path, json.JSONDecodeError("Expecting ',' delimiter", text, place))
    _check_end(path, text, place + 1)


def _lines(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    empty = True
    with _reading(path, what), open(path, "rb") as handle:
        for number, data in enumerate(handle, 1):
            where = f"line {number}"
            try:
                text = _text(path, data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, f"{where}: ").strip()
                if empty and text.startswith("["):
                    raise FileError(path, "holds a JSON list, not one record a line (JSON Lines); name it .json")
                value, end = _json_value(path, text, 0, f"{where}: ") if text else (None, 0)
                _check_end(path, text, end, f"{where}: ")
            except FileError as error:
                if data.endswith(b"\n") or empty:
                    raise
                reason = "the last one, is cut short or damaged; copy the file again, or make it again"
                raise FileError(path, f"{where}, {reason}") from error
            if text:
                empty = False
                yield where, value


def _after_spaces(text: str, place: int) -> int:
    return _SPACES.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing too


def _check_end(path: str | Path, text: str, place: int, where: str = "") -> None:
    """FileError where more than spaces follows."""
    if (place := _after_spaces(text, place)) < len(text):
        raise _syntax_error(path, json.JSONDecodeError("Extra data", text, place), where)


def _json_value(path: str | Path, text: str, place: int, where: str = "", levels: int = MOST_LEVELS) -> tuple[Any, int]:
    """The JSON value that begins at ``place``, and where it ends; FileError for one that ``read_json`` refuses.

    ``where`` stands before the reason, for one of several values.
    """
    try:
        value, end = _DECODER.raw_decode(text, place)
        if _ESCAPED_SURROGATE.search(text, place, end):  # which may be half of a pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise _syntax_error(path, error, where) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise FileError(path, f"{where}not valid JSON ({half} is half of a surrogate pair)") from error
    except ValueError as error:
        raise FileError(path, f"{where}not valid JSON ({error})") from error
    except RecursionError as error:
        raise FileError(path, f"{where}{_TOO_DEEP}") from error
    inner = [value]
    while inner and levels >= 0:
        boxes = (each.values() if isinstance(each, dict) else each for each in inner if isinstance(each, dict | list))
        inner, levels = [each for box in boxes for each in box], levels - 1
    if inner:
        raise FileError(path, f"{where}{_TOO_DEEP}")
    return value, end


def _syntax_error(path: str | Path, error: json.JSONDecodeError, where: str = "") -> FileError:
    place = f"column {error.colno}: {error.msg}"
    return FileError(path, f"{where}not valid JSON ({place if where else f'line {error.lineno}, {place}'})")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number, or too large for one")
    return value


def _whole(text: str) -> int:
    _number(text)
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {sys.intern(name): value for name, value in pairs}  # a hundred thousand records share their keys
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_number, parse_float=_number, parse_int=_whole, object_pairs_hook=_object)
_SPACES = re.compile(r"[ \t\n\r]*")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD]")
_TOO_DEEP = f"nested deeper than the {MOST_LEVELS} levels that are read"


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def unchanged(path: Path, since: FileState | None = None) -> Iterator[FileState | None]:
    """FileError if the file is not the one that it was before the block, or when this gave its state: ``since``.

    For what reads a file by its name more than once, so that all of it is of one and the same file.
    """
    before = _state_of(path)
    if since is not None and before != since:
        raise FileError(path, REPLACED)
    yield before
    if _state_of(path) != before:
        raise FileError(path, REPLACED)


def _state_of(file: Path | int) -> FileState | None:
    """None for a file (or an open one's descriptor) that is not there, or cannot be looked at; its reader says so."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class HeldFile:
    """A file that is kept open, as its bytes are used after their SHA-256 was taken: those of mapped tensors are.

    Another file that takes its name does no harm to them. What is written into this one does, and is noticed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor, self.digest = path, os.open(path, os.O_RDONLY), ""
        weakref.finalize(self, os.close, self.descriptor)
        self.state = _state_of(self.descriptor)

    def sha256(self) -> str:
        """Of its bytes; FileError if they have changed since it was opened, or another file has its name."""
        with unchanged(self.path, self.state):
            self.digest = sha256_file(self.path)
        return self.digest

    def check(self) -> None:
        """After its bytes were used: FileError if it was written meanwhile, and is not what its SHA-256 says."""
        if (now := _state_of(self.descriptor)) != self.state:
            with open(self.descriptor, "rb", closefd=False) as handle:
                handle.seek(0)
                if hashlib.file_digest(handle, "sha256").hexdigest() != self.digest:
                    raise FileError(self.path, REPLACED)
            self.state = now  # only touched


def content_id(path: str | Path | None) -> str | None:
    """SHA-256 of a file for a run's fingerprint; None for no file or an unreadable one (reported where it is used)."""
    try:
        return sha256_file(path) if path else None
    except OSError:
        return None


class Contents:
    """``content_id`` of files, each of which is read once, however often it is asked for."""

    def __init__(self) -> None:
        self.known: dict[Path | None, str | None] = {None: None}
        self.states: dict[Path | None, FileState | None] = {}

    def __call__(self, path: Path | None) -> str | None:
        """SHA-256 of the file's bytes; None for no file or an unreadable one."""
        if path not in self.known:
            self.known[path], self.states[path] = self._read(path)
        return self.known[path]

    def check(self, paths: Iterable[Path | None]) -> None:
        """FileError for one of ``paths`` that is another file by now than the one whose SHA-256 is known."""
        for path in paths:
            if path and path in self.states and (now := _state_of(path)) != self.states[path]:
                if content_id(path) != self.known[path]:
                    raise FileError(path, REPLACED)
                self.states[path] = now  # only touched, or on a mount that numbers files anew

    @staticmethod
    def _read(path: Path | None) -> tuple[str | None, FileState | None]:
        state = _state_of(path) if path else None  # before the bytes: what is written meanwhile is seen by ``check``
        return content_id(path), state

    def read(self, paths: Iterable[Path | None]) -> None:
        """Read those of ``paths`` that are not known yet, several at a time."""
        new = [path for path in dict.fromkeys(paths) if path not in self.known]
        with thread_pool() as pool:
            for path, (digest, state) in zip(new, pool.map(self._read, new), strict=True):
                self.known[path], self.states[path] = digest, state


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_all(values: Iterable[Any]) -> str:
    """``fingerprint`` of a list of ``values``, of which one at a time is in memory."""
    digest, separator = hashlib.sha256(), b"["
    for value in values:
        digest.update(separator + json.dumps(value, sort_keys=True, default=str).encode())
        separator = b", "
    digest.update(b"[]" if separator == b"[" else b"]")
    return digest.hexdigest()


def named_seed(*names: object) -> int:
    """A 63-bit seed that depends only on the names given: randomness is a function of names, never of order."""
    text = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def free_bytes(path: str | Path) -> int:
    """What is free on the disk on which ``path`` lies, or will lie."""
    return shutil.disk_usage(nearest_existing(Path(path).absolute())).free


def nearest_existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def check_target(path: str | Path, size: int, *inputs: str | Path) -> None:
    """Before long work: raise unless ``path`` can be written, is none of ``inputs``, and ``size`` bytes have room.

    Nothing is left behind. Parent folders that are missing are made when the file is written.
    """
    path = Path(path)
    for source in inputs:
        if Path(source).resolve() == path.resolve():
            raise UsageError(f"{path}: is also the input {source}; give another output path")
    folder = nearest_existing(path.absolute().parent)
    try:
        with tempfile.NamedTemporaryFile(prefix=PARTIAL_PREFIX, dir=folder):
            free = free_bytes(folder)
    except OSError as error:
        raise MedSoftError(f"{path}: cannot be written there ({folder}: {error.strerror or error})") from error
    if free < size:
        raise MedSoftError(f"{path}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on that disk; make room")
