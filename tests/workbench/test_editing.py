"""Masks, sentences and drawings behind the editor's routes, from the first step to the dataset."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from editing import Page, coded
from made import AXIAL, grid, marked, write_series
from tiny import Small, call, dataset_infer

from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.masks import Feather, lesion_shaped, read_anatomy, soften
from ldm.data.png import write_png
from ldm.volumes.intensity import PRESETS
from ldm.workbench.jobs import QueuedJob


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


def test_a_mask_outside_the_images_own_vertebra_is_said(page: Page, world: Path) -> None:
    document = page.open(world)
    shape = (document["height"], document["width"])
    body = read_anatomy(Path(document["path"]) / "anatomy.png", shape) == 1
    outside, mostly = np.zeros(shape, bool), body.copy()
    outside[:3, :3] = True
    mostly[np.cumsum(body).reshape(shape) > 20] = False
    mostly[:6, :10] = True

    def note(hard: np.ndarray) -> str | None:
        found = page.client.post(f"/api/documents/{document['id']}/soft", content=(hard * np.uint8(255)).tobytes())
        return json.loads(found.headers["X-Facts"])["note"]

    assert note(outside) == f"the mask lies outside the image's own vertebra, {document['level']}"
    assert note(mostly) == f"75 % of the mask lies outside the image's own vertebra, {document['level']}"
    grown = body.copy()
    grown[:6, :10] = True
    assert note(grown) is None
    assert note(np.zeros(shape, bool)) is None
    assert note(np.ones(shape, bool)) == "100 % of the image is marked: marked is what is drawn anew"


def test_an_images_own_vertebra_is_in_the_menu(page: Page, world: Path, tmp_path: Path) -> None:
    """Also where no training sentence names it, in its place along the spine."""
    known = page.editor.sentences.menus()["levels"]
    assert "L6" not in known
    shutil.copytree(page.open(world)["path"], tmp_path / "sixth")
    meta = json.loads((tmp_path / "sixth" / "meta.json").read_text())
    (tmp_path / "sixth" / "meta.json").write_text(json.dumps(meta | {"level": "L6"}))
    document = page.open(tmp_path / "sixth")
    levels = page.get("state")["sentences"]["levels"]
    assert (document["level"], levels) == ("L6", [*known, "L6"])


def test_without_a_vertebra_or_a_spacing_one_line_says_what_to_do(page: Page, deep: Path) -> None:
    document = page.open(deep)
    assert "nothing says where its vertebra is" in page.fault(f"documents/{document['id']}/suggestion", seed=1)
    assert "no body" in page.fault(f"documents/{document['id']}/body", 404)
    found = page.client.post(f"/api/documents/{document['id']}/soft?feather_mm=2", content=bytes(40 * 48))
    assert (found.status_code, "no spacing_mm" in found.json()["error"]) == (400, True)
    found = page.client.post(f"/api/documents/{document['id']}/soft", content=bytes(7))
    assert (found.status_code, "expected 48 x 40" in found.json()["error"]) == (400, True)


def test_a_mask_of_bits_is_the_same_mask(page: Page, deep: Path) -> None:
    document = page.open(deep)
    hard = np.random.default_rng(0).random((40, 48)) < 0.2
    place = f"/api/documents/{document['id']}/soft"
    answers = [page.client.post(place, content=data.tobytes()) for data in (hard * np.uint8(255), np.packbits(hard))]
    assert answers[0].content == answers[1].content
    assert json.loads(answers[0].headers["X-Facts"])["pixels"] == hard.sum()
    drawn = page.draw(document, mask=coded(np.packbits(hard)))
    assert page.get(f"results/{drawn['results'][0]}/mask") == (hard * np.uint8(255)).tobytes()


def test_tokens_are_counted_and_unknown_words_named(page: Page) -> None:
    known = page.post("tokens", prompt=page.get("sentences")["sentences"][0]["prompt"])
    assert (known["unknown"], known["fault"], known["limit"]) == ([], None, 75)
    page.editor.queue.wait()  # for BiomedCLIP
    other = page.post("tokens", prompt="severe brontosaurus lesion 骨")
    assert other["unknown"] == ["brontosaurus", "骨"]
    assert "reads 75 of the 200 tokens" in page.post("tokens", prompt="lesion " * 100)["fault"]
    assert "empty" in page.post("tokens", prompt="  ")["fault"]


def test_a_prompt_about_another_vertebra_is_said(page: Page, world: Path) -> None:
    document = page.open(world)
    other = "L5" if document["level"] != "L5" else "L4"
    asked = {"prompt": f"severe lesion of the {other} vertebra", "document": document["id"]}
    said = f"the prompt names {other}, the image's level is {document['level']}"
    assert page.post("tokens", **asked)["contradiction"] == said
    assert page.post("tokens", **asked | {"prompt": f"lesion of {document['level']}"})["contradiction"] is None
    assert page.post("tokens", prompt=asked["prompt"])["contradiction"] is None
    assert "no document none is open" in page.fault("tokens", 404, **asked | {"document": "none"})


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


def test_a_dicom_slice_keeps_its_sixteen_bits_and_what_they_mean(page: Page, tmp_path: Path) -> None:
    values = marked((48, 40, 1))
    scale = {"RescaleSlope": "2", "RescaleIntercept": "-1000"}
    (path,) = write_series(tmp_path / "ct", values, grid(AXIAL, values.shape, (0.5, 0.5, 3.0)), **scale)
    document = page.open(path)
    folder = replayed(page, document, tmp_path)
    assert sorted(each.name for each in folder.iterdir()) == [
        "image.png",
        "mask.png",
        "meta.json",
        "prompt.txt",
        "soft_mask.png",
    ]
    image, soft, stored = read_image(folder / "image.png"), read_image(folder / "soft_mask.png"), values[:, :, 0].T
    assert image.dtype == np.uint16
    assert np.array_equal(image[soft == 0], stored[soft == 0])
    assert not np.array_equal(image, stored)
    meta = json.loads((folder / "meta.json").read_text())
    known = {"value_scale": 2, "value_offset": -1000, "unit": "HU", "modality": "CT", "spacing_mm": [0.5, 0.5]}
    assert {key: meta[key] for key in known} == known
    assert meta["window"] == document["window"] == [(each + 1000) / 2 for each in PRESETS["bone"]]
    assert np.array_equal(read_image(folder / meta["parent_image"]), stored)  # in sources/, where --replay finds it


def test_a_training_sentence_gives_its_type_also_for_another_vertebra(page: Page, world: Path) -> None:
    document = page.open(world)
    known = page.get("sentences")["sentences"][0]
    other = known["prompt"].replace(known["level"], "L5" if known["level"] != "L5" else "L4")
    for prompt, kind in ((known["prompt"], known["lesion_type"]), (other, known["lesion_type"]), ("odd lesion", None)):
        (result,) = page.draw(document, prompt=prompt)["results"]
        meta = json.loads((Path(page.get(f"results/{result}")["folder"]) / "meta.json").read_text())
        assert meta["lesion_type"] == kind


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"mask": coded(np.zeros((40, 48), np.uint8))}, "the mask is empty"),
        ({"mask": coded(np.full((40, 48), 255, np.uint8))}, "the mask marks the whole image"),
        (
            {"mask": coded(np.full((4, 4), 255, np.uint8))},
            "the mask has 16 bytes; expected 48 x 40, a byte or a bit a pixel",
        ),
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
    assert Path(page.get(f"results/{name}")["folder"]).name.startswith("deep_")


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
