"""Copies: lesions that were turned to fit their source are judged as turned lesions of other patients are."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import torch

from ldm.data.samples import Sample
from ldm.evaluation.copies import check_copies
from ldm.evaluation.lesions import Lesion


def lesion(number: int, seed: int, turn: float = 0.0, **meta: str) -> Lesion:
    """A disc of smooth noise of its own on even ground, turned by some degrees."""
    rng, side = np.random.default_rng(seed), 40
    noise = cv2.GaussianBlur(rng.normal(0, 60, (side, side)), (0, 0), 2.5) * 4
    rows, columns = np.mgrid[:side, :side]
    inside = np.hypot(rows - side / 2, columns - side / 2) < 8
    crop = np.where(inside, 128 + noise, 90).clip(0, 255)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), turn, 1.0)
    crop = cv2.warpAffine(crop, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE).astype(np.uint8)
    sample = Sample(f"s{number}", Path("i"), Path("m"), "lesion", (0, 0, 1, 1), f"p{number}", meta=dict(meta))
    vector = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=8)).float(), dim=0).numpy()
    rows = {"crop": crop, "inside": inside} | dict.fromkeys(("features", "alone", "embedding"), vector)
    return Lesion(sample, f"{number}", 16.0, None, 0.0, 1.0, {name: each[None] for name, each in rows.items()}, 0)


def test_turning_does_not_make_copies_of_unlike_lesions() -> None:
    """Each is compared with a source it has nothing to do with; the best of 65 turns is above the usual threshold's."""
    train = [lesion(number, number) for number in range(12)]
    others = [lesion(100 + number, 100 + number, mask_source=f"s{number}") for number in range(12)]
    check = check_copies(others, train)
    sources = [each.source for each in check.neighbours if each.source is not None]
    assert len(sources) == 12
    assert check.source_threshold > check.threshold
    assert not check.copies
    between = (check.threshold + check.source_threshold) / 2
    turned = dataclasses.replace(check.neighbours[0], source=between, correlation=between, as_it_lies=0.0)
    assert not check.is_copy(turned)
    assert check.is_copy(dataclasses.replace(turned, as_it_lies=between))


def ramp(number: int, degrees: float, **meta: str) -> Lesion:
    """A disc that is brighter towards one side, with a little noise."""
    made = lesion(number, number, **meta)
    rows, columns = np.mgrid[: len(made.crop), : len(made.crop)] - len(made.crop) / 2
    along = np.cos(np.radians(degrees)) * columns + np.sin(np.radians(degrees)) * rows
    grain = np.random.default_rng(number).normal(0, 1, made.crop.shape)
    crop = np.where(np.hypot(rows, columns) < 8, 128 + 6 * along + grain, 90).astype(np.uint8)
    return dataclasses.replace(made, rows={**made.rows, "crop": crop[None]})


def test_a_threshold_for_turned_lesions_near_to_1_is_said() -> None:
    """Lesions that differ by their direction alone are alike when turned: nothing can be told of those."""
    train = [ramp(number, 30 * number) for number in range(12)]
    check = check_copies([ramp(100, 15, mask_source="s3")], train)
    assert check.threshold < 0.98
    assert check.source_threshold > 0.99
    (said,) = check.warnings()
    assert "whether 1 synthetic lesion repeats its source, turned, cannot be told" in said
    assert not check_copies([ramp(100, 15)], train).warnings()
    others = [lesion(number, number) for number in range(12)]
    assert not check_copies([lesion(100, 100, mask_source="s3")], others).warnings()


def test_a_lesion_that_is_its_source_turned_is_a_copy() -> None:
    train = [lesion(number, number) for number in range(12)]
    (found,) = check_copies([lesion(100, 3, turn=24, mask_source="s3")], train).copies
    assert (found.match.sample.sample_id, found.correlation) == ("s3", found.source)
    assert found.as_it_lies < found.correlation
