"""ldm/core/distributed.py: one task for each device, whoever starts them."""

import os

import pytest

from ldm.core.distributed import check_tasks
from ldm.core.errors import UsageError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
START_ONE = "start one"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name.endswith("RANK") or name.endswith("WORLD_SIZE"):
            monkeypatch.delenv(name)


def started(monkeypatch: pytest.MonkeyPatch, **given: object) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("devices", "nodes", "given"),
    [
        (1, 1, {}),
        (2, 1, {}),  # this process starts the other one
        (2, 2, {}),
        (1, 1, TORCHRUN | {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}),
        (2, 1, TORCHRUN | {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}),
        ("2", 2, TORCHRUN | {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}),
        ("0,1", 1, TORCHRUN | {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}),
        (1, 1, {"SLURM_NTASKS": 1, "SLURM_PROCID": 0}),
        (2, 1, SRUN | {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2}),
        (4, 2, SRUN | {"SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4}),
        (2, 1, SRUN | {"SLURM_NTASKS": 8, "SLURM_JOB_NAME": "interactive", "SLURM_PROCID": 0}),  # a shell of salloc
        (2, 1, SRUN | TORCHRUN | {"SLURM_NTASKS": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}),
        (2, 1, {"WORLD_SIZE": 2, "LOCAL_RANK": 1, "NODE_RANK": 0}),  # started by Lightning
        (2, 2, {"NODE_RANK": 1, "MASTER_ADDR": "a"}),  # the second machine, which starts its other process
        (1, 1, {"SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_NTASKS_PER_NODE": 4}),  # one task in a larger allocation
        ("nonsense", 1, TORCHRUN | {"WORLD_SIZE": 2}),  # for Fabric to refuse
    ],
)
def test_one_task_for_each_device_is_right(
    monkeypatch: pytest.MonkeyPatch, devices: int | str, nodes: int, given: dict[str, object]
) -> None:
    started(monkeypatch, **given)
    check_tasks(devices, nodes)


@pytest.mark.parametrize(
    ("devices", "nodes", "given", "message"),
    [
        (1, 1, SRUN | {"SLURM_NTASKS": 2}, r"^2 tasks were started, --devices says 1; .*or give --devices 2$"),
        (1, 1, {"SLURM_NTASKS": 2, "SLURM_PROCID": 0}, r"2 tasks were started, --devices says 1"),
        (1, 1, TORCHRUN | {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}, r"2 tasks were started, .*or give --devices 2$"),
        (2, 1, {"SLURM_NTASKS": 1, "SLURM_PROCID": 0}, r"1 task was started, --devices says 2; .*--ntasks-per-node=2"),
        (2, 1, TORCHRUN | {"WORLD_SIZE": 1}, r"1 task was started, --devices says 2; .*torchrun --nproc_per_node=2"),
        (
            4,
            1,
            TORCHRUN | {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4},
            r"8 tasks were started, --devices says 4; .*or give --devices 4 --num_nodes 2$",
        ),
        (
            2,
            1,
            SRUN | {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1},
            "--devices says 2; .*--devices 1 --num_nodes 2$",
        ),
        (2, 1, SRUN | {"SLURM_NTASKS": 2}, r"--ntasks=2 leaves open .*; give srun --ntasks-per-node=2 instead of it$"),
        (4, 2, SRUN | {"SLURM_NTASKS": 8}, r"give srun --ntasks-per-node=4 instead"),
        (1, 1, {"WORLD_SIZE": 2, "RANK": 1}, r"2 tasks were started, --devices says 1"),
        (2, 1, SRUN | {"SLURM_STEP_NUM_TASKS": 2, "SLURM_NTASKS": 2, "SLURM_JOB_NAME": "bash"}, START_ONE),
        (1, 1, {"SLURM_PROCID": 1}, r"this is one of several tasks \(RANK, .*SLURM_PROCID\), --devices says 1"),
        (1, 1, {"RANK": 3}, "this is one of several tasks"),
        (1, 2, TORCHRUN | {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, "--devices says 1 and --num_nodes 2"),
        ("auto", 1, TORCHRUN | {"WORLD_SIZE": 97, "LOCAL_WORLD_SIZE": 97}, "97 tasks were started, --devices says"),
    ],
)
def test_more_or_fewer_tasks_are_refused(
    monkeypatch: pytest.MonkeyPatch, devices: int | str, nodes: int, given: dict[str, object], message: str
) -> None:
    started(monkeypatch, **given)
    with pytest.raises(UsageError, match=message):
        check_tasks(devices, nodes)
