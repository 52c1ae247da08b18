"""Results as WebDataset tars: a thousand samples a file, instead of six files a sample.

``000000.tar`` holds ``KEY.image.png``, ``KEY.mask.png``, ``KEY.soft_mask.png``, ``KEY.prompt.txt``, ``KEY.meta.json``
and, if there is one, ``KEY.anatomy.png`` of its samples, those of one sample one after the other. A key is a result's
name, in whose last part dots are written as ``%2E``: readers take what follows the first dot for the kind of file.
``000000.json`` beside it is its index, written after it: a tar without one is not finished.

Which samples a tar holds is a matter of their places in the plan alone, so that a run that was stopped leaves the same
tars as one that was not. Until a tar is full its results lie, each a sample folder, in the hidden folder of UNPACKED.
"""

import math
import shutil
import tarfile
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.core.files import atomic_file, read_json, write_json
from ldm.data.png import write_png
from ldm.data.samples import Reject
from ldm.inference.gallery import PAGE, TILE, card_of, write_pages, write_thumbnail
from ldm.inference.results import Result, is_whole, summary_of
from ldm.inference.shares import Share, Summary
from ldm.inference.tasks import Task
from ldm.reports.html import files_folder

SIZE = 1000  # samples of a tar
SHEET = 50  # thumbnails of an image file of the report
UNPACKED = ".unpacked"  # the folder of results whose tar is not full yet
NAMES = [f"{prefix}{'[0-9]' * 6}" for prefix in ("", "share-*-of-*-")]
INDEXES = [f"{name}.json" for name in NAMES]
TARS = [f"{name}.tar" for name in NAMES]


class TarResults:
    """The results of one share of a run as tars in ``path``; see the module's text, and ``FolderResults``."""

    def __init__(self, path: Path, share: Share) -> None:
        self.path, self.prefix = path, "" if share.alone else f"{share.name}-"
        self.unpacked = path / UNPACKED if share.alone else path / UNPACKED / share.name

    def parts(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """The tasks of each tar."""
        return [tasks[first : first + SIZE] for first in range(0, len(tasks), SIZE)]

    def missing(self, number: int, part: Sequence[Task]) -> list[int]:
        """The numbers of the tasks whose results are neither in the tar ``number`` nor waiting to be packed."""
        if self._is_closed(number):
            return []
        return [k for k, task in enumerate(part) if not is_whole(self.unpacked / task.name)]

    def _is_closed(self, number: int) -> bool:
        tar, index = self._files(number)
        if not index.exists():
            return False
        size = read_json(index)["bytes"]
        return size == 0 or (tar.exists() and tar.stat().st_size == size)

    def _files(self, number: int) -> tuple[Path, Path]:
        """The tar ``number`` and its index."""
        stem = self.path / f"{self.prefix}{number:06d}"
        return stem.with_suffix(".tar"), stem.with_suffix(".json")

    def write(self, result: Result) -> None:
        """Write one result, and before it its thumbnail, to be packed later."""
        write_thumbnail(self.unpacked, result.task.name, result.image)
        result.write(self.unpacked)

    def close(self, number: int, part: Sequence[Task], rejects: Sequence[Reject]) -> None:
        """Pack the results of a part, all of which but the rejects' are there, unless its tar is there already."""
        if self._is_closed(number):
            return
        tasks = [task for task in part if is_whole(self.unpacked / task.name)]
        tar, index = self._files(number)
        cards = [card_of(self.unpacked, task.name) for task in tasks]
        for first in range(0, len(cards), SHEET):
            self._write_sheet(f"{tar.stem}_{first // SHEET:02d}.png", cards[first : first + SHEET])
        if tasks:
            self._write_tar(tar, tasks)
        made = summary_of([self.unpacked / task.name for task in tasks], rejects)
        write_json(index, {"bytes": tar.stat().st_size if tasks else 0, **made.as_json(), "samples": cards})
        shutil.rmtree(self.unpacked, ignore_errors=True)  # which holds nothing else

    def _write_sheet(self, name: str, cards: Sequence[dict[str, Any]]) -> None:
        """Write the thumbnails of ``cards`` below each other as one image, and enter it in the cards."""
        thumbnails = [Image.open(self.unpacked / card["source"]).convert("RGB") for card in cards]
        sheet = files_folder(self.path / "report.html") / name
        write_png(sheet, np.concatenate([np.asarray(each) for each in thumbnails]))
        for row, card in enumerate(cards):
            card |= {"source": f"{sheet.parent.name}/{name}", "top": row * TILE}

    def _write_tar(self, tar: Path, tasks: Sequence[Task]) -> None:
        """Write the sample folders of ``tasks`` into ``tar``, the same bytes whenever and by whomever it is done."""
        with atomic_file(tar) as handle, tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for task in tasks:
                for file in sorted((self.unpacked / task.name).iterdir()):
                    member = tarfile.TarInfo(f"{key_of(task.name)}.{file.name}")
                    member.size = file.stat().st_size
                    with file.open("rb") as content:
                        archive.addfile(member, content)

    def count(self, tasks: Sequence[Task]) -> int:
        """How many results the finished tars of ``tasks`` hold."""
        return self.summary(tasks, ()).pictures

    def summary(self, tasks: Sequence[Task], rejects: Sequence[Reject]) -> Summary:
        """What the tars of ``tasks`` hold; ``rejects``: those that are in no index."""
        indexes = [self._files(number)[1] for number in range(len(self.parts(tasks))) if self._is_closed(number)]
        plain = (Reject(each.sample_id, each.file, each.reason) for each in rejects)  # as the indexes have them
        found = Summary(rejects=list(dict.fromkeys(plain)))
        for index in indexes:
            found = found.plus(Summary.from_json(read_json(index)))
        return found

    def write_report(self) -> Path:
        """Write the report of all tars in the folder; returns its first page."""
        shutil.rmtree(self.path / UNPACKED, ignore_errors=True)  # all is packed: shares, and killed runs, leave it
        indexes = sorted(index for pattern in INDEXES for index in self.path.glob(pattern))
        total = sum(read_json(index)["pictures"] for index in indexes)
        cards = chain.from_iterable(read_json(index)["samples"] for index in indexes)
        pages = iter(lambda: list(islice(cards, PAGE)), [])
        sheets = {f"{index.stem}_{k:02d}" for index in indexes for k in range(math.ceil(SIZE / SHEET))}
        return write_pages(self.path, total, pages, sheets)


def key_of(name: str) -> str:
    """A result's name as the key of a tar's members, whose last part may hold no dot."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.replace('%', '%25').replace('.', '%2E')}"
