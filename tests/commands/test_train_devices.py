"""Two processes on the CPU (gloo) against one, through the command line, with the same global batch."""

import csv
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from test_never_lose_work import command
from tiny import PHANTOM, ROOT, on_cpu, tensors, train

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.core.errors import UsageError

# Nine samples in batches of four: the third batch is one sample, which two processes cannot share. Four epochs make
# twelve steps.
pytestmark = on_cpu
VER_TRAIN = ROOT / "ver_train.py"
RUN = {"batch_size": 4, "max_epochs": 4, "rates.msc": 0.001, "ema_decay": 0.9, "val_draws": 3}


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((folder / "steps.csv").read_text().splitlines())]


def test_two_processes_compute_what_one_computes(world: Path, converted: Path, tmp_path: Path) -> None:
    assert train("stage1", converted, tmp_path / "one", world, **RUN) == 0
    given = command(converted, world, tmp_path / "two", **RUN)
    given[given.index("--cache_dir") + 1] = str(tmp_path / "features")
    found = children.run_two(VER_TRAIN, *given, "--devices", 2)
    assert not any(one.returncode for one in found), found
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    ours, theirs = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two"))
    for a, b in zip(csv.DictReader(ours), csv.DictReader(theirs), strict=True):
        for name in ("train_loss", "val_loss", "val_cosine"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5)
    first, second = tensors(tmp_path / "one" / "last.ckpt"), tensors(tmp_path / "two" / "last.ckpt")
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4
    assert sum(one.stderr.count("features:   0%") for one in found) == 1  # one bar: one process computed them
    assert not any("already complete" in one.stdout for one in found)
    assert not list((tmp_path / "two").glob(".partial-*"))
    again = children.run_two(VER_TRAIN, *given, "--devices", 2)
    assert sum(one.stdout.count("already complete (12 steps)") for one in again) == 1  # one voice


def test_two_processes_accumulate_as_one_does(world: Path, converted: Path, tmp_path: Path) -> None:
    """Two batches a step; the epoch's last step has one batch only, of one sample, which two cannot share."""
    given = RUN | {"accumulate": 2}
    assert train("stage1", converted, tmp_path / "one", world, **given) == 0
    found = children.run_two(VER_TRAIN, *command(converted, world, tmp_path / "two", **given), "--devices", 2)
    assert not any(one.returncode for one in found), found
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    first, second = tensors(tmp_path / "one" / "last.ckpt"), tensors(tmp_path / "two" / "last.ckpt")
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


def test_two_processes_train_the_unet_as_one_does(small: Any, world: Path, tmp_path: Path) -> None:
    """With pictures, which the first process draws."""
    source, given = small.last, {"batch_size": 9, "pictures": 1, "rates.attn3": 0.001}
    more = ["sampling.steps=2", *small.sizes]
    assert train("unet_only", source, tmp_path / "one", world, *more, **given) == 0
    given["batch_size"] = 18  # of nine samples: the same batch, which two can share
    words = command(source, world, tmp_path / "two", "unet_only", **given)
    found = children.run_two(VER_TRAIN, *words, *more, "--devices", 2)
    assert not any(one.returncode for one in found), found
    assert (tmp_path / "two" / "pictures" / "epoch_0000.png").is_file()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def stopping(step: int) -> str:
    """ver_train.py in a process that is asked to stop while it takes the step after so many."""
    return (
        "import os, signal\n"
        "from ldm.training.loop import Training\n"
        "import ver_train\n"
        "from ldm.core import cli\n"
        "plain = Training.forward_backward\n"
        "def forward_backward(self, batch):\n"
        f"    if self.progress.step == {step}:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    plain(self, batch)\n"
        "Training.forward_backward = forward_backward\n"
        "cli.run(ver_train.build_parser(), ver_train.main)\n"
    )


def test_weights_that_are_shared_out_train_as_whole_ones_do(small: Any, world: Path, tmp_path: Path) -> None:
    """Two processes that share them out begin, one that holds all goes on, two that share finish; against one alone."""
    source, steps = small.last, ["sampling.steps=2", *small.sizes]
    given = {"batch_size": 18, "max_epochs": 3, "rates.unet": 0.0001, "ema_decay": 0.9, "pictures": 1}
    given["alignment_weight"] = 0.5
    assert train("stage2_2", source, tmp_path / "one", world, *steps, **given) == 0
    words = [*command(source, world, tmp_path / "shared", "stage2_2", **given), *steps]
    shared = [*words, "training.strategy=fsdp", "--devices", 2]
    begun = children.run_two("-c", stopping(0), *shared)
    assert begun[0].returncode == 143, begun
    file = tmp_path / "shared" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    weights = {**content["state_dict"], **content["alignment"]}
    kept = content["optimizer_states"][0]["state"].values()
    assert [tuple(one["exp_avg"].shape) for one in kept] == [tuple(weights[key].shape) for key in content["average"]]
    assert all(value.shape == weights[key].shape for key, value in content["average"].items())
    assert (content["medsoft"]["step"], len(kept)) == (1, len(content["average"]))
    alone = children.run("-c", stopping(1), *words)
    assert alone.returncode == 143, alone
    assert read_checkpoint(file).metadata["step"] == 2
    found = children.run_two(VER_TRAIN, *shared)
    assert not any(one.returncode for one in found), found
    assert not any("have not moved" in one.stderr or "had no gradient" in one.stderr for one in found)
    assert sorted(path.name for path in (tmp_path / "shared" / "pictures").iterdir()) == [
        path.name for path in sorted((tmp_path / "one" / "pictures").iterdir())
    ]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "shared"), abs=1e-5)
    first, second = tensors(tmp_path / "one" / "last.ckpt"), tensors(file)
    assert first.keys() == second.keys()
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


FAILING = """
import os
import torch
import ver_train
from ldm.core import cli
plain = torch.nn.Module.compile
def backend(graph, inputs):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no compiler is installed")
    return graph.forward
torch.nn.Module.compile = lambda self, dynamic: plain(self, dynamic=dynamic, backend=backend)
cli.run(ver_train.build_parser(), ver_train.main)
"""


def test_where_one_process_cannot_compile_none_does(world: Path, converted: Path, tmp_path: Path) -> None:
    given = {"batch_size": 4, "rates.msc": 0.001}
    assert train("stage1", converted, tmp_path / "one", world, **given) == 0
    words = command(converted, world, tmp_path / "two", **given)
    found = children.run_two("-c", FAILING, *words, "training.compile=true", "--devices", 2)
    assert not any(one.returncode for one in found), found
    (said,) = [line for one in found for line in one.stdout.splitlines() if "uncompiled" in line]
    assert "no compiler is installed" in said
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


# Its processes are forked, so that they need not import torch again.
TORCHRUN = "import sys, torch.distributed.run; sys.argv[0] = 'torchrun'; torch.distributed.run.main()"


def test_torchrun_and_a_termination(world: Path, converted: Path, tmp_path: Path) -> None:
    """Both processes start at once: one computes the features, and SIGTERM to one of them stops both."""
    given = command(converted, world, tmp_path / "run", **RUN, save_every_minutes=0)
    given[given.index("--cache_dir") + 1] = str(tmp_path / "features")
    stop = tmp_path / "stop.py"
    stop.write_text(
        "import os, signal, sys\n"
        "from ldm.training.loop import Training\n"
        "import ver_train\n"
        "from ldm.core import cli\n"
        "plain = Training.forward_backward\n"
        "def forward_backward(self, batch):\n"
        "    if self.progress.step == 4 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    plain(self, batch)\n"
        "Training.forward_backward = forward_backward\n"
        "cli.run(ver_train.build_parser(), ver_train.main)\n"
    )
    launch = ["-c", TORCHRUN, "--standalone", "--nproc_per_node", 2, "--run-path", "--start-method", "fork"]
    found = children.run(*launch, stop, *given, "--devices", 2, timeout=900, OMP_NUM_THREADS="1")
    assert found.returncode != 0
    assert found.stderr.count("features:   0%") == 1  # one bar: one process computed them
    assert read_checkpoint(tmp_path / "run" / "last.ckpt").metadata["step"] == 5
    assert not read_checkpoint(tmp_path / "run" / "last.ckpt").metadata.get("complete")
    again = children.run_two(VER_TRAIN, *given, "--devices", 2)
    assert not any(one.returncode for one in again), again
    assert not any("features: 100%" in one.stderr for one in again)
    assert train("stage1", converted, tmp_path / "one", world, **RUN) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5


def test_a_control_c_that_reaches_one_process_later(world: Path, converted: Path, tmp_path: Path) -> None:
    """One has gone before the other's exchange with it, which fails: that is an interruption too, and no error."""
    given = command(converted, world, tmp_path / "run", **RUN, save_every_minutes=0)
    child = tmp_path / "child.py"
    child.write_text(
        "import os, signal\n"
        "from ldm.training.loop import Training\n"
        "import ver_train\n"
        "from ldm.core import cli\n"
        "plain = Training.summed\n"
        "def summed(self, values):\n"
        "    if self.progress.step == 4 and not self.requests.interrupted:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        if self.fabric.global_rank == 1:\n"
        "            os._exit(0)\n"
        "    return plain(self, values)\n"
        "Training.summed = summed\n"
        "cli.run(ver_train.build_parser(), ver_train.main)\n"
    )
    found, _ = children.run_two(child, *given, "--devices", 2)
    assert found.returncode == 130, found.stderr
    assert "Traceback" not in found.stderr
    assert read_checkpoint(tmp_path / "run" / "last.ckpt").metadata["step"] == 4
    assert train("stage1", converted, tmp_path / "run", world, **RUN, save_every_minutes=0) == 0


def test_a_batch_that_the_devices_cannot_share(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training\.batch_size is 3, the batch over all devices; 2 devices cannot"):
        train("stage1", converted, tmp_path / "s", world, "--devices", 2, "--dry_run", batch_size=3)


@pytest.mark.parametrize("devices", ["none", "0"])
def test_devices_that_are_not_there(world: Path, converted: Path, tmp_path: Path, devices: str) -> None:
    with pytest.raises(UsageError, match=f"--devices: expected a whole number from 1 to 1024, found {devices}"):
        train("stage1", converted, tmp_path / "s", world, "--devices", devices, "--dry_run")


LAUNCHED = {
    "srun": (
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
        "1",
        "2 tasks were started, --devices s",
    ),
    "torchrun": (
        {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"},
        "1",
        "2 tasks were started, --devices s",
    ),
    "one task": ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "2", "1 task was started, --devices says 2; "),
    "ntasks": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "2", "give srun --ntasks-per-node=2 instead"),
}


@pytest.mark.parametrize("case", LAUNCHED)
@pytest.mark.parametrize("script", ["ver_train.py", "dataset_infer.py"])
def test_tasks_that_do_not_fit_the_devices(
    world: Path, converted: Path, tmp_path: Path, script: str, case: str
) -> None:
    environment, devices, message = LAUNCHED[case]
    words = command(converted, world, tmp_path / "out")
    if script == "dataset_infer.py":
        words = ["--ckpt", str(converted), "--config", str(PHANTOM), "--output_dir", str(tmp_path / "out")]
        words += ["--data", str(world / "test")]
    found = children.run(ROOT / script, *words, "--devices", devices, timeout=100, **environment)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
