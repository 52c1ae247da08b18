"""Networks opened with the weights of a checkpoint."""

from pathlib import Path

import torch
from tiny import CLIP, PHANTOM, tensors

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.networks.opening import open_model


def test_weights_are_the_files_and_no_random_number_is_drawn_first(final: Path) -> None:
    config = load_config(PHANTOM, [f"biomedclip.path={CLIP}"])
    before = torch.get_rng_state()
    net, encoder = open_model(config, read_checkpoint(final))
    assert torch.equal(torch.get_rng_state(), before)
    found, wanted = net.state_dict(), tensors(final)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    weights = torch.load(Path(CLIP) / "open_clip_pytorch_model.bin", weights_only=True)
    assert all(torch.equal(encoder.clip.state_dict()[key], value.float()) for key, value in weights.items())
