"""dataset_infer.py: running it again, failing and going on, and everything it refuses."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PHANTOM, ROOT, TRAIN, edit, infer, metas, record, whole

import ldm.core.files
import ldm.data.folders
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.folders import scan_folder
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.diffusion.samplers import DifferentialMask
from ldm.inference.inpainter import Inpainter
from ldm.networks.model import MedSoftModel

# ------------------------------------------------------------------------------------------------- running it again


def test_again_is_complete(
    final: Path, results: Path, world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("ldm.inference.run.load_inpainter", lambda *_: pytest.fail("loaded the model"))
    assert infer(final, results, "--train_json", world / TRAIN, "--batch_size", 1) == 0
    assert "already complete (5 images)" in caplog.text


def test_removed_picture_is_drawn_again(final: Path, results: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "out")
    name = min(metas(results))
    shutil.rmtree(tmp_path / "out" / name)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/image.png")}
    assert infer(final, tmp_path / "out", "--train_json", world / TRAIN, "--batch_size", 1) == 0
    first, again = (read_image(folder / name / "image.png").astype(int) for folder in (results, tmp_path / "out"))
    assert np.abs(first - again).max() <= 1
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert record(tmp_path / "out")["pictures"] == 5


def test_interrupted_run_is_finished(
    final: Path, world: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--train_json", world / TRAIN, "--batch_size", 2]
    plain, calls = Inpainter.begin, []

    def draw(self: Inpainter, pictures: Any, jobs: Any) -> Any:
        calls.append(len(jobs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, pictures, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(Inpainter, "begin", draw)
        with pytest.raises(KeyboardInterrupt):
            infer(final, tmp_path / "out", *given)
    whole(tmp_path / "out")
    assert len(metas(tmp_path / "out")) == 2
    assert record(tmp_path / "out")["complete"] is False
    leftover = tmp_path / "out" / ".partial-x__v0"
    leftover.mkdir()  # as a kill in the middle of writing leaves it
    (leftover / ".partial-image").write_bytes(b"half")
    assert infer(final, tmp_path / "out", *given) == 0
    whole(tmp_path / "out")
    assert set(metas(tmp_path / "out")) == set(metas(results))
    assert (record(tmp_path / "out")["complete"], record(tmp_path / "out")["pictures"]) == (True, 5)


@pytest.mark.parametrize(
    "other", [["--seed", 1], ["--steps", 3], ["--prompt", "x"], ["sampling.differential=false"], ["--exact"]]
)
def test_other_settings_are_refused(final: Path, results: Path, world: Path, other: list) -> None:
    before = (results / "inference.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds results of another run .*--overwrite"):
        infer(final, results, "--train_json", world / TRAIN, *other)
    assert (results / "inference.json").read_bytes() == before


def test_changed_lesion_of_a_prompts_source_is_another_run(final: Path, world: Path, tmp_path: Path) -> None:
    """It decides how large the mask is."""
    shutil.copytree(world / "val", tmp_path / "val")
    given = ["--data", world / "val", "--choose", "healthy", "--train_json", tmp_path / "val", "--limit", 1]
    assert infer(final, tmp_path / "out", *given) == 0
    (meta,) = metas(tmp_path / "out").values()
    lesion = tmp_path / "val" / meta["prompt_from"] / "mask.png"
    write_png(lesion, np.roll(read_image(lesion), 1, axis=0))
    with pytest.raises(UsageError, match="holds results of another run"):
        infer(final, tmp_path / "out", *given)


def test_changed_input_is_another_run(final: Path, world: Path, tmp_path: Path) -> None:
    """Everything that decides a picture drawn on a healthy sample: its image, its vertebra, its meta.json."""
    healthy = next(sample for sample in load_samples(world / "val")[0] if sample.healthy)
    folder = Path(shutil.copytree(healthy.image.parent, tmp_path / "data" / healthy.sample_id))
    given = ["--data", tmp_path / "data", "--prompt", "lytic lesion"]
    assert infer(final, tmp_path / "out", *given) == 0

    def refused(file: str) -> None:
        with pytest.raises(UsageError, match="holds results of another run"):
            infer(final, tmp_path / "out", *given)
        shutil.copy(healthy.image.parent / file, folder / file)

    write_png(folder / "image.png", 255 - read_image(folder / "image.png"))
    refused("image.png")
    labels = read_image(folder / "anatomy.png").copy()
    labels[:8] = 0
    labels[-1, -1] = 1
    write_png(folder / "anatomy.png", labels)
    refused("anatomy.png")
    meta = json.loads((folder / "meta.json").read_text())
    for change in ({"spacing_mm": 2.5}, {"window": [10, 240]}):
        (folder / "meta.json").write_text(json.dumps(meta | change))
        refused("meta.json")
    assert infer(final, tmp_path / "out", *given) == 0  # all is as it was


@pytest.mark.parametrize("key", ["patient_id", "site"])
def test_a_corrected_meta_json_is_another_run(final: Path, one: Path, tmp_path: Path, key: str) -> None:
    """Results carry its keys, and would keep the wrong ones."""
    given = ["--data", one, "--prompt", "lytic lesion"]
    assert infer(final, tmp_path / "out", *given) == 0
    (path,) = one.glob("*/meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "corrected"}))
    with pytest.raises(UsageError, match="holds results of another run"):
        infer(final, tmp_path / "out", *given)


def test_every_file_is_fingerprinted_once(
    final: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many results share a sample or a prompt's source; a parent's meta.json entry is that digest too."""
    plain, files = ldm.core.files.sha256_file, []
    monkeypatch.setattr(ldm.core.files, "sha256_file", lambda path: files.append(path) or plain(path))
    given = ("--train_json", world / TRAIN, "--variants", 3, "--limit", 2, "--match", "none")
    assert infer(final, tmp_path / "out", *given) == 0
    assert len(files) == len(set(files))
    found = metas(tmp_path / "out").values()
    assert {meta["parent_image"] for meta in found} < {str(path) for path in files}
    assert len({meta["prompt_from"] for meta in found}) > 1


def test_overwrite_replaces_the_results_of_another_run(final: Path, one: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--data", one, "--variants", 2) == 0
    (tmp_path / "out" / "notes.txt").write_text("not a result")
    assert infer(final, tmp_path / "out", "--data", one, "--seed", 7, "--overwrite") == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "not a result"
    ((name, meta),) = metas(tmp_path / "out").items()
    assert name.endswith("__v0")
    assert meta["seed"] == 7
    assert {file.stem for file in (tmp_path / "out" / "report_files").iterdir()} == {name}


def test_pictures_count_although_the_report_cannot_be_written(
    final: Path, one: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert infer(final, out, "--data", one) == 0
    for made in (*out.glob("*__v0"), out / "report_files"):
        shutil.rmtree(made)
    (out / "report_files").write_text("a file where the thumbnails should be")
    assert infer(final, out, "--data", one) == 0
    assert record(out)["complete"] is True
    assert any(line.startswith("warning: no report: ") and "report_files" in line for line in caplog.messages)


def test_folder_with_something_else_is_left_alone(final: Path, one: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(UsageError, match="is not empty and holds no results of this command"):
            infer(final, tmp_path / "out", "--data", one, *flags)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("flag", ["--data", "--like", "--ckpt"])
def test_output_may_not_hold_the_input(one: Path, tmp_path: Path, flag: str) -> None:
    out = tmp_path / "out"
    inside = Path(shutil.copytree(one, out / "deep" / "data"))
    ckpt = out / "some.ckpt" if flag == "--ckpt" else tmp_path / "some.ckpt"
    ckpt.write_bytes(b"")
    (out / "inference.json").write_text('{"run": "another"}')
    before = sorted(out.rglob("*"))
    given = ["--data", one] if flag == "--ckpt" else [flag, inside]
    with pytest.raises(UsageError, match=rf"out: holds the input {flag} "):
        infer(ckpt, out, *given, "--overwrite")
    assert sorted(out.rglob("*")) == before


def test_output_may_not_hold_a_picture_to_draw_on(final: Path, results: Path, tmp_path: Path) -> None:
    """Results listed in a JSON elsewhere: --overwrite would remove them before they are read."""
    shutil.copytree(results, tmp_path / "out")
    write_annotations(tmp_path / "again.json", load_samples(tmp_path / "out")[0])
    (tmp_path / "list.txt").write_text("\n".join(metas(results)))
    given = ["--data", tmp_path / "again.json", "--choose", tmp_path / "list.txt", "--overwrite"]
    with pytest.raises(UsageError, match=r"out: holds .*, which is to be inpainted"):
        infer(final, tmp_path / "out", *given)
    assert set(metas(tmp_path / "out")) == set(metas(results))


def test_failed_start_does_not_claim_the_folder(final: Path, one: Path, results: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(final.read_bytes()[:100_000])
    with pytest.raises(MedSoftError, match=r"cut\.ckpt: damaged or cut short"):
        infer(tmp_path / "cut.ckpt", tmp_path / "out", "--data", one)
    assert infer(final, tmp_path / "out", "--data", one) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    with pytest.raises(MedSoftError, match=r"cut\.ckpt: damaged or cut short"):
        infer(tmp_path / "cut.ckpt", tmp_path / "out", "--data", one, "--overwrite")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_two_commands_at_a_time_in_one_folder(
    final: Path, world: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one draws, the second is refused, under whatever name it knows the folder; the first is not disturbed."""
    given = ["--train_json", world / TRAIN, "--batch_size", 2]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    plain, refused = Inpainter.begin, []

    def draw(self: Inpainter, pictures: Any, jobs: Any) -> Any:
        for second in ([tmp_path / "out", *given], [tmp_path / "link", *given, "--seed", 1, "--overwrite"]):
            with pytest.raises(UsageError, match=r"another run is writing here at this moment.*another --output_dir"):
                infer(final, *second)
            refused.append(second)
        return plain(self, pictures, jobs)

    monkeypatch.setattr(Inpainter, "begin", draw)
    assert infer(final, tmp_path / "out", *given) == 0
    assert len(refused) == 2 * 3
    assert set(metas(tmp_path / "out")) == set(metas(results))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link", ".out.lock"}
    assert infer(final, tmp_path / "link", *given) == 0


def test_out_of_memory_is_one_line_and_the_rest_is_drawn_later(
    final: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--data", world / "val", "--choose", "diseased"]
    plain = MedSoftModel.denoise

    def denoise(self: MedSoftModel, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(noisy) > 1:
            torch.empty(1 << 55)  # more than any machine has: the allocator's own error
        return plain(self, noisy, *rest)

    monkeypatch.setattr(MedSoftModel, "denoise", denoise)
    message = r"out of memory .*batches of 2 .*a smaller --batch_size or --precision bf16-true needs less"
    with pytest.raises(MedSoftError, match=message):
        infer(final, tmp_path / "out", *given, "--batch_size", 2)
    whole(tmp_path / "out")
    assert infer(final, tmp_path / "out", *given, "--batch_size", 1) == 0  # the same run, as the batch decides nothing
    assert record(tmp_path / "out")["pictures"] == 2


@pytest.mark.parametrize(("more", "cure"), [([], "--precision bf16-true or a"), (["--precision", "bf16-true"], "a")])
def test_device_that_is_too_small_for_the_networks_is_refused_before_they_are_built(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], cure: str
) -> None:
    monkeypatch.setattr("ldm.inference.inpainter.all_memory", lambda device: 2**20)
    monkeypatch.setattr("ldm.inference.inpainter.open_model", None)  # whoever calls it fails
    said = r"cpu: the networks take \d+\.\d MiB, the whole device has 1\.0 MiB"
    with pytest.raises(MedSoftError, match=f"{said}; {cure} device with more memory helps"):
        infer(final, tmp_path / "out", "--data", one, *more)
    assert not (tmp_path / "out").exists()


def test_full_disk_stops_with_one_message_and_the_rest_is_drawn_later(
    final: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--data", world / "val", "--choose", "diseased", "--batch_size", 1]
    pictures, plain, replace = [], write_png, os.replace

    def full_png(path: Path, *rest: Any) -> None:
        pictures.append(path)
        if len(pictures) == 5:  # the second picture's mask.png
            raise MedSoftError(f"{path}: could not be written (No space left on device)")
        plain(path, *rest)

    def full_rename(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    for module, name, fault in ((ldm.data.folders, "write_png", full_png), (os, "replace", full_rename)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(MedSoftError, match=r"could not be written \(No space left on device"):
                infer(final, tmp_path / "out", *given)
        whole(tmp_path / "out")
        assert len(metas(tmp_path / "out")) == 1
        assert record(tmp_path / "out")["complete"] is False
    assert infer(final, tmp_path / "out", *given) == 0
    whole(tmp_path / "out")
    assert len(metas(tmp_path / "out")) == record(tmp_path / "out")["pictures"] == 2


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
    shutil.copytree(world / "val", tmp_path / "data")
    write_annotations(tmp_path / "data.json", scan_folder(tmp_path / "data")[0])
    bad = next((tmp_path / "data").glob("*/mask.png"))
    bad.write_bytes(b"")
    given = ["--data", tmp_path / "data.json", "--choose", "diseased", "--variants", 2]
    assert infer(final, tmp_path / "out", *given) == 3
    assert len(metas(tmp_path / "out")) == 2
    assert record(tmp_path / "out")["rejected"] == 1  # once, although it has two variants
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert "mask.png" in reject["reason"]


@pytest.mark.parametrize("file", ["mask.png", "anatomy.png"])
def test_damaged_source_of_a_prompt_is_named_and_the_healthy_sample_is_not(
    final: Path, world: Path, tmp_path: Path, file: str
) -> None:
    """How large the lesion of the sentence was cannot be told: that picture is left out, and the source is at fault."""
    shutil.copytree(world / "train", tmp_path / "data")
    write_annotations(tmp_path / "data.json", scan_folder(tmp_path / "data")[0])
    given = ["--data", world / "train", "--train_json", tmp_path / "data.json", "--variants", 2]
    assert infer(final, tmp_path / "sound", *given) == 0
    sources = {name: meta["prompt_from"] for name, meta in metas(tmp_path / "sound").items()}
    bad = min(sources.values())
    bad_file = tmp_path / "data" / bad / file
    bad_file.write_bytes(bad_file.read_bytes()[:60])
    assert infer(final, tmp_path / "out", *given) == 3
    assert set(metas(tmp_path / "out")) == {name for name, source in sources.items() if source != bad}
    rejects = json.loads((tmp_path / "out" / "rejects.json").read_text())
    lost = sorted(name for name, source in sources.items() if source == bad)
    assert len(rejects) == len(lost) > 0
    for reject, name in zip(sorted(rejects, key=lambda r: r["reason"]), lost, strict=True):
        assert (reject["sample_id"], reject["file"]) == (bad, str(bad_file))
        assert f"{name} is not made" in reject["reason"]


def test_model_that_draws_nan_writes_nothing(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = MedSoftModel.decode
    monkeypatch.setattr(MedSoftModel, "decode", lambda *given: plain(*given) * float("nan"))
    with pytest.raises(MedSoftError, match=r"no image could be inpainted; first: .*NaN.*while decoding.*rejects\.json"):
        infer(final, tmp_path / "out", "--data", one)
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert "NaN" in reject["reason"]
    assert not list((tmp_path / "out").rglob("*.png"))


def test_infinite_latent_rejects_that_picture_only(
    final: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(self: DifferentialMask, x: torch.Tensor, alpha: float, progress: float) -> torch.Tensor:
        if progress > 0 and len(x) == 2:
            x[0, 0, 3, 3] = float("inf")  # decoding clamps it to white
        return x

    monkeypatch.setattr(DifferentialMask, "held", held)
    assert infer(final, tmp_path / "out", "--data", world / "val", "--choose", "diseased") == 3
    assert len(metas(tmp_path / "out")) == 1
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert (
        "variant 0: values that are not numbers (NaN or infinity) appeared at sampling step 2 of 2" in reject["reason"]
    )


def test_checkpoint_of_another_preparation(final: Path, one: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    content = torch.load(final, weights_only=True)
    content["medsoft"]["config"]["data"]["context"] = 3.0
    torch.save(content, other)
    with pytest.raises(UsageError, match=r"was trained with data\.context=3\.0, .* has 2\.0; add data\.context=3\.0"):
        infer(other, tmp_path / "out", "--data", one)
    assert infer(other, tmp_path / "out", "--data", one, "data.context=3.0") == 0


@pytest.mark.parametrize("device", ["cuda:99" if torch.cuda.is_available() else "cuda", "abacus"])
def test_device_that_is_not_there(final: Path, one: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device}: "):
        infer(final, tmp_path / "out", "--data", one, "--device", device)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_nan_are_refused(final: Path, one: Path, tmp_path: Path) -> None:
    bad = edit(final, tmp_path / "nan.ckpt", keep=lambda key, v: v / 0 if key == "msc.position" else v)
    with pytest.raises(MedSoftError, match=r"nan\.ckpt: 1 tensor holds NaN"):
        infer(bad, tmp_path / "out", "--data", one)


def test_empty_mask_and_other_size_of_a_single_picture(final: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "i.png", np.full((40, 40), 90, np.uint8))
    write_png(tmp_path / "empty.png", np.zeros((40, 40), np.uint8))
    write_png(tmp_path / "small.png", np.full((30, 40), 255, np.uint8))
    (tmp_path / "broken.png").write_text("not a picture")
    for name, message in (("empty", "the mask is empty"), ("small", "40"), ("broken", "not an image")):
        given = ["--image", tmp_path / "i.png", "--mask", tmp_path / f"{name}.png", "--prompt", "lesion"]
        with pytest.raises(MedSoftError, match=r"no image could be inpainted"):
            infer(final, tmp_path / name, *given)
        (reject,) = json.loads((tmp_path / name / "rejects.json").read_text())
        assert f"{name}.png" in reject["reason"]
        assert message in reject["reason"]


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "a/../../b"])
def test_sample_ids_cannot_leave_the_output_folder(final: Path, one: Path, tmp_path: Path, name: str) -> None:
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
        (["--image", "i.png", "--mask", "m.png", "--prompt", "x"], r"--image i\.png: does not exist"),
        (["--prompt", " "], "--prompt: expected a sentence, found nothing"),
        (["--prompt", "lytic\nlesion"], "--prompt: expected one sentence on one line"),
        (["--like", ".", "--variants", "2"], "--variants and --choose do not go with it"),
        (["--like", ".", "--choose", "all"], "--variants and --choose do not go with it"),
        (["--variants", "0"], "--variants: expected a whole number from 1 to 1000000000, found 0"),
        (["--limit", "-1"], "--limit: expected a whole number from 1 "),
        (["sampling.stepps=3"], "did you mean sampling.steps"),
    ],
)
def test_wrong_usage(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "some.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        infer(tmp_path / "some.ckpt", tmp_path / "out", *flags)
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
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: --data nowhere: does not exist")
    assert not list(tmp_path.iterdir())
