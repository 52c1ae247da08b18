"""dataset_infer.py --image on one slice of a DICOM or NIfTI volume, and on an image with a meta.json beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import AXIAL, grid, marked, spine, turned, write_nifti, write_seg, write_series, write_spine
from tiny import infer, metas

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.inference.options import InferenceOptions
from ldm.inference.single import single_sample

SPINE = spine()
PROMPT = "osteolytic lesion of the L2 vertebra"


def sample_of(tmp_path: Path, image: Path, mask: Path, **flags: Any) -> Sample:
    options = InferenceOptions(tmp_path / "out", Path("c"), Path("c"), image=image, mask=mask, prompt=PROMPT, **flags)
    options._check_image()
    return single_sample(options)


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    write_spine(tmp_path / "ct", SPINE)
    return tmp_path / "ct"


def mask_of(path: Path, shape: tuple[int, ...]) -> Path:
    mask = np.zeros(shape, np.uint8)
    mask[10:18, 12:20] = 255
    write_png(path, mask)
    return path


def test_a_slice_of_a_series_with_a_lesion_of_the_same_grid(ct: Path, tmp_path: Path) -> None:
    lesion = write_nifti(tmp_path / "lesion.nii.gz", SPINE.lesion.astype(np.uint8)[::-1], flipped(SPINE.affine))
    sample = sample_of(tmp_path, ct, lesion)
    column = int(SPINE.lesion.sum((1, 2)).argmax())  # where the lesion is largest
    assert (sample.meta["plane"], sample.meta["slice"]) == ("sagittal", column)
    assert (sample.meta["modality"], sample.meta["unit"], sample.meta["spacing_mm"]) == ("CT", "HU", [1.0, 1.0])
    pixels, mask = read_image(sample.image), read_image(sample.mask)
    assert pixels.shape == mask.shape == (60, 70)  # 56 rows of 1.25 mm
    hu = sample.meta["value_offset"] + sample.meta["value_scale"] * pixels.astype(float)
    assert np.median(hu[mask > 0]) == pytest.approx(90, abs=40)
    assert sample.meta["window"] == [-500 - sample.meta["value_offset"], 1299 - sample.meta["value_offset"]]
    area = SPINE.lesion[column].sum() * 1.25
    assert (mask > 0).sum() == pytest.approx(area, rel=0.1)


def flipped(affine: np.ndarray) -> np.ndarray:
    """The affine of the spine stored with its first axis reversed."""
    result = affine.copy()
    result[:3, 3] += affine[:3, 0] * (SPINE.image.shape[0] - 1)
    result[:3, 0] *= -1
    return result


def test_a_dicom_segmentation_as_mask(ct: Path, tmp_path: Path) -> None:
    paths = sorted(ct.iterdir(), key=position)
    seg = write_seg(tmp_path / "lesion.dcm", paths, {"lesion": SPINE.lesion})
    sample = sample_of(tmp_path, ct, seg, plane="axial")
    index = int(SPINE.lesion.sum((0, 1)).argmax())
    assert sample.meta["slice"] == index
    assert sample.image.parent.name.startswith(f"ct_axial_{index:03d}_")


def position(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient[2])


def test_one_file_with_an_image_as_mask(tmp_path: Path) -> None:
    shape = (40, 36, 1)
    (path,) = write_series(tmp_path / "s", marked(shape), grid(AXIAL, shape, (0.5, 0.5, 3.0)))
    path = path.rename(tmp_path / "s" / "IM1")  # no suffix: its content says what it is
    mask = mask_of(tmp_path / "mask.png", (36, 40))
    sample = sample_of(tmp_path, path, mask, window=["-100", "300"], spacing=[0.4])
    assert sample.mask == mask
    assert sample.meta["spacing_mm"] == [0.4, 0.4]
    offset = sample.meta["value_offset"]
    assert sample.meta["window"] == [-100 - offset, 300 - offset]
    assert sample_of(tmp_path, path, mask, window=["bone"]).meta["window"] == [-500 - offset, 1299 - offset]


@pytest.mark.parametrize("axes", ["LPH", "PHL", "HLP"])
def test_one_slice_stored_along_any_axes(tmp_path: Path, axes: str) -> None:
    values, affine = turned(marked((32, 36, 1)), grid(AXIAL, (32, 36, 1), (1, 1, 3)), axes)
    image = write_nifti(tmp_path / "slice.nii.gz", values, affine)
    sample = sample_of(tmp_path, image, mask_of(tmp_path / "mask.png", (36, 32)))
    assert sample.meta["plane"] == "axial"
    assert read_image(sample.image).shape == (36, 32)


def test_an_image_with_a_meta_json_beside_it(tmp_path: Path, write_sample: Callable) -> None:
    about = {"patient_id": "p7", "level": "L3", "spacing_mm": [2.0, 1.0], "window": [10, 90], "site": "north"}
    about |= {"unit": "HU", "value_offset": -1024, "synthetic": False}
    pixels = np.arange(480, dtype=np.uint16).reshape(20, 24) * 4
    folder = write_sample(tmp_path / "a", image=pixels, meta=about)
    image, mask = folder / "image.png", folder / "mask.png"
    sample = sample_of(tmp_path, image, mask)
    assert (sample.sample_id, sample.patient_id, sample.level) == ("image", "p7", "L3")
    assert sample.meta["site"] == "north"
    assert sample.meta["window"] == [10, 90]
    assert sample_of(tmp_path, image, mask, window=["-1000", "0"]).meta["window"] == [24, 1024]
    assert sample_of(tmp_path, image, mask, window=["bone"]).meta["window"] == [524, 2323]
    assert sample_of(tmp_path, image, mask, spacing=[0.5, 0.25]).meta["spacing_mm"] == [0.5, 0.25]
    (folder / "meta.json").write_text('{"spacing_mm": 0}')
    with pytest.raises(MedSoftError, match=r"meta\.json: spacing_mm: expected one or two numbers of mm"):
        sample_of(tmp_path, image, mask)


def test_flags_that_do_not_fit(ct: Path, tmp_path: Path, write_sample: Callable) -> None:
    folder = write_sample(tmp_path / "a")
    image, mask = folder / "image.png", folder / "mask.png"
    with pytest.raises(UsageError, match=r"--slice is needed: .* has 40 sagittal slices"):
        sample_of(tmp_path, ct, mask)
    with pytest.raises(UsageError, match="--plane and --slice choose a slice of a volume"):
        sample_of(tmp_path, image, mask, plane="axial")
    with pytest.raises(UsageError, match="has 8 bits, which are used as they are"):
        sample_of(tmp_path, image, mask, window=["0", "90"])
    with pytest.raises(UsageError, match="--spacing: expected one or two numbers"):
        sample_of(tmp_path, image, mask, spacing=[1, 2, 3])
    with pytest.raises(UsageError, match="--window: expected one of bone"):
        sample_of(tmp_path, ct, mask, slice=3, window=["bone", "sampling.steps=2"])
    with pytest.raises(UsageError, match="--window belongs to --image"):
        InferenceOptions(tmp_path / "out", Path("c"), Path("c"), window=["bone"])._check_image()
    write_png(folder / "image.png", np.arange(480, dtype=np.uint16).reshape(20, 24))
    with pytest.raises(UsageError, match=r"--window bone: .* has no meta.json that says how its levels are HU"):
        sample_of(tmp_path, image, mask, window=["bone"])
    with pytest.raises(MedSoftError, match="slice 40 of 40 sagittal slices"):
        sample_of(tmp_path, ct, mask, slice=40)


def test_masks_that_mark_nothing(ct: Path, tmp_path: Path) -> None:
    empty = write_nifti(tmp_path / "empty.nii.gz", np.zeros(SPINE.image.shape, np.uint8), SPINE.affine)
    with pytest.raises(MedSoftError, match=r"empty\.nii\.gz: marks nothing in the image"):
        sample_of(tmp_path, ct, empty)
    lesion = write_nifti(tmp_path / "lesion.nii.gz", SPINE.lesion.astype(np.uint8), SPINE.affine)
    with pytest.raises(MedSoftError, match="marks nothing in the sagittal slice 1"):
        sample_of(tmp_path, ct, lesion, slice=1)


def test_inpaints_a_slice_and_makes_it_again(final: Path, ct: Path, tmp_path: Path) -> None:
    lesion = write_nifti(tmp_path / "lesion.nii.gz", SPINE.lesion.astype(np.uint8), SPINE.affine)
    given = ["--image", ct, "--mask", lesion, "--prompt", PROMPT, "--exact"]
    assert infer(final, tmp_path / "out", *given) == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    assert name == f"ct_sagittal_{meta['slice']:03d}__v0"
    assert meta["parent_image"].startswith("../../out.input/ct_sagittal_")
    assert (meta["modality"], meta["unit"], meta["changed_outside_pixels"]) == ("CT", "HU", 0)
    made = read_image(tmp_path / "out" / name / "image.png")
    parent, soft = (read_image(tmp_path / "out" / name / path) for path in (meta["parent_image"], "soft_mask.png"))
    assert made.dtype == np.uint16
    np.testing.assert_array_equal(made[soft == 0], parent[soft == 0])
    assert (made != parent)[soft > 0].any()
    assert infer(final, tmp_path / "out", *given) == 0  # already complete: the same slice is the same input
    assert len(list((tmp_path / "out.input").glob("*/image.png"))) == 1
    from tiny import call

    import dataset_infer

    again = ["--replay", tmp_path / "out" / name / "meta.json", "--output_dir", tmp_path / "again", "--device", "cpu"]
    assert call(dataset_infer, *again) == 0
    assert json.loads((tmp_path / "again" / name / "meta.json").read_text())["plane"] == "sagittal"
    np.testing.assert_array_equal(read_image(tmp_path / "again" / name / "image.png"), made)
