"""Phantoms of a given size: what scales, what does not, and that images without one are still those of VERSION 3."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from ldm.config import stage_configs
from ldm.core.errors import UsageError
from ldm.data.images import read_image
from ldm.phantom.spines import LESION_TYPES, SEVERITIES, VERSION, Phantom, render_phantom
from tool import make_phantoms

ROOT = Path(__file__).resolve().parents[2]

# Arguments of render_phantom; the image's shape, the mask's pixels, those of each label, every 24th pixel.
DEFAULT_WORLD = [
    (
        (3, 8, "haemangioma", "severe", 0),
        ((133, 114), 419, [8129, 1091, 2356, 1734, 1852]),
        "4044675b4d384781817c2d42b0ab423e569eb49108599e99592b6e727165",
    ),
    (
        (3, 9, None, None, 0),
        ((110, 134), 0, [8142, 1282, 2204, 1197, 1915]),
        "2739676038381a4752478622422b6c23331b4a53712f7c2a4c4f80892725",
    ),
    (
        (7, 1, "osteolytic", "subtle", 1),
        ((143, 121), 140, [9521, 1052, 2871, 1530, 2329]),
        "3e4b4b2528072d5b2b7621346b1e11072e4b4529002b43545f1b23996810",
    ),
    (
        (5, 11, "salt-and-pepper", "moderate", 0),
        ((125, 113), 238, [7149, 983, 2488, 1251, 2254]),
        "4f557b514b4c6060515530b4813f5148678862a63d38717c4a",
    ),
    (
        (7, 3, "osteoblastic", "severe", 0),
        ((125, 122), 476, [8680, 1055, 2286, 1569, 1660]),
        "506f638c564f64799c496e768cd24a4970ad785646707f7da5",
    ),
]


def _run(*arguments: str | Path) -> int:
    return make_phantoms.main(make_phantoms.build_parser().parse_args([str(each) for each in arguments]))


@pytest.fixture(scope="module")
def large() -> list[Phantom]:
    """One of every type and severity, 512 pixels a side."""
    kinds = [(kind, severity) for kind in LESION_TYPES for severity in SEVERITIES]
    return [render_phantom(31, i, kind, severity, size=512) for i, (kind, severity) in enumerate(kinds)]


@pytest.mark.parametrize(("arguments", "counts", "pixels"), DEFAULT_WORLD)
def test_without_a_size_the_images_are_those_of_this_version(arguments, counts, pixels) -> None:
    """A processor that rounds otherwise may move a value by one level, and a pixel over the edge of its region."""
    phantom = render_phantom(*arguments)
    assert VERSION == 3
    shape, marked, labels = counts
    assert phantom.image.shape == shape
    assert abs(int(phantom.mask.sum()) - marked) <= 1
    found = np.bincount(phantom.anatomy.ravel(), minlength=5)
    assert np.abs(found - labels).max() <= 1
    expected = np.frombuffer(bytes.fromhex(pixels), np.uint8).astype(int)
    assert np.abs(phantom.image[11::24, 7::24].ravel() - expected).max() <= 1


def test_lesions_and_vertebrae_have_the_sizes_of_a_ct(large: list[Phantom]) -> None:
    diameters = []
    for phantom in large:
        assert phantom.image.shape == (512, 512)
        assert 0.45 < phantom.spacing_mm < 0.65
        assert set(np.unique(phantom.anatomy)) == {0, 1, 2, 3, 4}
        body = phantom.anatomy == 1
        assert cv2.connectedComponents(body.astype(np.uint8))[0] == 2
        assert 40 < np.sqrt(body.sum()) < 75
        rows, columns = (np.arange(512)[body.any(axis=axis)] for axis in (1, 0))
        assert 150 < rows.mean() < 360  # in the middle of the image
        assert 150 < columns.mean() < 360
        assert cv2.connectedComponents((phantom.anatomy == 2).astype(np.uint8))[0] >= 9  # a whole column of others
        assert not (phantom.mask & (cv2.dilate(body.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0)).any()
        diameters.append(2 * np.sqrt(phantom.mask.sum() / np.pi) / 512)
    assert 0.03 < min(diameters) < 0.05
    assert 0.07 < max(diameters) < 0.09
    by_severity = np.array(diameters).reshape(4, 3).mean(axis=0)
    assert (np.diff(by_severity) > 0.005).all()


def test_the_noise_is_as_fine_as_the_pixels(large: list[Phantom]) -> None:
    """An enlarged image would be smooth: its neighbours differ much less than pixels two steps apart."""
    for phantom in large[:4]:
        image = phantom.image.astype(float)
        enlarged = cv2.resize(cv2.resize(image, (320, 320), interpolation=cv2.INTER_AREA), (512, 512))
        small, smooth = (np.median(np.abs(cv2.Laplacian(each, cv2.CV_64F))) for each in (image, enlarged))
        assert small > 2 * smooth


def test_twins_differ_near_the_mask_only_at_any_size(large: list[Phantom]) -> None:
    for i, phantom in enumerate(large[:4]):
        healthy = render_phantom(31, i, None, size=512)
        beyond = cv2.dilate(phantom.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
        assert np.array_equal(phantom.image[beyond], healthy.image[beyond])
        assert np.abs(phantom.image.astype(int) - healthy.image)[phantom.mask].mean() > 5


def test_a_dataset_of_a_given_size_is_not_mistaken_for_another(tmp_path: Path, capsys) -> None:
    out = tmp_path / "d"
    arguments = ["--output_dir", out, "--healthy", 1, "--diseased", 1, "--seed", 3]
    assert _run(*arguments, "--size", 256) == 0
    for folder in out.glob("w3p*"):
        assert read_image(folder / "image.png").shape == (256, 256)
        assert 0.9 < json.loads((folder / "meta.json").read_text())["spacing_mm"] < 1.2
    assert _run(*arguments, "--size", 256) == 0
    assert "already complete" in capsys.readouterr().out
    for other, said in ((["--size", "300"], r"\(size: 256 -> 300\)"), ([], r"\(size: 256 -> not given\)")):
        with pytest.raises(UsageError, match=rf"another run {said}.*--overwrite"):
            _run(*arguments, *other)


def test_a_sheet_shows_the_images_of_that_size(tmp_path: Path, monkeypatch) -> None:
    sizes = []

    def small(seed: int, patient: int, *lesion: str | None, size: int | None, world: str) -> Phantom:
        sizes.append(size)
        return render_phantom(seed, patient, *lesion, size=256)

    monkeypatch.setattr("ldm.phantom.dataset.render_phantom", small)
    assert _run("--sheet", tmp_path / "sheet.png", "--size", 256) == 0
    assert sizes == [256] * 45
    assert read_image(tmp_path / "sheet.png").shape == (5 * (22 + 260), 9 * 260)


@pytest.mark.parametrize("size", [255, 2049])
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: int) -> None:
    for arguments in (["--output_dir", tmp_path / "d"], ["--sheet", tmp_path / "sheet.png"]):
        with pytest.raises(UsageError, match=rf"size: {size} pixels a side; expected 256 to 2048"):
            _run(*arguments, "--size", size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["--calibrate", "--seen_by_biomedclip"])
def test_a_size_is_refused_where_the_default_world_is_meant(tmp_path: Path, other: str) -> None:
    with pytest.raises(UsageError, match=r"--size: not with --seen_by_biomedclip or --calibrate"):
        _run("--output_dir", tmp_path / "d", other, "--size", "512")
    assert not list(tmp_path.iterdir())


def test_the_stages_for_large_phantoms_have_the_networks_and_rates_of_those_for_small_ones() -> None:
    small, large = (stage_configs(ROOT / "models" / f"{name}.yaml") for name in ("phantom", "phantom_large"))
    for stage, config in large.items():
        same = replace(config.architecture, image_size=64)  # the same networks, so that one base fits both
        assert same == small[stage].architecture
        assert (small[stage].data.image_size, config.data.image_size) == (64, 128)
        assert replace(config.data, image_size=64) == small[stage].data
        assert config.training.rates == small[stage].training.rates
