"""Measure the speed of this machine: one U-Net call and one decoded picture, ours beside diffusers', in one run.

    python tool/bench.py                                   # phantom size, seconds
    python tool/bench.py --config models/mldm_v15.yaml     # true size with random weights, minutes, about 8 GB

Both sides have the same weights, input, precision and threads, and take turns; the ratio is theirs / ours, so above 1
ours is faster. Times are medians. The last line is the third attention's share, which diffusers does not have.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli

log = logging.getLogger("bench")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", type=Path, default=Path("models/phantom.yaml"), help="model YAML (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=2, help="pictures per call (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=10, help="measured calls, after two unmeasured (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    import platform

    import torch

    from ldm.attention import Conditioning
    from ldm.config import load_config
    from ldm.model import MedSoftModel

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


def diffusers_twins(model, config):
    """UNet2DConditionModel and AutoencoderKL of the same sizes, with the model's weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    state = {key: value for key, value in model.state_dict().items() if ".attn3." not in key and ".norm4." not in key}
    widths = [config.unet.model_channels * mult for mult in config.unet.channel_mult]
    cross = [level in config.unet.attention_levels for level in range(len(widths))]
    unet = UNet2DConditionModel(
        in_channels=config.unet.in_channels,
        block_out_channels=widths,
        layers_per_block=config.unet.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in cross],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(cross)],
        attention_head_dim=config.unet.num_heads,
        cross_attention_dim=config.unet.context_dim,
    )
    unet.load_state_dict(convert_ldm_unet_checkpoint(state, dict(unet.config)))
    levels = len(config.autoencoder.channel_mult)
    vae = AutoencoderKL(
        block_out_channels=[config.autoencoder.channels * mult for mult in config.autoencoder.channel_mult],
        layers_per_block=config.autoencoder.num_res_blocks,
        latent_channels=config.autoencoder.latent_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(state, dict(vae.config)))
    device = next(model.parameters()).device
    return unet.to(device).eval(), vae.to(device).eval()


def take_turns(first: Callable, second: Callable, repeats: int, device) -> tuple[float, float]:
    """Median seconds of two calls that alternate, after two rounds that are not counted."""
    import torch

    times: tuple[list[float], list[float]] = ([], [])
    for index in range(repeats + 2):
        for call, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 2:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    cli.run(build_parser(), main)
