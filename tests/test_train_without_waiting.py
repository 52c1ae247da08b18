"""Steps whose numbers are read while the next one is computed, as on a GPU: nothing is lost, and nothing waits."""

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_never_lose_work import KILL_IN_STEP, KILL_IN_VALIDATION, RUN, STEPS, command, rows, run_and_signal
from tiny import MODELS, changed, on_cpu, tensors, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ldm.training
from ldm.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.devices import on_host
from ldm.errors import MedSoftError
from ldm.estimates import fake_batch, fake_stage
from ldm.training import Stage

pytestmark = on_cpu
BREAK = 5  # the call of training_step in which something becomes infinite: the first batch of the third step


@pytest.fixture(scope="module")
def at_once(world: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which each step's numbers are read before the weights change."""
    folder = tmp_path_factory.mktemp("at_once") / "run"
    assert train("stage1", converted, folder, world, **RUN) == 0
    return folder


def read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm.training, "steps_behind", lambda device: 1)


def test_read_later_is_the_same_run(
    at_once: Path, world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_later(monkeypatch)
    assert train("stage1", converted, tmp_path / "run", world, **RUN) == 0
    assert not changed(tensors(at_once / "last.ckpt"), tensors(tmp_path / "run" / "last.ckpt"))
    assert rows(tmp_path / "run") == rows(at_once)
    assert len(rows(at_once)) == STEPS


@pytest.mark.parametrize(
    ("name", "where", "after", "code", "first_step"),
    [
        ("SIGKILL", KILL_IN_STEP, 13, -signal.SIGKILL, 7),
        ("SIGTERM", KILL_IN_STEP, 13, 143, 9),  # of eight steps the last is known when the ninth is handed over
        ("SIGTERM", KILL_IN_STEP, 17, 143, 10),  # in the epoch's last step
        ("SIGTERM", KILL_IN_VALIDATION, 4, 143, 10),
    ],
)
def test_read_later_killed_and_resumed_is_bit_identical(
    at_once: Path,
    world: Path,
    converted: Path,
    tmp_path: Path,
    name: str,
    where: dict[str, str],
    after: int,
    code: int,
    first_step: int,
) -> None:
    folder = tmp_path / "run"
    assert run_and_signal(name, after, command(converted, world, folder, **RUN), where, behind=1) == code
    assert read_checkpoint(folder / "last.ckpt").about["step"] == first_step
    assert train("stage1", converted, folder, world, **RUN) == 0
    assert not changed(tensors(at_once / "last.ckpt"), tensors(folder / "last.ckpt"))
    assert rows(folder) == rows(at_once)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("later", [False, True])
def test_what_is_not_finite_is_said_of_its_own_step(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, later: bool
) -> None:
    """Also where it was computed a step before it is read; the file is that of the steps before it."""
    plain, calls, ids = Stage.training_step, [], []

    def training_step(stage: Stage, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        calls.append(batch_idx)
        if len(calls) == BREAK and what == "loss":
            batch = {**batch, "true": batch["true"] * float("nan")}
        if len(calls) in (BREAK, BREAK + 1):
            ids.extend(batch["sample_id"])
        loss = plain(stage, batch, batch_idx)
        if len(calls) == BREAK and what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Stage, "training_step", training_step)
    if later:
        read_later(monkeypatch)
    with pytest.raises(MedSoftError, match=rf"a? ?{what} became (nan|inf) at step 2 \(samples .*\); the last") as found:
        train("stage1", converted, tmp_path / "run", world, **RUN)
    said = ids[:1] if what == "loss" else ids
    assert f"(samples {', '.join(said)})" in str(found.value)
    assert len(calls) == (8 if later else 6)
    kept = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert kept.about["step"] == 2
    assert all(value.isfinite().all() for value in kept.state.values())
    assert len(rows(tmp_path / "run")) == 2


class Waits(TorchDispatchMode):
    """Collects copies between devices for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = func is torch.ops.aten._to_copy.default and args[0].device != result.device
        if moved and not (kwargs or {}).get("non_blocking"):
            self.found.append(f"{args[0].device} to {result.device}: {tuple(args[0].shape)}")
        return result


@pytest.mark.parametrize("stage", ["stage1", "unet_only", "stage2_1", "stage2_2"])
def test_no_step_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """On tensors without content, whose values nobody can read: reading one would be an error here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config = load_config(MODELS / f"phantom_{stage}.yaml", ["training.ema_decay=0.9"])
    monkeypatch.setattr(Stage, "device", torch.device("cuda"))
    monkeypatch.setattr(ldm.training, "on_host", lambda values: None)
    monkeypatch.setattr(ldm.training, "steps_behind", lambda device: 2)
    size = config.training.batch_size
    with FakeTensorMode():
        with torch.device("cuda"):
            made, batch = fake_stage(config, False), fake_batch(config, size)
            batch |= {"weight": torch.ones(size), "sample_id": ["spine"] * size}
        made.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        optimizer = made.adamw()
        with Waits() as waits:
            for _ in range(2):
                assert made.training_step(batch, 0).requires_grad
                for value in made.trained.values():
                    value.grad = torch.empty_like(value)  # a backward pass needs the driver
                made.on_before_optimizer_step(optimizer)
                optimizer.step()
                made.update_average()
                optimizer.zero_grad()
        assert {value.device.type for value in made.trained.values()} == {"cuda"}
    assert not waits.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_on_their_way_from_a_gpu() -> None:
    values = torch.arange(4.0, device="cuda")
    found = on_host(values)
    values.mul_(2)  # queued later
    assert found().tolist() == [0, 1, 2, 3]


def test_numbers_that_are_on_the_cpu() -> None:
    assert on_host(torch.arange(3.0, requires_grad=True))().tolist() == [0, 1, 2]
