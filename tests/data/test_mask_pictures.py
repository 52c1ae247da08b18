"""A soft mask is told from a picture, a ramp and noise, which are none."""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt

from ldm.core.errors import FileError
from ldm.data.folders import read_sample
from ldm.data.masks import SIDES, Mask, box_region, lesion_shaped, read_mask, soften
from ldm.data.png import write_png
from ldm.phantom.spines import render_phantom

NO_MASK = "neither a hard mask .* nor a soft one"


def blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(values.astype(np.float32), (0, 0), sigma)


def blob(seed: int, side: int, share: float) -> np.ndarray:
    """One to three irregular parts, somewhere, that cover about ``share`` of the image."""
    rng, region = np.random.default_rng(seed), np.zeros((side, side), bool)
    count = int(rng.integers(1, 4))
    rows, columns = np.indices((side, side))
    for _ in range(count):
        row, column = rng.uniform(0.2, 0.8, 2) * side
        edge = 1 + 0.3 * blurred(rng.standard_normal((side, side)), side / 25) * side / 10
        region |= np.hypot(rows - row, columns - column) * edge < side * np.sqrt(share / count / np.pi)
    return region


def bytes_of(unit: np.ndarray) -> np.ndarray:
    return np.rint(255 * unit).astype(np.uint8)


def read(folder: Path, levels: np.ndarray, soft: bool = False) -> Mask:
    write_png(folder / "mask.png", levels)
    return read_mask(folder / "mask.png", soft=soft)


def logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


KINDS = ["feather", "gaussian", "inside", "outside", "network", "noisy network"]


def soft_mask(kind: str, seed: int, side: int, share: float, width: float) -> np.ndarray:
    """A soft mask in [0, 1]; ``width`` of its border as a share of the image's side."""
    lesion, rng = blob(seed, side, share), np.random.default_rng(seed)
    depth, distance, reach = distance_transform_edt(lesion), distance_transform_edt(~lesion), width * side
    if kind == "feather":
        return soften(lesion, max(reach, 6))
    if kind == "gaussian":
        values = blurred(lesion, max(reach / 4, 2))
        return values / values.max()
    if kind == "inside":
        return depth / depth.max()
    if kind == "outside":
        return np.exp(-distance / max(reach / 4, 2))
    noise = blurred(rng.standard_normal((side, side)), side / 30)
    noise = noise / noise.std() if kind == "network" else rng.standard_normal((side, side)) / 3
    values = logistic(8 * (depth - distance) / max(reach, 6) + noise - 1)
    return values / values.max()


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9999),
    side=st.sampled_from([64, 100, 200, 400]),
    share=st.floats(0.02, 0.3),
    width=st.floats(0.05, 0.2),
)
def test_sound_soft_masks_are_read_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, side: int, share: float, width: float
) -> None:
    levels = bytes_of(soft_mask(kind, seed, side, share, width))
    found = read(tmp_path_factory.getbasetemp(), levels)
    if found.soft:
        np.testing.assert_allclose(found.values, levels / levels.max(), atol=0.5 / 255 + 1e-6)
    else:  # the border is steep after all
        assert kind in ("inside", "outside", "network", "noisy network")
        np.testing.assert_array_equal(found.hard, levels >= levels.max() / 2)


@settings(max_examples=40, deadline=None)
@given(
    source=st.sampled_from(["mask", "box", "lesion"]),
    feather=st.floats(0, 3),
    side=st.sampled_from([None, *SIDES]),
    seed=st.integers(0, 999),
    size=st.sampled_from([40, 120, 300]),
)
def test_whatever_make_soft_masks_writes_can_be_read_again(
    tmp_path_factory: pytest.TempPathFactory, source: str, feather: float, side: str | None, seed: int, size: int
) -> None:
    body = box_region((0.25, 0.3, 0.5, 0.4), (size, size))
    hard = {"mask": blob(seed, size, 0.2), "box": body, "lesion": lesion_shaped(body, seed, side=side)}[source]
    soft = soften(hard, feather * 2 * np.sqrt(hard.sum() / np.pi))
    found = read(tmp_path_factory.getbasetemp(), bytes_of(soft), soft=True)
    np.testing.assert_array_equal(found.values, soft)


PICTURES = ["spine", "crop", "deep", "jpeg", "smooth", "enlarged", "texture"]


def picture(kind: str, seed: int) -> np.ndarray:
    image = render_phantom(seed, seed % 7, None).image
    image = image if image.dtype == np.uint8 else np.rint(image / (image.max() / 255)).astype(np.uint8)
    if kind == "crop":
        return image[20:-20, 20:-20]
    if kind == "deep":
        return image.astype(np.uint16) * np.uint16(257)
    if kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=80)
        return np.asarray(Image.open(buffer))
    if kind == "smooth":
        values = blurred(image, 1.5)
        return bytes_of(values / values.max())
    if kind == "enlarged":
        return cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    if kind == "spine":
        return image
    values = blurred(np.random.default_rng(seed).standard_normal((200, 200)), 4)
    return bytes_of(np.clip(values / values.max(), 0, 1))


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(PICTURES), seed=st.integers(0, 999))
def test_pictures_are_no_masks(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int) -> None:
    with pytest.raises(FileError, match=NO_MASK):
        read(tmp_path_factory.getbasetemp(), picture(kind, seed))


@pytest.mark.parametrize("stem", ["mask", "soft_mask"])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("air", [0, 30])  # pixels around the patient that are 0
def test_the_image_itself_is_no_mask(
    tmp_path: Path, write_sample: Callable[..., Path], stem: str, negative: bool, air: int
) -> None:
    for seed in range(5):
        image = picture("crop", seed)
        image = np.pad(image, air)
        lesion = np.zeros_like(image)
        lesion[air + 10 : air + 30, air + 10 : air + 30] = 255
        files = {"image": image, "mask": lesion, stem: 255 - image if negative else image}
        reasons = r"looks like the image itself|is a copy of|neither a hard mask|inverted\?|elsewhere"
        with pytest.raises(FileError, match=reasons):
            read_sample("s", write_sample(tmp_path / str(seed), **files))


@pytest.mark.parametrize("side", [32, 128, 500])
def test_ramps_are_no_masks(tmp_path: Path, side: int) -> None:
    along = np.linspace(0, 1, side)
    radius = np.hypot(*(np.indices((side, side)) - side / 2)) / side
    for ramp in (along[None].repeat(side, 0), 1 - radius / radius.max()):
        with pytest.raises(FileError, match=f"{NO_MASK}.*as of a ramp"):
            read(tmp_path, bytes_of(ramp))


def test_forty_labels_are_refused_as_labels(tmp_path: Path) -> None:
    rows, columns = np.indices((160, 160))
    numbers = (rows // 25) * 6 + columns // 25 + 1
    numbers[(rows % 25 < 6) | (columns % 25 < 6)] = 0
    with pytest.raises(FileError, match="of labels, save the lesion's alone"):
        read(tmp_path, (numbers * 5).astype(np.uint8))
