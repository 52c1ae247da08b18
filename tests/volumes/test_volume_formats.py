"""NIfTI, NRRD and MetaImage into volumes: the same way up as SimpleITK reads them, real values kept, faults refused."""

import gzip
from pathlib import Path
from typing import Any

import made
import nibabel
import nibabel.testing
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from ldm.core.errors import MedSoftError, UsageError
from ldm.volumes.formats import format_of, read_volume
from ldm.volumes.volume import Volume, orient

REAL = Path(__file__).parents[2].parent / "shared/real"
SHAPE, SPACING = (7, 6, 5), (0.8, 1.0, 2.5)
RAS = np.diag([-1, -1, 1, 1])


def base() -> tuple[np.ndarray, np.ndarray]:
    affine = made.grid("LPH", SHAPE, SPACING)
    affine[:3, 3] += (10, -20, 30)
    return made.marked(SHAPE), affine


def by_simpleitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, affine


def write_itk(path: Path, values: np.ndarray, affine: np.ndarray, *, compress: bool = False) -> Path:
    image = sitk.GetImageFromArray(values.T)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


def write_nrrd(path: Path, values: np.ndarray, affine: np.ndarray, signed: str, **header: Any) -> Path:
    signs = {"left-posterior-superior": (1, 1, 1), "RAS": (-1, -1, 1), "LAS": (1, -1, 1)}[signed]
    placed = np.diag([*signs, 1]) @ affine
    fields = {"space": signed, "space directions": placed[:3, :3].T, "space origin": placed[:3, 3]} | header
    nrrd.write(str(path), values, {key: value for key, value in fields.items() if value is not None})
    return path


def same(volume: Volume, values: np.ndarray, affine: np.ndarray) -> None:
    np.testing.assert_array_equal(volume.offset + volume.scale * volume.values, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


def refusal(path: Path) -> str:
    with pytest.raises(MedSoftError) as caught:
        read_volume(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("axes", made.ORIENTATIONS)
def test_48_orientations_of_a_nifti_come_out_the_same_way_up(tmp_path: Path, axes: str) -> None:
    values, affine = base()
    path = made.write_nifti(tmp_path / "cube.nii.gz", *made.turned(values, affine, axes))
    assert "".join(nibabel.aff2axcodes(nibabel.load(path).affine)) == axes.replace("H", "S").replace("F", "I")
    same(orient(read_volume(path)), values, affine)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("axes", "turn"), [("LPH", 0), ("PFR", 0), ("LPH", 20)])
def test_files_that_simpleitk_writes_are_read_alike(
    tmp_path: Path, name: str, compress: bool, axes: str, turn: float
) -> None:
    values = made.marked(SHAPE)
    path = write_itk(tmp_path / name, values, made.grid(axes, SHAPE, SPACING, turn), compress=compress)
    volume = read_volume(path)
    same(volume, *by_simpleitk(path))
    assert (volume.name, volume.notes) == (str(path), ())
    assert volume.source == {"key": str(path), "paths": [str(path)]}


@pytest.mark.skipif(not REAL.exists(), reason="the real images are not here")
@pytest.mark.parametrize("name", ["ct_nifti/image", "ct_nifti/labels", "mr_nifti/image", "mr_nifti/lesion"])
def test_real_files_are_read_as_simpleitk_reads_them(name: str) -> None:
    path = REAL / f"{name}.nii.gz"
    same(read_volume(path), *by_simpleitk(path))


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", ">i2", ">i4", "f4", "f8", "i8"])
def test_every_kind_of_number_is_kept(tmp_path: Path, kind: str) -> None:
    values, affine = base()
    values = (values % 100).astype(kind)
    for path in (
        made.write_nifti(tmp_path / "a.nii", values, affine),
        write_nrrd(tmp_path / "a.nrrd", values, affine, "RAS"),
        write_mha(tmp_path / "a.mha", values, affine),
    ):
        volume = read_volume(path)
        same(volume, values, affine)
        assert volume.values.dtype.kind in "iu"
        assert volume.values.dtype.isnative
        assert volume.values.dtype.itemsize <= 4
        assert not volume.rounded


def write_mha(path: Path, values: np.ndarray, affine: np.ndarray, **header: Any) -> Path:
    names = {"i1": "CHAR", "u1": "UCHAR", "i2": "SHORT", "u2": "USHORT", "i4": "INT", "u4": "UINT"}
    names |= {"i8": "LONG_LONG", "f4": "FLOAT", "f8": "DOUBLE"}
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": values.dtype.byteorder == ">",
        "TransformMatrix": " ".join(map(str, (affine[:3, :3] / spacing).T.ravel())),
        "Offset": " ".join(map(str, affine[:3, 3])),
        "ElementSpacing": " ".join(map(str, spacing)),
        "DimSize": " ".join(map(str, values.shape)),
        "ElementType": f"MET_{names[values.dtype.str[1:]]}",
        "ElementDataFile": "LOCAL",
    } | header
    last = fields.pop("ElementDataFile")
    lines = [f"{key} = {value}\n" for key, value in fields.items() if value is not None]
    data = values.tobytes(order="F") if last == "LOCAL" else b""
    path.write_bytes("".join([*lines, f"ElementDataFile = {last}\n"]).encode() + data)
    return path


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (0.5, 3.0), (-2.0, 10.0)])
def test_a_nifti_slope_becomes_scale_and_offset(tmp_path: Path, slope: float, intercept: float) -> None:
    values, affine = base()
    image = nibabel.Nifti1Image(values, RAS @ affine)
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, tmp_path / "a.nii")
    expected = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)
    volume = read_volume(tmp_path / "a.nii")
    same(volume, expected, affine)
    assert volume.values.dtype == np.int16


def test_real_values_are_rounded_to_16_bits_and_it_is_said(tmp_path: Path) -> None:
    values, affine = base()
    volume = read_volume(made.write_nifti(tmp_path / "a.nii.gz", (values / 7).astype(np.float32), affine))
    assert volume.rounded
    assert volume.notes == ("real values are rounded to 16 bits",)
    np.testing.assert_allclose(volume.offset + volume.scale * volume.values, values / 7, atol=volume.scale * 0.51)


def test_voxels_that_are_no_number_are_the_lowest_and_it_is_said(tmp_path: Path) -> None:
    values, affine = base()
    floats = values.astype(np.float32) + 5
    floats[0, 0, :2] = np.nan, np.inf
    volume = read_volume(made.write_nifti(tmp_path / "a.nii", floats, affine))
    assert volume.notes == ("2 voxels hold no finite number: the lowest value is given",)
    assert (volume.values[0, 0, :2] == floats[np.isfinite(floats)].min()).all()


def test_the_sform_is_preferred_and_a_disagreement_is_said(tmp_path: Path) -> None:
    values, affine = base()
    other = affine.copy()
    other[:3, 3] += (0, 5, 0)
    image = nibabel.Nifti1Image(values, None)
    image.set_sform(RAS @ affine, 2)
    image.set_qform(RAS @ other, 1)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    same(volume, values, affine)
    assert volume.notes == ("sform and qform disagree by up to 5 mm: the sform is used",)


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_one_form_is_enough(tmp_path: Path, form: str) -> None:
    values, affine = base()
    image = nibabel.Nifti1Image(values, None)
    image.header.set_zooms(SPACING)
    getattr(image, f"set_{form}")(RAS @ affine, 1)
    image.header["qform_code" if form == "sform" else "sform_code"] = 0
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    same(volume, values, affine)
    assert volume.notes == ()


def test_a_sound_sform_beside_a_damaged_qform_is_enough(tmp_path: Path) -> None:
    values, affine = base()
    path = made.write_nifti(tmp_path / "a.nii", values, affine, quatern_b=0.9, quatern_c=0.9)
    same(read_volume(path), values, affine)
    both = made.write_nifti(tmp_path / "b.nii", values, affine, quatern_b=0.9, quatern_c=0.9, sform_code=0)
    assert "it is no sound NIfTI file" in refusal(both)


def test_a_form_that_is_no_number(tmp_path: Path) -> None:
    path = made.write_nifti(tmp_path / "a.nii", *base(), srow_y=np.nan)
    assert "holds what is no finite number" in refusal(path)


def test_lengths_in_other_units_become_mm(tmp_path: Path) -> None:
    values, affine = base()
    path = made.write_nifti(tmp_path / "a.nii", values, np.diag([0.001, 0.001, 0.001, 1]) @ affine, xyzt_units=1)
    same(read_volume(path), values, affine)


def test_one_slice_and_a_fourth_axis_of_one_are_volumes(tmp_path: Path) -> None:
    values, affine = base()
    same(read_volume(made.write_nifti(tmp_path / "a.nii", values[..., None], affine)), values, affine)
    same(read_volume(made.write_nifti(tmp_path / "b.nii", values[:, :, 0], affine)), values[:, :, :1], affine)


def test_the_files_display_range_is_its_window(tmp_path: Path) -> None:
    values, affine = base()
    path = made.write_nifti(tmp_path / "a.nii", values, affine, cal_min=100, cal_max=900)
    assert read_volume(path).windows == ((100, 900),)


@pytest.mark.parametrize("space", ["left-posterior-superior", "RAS", "LAS"])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
def test_nrrd_spaces_and_encodings(tmp_path: Path, space: str, encoding: str) -> None:
    values, affine = base()
    path = write_nrrd(tmp_path / "a.nrrd", values, affine, space, encoding=encoding)
    same(read_volume(path), values, affine)
    if encoding == "gzip":
        same(read_volume(path), *by_simpleitk(path))


def test_an_nrrd_without_origin_says_so(tmp_path: Path) -> None:
    values, affine = base()
    volume = read_volume(write_nrrd(tmp_path / "a.nrrd", values, affine, "RAS", **{"space origin": None}))
    assert volume.notes == ("the file names no origin: its first voxel is taken to lie at 0, 0, 0 mm",)


@pytest.mark.parametrize("axes", made.ORIENTATIONS)
def test_metaimage_axes_are_lps_as_itk_reads_them(tmp_path: Path, axes: str) -> None:
    values, affine = base()
    path = write_mha(tmp_path / "a.mha", *made.turned(values, affine, axes))
    same(orient(read_volume(path)), values, affine)
    if np.linalg.det(made.turned(values, affine, axes)[1]) > 0:  # SimpleITK refuses left-handed axes
        same(read_volume(path), *by_simpleitk(path))


def test_a_metaimage_whose_letters_contradict_its_matrix_says_so(tmp_path: Path) -> None:
    values, affine = base()
    sound = read_volume(write_mha(tmp_path / "a.mha", values, affine, AnatomicalOrientation="RAI"))
    assert sound.notes == ()
    volume = read_volume(write_mha(tmp_path / "a.mha", values, affine, AnatomicalOrientation="LPS"))
    assert volume.notes == ("AnatomicalOrientation is LPS, the TransformMatrix is RAI: the matrix is used",)
    same(volume, values, affine)
    bare = read_volume(write_mha(tmp_path / "a.mha", values, affine, TransformMatrix=None))
    assert bare.notes == ("the file has no TransformMatrix: its axes are taken to run to left, posterior and head",)


@pytest.mark.parametrize("skip", [0, 12, -1])
def test_a_metaimage_in_two_files(tmp_path: Path, skip: int) -> None:
    values, affine = base()
    (tmp_path / "a.raw").write_bytes(b"x" * (12 if skip else 0) + values.tobytes(order="F"))
    path = write_mha(tmp_path / "a.mhd", values, affine, ElementDataFile="a.raw", HeaderSize=skip)
    same(read_volume(path), values, affine)


def test_dicom_is_told_by_content_and_several_series_are_listed(tmp_path: Path) -> None:
    values, affine = base()
    paths = made.write_series(tmp_path / "x", values, affine, SeriesNumber=4, SeriesDescription="bone")
    same(read_volume(tmp_path), values.astype(float) - 1024, affine)
    paths[0].rename(tmp_path / "slice.dat")
    assert format_of(tmp_path / "slice.dat") == "dicom"
    assert read_volume(tmp_path / "slice.dat").values.shape == (7, 6, 1)
    (tmp_path / "slice.dat").unlink()
    made.write_series(tmp_path / "y", values, affine, SeriesNumber=5)
    with pytest.raises(UsageError, match=r"2 image series, expected one; put the files of one .*\n.*4: 4"):
        read_volume(tmp_path)
    assert read_volume(tmp_path / "y").values.shape == SHAPE  # as the message says


def test_a_folder_of_damaged_dicom_is_refused_with_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 500)
    assert "it is not a DICOM file" in refusal(tmp_path / "a.dcm")
    with pytest.raises(MedSoftError, match=r"a\.dcm: it is not a DICOM file"):
        read_volume(tmp_path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"hello", b"", gzip.compress(b"hello", mtime=0)])
def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert "expected DICOM, NIfTI, NRRD or MetaImage (MHA), but its content is none of them" in refusal(
        tmp_path / "a.png"
    )


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    assert "it does not exist" in refusal(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "c.mha"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    values, affine = base()
    path = tmp_path / name
    if ".nii" in name:
        made.write_nifti(path, values, affine)
    elif ".nrrd" in name:
        write_nrrd(path, values, affine, "RAS")
    else:
        write_itk(path, values, affine, compress=name == "c.mha")
    path.write_bytes(path.read_bytes()[:-40])
    assert "truncated" in refusal(path)


def test_a_full_memory_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 4.00 GiB for an array")

    made.write_nifti(tmp_path / "a.nii", *base())
    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "get_unscaled", full)
    said = refusal(tmp_path / "a.nii")
    assert "too little memory for what it says it holds (Unable to allocate 4.00 GiB for an array)" in said
    assert "truncated" not in said


def test_a_nifti_that_does_not_say_where_left_is(tmp_path: Path) -> None:
    values, affine = base()
    path = made.write_nifti(tmp_path / "a.nii", values, affine, sform_code=0, qform_code=0)
    assert "neither sform nor qform says where left and head are" in refusal(path)


def test_a_nifti_of_several_volumes(tmp_path: Path) -> None:
    values, affine = base()
    path = made.write_nifti(tmp_path / "a.nii", np.stack([values, values], -1), affine)
    assert "7 x 6 x 5 x 2 voxels, several volumes; expected one" in refusal(path)


def test_a_nifti_in_colour(tmp_path: Path) -> None:
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert "of the kind colour; expected grey values" in refusal(
        made.write_nifti(tmp_path / "a.nii", colours, np.eye(4))
    )


def test_a_nifti_without_a_number(tmp_path: Path) -> None:
    path = made.write_nifti(tmp_path / "a.nii", np.full(SHAPE, np.nan, np.float32), np.eye(4))
    assert "it holds no finite number" in refusal(path)


def test_a_nifti_with_flat_or_sheared_voxels(tmp_path: Path) -> None:
    values, affine = base()
    sheared = affine.copy()
    sheared[1, 2] += 1
    assert "degrees off right angles" in refusal(made.write_nifti(tmp_path / "a.nii", values, sheared))
    row = RAS[0] @ affine * (0, 1, 1, 1)
    path = made.write_nifti(tmp_path / "b.nii", values, affine, srow_x=row)
    assert "the distance between voxels is 0 x 1 x 2.5 mm; expected three lengths above 0" in refusal(path)


@pytest.mark.parametrize("header", [{"space": None, "space dimension": 3}, {"space": "scanner-xyz"}])
def test_an_nrrd_that_does_not_say_where_left_is(tmp_path: Path, header: dict[str, Any]) -> None:
    values, affine = base()
    path = write_nrrd(tmp_path / "a.nrrd", values, affine, "RAS", **header)
    assert "expected both, and one of the spaces left-posterior-superior" in refusal(path)


def test_an_nrrd_of_colours_and_one_in_other_units(tmp_path: Path) -> None:
    values, affine = base()
    path = tmp_path / "a.nrrd"
    directions = np.vstack([[np.nan] * 3, affine[:3, :3].T])
    fields = {"space": "LPS", "space directions": directions, "kinds": ["RGB-color", "domain", "domain", "domain"]}
    nrrd.write(str(path), np.stack([values] * 3), fields)
    assert "RGB-color, domain, domain, domain: several volumes, vectors or colours" in refusal(path)
    assert "its space units are" in refusal(write_nrrd(path, values, affine, "RAS", **{"space units": ["m", "m", "m"]}))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"NDims": 2}, r"2 dimensions \(NDims\); expected 3"),
        ({"ElementSpacing": None}, "no ElementSpacing"),
        ({"ElementSpacing": "0 1 1"}, "expected three lengths above 0"),
        ({"ElementNumberOfChannels": 3}, "one number a voxel"),
        ({"ElementType": "MET_ASCII_CHAR"}, "ElementType MET_ASCII_CHAR"),
        ({"DimSize": "7 6"}, "expected three sizes"),
        ({"DimSize": "7 6 50"}, "it is truncated: 420 bytes of voxels, its header says 4200"),
        ({"ElementDataFile": "LIST"}, "expected LOCAL or one file beside it"),
        ({"ElementDataFile": "../a.raw"}, "expected LOCAL or one file beside it"),
        ({"ElementDataFile": "a.raw"}, "No such file"),
        ({"Offset": "1 2"}, "no sound MetaImage file"),
        ({"CompressedData": True}, "no sound MetaImage file"),
    ],
)
def test_a_metaimage_with_a_faulty_header(tmp_path: Path, header: dict[str, Any], expected: str) -> None:
    values, affine = base()
    path = write_mha(tmp_path / "a.mha", values, affine, **header)
    with pytest.raises(MedSoftError, match=expected):
        read_volume(path)


def test_every_nifti_that_comes_with_nibabel_is_read_or_refused_in_one_line() -> None:
    read, refusals = [], []
    for path in sorted(Path(nibabel.testing.data_path).glob("*.nii*")):
        try:
            read.append((path.name, read_volume(path).values.shape))
        except MedSoftError as error:
            refusals.append((path, str(error)))
    assert all("\n" not in text and str(path) in text for path, text in refusals)
    assert ("anatomical.nii", (33, 41, 25)) in read
    assert {path.name for path, _ in refusals} >= {"example4d.nii.gz"}
