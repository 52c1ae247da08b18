"""What the editor opens: images, sample folders, slices of volumes, and collections of them with next and previous."""

import dataclasses
import hashlib
import logging
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.core.errors import FileError, MedSoftError, UsageError, first_line
from ldm.core.files import fingerprint
from ldm.core.tables import counted, shortened
from ldm.data.annotations import read_annotations
from ldm.data.folders import read_meta, read_sample, sample_folders
from ldm.data.images import SUFFIXES, intensity_range_of, open_image, pixel_digest, read_image
from ldm.data.masks import TARGET_LABEL, Mask, read_anatomy, read_mask, region_for
from ldm.data.regions import STEMS
from ldm.data.samples import Sample
from ldm.inference.single import is_volume, one_sample, slice_image, slice_name, write_once
from ldm.volumes.volume import PLANES, Volume, count, cut, only_plane, require_extra
from ldm.workbench.drafts import document_id

log = logging.getLogger(__name__)

MOST_PASSED = 20  # documents of a collection that cannot be used, one after the other
KEPT, MOST_BYTES = 6, 2**28  # documents in memory, and their pixels; of the others only where they come from
LISTED = 200  # documents of a collection that are told at once
ANNOTATIONS = (".json", ".jsonl")


@dataclass(frozen=True, eq=False)
class Document:
    """An opened image. ``pixels`` as ``read_image`` gives them; ``digest``: of the file, or of a slice's pixels.

    ``sample``: its names, its meta.json and its files; of a slice the image's file is not there before ``stored``.
    ``volume``: of a slice, its plane, the planes there are, its index, and how many slices its plane has.
    """

    path: Path
    sample: Sample
    pixels: np.ndarray
    digest: str
    volume: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        """A name for it that another content, or a sample of another name, does not have."""
        return document_id(self.sample.sample_id, self.digest)

    @property
    def origin(self) -> dict[str, Any]:
        """Where it lies, for the history: ``Opened.reopen`` finds it again."""
        place = self.volume or {}
        path = str((self.path if self.volume else self.sample.image).absolute())
        return {
            "path": path,
            "sample_id": self.sample.sample_id,
            "plane": place.get("plane"),
            "slice": place.get("index"),
        }

    @cached_property
    def body(self) -> np.ndarray | None:
        """Where the vertebra is (bool HxW): label 1 of ``anatomy.png``, or what marks it in a healthy sample."""
        if self.sample.anatomy is not None:
            found = read_anatomy(self.sample.anatomy, self.pixels.shape) == TARGET_LABEL
            return found if found.any() else None
        return region_for(self.sample, self.pixels.shape) if self.sample.healthy else None

    @cached_property
    def mask(self) -> np.ndarray | None:
        """The lesion region (bool HxW) of a sample that has one."""
        if self.sample.healthy or self.sample.mask is None:
            return None
        found: Mask = read_mask(self.sample.mask, self.pixels.shape)
        return None if found.empty else found.hard

    @property
    def spacing(self) -> list[float] | None:
        """[mm between rows, mm between columns], if they are known."""
        given = self.sample.meta.get("spacing_mm")
        if given is None:
            return None
        both = given if isinstance(given, list) else [given]
        return [float(both[0]), float(both[-1])]

    def window(self) -> list[float] | None:
        """[low, high] in levels, in which an image of 16 bits is shown; None for 8 bits."""
        if self.pixels.dtype == np.uint8:
            return None
        return list(intensity_range_of(self.pixels, self.sample.meta.get("window")))

    def described(self) -> dict[str, Any]:
        """What the page is told of it."""
        sample, meta = self.sample, self.sample.meta
        height, width = self.pixels.shape[:2]
        return {
            "id": self.id,
            "name": sample.sample_id,
            "path": str(self.path),
            "width": width,
            "height": height,
            "channels": 1 if self.pixels.ndim == 2 else 3,
            "bits": 8 * self.pixels.dtype.itemsize,
            "window": self.window(),
            "range": [int(self.pixels.min()), int(self.pixels.max())],
            "unit": meta.get("unit"),
            "value_offset": meta.get("value_offset", 0),
            "value_scale": meta.get("value_scale", 1),
            "spacing_mm": self.spacing,
            "healthy": sample.healthy,
            "prompt": sample.prompt,
            "level": sample.level,
            "lesion_type": sample.lesion_type,
            "has_body": self.body is not None,
            "has_mask": self.mask is not None,
            "volume": self.volume,
        }

    def stored(self, folder: Path) -> Sample:
        """The sample, its image on the disk: a slice is written into ``folder`` once, where --replay finds it.

        MedSoftError where a file has changed since it was opened.
        """
        if self.volume is None:
            found = hashlib.sha256(open_image(self.sample.image).data).hexdigest()
            if found != self.digest:
                raise FileError(self.sample.image, "has changed since it was opened; open it again")
            return self.sample
        meta = self.sample.meta
        home = folder / f"{self.sample.sample_id}_{fingerprint([self.digest, meta])[:8]}"
        write_once(home, {"image.png": self.pixels}, "healthy", meta)
        return dataclasses.replace(self.sample, image=home.resolve() / "image.png")


def open_sample(sample: Sample, path: Path | None = None) -> Document:
    """A sample with its image read; FileError or MedSoftError for one that cannot be used."""
    opened = open_image(sample.image)
    pixels, digest = read_image(opened), hashlib.sha256(opened.data).hexdigest()
    made = Document(path or sample.image.parent, sample, pixels, digest)
    made.described()  # reads its masks, so that what is wrong with them is said now
    return made


def open_file(path: Path, sample_id: str | None = None) -> Document:
    """An image file, with the meta.json beside it; one that is the image of a sample folder as that sample."""
    if _is_sample_image(path):
        return open_folder(path.parent, sample_id)
    meta = read_meta(path.with_name("meta.json"))
    sample = one_sample(sample_id or path.stem, path.resolve(), path, "", meta)
    return open_sample(dataclasses.replace(sample, mask=None), path)


def open_folder(path: Path, sample_id: str | None = None) -> Document:
    """A sample folder."""
    return open_sample(read_sample(sample_id or path.resolve().name, path), path)


class Volumes:
    """Slices of volumes; the last volume stays in memory."""

    def __init__(self) -> None:
        self._last: tuple[Path, Volume] | None = None

    def open(self, path: Path, plane: str | None = None, index: int | None = None) -> Document:
        """A slice: by default a sagittal one, or one of the only plane there is, from the middle."""
        require_extra()
        from ldm.volumes.formats import read_volume

        if self._last is None or self._last[0] != path:
            try:
                self._last = path, read_volume(path)
            except MedSoftError as error:
                if not path.is_dir():
                    raise
                raise MedSoftError(f"{path}: holds no sample folder, and is no DICOM series ({error})") from error
        volume = self._last[1]
        only = only_plane(volume)
        planes = [only] if only else list(PLANES)
        chosen = plane or planes[0]
        if chosen not in planes:
            raise UsageError(f"{path}: has no plane {chosen}; expected one of {', '.join(planes)}")
        number = count(volume, chosen)
        place = number // 2 if index is None else index
        pixels, meta, _ = slice_image(volume, cut(volume, chosen, place))
        name, digest = slice_name(path, chosen, place), pixel_digest(pixels)
        sample = one_sample(name, path, path, "", meta)
        about = {"plane": chosen, "planes": planes, "index": place, "count": number}
        return Document(path, dataclasses.replace(sample, mask=None), pixels, digest, about)


class Collection(NamedTuple):
    """Documents one after the other: samples that are known, or folders that are read when they are opened."""

    name: str
    entries: Sequence[Sample | tuple[str, Path]]

    def open(self, index: int) -> Document:
        """The document with this number, from 0."""
        if not 0 <= index < len(self.entries):
            raise UsageError(f"{self.name}: has no image {index + 1} of {len(self.entries)}")
        entry = self.entries[index]
        return open_sample(entry) if isinstance(entry, Sample) else open_folder(entry[1], entry[0])

    def find(self, sample_id: str, image: Path) -> int | None:
        """The number of the document with this name and image file, if it is one of these."""
        for number, entry in enumerate(self.entries):
            if isinstance(entry, Sample):
                name, path = entry.sample_id, entry.image
            else:
                name, path = entry[0], entry[1] / image.name
            if name == sample_id and path.absolute() == image:
                return number
        return None

    def matching(self, words: str) -> tuple[int, list[dict[str, Any]]]:
        """How many documents have all these words in what is known of them, and the first LISTED of those.

        A word that is a level here (L2) means that level, any other one a part of a name or sentence. Of folders that
        are read when they are opened only the name is known.
        """
        asked = words.casefold().split()
        levels = {e.level.casefold() for e in self.entries if isinstance(e, Sample) and e.level} & set(asked)
        count = 0
        found: list[dict[str, Any]] = []
        for number, entry in enumerate(self.entries):
            known = _known(entry)
            level = str(known["level"] or "").casefold()
            text = " ".join(str(each) for each in known.values() if each).casefold()
            if all(word == level if word in levels else word in text for word in asked):
                count += 1
                if len(found) < LISTED:
                    found.append({"index": number} | known)
        return count, found


def _known(entry: Sample | tuple[str, Path]) -> dict[str, Any]:
    """What the list of a collection says of an entry."""
    if not isinstance(entry, Sample):
        return {"name": entry[0], "level": None, "about": None}
    about = "healthy" if entry.healthy else entry.prompt
    return {"name": entry.sample_id, "level": entry.level, "about": about}


def training_annotations(folder: Path) -> Path | None:
    """The training annotations that a plan has written into a folder, if they are there and only one file can be."""
    known = folder / "openimages_format_train.json"
    found = [known] if known.is_file() else sorted(folder.glob("*_train.json"))
    return found[0] if len(found) == 1 else None


def collection_of(path: Path) -> Collection | None:
    """The samples that a path holds: of an annotation file, a dataset folder, or the healthy ones of a plan's output.

    None for anything else: an image, a sample folder, a volume. MedSoftError for annotations that cannot be read.
    """
    if path.is_file():
        if path.suffix.lower() not in ANNOTATIONS:
            return None
        return Collection(path.name, _usable(path))
    if _holds_image(path):
        return None
    if listed := training_annotations(path):
        samples = _usable(listed)
        healthy = [sample for sample in samples if sample.healthy and not sample.synthetic]
        return Collection(path.resolve().name, healthy or samples)
    folders, _ = sample_folders(path)
    return Collection(path.resolve().name, folders) if folders else None


def _usable(path: Path) -> list[Sample]:
    """The samples of an annotation file whose files are there; MedSoftError where there is none, else a warning."""
    samples, rejects = read_annotations(path)
    if rejects:
        number = f"{len(rejects)} of {counted(len(samples) + len(rejects), 'sample')}"
        line = f"{path}: {number} cannot be opened; the first: {rejects[0]}"
        if not samples:
            raise MedSoftError(line)
        log.warning("warning: %s", line)
    return samples


def _check_kind(path: Path) -> None:
    """UsageError unless a file or a folder is there; what else there may be has no end, or never begins."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError as error:
        raise UsageError(f"{path}: does not exist") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{shortened(str(path), 200)}: cannot be opened ({first_line(error)})") from error
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise UsageError(f"{path}: is neither a file nor a folder")


def _is_sample_image(path: Path) -> bool:
    """Whether a file is the image of a sample folder."""
    return path.stem.lower() == STEMS[0] and (path.parent / "prompt.txt").is_file()


def _holds_image(folder: Path) -> bool:
    """Whether a folder is itself a sample's."""
    return any((folder / f"{STEMS[0]}{suffix}").is_file() for suffix in SUFFIXES)


def _size(document: Document) -> int:
    return document.pixels.nbytes


@dataclass(frozen=True)
class Place:
    """Where a document comes from: how it is opened again, and which one of a collection it is, if of any.

    ``passed``: what was said of documents before it that cannot be used.
    """

    opener: Callable[[], Document]
    collection: Collection | None = None
    index: int = 0
    passed: tuple[str, ...] = ()


class Opened:
    """The documents that are open, by id, and the collections they come from. In any thread."""

    def __init__(self) -> None:
        self.current: str | None = None
        self._volumes = Volumes()
        self._places: dict[str, Place] = {}
        self._kept: OrderedDict[str, Document] = OrderedDict()
        self._lock = threading.RLock()

    def open(self, path: Path, plane: str | None = None, index: int | None = None) -> Document:
        """Open what lies at a path; of a collection the first document."""
        _check_kind(path)
        collection = collection_of(path)  # which may take long: others go on meanwhile
        with self._lock:
            if collection is not None:
                return self._show_usable(collection, 0, 1)
            if path.is_dir() and _holds_image(path):
                return self._show(Place(lambda: open_folder(path)))
            if is_volume(path):
                return self._show(Place(lambda: self._volumes.open(path, plane, index)))
            if plane is not None or index is not None:
                raise UsageError(f"{path}: is an image; a plane and a slice are chosen of a volume")
            return self._show(Place(lambda: open_file(path)))

    def go(self, index: int, beside: str | None = None) -> Document:
        """Open the document with this number of the collection of another one, by default of the current one."""
        with self._lock:
            collection, before = self.collection(beside or self.current)
            if collection is None:
                raise UsageError("what is open is one image; open a folder or an annotation file to go on to another")
            return self._show_usable(collection, index, 1 if index >= before else -1)

    def collection(self, name: str | None) -> tuple[Collection | None, int]:
        """The collection that a document is of, and its number in it."""
        place = self._places.get(name or "")
        return (place.collection, place.index) if place else (None, 0)

    def passed(self, name: str | None) -> list[str]:
        """What is wrong with the documents that were passed over on the way to this one."""
        return list(self._places[name].passed) if name in self._places else []

    def get(self, name: str) -> Document | None:
        """The document with this id, read again if it is no longer in memory; None for one that is not known.

        MedSoftError for one whose content has changed since.
        """
        with self._lock:
            if name in self._kept:
                return self._keep(self._kept[name])
            if name not in self._places:
                return None
            document = self._places[name].opener()
            if document.id != name:
                raise MedSoftError(f"{document.path}: has changed since it was opened; open it again")
            return self._keep(document)

    def reopen(self, name: str, origin: Mapping[str, Any]) -> Document:
        """The document with this id, from where its ``origin`` says it was. MedSoftError where it is gone.

        If it is one of the collection that is open, it is so again.
        """
        path, sample_id = Path(origin["path"]), origin["sample_id"]

        def opener() -> Document:
            if origin["plane"] is not None:
                return self._volumes.open(path, origin["plane"], origin["slice"])
            return open_file(path, sample_id)

        with self._lock:
            collection, _ = self.collection(self.current)
            index = collection.find(sample_id, path) if collection else None
            self._places[name] = Place(opener) if index is None else Place(opener, collection, index)
            found = self.get(name)
        assert found is not None  # its place is known
        return found

    def _show_usable(self, collection: Collection, index: int, step: int) -> Document:
        """Show the document with this number or, where that cannot be used, the next one that can."""
        passed: list[str] = []
        while True:
            try:
                return self._show(Place(partial(collection.open, index), collection, index, tuple(passed)))
            except UsageError:
                raise
            except MedSoftError as error:
                index += step
                if len(passed) == MOST_PASSED or not 0 <= index < len(collection.entries):
                    raise
                passed.append(str(error))
                log.warning("warning: passed over: %s", error)

    def _show(self, place: Place) -> Document:
        document = self._keep(place.opener())
        self.current, self._places[document.id] = document.id, place
        return document

    def _keep(self, document: Document) -> Document:
        self._kept[document.id] = document
        self._kept.move_to_end(document.id)
        while len(self._kept) > 1 and (len(self._kept) > KEPT or sum(map(_size, self._kept.values())) > MOST_BYTES):
            self._kept.popitem(last=False)
        return document
