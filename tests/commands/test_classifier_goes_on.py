"""A classifier's run that goes on: states and saved weights that are not as they should be, runs that were killed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toy import make_world, rows_of, run

from ldm.checkpoints.files import read_safetensors
from ldm.classifier import training
from ldm.core.errors import MedSoftError, UsageError


@pytest.fixture
def world(tmp_path: Path) -> dict:
    return make_world(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"cut short", MedSoftError, r"last.pt: this state cannot be read .*delete it to train from the start"),
        ("another", UsageError, r"last.pt: this state belongs to another run"),
    ],
)
def test_state_that_cannot_be_taken_up_is_named(
    world: dict, monkeypatch: pytest.MonkeyPatch, content: object, error: type, message: str
) -> None:
    def stopped(network: torch.nn.Module, *_: object) -> None:
        last = Path(world["output_dir"], "last.pt")
        if isinstance(content, bytes):
            last.write_bytes(content)
            raise KeyboardInterrupt
        torch.save({"run": content, "history": [], "best": None, "network": network.state_dict()}, last)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(world)
    with pytest.raises(error, match=message):
        run(world)


STATE_FAULTS: list[tuple[Callable[[dict], Any], str]] = [
    (lambda state: state.pop("network"), r"network: expected a dictionary, found nothing"),
    (lambda state: state["network"].pop("fc.bias"), r"network\[fc\.bias\]: expected float32 \(2,\), found nothing"),
    (
        lambda state: state["network"].update({"fc.bias": torch.zeros(1)}),
        r"network\[fc\.bias\]: expected float32 \(2,\), found float32 \(1,\)",
    ),
    (
        lambda state: state["network"].update({"bn1.num_batches_tracked": torch.tensor(3.0)}),
        r"\[bn1\.num_batches_tracked\]: expected int64 \(\), found float32 \(\)",
    ),
    (
        lambda state: state["network"]["fc.bias"].fill_(float("nan")),
        r"network\[fc\.bias\]: expected numbers, found NaN",
    ),
    (lambda state: state.pop("optimizer"), r"optimizer: expected a dictionary, found nothing"),
    (
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        r"optimizer\[state\]\[0\]\[exp_avg\]: expected float32 \(.*\), found float32 \(1,\)",
    ),
    (
        lambda state: state["optimizer"]["param_groups"][0]["params"].pop(),
        r"optimizer\[param_groups\]: expected tensors by group \{None: \d+\}, found \{None: \d+\}",
    ),
    (lambda state: state.update(history=[]), r"history: expected 1 to 3 epochs, found \[\]"),
    (lambda state: state["history"].pop(0), r"history\[0\]\[epoch\]: expected 1, found 2"),
    (lambda state: state["history"][1].update(epoch=-2), r"history\[1\]\[epoch\]: expected 2, found -2"),
    (lambda state: state["history"][1].pop("val_loss"), r"history\[1\]\[val_loss\]: expected a number, found nothing"),
    (
        lambda state: state["history"][0].pop("val_auc"),
        r"history\[0\]: expected a dictionary with val_auc, found a dict",
    ),
    (lambda state: state.update(best=None), r"best: expected a dictionary, found nothing"),
    (
        lambda state: state["best"]["weights"].update({"fc.bias": torch.zeros(1)}),
        r"best\[weights\]\[fc\.bias\]: expected float32 \(2,\), found float32 \(1,\)",
    ),
    (lambda state: state["best"].update(row={}), r"best\[row\]: expected a row of history\.csv .* found a dictionary"),
]


def test_an_entry_of_a_state_that_does_not_fit_is_named(world: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    last = Path(world["output_dir"], "last.pt")
    world |= {"EPOCHS": 4}
    monkeypatch.setattr(training, "STATE_EVERY_SECONDS", 0)
    plain = training.train_epoch

    def stopped(network: torch.nn.Module, optimizer: Any, phase: Any, epoch: int, config: Any) -> float:
        if epoch == 3:
            raise KeyboardInterrupt
        return plain(network, optimizer, phase, epoch, config)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(world)
    whole = last.read_bytes()
    for change, message in STATE_FAULTS:
        last.write_bytes(whole)
        state = torch.load(last, weights_only=True)
        change(state)
        torch.save(state, last)
        with pytest.raises(MedSoftError, match=rf"last\.pt: .*{message}.*; delete it to train from the start$"):
            run(world)
    last.write_bytes(whole)
    assert run(world) == 0
    assert len(rows_of(Path(world["output_dir"], "history.csv"))) == 4


def test_a_run_that_was_killed_when_its_weights_were_written_leaves_no_state(
    world: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Path(world["output_dir"], "last.pt")

    def killed(*given: Any) -> None:
        training.fit(*given)
        last.write_bytes(b"a state")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ldm.classifier.run.fit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(world)
    assert run(world) == 0
    assert not last.exists()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            {"state": lambda state: state.pop("fc.bias")},
            r"does not fit the model test_resnet as timm .*: 1 missing \(fc\.b",
        ),
        (
            {"state": lambda state: state.update({"fc.bias": torch.zeros(1)})},
            r".*\(fc\.bias \(1,\) instead of \(2,\)\); take the timm it was",
        ),
        ({"info": lambda info: info.pop("config")}, "not a classifier saved by classifier.py"),
        ({"info": lambda info: info.update(classes=None)}, "not a classifier saved by classifier.py"),
    ],
)
def test_saved_weights_that_do_not_fit_are_named(world: dict, tmp_path: Path, keep: dict, message: str) -> None:
    assert run(world) == 0
    saved = Path(world["output_dir"], "classifier.safetensors")
    state, metadata = read_safetensors(saved)
    info = json.loads(metadata["classifier"])
    keep.get("state", dict)(state)
    keep.get("info", dict)(info)
    save_file(state, saved, {"classifier": json.dumps(info)})
    with pytest.raises(MedSoftError, match=rf"classifier\.safetensors: {message}"):
        run(world | {"train": False})


def test_a_full_memory_is_not_blamed_on_the_saved_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows the advice to delete a sound state loses the training."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    (tmp_path / "last.pt").write_bytes(b"sound")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        training.resume(SimpleNamespace(output=tmp_path), [], torch.nn.Linear(1, 1), "run")
