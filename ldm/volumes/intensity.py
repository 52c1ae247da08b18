"""From a volume's stored values to 16-bit levels that keep them exactly, and the window in which they are looked at.

Three kinds of number:

    stored    what the file holds, integers
    value     offset + scale * stored, the physical value: HU for CT (DICOM PS3.3 C.11.1, the modality LUT)
    pixel     what image.png holds, 0 to 65535: value = value_offset + value_scale * pixel

A window [low, high] is in values until ``Levels.window`` brings it to pixels, as ``meta.json`` has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.core.errors import MedSoftError, UsageError
from ldm.volumes.volume import Volume

HIGHEST = 65535
HU_AIR = -500.0  # halfway between air (-1000 HU) and water (0 HU): above it lies the body
BODY_SHARE = 0.1  # without a unit, the body is brighter than this share of the bright end
DARK, BRIGHT = 0.5, 99.9  # percentiles of the default window: of all voxels, and of the body's
SEARCHED = 2_000_000  # voxels that are looked at for the default window


def linear_window(center: float, width: float, function: str = "LINEAR") -> tuple[float, float]:
    """The values (low, high) that DICOM's window shows black and white.

    PS3.3 C.11.2.1.2.1 for LINEAR, whose white begins one value earlier than the width says, and C.11.2.1.3.2 for
    LINEAR_EXACT. Raises MedSoftError for SIGMOID, which is no straight line between two values, for other functions,
    and for a width that leaves none between black and white.
    """
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise MedSoftError(f"VOI LUT function {function}: expected LINEAR or LINEAR_EXACT; give --window LOW HIGH")
    reach = (width - 1) / 2 if function == "LINEAR" else width / 2
    if not reach > 0:
        raise MedSoftError(f"window width {width:g} of a {function} window: expected more; give --window LOW HIGH")
    middle = center - 0.5 if function == "LINEAR" else center
    return middle - reach, middle + reach


# Windows of the spine in HU, width and centre as in Radiopaedia's article "Windowing (CT)": bone 1800 and 400, soft
# tissue 250 and 50.
PRESETS = {"bone": linear_window(400, 1800), "soft_tissue": linear_window(50, 250)}


@dataclass(frozen=True)
class Levels:
    """How the stored values of one volume become pixels, the same for all of its slices.

    ``zero``: the stored value whose pixel is 0. ``sign``: 1, or -1 where the lowest stored values are shown white
    (MONOCHROME1, or a negative scale): the pixels are inverted.
    """

    zero: int
    sign: int
    value_offset: float
    value_scale: float

    def pixels(self, stored: np.ndarray) -> np.ndarray:
        """Stored values of any shape, or values between them after resampling -> uint16 of the same shape."""
        exact = stored if np.issubdtype(stored.dtype, np.integer) else np.rint(stored)
        return np.clip(self.sign * (exact.astype(np.int64) - self.zero), 0, HIGHEST).astype(np.uint16)

    def window(self, low: float, high: float) -> list[float]:
        """A window in values as [low, high] in pixels; they may lie beyond 0 and 65535."""
        ends = ((value - self.value_offset) / self.value_scale for value in (low, high))
        return sorted(round(end, 6) for end in ends)


def levels_of(volume: Volume) -> Levels:
    """The levels that keep every stored value of the volume.

    A stored value that is not negative is its own pixel, unless it is inverted. Raises MedSoftError if the values span
    more than 16 bits.
    """
    lowest, highest = int(volume.values.min()), int(volume.values.max())
    if highest - lowest > HIGHEST:
        raise MedSoftError(f"{volume.name}: its values go from {lowest} to {highest}, more than the 65536 of 16 bits")
    sign = -1 if volume.low_is_white == (volume.scale > 0) else 1
    zero = highest if sign < 0 else 0 if lowest >= 0 and highest <= HIGHEST else lowest
    return Levels(zero, sign, volume.offset + volume.scale * zero, sign * volume.scale)


def window_asked(words: Sequence[str] | None) -> str | tuple[float, float] | None:
    """``--window``: the name of a rule, two rising numbers, or None; UsageError for anything else."""
    names = (*PRESETS, "file", "body")
    if words is None:
        return None
    if len(words) == 1 and words[0] in names:
        return words[0]
    found = f"--window: expected one of {', '.join(names)}, or LOW HIGH, found {' '.join(words)}"
    try:
        low, high = map(float, words)
    except ValueError as error:
        raise UsageError(found) from error
    if not low < high or np.isinf([low, high]).any():
        raise UsageError(f"{found}; LOW is to be below HIGH")
    return low, high


def window_for(volume: Volume, asked: str | tuple[float, float] | None = None) -> tuple[float, float, str]:
    """The window (low, high) of a volume in values, and the rule that it follows, as ``meta.json`` names it.

    ``asked``: a name of PRESETS, ``file`` for the first window of the file, ``body``, two values, or None for the
    default: ``bone`` where the values are HU, since equal grey then means equal density in every patient; else the
    file's window; else ``body``, from the 0.5 percentile of all voxels to the 99.9 percentile of the body's, where air
    does not count. Raises MedSoftError for a preset without HU, for ``file`` without a window in the file.
    """
    if asked is None:
        asked = "bone" if volume.unit == "HU" else "file" if volume.windows else "body"
    if not isinstance(asked, str):
        return asked[0], asked[1], "given"
    if asked == "body":
        return *_body_window(volume), "body"
    if asked == "file":
        if not volume.windows:
            raise MedSoftError(f"{volume.name}: holds no linear window; give --window LOW HIGH, or no --window")
        return *volume.windows[0], "file"
    if volume.unit != "HU":
        found = volume.unit or f"{volume.modality or 'an unknown modality'} without a unit"
        raise MedSoftError(
            f"{volume.name}: --window {asked} is in HU, found {found}; give LOW HIGH, or --modality CT if it is CT"
        )
    return *PRESETS[asked], asked


def _body_window(volume: Volume) -> tuple[float, float]:
    """The default window: dark is dark in the whole volume, bright is bright in the body; as it is displayed."""
    stored = volume.values.reshape(-1)
    stored = stored[:: max(1, stored.size // SEARCHED)]
    sign = -1 if volume.low_is_white else 1
    shown = sign * (volume.offset + volume.scale * stored.astype(np.float64))
    low = float(np.percentile(shown, DARK))
    if volume.unit == "HU":
        low = edge = HU_AIR
    else:
        edge = shown.min() + BODY_SHARE * (np.percentile(shown, 99) - shown.min())
    body = shown[shown > edge]
    high = float(np.percentile(body, BRIGHT)) if body.size else float(shown.max())
    high = max(high, low + abs(volume.scale))  # a constant volume
    return (low, high) if sign > 0 else (-high, -low)
