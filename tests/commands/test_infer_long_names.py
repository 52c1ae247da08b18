"""Folders whose names are nearly, or more than, what a file system takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import call, infer

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples
from tool import make_soft_masks

FITS, TOO_LONG = "b" * 235, "c" * 243  # a result's name has 4 more characters, as in __v0


def test_a_sample_whose_result_would_have_too_long_a_name_is_rejected_and_the_rest_drawn(
    final: Path, one: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = next(one.iterdir())
    for name in (FITS, TOO_LONG):
        shutil.copytree(folder, one / name)
    flags = ("--data", one, "--steps", 2, "--variants", 2)
    for _ in range(2):  # the second time it is complete
        assert infer(final, tmp_path / "out", *flags) == 3
        drawn = sorted(path.parent.name for path in (tmp_path / "out").glob("*/image.png"))
        assert drawn == sorted(f"{name}__v{k}" for name in (folder.name, FITS) for k in (0, 1))
        (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
        assert (reject["sample_id"], "longer than 239 bytes" in reject["reason"]) == (TOO_LONG, True)
    assert not list((tmp_path / "out").glob(".partial*"))


def test_nothing_but_too_long_names_is_an_error(final: Path, one: Path, tmp_path: Path) -> None:
    next(one.iterdir()).rename(one / TOO_LONG)
    with pytest.raises(MedSoftError, match=r"no sample can be inpainted .*longer than 239 bytes; shorten its name"):
        infer(final, tmp_path / "out", "--data", one)


def test_the_image_with_too_long_a_name_is_named_and_not_the_sample_of_its_prompt(
    final: Path, write_sample: Callable, tmp_path: Path
) -> None:
    write_sample(tmp_path / "data" / TOO_LONG, "healthy")
    write_sample(tmp_path / "data" / "lesion", "lytic lesion of the L3 vertebra")
    with pytest.raises(MedSoftError, match=rf"data/{TOO_LONG}: its result's folder would be called"):
        infer(final, tmp_path / "out", "--train_json", tmp_path / "data")


def test_soft_masks_are_made_for_every_name_that_there_can_be(one: Path, tmp_path: Path) -> None:
    next(one.iterdir()).rename(one / ("d" * 255))
    assert call(make_soft_masks, "--data", one, "--output_dir", tmp_path / "out") == 0
    assert [sample.sample_id for sample in load_samples(tmp_path / "out")[0]] == ["d" * 255]
