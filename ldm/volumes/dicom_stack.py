"""The order and the grid of a stack of DICOM frames, by their positions; what is no regular stack is refused by name.

Neither file names nor InstanceNumber nor SpacingBetweenSlices decide: they contradict the positions too often.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ldm.core.errors import MedSoftError
from ldm.volumes.dicom_frames import Frame

UNEVEN = 0.1  # of a step: how far a frame may lie beside its place; positions are often rounded to 0.1 mm
TILT = 0.3  # degrees between the way from frame to frame and their normal
TURN = 5e-3  # between the unit vectors of two frames
SAME = 1e-3  # spacings, relatively; places, in mm


def stacked(name: str, frames: Sequence[Frame], thickness: float | None) -> tuple[list[Frame], np.ndarray]:
    """The frames ordered along their normal, and the affine (column, row, frame, 1) -> LPS mm of their stack.

    ``thickness``: the third spacing of a single frame, in mm. Raises MedSoftError that names the frame at fault.
    """
    _check_alike(name, frames)
    orientation = frames[0].orientation
    normal = np.cross(*orientation)
    order = sorted(range(len(frames)), key=lambda place: float(frames[place].position @ normal))
    frames = [frames[place] for place in order]
    positions = np.array([frame.position for frame in frames])
    step = normal * (thickness if thickness and thickness > 0 else 1.0)
    if len(frames) > 1:
        _check_regular(name, frames, positions, normal)
        step = (positions[-1] - positions[0]) / (len(frames) - 1)
    affine = np.eye(4)
    rows, columns = frames[0].spacing
    affine[:3, :3] = np.stack([orientation[0] * columns, orientation[1] * rows, step], axis=1)
    affine[:3, 3] = positions[0]
    return frames, affine


def _check_alike(name: str, frames: Sequence[Frame]) -> None:
    """Orientation, size and spacing must be those of most frames."""
    planes = [tuple(np.round(frame.orientation.ravel(), 2) + 0.0) for frame in frames]
    usual = frames[planes.index(_most(planes))].orientation
    odd = [frame for frame in frames if np.abs(frame.orientation - usual).max() > TURN]
    if odd:
        raise MedSoftError(
            f"{name}: {len(odd)} of {len(frames)} frames lie in another orientation than the others, the first is "
            f"{_which(odd[0])}; is a localizer mixed in? Leave them out"
        )
    if len({frame.low_is_white for frame in frames}) > 1:
        raise MedSoftError(f"{name}: MONOCHROME1 and MONOCHROME2 in one series; expected one of them")
    shapes = [frame.shape for frame in frames]
    for frame in frames:
        if frame.shape != _most(shapes):
            rows, columns = _most(shapes)
            found = f"{frame.shape[0]} x {frame.shape[1]}"
            raise MedSoftError(f"{name}: {_which(frame)} has {found} pixels, the others {rows} x {columns}")
        if not np.allclose(frame.spacing, frames[0].spacing, rtol=SAME):
            raise MedSoftError(
                f"{name}: {_which(frame)} has a PixelSpacing of {_list(frame.spacing)} mm, "
                f"{_which(frames[0])} of {_list(frames[0].spacing)} mm; expected one"
            )


def _check_regular(name: str, frames: Sequence[Frame], positions: np.ndarray, normal: np.ndarray) -> None:
    """Along the normal, at equal steps, one frame a place."""
    places = positions @ normal
    steps = np.diff(places)
    usual = float(np.median(steps))
    for frame, following, step in zip(frames, frames[1:], steps, strict=False):
        if step < max(0.01 * usual, SAME):
            raise MedSoftError(
                f"{name}: two slices at one place, {_list(frame.position)} mm: {_which(frame)} and {_which(following)} "
                "(a duplicate, or several time points or echoes in one series); leave one of them out"
            )
    way = positions[-1] - positions[0]
    angle = np.degrees(np.arccos(np.clip(way @ normal / np.linalg.norm(way), -1, 1)))
    if angle > TILT:
        raise MedSoftError(
            f"{name}: a gantry tilt: the way from slice to slice is {angle:.1f} degrees off their normal; "
            "resample the series to upright slices first (dcm2niix does)"
        )
    beside = positions - positions[0] - np.outer(np.arange(len(frames)) / (len(frames) - 1), way)
    along = beside @ normal
    across = np.linalg.norm(beside - np.outer(along, normal), axis=1)
    if np.abs(along).max() <= UNEVEN * usual:
        if across.max() > max(frames[0].spacing) / 2:
            raise MedSoftError(
                f"{name}: its slices are shifted sideways by up to {across.max():.3g} mm; expected one upright stack"
            )
        return
    wide = int(np.argmax(steps))
    missing = round(float(steps[wide] / usual)) - 1
    if missing < 1:
        raise MedSoftError(
            f"{name}: its slices lie at uneven steps of {steps.min():.4g} to {steps.max():.4g} mm; expected equal ones"
        )
    place = positions[wide] + usual * normal
    number = "a slice is" if missing == 1 else f"{missing} slices are"
    raise MedSoftError(
        f"{name}: {number} missing at {_list(place)} mm (left, posterior, head), between {_which(frames[wide])} and "
        f"{_which(frames[wide + 1])}: they lie {steps[wide]:.4g} mm apart, the others {usual:.4g} mm"
    )


def _most(values: Sequence[tuple]) -> tuple:
    return Counter(values).most_common(1)[0][0]


def _which(frame: Frame) -> str:
    return frame.path.name if frame.number is None else f"frame {frame.number} of {frame.path.name}"


def _list(values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in np.asarray(values, float) + 0.0)
