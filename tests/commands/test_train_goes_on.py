"""Going on from a last.ckpt that is not as it should be, or where the world around it is another one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from test_never_lose_work import command
from tiny import CLIP, MODELS, call, changed, on_cpu, tensors, train, ver_train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError
from ldm.networks.model import MedSoftModel
from ldm.training.dataset import Batch
from ldm.training.loop import Training
from ldm.training.saving import Checkpoints, RunState, best_files
from ldm.training.stage import Stage

# Two epochs of three steps, of which four are taken; with all that a last.ckpt may hold, but for a gradient scaler.
RUN = {"max_epochs": 2, "save_every_minutes": 0, "ema_decay": 0.9, "alignment_weight": 0.5, "clip_norm": 0}
KEYS = [f"training.{key}={value}" for key, value in RUN.items()]
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 4}


def stopped_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The power is gone in the step after so many."""
    plain = Training.forward_backward

    def forward_backward(self: Training, batch: Batch) -> None:
        if self.progress.step == step:
            raise OSError("the power is gone")
        plain(self, batch)

    monkeypatch.setattr(Training, "forward_backward", forward_backward)


@pytest.fixture(scope="module")
def unfinished(small: Any, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of stage 2.2 that was interrupted after step 4, inside its second epoch."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, 4)
        with pytest.raises(OSError, match="power"):
            train("stage2_2", small.last, folder, world, *small.sizes, **RUN)
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == 4
    return folder


@pytest.fixture(scope="module")
def stage(small: Any) -> Stage:
    """The stage that it goes on with."""
    config = load_config(MODELS / "phantom_stage2_2.yaml", [*small.sizes, *KEYS])
    net = MedSoftModel(config.architecture, ["unet", "msc"])
    return Stage(config.training, net, {}, torch.zeros(1, 77, config.text_encoder.width))


def edited(unfinished: Path, folder: Path, change: Callable[[dict], Any]) -> Path:
    """A copy of the run's folder whose last.ckpt somebody has changed."""
    shutil.copytree(unfinished, folder)
    content = torch.load(folder / "last.ckpt", weights_only=True)
    change(content)
    torch.save(content, folder / "last.ckpt")
    return folder


def kept(content: dict, number: int = 0) -> dict[str, torch.Tensor]:
    return content["optimizer_states"][0]["state"][number]


PROJECTION = "alignment.layers.0.bias"
FAULTS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no projection": (lambda c: c.pop("alignment"), r"alignment: expected a dictionary, found nothing"),
    "a key of it": (
        lambda c: c["alignment"].pop(PROJECTION),
        r"alignment\[alignment\.layers\.0\.bias\]: expected float32 \(64,\), found nothing",
    ),
    "its shape": (
        lambda c: c["alignment"].update({PROJECTION: torch.zeros(1)}),
        r"alignment\[alignment\.layers\.0\.bias\]: expected float32 \(64,\), found float32 \(1,\)",
    ),
    "its type": (
        lambda c: c["alignment"].update({PROJECTION: torch.zeros(64, dtype=torch.float64)}),
        r"expected float32 \(64,\), found float64 \(64,\)",
    ),
    "a key too many": (
        lambda c: c["alignment"].update(other=torch.zeros(2)),
        r"alignment\[other\]: expected nothing, found float32 \(2,\)",
    ),
    "a weight": (
        lambda c: c["state_dict"].pop("msc.position"),
        r"state_dict\[msc\.position\]: expected float32 \(100, \d+\), found nothing",
    ),
    "its first dimension": (
        lambda c: c["state_dict"].update({"msc.position": c["state_dict"]["msc.position"][:1]}),
        r"state_dict\[msc\.position\]: expected float32 \(100, \d+\), found float32 \(1, \d+\)",
    ),
    "weights that are no numbers": (
        lambda c: c["state_dict"]["msc.position"].fill_(float("nan")),
        r"state_dict\[msc\.position\]: expected numbers, found NaN or infinite values",
    ),
    "no average": (lambda c: c.pop("average"), r"average: expected a dictionary, found nothing"),
    "a shape of the average": (
        lambda c: c["average"].update({PROJECTION: torch.zeros(1)}),
        r"average\[alignment\.layers\.0\.bias\]: expected float32 \(64,\), found float32 \(1,\)",
    ),
    "no optimizer": (lambda c: c.pop("optimizer_states"), r"optimizer_states\[0\]: expected a dictionary, found noth"),
    "an empty list of them": (lambda c: c.update(optimizer_states=[]), r"optimizer_states\[0\]: expected a dictionary"),
    "no moments": (lambda c: c["optimizer_states"][0].pop("state"), r"\[0\]\[state\]: expected a dictionary, found no"),
    "no groups": (
        lambda c: c["optimizer_states"][0].pop("param_groups"),
        r"\[param_groups\]: expected a list of groups, found nothing",
    ),
    "another group": (
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(name="other"),
        r"\[param_groups\]: expected tensors by group \{'msc': \d+, .*\}, found \{'other': \d+, ",
    ),
    "a group whose name is none": (
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(name=["msc"]),
        r"\[param_groups\]: expected a list of groups, found ",
    ),
    "a tensor whose number is none": (
        lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].insert(0, []),
        r"\[param_groups\]: expected a list of groups, found ",
    ),
    "a moment": (lambda c: kept(c).pop("exp_avg"), r"\[state\]\[0\]\[exp_avg\]: expected float32 .* found nothing"),
    "the shape of a moment": (
        lambda c: kept(c).update(exp_avg_sq=torch.zeros(1)),
        r"optimizer_states\[0\]\[state\]\[0\]\[exp_avg_sq\]: expected float32 \(.*\), found float32 \(1,\)",
    ),
    "an infinite moment": (
        lambda c: kept(c)["exp_avg"].fill_(float("inf")),
        r"\[state\]\[0\]\[exp_avg\]: expected numbers, found NaN or infinite",
    ),
    "a parameter that is not trained": (
        lambda c: c["optimizer_states"][0]["state"].update({9999: kept(c)}),
        r"\[state\]\[9999\]: expected nothing, found a dictionary",
    ),
    "half a step of AdamW": (
        lambda c: kept(c)["step"].fill_(2.5),
        r"\[state\]\[0\]\[step\]: expected a whole number from 0 on, found 2\.5",
    ),
    "no progress": (lambda c: c.pop("progress"), r"progress: expected a dictionary, found nothing"),
    "a key of the progress": (lambda c: c["progress"].pop("batches"), r"progress\[batches\]: expected a whole number"),
    "another version's progress": (
        lambda c: c["progress"].update(loops=3),
        r"progress\[loops\]: expected nothing, found 3",
    ),
    "a negative step": (lambda c: c["progress"].update(step=-1), r"progress\[step\]: .* from 0 on, found -1"),
    "half an epoch": (lambda c: c["progress"].update(epoch=0.5), r"progress\[epoch\]: .* from 0 on, found 0\.5"),
    "a truth as a number": (lambda c: c["progress"].update(batches=True), r"progress\[batches\]: .*, found True"),
    "no loss": (lambda c: c["progress"].update(loss_sum=float("nan")), r"progress\[loss_sum\]: expected a number, f"),
    "an epoch after the last": (
        lambda c: c["progress"].update(epoch=2),
        r"progress: expected a place in 2 epochs of 3 b",
    ),
    "batches without items": (
        lambda c: c["progress"].update(items=0),
        r"progress: expected a place in 2 epochs of 3 batches",
    ),
    "a scaler": (
        lambda c: c.update(MixedPrecision=SCALER | {"scale": 0.0}),
        r"MixedPrecision\[scale\]: expected a number above 0, found 0\.0",
    ),
    "a part of a scaler": (
        lambda c: c.update(MixedPrecision={"scale": 2.0}),
        r"MixedPrecision\[growth_factor\]: expected a number above 0, found nothing \(the first of 4 such entries\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_entry_that_does_not_fit_is_named(unfinished: Path, stage: Stage, tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    folder = edited(unfinished, tmp_path / "run", change)
    with pytest.raises(MedSoftError, match=message) as caught:
        RunState.of(read_checkpoint(folder / "last.ckpt"), stage, 3)
    said = str(caught.value)
    assert said.startswith(f"{folder / 'last.ckpt'}: an interrupted run cannot go on from this file: ")
    assert "best_epoch0000_loss" in said
    assert said.endswith(" and another --save_path start from the best kept weights, --overwrite starts this run again")


def test_a_whole_one_fits(unfinished: Path, stage: Stage, tmp_path: Path) -> None:
    """Also where a gradient scaler was saved, which this machine may not use, and a tensor never had a gradient."""

    def change(content: dict) -> None:
        content["MixedPrecision"] = SCALER
        del content["optimizer_states"][0]["state"][0]

    found = RunState.of(read_checkpoint(edited(unfinished, tmp_path / "run", change) / "last.ckpt"), stage, 3)
    assert (found.progress.step, found.progress.epoch, found.progress.batches) == (4, 1, 1)
    assert found.weights.keys() == found.average.keys() == stage.trained.keys()
    assert len(found.moments) == len(stage.trained) - 1


def test_the_command_refuses_it_in_one_line_and_leaves_the_folder_as_it_was(
    unfinished: Path, small: Any, world: Path, tmp_path: Path
) -> None:
    """A tensor of one value would be spread over all 64."""
    folder = edited(unfinished, tmp_path / "run", FAULTS["its shape"][0])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(MedSoftError, match=FAULTS["its shape"][1]):
        train("stage2_2", small.last, folder, world, *small.sizes, **RUN)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_overwrite_starts_again_what_cannot_go_on(unfinished: Path, small: Any, world: Path, tmp_path: Path) -> None:
    folder = edited(unfinished, tmp_path / "run", lambda content: content["progress"].update(batches=3))
    with pytest.raises(
        MedSoftError, match=r"progress: expected a place in 2 epochs of 3 batches, found .*'batches': 3"
    ):
        train("stage2_2", small.last, folder, world, *small.sizes, **RUN)
    assert train("stage2_2", small.last, folder, world, "--overwrite", *small.sizes, **RUN) == 0
    steps = (folder / "steps.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in steps[1:]] == ["1", "2", "3", "4", "5", "6"]


def test_a_file_that_says_its_data_but_not_its_configuration(
    unfinished: Path, small: Any, world: Path, tmp_path: Path
) -> None:
    folder = edited(unfinished, tmp_path / "run", lambda content: content["medsoft"].pop("config"))
    with pytest.raises(MedSoftError, match="it does not say which, as in files of older versions"):
        train("stage2_2", small.last, folder, world, *small.sizes, **RUN)


def test_a_run_does_not_go_on_with_the_tokens_of_another_encoder(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which no converted checkpoint, the start of stage 1, could tell."""
    folder, given = tmp_path / "run", {"max_epochs": 2, "save_every_minutes": 0}
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        with pytest.raises(OSError, match="power"):
            train("stage1", converted, folder, world, **given)
    other = shutil.copytree(CLIP, tmp_path / "clip")
    weights = torch.load(other / "open_clip_pytorch_model.bin", weights_only=True)
    weights["visual.trunk.cls_token"] += 1
    torch.save(weights, other / "open_clip_pytorch_model.bin")
    words = [*command(converted, world, folder, **given), "--cache_dir", str(tmp_path / "features")]
    words[words.index("--biomedclip") + 1] = str(other)
    with pytest.raises(MedSoftError, match=r"clip: is not the BiomedCLIP that .*run/last\.ckpt was trained with"):
        call(ver_train, *words)
    assert not (tmp_path / "features").exists()
    assert call(ver_train, *words, "--overwrite") == 0
    assert "--overwrite: the run starts again" in caplog.text
    assert (folder / "steps.csv").read_text().count("\n") == 1 + 6
    words[words.index(str(other))] = str(CLIP)  # and nobody is told that a complete run was trained with this one
    with pytest.raises(MedSoftError, match=r"clip: is not the BiomedCLIP that .*run/last\.ckpt was trained with"):
        call(ver_train, *words)
    assert call(ver_train, *words, "--overwrite") == 0
    assert call(ver_train, *words) == 0


@pytest.mark.parametrize("name", ["steps.csv", "metrics.csv"])
def test_a_table_of_somebody_else_in_the_folder_is_named(
    unfinished: Path, small: Any, world: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(unfinished, tmp_path / "run")
    (folder / name).write_text("patient,epoch,step\n7,first,second\n")
    with pytest.raises(MedSoftError, match=rf"{name}: expected rows as this command writes them, .*; move it away"):
        train("stage2_2", small.last, folder, world, *small.sizes, **RUN)
    assert (folder / name).read_text().startswith("patient")


def test_steps_that_steps_csv_lacks_are_said(
    unfinished: Path, small: Any, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(unfinished, tmp_path / "run")
    lines = (folder / "steps.csv").read_text().splitlines(keepends=True)
    (folder / "steps.csv").write_text("".join(lines[:3]))
    assert train("stage2_2", small.last, folder, world, *small.sizes, **RUN) == 0
    assert "steps.csv: has rows of 2 of the 4 steps that were taken" in caplog.text


def test_rows_are_on_the_disk_before_the_checkpoint_that_knows_of_their_steps(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut, which leaves what was synced."""
    folder, told = tmp_path / "run", []
    monkeypatch.setattr("ldm.training.records.sync", lambda number: told.append(os.fstat(number).st_size))
    plain = Checkpoints.save

    def save(self: Checkpoints, epoch_ended: bool) -> None:
        assert told[-1] == (folder / "steps.csv").stat().st_size
        plain(self, epoch_ended)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert train("stage1", converted, folder, world, save_every_minutes=0) == 0
    assert len(told) == 3


def test_best_weights_of_an_epoch_that_is_trained_again_are_replaced(
    unfinished: Path, small: Any, world: Path, tmp_path: Path
) -> None:
    """A start that was killed between the two files; on a GPU the loss is another one the next time."""
    folder = shutil.copytree(unfinished, tmp_path / "run")
    (first,) = best_files(folder)
    stale = shutil.copy(first, folder / "best_epoch0001_loss0.0001.ckpt")
    assert train("stage2_2", small.last, folder, world, *small.sizes, **RUN, keep_best=2) == 0
    assert not stale.exists()
    assert sorted(path.name[:14] for path in best_files(folder)) == ["best_epoch0000", "best_epoch0001"]


def test_weights_of_a_training_that_has_not_ended_are_said(
    unfinished: Path, small: Any, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "its training has not ended (step 4), and these are the weights of that moment"
    for source, expected in ((unfinished / "last.ckpt", True), (best_files(unfinished)[0], False)):
        caplog.clear()
        assert train("stage2_2", source, tmp_path / "s", world, "--dry_run", *small.sizes) == 0
        assert (f"{source}: {said}" in caplog.text) is expected


@on_cpu
@pytest.mark.usefixtures("one_thread")
def test_a_yaml_that_lists_its_rates_in_another_order_is_the_same_run(
    unfinished: Path, small: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each moment belongs to its tensor, bit for bit, and nothing stays mapped from the file that is replaced."""
    shutil.copytree(unfinished, tmp_path / "a")
    shutil.copytree(unfinished, tmp_path / "b")
    assert train("stage2_2", small.last, tmp_path / "a", world, *small.sizes, **RUN) == 0
    text = (MODELS / "phantom_stage2_2.yaml").read_text().replace("base: ", f"base: {MODELS}/")
    other = text.replace("{msc: 3.0e-4, attn3: 1.0e-3, unet: 5.0e-4}", "{unet: 5.0e-4, attn3: 1.0e-3, msc: 3.0e-4}")
    assert other != text
    (tmp_path / "other.yaml").write_text(other)
    words = [*command(small.last, world, tmp_path / "b", "stage2_2", **RUN), *small.sizes]
    words[words.index("--config") + 1] = str(tmp_path / "other.yaml")
    plain, mapped = Training.run, []

    def run(self: Training) -> None:
        mapped.append(str(tmp_path / "b" / "last.ckpt") in Path("/proc/self/maps").read_text())
        plain(self)

    monkeypatch.setattr(Training, "run", run)
    assert call(ver_train, *words) == 0
    assert not changed(tensors(tmp_path / "a" / "last.ckpt"), tensors(tmp_path / "b" / "last.ckpt"))
    assert mapped == [False]


@on_cpu
def test_processes_that_do_not_see_the_same_last_ckpt_are_refused(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines whose --save_path lies on a disk of each."""
    given = {"batch_size": 4, "max_epochs": 2, "rates.msc": 0.001, "save_every_minutes": 0}
    stopped_after(monkeypatch, 4)
    with pytest.raises(OSError, match="power"):
        train("stage1", converted, tmp_path / "run0", world, **given)
    code = (
        "import os, sys, ver_train\n"
        "from ldm.core import cli\n"
        "sys.argv = [word.replace('runRANK', 'run' + os.environ['RANK']) for word in sys.argv]\n"
        "cli.run(ver_train.build_parser(), ver_train.main)\n"
    )
    words = command(converted, world, tmp_path / "runRANK", **given)
    for found in children.run_two("-c", code, *words, "--devices", 2):
        assert found.returncode == 1, found.stderr
        assert "do not see the same files (they would go on after step 4, 0); --save_path" in found.stderr
        assert "Traceback" not in found.stderr
    assert read_checkpoint(tmp_path / "run0" / "last.ckpt").metadata["step"] == 4
