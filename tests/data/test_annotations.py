"""Sample folders, annotation files and the split."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.core.errors import MedSoftError, UsageError
from ldm.data import annotations
from ldm.data.annotations import load_samples, write_annotations, write_rejects
from ldm.data.folders import scan_folder
from ldm.data.png import write_png
from ldm.data.samples import Reject, Sample
from ldm.data.splits import SPLITS, split_by_patient

FEW = settings(max_examples=30, deadline=None)
Write = Callable[..., Path]


def grey(height: int = 20, width: int = 24) -> np.ndarray:
    return np.zeros((height, width), np.uint8)


# ------------------------------------------------------------------------------------------------ folders


def test_scan_finds_every_sample_below_the_root_in_order(tmp_path: Path, write_sample: Write) -> None:
    meta = {
        "sample_id": "elsewhere",
        "patient_id": 7,
        "parent_id": "p",
        "lesion_type": "osteolytic",
        "level": "L3",
        "severity": "mild",
        "synthetic": True,
        "spacing_mm": [0.5, 0.5],
        "window": [10, 900],
        "seed": 3,
    }
    write_sample(tmp_path / "b" / "deep", meta=meta, anatomy=grey(), soft_mask=np.full((20, 24), 255, np.uint8))
    write_sample(tmp_path / "a", prompt="  Healthy\n", mask=None)
    write_sample(tmp_path / ".hidden" / "x")
    (tmp_path / "notes").mkdir()
    samples, rejects = scan_folder(tmp_path)
    assert not rejects
    healthy, deep = samples
    assert (healthy.sample_id, healthy.healthy, healthy.mask, healthy.patient_id) == ("a", True, None, "a")
    assert healthy.prompt == "healthy"
    assert healthy.box == (0, 0, 0, 0)
    folder = tmp_path / "b" / "deep"
    assert deep == Sample(
        sample_id="b/deep",
        image=folder / "image.png",
        mask=folder / "mask.png",
        prompt="lytic lesion",
        box=(8 / 24, 5 / 20, 8 / 24, 5 / 20),
        patient_id="7",
        anatomy=folder / "anatomy.png",
        soft_mask=folder / "soft_mask.png",
        parent_id="p",
        lesion_type="osteolytic",
        level="L3",
        severity="mild",
        synthetic=True,
        meta={"spacing_mm": [0.5, 0.5], "window": [10, 900], "seed": 3},
    )


def test_root_may_itself_be_a_sample_and_links_are_followed_once(tmp_path: Path, write_sample: Write) -> None:
    root = write_sample(tmp_path / "one")
    (root / "loop").symlink_to(root)
    write_sample(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    samples, rejects = scan_folder(root)
    assert not rejects
    assert [sample.sample_id for sample in samples] == ["link", "one"]
    assert samples[0].image == root / "link" / "image.png"


def test_relative_root_gives_absolute_paths(
    tmp_path: Path, write_sample: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "data" / "a")
    write_sample(tmp_path / "data" / "bad", image=None)
    monkeypatch.chdir(tmp_path)
    samples, rejects = scan_folder("data")
    assert samples[0].image == tmp_path / "data" / "a" / "image.png"
    assert str(rejects[0].file) == "data/bad/image.png"


@pytest.mark.parametrize("suffix", ["PNG", "jpg", "tif"])
def test_other_suffixes_are_accepted(tmp_path: Path, write_sample: Write, suffix: str) -> None:
    from PIL import Image

    folder = write_sample(tmp_path / "a", image=None)
    Image.fromarray(grey()).save(folder / f"image.{suffix}")
    samples, rejects = scan_folder(tmp_path)
    assert not rejects
    assert samples[0].image.name == f"image.{suffix}"


REJECTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no image": ({"image": None}, "image.png", "does not exist"),
    "no mask": ({"mask": None}, "mask.png", "needs its lesion's mask"),
    "no prompt": ({"prompt": None}, "prompt.txt", "does not exist"),
    "empty prompt": ({"prompt": " \n\t"}, "prompt.txt", "the prompt is empty"),
    "empty mask": ({"mask": grey()}, "mask.png", "the mask is empty"),
    "empty soft mask": ({"soft_mask": grey()}, "soft_mask.png", "the soft mask is empty"),
    "mask size": ({"mask": grey(24, 20)}, "mask.png", "has 20 x 24 pixels, its image 24 x 20"),
    "soft mask size": ({"soft_mask": grey(9, 9)}, "soft_mask.png", "has 9 x 9 pixels, its image 24 x 20"),
    "anatomy size": ({"anatomy": grey(9, 9)}, "anatomy.png", "has 9 x 9 pixels, its image 24 x 20"),
    "faint mask": ({"mask": np.arange(480, dtype=np.uint8).reshape(20, 24) % 4}, "mask.png", "maximum of 3"),
    "meta list": ({"meta": []}, "meta.json", "expected a JSON object"),
    "meta patient": ({"meta": {"patient_id": ["x"]}}, "meta.json", "patient_id: expected text"),
    "meta synthetic": ({"meta": {"synthetic": "yes"}}, "meta.json", "synthetic: expected true or false"),
    "meta spacing": ({"meta": {"spacing_mm": [1, 0]}}, "meta.json", "spacing_mm: expected one or two numbers of mm"),
    "meta window": (
        {"meta": {"window": [5, 1]}},
        "meta.json",
        "window: expected two numbers [low, high] with low < high",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_faulty_sample_is_rejected_and_the_others_stay(tmp_path: Path, write_sample: Write, name: str) -> None:
    faults, file, reason = REJECTED[name]
    write_sample(tmp_path / "good")
    folder = write_sample(tmp_path / "bad", **faults)
    samples, (reject,) = scan_folder(tmp_path)
    assert [sample.sample_id for sample in samples] == ["good"]
    assert (reject.sample_id, reject.file) == ("bad", folder / file)
    assert reason in reject.reason


BYTES: dict[str, tuple[str, bytes, str]] = {
    "half an image": ("image.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "truncated PNG (16 bytes, its end is missing"),
    "empty mask file": ("mask.png", b"", "empty (0 bytes)"),
    "pointer": ("mask.png", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer: run `git lfs pull`"),
    "cp1252 prompt": ("prompt.txt", b"the patient\x92s spine", "byte 0x92 at offset 11"),
    "broken meta": ("meta.json", b'{"patient_id": }', "line 1, column 16"),
    "text as anatomy": ("anatomy.png", b"labels follow", "this is a text file"),
    "text as soft mask": ("soft_mask.jpg", b"see mail", "this is a text file"),
}


@pytest.mark.parametrize("name", BYTES)
def test_unreadable_file_is_rejected_with_its_name(tmp_path: Path, write_sample: Write, name: str) -> None:
    file, content, reason = BYTES[name]
    folder = write_sample(tmp_path / "bad")
    (folder / file).write_bytes(content)
    write_sample(tmp_path / "good")
    samples, (reject,) = scan_folder(tmp_path)
    assert len(samples) == 1
    assert reject.file == folder / file
    assert reason in reject.reason
    assert str(folder) not in reject.reason  # the file is said once


def test_byte_order_mark_is_accepted(tmp_path: Path, write_sample: Write) -> None:
    (write_sample(tmp_path / "a") / "prompt.txt").write_bytes(b"\xef\xbb\xbfhealthy\r\n")
    assert scan_folder(tmp_path)[0][0].healthy


def test_two_images_are_ambiguous(tmp_path: Path, write_sample: Write) -> None:
    folder = write_sample(tmp_path / "a")
    (folder / "image.jpg").write_bytes((folder / "image.png").read_bytes())
    _, (reject,) = scan_folder(tmp_path)
    assert reject.reason == "ambiguous: image.jpg and image.png are both here; keep one"


def test_dangling_links_and_folders_instead_of_files_are_rejected(tmp_path: Path, write_sample: Write) -> None:
    (write_sample(tmp_path / "a", image=None) / "image.png").symlink_to("gone.png")
    (write_sample(tmp_path / "b", mask=None) / "mask.png").mkdir()
    (write_sample(tmp_path / "c", prompt=None) / "prompt.txt").mkdir()
    (write_sample(tmp_path / "d") / "meta.json").symlink_to("gone.json")
    samples, rejects = scan_folder(tmp_path)
    assert not samples
    reasons = ["file that does not exist", "found a folder", "found a folder", "does not exist"]
    assert [reject.sample_id for reject in rejects] == ["a", "b", "c", "d"]
    for reject, reason in zip(rejects, reasons, strict=True):
        assert reason in reject.reason


@pytest.mark.parametrize("name", ["with space", "line\nbreak", "Wirbelsäule-脊椎", "-rf", "100%", "a,b;c'd\"e"])
def test_unusual_folder_names_survive_into_the_json_and_back(tmp_path: Path, write_sample: Write, name: str) -> None:
    write_sample(tmp_path / "data" / name / "s")
    write_sample(tmp_path / "data" / name / "bad", image=None)
    samples, rejects = scan_folder(tmp_path / "data")
    assert samples[0].sample_id == f"{name}/s"
    assert str(rejects[0]).isprintable()
    write_annotations(tmp_path / "out.json", samples)
    assert load_samples(tmp_path / "out.json") == (samples, [])


def test_name_that_is_not_utf8_is_rejected(tmp_path: Path, write_sample: Write) -> None:
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    try:
        os.mkdir(bad)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    write_sample(Path(bad))
    _, (reject,) = scan_folder(tmp_path)
    assert "not valid UTF-8" in reject.reason


@pytest.mark.parametrize(
    ("made", "reason"), [(None, "does not exist"), ("file", "found a file"), ("dir", "holds no sample")]
)
def test_root_without_samples_is_an_error(tmp_path: Path, made: str | None, reason: str) -> None:
    root = tmp_path / "root"
    if made == "file":
        root.write_text("x")
    elif made == "dir":
        (root / "sub").mkdir(parents=True)
    with pytest.raises(MedSoftError, match=f"root: .*{reason}"):
        scan_folder(root)


# ------------------------------------------------------------------------------------------------ annotation files


def test_record_has_the_published_keys_and_absolute_paths(tmp_path: Path, write_sample: Write) -> None:
    write_sample(tmp_path / "d" / "a", meta={"patient_id": "p1", "level": "L2"})
    write_sample(tmp_path / "d" / "b", prompt="healthy", mask=None)
    samples, _ = scan_folder(tmp_path / "d")
    write_annotations(tmp_path / "out.json", samples)
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert first == {
        "mask_image": str(tmp_path / "d/a/mask.png"),
        "label": "lytic lesion",
        "image": str(tmp_path / "d/a/image.png"),
        "box": [8 / 24, 0.25, 8 / 24, 0.25],
        "box_id": "0_box",
        "image_id": "0",
        "sample_id": "a",
        "patient_id": "p1",
        "level": "L2",
    }
    assert second["mask_image"] is None
    assert (second["box"], second["box_id"], second["image_id"]) == ([0, 0, 0, 0], "1_box", "1")


def test_file_of_the_published_tool_with_relative_paths_is_read(tmp_path: Path, write_sample: Write) -> None:
    records = []
    for name in ("a", "b"):
        write_sample(tmp_path / "set" / name)
        record = {
            "label": "lytic",
            "box": [0, 0, 1, 1],
            "box_id": "1_box",
            "image_id": "1",
            "window": "foreign",
            "unknown": [1],
        }
        records.append({"mask_image": f"set/{name}/mask.png", "image": f"set/{name}/image.png", **record})
    (tmp_path / "o.json").write_text(json.dumps(records))
    samples, _ = load_samples(tmp_path / "o.json")
    assert [(s.sample_id, s.patient_id, s.image) for s in samples] == [
        (name, name, tmp_path / "set" / name / "image.png") for name in ("a", "b")
    ]


GOOD = {"image": "a/image.png", "mask_image": "a/mask.png", "label": "lytic", "box": [0, 0, 1, 1]}
MALFORMED: dict[str, tuple[Any, str]] = {
    "object": ({}, "expected a JSON list of records, found dict"),
    "empty": ([], "holds no record"),
    "number": ([GOOD, 3], "record 1: expected an object, found int"),
    "no image": ([{k: v for k, v in GOOD.items() if k != "image"}], "record 0, key 'image'.*found nothing"),
    "image type": ([GOOD | {"image": 3}], "key 'image'.*found 3"),
    "image nul": ([GOOD | {"image": "a\0b"}], "key 'image': expected a path"),
    "label blank": ([GOOD | {"label": " "}], "key 'label': expected one sentence on one line, not empty"),
    "no box": ([{k: v for k, v in GOOD.items() if k != "box"}], "key 'box': expected four numbers.*found nothing"),
    "box three": ([GOOD | {"box": [0, 0, 1]}], "key 'box'"),
    "box text": ([GOOD | {"box": [0, 0, 1, "1"]}], "key 'box'"),
    "box pixels": ([GOOD | {"box": [3, 3, 10, 10]}], "key 'box'.*fractions inside the image"),
    "no mask": ([GOOD | {"mask_image": None}], "key 'mask_image': expected a path .every lesion has a mask."),
    "id climbs": ([GOOD | {"sample_id": "../../x"}], "key 'sample_id': expected a relative path"),
    "id absolute": ([GOOD | {"sample_id": "/x"}], "key 'sample_id'"),
    "meta": ([GOOD | {"meta": 1}], "key 'meta': expected an object"),
    "synthetic": ([GOOD | {"synthetic": 1}], "key 'synthetic': expected true or false"),
    "meta synthetic": (
        [GOOD | {"meta": {"synthetic": 1}}],
        "record 0, key 'synthetic': expected true or false, found 1",
    ),
    "meta spacing": ([GOOD, GOOD | {"meta": {"spacing_mm": [1, 0]}}], "record 1, key 'spacing_mm': .*found .1, 0."),
    "meta window": (
        [GOOD | {"meta": {"window": [5, 1]}}],
        "record 0, key 'window': expected two numbers.*found .5, 1.",
    ),
    "meta window text": ([GOOD | {"meta": {"window": "12"}}], "key 'window': expected two numbers"),
    "twice": ([GOOD | {"sample_id": "x"}] * 2, "record 0 and record 1 have the same sample_id 'x'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_annotation_names_file_record_and_key(tmp_path: Path, write_sample: Write, name: str) -> None:
    records, reason = MALFORMED[name]
    write_sample(tmp_path / "a")
    (tmp_path / "o.json").write_text(json.dumps(records))
    with pytest.raises(MedSoftError, match=rf"o\.json: .*{reason}"):
        load_samples(tmp_path / "o.json")


def test_bad_json_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text('[{"image": "x",}]')
    with pytest.raises(MedSoftError, match=r"o\.json: not valid JSON \(line 1, column"):
        load_samples(tmp_path / "o.json")


def test_records_whose_files_are_gone_are_rejects(tmp_path: Path, write_sample: Write) -> None:
    for name in "abc":
        write_sample(tmp_path / "d" / name)
    samples, _ = load_samples(tmp_path / "d")
    write_annotations(tmp_path / "o.json", samples)
    (tmp_path / "d" / "b" / "mask.png").unlink()
    kept, rejects = load_samples(tmp_path / "o.json")
    assert [sample.sample_id for sample in kept] == ["a", "c"]
    assert rejects == [Reject("b", tmp_path / "d/b/mask.png", rejects[0].reason)]
    for name in "ac":
        (tmp_path / "d" / name / "image.png").unlink()
    with pytest.raises(MedSoftError, match=r"o\.json: none of its 3 samples .*a/image\.png"):
        load_samples(tmp_path / "o.json")


def test_rejects_are_written_as_text_and_no_rejects_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "rejects.json"
    write_rejects(path, [Reject("a", Path(os.fsdecode(b"d/\xff.png")), "broken"), Reject("b", Path("d/b"), "é")])
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"sample_id": "a", "file": "d/\\udcff.png", "reason": "broken"},
        {"sample_id": "b", "file": "d/b", "reason": "é"},
    ]
    write_rejects(path, [])
    assert not path.exists()
    write_rejects(path, [])


def test_load_samples_takes_a_folder_and_refuses_a_useless_one(tmp_path: Path, write_sample: Write) -> None:
    write_sample(tmp_path / "a", image=None)
    with pytest.raises(MedSoftError, match="its only sample cannot be used"):
        load_samples(tmp_path)
    with pytest.raises(MedSoftError, match="gone: does not exist"):
        load_samples(tmp_path / "gone")


# ------------------------------------------------------------------------------------------------ split


def sample(name: str, patient: str, prompt: str = "healthy", kind: str | None = None) -> Sample:
    return Sample(name, Path("/i.png"), Path("/m.png"), prompt, (0, 0, 1, 1), patient, lesion_type=kind)


@st.composite
def datasets(draw: st.DrawFn) -> list[Sample]:
    made = []
    for number in range(draw(st.integers(1, 30))):
        kind = draw(st.sampled_from([None, None, "lytic", "blastic"]))
        prompt = "healthy" if kind is None else f"{kind} lesion"
        made.append(sample(f"s{number}", f"p{draw(st.integers(0, 12))}", prompt, kind))
    return made


@FEW
@given(datasets(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_split_is_a_partition_by_patient_whatever_the_order(samples: list[Sample], seed: int, rng: Any) -> None:
    split = split_by_patient(samples, seed)
    assert tuple(split) == SPLITS
    assert split["train"]
    assert Counter(s.sample_id for side in split.values() for s in side) == Counter(s.sample_id for s in samples)
    patients = [{s.patient_id for s in side} for side in split.values()]
    total = len({s.patient_id for s in samples})
    assert sum(len(side) for side in patients) == total
    for side, share in zip(patients, (0.7, 0.1, 0.2), strict=True):
        assert abs(len(side) - share * total) <= 2
        assert side or total < 3
    shuffled = list(samples)
    rng.shuffle(shuffled)
    assert split_by_patient(shuffled, seed) == split


def test_split_is_stratified_and_depends_on_the_seed() -> None:
    kinds = [None] * 200 + ["lytic"] * 40 + ["blastic"] * 40
    samples = [sample(f"s{i}", f"p{i}", k or "healthy", k) for i, k in enumerate(kinds)]
    split = split_by_patient(samples, 0)
    for kind, total in ((None, 200), ("lytic", 40), ("blastic", 40)):
        for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
            assert abs(sum(s.lesion_type == kind for s in split[name]) - share * total) <= 1
    assert split_by_patient(samples, 1) != split


def test_patient_with_both_classes_stays_on_one_side() -> None:
    samples = [
        sample(f"{p}{i}", f"p{p}", "lytic" if i else "healthy", "lytic" if i else None)
        for p in "abcdefghij"
        for i in (0, 1)
    ]
    for side in split_by_patient(samples).values():
        assert sum(s.healthy for s in side) == sum(not s.healthy for s in side)


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (10, (7, 1, 2))])
def test_few_patients_leave_train_filled(count: int, sizes: tuple[int, ...]) -> None:
    split = split_by_patient([sample(f"s{i}", f"p{i}") for i in range(count)])
    assert tuple(len(split[name]) for name in SPLITS) == sizes


@pytest.mark.parametrize("healthy", [2, 3, 9, 20])
def test_the_only_diseased_patient_is_trained_on(healthy: int) -> None:
    samples = [sample(f"s{i}", f"p{i}") for i in range(healthy)] + [sample("d", "d", "lytic")]
    split = split_by_patient(samples)
    assert all(split.values())
    assert "d" in [s.sample_id for s in split["train"]]


def test_split_without_a_test_part() -> None:
    split = split_by_patient([sample(f"s{i}", f"p{i}") for i in range(10)], 0, (0.8, 0.2, 0))
    assert [len(split[name]) for name in SPLITS] == [8, 2, 0]


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.7, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.2, 0), (float("nan"), 0, 1)]
)
def test_impossible_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="add up to 1"):
        split_by_patient([sample("a", "p")], 0, fractions)


def test_write_png_of_the_fixture_is_what_scan_reads(tmp_path: Path, write_sample: Write) -> None:
    folder = write_sample(tmp_path / "a", mask=None)
    soft = np.zeros((20, 24), np.uint8)
    soft[3:5, 6] = (130, 255)
    soft[5, 6] = 100
    write_png(folder / "mask.png", soft)
    (found,), _ = scan_folder(tmp_path)
    assert found.box == (6 / 24, 3 / 20, 1 / 24, 2 / 20)  # the region of mask >= 0.5


def test_another_data_source_is_one_entry(tmp_path: Path, write_sample: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON in the manner of COCO, images and annotations apart: ``load_samples`` reads it as it reads any other."""
    folder = write_sample(tmp_path / "a")
    content = {
        "images": [{"id": 7, "file_name": "a/image.png"}],
        "annotations": [{"image_id": 7, "mask": "a/mask.png", "caption": "a lytic lesion", "bbox": [0, 0, 1, 1]}],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))

    def recognises(path: Path) -> bool:
        return path.suffix == ".json" and isinstance(json.loads(path.read_text()), dict)

    def read(path: Path) -> tuple[list[Sample], list[Reject]]:
        found = json.loads(path.read_text())
        images = {image["id"]: path.parent / image["file_name"] for image in found["images"]}
        samples = [
            Sample(str(n), images[each["image_id"]], path.parent / each["mask"], each["caption"], (0, 0, 1, 1), "p")
            for n, each in enumerate(found["annotations"])
        ]
        return samples, []

    monkeypatch.setattr(annotations, "SOURCES", [annotations.Source(recognises, read), *annotations.SOURCES])
    ((sample,), rejects) = load_samples(path)
    assert (sample.image, sample.prompt, rejects) == (folder / "image.png", "a lytic lesion", [])
