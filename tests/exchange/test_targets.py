"""Slices chosen of a volume: the vertebra they are about, its lesion, what is healthy, what is refused and left out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import AXIAL, ORIENTATIONS, Spine, spine, turned

from ldm.core.errors import MedSoftError, UsageError
from ldm.exchange.targets import BESIDE_IT, DISEASED, REACHED, Cut, LeftOut, check_asked, choose
from ldm.volumes.labels import Labels, Lesion
from ldm.volumes.volume import PLANES, Volume

STRUCTURES = {29: "L3", 30: "L2", 31: "L1", 79: "canal"}  # of the spine that the tests make, the lowest first
MADE = spine()
INDEX = np.stack(np.meshgrid(*map(np.arange, MADE.labels.shape), indexing="ij"), -1)
PLACES = INDEX @ MADE.affine[:3, :3].T + MADE.affine[:3, 3]


def volume(made: Spine = MADE) -> Volume:
    return Volume(made.image, made.affine, acquired="axial", name="image")


def labels(values: np.ndarray = MADE.labels, structures: dict[int, str] = STRUCTURES) -> Labels:
    return Labels(values, structures)


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """Voxels around a place in mm (left, posterior, head; the L2 body's centre is 0, -8, 0)."""
    return ((PLACES - centre) ** 2).sum(-1) < radius**2


def lesion(mask: np.ndarray = MADE.lesion, name: str = "lesion", **more: str) -> Lesion:
    return Lesion(mask, name, **more)


def names(cuts: list[Cut]) -> list[str]:
    return [cut.name for cut in cuts]


@pytest.mark.parametrize("plane", PLANES)
def test_a_lesion_and_the_healthy_vertebrae_beside_it(plane: str) -> None:
    cuts, left_out = choose(volume(), labels(), [lesion()], plane=plane)
    assert [(cut.level, cut.lesion is not None) for cut in cuts] == [("L1", False), ("L2", True), ("L3", False)]
    assert left_out == [LeftOut("L2", DISEASED)]
    axis = PLANES.index(plane)
    for cut in cuts:
        assert cut.name == f"{cut.level}_{cut.image.index:03d}"
        assert cut.anatomy is not None
        assert cut.anatomy.shape == cut.image.pixels.shape
        number = {"L1": 31, "L2": 30, "L3": 29}[cut.level]
        numbers = np.moveaxis(MADE.labels, axis, 0)[cut.image.index]
        # Sagittal and coronal slices stand: head up; an axial one lies: anterior up.
        shown = numbers.T[::-1] if plane != "axial" else numbers.T
        assert not (cut.anatomy[(shown == 0)]).any()
        assert np.array_equal(cut.anatomy == 4, shown == 79)
        assert ((cut.anatomy == 1) <= (shown == number)).all()
        assert ((cut.anatomy == 2) <= ((shown > 28) & (shown < 40) & (shown != number))).all()
    middle = cuts[1]
    areas = np.moveaxis(MADE.lesion, axis, 0).sum(axis=(1, 2))
    assert middle.lesion is not None
    assert np.count_nonzero(middle.lesion) == areas.max()
    assert middle.image.index == areas.argmax()
    assert middle.lesion_of is not None
    assert middle.lesion_of.name == "lesion"


def test_the_body_is_what_the_slice_is_about_not_its_arch() -> None:
    (cut,), _ = choose(volume(), labels(), [], target=["L2"])
    rows, columns = np.nonzero(cut.anatomy == 1)
    assert (columns.max() - columns.min() + 1) * cut.image.spacing[1] <= 24  # front to back; 22 mm without the arch
    assert (rows.max() - rows.min() + 1) * cut.image.spacing[0] <= 17


@pytest.mark.parametrize("slices", ["lesion", "all", 2])
def test_slices_of_a_lesion(slices: str | int) -> None:
    cuts, _ = choose(volume(), labels(), [lesion()], slices=slices, target=["L2"])
    areas = MADE.lesion.sum(axis=(1, 2))
    expected = np.flatnonzero(areas >= max(4, 0.1 * areas.max()))
    assert len(cuts) == (2 if slices == 2 else len(expected))
    assert {cut.image.index for cut in cuts} <= {*expected.tolist()}
    for cut in cuts:
        assert cut.lesion is not None
        assert np.array_equal(cut.lesion, MADE.lesion[cut.image.index].T[::-1])


@pytest.mark.parametrize(("slices", "number"), [("middle", 1), ("lesion", 0), (3, 3), ("all", None)])
def test_slices_of_a_healthy_vertebra(slices: str | int, number: int | None) -> None:
    cuts, left_out = choose(volume(), labels(), [], slices=slices, target=["L1"])
    body = (MADE.labels == 31) & (np.arange(56)[None, :, None] < 40)
    across = np.flatnonzero(body.any(axis=(1, 2)))
    assert len(cuts) == (number if number is not None else len(cuts))
    assert all(cut.lesion is None and cut.lesion_of is None for cut in cuts)
    assert all(across[0] <= cut.image.index <= across[-1] for cut in cuts)
    assert len({cut.image.index for cut in cuts}) == len(cuts)
    assert slices != "all" or len(cuts) > 12
    assert left_out == []


def test_the_limit_keeps_lesions_first_and_says_what_is_left() -> None:
    cuts, left_out = choose(volume(), labels(), [lesion()], slices=4, limit=6)
    assert [cut.level for cut in cuts] == ["L1", "L2", "L2", "L2", "L2", "L3"]
    assert LeftOut("6 slices", "beyond the limit of 6") in left_out


def test_two_lesions_in_two_vertebrae_are_two_samples() -> None:
    both = ball((0, -8, 0), 4) | ball((0, -8, 20), 4)
    cuts, _ = choose(volume(), labels(), [lesion(both)], slices="lesion")
    middle = {cut.level: cut for cut in cuts if cut.image.index == 20}
    assert {*middle} == {"L1", "L2"}
    assert not (middle["L1"].lesion & middle["L2"].lesion).any()
    assert np.array_equal(middle["L1"].lesion | middle["L2"].lesion, both[20].T[::-1])
    assert "another lesion is seen in this slice: L2" in middle["L1"].notes


def test_lesions_far_apart_in_one_vertebra_are_samples_of_their_own() -> None:
    far = ball((-9, -8, 0), 3) | ball((9, -8, 0), 3.5)
    cuts, _ = choose(volume(), labels(), [lesion(far)], plane="axial")
    assert [cut.level for cut in cuts if cut.lesion is not None] == ["L2", "L2"]
    assert names(cuts)[1:3] == ["L2_029_a", "L2_029_b"]
    assert not (cuts[1].lesion & cuts[2].lesion).any()
    assert cuts[1].notes == ("another lesion is seen in this slice: L2_b",)


def test_parts_near_each_other_are_one_lesion() -> None:
    near = ball((-3, -8, 0), 2.5) | ball((4, -8, 0), 2.5)
    cuts, _ = choose(volume(), labels(), [lesion(near)], plane="axial", target=["L2"])
    assert len(cuts) == 1
    assert np.array_equal(cuts[0].lesion, near[..., cuts[0].image.index].T)


def test_many_lesions_in_one_file_and_a_small_one_is_no_stray() -> None:
    mask = MADE.labels == 29
    mask[:, :20] = False  # half of L3, and a small lesion in L1
    mask |= ball((0, -8, 20), 1.6)
    cuts, _ = choose(volume(), labels(), [lesion(mask)])
    assert {cut.level for cut in cuts if cut.lesion is not None} == {"L1", "L3"}


def test_two_segments_in_one_vertebra_are_two_lesions_each_with_its_own_words() -> None:
    found = [lesion(ball((-4, -8, 0), 3), "a"), lesion(ball((4, -8, 0), 3), "b")]
    cuts, _ = choose(volume(), labels(), found, target=["L2"])
    assert [cut.lesion_of.name for cut in cuts] == ["a", "b"]
    assert len({*names(cuts)}) == 2


def test_a_lesion_that_reaches_into_a_second_vertebra_is_divided() -> None:
    across = ball((0, -8, 10), 7)  # between L2 and L1
    cuts, _ = choose(volume(), labels(), [lesion(across)], slices="lesion", plane="sagittal")
    assert {cut.level for cut in cuts} == {"L1", "L2"}
    at = {cut.level: cut for cut in cuts if cut.image.index == 20}
    assert np.array_equal(at["L1"].lesion ^ at["L2"].lesion, across[20].T[::-1])
    assert "the lesion reaches into L1 too and was divided" in at["L2"].notes


def test_a_vertebra_that_a_lesion_only_touches_is_not_healthy() -> None:
    cuts, left_out = choose(volume(), labels(), [lesion(ball((0, -8, 4.5), 8.5))])
    assert [(cut.level, cut.lesion is not None) for cut in cuts] == [("L2", True), ("L3", False)]
    assert LeftOut("L1", REACHED) in left_out


def test_a_lesion_where_the_label_has_a_hole_belongs_to_the_vertebra() -> None:
    destroyed = np.where(MADE.lesion, 0, MADE.labels)  # the segmentation left the lytic bone out
    cuts, left_out = choose(volume(), labels(destroyed), [lesion()])
    (cut,) = [cut for cut in cuts if cut.lesion is not None]
    assert cut.level == "L2"
    assert "0% of the lesion lies in the label of L2" in cut.notes
    assert not any(each.rejected for each in left_out)


@pytest.mark.parametrize("place", [(0, -25, 0), (0, 8, 0)], ids=["soft tissue", "cord"])
def test_a_lesion_outside_every_vertebra_is_refused_and_what_lies_beside_it_is_not_healthy(place: tuple) -> None:
    mask = ball(place, 3)
    cuts, left_out = choose(volume(), labels(), [lesion(mask, "metastasis 2")])
    refused = [each for each in left_out if each.rejected]
    voxels = np.count_nonzero(mask)
    reason = f"{voxels} of its {voxels} voxels lie outside of every vertebra of the labels"
    assert refused == [LeftOut("metastasis 2", reason, True)]
    assert [cut.level for cut in cuts] == ["L1", "L3"]
    assert LeftOut("L2", BESIDE_IT) in left_out
    assert all("another lesion is seen in this slice: one that was refused" in cut.notes for cut in cuts)


def test_stray_voxels_are_left_out_and_counted() -> None:
    stray = MADE.lesion.copy()
    stray[0, 0, 0] = stray[11, 24, 30] = True
    cuts, left_out = choose(volume(), labels(), [lesion(stray)], target=["L2"])
    assert len(cuts) == 1
    assert np.array_equal(cuts[0].lesion, MADE.lesion[cuts[0].image.index].T[::-1])
    assert [each for each in left_out if "stray" in each.reason] == [LeftOut("lesion", "2 stray voxels")]
    stray[20, 24, 50] = True  # in L1
    cuts, left_out = choose(volume(), labels(), [lesion(stray)])
    assert [cut.level for cut in cuts] == ["L2", "L3"]
    assert LeftOut("L1", REACHED) in left_out


def test_a_label_map_given_as_lesions_is_refused() -> None:
    cuts, left_out = choose(volume(), labels(), [lesion(MADE.labels == 30, "lesion 30")])
    assert [each.reason for each in left_out if each.rejected] == [
        "is the whole label of L2; is the lesion file a label map of vertebrae?"
    ]
    assert [cut.level for cut in cuts] == ["L1", "L3"]


def test_a_lesion_of_a_few_pixels_is_refused() -> None:
    tiny = np.zeros(MADE.labels.shape, bool)
    tiny[20, 22:24, 30] = True
    cuts, left_out = choose(volume(), labels(), [lesion(tiny)], target=["L2"])
    assert cuts == []
    assert LeftOut("L2", "its lesion has fewer than 4 pixels in every slice", True) in left_out


def test_a_vertebra_at_the_edge_is_no_healthy_sample() -> None:
    low = replace(MADE, image=MADE.image[..., 8:], labels=MADE.labels[..., 8:])  # cuts through L3
    cuts, left_out = choose(volume(low), labels(low.labels), [])
    assert [cut.level for cut in cuts] == ["L1", "L2"]
    assert left_out == [LeftOut("L3", "the edge of the image cuts it off")]
    axial, _ = choose(volume(low), labels(low.labels), [], plane="axial")
    assert [cut.level for cut in axial] == ["L1", "L2", "L3"]  # whole in each of these slices
    tip = MADE.labels.copy()
    tip[18:21, 18:21, :4] = 29  # an osteophyte that reaches the edge
    assert [cut.level for cut in choose(volume(), labels(tip), [])[0]] == ["L1", "L2", "L3"]


def test_vertebrae_of_unknown_level_have_numbers_from_the_head() -> None:
    cuts, _ = choose(
        volume(), labels(structures={31: "vertebra", 30: "vertebra", 29: "partial", 79: "canal"}), [lesion()]
    )
    assert [(cut.level, cut.name[:3], cut.lesion is None) for cut in cuts] == [
        (None, "V1_", False),
        (None, "V2_", True),
    ]


def test_the_sacrum_only_with_a_lesion_or_on_demand() -> None:
    sacrum = labels(structures=STRUCTURES | {29: "sacrum"})
    assert {cut.level for cut in choose(volume(), sacrum, [])[0]} == {"L1", "L2"}
    assert {cut.level for cut in choose(volume(), sacrum, [], target=["Sacrum"])[0]} == {"sacrum"}
    cuts, _ = choose(volume(), sacrum, [lesion(ball((0, -8, -20), 4))])
    assert [cut.level for cut in cuts if cut.lesion is not None] == ["sacrum"]


def test_without_labels_lesions_are_cut_and_nothing_is_healthy() -> None:
    cuts, left_out = choose(volume(), None, [lesion()])
    assert [(cut.level, cut.anatomy) for cut in cuts] == [(None, None)]
    assert np.count_nonzero(cuts[0].lesion) == MADE.lesion.sum(axis=(1, 2)).max()
    assert left_out == []


@pytest.mark.parametrize("known", [True, False])
def test_a_projection_is_one_slice(known: bool) -> None:
    flat = (slice(18, 21), slice(None), slice(None))  # its third axis becomes the only frame
    values = [each[flat].max(axis=0)[:, ::-1, None] for each in (MADE.image, MADE.labels, MADE.lesion)]
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    image = Volume(values[0], affine, acquired="projection", name="radiograph")
    cuts, _ = choose(image, labels(values[1]) if known else None, [lesion(values[2])])
    assert [cut.level for cut in cuts] == (["L1", "L2", "L3"] if known else [None])
    (cut,) = [cut for cut in cuts if cut.lesion is not None]
    assert cut.image.plane == "projection"
    assert np.count_nonzero(cut.lesion) == np.count_nonzero(values[2])


def test_without_labels_and_lesions_slices_of_the_volume_are_cut() -> None:
    cuts, _ = choose(volume(), None, [], slices=4)
    assert [cut.image.index for cut in cuts] == [5, 15, 25, 35]
    assert all(cut.lesion is None and cut.anatomy is None for cut in cuts)
    assert choose(volume(), None, [])[0][0].image.index in (19, 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slices": "some"}, "--slices: expected middle, lesion, all or a number above 0, found some"),
        ({"slices": 0}, "--slices: .* found 0"),
        ({"target": ["L3", "disc"]}, "--target: expected levels such as L3, or sacrum, found disc"),
    ],
)
def test_flags_that_cannot_be(given: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_asked(**{"slices": "middle", "target": [], **given})


def test_lesions_in_the_labels_that_nobody_reads_make_nothing_healthy() -> None:
    told = replace(labels(), lesions=("lytic lesion",))
    with pytest.raises(MedSoftError, match=r"image: its labels hold lesions too \(lytic lesion\).* as --lesions"):
        choose(volume(), told, [])
    assert len(choose(volume(), told, [lesion()])[0]) == 3


def test_a_target_that_is_not_there_is_said() -> None:
    assert choose(volume(), labels(), [], target=["T4"]) == ([], [LeftOut("T4", "is not in the labels")])
    with pytest.raises(MedSoftError, match="--target needs to know where the vertebrae are; give --labels"):
        choose(volume(), None, [], target=["L3"])


@pytest.mark.parametrize("axes", ORIENTATIONS[::5])
def test_the_same_slices_come_out_of_every_stored_orientation(axes: str) -> None:
    def stored(values: np.ndarray) -> np.ndarray:
        return turned(values, MADE.affine, axes)[0]

    image, affine = turned(MADE.image, MADE.affine, axes)
    expected, _ = choose(volume(), labels(), [lesion()])
    found, _ = choose(Volume(image, affine), labels(stored(MADE.labels)), [lesion(stored(MADE.lesion))])
    assert names(found) == names(expected)
    for cut, other in zip(found, expected, strict=True):
        assert np.array_equal(cut.image.pixels, other.image.pixels)
        assert np.array_equal(cut.anatomy, other.anatomy)
        assert (cut.lesion is None) == (other.lesion is None)
        assert cut.lesion is None or np.array_equal(cut.lesion, other.lesion)
    assert AXIAL == "LPH"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-18, 18), st.floats(-20, 22), st.floats(-28, 28), st.floats(1.5, 9)), min_size=1, max_size=4
    ),
    st.sampled_from(PLANES),
    st.sampled_from(["middle", "lesion", "all", 2]),
)
def test_whatever_the_lesions_are_masks_and_healthy_slices_are_right(
    balls: list, plane: str, slices: str | int
) -> None:
    mask = np.logical_or.reduce([ball((x, y, z), radius) for x, y, z, radius in balls])
    cuts, _ = choose(volume(), labels(), [lesion(mask)] if mask.any() else [], plane=plane, slices=slices)
    assert len({*names(cuts)}) == len(cuts)
    for cut in cuts:
        drawn = np.moveaxis(mask, PLANES.index(plane), 0)[cut.image.index].T
        drawn = drawn if plane == "axial" else drawn[::-1]
        if cut.lesion is not None:
            assert np.count_nonzero(cut.lesion) >= 4
            assert (cut.lesion <= drawn).all()
        else:
            number = {"L1": 31, "L2": 30, "L3": 29}[cut.level]
            assert not (mask & (MADE.labels == number)).any()
    together = [cut for cut in cuts if cut.lesion is not None and cut.image.index == cuts[0].image.index]
    assert np.sum([cut.lesion for cut in together], axis=0).max() <= 1 if together else True
