"""What `medsoft edit` opens, and what it begins with; what it cannot, in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from editing import Page, started
from made import spine, write_spine
from tiny import CLIP, TRAIN

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.phantom.lesions import SEVERITIES
from ldm.workbench.drafts import Drafts
from ldm.workbench.finding import find
from ldm.workbench.options import EditOptions
from ldm.workbench.sources import Collection

GONE = {"image": "/none/image.png", "mask_image": None, "label": "healthy", "box": [0, 0, 1, 1], "sample_id": "gone"}


def test_the_output_of_a_plan_opens_with_its_healthy_images_and_the_training_sentences(page: Page, world: Path) -> None:
    state = page.post("open", path=str(world))
    samples = load_samples(world / TRAIN)[0]
    healthy = [sample.sample_id for sample in samples if sample.healthy]
    assert state["collection"] == {"name": world.name, "count": len(healthy), "index": 0}
    assert (state["document"]["name"], state["document"]["has_body"]) == (healthy[0], True)
    second = page.post("go", index=1, document=state["document"]["id"])
    assert (second["document"]["name"], second["collection"]["index"]) == (healthy[1], 1)
    assert "has no image" in page.fault("go", index=len(healthy))
    prompts = {sample.prompt for sample in samples if not sample.healthy}
    assert {each["prompt"] for each in page.get("sentences")["sentences"]} == prompts
    assert state["sentences"]["count"] == len(prompts)
    assert set(state["sentences"]["types"]) == {sample.lesion_type for sample in samples if not sample.healthy}
    known = {sample.severity for sample in samples if not sample.healthy}
    assert state["sentences"]["severities"] == [each for each in SEVERITIES if each in known]
    assert (state["model"]["steps"], state["model"]["token_limit"]) == (2, 75)
    assert state["feather"] == {"value": 0.25, "unit": "diameter"}
    for tab in (state, second):  # two tabs: each has its own document
        assert page.get(f"state?document={tab['document']['id']}")["document"] == tab["document"]


def test_an_annotation_file_a_dataset_folder_and_a_sample_folder_open(page: Page, world: Path) -> None:
    annotated = page.post("open", path=str(world / TRAIN))
    assert annotated["collection"]["count"] == len(load_samples(world / TRAIN)[0])
    dataset = page.post("open", path=str(world / "val"))
    assert dataset["collection"]["count"] == len(list((world / "val").iterdir()))
    diseased = next(each.image.parent for each in load_samples(world / "train")[0] if not each.healthy)
    for path in (diseased, diseased / "image.png"):
        document = page.open(path)
        assert (document["healthy"], document["has_mask"], document["name"]) == (False, True, diseased.name)
    mask = np.frombuffer(page.get(f"documents/{document['id']}/mask"), np.uint8)
    assert np.array_equal(mask, read_image(diseased / "mask.png").ravel())


def test_the_list_of_a_collection_is_bounded(page: Page, world: Path) -> None:
    document = page.open(world)
    whole = page.get(f"collection?document={document['id']}")
    assert whole["count"] == len(whole["items"]) == document["collection"]["count"]
    level = whole["items"][1]["level"]
    found = page.get(f"collection?document={document['id']}&words=HEALTHY+{level.lower()}")
    assert found["items"] == [each for each in whole["items"] if each["level"] == level]
    assert page.get(f"collection?document={document['id']}&words=nothing")["count"] == 0
    many = Collection("many", [(f"s{number:05d}", world) for number in range(1000)])
    assert many.matching("s009") == (
        100,
        [{"index": n, "name": f"s{n:05d}", "level": None, "about": None} for n in range(900, 1000)],
    )
    assert [many.matching("")[0], len(many.matching("")[1])] == [1000, 200]


def test_what_is_damaged_in_a_dataset_is_passed_over_and_said(page: Page, world: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        shutil.copytree(next((world / "val").iterdir()), tmp_path / "data" / name)
    for name in ("a", "c"):
        (tmp_path / "data" / name / "image.png").write_bytes(b"damaged")
    state = page.post("open", path=str(tmp_path / "data"))
    assert (state["document"]["name"], state["collection"]["index"]) == ("b", 1)
    assert "a/image.png: not an image" in state["passed"][0]
    later = page.post("go", index=2, document=state["document"]["id"])
    assert (later["document"]["name"], later["collection"]["index"], len(later["passed"])) == ("d", 3, 1)
    back = page.post("go", index=2, document=later["document"]["id"])
    assert back["document"]["name"] == "b"
    assert "not an image" in page.fault("go", index=0, document=back["document"]["id"])


def test_sixteen_bits_stay_sixteen_bits(page: Page, deep: Path) -> None:
    (deep.parent / "meta.json").write_text('{"spacing_mm": [0.5, 0.7], "window": [100, 5000], "value_offset": -1024}')
    document = page.open(deep)
    pixels = read_image(deep)
    assert (document["bits"], document["channels"], document["window"]) == (16, 1, [100, 5000])
    assert (document["range"], document["value_offset"]) == ([int(pixels.min()), int(pixels.max())], -1024)
    assert document["spacing_mm"] == [0.5, 0.7]
    assert page.get(f"documents/{document['id']}/levels") == pixels.astype("<u2").tobytes()


def test_a_slice_of_a_volume_opens_in_any_plane(page: Page, tmp_path: Path) -> None:
    write_spine(tmp_path / "ct", spine())
    document = page.open(tmp_path / "ct")
    assert document["volume"] == {
        "plane": "sagittal",
        "planes": ["sagittal", "coronal", "axial"],
        "index": 20,
        "count": 40,
    }
    axial = page.open(tmp_path / "ct", plane="axial", slice=3)
    assert (axial["volume"]["index"], axial["unit"], axial["bits"]) == (3, "HU", 16)
    assert "expected 0 to" in page.fault("open", path=str(tmp_path / "ct"), plane="axial", slice=400)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("none.png", "does not exist"),
        ("text.png", "this is a text file"),
        ("empty", "holds no sample folder, and is no DICOM series"),
        ("cut.png", "PNG"),
        ("gone.json", "1 of 1 sample cannot be opened; the first: /none/image.png: the annotation names it"),
        ("pipe.png", "is neither a file nor a folder"),
        ("x" * 300, "File name too long"),
        ("a\0b", "names nothing that can be opened"),
    ],
)
def test_what_cannot_be_opened_is_said_and_what_is_open_stays(
    page: Page, deep: Path, tmp_path: Path, path: str, line: str
) -> None:
    before = page.open(deep)
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "cut.png").write_bytes(deep.read_bytes()[:-40])
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.json").write_text(json.dumps([GONE]))
    assert line in page.fault("open", path=str(tmp_path / path))
    assert page.get("state")["document"] == before


def test_a_path_that_is_none_is_said(page: Page) -> None:
    assert "path: is empty" in page.fault("open", path="  ")
    assert "names nothing that can be opened" in page.fault("open", path="~nobody of this name/x")


def test_over_the_network_only_what_lies_below_path_is_opened(model: EditOptions, world: Path, tmp_path: Path) -> None:
    editor = started(model, tmp_path / "edited", path=world, host="0.0.0.0")
    (tmp_path / "link").symlink_to("/etc")
    page = Page(editor)
    page.client.base_url = "http://127.0.0.1:7860"
    for path in ("/etc/passwd", str(world / ".." / ".."), str(tmp_path / "link")):
        assert "over the network nothing else is opened" in page.fault("open", 403, path=path)
    assert page.open(world / "val")["name"]
    editor.queue.close()


# ----------------------------------------------------------------------------------------------------------- beginning


def test_without_a_checkpoint_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no checkpoint that draws was found in .*give --ckpt"):
        find(EditOptions())


def test_the_checkpoint_of_which_most_was_trained_is_found(
    trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo_output").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    image = next((world / "train").glob("*/image.png"))
    for path in (world, world / TRAIN, image, None):
        found = find(EditOptions(path=path))
        assert found.ckpt.resolve() == trained["stage2_2"].last.resolve()
        assert found.train_json.resolve() == (world / TRAIN).resolve()
        assert found.path.resolve() == (path or world).resolve()


def test_a_checkpoint_of_another_size_is_said_and_nothing_is_queued(
    model: EditOptions, deep: Path, tmp_path: Path
) -> None:
    words = [f"biomedclip.path={CLIP}", "msc.layers=2"]
    page = Page(started(model, tmp_path / "edited", overrides=words))
    with pytest.raises(MedSoftError, match=r"small\.ckpt"):
        page.editor.queue.wait()
    assert "small.ckpt" in page.get("state")["model"]["error"]
    assert "small.ckpt" in page.fault("draw", **page.request(page.open(deep)))
    page.editor.queue.close()


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "edited", Path("/proc/edited")):
        with pytest.raises(MedSoftError, match=f"{folder}/history.jsonl: cannot be written there"):
            Drafts(folder)
