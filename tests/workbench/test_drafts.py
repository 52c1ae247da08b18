"""The drawings on the disk as a server finds them again: a history that others wrote into, drawings that it misses."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.core.files import PARTIAL_PREFIX, fingerprint, sha256_file
from ldm.data.png import write_png
from ldm.workbench.drafts import PAGE, Drafts, document_id
from ldm.workbench.sources import Opened

KNOWN = {"prompt": "a lesion", "seed": 3, "variant": 0, "parent_id": "p1", "parent_sha256": "0" * 64}


def drawing(home: Path, name: str, meta: Any) -> None:
    """A whole drawing, its files empty but the meta.json."""
    (home / name).mkdir(parents=True)
    for file in ("image.png", "mask.png", "soft_mask.png", "prompt.txt"):
        (home / name / file).touch()
    (home / name / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a-0", "name": "a__v0", "prompt": "x", "seed": NaN, "variant": 0}',
        '{"id": "a-0", "name": "a__v0", "prompt": "\\ud800", "seed": 1, "variant": 0}',
        '{"id": "a-0", "name": "../a__v0", "prompt": "x", "seed": 1, "variant": 0}',
        '{"id": "a/0", "name": "a__v0", "prompt": "x", "seed": 1, "variant": 0}',
        '{"id": "a-0", "name": "a__v0", "prompt": 5, "seed": 1, "variant": 0}',
        '{"id": "a-0", "name": "a__v0", "prompt": "x", "seed": 1, "variant": 0, "origin": 7}',
        '{"id": "a-0", "name": "a__v0", "prompt": "x", "seed": 1, "variant": 0, "origin": {"path": "a.png"}}',
        "[" * 100_000,
        "[1]",
    ],
)
def test_a_line_that_tells_of_no_drawing_is_passed_over(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    drawing(tmp_path / "drafts", "a__v0", {})
    (tmp_path / "history.jsonl").write_text(line + "\n")
    with caplog.at_level(logging.WARNING):
        assert Drafts(tmp_path).items() == []
    assert "history.jsonl: line 1 tells of no drawing and is passed over" in caplog.text


@pytest.mark.parametrize(
    "meta", ["{", "[]", "{}", KNOWN | {"parent_image": 5}, KNOWN | {"parent_image": "x", "seed": "3"}]
)
def test_a_drawing_whose_meta_json_is_damaged_does_not_stop_the_rest(
    tmp_path: Path, meta: Any, caplog: pytest.LogCaptureFixture
) -> None:
    drawing(tmp_path / "drafts", "p1_0123456789ab__v0", meta)
    drawing(tmp_path / "accepted", "p1_0123456789ab__v1", KNOWN | {"variant": 1, "parent_image": "../../x.png"})
    with caplog.at_level(logging.WARNING):
        (item,) = Drafts(tmp_path).items()
    assert (item["id"], item["state"]) == ("0123456789ab-1", "accepted")
    assert "p1_0123456789ab__v0: is not shown, its meta.json is not that of a drawing" in caplog.text


def test_a_drawing_that_the_history_misses_is_listed_with_its_original(tmp_path: Path) -> None:
    drawing(tmp_path / "drafts", "a #%\u00fc__v0", KNOWN | {"parent_image": "../../sources/p1/image.png"})
    found = Drafts(tmp_path)
    (item,) = found.items()
    assert item["id"].isalnum()  # it stands in addresses
    assert item["document"] == fingerprint(["p1", "0" * 64])[:16]
    origin = found.origin(item["document"])
    assert origin is not None
    assert (origin["path"], origin["sample_id"]) == (str(tmp_path / "sources" / "p1" / "image.png"), "p1")


def test_pages_of_the_history_join_and_pass_over_what_somebody_has_deleted(tmp_path: Path) -> None:
    for k in range(2 * PAGE + 5):
        drawing(tmp_path / "drafts", f"p1_{k:012x}__v0", KNOWN | {"parent_image": "x.png"})
    found = Drafts(tmp_path)
    ids = [f"{k:012x}-0" for k in range(2 * PAGE + 5)]
    shutil.rmtree(tmp_path / "drafts" / f"p1_{PAGE:012x}__v0")
    pages = [[each["id"] for each in found.items()]]
    while pages[0]:
        pages.insert(0, [each["id"] for each in found.items(before=pages[0][0])])
    assert [len(each) for each in pages] == [0, 4, PAGE, PAGE]
    assert [each for page in pages for each in page] == [each for each in ids if each != ids[PAGE]]
    assert [each["id"] for each in found.items(before=ids[PAGE])] == ids[:PAGE]  # the deleted one was shown somewhere


def test_what_a_crash_left_of_a_drawing_is_no_drawing(tmp_path: Path) -> None:
    """Its files may all be there, under a name that is hidden: accepted, it would be missing from the dataset."""
    drawing(tmp_path / "drafts", f"{PARTIAL_PREFIX}01ab", KNOWN | {"parent_image": "x.png"})
    drawing(tmp_path / "accepted", ".hidden", KNOWN | {"parent_image": "x.png"})
    assert Drafts(tmp_path).items() == []
    assert [each.name for each in tmp_path.glob("*/*")] == [".hidden"]


def test_the_original_is_found_again_under_the_name_that_annotations_gave_it(tmp_path: Path) -> None:
    image = tmp_path / "slice 1.png"
    write_png(image, np.arange(120, dtype=np.uint8).reshape(10, 12))
    name = document_id("p7", sha256_file(image))
    origin = {"path": str(image), "sample_id": "p7", "plane": None, "slice": None}
    assert Opened().reopen(name, origin).id == name
