"""How visible the border of the drawn region is. NumPy; no torch.

The border of a soft mask is the band in which its value changes (of a hard one, the line between 0 and 1): there the
composite passes from the original to the drawing. A seam shows as a mean gradient there that differs from the
real image's at the same place.
"""

import numpy as np


def border_gradient(unit: np.ndarray, soft: np.ndarray) -> float:
    """Mean absolute difference of neighbours whose soft values differ; unit: HxW or HxWx3 in [0, 1], soft: HxW.

    NaN without such neighbours: a mask that covers the picture has no border.
    """
    grey = unit if unit.ndim == 2 else unit.mean(axis=2)
    steps = [np.abs(np.diff(grey, axis=axis))[np.diff(soft, axis=axis) != 0] for axis in (0, 1)]
    across = np.concatenate(steps)
    return float(across.mean()) if across.size else float("nan")


def hard_composite(original: np.ndarray, generated: np.ndarray, soft: np.ndarray) -> np.ndarray:
    """The control: ``generated`` pasted where soft >= 0.5, all HxW(x3) in [0, 1]."""
    inside = soft >= 0.5
    return np.where(inside if original.ndim == 2 else inside[..., None], generated, original)
