"""Where features lie: shards, each with the features of some hundred items (or prompts) of one kind.

What is trusted: ``verified.json`` holds size and modification time of every shard whose checksum was right when it was
read last. While these two stay as they are it is not read again, so a start takes seconds; without the file every
byte of every shard is.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ldm.config import DataConfig
from ldm.core.devices import is_first_process
from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import read_json, remove_partials, write_json
from ldm.core.tables import counted
from ldm.core.threads import thread_pool
from ldm.features.names import FORMAT, FeatureNames, Item
from ldm.features.shards import fault_of, keys_of, read_row, write_shard

log = logging.getLogger(__name__)

VERIFIED = "verified.json"
SUFFIX = ".safetensors"
OLD_FOLDER = re.compile("[0-9a-f]{2}")  # where format 4 and older kept one file an item


class FeatureStore(FeatureNames):
    """Features of Items: of each the entries of ``ldm.training.dataset.Batch`` down to ``masked_latent``, as far as
    there are encoders for them; float32 on the CPU."""

    def __init__(
        self, folder: str | Path, data: DataConfig, encoders: Mapping[str, str], digests: Mapping[Path | None, str]
    ) -> None:
        super().__init__(folder, data, encoders, digests)
        self._places: dict[bytes, tuple[str, int]] = {}  # key -> shard, row
        self._indexed: set[str] = set()  # shards

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def load(self, item: Item) -> dict[str, Tensor]:
        """The item's features and its prompt's, copied from mapped pages. MedSoftError if they are gone or damaged."""
        keys = (*self.of_item(item).values(), *self.of_prompt(item.sample.prompt).values())
        found: dict[str, Tensor] = {}
        for key in keys:
            found.update(self._read(key, item.sample.sample_id))
        return found

    def empty_text(self) -> Tensor | None:
        """Text states of the empty prompt, (1, 77, D_text), without a text encoder None."""
        key = self.of_prompt("").get("text")
        return self._read(key, "the empty prompt")["text"][None] if key else None

    def _read(self, key: bytes, whose: str) -> dict[str, Tensor]:
        if key not in self:
            self.refresh()  # another process may have written it
        name, row = self._places.get(key, ("", 0))
        try:
            if not name:
                raise FileNotFoundError("no file there holds them")
            return read_row(self.folder / name, row)
        except (SafetensorError, OSError) as error:
            raise MedSoftError(
                f"{self.folder / name}: the cached features of {whose} are gone or damaged ({error}); run the "
                "same command again: it computes them anew and goes on"
            ) from error

    def refresh(self) -> list[Path]:
        """Use the shards that have not changed since they were verified; the others are returned."""
        names, verified = self._shards(), self._verified()
        same = [name for name in names if verified.get(name) == _size_and_time(self.folder / name)]
        if not self._indexed.issubset(same):
            self._places, self._indexed = {}, set()
        self._index(name for name in same if name not in self._indexed)
        return [self.folder / name for name in names if name not in self._indexed]

    def verify(self, shards: Iterable[Path]) -> None:
        """Read every byte of ``shards``, use those whose checksum is right, delete the others. Hold the lock."""
        shards = list(shards)
        with thread_pool() as pool:
            faults = dict(zip(shards, pool.map(fault_of, shards), strict=True))
        damaged = {file: fault for file, fault in faults.items() if fault}
        for file in damaged:
            try:
                file.unlink()
            except OSError as error:
                raise FileError(file, f"{damaged[file]}; could not be deleted ({error.strerror})") from error
        if damaged:
            file, fault = next(iter(damaged.items()))
            said = counted(len(damaged), "damaged file of features is", "damaged files of features are")
            log.warning("%s: %s; %s deleted, what is lost is computed again", file, fault, said)
        self._use([file.name for file in shards if file not in damaged])

    def write(self, kind: str, rows: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Add a shard of features of one kind by key. Hold the folder's lock. MedSoftError if the disk is full."""
        # Two shards of one name hold the same rows in the same order: who has read the one may go on with the other.
        keys = sorted(rows)
        name = f"{self._prefix(kind)}{sha256(b''.join(keys)).hexdigest()[:16]}{SUFFIX}"
        write_shard(self.folder / name, {key: rows[key] for key in keys})
        self._use([name])

    def clear_up(self) -> None:
        """Delete what a killed run left half-written, and name what only other versions read. Hold the lock."""
        remove_partials(self.folder)
        old = [path.name for path in self.folder.iterdir() if _of_other_version(path)]
        if old and is_first_process():
            one, many = f"file or folder in it ({min(old)}) holds", f"files or folders in it ({min(old)}, ...) hold"
            text = "%s: %s features of another version, which this one does not read; delete them to have their space"
            log.warning(text, self.folder, counted(len(old), one, many))

    def _use(self, names: list[str]) -> None:
        """Index shards that are known to be sound, and remember them in the file."""
        if not names:
            return
        there = set(os.listdir(self.folder))
        verified = {name: state for name, state in self._verified().items() if name in there}
        write_json(self.folder / VERIFIED, verified | {name: _size_and_time(self.folder / name) for name in names})
        self._index(names)

    def _index(self, names: Iterable[str]) -> None:
        names = list(names)
        with thread_pool() as pool:
            for name, keys in zip(names, pool.map(lambda name: keys_of(self.folder / name), names), strict=True):
                if keys is not None:
                    self._places.update({key: (name, row) for row, key in enumerate(keys)})
                    self._indexed.add(name)

    def _shards(self) -> list[str]:
        """Names of the shards of this store's kinds, encoders and preparation."""
        prefixes = tuple(self._prefix(kind) for kind in self.encoders)
        try:
            return sorted(name for name in os.listdir(self.folder) if name.startswith(prefixes))
        except FileNotFoundError:
            return []

    def _prefix(self, kind: str) -> str:
        return f"v{FORMAT}-{kind}-{self.group(kind)[:8]}-"

    def _verified(self) -> dict[str, list[int]]:
        try:
            found = read_json(self.folder / VERIFIED)
        except MedSoftError:  # none yet, or damaged: all shards are read again
            return {}
        return found if isinstance(found, dict) else {}


def _size_and_time(file: Path) -> list[int]:
    """Of a shard, in bytes and ns: a copy that keeps the time is the same one. [] for a file that is gone."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _of_other_version(path: Path) -> bool:
    shard = path.name.endswith(SUFFIX) and not path.name.startswith(f"v{FORMAT}-")
    return shard or (OLD_FOLDER.fullmatch(path.name) is not None and path.is_dir())
