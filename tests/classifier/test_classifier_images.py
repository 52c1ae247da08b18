"""What the classifier sees of an image: nothing stretched, and with `crop` the square around the vertebra."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy import SIZE, make_world, metrics_of, rows_of, run

from ldm.classifier.square import square
from ldm.core.errors import UsageError
from ldm.data.folders import read_sample
from ldm.data.images import read_image
from ldm.data.png import write_png


def seen_of(folder: Path, size: int, crop: float | None = None) -> np.ndarray:
    sample = read_sample("s", folder)
    return square(read_image(sample.image), sample, size, "grey", crop)


def disc(shape: tuple[int, int], radii: tuple[float, float]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]] - (np.array(shape)[:, None, None] - 1) / 2
    return np.where((y / radii[0]) ** 2 + (x / radii[1]) ** 2 <= 1, 255, 0).astype(np.uint8)


def extent(seen: np.ndarray) -> tuple[int, int]:
    return int((seen > 128).any(axis=1).sum()), int((seen > 128).any(axis=0).sum())


@pytest.mark.parametrize(
    ("shape", "radii", "spacing", "expected"),
    [
        ((40, 100), (15, 15), None, (30, 30)),
        ((100, 40), (15, 15), 0.7, (30, 30)),
        ((50, 100), (10, 20), [2.0, 1.0], (40, 40)),  # a disc of 40 mm in a square image of pixels that are not square
        ((100, 100), (20, 20), [1.0, 1.0], (40, 40)),
    ],
)
def test_a_disc_stays_one(
    tmp_path: Path, write_sample: Callable, shape: tuple, radii: tuple, spacing: object, expected: tuple
) -> None:
    meta = {"spacing_mm": spacing} if spacing else {}
    seen = seen_of(write_sample(tmp_path / "s", "healthy", image=disc(shape, radii), mask=None, meta=meta), 100)
    assert seen.shape == (100, 100)
    assert extent(seen) == pytest.approx(expected, abs=2)
    rows, columns = np.argwhere(seen > 128).mean(axis=0)
    assert (rows, columns) == pytest.approx((49.5, 49.5), abs=1)


def test_a_square_image_is_only_scaled(tmp_path: Path, write_sample: Callable) -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
    folder = write_sample(tmp_path / "s", "healthy", image=image, mask=None, meta={"spacing_mm": 0.7})
    unit = cv2.resize(image.astype(np.float32) / np.float32(255), (31, 31), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(seen_of(folder, 31), np.rint(unit * 255).astype(np.uint8))


@pytest.mark.parametrize(("corner", "spacing"), [((30, 50), [1.0, 1.0]), ((0, 0), [1.0, 1.0]), ((30, 50), [2.0, 1.0])])
def test_crop_is_a_square_around_the_vertebra(
    tmp_path: Path, write_sample: Callable, corner: tuple[int, int], spacing: list[float]
) -> None:
    """Its vertebra, all white, has half of the square's side with ``crop`` 2, also at the image's border."""
    anatomy = np.zeros((120, 160), np.uint8)
    tall = round(24 / spacing[0])
    anatomy[corner[0] : corner[0] + tall, corner[1] : corner[1] + 24] = 1
    anatomy[100:, :] = 2
    image = np.where(anatomy == 1, 255, 0).astype(np.uint8)
    given = {"image": image, "anatomy": anatomy, "meta": {"spacing_mm": spacing}}
    healthy = seen_of(write_sample(tmp_path / "h", "healthy", mask=None, **given), 48, 2.0)
    lesion = np.zeros_like(image)
    lesion[90:96, 2:6] = 255
    np.testing.assert_array_equal(seen_of(write_sample(tmp_path / "d", mask=lesion, **given), 48, 2.0), healthy)
    assert extent(healthy) == pytest.approx((24, 24), abs=1)
    assert np.argwhere(healthy > 128).mean(axis=0) == pytest.approx((23.5, 23.5), abs=1)


def test_classifier_with_crop_needs_label_maps(tmp_path: Path) -> None:
    settings = make_world(tmp_path) | {"crop": 1.5}
    anatomy = np.zeros((SIZE, SIZE), np.uint8)
    anatomy[6:26, 6:26] = 1
    folders = [path.parent for path in tmp_path.glob("*/*/image.png")]
    for folder in folders:
        write_png(folder / "anatomy.png", anatomy)
    (tmp_path / "test" / "test003" / "anatomy.png").unlink()
    assert run(settings) == 3
    (reject,) = rows_of(tmp_path / "out" / "rejects.csv")
    assert (reject["sample_id"], reject["set"]) == ("test003", "test")
    assert "crop 1.5: no vertebra (label 1) is marked in an anatomy.png" in reject["reason"]
    assert metrics_of(settings)["n_test"] == 7
    with pytest.raises(UsageError, match=r"trained with crop 1.5, the configuration says None"):
        run(settings | {"train": False, "crop": None})
    with pytest.raises(UsageError, match=r"crop: expected a number from 1 to 10"):
        run(settings | {"crop": 0.5})
    assert json.loads((tmp_path / "out" / "run.json").read_text())["complete"]


@pytest.mark.parametrize("values", [{"spacing_mm": [2.0, 1.0]}, {"window": [0, 9000]}])
def test_a_corrected_meta_json_is_another_run(tmp_path: Path, values: dict) -> None:
    """The pixels in the files are the same, what the network sees of them is not."""
    settings = make_world(tmp_path)
    folders = sorted((tmp_path / "test").iterdir())
    for folder in folders:
        write_png(folder / "image.png", read_image(folder / "image.png").astype(np.uint16) * 100)
    assert run(settings) == 0
    path = folders[0] / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UsageError, match="holds the results of another test"):
        run(settings)
