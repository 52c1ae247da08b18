"""Starting a training again, and what may go wrong while it runs: settings, lost files, full disks, workers."""

import csv
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from test_never_lose_work import command
from tiny import ROOT, changed, on_cpu, tensors, train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations
from ldm.features.store import FeatureStore
from ldm.training.dataset import Batch
from ldm.training.loop import Training
from ldm.training.saving import best_files

SHORT = {"batch_size": 3, "max_epochs": 2, "rates.msc": 0.001}


def steps(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))


def test_settings_that_decide_no_weight_may_change(world: Path, converted: Path, tmp_path: Path) -> None:
    """Stopped in the second epoch by a disk error, and gone on with other such settings: the weights are the same."""
    plain = Training.forward_backward

    def stumbles(self: Training, batch: Batch) -> None:
        if self.progress.step == 4:
            raise OSError("the power is gone")
        plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "forward_backward", stumbles)
        with pytest.raises(OSError, match="power"):
            train("stage1", converted, tmp_path / "a", world, **SHORT)
    other = {"workers": 1, "save_every_minutes": 5, "keep_best": 2, "pictures": 1, "max_rejected": 0.5, "val_draws": 2}
    assert train("stage1", converted, tmp_path / "a", world, **SHORT, **other) == 0
    assert train("stage1", converted, tmp_path / "b", world, **SHORT) == 0
    assert len(steps(tmp_path / "a")) == len(steps(tmp_path / "b")) == 6
    assert not changed(tensors(tmp_path / "a" / "last.ckpt"), tensors(tmp_path / "b" / "last.ckpt"))
    assert train("stage1", converted, tmp_path / "b", world, **SHORT, **other) == 0  # already complete
    assert len(steps(tmp_path / "b")) == 6
    with pytest.raises(UsageError, match=r"of another run \(training\.rates\.msc: 0\.001 -> 0\.002\)"):
        train("stage1", converted, tmp_path / "b", world, **SHORT | {"rates.msc": 0.002})


def test_a_key_that_older_versions_did_not_know_makes_no_other_run(
    world: Path, converted: Path, tmp_path: Path
) -> None:
    last = tmp_path / "s" / "last.ckpt"
    assert train("stage1", converted, tmp_path / "s", world, **SHORT) == 0
    (tmp_path / "s" / "best_epoch0000_loss0.5 (copy).ckpt").write_bytes(b"somebody's copy")
    content = torch.load(last, weights_only=True)
    del content["medsoft"]["config"]["training"]["clip_norm"]  # its default is what the run was made with
    torch.save(content, last)
    before = last.read_bytes()
    assert train("stage1", converted, tmp_path / "s", world, **SHORT) == 0  # already complete
    assert last.read_bytes() == before


def test_cures_for_full_memory_are_accepted_when_the_run_goes_on(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, folder = Training.forward_backward, tmp_path / "run"

    def full(self: Training, batch: Batch) -> None:
        if self.progress.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(self, batch)

    monkeypatch.setattr(Training, "forward_backward", full)
    cures = r"in step 5 .*; training\.activation_checkpointing=true or --precision bf16-mixed helps"
    with pytest.raises(MedSoftError, match=cures):
        train("stage1", converted, folder, world, **SHORT)
    with pytest.raises(UsageError, match=r"of another run \(training\.batch_size: 3 -> 2\)"):
        train("stage1", converted, folder, world, **SHORT | {"batch_size": 2})
    cured = {"activation_checkpointing": "true", "precision": "bf16-mixed", "strategy": "fsdp"}
    most = r"in step 5 .*; a device with more memory or more --devices with training\.strategy=fsdp helps"
    with pytest.raises(MedSoftError, match=most):
        train("stage1", converted, folder, world, **SHORT | cured)
    monkeypatch.setattr(Training, "forward_backward", plain)
    assert train("stage1", converted, folder, world, **SHORT) == 0
    assert len(steps(folder)) == 6


def test_resumed_where_kernels_lie_otherwise_in_memory(small: Any, world: Path, tmp_path: Path) -> None:
    """Begun on a device that wants kernels channels last, gone on with where they do not lie so."""
    given = {"max_epochs": 2, "save_every_minutes": 0, "rates.unet": 0.001, "ema_decay": 0.9}
    plain = Training.forward_backward

    def stumbles(self: Training, batch: Batch) -> None:
        if self.progress.step == 3:
            raise OSError("the power is gone")
        plain(self, batch)

    start, folder = small.last, tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.training.stage.kernel_layout", lambda *_: torch.channels_last)
        assert train("stage2_2", start, tmp_path / "whole", world, *small.sizes, **given) == 0
        patch.setattr(Training, "forward_backward", stumbles)
        with pytest.raises(OSError, match="power"):
            train("stage2_2", start, folder, world, *small.sizes, **given)
    assert all(value.is_contiguous() for value in tensors(folder / "last.ckpt").values())
    assert train("stage2_2", start, folder, world, *small.sizes, **given) == 0
    found, whole = tensors(folder / "last.ckpt"), tensors(tmp_path / "whole" / "last.ckpt")
    for key, value in tensors(start).items():
        moved = (whole[key] - value).norm()
        assert (found[key] - whole[key]).norm() <= 0.02 * moved + 1e-6, key


def test_best_weights_without_their_run_are_not_deleted(world: Path, converted: Path, tmp_path: Path) -> None:
    folder, given = tmp_path / "run", SHORT | {"keep_best": 2}
    assert train("stage1", converted, folder, world, **given) == 0
    best = best_files(folder)
    assert sorted(read_checkpoint(path).metadata["epoch"] for path in best) == [0, 1]
    (folder / "last.ckpt").unlink()
    with pytest.raises(UsageError, match=rf"its last\.ckpt is gone; --ckpt .*{best[0].name} and another --save_path"):
        train("stage1", converted, folder, world, **given)
    assert best_files(folder) == best
    assert train("stage1", converted, folder, world, "--overwrite", **given) == 0
    assert best_files(folder) == best  # of the new run: the same ones


def test_overwrite_leaves_nothing_of_the_other_run_in_a_run_that_dies(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Training) -> None:
        raise OSError("the power is gone")

    assert train("stage1", converted, tmp_path / "s", world, **SHORT) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", dies)
        with pytest.raises(OSError, match="power"):
            train("stage1", converted, tmp_path / "s", world, "--overwrite", **SHORT | {"seed": 1})
    assert not list((tmp_path / "s").glob("*.ckpt"))


def test_a_file_that_does_not_say_of_which_run_it_is(world: Path, converted: Path, tmp_path: Path) -> None:
    """A file of another command, or one that an older version left: refused in one line, and kept."""
    last = tmp_path / "s" / "last.ckpt"
    last.parent.mkdir()
    shutil.copy(converted, last)
    with pytest.raises(UsageError, match=r"another run \(it does not say which, as in files of older versions\); give"):
        train("stage1", converted, last.parent, world, **SHORT)
    assert last.read_bytes() == converted.read_bytes()


def test_a_run_with_the_noise_of_another_version_is_not_gone_on_with(
    world: Path, converted: Path, tmp_path: Path
) -> None:
    last = tmp_path / "s" / "last.ckpt"
    assert train("stage1", converted, tmp_path / "s", world, **SHORT) == 0
    content = torch.load(last, weights_only=True)
    del content["medsoft"]["noise"]
    torch.save(content, last)
    with pytest.raises(UsageError, match=r"of another run \(noise: 1 -> 2\)"):
        train("stage1", converted, tmp_path / "s", world, **SHORT)


def test_previews_of_another_run_are_not_taken_for_its_own(world: Path, trained: dict, tmp_path: Path) -> None:
    folder, start, given = tmp_path / "run", trained["unet_only"].source, {"batch_size": 9, "pictures": 1}
    pictures = []
    for seed, more in ((0, ()), (1, ("--overwrite",))):
        assert train("unet_only", start, folder, world, "sampling.steps=2", *more, **given, seed=seed) == 0
        pictures.append((folder / "pictures" / "epoch_0000.png").stat().st_mtime_ns)
    assert pictures[0] < pictures[1]


def test_orphaned_pictures_are_removed(world: Path, trained: dict, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "pictures"
    folder.mkdir(parents=True)
    (folder / ".partial-epoch_0000.png-1").write_bytes(b"half a picture")
    given = {"batch_size": 9, "pictures": 1}
    assert train("unet_only", trained["unet_only"].source, folder.parent, world, "sampling.steps=2", **given) == 0
    assert [file.name for file in folder.iterdir()] == ["epoch_0000.png"]


def test_full_disk_beside_the_checkpoints(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *given: Any, **named: Any) -> io.TextIOBase:
        return open("/dev/full", "a", encoding="utf-8")

    monkeypatch.setattr("ldm.training.records.open", full, raising=False)
    expected = r"steps\.csv: could not be written \(No space left on device\); the last checkpoint is kept"
    with pytest.raises(MedSoftError, match=expected):
        train("stage1", converted, tmp_path / "run", world, **SHORT)


def test_features_lost_under_a_worker_are_one_line(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FeatureStore.load

    def gone(self: FeatureStore, item: Any) -> dict[str, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            gone = {key: ("gone.safetensors", row) for key, (_, row) in self._places.items()}
            patch.setattr(self, "_places", gone)
            return plain(self, item)

    monkeypatch.setattr(FeatureStore, "load", gone)
    expected = r"^/[^\n]*gone\.safetensors: the cached features of [^\n]* are gone or damaged [^\n]*goes on$"
    with pytest.raises(MedSoftError, match=expected):
        train("stage1", converted, tmp_path / "run", world, **SHORT, workers=1)


@pytest.mark.parametrize(
    ("number", "code", "more"),
    [
        (signal.SIGTERM, 143, ["training.workers=2"]),
        (signal.SIGINT, 130, ["training.workers=1"]),
        pytest.param(signal.SIGTERM, 143, ["--devices", "2"], marks=on_cpu),
    ],
)
def test_signal_to_every_process(
    world: Path, converted: Path, tmp_path: Path, number: signal.Signals, code: int, more: list[str]
) -> None:
    """A cluster, or Ctrl-C, reaches every process of the group."""
    folder = tmp_path / "run"
    given = {"batch_size": 2, "max_epochs": 200, "rates.msc": 0.001, "save_every_minutes": 0}
    run = children.start(ROOT / "ver_train.py", *command(converted, world, folder, **given), *more, session=True)
    while not (folder / "steps.csv").is_file() or len(steps(folder)) < 12:
        assert run.process.exitcode is None, run.wait(1)
        time.sleep(0.02)
    os.killpg(run.process.pid, number)
    done = run.wait(120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    found = read_checkpoint(folder / "last.ckpt").metadata["step"]
    assert 11 <= found < 1000


def test_clipping_takes_part_in_a_step(world: Path, converted: Path, tmp_path: Path) -> None:
    """AdamW does not feel a gradient's length until it is as small as its epsilon, 1e-8."""
    moved = {}
    for most in (0, 1e-12):
        folder = tmp_path / str(most)
        assert train("stage1", converted, folder, world, batch_size=9, clip_norm=most, **{"rates.msc": 0.001}) == 0
        before, after = tensors(converted), tensors(folder / "last.ckpt")
        moved[most] = max(float((after[key] - before[key]).abs().max()) for key in after)
        assert float(steps(folder)[0]["grad_norm_msc"]) > 1e-3  # as it was before
    assert moved[0] == pytest.approx(0.001, rel=0.05)
    assert moved[1e-12] < 1e-6


def test_group_without_parameters(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training\.rates\.attn3: no parameter of the parts .*msc is in it"):
        train("stage1", converted, tmp_path / "run", world, **{"rates.attn3": 0.001})
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_read_show_before_any_network(
    world: Path, tmp_path: Path, write_sample: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint does not even exist."""
    samples, _ = load_samples(world / "train")
    write_annotations(tmp_path / "train.json", samples)
    records = json.loads((tmp_path / "train.json").read_text())
    first, second = [record for record in records if record["mask_image"]][:2]
    (tmp_path / "mask.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "image.png").write_bytes(Path(second["image"]).read_bytes()[:-40])
    first["mask_image"], second["image"] = str(tmp_path / "mask.png"), str(tmp_path / "image.png")
    (tmp_path / "train.json").write_text(json.dumps(records))
    expected = (
        r"2 of 12 samples cannot be read, more than training\.max_rejected=0\.01 allows; the first: .*HTML or XML"
    )
    with pytest.raises(MedSoftError, match=expected):
        train("stage1", tmp_path / "none.ckpt", tmp_path / "run", world, "--train_json", tmp_path / "train.json")
    assert "mask.png: not an image" in caplog.text
    assert "image.png: truncated PNG" in caplog.text
