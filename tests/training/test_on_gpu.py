"""Training steps on a GPU that is there: nothing waits, and the numbers are those of a CPU."""

import pytest
import torch
from tiny import MODELS, STAGES

from ldm.bench.training import optimizer_step
from ldm.config import Config, load_config
from ldm.training.dataset import Batch
from ldm.training.estimates import fake_batch, fake_stage
from ldm.training.stage import Stage

pytestmark = pytest.mark.gpu


def made(stage: str) -> tuple[Config, Stage, Batch]:
    torch.manual_seed(0)
    config = load_config(MODELS / f"phantom_{stage}.yaml", [])
    return config, fake_stage(config.architecture, config.training, False), fake_batch(config.architecture, 2)


@pytest.mark.parametrize("name", STAGES)
def test_no_operation_of_a_step_waits(name: str) -> None:
    """PyTorch itself says where the host would wait. The first steps load kernels and copy the schedule."""
    _, stage, batch = made(name)
    stage, batch = stage.to("cuda"), {key: value.to("cuda") for key, value in batch.items()}
    optimizer = stage.adamw()
    for _ in range(2):
        optimizer_step(stage, optimizer, batch, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = optimizer_step(stage, optimizer, batch, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", STAGES)
def test_losses_are_those_of_a_cpu(name: str) -> None:
    """Over three steps, in float32, convolutions in TF32."""
    losses = {}
    for device in ("cpu", "cuda"):
        _, stage, batch = made(name)
        stage, batch = stage.to(device), {key: value.to(device) for key, value in batch.items()}
        optimizer = stage.adamw()
        losses[device] = [float(optimizer_step(stage, optimizer, batch, False)) for _ in range(3)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
