"""The golden list of sd-v1-5-inpainting.ckpt, and files built from it."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ldm.config import DiffusionConfig
from ldm.diffusion.schedule import NoiseSchedule

LIST = Path(__file__).parent / "sd-v1-5-inpainting.keys.txt"


@cache
def golden() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every key of the original file."""
    found, prefix = {}, ""
    for line in LIST.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.endswith("."):
            prefix = line
            continue
        name, shape, *kind = line.split()
        key = prefix + name if line.startswith(" ") else name
        sizes = () if shape == "-" else tuple(int(size) for size in shape.split("x"))
        found[key] = sizes, getattr(torch, kind[0] if kind else "float32")
    return found


def original(shapes: dict[str, Iterable[int]] | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under every key of the original file, its noise schedule; ``shapes`` replaces the true ones."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, (true_shape, dtype) in golden().items():
        shape = tuple((shapes or {}).get(key, true_shape))
        if dtype.is_floating_point:
            made[key] = torch.empty(shape).uniform_(-0.1, 0.1, generator=generator)
        else:
            made[key] = torch.arange(77).reshape(1, 77) if shape else torch.tensor(0, dtype=dtype)
    made["alphas_cumprod"] = NoiseSchedule(DiffusionConfig()).alphas_cumprod.clone()
    made["betas"] = 1 - made["alphas_cumprod"] / torch.cat([torch.ones(1), made["alphas_cumprod"][:-1]])
    return made


def save_original(path: Path, state: dict[str, torch.Tensor], **besides: Any) -> Path:
    """As the original was saved: ``state_dict`` and a few plain values."""
    torch.save({"epoch": 0, "global_step": 440_000, "state_dict": state, **besides}, path)
    return path
