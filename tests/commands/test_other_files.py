"""Where a checkpoint is expected: one that is replaced while it is read, and a folder of that name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import PHANTOM, SD, call, convert, export, infer, merge, train

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import sha256_file
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.inference.inpainter import Inpainter
from tool import card, compare_samplers, judge_results, measure_paths, push

Run = Callable[[Path, Path, Path], int]  # of a checkpoint, the world, and a folder of this test's own

READERS: dict[str, tuple[str, str, Run]] = {
    "draw": ("ldm.inference.run", "stage2_2", lambda ckpt, world, own: infer(ckpt, own / "out", "--data", world)),
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
