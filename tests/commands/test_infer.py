"""dataset_infer.py through its command line: what it draws on, what it leaves untouched, what it refuses."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TRAIN, infer, metas, record, whole

from ldm.data.annotations import load_samples
from ldm.data.folders import scan_folder
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.preparation import lesion_diameter
from ldm.inference.inpainter import Inpainter


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


# ---------------------------------------------------------------------------------------------- what comes out


def test_default_draws_on_the_healthy_with_prompts_of_the_diseased(results: Path, world: Path) -> None:
    samples = {sample.sample_id: sample for sample in load_samples(world / TRAIN)[0]}
    healthy = [name for name, sample in samples.items() if sample.healthy]
    found = metas(results)
    assert set(found) == {f"{name}__v0" for name in healthy}
    for name, meta in found.items():
        source, parent = samples[meta["prompt_from"]], samples[meta["parent_id"]]
        assert not source.healthy
        assert (results / name / "prompt.txt").read_text().strip() == source.prompt.replace(source.level, parent.level)
        assert meta["prompt_match"] in ("same level", f"{source.level} replaced by {parent.level}")
        assert (meta["lesion_type"], meta["severity"]) == (source.lesion_type, source.severity)
        assert (meta["patient_id"], meta["level"]) == (parent.patient_id, parent.level)
        assert meta["spacing_mm"] == parent.meta["spacing_mm"]
        assert (results / name / meta["parent_image"]).samefile(parent.image)
        assert (results / name / "anatomy.png").read_bytes() == parent.anatomy.read_bytes()
        assert meta["prompt"] == source.prompt.replace(source.level, parent.level)
        assert meta["synthetic"] is True
        assert (meta["seed"], meta["variant"], meta["changed_outside_pixels"]) == (0, 0, 0)
        assert len(meta["checkpoint_sha256"]) == len(meta["config_sha256"]) == 64
        assert meta["command"].startswith("python ")
    whole(results)
    kept = record(results)
    assert (kept["complete"], kept["pictures"], kept["rejected"], kept["changed_outside_pixels"]) == (True, 5, 0, 0)


def test_masks_are_as_large_as_the_lesions_the_prompts_were_written_about(results: Path, world: Path) -> None:
    samples = {sample.sample_id: sample for sample in load_samples(world / TRAIN)[0]}
    for name, meta in metas(results).items():
        source = lesion_diameter(samples[meta["prompt_from"]])
        drawn = dataclasses.replace(samples[meta["parent_id"]], mask=results / name / "mask.png")
        assert lesion_diameter(drawn) == pytest.approx(source, rel=0.25)  # a tenth either way, clipped by the vertebra
        assert lesion_diameter(dataclasses.replace(drawn, anatomy=None)) is None


def test_nothing_changes_outside_the_soft_mask(results: Path) -> None:
    for name, meta in metas(results).items():
        assert changed_outside(results / name, results / name / meta["parent_image"]) == 0


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
    assert infer(final, tmp_path / "out", "--train_json", world / TRAIN, "--limit", 1, "--variants", 2) == 0
    assert "inpainting 1 healthy sample of" in caplog.text
    assert "prompts of 4 diseased samples of" in caplog.text
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
    plain = Inpainter.begin
    monkeypatch.setattr(Inpainter, "begin", lambda self, p, j: jobs.extend(j) or plain(self, p, j))
    assert infer(final, tmp_path / "out", "--like", results, "--prompt", "healthy", "--limit", 2) == 0
    before, after = metas(results), metas(tmp_path / "out")
    assert set(after) == set(list(before)[:2])
    for name, meta in after.items():
        for file in ("mask.png", "soft_mask.png"):
            assert np.array_equal(read_image(results / name / file), read_image(tmp_path / "out" / name / file))
        parent = tmp_path / "out" / name / meta["parent_image"]
        assert parent.samefile(results / name / before[name]["parent_image"])
        assert meta["parent_id"] == before[name]["parent_id"]
        assert meta["patient_id"] == before[name]["patient_id"]
        assert meta["lesion_type"] is None
        assert changed_outside(tmp_path / "out" / name, parent) == 0
    assert [job.sample_id for job in jobs] == [before[name]["parent_id"] for name in after]  # so, the same noise


def test_like_says_where_the_noise_was_that_of_another_version(
    final: Path, results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, path in enumerate(sorted(results.glob("*__v0"))[:2]):
        shutil.copytree(path, tmp_path / "old" / path.name)
        meta = json.loads((path / "meta.json").read_text())
        meta["parent_image"] = str((path / meta["parent_image"]).resolve())
        older = {key: value for key, value in meta.items() if key != "noise" or number}
        (tmp_path / "old" / path.name / "meta.json").write_text(json.dumps(older))
    assert infer(final, tmp_path / "out", "--like", tmp_path / "old") == 0
    assert "old: the noise of 1 result is another version's" in caplog.text


def test_like_says_with_which_sampling_the_results_were_made(
    final: Path, results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = ["--like", results, "--limit", 1, "--sampler", "ddim", "--steps", 3, "--step_spacing", "leading"]
    assert infer(final, tmp_path / "other", *other, "--guidance_interval", 0.5, 1) == 0
    (said,) = [line for line in caplog.messages if "was sampled with other settings" in line]
    assert f"{results}: " in said
    before = record(results)["settings"]["sampling"]
    cure = shlex.split(said.partition("to sample as then, give ")[2])
    assert {f"sampling.{key}={before[key]}" for key in ("sampler", "steps")} <= set(cure)
    assert not any("batch_size" in each or "rescale" in each for each in cure)
    caplog.clear()
    assert infer(final, tmp_path / "same", *other, *cure, "sampling.steps=2") == 0
    assert "was sampled with other settings" not in caplog.text
    assert record(tmp_path / "same")["settings"]["sampling"] == before


def test_like_draws_the_same_with_the_seed_of_the_results(final: Path, world: Path, tmp_path: Path) -> None:
    given = ["--data", world / "val", "--choose", "healthy", "--train_json", world / TRAIN]
    assert infer(final, tmp_path / "first", *given, "--seed", 5, "--exact") == 0
    assert infer(final, tmp_path / "again", "--like", tmp_path / "first", "--exact") == 0
    ((name, before),) = metas(tmp_path / "first").items()
    ((_, meta),) = metas(tmp_path / "again").items()
    assert meta["seed"] == before["seed"] == 5
    assert meta["lesion_type"] == before["lesion_type"]
    for file in ("image.png", "mask.png", "soft_mask.png"):
        assert np.array_equal(*(read_image(tmp_path / folder / name / file) for folder in ("first", "again")))


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
    import ldm.inference.inpainter

    plain, noises = ldm.inference.inpainter.image_noise, {}

    def image_noise(*name: Any) -> torch.Tensor:
        made = plain(*name)
        noises.setdefault(name, []).append(made)
        return made

    monkeypatch.setattr(ldm.inference.inpainter, "image_noise", image_noise)
    for size in (1, 8):
        given = ["--train_json", world / TRAIN, "--limit", 4, "--variants", 2, "--batch_size", size]
        assert infer(final, tmp_path / str(size), *given) == 0
    assert len(noises) == 8
    assert all(torch.equal(a, b) for a, b in noises.values())
    for name in metas(tmp_path / "1"):
        alone = read_image(tmp_path / "1" / name / "image.png").astype(int)
        for other in (tmp_path / "8", results):  # the results hold the first variant only
            if (other / name).exists():
                assert np.abs(alone - read_image(other / name / "image.png").astype(int)).max() <= 1


def test_exact_gives_equal_files(final: Path, world: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        given = ["--data", world / "val", "--choose", "diseased", "--exact"]
        assert infer(final, tmp_path / name, *given) == 0
    for file in sorted((tmp_path / "a").glob("*/*")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file
