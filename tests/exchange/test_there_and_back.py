"""The real import, a result on its samples, the export, and the project's own readers on what comes out."""

import json
from pathlib import Path

import made
import nibabel
import numpy as np
import pydicom
import pytest
from roundtrip import World
from tiny import call

from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.volumes.dicom import find_series, read_series
from ldm.volumes.formats import read_volume
from ldm.volumes.segmentations import read_lesions
from tool import import_volumes

PROMPT = "moderate osteolytic lesion of the L2 vertebra"
SPINE = made.spine(spacing=(1.25, 1.25, 1.0))
SECRETS = (b"Mustermann", b"P-4711", b"19500102", b"20230405", b"A-99", b"Doe")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def imported(world: World, plane: str, nifti: bool = False) -> str:
    """The diseased sample of a CT series, or of the same volume as NIfTI, with labels and lesion; a result on it."""
    archive = world.root / "archive"
    made.write_spine(archive / "scans", SPINE)
    made.write_nifti(archive / "image.nii.gz", *made.turned(SPINE.image, SPINE.affine, "PHR"))
    made.write_nifti(archive / "labels.nii.gz", *made.turned(SPINE.labels, SPINE.affine, "RAH"))
    made.write_nifti(archive / "lesion.nii.gz", SPINE.lesion.astype(np.uint8), SPINE.affine)
    image = "image.nii.gz" if nifti else "scans"
    (archive / "cases.csv").write_text(f"image,labels,lesion,prompt\n{image},labels.nii.gz,lesion.nii.gz,{PROMPT}\n")
    flags = ["--output_dir", world.root / "data", "--preset", "totalsegmentator", "--plane", plane]
    assert call(import_volumes, archive / "cases.csv", *flags) == 0
    (name,) = [sample.sample_id for sample in load_samples(world.root / "data")[0] if not sample.healthy]
    world.inpaint(name)
    return f"{name}__v0"


def sources(world: World) -> list[tuple[Path, pydicom.Dataset]]:
    return [(path, pydicom.dcmread(path)) for path in sorted((world.root / "archive" / "scans").iterdir())]


def test_axial_frames_come_back_with_their_values(world: World) -> None:
    name = imported(world, "axial")
    assert world.export() == 0
    image = pydicom.dcmread(world.out / name / "image.dcm")
    (before,) = [each for _, each in sources(world) if each.ImagePositionPatient == image.ImagePositionPatient]
    soft = read_image(world.root / "results" / name / "soft_mask.png")
    np.testing.assert_array_equal(image.pixel_array[soft == 0], before.pixel_array[soft == 0])
    assert (image.pixel_array != before.pixel_array)[soft > 0].any()
    for path in (path for path in (*world.out.rglob("*"), *(world.root / "results").rglob("*")) if path.is_file()):
        assert not [secret for secret in (*SECRETS, before.SOPInstanceUID.encode()) if secret in path.read_bytes()], (
            path
        )


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
def test_our_own_readers_take_what_comes_out(world: World, plane: str) -> None:
    name = imported(world, plane)
    assert world.export() == 0
    series, rejects = find_series(world.out)
    assert not rejects
    assert sorted(each.kind for each in series) == ["image", "segmentation", "segmentation"]
    volume = read_series(next(each for each in series if each.kind == "image"))
    mask = read_image(world.root / "results" / name / "mask.png") > 0
    (lesion,) = read_lesions(world.out / name / "lesion.dcm", volume)
    assert lesion.description == PROMPT
    found = lesion.mask[:, :, 0].T  # columns, rows, frames
    np.testing.assert_array_equal(found, mask)
    shown = volume.offset + volume.scale * volume.values[:, :, 0].T
    meta = load_samples(world.root / "results")[0][0].meta
    pixels = read_image(world.root / "results" / name / "image.png")
    np.testing.assert_array_equal(shown, meta["value_offset"] + meta["value_scale"] * pixels.astype(float))


def test_a_sagittal_reformat_lies_in_the_patient(world: World) -> None:
    """Where the source volume and the exported slice have the same voxels, they have the same values."""
    name = imported(world, "sagittal")
    assert world.export("--link_source") == 0
    source, slice_ = read_volume(world.root / "archive" / "scans"), read_volume(world.out / name / "image.dcm")
    index = np.linalg.inv(source.affine) @ slice_.affine @ np.array([[10, 0, 0, 1], [10, 60, 0, 1]]).T
    assert index[0, 0] == pytest.approx(index[0, 1], abs=1e-3)  # one sagittal plane
    assert slice_.affine[:3, 0] @ [0, 1, 0] > 0  # columns run to posterior
    assert slice_.affine[:3, 1] @ [0, 0, 1] < 0  # rows run to the feet
    image = pydicom.dcmread(world.out / name / "image.dcm")
    references = {item.ReferencedSOPInstanceUID for item in image.SourceImageSequence}
    assert references == {each.SOPInstanceUID for _, each in sources(world)}
    lesion = SPINE.lesion.sum((1, 2)).argmax()
    assert round(index[0, 0]) == lesion


def test_nifti_comes_back_into_its_place(world: World) -> None:
    name = imported(world, "axial", nifti=True)
    assert world.export("--format", "nifti") == 0
    theirs = nibabel.load(world.root / "archive" / "image.nii.gz")
    ours = nibabel.load(world.out / name / "image.nii.gz")
    index = np.stack(np.meshgrid(*map(np.arange, ours.shape), indexing="ij"), -1)
    to_source = np.linalg.inv(theirs.affine) @ ours.affine
    places = (index @ to_source[:3, :3].T + to_source[:3, 3])[:, :, 0]
    nearest = np.rint(places).astype(int)
    assert np.abs(places - nearest).max() < 1e-3
    expected, found = theirs.get_fdata()[tuple(np.moveaxis(nearest, -1, 0))], ours.get_fdata()[..., 0]
    soft = read_image(world.root / "results" / name / "soft_mask.png")
    np.testing.assert_array_equal(found[soft == 0], expected[soft == 0])
    assert (found != expected)[soft > 0].any()
    about = json.loads((world.out / name / "about.json").read_text())
    assert (about["level"], about["region"], about["plane"], about["prompt"]) == ("L2", "lumbar", "axial", PROMPT)
