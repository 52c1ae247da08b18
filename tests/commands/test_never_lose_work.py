"""Training that is killed, full of errors or started twice: nothing that was saved is ever lost."""

import csv
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from tiny import CLIP, MODELS, PLAIN, ROOT, TRAIN, VAL, call, changed, on_cpu, tensors, train, ver_train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.errors import MedSoftError
from ldm.core.files import remove_partials
from ldm.core.locks import exclusive
from ldm.features.shards import keys_of
from ldm.training.dataset import Batch
from ldm.training.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")

# Twenty steps: ten batches of one sample, two a step, four epochs, with a moving average of the weights.
RUN = {"batch_size": 1, "accumulate": 2, "max_epochs": 4, "ema_decay": 0.9, "schedule": "cosine"}
RUN |= {"save_every_minutes": 0, "rates.msc": 0.003}
STEPS = 20

# Runs ver_train.py, and sends this process a signal in the call of a function that follows ``after`` others; only those
# for which ``when`` holds are counted.
CHILD = """
import os, signal
import torch
import ldm.training.loop
from ldm.{module} import {owner} as owner
import ver_train
from ldm.core import cli
plain, count = owner.{method}, 0
def counted(self, *given, **named):
    global count
    count += bool({when})
    if count == {after} + 1:
        os.kill(os.getpid(), signal.{name})
    return plain(self, *given, **named)
owner.{method} = counted
if {behind}:
    ldm.training.loop.steps_behind = lambda device: {behind}
cli.run(ver_train.build_parser(), ver_train.main)
"""
KILL_IN_STEP = {"module": "training.loop", "owner": "Training", "method": "forward_backward"}
KILL_IN_VALIDATION = {"module": "training.stage", "owner": "Stage", "method": "forward"}
KILL_IN_VALIDATION["when"] = "not torch.is_grad_enabled()"
KILL_IN_CACHE = {"module": "features", "owner": "build", "method": "compute_features"}
KILL_BEFORE_CHECKPOINT = {"module": "training", "owner": "saving", "method": "write_checkpoint"}
# A checkpoint's bytes are all written, under a temporary name.
KILL_IN_CHECKPOINT = {"module": "core.files", "owner": "os", "method": "fsync", "when": "os.fstat(self).st_size > 1e6"}


def command(converted: Path, world: Path, save_path: Path, stage: str = "stage1", **given: Any) -> list[str]:
    """The words after ``ver_train.py``; keys of ``training`` as in tiny.train."""
    values = PLAIN | {f"training.{key}": value for key, value in given.items()}
    paths = ["--ckpt", converted, "--config", MODELS / f"phantom_{stage}.yaml", "--save_path", save_path]
    paths += ["--train_json", world / TRAIN, "--val_json", world / VAL, "--cache_dir", world / "features"]
    return [str(word) for word in (*paths, "--biomedclip", CLIP, *(f"{key}={value}" for key, value in values.items()))]


def run_and_signal(
    name: str, after: int, arguments: list[str], where: dict[str, str] = KILL_IN_STEP, behind: int = 0
) -> int:
    """The exit code of ver_train.py in a process that sends itself a signal."""
    code = CHILD.format(after=after, name=name, behind=behind, **{"when": "True", **where})
    return children.run("-c", code, *arguments).returncode


def rows(folder: Path) -> list[tuple[str, ...]]:
    """Everything of steps.csv that does not depend on the clock."""
    found = list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))
    return [tuple(value for key, value in row.items() if key != "items_per_second") for row in found]


@pytest.fixture(scope="module")
def unbroken(world: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert train("stage1", converted, folder, world, **RUN) == 0
    return folder


def test_the_run_has_twenty_steps_and_an_average(unbroken: Path) -> None:
    assert len(rows(unbroken)) == STEPS
    assert read_checkpoint(unbroken / "last.ckpt").metadata["averaged"] is True


@on_cpu
@pytest.mark.parametrize(
    ("name", "where", "after", "code", "first_step", "behind"),
    [
        ("SIGKILL", KILL_IN_STEP, 13, -signal.SIGKILL, 7, 0),  # inside the second epoch: five steps of nine samples
        ("SIGKILL", KILL_IN_STEP, 14, -signal.SIGKILL, 7, 0),  # inside an accumulated step: back to the step before
        ("SIGTERM", KILL_IN_STEP, 13, 143, 8, 0),  # the step it is in is finished and kept
        ("SIGTERM", KILL_IN_VALIDATION, 4, 143, 10, 0),  # of the second epoch, which is finished and kept
        ("SIGINT", KILL_IN_STEP, 13, 130, 7, 0),  # what was saved last is kept
        # With the numbers of a step read while the next one is computed, as on a GPU.
        ("SIGKILL", KILL_IN_STEP, 13, -signal.SIGKILL, 7, 1),
        ("SIGTERM", KILL_IN_STEP, 13, 143, 9, 1),  # what the eighth step was told is known in the ninth
        ("SIGTERM", KILL_IN_STEP, 17, 143, 10, 1),  # the epoch's last step
    ],
)
def test_killed_and_resumed_is_bit_identical(
    world: Path,
    converted: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    where: dict[str, str],
    after: int,
    code: int,
    first_step: int,
    behind: int,
) -> None:
    """Weights and the loss of every step: mid-epoch, with accumulation and a moving average."""
    folder = tmp_path / "run"
    assert run_and_signal(name, after, command(converted, world, folder, **RUN), where, behind) == code
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == first_step
    monkeypatch.setattr("ldm.training.loop.steps_behind", lambda device: behind)
    assert train("stage1", converted, folder, world, **RUN) == 0
    assert not changed(tensors(unbroken / "last.ckpt"), tensors(folder / "last.ckpt"))
    assert rows(folder) == rows(unbroken)
    assert (folder / "metrics.csv").read_text().count("\n") == 1 + 4
    ours, theirs = ((path / "metrics.csv").read_text().splitlines() for path in (folder, unbroken))
    assert [row[:5] for row in csv.reader(ours)] == [row[:5] for row in csv.reader(theirs)]


@on_cpu
def test_interrupted_twice_and_resumed_is_bit_identical(
    world: Path, converted: Path, unbroken: Path, tmp_path: Path
) -> None:
    """An impatient user: the second Ctrl-C comes while the first is being dealt with."""
    folder = tmp_path / "run"
    code = CHILD.format(after=STEPS * 2, name="SIGINT", behind=0, **{"when": "True", **KILL_IN_STEP})
    run = children.start("-c", code, *command(converted, world, folder, **RUN))
    while not (folder / "steps.csv").is_file() or len(rows(folder)) < 3:
        assert run.process.exitcode is None
        time.sleep(0.005)
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.02)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait(120).returncode in (130, -signal.SIGINT)
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] < STEPS
    assert train("stage1", converted, folder, world, **RUN) == 0
    assert not changed(tensors(unbroken / "last.ckpt"), tensors(folder / "last.ckpt"))
    assert rows(folder) == rows(unbroken)


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 143)])
def test_killed_while_features_are_computed(world: Path, converted: Path, tmp_path: Path, name: str, code: int) -> None:
    """There is nothing to resume yet; the next start computes what is missing, and no more."""
    given = command(converted, world, tmp_path / "run", **{"rates.msc": 0.001, "batch_size": 9})
    given[given.index("--cache_dir") + 1] = str(tmp_path / "features")
    assert run_and_signal(name, 3, [*given, "training.feature_batch=2"], KILL_IN_CACHE) == code
    assert not (tmp_path / "run").exists()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").glob("*.safetensors")}
    # What was computed is written when a run is told to end; how much a kill leaves: tests/features/test_shards.py.
    assert [len(keys_of(file)) for file in kept] == ([6] if code == 143 else [])
    assert call(ver_train, *given) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.parametrize("after", [1, 3])
def test_best_weights_survive_a_kill_between_two_files(
    world: Path, converted: Path, tmp_path: Path, after: int
) -> None:
    """Whatever epochs last.ckpt has behind it, the weights of the best of them are there."""
    folder, given = tmp_path / "run", {"batch_size": 9, "max_epochs": 3, "save_every_minutes": 1e6}
    arguments = command(converted, world, folder, **given)
    assert run_and_signal("SIGKILL", after, arguments, KILL_BEFORE_CHECKPOINT) == -signal.SIGKILL

    def best_is_kept(epochs: int) -> None:
        losses = [float(row["val_loss"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
        best = min(range(epochs), key=losses.__getitem__)
        assert best in {read_checkpoint(path).metadata["epoch"] for path in folder.glob("best_*.ckpt")}

    if (folder / "last.ckpt").exists():
        best_is_kept(read_checkpoint(folder / "last.ckpt").metadata["epoch"] + 1)
    assert call(ver_train, *arguments) == 0
    best_is_kept(3)
    assert len(list(folder.glob("best_*.ckpt"))) == 1


# ------------------------------------------------------------------------------------------- killed while it writes

# Reads the number of a first step, forks, and the child writes checkpoints from that step on until it is killed.
WRITERS = """
import itertools, os, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from ldm.checkpoints.checkpoint import write_checkpoint
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.write(1, b"%d\\n" % os.getpid())  # one call each: a killed process leaves no half lines
        for step in itertools.count(int(line)):
            value = torch.full((500_000,), float(step))
            write_checkpoint(Path({path!r}), {{"msc.a": value, "msc.b": value.clone()}}, {{"step": step}})
            os.write(1, b"%d\\n" % step)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def kill_writers(path: Path, temporary: Path, trials: int) -> int:
    """Kill -9 a process that writes checkpoints without pause, at random moments; how many orphans that left.

    After each kill last.ckpt must load, be of one piece, and be the last one finished or the one after it.
    """
    path.parent.mkdir()
    orphans, draw, first = 0, random.Random(0), 0
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    code = WRITERS.format(path=str(path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as parent:
        for _ in range(trials):
            parent.stdin.write(f"{first}\n")
            writer = int(parent.stdout.readline())
            last = int(parent.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.1))
            os.kill(writer, signal.SIGKILL)
            while (line := parent.stdout.readline().strip()) != "dead":
                last = int(line)
            found = read_checkpoint(path)
            step = found.metadata["step"]
            assert last <= step <= last + 1
            assert all((value == step).all() for value in found.state.values())
            orphans += remove_partials(path.parent)
            assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
            first = step + 1
        parent.stdin.close()
    return orphans


def other_file_system() -> Path:
    """A folder on another file system than the temporary one; the test is pointless without."""
    here = Path("/dev/shm")
    if not here.is_dir() or os.stat(here).st_dev == os.stat("/tmp").st_dev:
        pytest.skip("no second file system here")
    return here


def test_killed_while_writing(tmp_path: Path) -> None:
    kill_writers(tmp_path / "run" / "last.ckpt", tmp_path, 5)


def test_orphan_of_a_kill_inside_a_write_is_removed_by_the_same_command(
    world: Path, converted: Path, tmp_path: Path
) -> None:
    folder, given = tmp_path / "run", {"batch_size": 9, "max_epochs": 3, "keep_best": 0, "save_every_minutes": 1e6}
    arguments = command(converted, world, folder, **given)
    assert run_and_signal("SIGKILL", 1, arguments, KILL_IN_CHECKPOINT) == -signal.SIGKILL
    (orphan,) = folder.glob(".partial-*")
    assert orphan.stat().st_size > 1e6
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == 1
    assert call(ver_train, *arguments) == 0
    assert not list(folder.glob(".partial-*"))
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("where", ["same", "other"])
def test_killed_while_writing_two_hundred_times(tmp_path: Path, where: str) -> None:
    temporary = tmp_path if where == "same" else other_file_system()
    orphans = kill_writers(tmp_path / "run" / "last.ckpt", temporary, 200)
    assert orphans > 0  # else no kill has hit a write, and nothing was shown


# ------------------------------------------------------------------------------------------------- full disk, two runs


@pytest.fixture
def _signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_full_disk_keeps_the_checkpoint_before(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second epoch on no file may grow beyond 100 KB, as on a full disk."""
    folder, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    plain = Training.forward_backward

    def forward_backward(self: Training, batch: Batch) -> None:
        if self.progress.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        plain(self, batch)

    given = {"batch_size": 9, "max_epochs": 2, "keep_best": 0, "save_every_minutes": 1e6}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Training, "forward_backward", forward_backward)
            with pytest.raises(MedSoftError, match=r"last\.ckpt: could not be written \(File too large\); nothing was"):
                train("stage1", converted, folder, world, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == 1
    assert not list(folder.glob(".partial-*"))
    assert train("stage1", converted, folder, world, **given) == 0
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == 2


def test_too_little_disk_is_said_before_training(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(MedSoftError, match=r"run: 1\.0 MiB are free, but saving takes \d+\.\d MiB .*make room"):
        train("stage1", converted, tmp_path / "run", world)
    assert not (tmp_path / "run").exists()


def test_second_run_in_the_same_folder_is_refused(world: Path, converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with exclusive(tmp_path / ".run.lock", "free"):
        found = children.run(ROOT / "ver_train.py", *command(converted, world, folder))
    assert found.returncode == 2
    assert "run: another run is writing here at this moment; give another --save_path" in found.stderr
    assert not folder.exists()
    assert train("stage1", converted, folder, world, batch_size=9) == 0
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]


def test_rising_validation_loss_last_is_last_and_best_is_best(world: Path, converted: Path, tmp_path: Path) -> None:
    """A huge learning rate makes later epochs worse than the first."""
    folder = tmp_path / "run"
    given = {"rates.msc": 0.3, "max_epochs": 3, "batch_size": 9, "keep_best": 2}
    assert train("stage1", converted, folder, world, **given) == 0
    losses = [float(row["val_loss"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    assert min(losses[1:]) > losses[0]
    assert read_checkpoint(folder / "last.ckpt").metadata["step"] == 3
    order = sorted(range(3), key=losses.__getitem__)[:2]
    assert {read_checkpoint(path).metadata["epoch"] for path in folder.glob("best_*.ckpt")} == set(order)
    for path in folder.glob("best_*.ckpt"):
        assert set(torch.load(path, weights_only=True)) == {"state_dict", "medsoft"}  # weights only
    assert len(list(folder.glob("*.ckpt"))) == 3


def test_damaged_last_checkpoint_names_the_best_kept_one(world: Path, converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train("stage1", converted, folder, world, batch_size=9) == 0
    (best,) = folder.glob("best_*.ckpt")
    content = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        MedSoftError, match=rf"last\.ckpt: damaged or cut short.*--ckpt .*{best.name} and another --save"
    ):
        train("stage1", converted, folder, world, batch_size=9)
    assert train("stage1", converted, folder, world, "--overwrite", batch_size=9) == 0


def test_best_weights_can_be_trained_on(trained: dict, world: Path, tmp_path: Path) -> None:
    (best,) = trained["stage2_1"].folder.glob("best_*.ckpt")
    assert train("stage2_2", best, tmp_path / "run", world, batch_size=9) == 0
