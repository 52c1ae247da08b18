"""dataset_infer.py through its command line: what it draws on, what it leaves untouched, what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PHANTOM, ROOT, edit, infer

from ldm.annotations import load_samples, scan_folder
from ldm.errors import MedSoftError, UsageError
from ldm.images import read_image, write_png
from ldm.inpainting import Inpainter


@pytest.fixture(scope="module")
def final(trained: dict) -> Path:
    return trained["stage2_2"].last


@pytest.fixture(scope="module")
def results(final: Path, world: Path) -> Path:
    """The default run: healthy training images, prompts of diseased ones; batches of two."""
    assert infer(final, world / "results", "--train_json", world / "train", "--batch_size", 2) == 0
    return world / "results"


def metas(folder: Path) -> dict[str, dict]:
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/meta.json"))}
    assert found
    return found


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inference.json").read_text())


def whole(folder: Path) -> None:
    """Nothing half-written lies there, and every sample folder has all its files."""
    assert not list(folder.rglob(".partial-*"))
    for meta in folder.rglob("meta.json"):
        names = {file.name for file in meta.parent.iterdir()}
        assert names == {"image.png", "mask.png", "soft_mask.png", "prompt.txt", "meta.json"}


def changed_outside(folder: Path, parent: Path) -> int:
    """Pixels outside the soft mask that differ from the parent, counted from the files."""
    drawn, original = np.array(Image.open(folder / "image.png")), np.array(Image.open(parent))
    soft = np.array(Image.open(folder / "soft_mask.png"))
    assert drawn.shape == original.shape
    assert drawn.dtype == original.dtype
    assert soft.shape == original.shape[:2]
    different = drawn != original
    different = different.any(-1) if different.ndim == 3 else different
    assert different[soft > 0].any()  # it did draw
    return int(different[soft == 0].sum())


@pytest.fixture
def one(world: Path, tmp_path: Path) -> Path:
    """A data folder with one diseased phantom."""
    folder = next(path.parent for path in sorted((world / "train").glob("*/mask.png")))
    shutil.copytree(folder, tmp_path / "data" / folder.name)
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------- what comes out


def test_default_draws_on_the_healthy_with_prompts_of_the_diseased(results: Path, world: Path) -> None:
    samples = {sample.sample_id: sample for sample in load_samples(world / "train")[0]}
    healthy = [name for name, sample in samples.items() if sample.healthy]
    found = metas(results)
    assert set(found) == {f"{name}__v0" for name in healthy}
    for name, meta in found.items():
        source, parent = samples[meta["prompt_from"]], samples[meta["parent_id"]]
        assert not source.healthy
        assert (results / name / "prompt.txt").read_text().strip() == source.prompt
        assert (meta["lesion_type"], meta["severity"]) == (source.lesion_type, source.severity)
        assert (meta["patient_id"], meta["level"]) == (parent.patient_id, parent.level)
        assert meta["spacing_mm"] == parent.meta["spacing_mm"]
        assert meta["parent_image"] == str(parent.image)
        assert meta["synthetic"] is True
        assert (meta["seed"], meta["variant"], meta["changed_outside_pixels"]) == (0, 0, 0)
        assert len(meta["checkpoint_sha256"]) == len(meta["config_sha256"]) == 64
        assert meta["command"].startswith("python ")
    whole(results)
    kept = record(results)
    assert (kept["complete"], kept["pictures"], kept["rejected"], kept["changed_outside_pixels"]) == (True, 5, 0, 0)


def test_nothing_changes_outside_the_soft_mask(results: Path) -> None:
    for name, meta in metas(results).items():
        assert changed_outside(results / name, Path(meta["parent_image"])) == 0


def test_pictures_say_that_they_are_synthetic(results: Path) -> None:
    for name in metas(results):
        with Image.open(results / name / "image.png") as picture:
            assert "synthetic" in picture.text["Comment"]
            assert picture.mode == "L"
            assert picture.text["Description"] == (results / name / "prompt.txt").read_text().strip()


def test_output_is_a_dataset_folder(results: Path) -> None:
    samples, rejects = scan_folder(results)
    assert not rejects
    assert len(samples) == 5
    assert all(sample.synthetic and not sample.healthy and sample.soft_mask for sample in samples)
    assert all(max(sample.box) > 0 for sample in samples)


def test_says_what_it_draws_on(final: Path, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert infer(final, tmp_path / "out", "--train_json", world / "train", "--limit", 1, "--variants", 2) == 0
    assert "drawing on 1 healthy samples of" in caplog.text
    assert "prompts drawn from 4 diseased samples of" in caplog.text
    (a, b) = metas(tmp_path / "out").values()
    assert {a["variant"], b["variant"]} == {0, 1}
    assert a["parent_id"] == b["parent_id"]
    masks = [(tmp_path / "out" / meta["sample_id"] / "mask.png").read_bytes() for meta in (a, b)]
    assert masks[0] != masks[1]


def test_without_healthy_samples_the_diseased_are_redrawn(one: Path, final: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--train_json", one) == 0
    (sample,) = load_samples(one)[0]
    ((name, meta),) = metas(tmp_path / "out").items()
    assert name == f"{sample.sample_id}__v0"
    assert (tmp_path / "out" / name / "prompt.txt").read_text().strip() == sample.prompt
    assert meta["lesion_type"] == sample.lesion_type
    assert np.array_equal(read_image(tmp_path / "out" / name / "mask.png"), read_image(sample.mask))
    assert changed_outside(tmp_path / "out" / name, sample.image) == 0


def test_data_choose_and_prompt(final: Path, world: Path, tmp_path: Path) -> None:
    given = ["--data", world / "val", "--choose", "all", "--prompt", "a dark round lesion"]
    assert infer(final, tmp_path / "out", *given) == 0
    found = metas(tmp_path / "out")
    assert len(found) == 3
    for name, meta in found.items():
        assert (tmp_path / "out" / name / "prompt.txt").read_text() == "a dark round lesion\n"
        assert meta["lesion_type"] is None
        assert meta["severity"] is None


def test_like_redraws_the_same_masks_with_another_prompt(
    results: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    plain = Inpainter.draw
    monkeypatch.setattr(Inpainter, "draw", lambda self, p, j: jobs.extend(j) or plain(self, p, j))
    assert infer(final, tmp_path / "out", "--like", results, "--prompt", "healthy", "--limit", 2) == 0
    before, after = metas(results), metas(tmp_path / "out")
    assert set(after) == set(list(before)[:2])
    for name, meta in after.items():
        for file in ("mask.png", "soft_mask.png"):
            assert np.array_equal(read_image(results / name / file), read_image(tmp_path / "out" / name / file))
        assert meta["parent_image"] == before[name]["parent_image"]
        assert meta["parent_id"] == before[name]["parent_id"]
        assert meta["patient_id"] == before[name]["patient_id"]
        assert meta["lesion_type"] is None
        assert changed_outside(tmp_path / "out" / name, Path(meta["parent_image"])) == 0
    assert [job.sample_id for job in jobs] == [before[name]["parent_id"] for name in after]  # so, the same noise


def test_like_with_its_own_prompts_draws_the_same(results: Path, final: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--like", results, "--limit", 1, "--batch_size", 1) == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    first, again = (read_image(folder / name / "image.png").astype(int) for folder in (results, tmp_path / "out"))
    assert np.abs(first - again).max() <= 1
    assert meta["lesion_type"] == metas(results)[name]["lesion_type"]


@pytest.mark.parametrize("kind", ["grey 16 bit", "RGB"])
def test_single_picture_keeps_size_and_depth(final: Path, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:75, :52]
    base = 9000 + 200 * rows + 150 * columns + rng.integers(0, 900, (75, 52))
    picture = base.astype(np.uint16) if kind == "grey 16 bit" else np.stack([base // 150] * 3, -1).astype(np.uint8)
    picture[..., -1] = picture[..., -1] + 3 if kind == "RGB" else picture[..., -1]
    mask = np.zeros((75, 52), np.uint8)
    mask[30:44, 20:33] = 255
    write_png(tmp_path / "spine.png", picture)
    write_png(tmp_path / "lesion.png", mask)
    given = ["--image", tmp_path / "spine.png", "--mask", tmp_path / "lesion.png", "--prompt", "osteolytic lesion"]
    assert infer(final, tmp_path / "out", *given, "--variants", 2) == 0
    found = metas(tmp_path / "out")
    assert set(found) == {"spine__v0", "spine__v1"}
    for name in found:
        drawn = read_image(tmp_path / "out" / name / "image.png")
        soft = read_image(tmp_path / "out" / name / "soft_mask.png")
        assert (drawn.shape, drawn.dtype) == (picture.shape, picture.dtype)
        assert np.array_equal(drawn[soft == 0], picture[soft == 0])
        assert (drawn != picture)[mask > 0].any()
        assert (soft[mask > 0] == 255).all()
    assert ("window" in found["spine__v0"]) == (kind == "grey 16 bit")
    a, b = (read_image(tmp_path / "out" / name / "image.png") for name in found)
    assert not np.array_equal(a, b)


def test_batch_size_does_not_change_the_picture(
    final: Path, world: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is equal bit for bit; pixels differ by a grey level at most."""
    import ldm.inpainting

    plain, noises = ldm.inpainting.picture_noise, {}

    def picture_noise(*name: Any) -> torch.Tensor:
        made = plain(*name)
        noises.setdefault(name, []).append(made)
        return made

    monkeypatch.setattr(ldm.inpainting, "picture_noise", picture_noise)
    for size in (1, 3):
        given = ["--train_json", world / "train", "--limit", 3, "--batch_size", size]
        assert infer(final, tmp_path / str(size), *given) == 0
    assert len(noises) == 3
    assert all(torch.equal(a, b) for a, b in noises.values())
    for name in metas(tmp_path / "1"):
        alone = read_image(tmp_path / "1" / name / "image.png").astype(int)
        for other in (tmp_path / "3", results):
            assert np.abs(alone - read_image(other / name / "image.png").astype(int)).max() <= 1


def test_exact_gives_equal_files(final: Path, world: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for name in ("a", "b"):
            given = ["--data", world / "val", "--choose", "diseased", "--exact"]
            assert infer(final, tmp_path / name, *given) == 0
    finally:
        torch.set_num_threads(threads)
    for file in sorted((tmp_path / "a").glob("*/*")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


# ------------------------------------------------------------------------------------------------- running it again


def test_again_is_complete(
    final: Path, results: Path, world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("dataset_infer.load_inpainter", lambda *_: pytest.fail("loaded the model"))
    assert infer(final, results, "--train_json", world / "train", "--batch_size", 1) == 0
    assert "already complete (5 pictures)" in caplog.text


def test_removed_picture_is_drawn_again(final: Path, results: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "out")
    name = min(metas(results))
    shutil.rmtree(tmp_path / "out" / name)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/image.png")}
    assert infer(final, tmp_path / "out", "--train_json", world / "train", "--batch_size", 1) == 0
    first, again = (read_image(folder / name / "image.png").astype(int) for folder in (results, tmp_path / "out"))
    assert np.abs(first - again).max() <= 1
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert record(tmp_path / "out")["pictures"] == 5


def test_interrupted_run_is_finished(
    final: Path, world: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--train_json", world / "train", "--batch_size", 2]
    plain, calls = Inpainter.draw, []

    def draw(self: Inpainter, pictures: Any, jobs: Any) -> Any:
        calls.append(len(jobs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, pictures, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(Inpainter, "draw", draw)
        with pytest.raises(KeyboardInterrupt):
            infer(final, tmp_path / "out", *given)
    whole(tmp_path / "out")
    assert len(metas(tmp_path / "out")) == 2
    assert record(tmp_path / "out")["complete"] is False
    leftover = tmp_path / "out" / ".partial-x__v0"
    leftover.mkdir()  # as a kill in the middle of writing leaves it
    assert infer(final, tmp_path / "out", *given) == 0
    whole(tmp_path / "out")
    assert set(metas(tmp_path / "out")) == set(metas(results))
    assert (record(tmp_path / "out")["complete"], record(tmp_path / "out")["pictures"]) == (True, 5)


@pytest.mark.parametrize("other", [["--seed", 1], ["--steps", 3], ["--prompt", "x"], ["sampling.differential=false"]])
def test_other_settings_are_refused(final: Path, results: Path, world: Path, other: list) -> None:
    before = (results / "inference.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds the results of another run .*--overwrite"):
        infer(final, results, "--train_json", world / "train", *other)
    assert (results / "inference.json").read_bytes() == before


def test_changed_input_is_another_run(final: Path, one: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--data", one) == 0
    image = next(one.glob("*/image.png"))
    write_png(image, 255 - read_image(image))
    with pytest.raises(UsageError, match="another run"):
        infer(final, tmp_path / "out", "--data", one)


def test_overwrite_replaces_the_results_of_another_run(final: Path, one: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--data", one, "--variants", 2) == 0
    assert infer(final, tmp_path / "out", "--data", one, "--seed", 7, "--overwrite") == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    assert name.endswith("__v0")
    assert meta["seed"] == 7


def test_folder_with_something_else_is_left_alone(final: Path, one: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(UsageError, match="is not empty and holds no results of this command"):
            infer(final, tmp_path / "out", "--data", one, *flags)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


# ---------------------------------------------------------------------------------------------------------- bad input


def test_one_bad_image_among_several(final: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "val", tmp_path / "data")
    bad = next((tmp_path / "data").glob("*/mask.png")).parent / "image.png"
    bad.write_bytes(bad.read_bytes()[:700])
    for _ in range(2):  # the second time it is complete, and says so with the same code
        assert infer(final, tmp_path / "out", "--data", tmp_path / "data", "--choose", "diseased") == 3
    assert len(metas(tmp_path / "out")) == 1
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert reject["sample_id"] == bad.parent.name
    assert "image.png" in reject["file"]
    whole(tmp_path / "out")


def test_image_that_breaks_after_the_annotation_does_not_lose_its_batch(
    final: Path, world: Path, tmp_path: Path
) -> None:
    from ldm.annotations import write_annotations

    shutil.copytree(world / "val", tmp_path / "data")
    write_annotations(tmp_path / "data.json", scan_folder(tmp_path / "data")[0])
    bad = next((tmp_path / "data").glob("*/mask.png"))
    bad.write_bytes(b"")
    assert infer(final, tmp_path / "out", "--data", tmp_path / "data.json", "--choose", "diseased") == 3
    assert len(metas(tmp_path / "out")) == 1
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert "mask.png" in reject["reason"]


def test_model_that_draws_nan_writes_nothing(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Inpainter.generate
    monkeypatch.setattr(Inpainter, "generate", lambda *given: plain(*given) * float("nan"))
    with pytest.raises(MedSoftError, match=r"no picture could be drawn; see .*rejects\.json"):
        infer(final, tmp_path / "out", "--data", one)
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert "NaN" in reject["reason"]
    assert not list((tmp_path / "out").rglob("*.png"))


def test_weights_that_are_nan_are_refused(final: Path, one: Path, tmp_path: Path) -> None:
    bad = edit(final, tmp_path / "nan.ckpt", keep=lambda key, v: v / 0 if key == "msc.position" else v)
    with pytest.raises(MedSoftError, match=r"nan\.ckpt: 1 tensors hold NaN"):
        infer(bad, tmp_path / "out", "--data", one)


def test_empty_mask_and_other_size_of_a_single_picture(final: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "i.png", np.full((40, 40), 90, np.uint8))
    write_png(tmp_path / "empty.png", np.zeros((40, 40), np.uint8))
    write_png(tmp_path / "small.png", np.full((30, 40), 255, np.uint8))
    for name, message in (("empty", "the mask is empty"), ("small", "40"), ("none", "does not exist")):
        given = ["--image", tmp_path / "i.png", "--mask", tmp_path / f"{name}.png", "--prompt", "lesion"]
        with pytest.raises(MedSoftError, match=r"no picture could be drawn"):
            infer(final, tmp_path / name, *given)
        (reject,) = json.loads((tmp_path / name / "rejects.json").read_text())
        assert f"{name}.png" in reject["reason"]
        assert message in reject["reason"]


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "a/../../b"])
def test_sample_ids_cannot_leave_the_output_folder(final: Path, one: Path, tmp_path: Path, name: str) -> None:
    from ldm.annotations import write_annotations

    write_annotations(tmp_path / "data.json", scan_folder(one)[0])
    records = json.loads((tmp_path / "data.json").read_text())
    records[0]["sample_id"] = name
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(MedSoftError, match=r"sample_id"):
        infer(final, tmp_path / "deep" / "out", "--data", tmp_path / "data.json")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "i.png"], "--image needs --mask and --prompt"),
        (["--mask", "m.png"], "--mask belongs to --image"),
        (["--data", "a", "--like", "b"], "exclude each other"),
        (["--variants", "0"], "--variants and --limit: expected at least 1"),
        (["--limit", "-1"], "--variants and --limit: expected at least 1"),
        (["sampling.stepps=3"], "did you mean sampling.steps"),
    ],
)
def test_wrong_usage(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        infer(tmp_path / "none.ckpt", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_checkpoint_without_all_parts(trained: dict, one: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"It holds unet, autoencoder, text \(it was left by unet_only\); needed"):
        infer(trained["unet_only"].last, tmp_path / "out", "--data", one)


def test_healthy_images_without_any_prompt(final: Path, world: Path, tmp_path: Path) -> None:
    healthy = next(p.parent for p in sorted((world / "train").glob("*/")) if not (p / "mask.png").exists())
    shutil.copytree(healthy if healthy.name != "train" else world / "train", tmp_path / "data")
    for mask in (tmp_path / "data").glob("*/mask.png"):
        shutil.rmtree(mask.parent)
    with pytest.raises(MedSoftError, match=r"has no diseased sample to take prompts from; give --prompt"):
        infer(final, tmp_path / "out", "--train_json", tmp_path / "data")


def test_one_line_and_exit_code(tmp_path: Path) -> None:
    given = ["--ckpt", "c.ckpt", "--config", PHANTOM, "--output_dir", "out", "--data", "nowhere"]
    found = subprocess.run(
        [sys.executable, ROOT / "dataset_infer.py", *given], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: nowhere: does not exist")
    assert not list(tmp_path.iterdir())
