"""Geometry: the same way up from 48 orientations, slices at their places, labels on the image's grid, square pixels."""

from itertools import product

import made
import numpy as np
import pytest

from ldm.core.errors import MedSoftError, UsageError
from ldm.volumes import volume as volumes
from ldm.volumes.volume import PLANES, Volume, count, cut, onto, orient, square, tilt

SHAPE, SPACING = (7, 6, 5), (0.8, 1.0, 2.5)  # to left, posterior, head


@pytest.fixture(scope="module")
def base() -> Volume:
    return Volume(made.marked(SHAPE), made.grid("LPH", SHAPE, SPACING), acquired="axial", name="base")


def stored(base: Volume, axes: str) -> Volume:
    values, affine = made.turned(base.values, base.affine, axes)
    return Volume(values, affine, acquired=volumes.frame_plane(affine), name=axes)


@pytest.mark.parametrize("axes", made.ORIENTATIONS)
def test_48_orientations_come_out_the_same_way_up(base: Volume, axes: str) -> None:
    oriented = orient(stored(base, axes))
    np.testing.assert_array_equal(oriented.values, base.values)
    np.testing.assert_allclose(oriented.affine, base.affine, atol=1e-9)
    left, posterior, head = 5, 4, 3
    views = {
        "sagittal": base.values[left, :, ::-1].T,  # head up, anterior at the left
        "coronal": base.values[:, posterior, ::-1].T,  # head up, the patient's right at the left
        "axial": base.values[:, :, head].T,  # anterior up, the patient's right at the left
    }
    for plane, index in zip(PLANES, (left, posterior, head), strict=True):
        np.testing.assert_array_equal(cut(stored(base, axes), plane, index).pixels, views[plane])


@pytest.mark.parametrize("axes", made.ORIENTATIONS)
def test_pixels_lie_at_their_voxels_places_and_the_turn_leads_from_the_stored_frame(base: Volume, axes: str) -> None:
    given = stored(base, axes)
    inverse = np.linalg.inv(given.affine)
    acquired = 0
    for plane in PLANES:
        for index in range(count(given, plane)):
            made_slice = cut(given, plane, index)
            for row, column in product((0, 2, made_slice.pixels.shape[0] - 1), (0, 1)):
                voxel = np.rint(inverse @ made_slice.affine @ (row, column, 0, 1)).astype(int)[:3]
                assert given.values[tuple(voxel)] == made_slice.pixels[row, column]
            if made_slice.acquired:
                acquired += 1
                frame = given.values[:, :, made_slice.frame].T
                transpose, rows, columns = made_slice.turn
                frame = frame.T if transpose else frame
                frame = frame[:: -1 if rows else 1, :: -1 if columns else 1]
                np.testing.assert_array_equal(frame, made_slice.pixels)
    assert acquired == given.values.shape[2]


def test_spacing_is_between_rows_then_between_columns(base: Volume) -> None:
    assert cut(base, "sagittal", 0).spacing == pytest.approx((2.5, 1.0))
    assert cut(base, "coronal", 0).spacing == pytest.approx((2.5, 0.8))
    assert cut(base, "axial", 0).spacing == pytest.approx((1.0, 0.8))


def test_an_oblique_grid_keeps_its_voxels_and_says_its_tilt(base: Volume) -> None:
    affine = made.grid(made.SAGITTAL, SHAPE, SPACING, turn=20)
    given = Volume(made.marked(SHAPE), affine, acquired=volumes.frame_plane(affine))
    assert given.acquired == "sagittal"
    assert 10 < tilt(given) < 20
    assert tilt(base) == 0
    sagittal = cut(given, "sagittal", 1)
    assert sagittal.acquired
    np.testing.assert_array_equal(np.sort(sagittal.pixels.ravel()), np.sort(given.values[:, :, sagittal.frame].ravel()))


def test_orient_copies_nothing(base: Volume) -> None:
    assert np.shares_memory(orient(stored(base, "FAR")).values, base.values)


def test_a_slice_that_does_not_exist_is_refused(base: Volume) -> None:
    with pytest.raises(MedSoftError, match="base: slice 7 of 7 sagittal slices; expected 0 to 6"):
        cut(base, "sagittal", 7)


def test_a_projection_has_one_slice_of_its_own_plane() -> None:
    affine = made.grid("LFP", (5, 4, 1), (1, 1, 1))
    values = np.arange(20, dtype=np.uint16).reshape(5, 4, 1)
    radiograph = Volume(values, affine, acquired="projection", calibrated=False, name="film")
    view = cut(radiograph, "projection", 0)
    np.testing.assert_array_equal(view.pixels, values[:, :, 0].T)
    assert (view.spacing, view.frame, view.turn) == (None, 0, (False, False, False))
    assert square(view) is view
    with pytest.raises(MedSoftError, match="how many mm"):
        square(view, 1.0)
    with pytest.raises(MedSoftError, match="film: it is a projection and has no sagittal slices"):
        cut(radiograph, "sagittal", 0)


def test_a_volume_has_no_projection(base: Volume) -> None:
    with pytest.raises(MedSoftError, match="a volume and has no projection"):
        count(base, "projection")


@pytest.mark.parametrize("axes", made.ORIENTATIONS)
def test_labels_stored_in_another_order_fit_without_resampling(base: Volume, axes: str) -> None:
    values, resampled = onto(stored(base, axes), base)
    np.testing.assert_array_equal(values, base.values)
    assert not resampled


def test_labels_with_other_borders_are_cropped_and_filled_without_resampling(base: Volume) -> None:
    affine = base.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (1, 0, -1)
    labels = Volume(made.marked((7, 6, 5), seed=3), affine)
    values, resampled = onto(labels, base)
    assert not resampled
    np.testing.assert_array_equal(values[1:, :, :4], labels.values[:6, :, 1:])
    assert not values[0].any()
    assert not values[:, :, 4].any()


def test_labels_of_another_spacing_are_taken_from_the_nearest_voxel(base: Volume) -> None:
    fine = np.repeat(np.repeat(base.values, 2, 0), 3, 2)
    affine = base.affine @ np.diag([1 / 2, 1, 1 / 3, 1])
    affine[:3, 3] = (base.affine @ (-0.25, 0, -1 / 3, 1))[:3]
    values, resampled = onto(Volume(fine, affine), base)
    assert resampled
    np.testing.assert_array_equal(values, base.values)


def test_labels_of_a_turned_grid_are_taken_from_the_nearest_voxel() -> None:
    shape, centre = (40, 40, 40), np.array([4.0, -3.0, 6.0])

    def ball(affine: np.ndarray) -> Volume:
        places = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
        return Volume((((places - centre) ** 2).sum(-1) < 12**2).astype(np.uint8) * 29, affine)

    grid = ball(made.grid("LPH", shape, (1, 1, 1)))
    values, resampled = onto(ball(made.grid("PFL", shape, (1, 1, 1), turn=30)), grid)
    assert resampled
    assert set(np.unique(values)) == {0, 29}
    both = (values > 0) & (grid.values > 0)
    assert 2 * both.sum() / ((values > 0).sum() + (grid.values > 0).sum()) > 0.96
    found = (grid.affine @ (*np.argwhere(values).mean(0), 1))[:3]
    np.testing.assert_allclose(found, centre, atol=0.05)


@pytest.mark.parametrize("turn", [0, 30])
def test_labels_elsewhere_in_space_are_refused(base: Volume, turn: float) -> None:
    affine = made.grid("LPH", SHAPE, SPACING, turn)
    affine[0, 3] += 100
    with pytest.raises(MedSoftError, match=r"other\.nii: its grid does not overlap .* another patient"):
        onto(Volume(base.values, affine, name="other.nii"), base)


@pytest.mark.parametrize("size", [None, 0.5, 1.7, 3.0])
def test_square_pixels_keep_a_marked_points_place(size: float | None) -> None:
    shape, spacing = (40, 50, 30), (1.0, 0.977, 2.0)
    values = np.zeros(shape, np.int16)
    values[20, 33:36, 11:14] = 1000
    given = Volume(values, made.grid("LPH", shape, spacing))
    place = (given.affine @ (20, 34, 12, 1))[:3]
    for nearest in (False, True):
        view = square(cut(given, "sagittal", 20), size, nearest=nearest)
        assert view.spacing == pytest.approx((size or 0.977,) * 2)
        weights = view.pixels / view.pixels.sum()
        centre = [(weights * index).sum() for index in np.indices(view.pixels.shape)]
        found = (view.affine @ (*centre, 0, 1))[:3]
        assert np.abs(found - place).max() < (0.5 if nearest else 0.1) * view.spacing[0]
        area = np.array(view.pixels.shape) * view.spacing
        assert (area <= np.array([30 * 2.0, 50 * 0.977]) + 1e-6).all()
        assert (area > np.array([30 * 2.0, 50 * 0.977]) - view.spacing).all()


def test_a_square_slice_is_returned_as_it_is() -> None:
    given = Volume(made.marked(SHAPE), made.grid("LPH", SHAPE, (1, 1, 1)), acquired="axial")
    view = cut(given, "axial", 2)
    assert square(view) is view
    assert square(view, 1.0) is view
    assert not square(view, 2.0).acquired


def test_area_is_averaged_where_pixels_become_larger() -> None:
    values = np.zeros((8, 8, 1), np.int16)
    values[::2] = 100
    given = Volume(values, made.grid("LPH", (8, 8, 1), (1, 1, 1)))
    np.testing.assert_allclose(square(cut(given, "axial", 0), 4.0).pixels, 50, atol=8)


def test_no_square_pixel_leaves_the_range_of_its_type() -> None:
    values = np.full((8, 8, 3), 65535, np.uint16)
    given = Volume(values, made.grid("LPH", (8, 8, 3), (1, 1, 3)))
    assert (square(cut(given, "sagittal", 0)).pixels == 65535).all()


def test_a_grid_without_extent_is_refused() -> None:
    with pytest.raises(MedSoftError, match=r"flat: the distance between voxels is 0 x 1 x 1 mm"):
        Volume(made.marked(SHAPE), np.diag([0.0, 1, 1, 1]), name="flat")


def test_a_sheared_grid_is_refused() -> None:
    affine = np.eye(4)
    affine[1, 2] = np.tan(np.deg2rad(10))
    with pytest.raises(MedSoftError, match=r"tilted: its axes are 10\.0 degrees off right angles"):
        Volume(made.marked(SHAPE), affine, name="tilted")


def test_real_values_become_integers_exactly_or_rounded_to_16_bits() -> None:
    whole = np.array([-1024.0, 0.0, 3071.0])
    values, offset, scale, rounded = volumes.to_integers(whole)
    assert (values.dtype, offset, scale, rounded) == (np.int16, 0, 1, False)
    np.testing.assert_array_equal(values, whole)
    real = np.random.default_rng(0).normal(0, 3, 1000)
    values, offset, scale, rounded = volumes.to_integers(real)
    assert rounded
    assert (values.min(), values.max()) == (0, 65535)
    np.testing.assert_allclose(offset + scale * values, real, atol=scale / 2 * 1.001)


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes.require_extra()
    monkeypatch.setattr(volumes, "find_spec", lambda name: None if name in ("gdcm", "nrrd") else object())
    with pytest.raises(UsageError, match=r"missing: gdcm, nrrd\): in the repository.* install -e '\.\[dicom\]'"):
        volumes.require_extra()
