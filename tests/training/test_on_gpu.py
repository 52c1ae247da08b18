"""Training steps on a GPU that is there: nothing waits, and the numbers are those of a CPU."""

import pytest
import torch
from on_gpu import DEVICES, no_waits
from tiny import MODELS, STAGES

from ldm.bench.inference import wake
from ldm.bench.training import optimizer_step
from ldm.config import load_config
from ldm.training.dataset import Batch
from ldm.training.estimates import fake_batch, fake_stage
from ldm.training.stage import Stage

pytestmark = pytest.mark.parametrize("device", DEVICES)


def awake_stage(name: str) -> tuple[Stage, Batch]:
    torch.manual_seed(0)
    config = load_config(MODELS / f"phantom_{name}.yaml", [])
    stage = fake_stage(config.architecture, config.training, False)
    wake(stage.net)  # else nothing of stage2_1 would pass through the third attention
    return stage, fake_batch(config.architecture, 2)


@pytest.mark.parametrize("name", STAGES)
def test_no_operation_of_a_step_waits(name: str, device: str) -> None:
    """PyTorch itself says where the host would wait. The first steps load kernels and copy the schedule."""
    stage, batch = awake_stage(name)
    stage, batch = stage.to(device), {key: value.to(device) for key, value in batch.items()}
    optimizer = stage.adamw()
    for _ in range(2):
        optimizer_step(stage, optimizer, batch, True)
    with no_waits(device):
        loss = optimizer_step(stage, optimizer, batch, True)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", STAGES)
def test_losses_are_those_of_a_cpu(name: str, device: str) -> None:
    """Over three steps, in float32, convolutions in TF32."""
    losses = []
    for where in ("cpu", device):
        stage, batch = awake_stage(name)
        stage, batch = stage.to(where), {key: value.to(where) for key, value in batch.items()}
        optimizer = stage.adamw()
        losses.append([float(optimizer_step(stage, optimizer, batch, False)) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0][2] != losses[0][0]
