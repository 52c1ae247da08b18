"""MetaImage (MHA, MHD with a raw file): the header and uncompressed or zlib-compressed voxels.

Format: https://itk.org/Wiki/ITK/MetaIO/Documentation. A row of TransformMatrix is the direction of one axis in LPS.
"""

import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.core.errors import FileError, first_line

TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
LONGEST = 100_000  # bytes of a header
FROM = ("RL", "AP", "IS")  # AnatomicalOrientation names the side that an axis comes from


def read_metaimage(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Stored values (I, J, K), the affine to LPS in mm, and notes. Every fault is a FileError."""
    try:
        with path.open("rb") as file:
            header = _header(path, file)
            affine, notes = _affine(path, header)
            data = _data(path, file, header)
    except (OSError, ValueError, zlib.error) as error:
        raise FileError(path, f"it is no sound MetaImage file ({first_line(error)})") from error
    return data, affine, {"notes": notes}


def _header(path: Path, file: BinaryIO) -> dict[str, str]:
    """Keys and values up to ElementDataFile, behind which the file stands."""
    header: dict[str, str] = {}
    while "ElementDataFile" not in header:
        line = file.readline(LONGEST)
        key, equals, value = line.decode("latin-1").partition("=")
        if not line or not equals or file.tell() > LONGEST:
            raise FileError(path, "its MetaImage header has no ElementDataFile; it is truncated, or no MetaImage")
        header[key.strip()] = value.strip()
    return header


def _first(header: dict[str, str], *names: str) -> list[float] | None:
    """The numbers of the first key that is there: MetaImage has several names for one thing."""
    return next(([float(part) for part in header[name].split()] for name in names if name in header), None)


def _affine(path: Path, header: dict[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if header.get("NDims") != "3":
        raise FileError(path, f"it has {header.get('NDims', 'no')} dimensions (NDims); expected 3")
    spacing = _first(header, "ElementSpacing", "ElementSize")
    if spacing is None:
        raise FileError(path, "it has no ElementSpacing; expected the distances between voxels in mm")
    matrix = _first(header, "TransformMatrix", "Rotation", "Orientation")
    if matrix is None:
        notes += ("the file has no TransformMatrix: its axes are taken to run to left, posterior and head",)
    rows = np.array(matrix or np.eye(3)).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = rows.T * np.array(spacing).reshape(3)
    affine[:3, 3] = np.array(_first(header, "Offset", "Position", "Origin") or np.zeros(3)).reshape(3)
    axes = np.abs(rows).argmax(axis=1)
    letters = "".join(FROM[axis][int(row[axis] < 0)] for row, axis in zip(rows, axes, strict=True))
    named = header.get("AnatomicalOrientation", "???")
    if "?" not in named and named != letters:
        notes += (f"AnatomicalOrientation is {named}, the TransformMatrix is {letters}: the matrix is used",)
    return affine, notes


def _data(path: Path, file: BinaryIO, header: dict[str, str]) -> np.ndarray:
    shape = [int(part) for part in header.get("DimSize", "").split()]
    kind = TYPES.get(header.get("ElementType", ""))
    if kind is None or len(shape) != 3 or int(header.get("ElementNumberOfChannels", 1)) != 1:
        raise FileError(
            path,
            f"ElementType {header.get('ElementType')}, DimSize {header.get('DimSize')}, ElementNumberOfChannels "
            f"{header.get('ElementNumberOfChannels', 1)}; expected three sizes and one number a voxel",
        )
    big = "true" in (header.get(name, "").lower() for name in ("ElementByteOrderMSB", "BinaryDataByteOrderMSB"))
    dtype = np.dtype(kind).newbyteorder(">" if big else "<")
    size = dtype.itemsize * int(np.prod(shape))
    name = header["ElementDataFile"]
    if name.upper() == "LOCAL":
        data = file.read()
    else:
        if Path(name).name != name or "%" in name or name.startswith("LIST"):
            raise FileError(path, f"ElementDataFile is {name}; expected LOCAL or one file beside it")
        data = (path.parent / name).read_bytes()
    if header.get("CompressedData", "").lower() == "true":
        decompressor = zlib.decompressobj(wbits=47)  # zlib or gzip
        data = decompressor.decompress(data, size + 1)
    elif (skip := int(header.get("HeaderSize", 0))) and name.upper() != "LOCAL":
        data = data[len(data) - size if skip < 0 else skip :]
    if len(data) < size:
        raise FileError(path, f"it is truncated: {len(data)} bytes of voxels, its header says {size}; copy it again")
    return np.frombuffer(data, dtype, count=int(np.prod(shape))).reshape(shape, order="F")
