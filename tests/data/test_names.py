"""Names of files and samples: whatever is called nearly as a sample's files are is refused by name, or counted."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples
from ldm.data.folders import scan_folder

Write = Callable[..., Path]

RENAMED = {  # a file, what it is called instead, and what is said
    "numbered": ("image.png", "image_1.png", "is not read under this name; call it image.png"),
    "suffix twice": ("image.png", "image.png.png", "is not read under this name; call it image.png"),
    "downloaded again": ("image.png", "Image (1).png", "is not read under this name; call it image.png"),
    "copied": ("image.png", "image - Copy.png", "is not read under this name; call it image.png"),
    "short": ("image.png", "img.png", "is not read under this name; call it image.png"),
    "DICOM": ("image.png", "IMAGE.DCM", "this format is not read; export it as image.png"),
    "NIfTI": ("image.png", "image.nii.gz", "this format is not read; export it as image.png"),
    "numbered NIfTI": ("mask.png", "mask_01.nii.gz", "this format is not read; export it as mask.png"),
    "mask numbered": ("mask.png", "mask_2.png", "is not read under this name; call it mask.png"),
    "anatomy numbered": ("anatomy.png", "anatomy (1).png", "is not read under this name; call it anatomy.png"),
    "soft mask": ("soft_mask.png", "softmask.png", "is not read under this name; call it soft_mask.png"),
    "prompt": ("prompt.txt", "prompt.txt.txt", "is not read under this name; call it prompt.txt"),
    "prompt as document": ("prompt.txt", "Prompt.docx", "is not read under this name; call it prompt.txt"),
    "patient": ("meta.json", "meta.json.txt", "is not read under this name; call it meta.json"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_file_of_nearly_a_samples_name_rejects_the_sample(tmp_path: Path, write_sample: Write, name: str) -> None:
    """A healthy sample is sound without mask, anatomy or meta.json: dropping one would say nothing, and lose it."""
    right, wrong, reason = RENAMED[name]
    write_sample(tmp_path / "good")
    folder = write_sample(tmp_path / "bad", "healthy", meta={"patient_id": "p"})
    for stem in ("anatomy", "soft_mask"):
        (folder / f"{stem}.png").write_bytes((folder / "mask.png").read_bytes())
    (folder / right).rename(folder / wrong)
    ((good,), (reject,)) = scan_folder(tmp_path)
    assert (good.sample_id, reject.sample_id, reject.file) == ("good", "bad", folder / wrong)
    assert reject.reason.startswith(reason)


@pytest.mark.parametrize(
    "name", ["image_1.png", "image.png.png", "img.tif", "anatomy.png", "soft_mask.png", "Mask 1.png"]
)
def test_a_folder_with_such_a_file_alone_is_a_sample(tmp_path: Path, write_sample: Write, name: str) -> None:
    write_sample(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / name).write_bytes((tmp_path / "good" / "image.png").read_bytes())
    _, (reject,) = scan_folder(tmp_path)
    assert reject.sample_id == "bad"


@pytest.mark.parametrize("name", ["image.png", "mask.png", "prompt.txt", "meta.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, write_sample: Write, name: str) -> None:
    write_sample(tmp_path / "good")
    folder = write_sample(tmp_path / "bad", meta={})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    _, (reject,) = scan_folder(tmp_path)
    assert (reject.file, reject.reason[:10]) == (folder / name, "is a pipe,")


def test_two_images_of_one_sample_are_ambiguous(tmp_path: Path, write_sample: Write) -> None:
    folder = write_sample(tmp_path / "a")
    (folder / "image.jpg").write_bytes(b"")
    _, (reject,) = scan_folder(tmp_path)
    assert reject.reason == "ambiguous: image.jpg and image.png are both here; keep one"


def test_image_files_that_no_sample_has_are_counted(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_sample(tmp_path / "good")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("flat/001.png", "flat/001_mask.png", "flat/002.nii.gz", "good/image_2.png", "good/image.dcm"):
        (tmp_path / name).write_bytes((good / "image.png").read_bytes())
    for name in ("._image.png", ".image.png", "Thumbs.db", "desktop.ini", ".DS_Store", "notes.txt"):  # the systems' own
        (good / name).write_bytes(b"x")
        (flat / name).write_bytes(b"x")
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "sheet_1.png").write_bytes(b"x")
    (tmp_path / "sheet.png").write_bytes(b"x")  # as tool/make_phantoms.py writes it
    assert [sample.sample_id for sample in scan_folder(tmp_path)[0]] == ["good"]
    said = "5 image files are not read, as they are not named image, mask, soft_mask or anatomy; the first: "
    assert f"{said}{flat / '001.png'}" in caplog.text


def test_nothing_is_said_of_a_folder_of_samples_alone(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write_sample(tmp_path / "a", meta={"patient_id": "p"})
    write_sample(tmp_path / "a" / "mask" / "b", "healthy", mask=None)
    (tmp_path / "a" / "mask" / "b" / "image.png").rename(tmp_path / "a" / "mask" / "b" / "image")  # told by its content
    samples, rejects = scan_folder(tmp_path)
    assert ([sample.sample_id for sample in samples], rejects) == (["a", "a/mask/b"], [])
    assert caplog.text == ""


def test_a_sample_and_one_in_it_have_different_ids(tmp_path: Path, write_sample: Write) -> None:
    """The folder that is searched may be a sample itself, of its own name."""
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "a" / "b")
    assert [sample.sample_id for sample in scan_folder(tmp_path / "a")[0]] == ["a", "b"]
    write_sample(tmp_path / "a" / "a")
    samples, (reject,) = scan_folder(tmp_path / "a")
    assert [(sample.sample_id, sample.image.parent) for sample in samples] == [
        ("a", tmp_path / "a" / "a"),
        ("b", tmp_path / "a" / "b"),
    ]
    assert (reject.sample_id, reject.file) == ("a", tmp_path / "a")
    assert reject.reason == "is a sample, as is a in it, and both have this name; rename one"


# ------------------------------------------------------------------------------------------------ annotation files


def annotations(folder: Path, *records: dict[str, Any]) -> Path:
    """An annotation file of healthy records, whose images need not be images."""
    for record in records:
        (folder / record["image"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / record["image"]).touch()
    rows = [{"label": "healthy", "box": [0, 0, 1, 1], "mask_image": None} | record for record in records]
    (folder / "o.json").write_text(json.dumps(rows))
    return folder / "o.json"


def ids(path: Path) -> list[str]:
    return [sample.sample_id for sample in load_samples(path)[0]]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (["images/001.png", "images/002.png"], ["001", "002"]),
        (["images/001.png"], ["images"]),
        (["a/image.png", "b/image.png"], ["a", "b"]),
        (["a/image.png", "a/b/image.png"], ["a", "a/b"]),
        (["a/1.png", "b/1.png", "b/2.x.png"], ["a/1", "b/1", "b/2.x"]),
    ],
)
def test_a_record_without_id_is_named_by_its_folder_or_else_its_file(
    tmp_path: Path, images: list[str], expected: list[str]
) -> None:
    """The published tool writes no ids, and its users keep all images in one folder."""
    assert ids(annotations(tmp_path, *({"image": image} for image in images))) == expected


def test_ids_are_compared_as_paths(tmp_path: Path) -> None:
    path = annotations(tmp_path, {"image": "1.png", "sample_id": "a//b/"}, {"image": "2.png", "sample_id": "./c"})
    assert ids(path) == ["a/b", "c"]
    path = annotations(tmp_path, {"image": "1.png", "sample_id": "a/b"}, {"image": "2.png", "sample_id": "a//b"})
    with pytest.raises(MedSoftError, match=re.escape("record 0 and record 1 have the same sample_id 'a/b'")):
        load_samples(path)


def test_one_image_twice_needs_ids(tmp_path: Path) -> None:
    path = annotations(tmp_path, {"image": "x/1.png"}, {"image": "x/2.png"}, {"image": "x/1.png"})
    with pytest.raises(
        MedSoftError, match=r"record 0 and record 2 have the same sample_id '1', .*give each a sample_id"
    ):
        load_samples(path)


@pytest.mark.parametrize("key", ["mask_image", "anatomy", "soft_mask"])
def test_a_mask_that_is_the_image_is_refused(tmp_path: Path, key: str) -> None:
    path = annotations(tmp_path, {"image": "a/1.png", key: "a/../a/1.png"})
    with pytest.raises(MedSoftError, match=f"record 0, key '{key}': is the image itself"):
        load_samples(path)


@pytest.mark.parametrize("label", ["lytic\nlesion", "lytic\r\n\r\nlesion", "one\u2028two", " \u200b"])
def test_a_label_is_one_sentence(tmp_path: Path, label: str) -> None:
    path = annotations(tmp_path, {"image": "1.png", "label": label, "mask_image": "m.png"})
    with pytest.raises(MedSoftError, match=r"record 0, key 'label': expected one sentence on one line"):
        load_samples(path)


@pytest.mark.parametrize("spacing", [5e-324, 1e-9, 0, -1, 1e300, [1, 5e-324], [0.5, 1e9], []])
def test_a_spacing_that_no_image_has_rejects_that_sample(tmp_path: Path, write_sample: Write, spacing: Any) -> None:
    write_sample(tmp_path / "good", meta={"spacing_mm": [0.001, 1000]})
    folder = write_sample(tmp_path / "bad", meta={"spacing_mm": spacing})
    ((good,), (reject,)) = scan_folder(tmp_path)
    assert (good.sample_id, reject.file) == ("good", folder / "meta.json")
    assert reject.reason.startswith("spacing_mm: expected one or two numbers of mm, each from 0.001 to 1000, found")
