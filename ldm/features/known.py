"""What was found of the files of the data, remembered from one start of a training to the next.

What is trusted: a file whose size and times are those that it had before it was read is not read again. The time of
its last change of any kind (ctime) is one of them, as nobody can set it: copies and archives give a file the
modification time of another. All else was found in files of this content. Without the record every file is read.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ldm.core.devices import is_first_process
from ldm.core.errors import MedSoftError, first_line
from ldm.core.files import atomic_file, content_id, fingerprint, remove_partials
from ldm.core.locks import exclusive
from ldm.core.threads import thread_pool
from ldm.data.samples import Sample

log = logging.getLogger(__name__)

FORMAT = 1  # of what is remembered; raise the number when files of the same content would give another answer
SETTLED = 2 * 10**9  # ns: what changes again sooner may show the same time on a coarse clock (FAT's has two seconds)
PART = 4096  # files that are looked at together
Value = TypeVar("Value")
State = tuple[int, int, int]  # size in bytes, time of the last modification and of the last change of any kind in ns


def record_in(cache: Path) -> Path:
    """Where a feature cache remembers the files of the data."""
    return cache / "data" / "verified.jsonl"


class KnownFiles:
    """SHA-256 of the files of samples, and answers that were found in them; in ``cache`` what to remember of both.

    A record is a header, a line for each file and the SHA-256 of all that. One that is gone or damaged costs time only.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.file = record_in(cache) if cache else None
        self.digests: dict[Path | None, str] = {}
        self._answers: dict[str, int] = {}
        # What the record does not hold yet; the rest of it is read again when it is written, line by line.
        self._states: dict[Path, State] = {}
        self._found: dict[Path, dict[str, int]] = {}  # answers, by the first of their files
        self._unsettled: set[Path] = set()
        self._damaged = False  # the record

    def read(self, samples: Iterable[Sample]) -> dict[Path | None, str]:
        """Find the SHA-256 of every file of ``samples`` that can be read, by several threads; all that are known."""
        new = {str(path): path for sample in samples for path in sample.files if path and path not in self.digests}
        with thread_pool() as pool:
            for rows in _parts(row for row in self._rows() if row[0] in new):
                for row, state in zip(rows, pool.map(_size_and_times, [row[0] for row in rows]), strict=True):
                    if state == tuple(row[1]):
                        self.digests[new.pop(row[0])] = row[2]
                        self._answers |= row[3]
            for paths in _parts(new.values()):
                for path, (digest, state) in zip(paths, pool.map(_content_of, paths), strict=True):
                    if digest is None:
                        continue
                    self.digests[path] = digest
                    if state:
                        self._states[path] = state
                    else:
                        self._unsettled.add(path)
        return self.digests

    def recall(self, what: str, files: Sequence[Path | None], compute: Callable[[], int]) -> int:
        """The answer to ``what``, which ``files`` alone decide: remembered, or computed. It is not if that raises."""
        there = [path for path in files if path]
        if not there or any(path not in self.digests or path in self._unsettled for path in there):
            return compute()
        key = fingerprint([what, *(self.digests.get(path) for path in files)])[:16]
        if key not in self._answers:
            self._answers[key] = self._found.setdefault(there[0], {})[key] = int(compute())
        return self._answers[key]

    def write(self) -> None:
        """Remember what is new; a warning where that cannot be done. Of several processes the first one writes."""
        if self.file is None or not (self._states or self._found) or not is_first_process():
            return
        try:
            with exclusive(self.file.parent / ".lock", f"{self.file}: another run is writing it"):
                remove_partials(self.file.parent)
                with atomic_file(self.file) as handle:
                    whole = sha256()
                    for value in self._remembered():
                        line = f"{json.dumps(value)}\n".encode()
                        handle.write(line)
                        whole.update(line)
                    handle.write(whole.hexdigest().encode())
        except (MedSoftError, OSError) as error:  # OSError: a leftover of a killed run that cannot be deleted
            log.warning("warning: %s; the next start reads the data again", first_line(error))

    def _remembered(self) -> Iterator[Any]:
        """The lines of the record: those of other data stay as long as their files do."""
        yield FORMAT
        ours = {str(path): path for path in self.digests if path}
        for name, state, digest, answers in self._rows():
            path = ours.get(name)
            if path is None and _size_and_times(name) == tuple(state):
                yield name, state, digest, answers
            elif path is not None and path not in self._states and path not in self._unsettled:
                yield name, state, digest, answers | self._found.get(path, {})
        for path, state in self._states.items():
            yield str(path), state, self.digests[path], self._found.get(path, {})

    def _rows(self) -> Iterator[Any]:
        """[path, state, SHA-256, answers] of each file in the record; none if it is not there, or not whole."""
        if self.file is None or self._damaged:
            return
        try:
            with self.file.open("rb") as handle:
                whole, last, lines = sha256(), b"", 0
                for line in handle:
                    whole.update(last)
                    last, lines = line, lines + 1
                if last != whole.hexdigest().encode():
                    log.warning("warning: %s: damaged; the data are read again", self.file)
                    self._damaged = True
                    return
                handle.seek(0)
                rows = map(json.loads, islice(handle, lines - 1))
                if next(rows) == FORMAT:  # else it is that of another version
                    yield from rows
        except OSError:  # none yet, or a folder that may not be read
            return


def _parts(values: Iterable[Value]) -> Iterator[list[Value]]:
    """Lists of PART of them: what threads do at a time, as each waiting task takes a kilobyte."""
    left = iter(values)
    while part := list(islice(left, PART)):
        yield part


def _content_of(path: Path) -> tuple[str | None, State | None]:
    """The file's SHA-256, and the state of one that had settled before."""
    begun, state = time.time_ns(), _size_and_times(path)
    settled = state is not None and begun - max(state[1:]) > SETTLED
    return content_id(path), state if settled else None


def _size_and_times(path: str | Path) -> State | None:
    """Of a file of the data, which may be another one with the same size and modification time; None if not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
