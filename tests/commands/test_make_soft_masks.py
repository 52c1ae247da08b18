"""tool/make_soft_masks.py: every source, what comes out, and what is refused."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from tiny import ROOT, call

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import fingerprint
from ldm.core.run_folder import RunFolder
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.masks import SIDES, equivalent_diameter, lesion_shaped, soften
from ldm.data.png import write_png
from ldm.data.preparation import sample_identity
from tool import make_soft_masks


def test_sides_are_those_of_the_library() -> None:
    assert make_soft_masks.SIDES == SIDES


@pytest.fixture
def data(tmp_path: Path, write_sample: Callable[..., Path]) -> Path:
    """Two samples of 60 x 80 pixels: `sick` with a lesion, `well` with a labelled vertebra and neighbours."""
    image = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    lesion = np.zeros((60, 80), np.uint8)
    lesion[20:26, 30:41] = 255
    labels = np.zeros((60, 80), np.uint8)
    labels[10:50, 20:60], labels[52:58, 20:60] = 1, 3
    meta = {"patient_id": "p1", "lesion_type": "osteolytic", "spacing_mm": 0.5}
    write_sample(tmp_path / "data" / "sick", image=image, mask=lesion, anatomy=labels, meta=meta)
    write_sample(tmp_path / "data" / "deep" / "well", prompt="healthy", image=image, mask=None, anatomy=labels)
    return tmp_path / "data"


def make(data: Path, out: Path, *more: Any) -> int:
    return call(make_soft_masks, "--data", data, "--output_dir", out, *more)


def masks(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return read_image(folder / "mask.png") > 0, read_image(folder / "soft_mask.png").astype(np.float32) / 255


def test_from_lesion_masks(data: Path, tmp_path: Path) -> None:
    assert make(data, tmp_path / "out", "--feather", 3, "--feather_unit", "mm") == 3  # the healthy one has no mask
    hard, soft = masks(tmp_path / "out" / "sick")
    lesion = read_image(data / "sick" / "mask.png") > 0
    np.testing.assert_array_equal(hard, lesion)
    np.testing.assert_array_equal(soft, soften(lesion, 6))  # 3 mm at 0.5 mm a pixel
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert (reject["sample_id"], reject["reason"]) == ("deep/well", "has no mask")
    (sample,) = load_samples(tmp_path / "out")[0]
    assert (sample.prompt, sample.patient_id, sample.lesion_type) == ("lytic lesion", "p1", "osteolytic")
    assert (tmp_path / "out" / "sick" / "image.png").read_bytes() == (data / "sick" / "image.png").read_bytes()


def test_from_anatomy_labels(data: Path, tmp_path: Path) -> None:
    given = ["--source", "anatomy", "--labels", 1, 3, "--feather", 4, "--feather_unit", "pixels"]
    assert make(data, tmp_path / "out", *given) == 0
    for name in ("sick", "deep/well"):
        hard, soft = masks(tmp_path / "out" / name)
        np.testing.assert_array_equal(hard, read_image(data / name / "anatomy.png") > 0)
        assert (soft[hard] == 1).all()
        assert 0 < soft[8, 30] < 1
    assert make(data, tmp_path / "more", "--source", "anatomy", "--labels", 1, 2) == 0
    with pytest.raises(MedSoftError, match=r"no mask could be made; first: .*nothing is marked by its anatomy"):
        make(data, tmp_path / "none", "--source", "anatomy", "--labels", 4)


def test_from_the_annotations_own_box_and_from_a_file_of_boxes(data: Path, tmp_path: Path) -> None:
    assert make(data, tmp_path / "own", "--source", "box", "--feather", 0) == 3
    hard, soft = masks(tmp_path / "own" / "sick")
    np.testing.assert_array_equal(hard, read_image(data / "sick" / "mask.png") > 0)  # the lesion is a rectangle
    np.testing.assert_array_equal(soft, hard)
    boxes = {"deep/well": [[0.5, 0.5, 0.25, 0.1], [0, 0, 0.05, 0.1]], "sick": [0.9, 0.9, 0.1, 0.1]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    assert make(data, tmp_path / "given", "--source", "box", "--boxes", tmp_path / "boxes.json") == 0
    expected = np.zeros((60, 80), bool)
    expected[30:36, 40:60] = expected[:6, :4] = True
    np.testing.assert_array_equal(masks(tmp_path / "given" / "deep" / "well")[0], expected)
    assert masks(tmp_path / "given" / "sick")[0][54:, 72:].all()


def test_lesion_shaped_masks_follow_size_side_irregularity_and_seed(data: Path, tmp_path: Path) -> None:
    def lesion(name: str, *more: Any) -> np.ndarray:
        given = ["--source", "lesion", "--size", 0.3, 0.3, *more]
        assert make(data, tmp_path / name, *given) == 0
        return masks(tmp_path / name / "deep" / "well")[0]

    vertebra = read_image(data / "deep" / "well" / "anatomy.png") == 1
    first = lesion("first")
    assert not (first & ~vertebra).any()
    assert equivalent_diameter(first) == pytest.approx(0.3 * 40, rel=0.35)
    assert not np.array_equal(first, lesion("seed", "--seed", 1))
    middle = {"left": (1, 40, -1), "right": (1, 40, 1), "top": (0, 30, -1), "bottom": (0, 30, 1)}
    for side, (axis, edge, sign) in middle.items():
        for seed in range(3):
            centre = np.argwhere(lesion(f"{side}{seed}", "--side", side, "--seed", seed)).mean(axis=0)[axis]
            assert sign * (centre - edge) > -3, side
    smooth, rough = (lesion(f"i{k}", "--irregularity", k) for k in (0, 1))
    assert roundness(smooth) > roundness(rough) + 0.05


def roundness(hard: np.ndarray) -> float:
    """Share of the convex hull that is filled."""
    import cv2

    (outline,), _ = cv2.findContours(hard.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.contourArea(outline) / cv2.contourArea(cv2.convexHull(outline))


def test_lesion_in_a_half_without_room_takes_the_other() -> None:
    region = np.zeros((20, 20), bool)
    region[5:15, 5:15] = True
    region[5:15, 10:] = False
    region[5, 14] = True  # the bounding box reaches further than what can hold a lesion
    for side in SIDES:
        assert lesion_shaped(region, 3, side=side).any()


def test_a_mask_that_is_soft_already_is_used_as_it_is(data: Path, tmp_path: Path) -> None:
    slope = np.interp(np.arange(80), [35, 75], [0, 255])
    ramp = np.tile(slope.astype(np.uint8), (60, 1))
    write_png(data / "sick" / "mask.png", ramp)
    assert make(data, tmp_path / "out") == 3
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "sick" / "soft_mask.png"), ramp)


def test_again_finishes_what_is_missing_and_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    given = ["--source", "lesion"]
    assert make(data, tmp_path / "out", *given) == 0
    kept = (tmp_path / "out" / "sick" / "mask.png").stat().st_mtime_ns
    (tmp_path / "out" / "deep" / "well" / "soft_mask.png").unlink()
    (tmp_path / "out" / ".partial-x").mkdir()
    assert make(data, tmp_path / "out", *given) == 0
    assert (tmp_path / "out" / "deep" / "well" / "soft_mask.png").exists()
    assert (tmp_path / "out" / "sick" / "mask.png").stat().st_mtime_ns == kept
    assert not list((tmp_path / "out").rglob(".partial-*"))
    with pytest.raises(UsageError, match=r"holds masks of another run \(seed: 0 -> 1\); .*--overwrite"):
        make(data, tmp_path / "out", *given, "--seed", 1)
    assert make(data, tmp_path / "out", *given, "--seed", 1, "--overwrite") == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and holds no masks of this command"):
        make(data, tmp_path / "thesis", *given, "--overwrite")


def test_a_corrected_meta_json_is_another_run(data: Path, tmp_path: Path) -> None:
    """Ids and other keys are written into the masks' folders, which would keep the wrong ones."""
    assert make(data, tmp_path / "out") == 3
    path = data / "sick" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patient_id": "p9", "site": "north"}))
    with pytest.raises(UsageError, match=r"holds masks of another run \(content_of_data"):
        make(data, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--boxes", "b.json"], "--boxes goes with --source box"),
        (["--size", "0.5", "0.2"], r"--size: expected two rising numbers .*, found \[0\.5, 0\.2\]"),
        (["--size", "0.5", "1.2"], "--size: expected"),
        (["--irregularity", "2"], "--irregularity: expected a number from 0 to 1, found 2"),
        (["--source", "anatomy", "--labels", "1", "20"], "--labels: expected a whole number from 0 to 4, found 20"),
        (["--feather", "-1"], "--feather: expected a number from 0 to "),
    ],
)
def test_wrong_usage(data: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(data, tmp_path / "out", *flags)


def test_paths_that_contradict_each_other(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        make(tmp_path / "nowhere", tmp_path / "out")
    for out in (data, data / "inside", tmp_path):
        with pytest.raises(UsageError, match="lies inside --data or holds it"):
            make(data, out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a JSON object from sample_id to box, found list"),
        ({"sick": [0.5, 0.5, 0.6, 0.1]}, r"sick: \[0.5, 0.5, 0.6, 0.1\] is no box inside the image"),
        ({"sick": [0.5, 0.5, 0, 0.1]}, "is no box inside the image"),
        ({"sick": [[0.5, 0.5, 0.1]]}, "is no box inside the image"),
        ({"sick": "0.5"}, "is no box inside the image"),
        ({"sick": [-0.1, 0.5, 0.2, 0.1]}, "is no box inside the image"),
        ({"sick": [math.nan, 0.5, 0.2, 0.1]}, "not valid JSON"),
        ({"nobody": [0.5, 0.5, 0.1, 0.1]}, "'nobody' is no sample of"),
    ],
)
def test_bad_boxes(data: Path, tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(MedSoftError, match=message):
        make(data, tmp_path / "out", "--source", "box", "--boxes", tmp_path / "boxes.json")
    assert not (tmp_path / "out").exists()


def test_two_equal_commands_at_once_both_end_well(data: Path, tmp_path: Path) -> None:
    """The test holds the folder until both say that they wait: whoever comes second finds the work of the first."""
    out = tmp_path / "out"
    command = ["tool/make_soft_masks.py", "--source", "lesion", "--data", data, "--output_dir", out]
    waiting = "another run is writing here at this moment; waiting for it to end"
    with RunFolder(out, "soft_masks.json").lock():
        both = [children.start(*command, folder=ROOT) for _ in range(2)]
        for each in both:
            while waiting not in each.said_until_now():
                assert each.process.exitcode is None, each.wait(1)
                time.sleep(0.02)
    done = [each.wait(120) for each in both]
    assert [each.returncode for each in done] == [0, 0]
    assert sorted("already complete (2 soft masks)" in each.stdout for each in done) == [False, True]
    assert make(data, tmp_path / "alone", "--source", "lesion") == 0
    assert files(out) == files(tmp_path / "alone")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_masks_of_the_older_version_are_known(data: Path, tmp_path: Path) -> None:
    """It stored a fingerprint of the flags as they were given, the boxes, and the samples."""
    assert make(data, tmp_path / "out", "--source", "lesion") == 0
    record = tmp_path / "out" / "soft_masks.json"
    flags = {"data": data, "source": "lesion", "labels": [1], "boxes": None, "feather": 0.25, "side": None, "seed": 0}
    flags |= {"feather_unit": "diameter", "size": [0.35, 0.7], "irregularity": None}
    identities = [sample_identity(sample) for sample in load_samples(data)[0]]
    old = {"run": fingerprint([flags, {}, identities]), "complete": True, "masks": 2, "rejected": 0, "source": "lesion"}
    record.write_text(json.dumps(old))
    assert make(data, tmp_path / "out", "--source", "lesion") == 0
    assert json.loads(record.read_text()) == old  # complete: nothing was written
    with pytest.raises(UsageError, match="the record does not say which"):
        make(data, tmp_path / "out", "--source", "lesion", "--seed", 1)
