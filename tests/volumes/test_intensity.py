"""ldm.volumes.intensity: windows against pydicom's, values kept in 16 bits, MONOCHROME1, the default window."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.images import to_unit
from ldm.volumes.intensity import HIGHEST, PRESETS, levels_of, linear_window, window_asked, window_for
from ldm.volumes.volume import Volume

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "real"


def volume(stored: np.ndarray, **more: Any) -> Volume:
    values = stored if stored.ndim == 3 else stored.reshape(*stored.shape, 1)
    return Volume(values, np.eye(4), name="made", **more)


def shown_by_pydicom(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """What apply_voi_lut makes of int16 values, brought to 0 to 1."""
    dataset = pydicom.Dataset()
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = center, width, function
    dataset.BitsStored, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 16, 1, "MONOCHROME2"
    return (apply_voi_lut(values, dataset).astype(float) + 32768) / 65535


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT"])
@given(center=st.integers(-2000, 3000), width=st.integers(2, 4000), low=st.integers(-3000, 2000))
def test_a_window_shows_what_pydicom_shows(function: str, center: int, width: int, low: int) -> None:
    values = np.arange(low, low + 3000, 7, dtype=np.int16)
    window = linear_window(center, width, function)
    levels = levels_of(volume(values.reshape(-1, 1)))
    ours = to_unit(levels.pixels(values), tuple(levels.window(*window)))
    np.testing.assert_allclose(ours, shown_by_pydicom(values, center, width, function), atol=1e-4)


@pytest.mark.parametrize(
    ("center", "width", "function", "words"),
    [
        (40, 300, "SIGMOID", "VOI LUT function SIGMOID"),
        (40, 1, "LINEAR", "width 1"),
        (40, 0, "LINEAR_EXACT", "width 0"),
    ],
)
def test_what_is_no_straight_window_is_refused(center: float, width: float, function: str, words: str) -> None:
    with pytest.raises(MedSoftError, match=words):
        linear_window(center, width, function)


def test_presets_are_dicom_windows_in_hu() -> None:
    assert PRESETS == {"bone": (-500, 1299), "soft_tissue": (-75, 174)}


@given(
    low=st.integers(-32768, 32767),
    span=st.integers(0, HIGHEST),
    scale=st.sampled_from([1.0, 0.5, 3.774]),
    offset=st.sampled_from([0.0, -1024.0, 17.25]),
    white=st.booleans(),
)
def test_values_are_kept_exactly(low: int, span: int, scale: float, offset: float, white: bool) -> None:
    """value = value_offset + value_scale * pixel, whatever 16 bits the values span, inverted or not."""
    stored = np.linspace(low, low + span, 64).round().astype(np.int32).reshape(8, 8)
    levels = levels_of(volume(stored, scale=scale, offset=offset, low_is_white=white))
    pixels = levels.pixels(stored)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(levels.zero + levels.sign * pixels.astype(int), stored)
    np.testing.assert_allclose(levels.value_offset + levels.value_scale * pixels, offset + scale * stored, atol=1e-6)
    if low >= 0 and low + span <= HIGHEST and not white:
        np.testing.assert_array_equal(pixels, stored)


def test_more_than_16_bits_are_refused() -> None:
    with pytest.raises(MedSoftError, match="from 0 to 65536, more than the 65536 of 16 bits"):
        levels_of(volume(np.array([[0, 65536]])))


def test_monochrome1_is_inverted_together_with_its_window() -> None:
    """Shown as pydicom shows it when its window's result is inverted."""
    stored = np.random.default_rng(0).integers(0, 4096, (30, 40)).astype(np.int16)
    made = volume(stored, low_is_white=True, modality="DX", windows=(linear_window(1800, 900),))
    low, high, rule = window_for(made)
    assert rule == "file"
    levels = levels_of(made)
    ours = to_unit(levels.pixels(stored), tuple(levels.window(low, high)))
    np.testing.assert_allclose(ours, 1 - shown_by_pydicom(stored, 1800, 900, "LINEAR"), atol=1e-4)


@pytest.mark.parametrize("white", [False, True])
def test_a_negative_scale_turns_no_image_into_its_negative(white: bool) -> None:
    made = volume(np.arange(100).reshape(10, 10), scale=-2.0, offset=50.0, low_is_white=white)
    levels = levels_of(made)
    real = made.offset + made.scale * made.values
    pixels = levels.pixels(made.values)
    np.testing.assert_array_equal(levels.value_offset + levels.value_scale * pixels.astype(float), real)
    assert (levels.value_scale < 0) == white  # bright is high, but for MONOCHROME1


def test_the_rule_of_a_window() -> None:
    ct = volume(np.arange(-1000, 1000).reshape(40, 50), unit="HU", modality="CT", windows=((-110, 189), (-450, 1049)))
    assert window_for(ct) == (-500, 1299, "bone")  # what a soft tissue window would make white in bone stays grey
    assert window_for(ct, "file") == (-110, 189, "file")  # the first of several
    assert window_for(ct, "soft_tissue") == (-75, 174, "soft_tissue")
    assert window_for(ct, (-200.0, 900.0)) == (-200, 900, "given")
    mr = volume(np.arange(2000).reshape(40, 50), modality="MR", windows=((10, 900),))
    assert window_for(mr) == (10, 900, "file")
    assert window_for(volume(mr.values, modality="MR"))[2] == "body"


def test_windows_that_a_file_does_not_have_are_refused() -> None:
    mr = volume(np.arange(2000).reshape(40, 50), modality="MR")
    with pytest.raises(MedSoftError, match=r"made: --window bone is in HU, found MR without a unit; give LOW HIGH"):
        window_for(mr, "bone")
    with pytest.raises(MedSoftError, match=r"made: holds no linear window; give --window LOW HIGH"):
        window_for(mr, "file")


@pytest.mark.parametrize("white", [False, True])
def test_the_default_window_looks_at_the_body_and_not_at_air(white: bool) -> None:
    """A tenth of the voxels is body: percentiles of all voxels would cut its brighter part off."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 20, (60, 60, 10))
    values[20:40, 20:40] = rng.integers(300, 1000, (20, 20, 10))
    stored = 4000 - values if white else values
    low, high, _ = window_for(volume(stored, low_is_white=white))
    seen = stored[20:40, 20:40]
    assert low < high
    assert ((seen <= low) | (seen >= high)).mean() < 0.01
    assert (high - low) < 1100  # it is no wider than what the volume holds


@pytest.mark.parametrize("level", [0, 700])
def test_a_constant_volume_has_a_window(level: int) -> None:
    low, high, _ = window_for(volume(np.full((8, 8, 2), level)))
    assert low < high


def test_a_ct_in_its_own_files_rule(tmp_path: Path) -> None:
    """pydicom's CT_small: modality and VOI rules of pydicom against ours."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    stored = dataset.pixel_array
    made = volume(stored, offset=float(dataset.RescaleIntercept), scale=float(dataset.RescaleSlope), unit="HU")
    levels = levels_of(made)
    values = levels.value_offset + levels.value_scale * levels.pixels(stored)
    np.testing.assert_array_equal(values, apply_modality_lut(stored, dataset))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/real")
def test_no_vertebra_is_cut_off_in_real_ct() -> None:
    image = nib.as_closest_canonical(nib.load(REAL / "ct_nifti" / "image.nii.gz"))
    labels = np.asarray(nib.as_closest_canonical(nib.load(REAL / "ct_nifti" / "labels.nii.gz")).dataobj)
    values = np.asarray(image.dataobj).astype(np.int32)
    vertebra = values[(labels >= 26) & (labels <= 50)]
    for made, most in ((volume(values, unit="HU"), 0.001), (volume(values), 0.05)):
        low, high, _ = window_for(made)
        assert ((vertebra <= low) | (vertebra >= high)).mean() < most


@pytest.mark.parametrize(
    ("words", "window"),
    [(None, None), (["bone"], "bone"), (["file"], "file"), (["-100", "250.5"], (-100.0, 250.5))],
)
def test_a_window_on_the_command_line(words: list[str] | None, window: Any) -> None:
    assert window_asked(words) == window


@pytest.mark.parametrize("words", [["bones"], ["5"], ["5", "4"], ["5", "5"], ["1", "2", "3"], ["nan", "2"]])
def test_words_that_are_no_window(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"--window: expected one of .*, or LOW HIGH, found {' '.join(words)}"):
        window_asked(words)
