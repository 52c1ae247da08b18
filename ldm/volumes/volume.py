"""Volumes: stored values on a grid in the patient, the slices cut from them, and labels brought onto their grid.

Coordinates are DICOM's: x grows to the patient's left, y to posterior, z to the head (LPS), in mm. Nothing here reads
a file or needs more than NumPy, SciPy and Pillow; ``ldm.volumes.dicom`` and ``ldm.volumes.formats`` make the volumes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import permutations, product
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ldm.core.errors import MedSoftError, UsageError

PLANES = ("sagittal", "coronal", "axial")  # the normals of which are the patient's axes x, y and z
PROJECTION = "projection"
READERS = ("pydicom", "highdicom", "nibabel", "gdcm", "openjpeg", "nrrd")  # the modules of the extra `dicom`
SAME = 1e-3  # lengths that differ less, relatively, are one
SAME_GRID = 0.1  # voxels by which the corners of one grid may lie beside those of another
SHEAR = 5e-3  # cosine between two axes of a grid, 0.3 degrees: more is a gantry tilt or a sheared matrix


def require_extra() -> None:
    """UsageError with the line that installs the readers of DICOM and NIfTI, where one of them is missing."""
    missing = [name for name in READERS if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the packages that read and write DICOM and NIfTI are not installed (missing: {', '.join(missing)}): "
            "in the repository's folder run python -m pip install -e '.[dicom]'"
        )


@dataclass(frozen=True, eq=False)
class Volume:
    """A grid of stored values and where it lies in the patient. The real value is ``offset + scale * value``.

    ``affine`` takes a voxel index (i, j, k, 1) to LPS in mm; a voxel's coordinates are those of its centre. As read,
    i counts columns, j rows and k frames. MedSoftError where the axes are no right-angled grid.
    """

    values: np.ndarray  # (I, J, K), integers; for MONOCHROME1 as stored, too
    affine: np.ndarray  # (4, 4)
    offset: float = 0.0
    scale: float = 1.0
    low_is_white: bool = False  # MONOCHROME1
    modality: str | None = None
    unit: str | None = None  # "HU"
    windows: tuple[tuple[float, float], ...] = ()  # (low, high) that the file names, in real values
    acquired: str | None = None  # the plane whose slices are stored frames, for oblique ones the closest; "projection"
    calibrated: bool = True  # False: the lengths in mm are unknown, and the affine counts pixels
    rounded: bool = False  # the stored values are real ones rounded to 16 bits
    notes: tuple[str, ...] = ()  # what a person should know of how it was read; nothing that identifies
    header: Mapping[str, Any] = field(default_factory=dict)  # a white list: manufacturer, model, kvp, ...
    source: Mapping[str, Any] = field(default_factory=dict)  # PRIVATE: paths and UIDs; sop_uids: one a stored frame
    name: str = ""  # how messages name it
    stored: tuple[tuple[int, bool], ...] = ((0, False), (1, False), (2, False))
    """For each axis of ``values``: which stored axis it is (0 column, 1 row, 2 frame), and whether it is reversed."""

    def __post_init__(self) -> None:
        axes = np.asarray(self.affine, float)[:3, :3]
        lengths = np.linalg.norm(axes, axis=0)
        if not np.isfinite(self.affine).all() or not (lengths > 0).all():
            raise MedSoftError(
                f"{self.name}: the distance between voxels is {_mm(lengths)} mm; expected three lengths above 0"
            )
        cosines = np.abs((axes / lengths).T @ (axes / lengths) - np.eye(3))
        if cosines.max() > SHEAR:
            angle = np.degrees(np.arcsin(min(1.0, cosines.max())))
            raise MedSoftError(
                f"{self.name}: its axes are {angle:.1f} degrees off right angles (a gantry tilt, or a sheared matrix); "
                "resample it onto a right-angled grid first"
            )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distances between voxel centres along the three axes of ``values``, in mm."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice as it is looked at: head up, the patient's right at the left, in sagittal slices anterior at the left.

    ``turn`` (transpose, flip rows, flip columns; in this order) leads from the stored frame to ``pixels``.
    """

    pixels: np.ndarray  # (H, W)
    spacing: tuple[float, float] | None  # mm between rows, between columns; None if unknown
    plane: str
    index: int  # along the plane's normal: from right to left, anterior to posterior, feet to head
    affine: np.ndarray  # (row, column, 0, 1) -> LPS in mm
    acquired: bool  # the pixels are one stored frame, turned at most
    frame: int | None = None  # which one, if acquired: an index into the volume's source["sop_uids"]
    turn: tuple[bool, bool, bool] = (False, False, False)


def frame_plane(affine: np.ndarray) -> str:
    """The plane that the frames (third axis) of a grid are closest to."""
    return PLANES[_order(affine).index(2)]


def tilt(volume: Volume) -> float:
    """The largest angle between an axis of the grid and the patient's axis closest to it, in degrees."""
    axes = np.abs(volume.affine[:3, :3] / np.array(volume.spacing))
    closest = min(axes[row, column] for row, column in enumerate(_order(volume.affine)))
    return float(np.degrees(np.arccos(min(1.0, closest))))


def orient(volume: Volume) -> Volume:
    """The same voxels with axes that run to the patient's left, to posterior and to the head.

    The closest permutation and flips: values are a view, nothing is resampled.
    """
    order = _order(volume.affine)
    flips = [bool(volume.affine[row, column] < 0) for row, column in enumerate(order)]
    values = volume.values.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    affine = np.array(volume.affine, float)
    affine[:3, :3] = affine[:3, order]
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
            affine[:3, axis] *= -1
    stored = [volume.stored[column] for column in order]
    turned = tuple((axis, reverse ^ flip) for (axis, reverse), flip in zip(stored, flips, strict=True))
    return replace(volume, values=values, affine=affine, stored=turned)


def count(volume: Volume, plane: str) -> int:
    """How many slices ``cut`` can give in this plane."""
    return int(volume.values.shape[_order(volume.affine)[_normal(volume, plane)]])


def only_plane(volume: Volume) -> str | None:
    """The plane of an image that is one slice; None for a volume."""
    if volume.acquired == PROJECTION:
        return PROJECTION
    return next((plane for plane in PLANES if count(volume, plane) == 1), None)


def cut(volume: Volume, plane: str, index: int) -> Slice:
    """Slice ``index`` of the plane (see ``Slice`` for how it is counted and turned). Of a projection: 0."""
    axis = _normal(volume, plane)
    number = count(volume, plane)
    if not 0 <= index < number:
        raise MedSoftError(f"{volume.name}: slice {index} of {number} {plane} slices; expected 0 to {number - 1}")
    volume = orient(volume)
    rows, columns = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
    upward = rows == 2  # the first row is the one nearest to the head
    pixels = np.moveaxis(volume.values, (rows, columns), (0, 1))[..., index]
    affine = np.array(volume.affine)
    affine[:3, 3] += affine[:3, axis] * index
    if upward:
        affine[:3, 3] += affine[:3, rows] * (pixels.shape[0] - 1)
        affine[:3, rows] *= -1
    affine = affine[:, [rows, columns, axis, 3]]
    stored_axis, reverse = volume.stored[axis]
    acquired = volume.acquired is not None and stored_axis == 2
    row_axis, rows_reversed = volume.stored[rows]
    return Slice(
        pixels=np.ascontiguousarray(pixels[::-1] if upward else pixels),
        spacing=(volume.spacing[rows], volume.spacing[columns]) if volume.calibrated else None,
        plane=plane,
        index=index,
        affine=affine,
        acquired=acquired,
        frame=(number - 1 - index if reverse else index) if acquired else None,
        turn=(row_axis == 0, rows_reversed ^ upward, volume.stored[columns][1]) if acquired else (False,) * 3,
    )


def onto(labels: Volume, grid: Volume) -> tuple[np.ndarray, bool]:
    """The stored values of ``labels`` at the voxels of ``grid``, in its shape and order; 0 outside of ``labels``.

    Nearest neighbour; True beside them if the voxels of the two do not coincide (a permuted, flipped, cropped or
    longer grid does). MedSoftError if the two do not overlap in space.
    """
    index = np.linalg.inv(labels.affine) @ grid.affine  # a voxel of the grid -> a voxel of the labels
    corners = np.array([[*corner, 1] for corner in product(*[(0, n - 1) for n in grid.values.shape])], float)
    leading = np.argmax(np.abs(index[:3, :3]), axis=1)
    along = np.zeros((4, 4))
    along[range(3), leading], along[3] = index[range(3), leading], (0, 0, 0, 1)
    along[:3, 3] = index[:3, 3] + (index - along)[:3, :3] @ ((np.array(grid.values.shape) - 1) / 2)
    if len(set(leading)) < 3 or np.abs((index - along) @ corners.T).max() > SAME_GRID:
        return _turned_onto(labels, grid, index), True
    parts, inside = [], []
    for axis, column in enumerate(leading):
        nearest = np.rint(along[axis, column] * np.arange(grid.values.shape[column]) + along[axis, 3]).astype(int)
        inside.append((nearest >= 0) & (nearest < labels.values.shape[axis]))
        parts.append(nearest[inside[-1]])
    if not all(map(len, parts)):
        raise _no_overlap(labels, grid)
    order = np.argsort(leading)  # axis of the labels for each axis of the grid
    result = np.zeros(grid.values.shape, labels.values.dtype)
    result[np.ix_(*[inside[axis] for axis in order])] = labels.values[np.ix_(*parts)].transpose(order)
    return result, bool(np.abs((index - np.rint(index)) @ corners.T).max() > SAME_GRID)


def square(slice_: Slice, mm_per_pixel: float | None = None, *, nearest: bool = False) -> Slice:
    """The slice with square pixels of ``mm_per_pixel`` mm, by default of the smaller of its two spacings.

    Linear where pixels become smaller, averaged over the area where they become larger, rounded to the pixels' integer
    type; ``nearest`` for labels. Positions in the patient are kept: the new pixels cover the old ones' area, less the
    fraction of a pixel that is left over at the border. A slice that is so already is returned as it is, and so is one
    of unknown spacing, for which ``mm_per_pixel`` is a MedSoftError.
    """
    if slice_.spacing is None:
        if mm_per_pixel is not None:
            raise MedSoftError("the image does not say how many mm a pixel is: no scale in mm is possible")
        return slice_
    size = mm_per_pixel or min(slice_.spacing)
    if all(abs(length / size - 1) < SAME for length in slice_.spacing):
        return slice_
    steps = [size / length for length in slice_.spacing]  # old pixels to a new one
    shape = [max(1, int(n / step + SAME)) for n, step in zip(slice_.pixels.shape, steps, strict=True)]
    starts = [(n - m * step) / 2 for n, m, step in zip(slice_.pixels.shape, shape, steps, strict=True)]
    ends = [n - start for n, start in zip(slice_.pixels.shape, starts, strict=True)]
    if nearest:
        places = [start + step * (np.arange(m) + 0.5) for start, step, m in zip(starts, steps, shape, strict=True)]
        rows, columns = (
            np.clip(place.astype(int), 0, n - 1) for place, n in zip(places, slice_.pixels.shape, strict=True)
        )
        pixels = slice_.pixels[np.ix_(rows, columns)]
    else:
        box = [max(0.0, starts[1]), max(0.0, starts[0])]
        box += [min(ends[1], slice_.pixels.shape[1]), min(ends[0], slice_.pixels.shape[0])]
        image = Image.fromarray(slice_.pixels.astype(np.float32))
        resized = np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, tuple(box)))
        limits = np.iinfo(slice_.pixels.dtype)
        pixels = np.clip(np.rint(resized), limits.min, limits.max).astype(slice_.pixels.dtype)
    affine = slice_.affine.copy()
    affine[:, 3] = slice_.affine @ (*(start + step / 2 - 0.5 for start, step in zip(starts, steps, strict=True)), 0, 1)
    affine[:, :2] *= steps
    turn = (False, False, False)
    return replace(slice_, pixels=pixels, spacing=(size, size), affine=affine, acquired=False, frame=None, turn=turn)


def to_integers(real: np.ndarray) -> tuple[np.ndarray, float, float, bool]:
    """Finite real values as integers: values, offset, scale (real = offset + scale * value), and whether rounded.

    Whole numbers are kept exactly; others are spread over 16 bits.
    """
    low, high = float(real.min()), float(real.max())
    if max(abs(low), abs(high)) < 2**31 and np.array_equal(np.rint(real), real):
        kind = np.int16 if low >= -(2**15) and high < 2**15 else np.int32
        return real.astype(kind), 0.0, 1.0, False
    scale = (high - low) / 65535 or 1.0
    return np.rint((real - low) / scale).astype(np.uint16), low, scale, True


def _normal(volume: Volume, plane: str) -> int:
    """The patient's axis (0 x, 1 y, 2 z) along which the plane's slices are counted."""
    if PROJECTION in (plane, volume.acquired):
        if plane != volume.acquired:
            kind = "a projection" if volume.acquired == PROJECTION else "a volume"
            raise MedSoftError(f"{volume.name}: it is {kind} and has no {plane} slices")
        return _order(volume.affine).index(2)
    return PLANES.index(plane)


def _order(affine: np.ndarray) -> tuple[int, ...]:
    """For each patient axis the grid axis closest to it."""
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    return max(permutations(range(3)), key=lambda order: sum(cosines[row, order[row]] for row in range(3)))


def _turned_onto(labels: Volume, grid: Volume, index: np.ndarray) -> np.ndarray:
    """``onto`` for grids that are turned against each other."""
    sample = np.stack(np.meshgrid(*[np.linspace(0, n - 1, 33) for n in grid.values.shape], indexing="ij"), -1)
    places = sample @ index[:3, :3].T + index[:3, 3]
    if not ((places > -0.5) & (places < np.array(labels.values.shape) - 0.5)).all(-1).any():
        raise _no_overlap(labels, grid)
    return ndimage.affine_transform(
        labels.values, index[:3, :3], index[:3, 3], output_shape=grid.values.shape, order=0, mode="grid-constant"
    )


def _no_overlap(labels: Volume, grid: Volume) -> MedSoftError:
    def extent(volume: Volume) -> str:
        low, high = (volume.affine @ (*index, 1) for index in ((0, 0, 0), np.array(volume.values.shape) - 1))
        return f"from {_mm(low[:3])} to {_mm(high[:3])}"

    return MedSoftError(
        f"{labels.name}: its grid does not overlap the image's (labels {extent(labels)}, image {extent(grid)}, "
        "mm to left, posterior, head); is it of another patient or series?"
    )


def _mm(lengths: Any) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths)
