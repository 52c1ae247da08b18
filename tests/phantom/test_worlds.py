"""The worlds: each has the property that it was made for, measured from pixels and sentences, and keeps all others."""

import functools
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ldm.core.errors import UsageError
from ldm.data.crop import Fit
from ldm.data.images import read_image
from ldm.data.masks import Feather, Mask, lesion_shaped, soft_mask_for
from ldm.phantom import shapes
from ldm.phantom.findings import SHAPES
from ldm.phantom.spines import LESION_TYPES, SEVERITIES, Phantom, render_phantom
from ldm.phantom.worlds import SYNONYMS, WORLDS
from tool import make_phantoms

OTHERS = [name for name in WORLDS if name != "standard"]
REACH = {"scanner": 4, "second_scanner": 4}  # pixels around a lesion that a blur takes into it; else two


def _run(*arguments: str | Path | int) -> int:
    return make_phantoms.main(make_phantoms.build_parser().parse_args([str(each) for each in arguments]))


@functools.cache
def _made(world: str, index: int, kind: str | None, severity: str | None = None, image: int = 0) -> Phantom:
    return render_phantom(5, index, kind, severity, image, world=world)


def _twins(world: str, count: int, kind: str, severity: str = "severe") -> list[tuple[Phantom, np.ndarray]]:
    """Diseased phantoms, and by how much each differs from its healthy twin, as a share of the most."""
    found = []
    for index in range(count):
        phantom, healthy = _made(world, index, kind, severity), _made(world, index, None)
        change = np.abs(phantom.image.astype(float) - healthy.image)
        found.append((phantom, change / np.percentile(change[change > 0], 98)))
    return found


def _around(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


def _diameter(region: np.ndarray) -> float:
    return 2 * float(np.sqrt(region.sum() / np.pi))


@pytest.mark.parametrize("world", OTHERS)
def test_patients_are_those_of_the_standard_world_and_twins_differ_by_the_lesion_alone(world: str) -> None:
    for index, kind in enumerate(WORLDS[world].lesion_types):
        own = WORLDS[world].sign_of(5, index, None) or kind  # a twin has the disease that its patient shows elsewhere
        phantom, healthy, standard = _made(world, index, own), _made(world, index, None), _made("standard", index, None)
        assert np.array_equal(phantom.image, render_phantom(5, index, own, world=world).image)
        assert np.array_equal(phantom.anatomy, standard.anatomy)
        assert (phantom.sample_id, healthy.sample_id) == (standard.sample_id,) * 2
        lesion = phantom.anatomy == 1 if world == "edge" else phantom.mask
        beyond = ~_around(lesion, REACH.get(world, 2))
        assert np.array_equal(phantom.image[beyond], healthy.image[beyond])
        assert not np.array_equal(phantom.image[~beyond], healthy.image[~beyond])


def _edge(change: np.ndarray) -> float:
    """The width of a lesion's edge, from 0 to all of the change, as a share of the diameter at half of it."""
    region = cv2.morphologyEx((change > 0).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    region = cv2.morphologyEx(region, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    depth = cv2.distanceTransform(region, cv2.DIST_L2, 5)
    steps = np.arange(0.75, depth.max() - 1, 0.5)
    profile = np.maximum.accumulate([change[np.abs(depth - step) < 0.75].mean() for step in steps])
    low, middle, high = np.interp(np.array([0.2, 0.5, 0.8]) * profile[-1], profile, steps)
    return (high - low) / 0.6 / _diameter(depth > middle)


def test_edges_are_ramps_of_a_tenth_to_more_than_half_of_the_diameter() -> None:
    crisp, ramps = ([_edge(change) for _, change in _twins(world, 12, "osteolytic")] for world in ("standard", "edge"))
    assert np.median(crisp) < 0.2
    assert np.median(ramps) > 1.7 * np.median(crisp)
    assert max(ramps) > 0.45
    assert max(ramps) > 2.5 * min(ramps)


def test_an_annotator_marks_a_random_level_of_a_ramp_and_sometimes_a_box() -> None:
    inside, boxes, masks = [], 0, 0
    for kind, severity in itertools.product(("osteoblastic", "osteolytic"), ("moderate", "severe")):
        for phantom, change in _twins("edge", 12, kind, severity):
            rows, columns = np.nonzero(phantom.mask)
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == phantom.mask.sum()
            boxes, masks = boxes + box, masks + 1
            if not box:
                rim = phantom.mask & (cv2.erode(phantom.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0)
                inside.append(np.median(change[rim]))
    assert 0.1 < boxes / masks < 0.35
    assert min(inside) < 0.35
    assert max(inside) > 0.6
    assert 0.15 < np.median(inside) < 0.8


def test_the_type_shows_elsewhere_and_in_no_crop_around_a_lesion() -> None:
    fit, seen = Fit(size=64), []
    for index in range(8):
        kind = LESION_TYPES[index % 4]
        for own in (kind, None):
            phantom, standard = _made("elsewhere", index, own), _made("standard", index, own)
            change = phantom.image != standard.image
            seen.append(int((np.abs(phantom.image.astype(int) - standard.image) > 10).sum()))
            masks = [phantom.mask] if own else [lesion_shaped(phantom.anatomy == 1, k) for k in range(3)]
            for mask in masks:
                soft = soft_mask_for(Mask(mask.astype(np.float32)), Feather())
                window = fit.crop_window(change.shape, soft)
                assert not window.forward(change.astype(np.float32)).any()
            assert not (change & ~_around(phantom.anatomy == 2, 5)).any()
            assert phantom.sign in LESION_TYPES
            assert phantom.sign == (own or phantom.sign)
    assert min(seen) > 100
    assert np.median(seen) > 400


def test_few_sentences_say_what_shows_elsewhere() -> None:
    prompts = [_made("elsewhere", index, LESION_TYPES[index % 4]).prompt for index in range(24)]
    typed = [any(kind in prompt for kind in LESION_TYPES) for prompt in prompts]
    assert 0 < np.mean(typed) < 0.4
    for index, prompt in enumerate(prompts):
        assert "lesion" in prompt
        assert _made("elsewhere", index, LESION_TYPES[index % 4]).level in prompt


def test_words_are_names_that_no_other_type_has_and_the_phantom_base_does_not_know() -> None:
    vocabulary = Path(__file__).resolve().parents[2] / "models" / "phantom_base" / "biomedclip" / "vocab.txt"
    known = set(vocabulary.read_text().split()) | {
        word for name in (*shapes.FILLS, *shapes.SHAPES, *shapes.DIRECTIONS) for word in name.split()
    }
    names = [name for kind in LESION_TYPES for name in SYNONYMS[kind]]
    assert len(names) == len(set(names)) == 48
    assert not known & {name for kind in LESION_TYPES for name in SYNONYMS[kind] if name not in LESION_TYPES}
    used = set()
    for index in range(16):
        kind = LESION_TYPES[index % 4]
        phantom, standard = _made("words", index, kind), _made("standard", index, kind)
        assert np.array_equal(phantom.image, standard.image)
        assert phantom.lesion_type == kind
        found = [name for name in names if f" {name} " in f" {phantom.prompt} "]
        assert set(found) <= set(SYNONYMS[kind])
        assert found
        used |= set(found)
    assert len(used) > 8


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind not in LESION_TYPES])
def test_kinds_of_their_own_have_a_place_and_a_form(kind: str) -> None:
    sizes = []
    for severity in SEVERITIES:
        shares = []
        for index in range(5):
            phantom, healthy = _made("shape", index, kind, severity), _made("shape", index, None)
            assert kind in phantom.prompt
            assert "lesion" not in phantom.prompt
            body = phantom.anatomy == 1
            assert not (phantom.mask & ~_around(body, 3)).any()
            assert cv2.connectedComponents(phantom.mask.astype(np.uint8), connectivity=8)[0] == 2
            shares.append((phantom.mask & body).sum() / body.sum())
            change = phantom.image.astype(int) - healthy.image
            rows, columns = np.nonzero(phantom.mask)
            middle_row, middle_column = (axis.mean() for axis in np.nonzero(body))
            if kind == "wedge fracture":
                assert rows.mean() < middle_row
                assert columns.mean() < middle_column
                assert change[phantom.mask].min() < -5  # bone is lost ...
                assert change[phantom.mask].max() > 5  # ... and a new endplate is there
            if kind == "endplate erosion":
                assert abs(rows.mean() - middle_row) > 4
                assert (phantom.mask & _around(~body, 2)).sum() > 5
            if kind == "diffuse infiltration":
                assert shares[-1] > 0.7
                assert change[phantom.mask].mean() < -1
        sizes.append(np.mean(shares))
    assert sizes == sorted(sizes) or kind == "diffuse infiltration"


def _noise(image: np.ndarray) -> float:
    return float(np.median(np.abs(cv2.Laplacian(image.astype(np.float64), cv2.CV_64F))))


def _contrast(phantom: Phantom) -> float:
    """Cortical bone against the canal, so that neither noise nor what else is in view counts."""
    return float(
        np.percentile(phantom.image[phantom.anatomy == 1], 90) - np.median(phantom.image[phantom.anatomy == 4])
    )


def test_gain_blur_and_noise_are_the_patients_own_and_far_apart() -> None:
    def ratios(world: str) -> tuple[float, float]:
        images = [_made(world, index, None) for index in range(16)]
        measures = [[_noise(each.image) for each in images], [_contrast(each) for each in images]]
        low, high = np.percentile(measures, (10, 90), axis=1)
        return tuple(high / low)

    noise, contrast = ratios("scanner")
    assert noise > 3
    assert contrast > 1.6
    assert noise > 1.5 * ratios("standard")[0]
    one, other = ([_noise(_made("scanner", index, None, None, image).image) for index in range(6)] for image in (0, 1))
    assert np.corrcoef(one, other)[0, 1] > 0.9


def test_the_second_scanner_is_none_of_the_first_world() -> None:
    first = [_made("scanner", index, None) for index in range(16)]
    second = [_made("second_scanner", index, None) for index in range(8)]
    assert np.median([_contrast(each) for each in second]) < np.percentile([_contrast(each) for each in first], 15)
    grain = [[_noise(each.image) / _contrast(each) for each in group] for group in (first, second)]
    assert np.median(grain[1]) > 2 * np.median(grain[0])


def test_few_lesions_are_so_many_of_each_type_and_the_record_says_of_which_world(tmp_path: Path, capsys) -> None:
    out = tmp_path / "d"
    flags = ["--output_dir", out, "--healthy", 1, "--lesions_per_type", 2, "--seed", 5, "--world", "elsewhere"]
    assert _run(*flags) == 0
    metas = [json.loads(path.read_text()) for path in out.glob("*/meta.json")]
    assert sorted(meta["lesion_type"] or "" for meta in metas) == sorted(["", *LESION_TYPES * 2])
    assert all(meta["sign"] == (meta["lesion_type"] or meta["sign"]) for meta in metas)
    arguments = json.loads((out / "phantoms.json").read_text())["arguments"]
    assert arguments == {"version": 3, "seed": 5, "healthy": 1, "diseased": 8, "per_patient": 1, "world": "elsewhere"}
    assert _run(*flags) == 0
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"another run \(world: elsewhere -> words\)"):
        _run(*flags[:-1], "words")


@pytest.mark.parametrize("world", OTHERS)
def test_a_sheet_shows_the_kinds_of_a_world_with_their_masks(world: str, tmp_path: Path, monkeypatch) -> None:
    kinds = []

    def first(seed: int, patient: int, kind: str | None, severity: str | None, **more: str | None) -> Phantom:
        kinds.append((kind, more["world"]))
        return _made(world, 1, kind)

    monkeypatch.setattr("ldm.phantom.dataset.render_phantom", first)
    for name in ("sheet.png", "sheet.jpg"):
        assert _run("--sheet", tmp_path / name, "--world", world) == 0
    assert set(kinds) == {(kind, world) for kind in (None, *WORLDS[world].lesion_types)}
    sheet = read_image(tmp_path / "sheet.png")
    assert sheet.shape == read_image(tmp_path / "sheet.jpg").shape == (5 * (22 + 148), 6 * 148)
    rows = sheet.reshape(5, 170, -1)[1:, 22:]  # without the lines that say what they show
    plain, outlined = rows[..., :148], rows[..., 148:296]
    assert 20 < (plain != outlined).sum() < 0.1 * plain.size
    assert (outlined[plain != outlined] == 255).all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--world", "moon"], "world: expected one of standard, edge, .*, found 'moon'"),
        (["--world", "edge", "--size", "512"], "size: only the world standard has images of a given size, not edge"),
        (["--lesions_per_type", "2", "--diseased", "3"], "--lesions_per_type: .* as --diseased does; give one of them"),
        (["--limit", "2"], "--limit: only with --twins_of"),
        (["--twins_of", "a", "--world", "edge"], "--twins_of: .* takes world and size from the record"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _run("--output_dir", tmp_path / "d", *flags)
    assert not list(tmp_path.iterdir())
    assert "second_scanner" in make_phantoms.build_parser().format_help()
