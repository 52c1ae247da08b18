"""A lesion's pixels brought into another image: what copying and pasting gives, without any network. No torch."""

import cv2
import numpy as np

from ldm.data.images import match_channels
from ldm.data.masks import extents
from ldm.transfer.carrying import Donor
from ldm.transfer.frames import warped

AROUND = 0.25  # of a vertebra's height and width: how far beyond it the contrast of its image is measured


def paste(
    donor: Donor,
    image: np.ndarray,
    body: np.ndarray | None,
    soft: np.ndarray,
    matrix: np.ndarray,
    method: str = "paste",
) -> np.ndarray:
    """An image (HxW or HxWx3, uint8 or uint16) with the donor's lesion where ``soft`` (HxW) is above 0.

    Returned are levels, float32 of the image's shape, not yet blended by the soft mask; where that is 0 they are the
    image's. ``matrix``: the map of ``ldm.transfer.carrying`` by which the pixels are turned and scaled, and averaged
    where they become smaller. Their offset and contrast become the image's, by what the vertebrae and their
    surroundings hold beside the lesion; ``body`` (bool HxW) is the image's vertebra. Where one of the two is not
    known, what surrounds the lesion and the mask is compared.

    method paste: that is all. poisson: the lesion's gradients with the image's levels at the border of ``soft``
    (Perez et al. 2003, "Poisson Image Editing", equation 10). ``cv2.seamlessClone`` does that for 8 bits only, and
    leaves out the outer three pixels of a mask: the edge of a small lesion.
    """
    inside, levels = soft > 0, image.astype(np.float32)
    theirs = match_channels(donor.image.astype(np.float32), image)
    known = donor.body is not None and donor.body.any() and body is not None and body.any()
    offset, spread = _contrast(theirs, donor.body if known else None, donor.hard)
    wanted, wanted_spread = _contrast(levels, body if known else None, np.zeros_like(inside) if known else inside)
    gain = wanted_spread / spread if spread > 0 else 1.0
    brought = wanted + gain * (warped(theirs, matrix, image.shape, cv2.BORDER_REPLICATE) - offset)
    if method == "poisson":
        brought = brought + _membrane(levels - brought, inside)
    return np.where(inside if image.ndim == 2 else inside[..., None], brought, levels).astype(np.float32)


def _contrast(levels: np.ndarray, body: np.ndarray | None, lesion: np.ndarray) -> tuple[float, float]:
    """The level of healthy bone in an image, and the spread of levels in and around the vertebra.

    Median of the ``body`` beside the ``lesion`` (bool HxW), and from the 10 to the 90 percentile of the box around it.
    Without a body, both of what surrounds the lesion.
    """
    margin = AROUND if body is not None else 1.0
    (top, bottom), (left, right) = extents(body if body is not None else lesion)
    rows, columns = round(margin * (bottom - top)), round(margin * (right - left))
    box = np.zeros_like(lesion)
    box[max(top - rows, 0) : bottom + rows, max(left - columns, 0) : right + columns] = True
    around = box & ~lesion
    bone = around & body if body is not None else around
    around = around if around.any() else box
    bone = bone if bone.any() else around
    low, high = np.percentile(levels[around], (10, 90))
    return float(np.median(levels[bone])), float(high - low)


def _membrane(difference: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The function without curvature ``inside`` (bool HxW) that continues ``difference`` (HxW or HxWx3) around it.

    0 outside. Laplace's equation on the grid of four neighbours; beyond the image's border there are none.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import splu

    result = np.zeros_like(difference)
    if inside.all() or not inside.any():
        return result
    height, width = inside.shape
    rows, columns = np.nonzero(inside)
    number = np.full(inside.shape, -1)
    number[rows, columns] = np.arange(len(rows))
    degree, border = np.zeros(len(rows)), np.zeros((len(rows), *difference.shape[2:]))
    links = []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        there = (rows + down).clip(0, height - 1), (columns + right).clip(0, width - 1)
        exists = (there[0] != rows) | (there[1] != columns)
        fixed = exists & ~inside[there]
        degree += exists
        border[fixed] += difference[there][fixed]
        free = np.flatnonzero(exists & inside[there])
        links.append((free, number[there][free]))
    first, second = (np.concatenate(each) for each in zip(*links, strict=True))
    every = np.arange(len(rows))
    values = np.concatenate([degree, -np.ones(len(first))])
    places = np.concatenate([every, first]), np.concatenate([every, second])
    matrix = csr_array((values, places), shape=(len(rows), len(rows))).tocsc()
    result[rows, columns] = splu(matrix).solve(border)
    return result
