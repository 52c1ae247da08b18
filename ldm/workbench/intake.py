"""What programs send: images and masks, bounded, and their turn; and what is said about them, to them alone.

Files are kept under names of ours in a folder that is deleted afterwards: no path and no name of a caller reaches the
disk. What a file is follows from its content.
"""

import gzip
import logging
import math
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import FormData, UploadFile

from ldm.core.errors import FileError, UsageError, first_line
from ldm.core.tables import counted
from ldm.data.images import header_shapes
from ldm.inference.single import slice_name
from ldm.volumes.volume import require_extra
from ldm.workbench.server import Rate

MOST_PIXELS = 2**24  # of an image, or of a slice of a volume
MOST_VOXELS = 2**27  # of a volume
MOST_STRETCH = 16  # the longest side of a voxel over its shortest one: pixels are made square
DEFLATED = "1.2.840.10008.1.2.1.99"  # DICOM's transfer syntax of which the whole file, of unknown size, is unpacked
MOST_FILES, MOST_FIELDS = 2, 16
WAITING = 8  # requests that may wait for their turn
QUIET = ("ldm.data", "ldm.inference", "ldm.networks", "ldm.volumes")  # what they say may name an image


class Upload(NamedTuple):
    """A file that was sent: where it lies now, what the caller calls it, and whether it is DICOM or NIfTI."""

    path: Path
    called: str
    is_volume: bool

    def sample_id(self, meta: Mapping[str, object]) -> str:
        """What ``dataset_infer.py`` calls it, or the slice of it that ``meta`` is about, after the caller's file."""
        if self.is_volume:
            return slice_name(Path(self.called), str(meta["plane"]), int(str(meta["slice"])))
        return Path(self.called).stem


async def read_form(request: Request) -> FormData:
    """The parts of a multipart request. UsageError for a request of another kind."""
    kind = request.headers.get("content-type", "nothing")
    if not kind.startswith("multipart/form-data"):
        raise UsageError(f"expected multipart/form-data, found {kind[:60]}; curl -F sends it")
    return await request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS)


def texts_and_files(form: FormData, *files: str) -> tuple[dict[str, str], dict[str, UploadFile]]:
    """The parts that are text, and those called as one of ``files``. UsageError for others, and for one sent twice."""
    texts: dict[str, str] = {}
    sent: dict[str, UploadFile] = {}
    for name, value in form.multi_items():
        if name in texts or name in sent:
            raise UsageError(f"{name[:40]}: is sent twice")
        if isinstance(value, UploadFile):
            sent[name] = value
        else:
            texts[name] = value
    for name in {*sent} - {*files}:
        raise UsageError(f"{name[:40]}: is a file; expected the files {' and '.join(files)}")
    for name in {*texts} & {*files}:
        raise UsageError(f"{name}: expected a file, found text; curl -F {name}=@FILE sends it")
    return texts, sent


def keep(sent: UploadFile, part: str, folder: Path) -> Upload:
    """Write a file that was sent into ``folder``, as ``part`` and a suffix after its content.

    UsageError or FileError for one that is larger, or would become larger, than what is taken.
    """
    called = PurePosixPath((sent.filename or "").replace("\\", "/")).name or part
    if not called.isprintable():
        raise UsageError(f"{part}: its file name holds signs that cannot be printed; rename the file")
    head = sent.file.read(1024)
    sent.file.seek(0)
    if not head:
        raise UsageError(f"{part}: the file is empty (0 bytes)")
    if head[128:132] == b"DICM":
        path = _written(sent.file, folder / f"{part}.dcm")
        _check_dicom(path)
    elif head[:2] == b"\x1f\x8b":
        path = _unpacked(sent.file, folder / f"{part}.nii")
        with path.open("rb") as file:
            head = file.read(1024)
        if not _is_nifti(head):
            raise UsageError(f"{part}: is packed with gzip, but holds no NIfTI")
        _check_nifti(path)
    elif _is_nifti(head):
        path = _written(sent.file, folder / f"{part}.nii")
        _check_nifti(path)
    else:
        path = _written(sent.file, folder / f"{part}.png")  # what image it is, if it is one, is seen when it is read
        for height, width in header_shapes(path):
            check_pixels(part, height, width)
        return Upload(path, called, False)
    return Upload(path, called, True)


def check_pixels(part: str, height: int, width: int) -> None:
    """UsageError for an image that is larger than what is taken."""
    if height * width > MOST_PIXELS:
        raise UsageError(f"{part}: has {width} x {height} pixels; at most {MOST_PIXELS} are taken")


def _is_nifti(head: bytes) -> bool:
    return head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2"


def _written(file: BinaryIO, path: Path) -> Path:
    with path.open("xb") as target:
        shutil.copyfileobj(file, target)
    return path


def _unpacked(file: BinaryIO, path: Path) -> Path:
    most, taken = 4 * MOST_VOXELS, 0
    try:
        with gzip.open(file) as packed, path.open("xb") as target:
            while block := packed.read(2**20):
                taken += len(block)
                if taken > most:
                    raise UsageError(f"{path.stem}: becomes larger than {most >> 20} MiB when it is unpacked")
                target.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(path, f"it cannot be read ({first_line(error)})") from error
    return path


def _check_dicom(path: Path) -> None:
    require_extra()
    import pydicom
    from pydicom.filereader import read_file_meta_info

    try:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax == DEFLATED:
            raise UsageError(
                f"{path.stem}: is DICOM with a deflated transfer syntax, of unknown size; save it uncompressed"
            )
        header = pydicom.dcmread(path, stop_before_pixels=True)
        rows, columns, frames = (int(header.get(name) or 1) for name in ("Rows", "Columns", "NumberOfFrames"))
        spacing = [float(length) for length in header.get("PixelSpacing") or []]
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise FileError(path, f"it cannot be read as DICOM ({first_line(error)})") from error
    check_pixels(path.stem, rows, columns)
    _check_grid(path.stem, (rows, columns, frames), spacing)


def _check_nifti(path: Path) -> None:
    require_extra()
    import nibabel

    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is one, too; CIFTI is none
            raise ValueError("it holds no volume")
        shape, zooms = image.header.get_data_shape(), image.header.get_zooms()[:3]
    except Exception as error:
        raise FileError(path, f"it cannot be read as NIfTI ({first_line(error)})") from error
    _check_grid(path.stem, shape, [float(length) for length in zooms])


def _check_grid(part: str, shape: tuple[int, ...], lengths: list[float]) -> None:
    """UsageError for a volume that is too large, or whose slices would be with square pixels."""
    if math.prod(map(int, shape)) > MOST_VOXELS:
        raise UsageError(f"{part}: has {' x '.join(map(str, shape))} voxels; at most {MOST_VOXELS} are taken")
    lengths = [abs(length) for length in lengths if length]
    if lengths and max(lengths) > MOST_STRETCH * min(lengths):
        found = f"{max(lengths):g} and {min(lengths):g} mm"
        raise UsageError(
            f"{part}: its voxels have sides of {found}; at most {MOST_STRETCH} times the shortest is taken"
        )


class Turns:
    """One drawing at a time: a few requests wait, and images are drawn at most at a certain rate. In any thread."""

    def __init__(self, per_minute: int, waiting: int = WAITING) -> None:
        self.per_minute, self.waiting = per_minute, waiting
        self._inside, self._rate = 0, Rate(per_minute)
        self._most = f"at most {counted(per_minute, 'image a minute is', 'images a minute are')} drawn"
        self._state, self._turn = threading.Lock(), threading.Lock()

    @contextmanager
    def taken(self, images: int) -> Iterator[None]:
        """Wait for the turn of a request of so many images. HTTPException 503 or 429, with when to ask again."""
        if images > self.per_minute:
            raise UsageError(f"n: {self._most}, {images} were asked for")
        with self._state:
            if self._inside > self.waiting:
                line = f"{counted(self.waiting, 'request is', 'requests are')} waiting already; ask again later"
                raise HTTPException(503, line, {"Retry-After": "5"})
            if wait := self._rate.wait(images):
                line = f"{self._most}; ask again in {wait} s"
                raise HTTPException(429, line, {"Retry-After": str(wait)})
            self._rate.add(images)
            self._inside += 1
        try:
            with self._turn:
                yield
        finally:
            with self._state:
                self._inside -= 1


class Warnings(logging.Handler):
    """Takes what QUIET loggers say away from the terminal; ``collected`` hands the thread's warnings on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said = threading.local()
        for name in QUIET:
            logger = logging.getLogger(name)
            logger.propagate = False
            logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """As every handler."""
        if not record.name.startswith("ldm.networks"):  # which warn of a prompt once only; it is looked at each time
            getattr(self._said, "texts", []).append(record.getMessage())

    @contextmanager
    def collected(self) -> Iterator[list[str]]:
        """The warnings of the block, which come while it runs."""
        texts: list[str] = []
        self._said.texts = texts
        try:
            yield texts
        finally:
            self._said.texts = []

    def detach(self) -> None:
        """Let the loggers speak again."""
        for name in QUIET:
            logger = logging.getLogger(name)
            logger.propagate = True
            logger.removeHandler(self)
