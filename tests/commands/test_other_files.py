"""Where a checkpoint is expected: one that is replaced while it is read, and a folder of that name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import PHANTOM, SD, TRAIN, VAL, call, convert, export, infer, merge, train

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import sha256_file
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.inference.inpainter import Inpainter
from ldm.training import run as training_run
from tool import card, compare_samplers, judge_results, measure_paths, push

Run = Callable[[Path, Path, Path], int]  # of a checkpoint, the world, and a folder of this test's own

READERS: dict[str, tuple[str, str, Run]] = {
    "draw": (
        "ldm.inference.run",
        "stage2_2",
        lambda ckpt, world, own: infer(
            ckpt, own / "out", "--data", world / VAL, "--train_json", world / TRAIN, "--limit", 1
        ),
    ),
    "train": ("ldm.training.run", "stage2_1", lambda ckpt, world, own: train("stage2_2", ckpt, own / "out", world)),
    "export": ("ldm.conversion.export", "stage2_2", lambda ckpt, world, own: export(ckpt, own / "out")),
    "card": ("ldm.sharing.facts", "stage2_2", lambda ckpt, world, own: call(card, ckpt, "--output_dir", own / "out")),
    "merge": (
        "ldm.conversion.merge",
        "stage1",
        lambda ckpt, world, own: merge(ckpt, world / "unet_only/last.ckpt", own / "out"),
    ),
    "convert": ("ldm.conversion.convert", "sd", lambda ckpt, world, own: convert(ckpt, own / "out")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_record_names_no_other_checkpoint_than_the_one_that_was_read(
    trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """A second run replaces the file as soon as it has been read, as every one of our commands does: whole."""
    module, stage, run = READERS[reader]
    ckpt = shutil.copy(SD if stage == "sd" else trained[stage].last, tmp_path / "x.ckpt")

    def read(path: Path) -> Checkpoint:
        found = read_checkpoint(path)
        if path == ckpt:
            write_checkpoint(ckpt, found.state, found.metadata | {"step": 99})
        return found

    monkeypatch.setattr(f"{module}.read_checkpoint", read)
    with pytest.raises(MedSoftError, match=r"x\.ckpt: was replaced or changed after it had been read; run the same"):
        run(ckpt, world, tmp_path)
    assert not (tmp_path / "out").exists()


def written_over(ckpt: Path) -> None:
    """In place, as ``cp`` does, with as many bytes: what is mapped from the file changes with it."""
    found = read_checkpoint(ckpt)
    other = ckpt.with_name("other.ckpt")
    write_checkpoint(other, {key: 2 * value for key, value in found.state.items()}, found.metadata, **found.rest)
    assert other.stat().st_size == ckpt.stat().st_size
    with ckpt.open("r+b") as handle:
        handle.write(other.read_bytes())


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "card"])  # which takes no tensor
def test_a_checkpoint_that_is_written_over_between_its_sha256_and_its_use_is_refused(
    trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    _, stage, run = READERS[reader]
    ckpt = Path(shutil.copy(SD if stage == "sd" else trained[stage].last, tmp_path / "x.ckpt"))
    plain = Checkpoint.sha256

    def sha256(self: Checkpoint) -> str:
        digest = plain(self)
        if self.path == ckpt:
            written_over(ckpt)
        return digest

    monkeypatch.setattr(Checkpoint, "sha256", sha256)
    with pytest.raises(MedSoftError, match=r"x\.ckpt: was replaced or changed after it had been read; run the same"):
        run(ckpt, world, tmp_path)
    assert not [*tmp_path.glob("out/**/*.png"), *tmp_path.glob("out/**/*.ckpt")]
    assert not (tmp_path / "out").is_file()


@pytest.mark.parametrize("change", ["written over", "touched", "replaced"])
def test_what_a_training_repeats_of_its_checkpoint_is_what_it_began_with(
    trained: dict, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The frozen weights stay mapped from the file until the training ends."""
    ckpt = Path(shutil.copy(trained["stage2_1"].last, tmp_path / "x.ckpt"))
    frozen = read_checkpoint(ckpt).state["first_stage_model.quant_conv.weight"].clone()
    plain = training_run._training

    def training(*given: Any) -> Any:
        if change == "replaced":
            os.replace(shutil.copy(trained["stage1"].last, tmp_path / "new"), ckpt)
        elif change == "touched":
            os.utime(ckpt)
        else:
            written_over(ckpt)
        return plain(*given)

    monkeypatch.setattr(training_run, "_training", training)
    out = tmp_path / "out"
    if change == "written over":
        with pytest.raises(MedSoftError, match=r"x\.ckpt: was replaced or changed after it had been read"):
            train("stage2_2", ckpt, out, world)
        assert not list(out.glob("*.ckpt"))
    else:
        assert train("stage2_2", ckpt, out, world) == 0
        assert torch.equal(read_checkpoint(out / "last.ckpt").state["first_stage_model.quant_conv.weight"], frozen)


def test_no_drawing_names_another_image_than_the_one_that_was_seen(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, image = Inpainter.begin, next(one.glob("*/image.png"))

    def begin(self: Inpainter, samples: Any, jobs: Any) -> Any:
        write_png(image, 255 - read_image(image))  # exported once more, while the model draws
        return plain(self, samples, jobs)

    monkeypatch.setattr(Inpainter, "begin", begin)
    with pytest.raises(MedSoftError, match=r"image\.png: was replaced or changed after it had been read; run the same"):
        infer(final, tmp_path / "out", "--data", one)
    assert not list((tmp_path / "out").glob("*__v*"))


def test_an_image_that_is_only_touched_meanwhile_is_the_same_one(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, image = Inpainter.begin, next(one.glob("*/image.png"))

    def begin(self: Inpainter, samples: Any, jobs: Any) -> Any:
        os.replace(
            shutil.copy(image, tmp_path / "copy.png"), image
        )  # a backup that came back, a mount that numbers anew
        return plain(self, samples, jobs)

    monkeypatch.setattr(Inpainter, "begin", begin)
    assert infer(final, tmp_path / "out", "--data", one) == 0
    assert len(list((tmp_path / "out").glob("*__v*"))) == 1


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = shutil.copy(final, tmp_path / "x.ckpt")

    def kind(path: Path) -> str:
        os.replace(shutil.copy(final, tmp_path / "new"), path)
        return "zip"

    assert read_checkpoint(ckpt).sha256() == sha256_file(final)
    monkeypatch.setattr("ldm.checkpoints.checkpoint.detect_format", kind)
    with pytest.raises(MedSoftError, match=r"x\.ckpt: was replaced or changed after it had been read"):
        read_checkpoint(ckpt)


def test_a_folder_in_the_place_of_a_checkpoint_is_said(
    final: Path, converted: Path, world: Path, judge: Path, tmp_path: Path
) -> None:
    """As other programs write them, a file for each device."""
    folder, out = tmp_path / "run" / "last.ckpt", tmp_path / "out"
    folder.mkdir(parents=True)
    (folder / "shard").touch()
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(UsageError, match=r"run/last\.ckpt: is a folder, which no training writes; give another"):
            train("stage1", converted, folder.parent, world, *overwrite)
    given = ["--config", PHANTOM, "--data", world / "train"]
    no_file, no_checkpoint = "does not exist, or is no file", "expected a checkpoint file, found a folder"
    found: list[tuple[str, ModuleType, list[Any]]] = [
        (no_checkpoint, push, [folder, world, "--to_folder", out]),
        (no_checkpoint, judge_results, [world / "train", "--judge", folder, "--output", out]),
        (no_file, measure_paths, ["--ckpt", folder, *given, "--judge", judge, "--output", out]),
        (no_file, compare_samplers, ["--ckpt", final, *given, "--judge", folder, "--output_dir", out]),
    ]
    for message, module, words in found:
        with pytest.raises(MedSoftError, match=rf"run/last\.ckpt: {message}"):
            call(module, *words)
    assert (folder / "shard").exists()
    assert not out.exists()
