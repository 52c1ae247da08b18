"""Steps whose numbers are read while the next one is computed, as on a GPU: nothing is lost, and nothing waits.

Such runs that are killed and resumed are in test_never_lose_work.py.
"""

import csv
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import children
import pytest
import torch
from lightning_fabric import Fabric
from test_never_lose_work import RUN, STEPS, command, rows
from tiny import MODELS, changed, on_cpu, tensors, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ldm.training.loop
import ldm.training.steps
from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError
from ldm.networks.weight_average import WeightAverage
from ldm.training.dataset import Batch
from ldm.training.estimates import fake_batch, fake_stage
from ldm.training.loop import Training
from ldm.training.saving import Progress
from ldm.training.stage import Stage

pytestmark = on_cpu
BREAK = 5  # the call of training_step in which something becomes infinite: the first batch of the third step


def epochs(folder: Path) -> list[list[str]]:
    """Everything of metrics.csv that does not depend on the clock."""
    return [row[:5] for row in csv.reader((folder / "metrics.csv").read_text().splitlines())]


def read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm.training.loop, "steps_behind", lambda device: 1)


def test_read_later_is_the_same_run(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = tmp_path / "at_once"  # each step's numbers are read before the weights change
    assert train("stage1", converted, at_once, world, **RUN) == 0
    read_later(monkeypatch)
    assert train("stage1", converted, tmp_path / "run", world, **RUN) == 0
    assert not changed(tensors(at_once / "last.ckpt"), tensors(tmp_path / "run" / "last.ckpt"))
    assert rows(tmp_path / "run") == rows(at_once)
    assert epochs(tmp_path / "run") == epochs(at_once)
    assert len(rows(at_once)) == STEPS


CHILD = """
import os, signal, sys
import ldm.training.loop
from ldm.training.loop import Training
from ldm.training.saving import Checkpoints
import ver_train
from ldm.core import cli
ldm.training.loop.steps_behind = lambda device: 1
forward_backward, save, queues = Training.forward_backward, Checkpoints.save, []
def spoilt(self, batch):
    queues[:] = [self.queue]
    if self.progress.step == 4 and os.environ["RANK"] == "1" and os.environ["SPOIL"] == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if self.progress.step == 4 and os.environ["RANK"] == "1" and os.environ["SPOIL"] == "loss":
        batch = {**batch, "target_tokens": batch["target_tokens"] * float("nan")}
    forward_backward(self, batch)
def checked(self, epoch_ended):
    assert not queues[0].pending and not queues[0].done, "saved before it was read"
    save(self, epoch_ended)
Training.forward_backward, Checkpoints.save = spoilt, checked
cli.run(ver_train.build_parser(), ver_train.main)
"""


def test_two_processes_that_read_later_agree(world: Path, converted: Path, tmp_path: Path) -> None:
    """On when to save and to stop, and on what went wrong in one of them. Three steps an epoch."""
    given = {"batch_size": 4, "max_epochs": 4, "rates.msc": 0.001, "ema_decay": 0.9}

    def launch(name: str, spoil: str) -> list[subprocess.CompletedProcess]:
        words = command(converted, world, tmp_path / name, **given)
        return children.run_two("-c", CHILD, *words, "--devices", 2, SPOIL=spoil)

    stopped = launch("run", "stop")
    assert stopped[0].returncode == 143, stopped
    assert read_checkpoint(tmp_path / "run" / "last.ckpt").metadata["step"] == 6
    assert train("stage1", converted, tmp_path / "one", world, **given) == 0
    one, two = ({row[1]: float(row[2]) for row in rows(tmp_path / name)} for name in ("one", "run"))
    assert len(one) == 12
    assert two == pytest.approx(dict(list(one.items())[:6]), abs=1e-5)
    broken = launch("broken", "loss")
    assert all(one.returncode for one in broken), broken
    assert any("the loss became nan in step 5 (samples w5p" in one.stderr for one in broken), broken
    assert read_checkpoint(tmp_path / "broken" / "last.ckpt").metadata["step"] == 3


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("later", [False, True])
def test_what_is_not_finite_is_said_of_its_own_step(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, later: bool
) -> None:
    """Also where it was computed a step before it is read; the file is that of the steps before it."""
    plain, calls, ids = Stage.forward, [], []

    def forward(stage: Stage, batch: Batch, dropout: float) -> tuple:
        if not dropout:  # validation, or an estimate
            return plain(stage, batch, dropout)
        calls.append(dropout)
        if len(calls) == BREAK and what == "loss":
            batch = {**batch, "target_tokens": batch["target_tokens"] * float("nan")}
        if len(calls) in (BREAK, BREAK + 1):
            ids.extend(batch["sample_id"])
        found = plain(stage, batch, dropout)
        if len(calls) == BREAK and what == "gradient":
            found.loss.register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(Stage, "forward", forward)
    if later:
        read_later(monkeypatch)
    with pytest.raises(MedSoftError, match=rf"a? ?{what} became (nan|inf) in step 3 \(samples .*\); the last") as found:
        train("stage1", converted, tmp_path / "run", world, **RUN)
    said = ids[:1] if what == "loss" else ids
    assert f"(samples {', '.join(said)})" in str(found.value)
    assert len(calls) == (8 if later else 6)
    kept = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert kept.metadata["step"] == 2
    assert all(value.isfinite().all() for value in kept.state.values())
    assert len(rows(tmp_path / "run")) == 2


class Waits(TorchDispatchMode):
    """Collects copies between devices for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device != result.device and not (kwargs or {}).get("non_blocking"):
                self.found.append(f"{source.device} to {result.device}: {tuple(source.shape)}")
        return result


def moved(stage: Stage) -> Stage:
    """The stage on a GPU that is not there: Module.to refuses tensors without content."""
    for module in stage.modules():
        for name, value in module._parameters.items():
            if value is not None:
                there = torch.nn.Parameter(torch.empty_like(value, device="cuda"), value.requires_grad)
                module._parameters[name] = there
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else torch.empty_like(value, device="cuda")
    named = dict(stage.net.named_parameters())
    stage.groups = {group: {key: named[key] for key in members} for group, members in stage.groups.items()}
    stage.trained = {key: named[key] for key in stage.trained}
    stage.average = WeightAverage(stage.trained, 0.9)
    return stage


@pytest.mark.parametrize("stage", ["stage1", "unet_only", "stage2_1", "stage2_2"])
def test_no_step_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """On tensors without content, whose values nobody can read: reading one would be an error here."""
    config = load_config(MODELS / f"phantom_{stage}.yaml", ["training.ema_decay=0.9"])
    monkeypatch.setattr(Stage, "device", torch.device("cuda"))
    monkeypatch.setattr(ldm.training.steps, "on_host", lambda values: None)
    monkeypatch.setattr(ldm.training.loop, "steps_behind", lambda device: 2)
    monkeypatch.setattr(Fabric, "backward", lambda self, loss: None)  # a backward pass needs the driver
    monkeypatch.setattr(Fabric, "setup_module", lambda self, module, **_: module)
    monkeypatch.setattr(Fabric, "no_backward_sync", lambda self, module, enabled: nullcontext())
    size = config.training.batch_size
    with FakeTensorMode():
        made = moved(fake_stage(config.architecture, config.training, False))
        with torch.device("cuda"):
            batch = fake_batch(config.architecture, size) | {"weight": torch.ones(size), "sample_id": ["spine"] * size}
        optimizer = made.adamw()
        progress = Progress()
        checkpoints = SimpleNamespace(
            progress=progress, optimizer=optimizer, scaler=torch.amp.GradScaler("cuda", enabled=False)
        )
        loaders = [[batch], [batch]]
        run = Training(made, Fabric(accelerator="cpu"), "32-true", loaders, checkpoints, None, None)
        run.movement.before = None  # looks at the first steps only
        run.forward_backward(batch)  # copies the noise schedule, once
        run.queue.batches = []
        with Waits() as waits:
            for _ in range(2):
                run.forward_backward(batch)
                for value in made.trained.values():
                    value.grad = torch.empty_like(value)
                run.optimizer_step()
        for value in next(iter(made.groups.values())).values():
            value.grad = None
        norms, total = made.gradient_norms()  # of a group without gradients too
        assert {value.device.type for value in (*made.trained.values(), *norms.values(), total)} == {"cuda"}
    assert progress.step == len(run.queue.pending) == 2
    assert not waits.found
