"""Shares: several commands that inpaint one part each of the same plan into one folder. No torch.

Each share holds a lock of its own while it works and keeps a record, ``shares/K-of-N.json``. What belongs to all of
them, the folder's record above all, is written under the folder's lock, which a share holds for moments only: when it
begins, and when it ends. The share that ends last merges what all have recorded.
"""

import argparse
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import read_json, write_json
from ldm.core.locks import exclusive
from ldm.core.run_folder import RunFolder, differences
from ldm.core.tables import counted
from ldm.data.samples import Reject

T = TypeVar("T")
log = logging.getLogger(__name__)

RECORDS = "shares"  # the folder of the shares' records
# How a folder is filled, and what with; records do not name what is usual, or what was so in older versions.
KINDS = {"shares": 1, "format": "folder", "masks": "blob"}


@dataclass(frozen=True)
class Share:
    """Part ``number`` of ``count``, counted from 1."""

    number: int = 1
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether there are no other shares."""
        return self.count == 1

    @property
    def name(self) -> str:
        """As files are called, in the order of the shares: ``share-02-of-64``."""
        return f"share-{self.number:0{len(str(self.count))}d}-of-{self.count}"

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This share's block of ``items``. The shares' blocks are all of them, and differ by one item at most."""
        first, last = (len(items) * number // self.count for number in (self.number - 1, self.number))
        return items[first:last]

    def __str__(self) -> str:
        return f"share {self.number}/{self.count}"


def read_share(text: str) -> Share:
    """``K/N`` from the command line."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    share = Share(*map(int, found.groups())) if found else None
    if share is None or not 1 <= share.number <= share.count:
        raise argparse.ArgumentTypeError(f"expected K/N, such as 1/4, with K from 1 to N, found {text[:40]}")
    return share


@dataclass
class Summary:
    """What a share, or a whole run, has made."""

    pictures: int = 0
    changed_outside_pixels: int = 0
    seconds: float = 0.0
    rejects: list[Reject] = field(default_factory=list)
    masks: dict[str, int] = field(default_factory=dict)  # where they come from, and why they were not carried over
    clipped_pixels: int = 0  # of pasted lesions, beyond the levels that their image's file can hold
    check: dict[str, int] = field(default_factory=dict)  # see ``ldm.inference.results.count_checks``

    def plus(self, other: "Summary") -> "Summary":
        """Both together; a reject that both have counts once."""
        rejects = list(dict.fromkeys([*self.rejects, *other.rejects]))
        changed = self.changed_outside_pixels + other.changed_outside_pixels
        clipped, seconds = self.clipped_pixels + other.clipped_pixels, round(self.seconds + other.seconds, 1)
        masks, check = (
            dict(Counter(a) + Counter(b)) for a, b in ((self.masks, other.masks), (self.check, other.check))
        )
        return Summary(self.pictures + other.pictures, changed, seconds, rejects, masks, clipped, check)

    def as_json(self) -> dict[str, Any]:
        """For a share's record."""
        rejects = [asdict(reject) | {"file": str(reject.file)} for reject in self.rejects]
        found = asdict(self) | {"rejected": len(rejects), "rejects": rejects}
        return {key: each for key, each in found.items() if each or key not in ("clipped_pixels", "check")}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Summary":
        """What ``as_json`` has written."""
        rejects = [Reject(each["sample_id"], Path(each["file"]), each["reason"]) for each in record["rejects"]]
        numbers = record["pictures"], record["changed_outside_pixels"], record["seconds"]
        more = record.get("masks") or {}, record.get("clipped_pixels", 0), record.get("check") or {}
        return Summary(*numbers, rejects, *more)


class SharedRun:
    """The folder of a run, and one share's part in it; the only share has the whole folder for itself."""

    def __init__(self, folder: RunFolder, share: Share) -> None:
        self.folder, self.share = folder, share
        self.settings: dict[str, Any] = {}
        self.images, self.overwrite = "", False
        self.same_run = False  # whether what this share has made so far is this run's; set by open()

    @property
    def is_shared(self) -> bool:
        """Whether other shares belong to the run."""
        return not self.share.alone

    def __str__(self) -> str:
        return f"{self.folder.path}, {self.share}" if self.is_shared else str(self.folder.path)

    def lock(self, first: bool = True) -> Any:
        """Keep out, for the block, other commands that want the same folder or the same share; see ``RunFolder``."""
        return self.folder.lock(first=first, part="" if self.share.alone else self.share.name)

    def open(self, settings: Mapping[str, Any], images: str, overwrite: bool) -> dict[str, Any] | None:
        """The record of this share, or of the only run, if the folder holds one of the same run. Changes no file.

        ``settings`` decide the results of all shares, and name their number as ``shares`` if there are several;
        ``images`` is the digest of this share's inputs. UsageError for another run's folder, one of another number of
        shares or another format, unless ``overwrite`` lets ``claim`` delete it.
        """
        self.settings, self.images, self.overwrite = dict(settings), images, overwrite
        self._refuse_another_kind()
        before = self.folder.open(settings, overwrite)
        self.same_run = self.folder.same_run
        if not self.is_shared or before is None:
            return before
        record = self._record(self.share)
        if record and record["images"] != images:
            raise UsageError(
                f"{self.folder.path}: {self.share} was begun with other images or prompts "
                f"(images: {record['images'][:8]} -> {images[:8]}); put these back, give another --output_dir, or "
                "delete this one and run all shares again: --overwrite replaces whole runs only"
            )
        return record

    def _refuse_another_kind(self) -> None:
        """UsageError, with the flags that go on with it, for other shares, another format or other masks."""
        stored = self.folder.read_record(self.overwrite)
        if not stored or self.overwrite or not self.folder.holds_work():
            return
        before = stored.get("settings") or {}
        pairs = {key: (before.get(key, usual), self.settings.get(key, usual)) for key, usual in KINDS.items()}
        shares, form, masks = (old for old, _ in pairs.values())
        cures = {
            "shares": f"--share K/{shares}" if shares > 1 else "no --share",
            "format": f"--format {form}",
            "masks": f"--masks {masks}",
        }
        differ = [key for key, (old, new) in pairs.items() if old != new]
        others = {key: value for key, value in self.settings.items() if key not in KINDS}
        if "masks" in differ and differences(before, json.loads(json.dumps(others, default=str))):
            differ.remove("masks")  # it would not be enough; what else differs is said where the folder is opened
        if differ:
            named = ", ".join(f"{key}: {pairs[key][0]} -> {pairs[key][1]}" for key in differ)
            raise UsageError(
                f"{self.folder.path}: holds results of another run ({named}); give "
                f"{' and '.join(cures[key] for key in differ)} to go on with it, else another --output_dir, or "
                "--overwrite to replace them"
            )

    def claim(self, command: str) -> None:
        """Make the folder this run's and this share's record incomplete, until ``finished``."""
        if not self.is_shared:
            self._refuse_running_shares()
            self.folder.claim(command=command)
            return
        with self.folder.lock(wait=True):
            self.open(self.settings, self.images, self.overwrite)  # another share may have begun in the meantime
            self._refuse_running_shares()
            self.folder.claim(sweep=not self.same_run, command=command)
            write_json(self._file(self.share), {"images": self.images, "complete": False})

    def _refuse_running_shares(self) -> None:
        """UsageError while shares of another run work in the folder, whose results are about to be deleted."""
        for file in [] if self.same_run else sorted((self.folder.path / RECORDS).glob("*-of-*.json")):
            share = Share(*map(int, re.findall(r"\d+", file.stem)[:2]))
            lock = self.folder.lock_path(share.name)
            if share != self.share and lock.exists() and not (self._record(share) or {}).get("complete"):
                with exclusive(lock, f"{self.folder.path}: {share} of another run is at work here; wait for it to end"):
                    pass

    @contextmanager
    def finished(self, summary: Summary) -> Iterator[Summary | None]:
        """Record what this share has made. The block gets what all have made, if none is missing, else None.

        The block is to publish it. A run that has been published already is not handed out again.
        """
        if not self.is_shared:
            yield summary
            return
        with self.folder.lock(wait=True):
            record = {"images": self.images, "complete": True, **summary.as_json()}
            write_json(self._file(self.share), record)
            missing = [share for share in self._shares() if not (self._record(share) or {}).get("complete")]
            if missing:
                made, of = counted(summary.pictures, "image"), counted(self.share.count, "share")
                text = "%s: %s; %d of %s unfinished, the first: %s; the last one writes the report"
                log.info(text, self, made, len(missing), of, missing[0])
            whole = None
            if not missing and not (self.folder.read_record() or {}).get("complete"):
                whole = Summary()
                for share in self._shares():
                    whole = whole.plus(Summary.from_json(self._record(share) or {}))
                self.folder.sweep()  # nobody writes: every share is done
            yield whole

    def publish(self, whole: Summary, **about: Any) -> None:
        """Write the record of the whole run, with what is to be known ``about`` it, as its last file.

        Inside ``finished``.
        """
        values = whole.as_json()
        del values["rejects"]  # which have a file of their own
        self.folder.finish(**values, **about)

    def _shares(self) -> list[Share]:
        return [Share(number, self.share.count) for number in range(1, self.share.count + 1)]

    def _file(self, share: Share) -> Path:
        return self.folder.path / RECORDS / f"{share.number}-of-{share.count}.json"

    def _record(self, share: Share) -> dict[str, Any] | None:
        path = self._file(share)
        if not path.exists():
            return None
        record = read_json(path, "record of a share")
        if not isinstance(record, dict) or "images" not in record:
            raise MedSoftError(f"{path}: is no record of a share; delete it and run that share again")
        return record


def check_apart(results: Iterable[tuple[PurePath, str, Path]]) -> None:
    """MedSoftError for two results, each (folder, name, image that it is about), one of which would be lost.

    It would be written over the other, or into its folder.
    """
    seen: dict[PurePath, tuple[str, Path]] = {}
    for folder, name, image in results:
        if folder in seen:
            both = f"{seen[folder][1].parent} and {image.parent}"
            raise MedSoftError(f"{both}: both results would be written as {name}; keep one of them")
        seen[folder] = name, image
    for folder, (name, image) in seen.items():
        above = next((seen[each][0] for each in folder.parents if each in seen), None)
        if above:
            raise MedSoftError(f"{image}: its result {name} would lie in {above}; rename it")


def at_most(limit: int | None, items: Sequence[T], counts: Callable[[T], bool]) -> Sequence[T]:
    """The first of ``items``, of which ``limit`` count; all of them where they are fewer, or there is no limit."""
    if limit is not None:
        for number, item in enumerate(items, 1):
            limit -= counts(item)
            if not limit:
                return items[:number]
    return items
