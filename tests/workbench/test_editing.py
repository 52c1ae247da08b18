"""`medsoft edit` behind its routes: what it opens, masks and sentences, drawings from the first step to the dataset."""

import base64
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from made import spine, write_spine
from tiny import CLIP, PHANTOM, TRAIN, Small, call, dataset_infer

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.masks import Feather, lesion_shaped, read_anatomy, soften
from ldm.data.png import write_png
from ldm.workbench import drafts
from ldm.workbench.drafts import Drafts
from ldm.workbench.editing import routes
from ldm.workbench.editor import Editor
from ldm.workbench.finding import find
from ldm.workbench.jobs import QueuedJob
from ldm.workbench.options import EditOptions
from ldm.workbench.server import Address, make_app

GONE = {"image": "/none/image.png", "mask_image": None, "label": "healthy", "box": [0, 0, 1, 1], "sample_id": "gone"}


class Page:
    """What the browser does, without one."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        app = make_app(routes(editor), page=None, address=Address())
        self.client = TestClient(
            app, base_url="http://127.0.0.1:7860", headers={"X-MedSoft": "1"}, raise_server_exceptions=False
        )

    def get(self, route: str) -> Any:
        found = self.client.get(f"/api/{route}")
        assert found.status_code == 200, found.text
        return found.json() if found.headers["content-type"] == "application/json" else found.content

    def post(self, route: str, **body: Any) -> Any:
        found = self.client.post(f"/api/{route}", json=body)
        assert found.status_code == 200, found.text
        return found.json() if found.headers["content-type"] == "application/json" else found.content

    def fault(self, route: str, status: int = 400, **body: Any) -> str:
        found = self.client.post(f"/api/{route}", json=body) if body else self.client.get(f"/api/{route}")
        assert found.status_code == status, found.text
        assert list(found.json()) == ["error"]
        assert "\n" not in found.json()["error"]
        return found.json()["error"]

    def open(self, path: Path, **more: Any) -> dict[str, Any]:
        return self.post("open", path=str(path), **more)["document"]

    def request(self, document: dict[str, Any], **more: Any) -> dict[str, Any]:
        mask = np.zeros((document["height"], document["width"]), np.uint8)
        mask[10:22, 8:20] = 255
        asked = {"document": document["id"], "mask": coded(mask), "prompt": "severe osteolytic lesion", "seed": 3}
        return asked | more

    def draw(self, document: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The job, once it has ended."""
        job = self.post("draw", **self.request(document, **more))
        while job["state"] in ("queued", "running"):
            time.sleep(0.02)
            job = self.get(f"jobs/{job['id']}")
        return job


def coded(mask: np.ndarray) -> str:
    return base64.b64encode(mask.tobytes()).decode()


@pytest.fixture(scope="module")
def model(small: Small) -> EditOptions:
    words = [*small.sizes, f"biomedclip.path={CLIP}", "sampling.steps=2"]
    return EditOptions(ckpt=small.last, config=PHANTOM, overrides=words, device="cpu")


def started(model: EditOptions, output_dir: Path, **flags: Any) -> Editor:
    options = EditOptions(**vars(model) | {"output_dir": output_dir} | flags)
    return Editor(find(options), Drafts(output_dir), options)


@pytest.fixture(scope="module")
def page(model: EditOptions, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    editor = started(model, tmp_path_factory.mktemp("edit") / "edited", path=world)
    yield Page(editor)
    editor.queue.close()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A 16-bit image without anything beside it."""
    pixels = np.random.default_rng(0).integers(0, 60000, (40, 48)).astype(np.uint16)
    write_png(tmp_path / "deep.png", pixels)
    return tmp_path / "deep.png"


# ------------------------------------------------------------------------------------------------------------ opening


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
    assert {each["prompt"] for each in state["sentences"]["prompts"]} == prompts
    assert set(state["sentences"]["types"]) == {sample.lesion_type for sample in samples if not sample.healthy}
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


def test_a_slice_of_a_volume_opens_in_any_plane_and_its_drawing_can_be_replayed(page: Page, tmp_path: Path) -> None:
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
    replayed(page, document, tmp_path)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("none.png", "does not exist"),
        ("text.png", "this is a text file"),
        ("empty", "holds no sample folder, and is no DICOM series"),
        ("cut.png", "PNG"),
        ("gone.json", "1 of 1 samples cannot be opened; the first: /none/image.png: the annotation names it"),
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


# ------------------------------------------------------------------------------------------------- masks and sentences


def test_the_suggestion_and_the_soft_mask_are_those_of_the_method(page: Page, world: Path) -> None:
    document = page.open(world)
    folder, shape = Path(document["path"]), (document["height"], document["width"])
    body = read_anatomy(folder / "anatomy.png", shape) == 1
    place = f"documents/{document['id']}"
    assert np.array_equal(np.frombuffer(page.get(f"{place}/body"), np.uint8).reshape(shape) == 255, body)
    mask = page.post(f"{place}/suggestion", size=[0.4, 0.5], side="left", irregularity=0.2, seed=7)
    hard = lesion_shaped(body, 7, (0.4, 0.5), "left", 0.2)
    assert np.array_equal(np.frombuffer(mask, np.uint8).reshape(shape), hard * np.uint8(255))
    spacing = document["spacing_mm"]
    for query, feather in (("", Feather()), ("?feather_mm=3", Feather(3, "mm"))):
        found = page.client.post(f"/api/{place}/soft{query}", content=mask)
        width = feather.pixels(hard, spacing)
        assert found.content == np.rint(soften(hard, width) * 255).astype(np.uint8).tobytes()
        facts = json.loads(found.headers["X-Facts"])
        assert facts["pixels"] == hard.sum()
        assert facts["area_mm2"] == pytest.approx(hard.sum() * spacing[0] * spacing[1], abs=0.01)
        assert facts["feather_px"] == pytest.approx(max(width), abs=0.01)


def test_without_a_vertebra_or_a_spacing_one_line_says_what_to_do(page: Page, deep: Path) -> None:
    document = page.open(deep)
    assert "nothing says where its vertebra is" in page.fault(f"documents/{document['id']}/suggestion", seed=1)
    assert "no body" in page.fault(f"documents/{document['id']}/body", 404)
    found = page.client.post(f"/api/documents/{document['id']}/soft?feather_mm=2", content=bytes(40 * 48))
    assert (found.status_code, "no spacing_mm" in found.json()["error"]) == (400, True)
    found = page.client.post(f"/api/documents/{document['id']}/soft", content=bytes(7))
    assert (found.status_code, "expected 48 x 40" in found.json()["error"]) == (400, True)


def test_tokens_are_counted_and_unknown_words_named(page: Page) -> None:
    known = page.post("tokens", prompt=page.get("state")["sentences"]["prompts"][0]["prompt"])
    assert (known["unknown"], known["fault"], known["limit"]) == ([], None, 75)
    page.editor.queue.wait()  # for BiomedCLIP
    other = page.post("tokens", prompt="severe brontosaurus lesion 骨")
    assert other["unknown"] == ["brontosaurus", "骨"]
    assert "reads 75 of the 200 tokens" in page.post("tokens", prompt="lesion " * 100)["fault"]
    assert "empty" in page.post("tokens", prompt="  ")["fault"]


# ----------------------------------------------------------------------------------------------------------- drawings


def replayed(page: Page, document: dict[str, Any], tmp_path: Path) -> Path:
    """Draw two, accept the second: it is a sample whose pixels outside are the original's and which replays exactly."""
    job = page.draw(document, n=2)
    assert (job["state"], job["image"], job["step"], len(job["results"])) == ("done", 1, 2, 2), job["error"]
    item = page.post(f"results/{job['results'][1]}/accept")
    folder = Path(item["folder"])
    assert (item["state"], folder.parent) == ("accepted", page.editor.drafts.accepted)
    shape = (document["height"], document["width"])
    original = np.frombuffer(page.get(f"documents/{document['id']}/levels"), f"<u{document['bits'] // 8}").reshape(
        shape
    )
    result = read_image(folder / "image.png")
    soft = np.frombuffer(page.get(f"results/{item['id']}/soft"), np.uint8).reshape(shape)
    assert np.array_equal(result[soft == 0], original[soft == 0])
    assert not np.array_equal(result, original)
    assert page.get(f"results/{item['id']}/levels") == result.astype(original.dtype).tobytes()
    assert page.get(f"results/{item['id']}/thumbnail.png").startswith(b"\x89PNG")
    again = tmp_path / "again"
    assert call(dataset_infer, "--replay", folder / "meta.json", "--output_dir", again, "--device", "cpu") == 0
    (replay,) = again.glob("*/image.png")
    assert replay.read_bytes() == (folder / "image.png").read_bytes()
    return folder


def test_from_the_first_step_to_the_dataset(page: Page, world: Path, tmp_path: Path) -> None:
    document = page.open(world)
    folder = replayed(page, document, tmp_path)
    (sample,) = [each for each in load_samples(folder.parent)[0] if each.sample_id == folder.name]
    assert (sample.parent_id, sample.synthetic, sample.prompt) == (document["name"], True, "severe osteolytic lesion")
    assert sample.anatomy is not None
    once = page.draw(document, n=2)
    assert once["results"][1] == next(each["id"] for each in page.get("history") if each["name"] == folder.name)
    other = page.draw(document, seed=4)
    assert other["results"][0] not in once["results"]


def test_a_training_sentence_gives_its_type_also_for_another_vertebra(page: Page, world: Path) -> None:
    document = page.open(world)
    known = page.get("state")["sentences"]["prompts"][0]
    other = known["prompt"].replace(known["level"], "L5" if known["level"] != "L5" else "L4")
    for prompt, kind in ((known["prompt"], known["lesion_type"]), (other, known["lesion_type"]), ("odd lesion", None)):
        (result,) = page.draw(document, prompt=prompt)["results"]
        meta = json.loads((page.editor.drafts.folder(result) / "meta.json").read_text())
        assert meta["lesion_type"] == kind


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"mask": coded(np.zeros((40, 48), np.uint8))}, "the mask is empty"),
        ({"mask": coded(np.full((40, 48), 255, np.uint8))}, "the mask marks the whole image"),
        ({"mask": coded(np.full((4, 4), 255, np.uint8))}, "the mask has 16 bytes; expected 48 x 40"),
        ({"mask": "no base64!"}, "mask: expected base64"),
        ({"mask": "Ä==="}, "mask: expected base64"),
        ({"prompt": "a\0b"}, "prompt: holds the control character U+0000"),
        ({"prompt": "  "}, "prompt: the prompt is empty"),
        ({"prompt": "two\nlines"}, "prompt: holds 2 lines"),
        ({"prompt": "lesion " * 100}, "prompt: Stable Diffusion's text encoder reads 75 of the 200 tokens"),
        ({"n": 0}, "n: "),
        ({"seed": -1}, "seed: "),
        ({"feather_mm": 2}, "no spacing_mm"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is_queued(
    page: Page, deep: Path, more: dict[str, Any], line: str
) -> None:
    page.editor.queue.wait()
    assert line in page.fault("draw", **page.request(page.open(deep), **more))
    assert page.get("state")["job"] is None


def test_another_checkpoint_in_the_place_of_the_loaded_one_changes_nothing(
    page: Page, deep: Path, small: Small, tmp_path: Path
) -> None:
    document = page.open(deep)
    before = page.draw(document, seed=51)["results"]
    small.last.rename(tmp_path / "elsewhere")
    try:
        assert page.draw(document, seed=51)["results"] == before
    finally:
        (tmp_path / "elsewhere").rename(small.last)


def test_a_name_that_would_hide_the_folder_is_changed(page: Page, deep: Path) -> None:
    document = page.open(deep.rename(deep.with_name(".deep.png")))
    (name,) = page.draw(document)["results"]
    assert page.editor.drafts.folder(name).name.startswith("deep_")


def test_unknown_names_are_said(page: Page, deep: Path) -> None:
    assert "no document" in page.fault("draw", 404, **(page.request(page.open(deep)) | {"document": "none"}))
    assert "no job" in page.fault("jobs/none", 404)
    assert "no drawing" in page.fault("results/none/accept", 404, reason="x")


def test_an_image_that_has_changed_is_not_drawn_into(page: Page, deep: Path) -> None:
    document = page.open(deep)
    write_png(deep, read_image(deep)[::-1])
    job = page.draw(document)
    assert job["state"] == "failed"
    assert "deep.png: has changed since it was opened" in job["error"]


def test_a_reload_while_drawing_finds_the_job_and_cancel_ends_it(
    page: Page, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, plain = threading.Event(), threading.Event(), QueuedJob.on_step

    def held(self: QueuedJob, step: int) -> None:
        begun.set()
        assert go.wait(10)
        plain(self, step)

    monkeypatch.setattr(QueuedJob, "on_step", held)
    document = page.open(deep)
    job = page.post("draw", **page.request(document, n=3, seed=11))
    assert begun.wait(10)
    assert page.get("state")["job"] == job | {"state": "running"}  # as a page that is loaded again sees it
    second = page.post("draw", **page.request(document, seed=12))  # of another tab
    assert second["state"] == "queued"
    page.post(f"jobs/{job['id']}/cancel", now=True)
    go.set()
    while page.get(f"jobs/{second['id']}")["state"] != "done":
        time.sleep(0.02)
    assert page.get(f"jobs/{job['id']}")["state"] == "cancelled"


def test_judgements_can_be_changed_and_outlive_the_server(page: Page, deep: Path) -> None:
    (name,) = page.draw(page.open(deep), seed=21)["results"]
    assert page.post(f"results/{name}/reject", reason="a seam")["state"] == "rejected"
    assert page.post(f"results/{name}/accept")["reason"] is None
    item = page.post(f"results/{name}/reject", reason="too dark")
    assert (item["state"], item["reason"], Path(item["folder"]).parent) == (
        "rejected",
        "too dark",
        page.editor.drafts.drafts,
    )
    page.post(f"results/{name}/accept")
    home = page.editor.drafts.home
    with (home / "history.jsonl").open("a") as file:
        file.write('{"id": "cut sho')  # a crash in the middle of a line
    shutil.copytree(page.editor.drafts.folder(name), home / "drafts" / "deep_00000000beef__v0")  # and before one
    again = Drafts(home)
    assert again.item(name) == page.editor.drafts.item(name)
    assert [each for each in again.items() if each["name"] != "deep_00000000beef__v0"] == page.get("history")
    assert again.item("00000000beef-0")["prompt"] == "severe osteolytic lesion"
    lines = (home / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["id"] == "00000000beef-0"  # not behind what the crash has left of a line
    reopened = Editor(page.editor.found._replace(path=None), again, page.editor.options)
    other = Page(reopened)
    assert other.get("state")["document"] is None
    document = page.editor.drafts.item(name)["document"]
    assert other.get(f"documents/{document}") == page.get(f"documents/{document}")
    deep.unlink()
    third = Page(Editor(page.editor.found._replace(path=None), again, page.editor.options))
    assert "does not exist" in third.fault(f"documents/{document}", 410)
    for each in (reopened, third.editor):
        each.queue.close()


def test_a_full_disk_on_accept_changes_nothing(page: Page, deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = page.draw(page.open(deep), seed=31)["results"]
    before, history = page.editor.drafts.item(name), (page.editor.drafts.home / "history.jsonl").read_bytes()

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("sync", "os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{drafts.__name__}.{function}", full)
            line = page.fault(f"results/{name}/accept", now=True)
        assert line.endswith("could not be written (No space left on device); nothing was changed")
        assert page.editor.drafts.item(name) == before
        assert (page.editor.drafts.home / "history.jsonl").read_bytes() == history
    assert page.post(f"results/{name}/accept")["state"] == "accepted"


def test_a_full_disk_while_drawing_is_said_and_what_was_drawn_stays(
    page: Page, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, document = drafts.Drafts.add, page.open(deep)

    def once(self: Drafts, item: dict[str, Any]) -> str:
        if item["variant"]:
            raise MedSoftError("history.jsonl: could not be written (No space left on device)")
        return plain(self, item)

    monkeypatch.setattr(drafts.Drafts, "add", once)
    job = page.draw(document, n=3, seed=41)
    assert (job["state"], len(job["results"])) == ("failed", 1)
    assert "No space left on device" in job["error"]
    assert page.editor.drafts.item(job["results"][0])["state"] == "new"


# ----------------------------------------------------------------------------------------------------------- beginning


def test_without_a_checkpoint_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no checkpoint that draws was found in .*give --ckpt"):
        find(EditOptions())


def test_the_checkpoint_of_which_most_was_trained_is_found(
    trained: dict, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.parent)
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
