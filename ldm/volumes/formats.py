"""Any file or folder that holds one volume: DICOM, NIfTI, NRRD or MetaImage (MHA, MHD), told apart by content.

All become LPS: NIfTI is RAS; NRRD names its space; MetaImage is LPS, whatever its AnatomicalOrientation says, as ITK
reads it. A NIfTI or NRRD file that does not say where left and head are is refused.
"""

import gzip
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np

from ldm.core.errors import FileError, first_line, reading_fault
from ldm.core.tables import counted
from ldm.volumes.dicom import find_series, only_series, promises_dicom, read_series
from ldm.volumes.metaimage import read_metaimage
from ldm.volumes.volume import Volume, to_integers

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACES = {  # NRRD's names of spaces, and the signs that make them LPS
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes of metre, millimetre and micrometre, in mm
APART = 0.1  # voxels between the sform's and the qform's corners that are worth saying


def read_volume(path: Path) -> Volume:
    """The volume in a file, or in a DICOM folder with one series.

    Raises UsageError if several series are there, FileError or MedSoftError for whatever cannot be read as one volume
    of grey values.
    """
    form = format_of(path)
    if form == "dicom":
        found, rejects = find_series(path)
        if not found:
            raise rejects[0]
        return read_series(only_series(found, path))
    if form is None:
        raise FileError(path, "expected DICOM, NIfTI, NRRD or MetaImage (MHA), but its content is none of them")
    values, affine, more = {"nifti": _nifti, "nrrd": _nrrd, "metaimage": read_metaimage}[form](path)
    return _volume(path, values, affine, **more)


def format_of(path: Path) -> str | None:
    """dicom (any folder is taken for one), nifti, nrrd or metaimage, by the first bytes; None if none of them."""
    if path.is_dir():
        return "dicom"
    try:
        with path.open("rb") as file:
            head = file.read(1024)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                head = file.read(1024)
    except FileNotFoundError:
        raise FileError(path, "it does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(path, f"it cannot be read ({first_line(error)})") from error
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2"):
        return "nifti"
    if head[:7] == b"NRRD000":
        return "nrrd"
    if head.lstrip()[:10] in (b"ObjectType", b"NDims = 3\n") or b"\nElementType" in head:
        return "metaimage"
    return "dicom" if promises_dicom(path) else None


def _volume(
    path: Path,
    raw: np.ndarray,
    affine: np.ndarray,
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
    notes: tuple[str, ...] = (),
    windows: tuple[tuple[float, float], ...] = (),
) -> Volume:
    """A volume of stored values as the file has them; real ones become integers."""
    if raw.size == 0 or raw.ndim != 3:
        raise FileError(path, f"it is {' x '.join(map(str, raw.shape))} voxels; expected three dimensions")
    rounded = False
    if raw.dtype.kind == "f":
        finite = np.isfinite(raw)
        if not finite.any():
            raise FileError(path, "it holds no finite number")
        if not finite.all():
            notes += (
                f"{counted((~finite).sum(), 'voxel holds', 'voxels hold')} no finite number: the lowest value is given",
            )
            raw = np.where(finite, raw, raw[finite].min())
        values, offset, scale, rounded = to_integers(raw)
        intercept, slope = intercept + slope * offset, slope * scale
        notes += ("real values are rounded to 16 bits",) * rounded
    else:
        values = np.asarray(raw, raw.dtype.newbyteorder("="))
        if values.dtype.itemsize > 4 and abs(values).max() < 2**31:
            values = values.astype(np.int32)
    return Volume(
        values=values,
        affine=affine,
        offset=float(intercept),
        scale=float(slope),
        rounded=rounded,
        notes=notes,
        windows=windows,
        source={"key": str(path.absolute()), "paths": [str(path.absolute())]},
        name=str(path),
    )


def _nifti(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Stored values, affine (sform, else qform), and the rest. Analyze files have no orientation and are no NIfTI."""
    try:
        image: Any = nibabel.load(path)  # nibabel's annotations promise neither an array nor its scale
        header, stored = image.header, image.dataobj
        raw = np.array(stored.get_unscaled())
    except Exception as error:  # nibabel's own kinds, zlib's, NumPy's
        raise FileError(path, reading_fault(error, "it is no sound NIfTI file, it may be truncated")) from error
    if not isinstance(image, nibabel.Nifti1Pair):
        raise FileError(path, f"nibabel takes it for a {type(image).__name__}; expected a NIfTI image")
    if raw.dtype.kind not in "iuf":
        kind = "colour" if raw.dtype.names else str(raw.dtype)
        raise FileError(path, f"its voxels are of the kind {kind}; expected grey values")
    shape = raw.shape[:3] + (1,) * (3 - raw.ndim)
    if int(np.prod(raw.shape)) != int(np.prod(shape)):
        raise FileError(path, f"it holds {' x '.join(map(str, raw.shape))} voxels, several volumes; expected one")
    affine, notes = _nifti_affine(path, image, shape)
    low, high = (float(header[name]) for name in ("cal_min", "cal_max"))
    return (
        raw.reshape(shape, order="A"),
        affine,
        {
            "slope": stored.slope,
            "intercept": stored.inter,
            "notes": notes,
            "windows": ((low, high),) if np.isfinite([low, high]).all() and low < high else (),
        },
    )


def _nifti_affine(path: Path, image: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The sform, else the qform, as LPS in mm; and a note where they are two different ones."""
    forms = [image.get_sform(coded=True)]
    with suppress(ValueError):  # a quaternion longer than 1
        forms.append(image.get_qform(coded=True))
    known = [np.array(form, float) for form, code in forms if code]
    if not known:
        raise FileError(
            path, "neither sform nor qform says where left and head are; write one (3D Slicer does) or use the original"
        )
    if not np.isfinite(known).all():
        raise FileError(path, "its sform or qform holds what is no finite number")
    notes: tuple[str, ...] = ()
    if len(known) == 2:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
        apart = np.linalg.norm(((known[0] - known[1]) @ np.vstack([corners, np.ones(8)]))[:3], axis=0).max()
        if apart > APART * np.linalg.norm(known[0][:3, :3], axis=0).min():
            notes = (f"sform and qform disagree by up to {apart:.3g} mm: the sform is used",)
    affine = RAS_TO_LPS @ known[0]
    affine[:3] *= UNITS.get(int(image.header["xyzt_units"]) & 7, 1.0)
    return affine, notes


def _nrrd(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Stored values and affine; three axes in space, and others only if they have one entry."""
    try:
        raw, header = nrrd.read(str(path))
    except Exception as error:  # pynrrd's own kind, zlib's, NumPy's
        raise FileError(path, reading_fault(error, "it is no sound NRRD file, it may be truncated")) from error
    space, directions = str(header.get("space", "")).lower(), header.get("space directions")
    if space not in SPACES or directions is None:
        found = f"its space is {space or 'not given'}, its space directions are {'not ' * (directions is None)}given"
        raise FileError(path, f"{found}; expected both, and one of the spaces {', '.join(SPACES)}")
    if set(header.get("space units", ["mm"])) - {"mm", ""}:
        raise FileError(path, f"its space units are {header['space units']}; expected mm")
    vectors = [None if each is None or not np.isfinite(each).all() else np.array(each, float) for each in directions]
    other = [axis for axis, vector in enumerate(vectors) if vector is None]
    if any(raw.shape[axis] > 1 for axis in other) or raw.ndim - len(other) != 3:
        kinds = ", ".join(header.get("kinds", [])) or f"{raw.ndim} axes"
        raise FileError(path, f"it has {kinds}: several volumes, vectors or colours; expected one volume")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([vector for vector in vectors if vector is not None], axis=1)
    notes: tuple[str, ...] = ()
    if header.get("space origin") is None:
        notes = ("the file names no origin: its first voxel is taken to lie at 0, 0, 0 mm",)
    else:
        affine[:3, 3] = header["space origin"]
    return raw.squeeze(tuple(other)), np.diag([*SPACES[space], 1]) @ affine, {"notes": notes}
