"""tool/copy_paste.py, and where the masks of healthy images come from: carried over, lesion-shaped, or their own."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CLIP, PHANTOM, TRAIN, call, infer, metas, record, whole

import dataset_infer
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import Contents
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.checks import salted_digest
from ldm.data.folders import scan_folder
from ldm.data.images import read_image
from ldm.data.masks import read_anatomy, read_mask
from ldm.data.png import write_png
from ldm.inference.options import InferenceOptions
from ldm.inference.shares import Share
from ldm.inference.tasks import plan_tasks
from tool import copy_paste


def pasted(output: Path, train: Path, *more: Any) -> int:
    return call(copy_paste, "--train_json", train, "--output_dir", output, *more)


@pytest.fixture(scope="module")
def pastes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pastes") / "out"
    assert pasted(output, world / TRAIN) == 0
    return output


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """A copy of the training phantoms."""
    return Path(shutil.copytree(world / "train", tmp_path / "data"))


def of(folder: Path, healthy: bool) -> list[Path]:
    """The sample folders of a class."""
    return [p.parent for p in sorted(folder.glob("*/prompt.txt")) if (p.read_text().strip() == "healthy") == healthy]


# ---------------------------------------------------------------------------------------------------- carried masks


def test_masks_are_those_of_the_prompts_lesions_carried_over(results: Path, world: Path) -> None:
    samples = {sample.sample_id: sample for sample in load_samples(world / TRAIN)[0]}
    for name, meta in metas(results).items():
        assert meta["mask_from"] == "carry"
        assert meta["mask_source"] == meta["prompt_from"]
        mask, source = read_mask(results / name / "mask.png").hard, samples[meta["mask_source"]]
        lesion = read_mask(source.mask).hard
        body = read_anatomy(samples[meta["parent_id"]].anatomy, mask.shape) == 1
        home = read_anatomy(source.anatomy, lesion.shape) == 1
        outside = (lesion & ~home).sum() / lesion.sum()
        assert (mask & ~body).sum() <= outside * mask.sum() + 1
        assert mask.sum() / body.sum() == pytest.approx(lesion.sum() / home.sum(), rel=0.3)
    assert record(results)["masks"] == {"carry": 5}
    assert record(results)["settings"]["masks"] == "carry"


def test_a_limit_counts_what_can_be_inpainted(data: Path, tmp_path: Path) -> None:
    first, *others = of(data, healthy=True)
    (first / "anatomy.png").unlink()
    (first / "mask.png").unlink(missing_ok=True)
    assert pasted(tmp_path / "out", data, "--limit", 2) == 3
    assert set(metas(tmp_path / "out")) == {f"{folder.name}__v0" for folder in others[:2]}
    rejects = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert [reject["sample_id"] for reject in rejects] == [first.name]


def test_lesions_can_be_those_of_samples_with_the_same_value_of_a_key(data: Path, tmp_path: Path) -> None:
    for side in (True, False):
        for number, folder in enumerate(of(data, healthy=side)):
            meta = json.loads((folder / "meta.json").read_text())
            (folder / "meta.json").write_text(json.dumps({**meta, "sign": ["lytic", "blastic"][number % 2]}))
    assert pasted(tmp_path / "out", data, "--match", "replace", "sign") == 0
    for meta in metas(tmp_path / "out").values():
        source = json.loads((data / meta["pasted_from"] / "meta.json").read_text())
        assert meta["sign"] == source["sign"]
        assert meta["prompt_match"].endswith("same sign")
    assert record(tmp_path / "out")["settings"]["match"] == "replace sign"
    with pytest.raises(UsageError, match=r"--match sing: no healthy sample of .* has this key"):
        pasted(tmp_path / "more", data, "--match", "sing")


def test_what_cannot_be_carried_falls_back_and_is_counted(data: Path, tmp_path: Path, caplog: Any) -> None:
    """Three of four sources have no label 1: the images with their prompts get lesion-shaped masks."""
    caplog.set_level("INFO")
    for folder in of(data, healthy=False)[1:]:
        labels = read_image(folder / "anatomy.png")
        write_png(folder / "anatomy.png", np.where(labels == 1, 0, labels).astype(np.uint8))
    assert pasted(tmp_path / "out", data, "--match", "none", "--variants", 3) == 0
    found = metas(tmp_path / "out").values()
    fallen = [meta for meta in found if meta["mask_from"] == "blob"]
    assert 0 < len(fallen) < len(found)
    assert {meta["mask_fallback"] for meta in fallen} == {"the prompt's sample marks no vertebra"}
    assert not any("mask_source" in meta for meta in fallen)
    counts = {"carry": len(found) - len(fallen), "blob (the prompt's sample marks no vertebra)": len(fallen)}
    assert record(tmp_path / "out")["masks"] == counts
    assert f"their masks: {len(fallen)} blob (the prompt's sample marks no vertebra), " in caplog.text


def test_without_label_maps_the_forms_of_lesions_are_carried_over(data: Path, tmp_path: Path) -> None:
    """The results say so, are made again from what they say, and have the lesions' sizes in mm."""
    for folder in of(data, healthy=False):
        (folder / "anatomy.png").unlink()
    assert pasted(tmp_path / "out", data, "--match", "none", "--variants", 2) == 0
    reason = "the prompt's sample has no anatomy.png: only its lesion's form is carried over, as large as it was in mm"
    found = metas(tmp_path / "out")
    assert record(tmp_path / "out")["masks"] == {f"carry ({reason})": len(found)}
    for name, meta in found.items():
        assert (meta["mask_from"], meta["mask_fallback"]) == ("carry", reason)
        assert meta["mask_source"] == meta["pasted_from"]
        mask, lesion = (
            read_mask(path / "mask.png").hard for path in (tmp_path / "out" / name, data / meta["mask_source"])
        )
        body = read_anatomy(data / meta["parent_id"] / "anatomy.png", mask.shape) == 1
        assert not (mask & ~body).any()
        spacings = [
            json.loads((data / meta[key] / "meta.json").read_text())["spacing_mm"]
            for key in ("parent_id", "mask_source")
        ]
        there, here = (np.prod(each) if isinstance(each, list) else each**2 for each in spacings)
        assert mask.sum() * there == pytest.approx(lesion.sum() * here, rel=0.3)
    options = InferenceOptions(tmp_path / "again", train_json=data, like=tmp_path / "out")
    assert {task.mask.fallback for task in plan_tasks(options, Contents()).tasks} == {reason}


def test_two_lesions_of_one_image_keep_their_own_masks(data: Path, tmp_path: Path) -> None:
    """Rows of an annotation file may share an image; each lesion is the row's."""
    samples = load_samples(data)[0]
    wide, *_ = (sample for sample in samples if not sample.healthy)
    small = read_mask(wide.mask).hard
    small &= np.cumsum(small).reshape(small.shape) <= small.sum() // 8
    write_png(tmp_path / "small.png", small.astype(np.uint8) * 255)
    rows = [dataclasses.replace(wide, sample_id="a")]
    rows += [dataclasses.replace(wide, sample_id="b", mask=tmp_path / "small.png")]
    write_annotations(tmp_path / "two.json", [*rows, *(sample for sample in samples if sample.healthy)])
    assert pasted(tmp_path / "out", tmp_path / "two.json", "--match", "none", "--variants", 3) == 0
    sizes: dict[str, list[float]] = {"a": [], "b": []}
    for name, meta in metas(tmp_path / "out").items():
        sizes[meta["mask_source"]].append(float(read_mask(tmp_path / "out" / name / "mask.png").hard.sum()))
    assert max(sizes["b"]) < 0.5 * min(sizes["a"])


def test_soft_mask_of_its_own_comes_first_and_is_all_that_own_takes(data: Path, tmp_path: Path) -> None:
    first, *others = of(data, healthy=True)
    shape = read_image(first / "image.png").shape
    soft = np.zeros(shape, np.uint8)
    soft[40:50, 40:50] = 255
    write_png(first / "soft_mask.png", soft)
    assert pasted(tmp_path / "carry", data) == 0
    origins = {name.removesuffix("__v0"): meta["mask_from"] for name, meta in metas(tmp_path / "carry").items()}
    assert origins == {first.name: "own", **{folder.name: "carry" for folder in others}}
    assert np.array_equal(read_image(tmp_path / "carry" / f"{first.name}__v0" / "soft_mask.png"), soft)


def test_own_rejects_healthy_images_without_a_soft_mask(final: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"5 rejected; first: .*without a soft_mask.png, which --masks own takes"):
        infer(final, tmp_path / "out", "--train_json", world / TRAIN, "--masks", "own")


def test_results_of_before_go_on_with_lesion_shaped_masks(final: Path, world: Path, tmp_path: Path) -> None:
    """Their record says nothing of masks; the message names the flag with which they are the same run."""
    given = ["--train_json", world / TRAIN, "--limit", 1]
    assert infer(final, tmp_path / "out", *given, "--masks", "blob") == 0
    assert "masks" not in record(tmp_path / "out")["settings"]
    ((_, meta),) = metas(tmp_path / "out").items()
    assert (meta["mask_from"], meta.get("mask_source")) == ("blob", None)
    with pytest.raises(UsageError, match=r"\(masks: blob -> carry\); give --masks blob to go on with it"):
        infer(final, tmp_path / "out", *given)
    assert infer(final, tmp_path / "out", *given, "--masks", "blob") == 0


# ---------------------------------------------------------------------------------------------------------- pasting


def test_pastes_into_the_masks_of_inference(pastes: Path, results: Path, world: Path) -> None:
    samples = {sample.sample_id: sample for sample in load_samples(world / TRAIN)[0]}
    found = metas(pastes)
    assert set(found) == set(metas(results))
    whole(pastes)
    for name, meta in found.items():
        theirs = json.loads((results / name / "meta.json").read_text())
        for key in ("prompt", "prompt_from", "mask_from", "mask_source", "parent_id", "lesion_type", "severity"):
            assert meta[key] == theirs[key]
        for file in ("mask.png", "soft_mask.png", "prompt.txt"):
            assert (pastes / name / file).read_bytes() == (results / name / file).read_bytes()
        image, soft = read_image(pastes / name / "image.png"), read_image(pastes / name / "soft_mask.png")
        parent = read_image(samples[meta["parent_id"]].image)
        assert np.array_equal(image[soft == 0], parent[soft == 0])
        assert np.abs(image.astype(int) - parent)[soft == 255].mean() > 3
        assert meta["method"] == "paste"
        assert meta["pasted_from"] == meta["prompt_from"]
    (groups,) = next(iter(found.values()))["trained_on"]
    patients = {sample.patient_id for sample in samples.values() if not sample.healthy}  # also those not pasted
    assert groups["patients"] == sorted(salted_digest(groups["salt"], patient) for patient in patients)


def test_shares_name_the_same_patients_as_one_run(world: Path, tmp_path: Path) -> None:
    shares = [None, Share(1, 3), Share(2, 3), Share(3, 3)]
    options = [InferenceOptions(tmp_path, train_json=world / TRAIN, share=share) for share in shares]
    whole, *parts = [plan_tasks(each, Contents(), paste=True) for each in options]
    assert sum(len(part.tasks) for part in parts) == len(whole.tasks) > 0
    assert {part.givers for part in parts} == {whole.givers}
    assert whole.givers >= {task.donor.patient_id for task in whole.tasks}


def test_levels_beyond_those_of_the_file_are_counted(data: Path, tmp_path: Path, caplog: Any) -> None:
    for folder in of(data, healthy=True):
        bright = np.clip(1.0 * read_image(folder / "image.png") * 2 + 60, 0, 255)
        write_png(folder / "image.png", bright.astype(np.uint8))
    assert pasted(tmp_path / "out", data, "--match", "none", "--variants", 3) == 0
    counts = [meta["clipped_pixels"] for meta in metas(tmp_path / "out").values() if "clipped_pixels" in meta]
    assert min(counts) > 0
    assert record(tmp_path / "out")["clipped_pixels"] == sum(counts)
    assert f"{sum(counts)} pixels of pasted lesions were cut off, beyond the levels of the image's file" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("pasted_by", [[1, 0, 0]], "2 rows of 3 numbers, a map of the plane that can be inverted"),
        ("pasted_by", [[1, 2, 0], [2, 4, 0]], "2 rows of 3 numbers, a map of the plane that can be inverted"),
        ("mask_from", "elsewhere", "one of carry, blob, own"),
        ("mask_source", 7, "text"),
    ],
)
def test_results_that_say_nonsense_of_their_mask_are_refused(
    pastes: Path, world: Path, tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    name, meta = next(iter(metas(pastes).items()))
    shutil.copytree(pastes / name, tmp_path / "old" / name)
    (tmp_path / "old" / name / "meta.json").write_text(json.dumps({**meta, key: value}))
    options = InferenceOptions(tmp_path / "out", train_json=world / TRAIN, like=tmp_path / "old")
    with pytest.raises(MedSoftError, match=rf"meta.json: {key}: expected {expected}, found "):
        plan_tasks(options, Contents())


def test_poisson_differs_and_the_same_command_is_complete(
    pastes: Path, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for _ in range(2):
        assert pasted(tmp_path / "out", world / TRAIN, "--method", "poisson", "--limit", 2) == 0
    assert "already complete (2 images)" in caplog.text
    for name in metas(tmp_path / "out"):
        assert not np.array_equal(*(read_image(folder / name / "image.png") for folder in (pastes, tmp_path / "out")))
    with pytest.raises(UsageError, match="method: poisson -> paste"):
        pasted(tmp_path / "out", world / TRAIN, "--limit", 2)


def test_16_bits_and_the_window_stay(data: Path, tmp_path: Path) -> None:
    folder = of(data, healthy=True)[0]
    parent = 9000 + 50 * read_image(folder / "image.png").astype(np.uint16)
    write_png(folder / "image.png", parent)
    about = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(about | {"window": [9500, 20000]}))
    (tmp_path / "chosen.txt").write_text(f"{folder.name}\n")
    assert pasted(tmp_path / "out", data, "--choose", tmp_path / "chosen.txt") == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    image, soft = (
        read_image(tmp_path / "out" / name / "image.png"),
        read_image(tmp_path / "out" / name / "soft_mask.png"),
    )
    assert image.dtype == np.uint16
    assert meta["window"] == [9500, 20000]
    assert np.array_equal(image[soft == 0], parent[soft == 0])
    assert 8000 < np.median(image[soft == 255]) < 24000
    assert len(np.unique(image[soft == 255])) > 0.5 * (soft == 255).sum()  # not 256 levels


def test_replay_of_a_pasted_result_says_that_it_has_no_checkpoint(pastes: Path, tmp_path: Path) -> None:
    meta = pastes / min(metas(pastes)) / "meta.json"
    with pytest.raises(MedSoftError, match=r"meta\.json: was made without a checkpoint, by the method paste"):
        call(dataset_infer, "--replay", meta, "--output_dir", tmp_path / "again")


def test_diseased_images_have_no_lesion_to_paste(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"no sample can be inpainted .*has no lesion to paste: only healthy images"):
        pasted(tmp_path / "out", data, "--choose", "diseased")


def test_a_damaged_source_is_named_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    write_annotations(tmp_path / "train.json", scan_folder(data)[0])
    bad = of(data, healthy=False)[0]
    (bad / "image.png").write_bytes(b"")
    assert pasted(tmp_path / "out", tmp_path / "train.json", "--match", "none", "--variants", 3) == 3
    rejects = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert {reject["sample_id"] for reject in rejects} == {bad.name}
    assert "prompt and lesion come from this sample" in rejects[0]["reason"]
    assert metas(tmp_path / "out")


# ----------------------------------------------------------------------------------------- beginning with an image


def test_strength_0_is_the_autoencoder_alone(final: Path, world: Path, tmp_path: Path) -> None:
    """Neither seed nor prompt matter then."""
    given = ["--data", world / "val", "--choose", "diseased", "--limit", 1, "--init", "image", "--strength", 0]
    assert infer(final, tmp_path / "a", *given) == 0
    assert infer(final, tmp_path / "b", *given, "--seed", 1, "--prompt", "healthy") == 0
    ((name, meta),) = metas(tmp_path / "a").items()
    one, other = (read_image(tmp_path / folder / name / "image.png") for folder in "ab")
    assert np.array_equal(one, other)
    soft, parent = (
        read_image(tmp_path / "a" / name / "soft_mask.png"),
        read_image(world / "val" / name[:-4] / "image.png"),
    )
    assert np.array_equal(one[soft == 0], parent[soft == 0])
    assert 0 < np.abs(one.astype(int) - parent)[soft == 255].mean() < 25
    assert (meta["init"], meta["strength"]) == ("image", 0)


def test_a_pasted_lesion_is_finished_by_the_model_and_made_again(
    final: Path, world: Path, pastes: Path, results: Path, tmp_path: Path
) -> None:
    given = ["--train_json", world / TRAIN]
    hybrid = [*given, "--limit", 1, "--init", "paste", "--strength", 0.5, "--exact"]
    assert infer(final, tmp_path / "out", *hybrid) == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    assert (meta["init"], meta["strength"]) == ("paste", 0.5)
    assert meta["pasted_from"] == meta["mask_source"]
    images = [read_image(folder / name / "image.png") for folder in (tmp_path / "out", pastes, results)]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    replay = ["--replay", tmp_path / "out" / name / "meta.json", "--output_dir", tmp_path / "again", *given]
    again = [*replay, "--ckpt", final, "--config", PHANTOM, "--biomedclip", CLIP, "--device", "cpu"]
    assert call(dataset_infer, *again) == 0
    for file in ("image.png", "mask.png", "soft_mask.png"):
        assert (tmp_path / "again" / name / file).read_bytes() == (tmp_path / "out" / name / file).read_bytes()
    other = Path(shutil.copytree(world / "train", tmp_path / "other"))
    (other / meta["pasted_from"] / "mask.png").write_bytes((other / meta["pasted_from"] / "anatomy.png").read_bytes())
    with pytest.raises(MedSoftError, match=r"the lesion to paste, of .* give --train_json"):
        call(dataset_infer, *again[:2], "--output_dir", tmp_path / "no", "--train_json", other, *again[6:])


WRONG = {
    ("--strength", 0.5): "^--strength 0.5: sampling.strength: expected 1 with sampling.init=noise",
    ("--init", "image", "--strength", 0.3): "^--strength 0.3: sampling.strength: expected 0, or at least 0.5 with 2",
    (
        "--init",
        "paste",
        "--prompt",
        "lesion",
    ): "--init paste pastes the lesion that a prompt was written about; --prompt",
    ("--init", "sketch"): "^--init sketch: sampling.init: expected one of noise, image, paste",
    ("sampling.init=sketch",): "^override sampling.init=sketch: sampling.init: expected one of noise, image, paste",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_starts_are_refused(flags: tuple, world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=WRONG[flags]):
        infer(PHANTOM, tmp_path / "out", "--train_json", world / TRAIN, *flags)
