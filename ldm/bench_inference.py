"""Speed of drawing, ours beside diffusers', on the same weights in the same run."""

import argparse
import logging
import platform

import torch

from ldm import cli
from ldm.attention import Conditioning
from ldm.benchmark import diffusers_twins, take_turns
from ldm.config import load_config
from ldm.model import MedSoftModel

log = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> int:
    """Measure and log one line per part: seconds of ours and of diffusers', and their ratio."""
    config = load_config(args.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = MedSoftModel(config, ["unet", "autoencoder"]).to(device).eval()
    unet, vae = diffusers_twins(model, config)
    size, batch = config.latent_size, args.batch_size
    x = torch.randn(batch, 9, size, size, device=device)
    t = torch.full((batch,), 501, device=device)
    text = torch.randn(batch, config.text_encoder.max_length, config.unet.context_dim, device=device)
    tokens = torch.randn(batch, (config.biomedclip.grid // 2) ** 2, config.unet.semantic_dim, device=device)
    latent = x[:, :4].contiguous()
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    log.info("%s, %d threads, torch %s, float32, batch %d", where, torch.get_num_threads(), torch.__version__, batch)
    with torch.no_grad():
        calls = {
            "U-Net call": (lambda: model.unet(x, t, Conditioning(text)), lambda: unet(x, t, text).sample),
            "decoded picture": (lambda: model.decode(latent), lambda: vae.decode(latent / 0.18215).sample),
        }
        for name, (ours, theirs) in calls.items():
            mine, other = take_turns(ours, theirs, args.repeats, device)
            log.info("%-16s ours %.4f s, diffusers %.4f s, ratio %.2f", name, mine, other, other / mine)
        mask = torch.ones(batch, 1, size, size, device=device)
        plain, third = take_turns(
            calls["U-Net call"][0], lambda: model.unet(x, t, Conditioning(text, tokens, mask)), args.repeats, device
        )
        log.info("%-16s %.4f s without, %.4f s with it, ratio %.2f", "third attention", plain, third, third / plain)
    return cli.DONE
