"""What a network may see does not depend on the pixels of the lesion region, however the image is resampled."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import DataConfig
from ldm.data.crop import CropWindow
from ldm.data.masks import Mask
from ldm.data.preparation import PreparedSample, fit_sample
from ldm.data.samples import Sample
from ldm.networks.model import hidden_region, hide


def prepared(
    image: np.ndarray, hard: np.ndarray, data: DataConfig, spacing: list[float] | None = None
) -> PreparedSample:
    sample = Sample("a", Path("image.png"), None, "lesion", (0.0,) * 4, "a", meta={"spacing_mm": spacing})
    return fit_sample(sample, image, Mask(hard.astype(np.float32)), data)


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(2, 50), st.integers(2, 50)),
    side=st.sampled_from([16, 32, 64, 256]),
    least=st.sampled_from([0.0, 16.0, 64.0]),
    spacing=st.sampled_from([None, [1.0, 1.0], [0.5, 1.3]]),
    fit=st.sampled_from(["crop", "pad", "resize"]),
    feather=st.floats(0, 6),
    colour=st.booleans(),
    depth=st.sampled_from([np.uint8, np.uint16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_visible_model_pixel_depends_on_a_hidden_one(
    size: tuple[int, int],
    side: int,
    least: float,
    spacing: list[float] | None,
    fit: str,
    feather: float,
    colour: bool,
    depth: type,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    top_level = np.iinfo(depth).max
    image = rng.integers(0, top_level // 4 + 1, (*size, 3) if colour else size, dtype=depth)
    hard = np.zeros(size, bool)
    top, left = (int(rng.integers(0, length)) for length in size)
    hard[top : top + int(rng.integers(1, 12)), left : left + int(rng.integers(1, 12))] = True
    scale = 60 / side if spacing and fit == "crop" else 0.0  # 60 mm hold the largest lesion with its feather
    data = DataConfig(
        image_size=side, fit=fit, feather=feather, feather_unit="pixels", min_crop=least, mm_per_pixel=scale
    )
    first = prepared(image, hard, data, spacing)
    other = image.copy()
    other[first.soft >= 0.5] = rng.integers(0, top_level + 1, other[first.soft >= 0.5].shape)
    second = prepared(other, hard, data, spacing)
    if (first.soft < 0.5).any():
        assert first.intensity_range == second.intensity_range
    assert torch.equal(first.mask, second.mask)
    visible = ~hidden_region(first.mask).expand(3, -1, -1)
    torch.testing.assert_close(first.image[visible], second.image[visible], rtol=0, atol=1e-6)
    torch.testing.assert_close(hide(first.image, first.mask), hide(second.image, second.mask), rtol=0, atol=1e-6)


def test_hidden_pixels_are_the_images_own_where_they_are_hidden() -> None:
    """A target to learn from: only what is visible is changed."""
    image = np.random.default_rng(0).random((20, 20)).astype(np.float32)
    hidden = np.zeros((20, 20), bool)
    hidden[8:12, 8:12] = True
    window = CropWindow(0, 0, 20, 20, 40)
    inside = window.forward_mask(hidden) > 0
    np.testing.assert_array_equal(window.forward(image, hidden)[inside], window.forward(image)[inside])
    bright = np.where(hidden, np.float32(1), np.float32(0))
    assert window.forward(bright, hidden)[~inside].max() == 0
    assert window.forward(bright)[~inside].max() > 0.2  # what cubic interpolation would show of it


def test_an_image_that_is_hidden_as_a_whole_is_still_its_own_target() -> None:
    window = CropWindow(0, 0, 4, 4, 8)
    image = np.ones((4, 4), np.float32)
    np.testing.assert_array_equal(window.forward(image, np.ones((4, 4), bool)), np.ones((8, 8)))
