"""MedSoft-Diffusion from Python: lesions inpainted into images, as dataset_infer.py does it.

import medsoft

model = medsoft.load("stage2_2/last.ckpt", "models/mldm_v15.yaml")
images = model.draw("spine.png", mask, "osteolytic lesion of the L3 vertebra", n=4)
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.config import DataConfig, load_config
from ldm.core.distributed import start_processes
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.paths import shipped
from ldm.data.images import with_alpha
from ldm.inference.inpainter import Inpainter, Job, load_inpainter
from ldm.inference.preparing import prepare_one
from ldm.inference.single import image_source

__all__ = ["LesionModel", "MedSoftError", "UsageError", "load"]


def load(
    ckpt: str | Path | Checkpoint, config: str | Path | None = None, overrides: Sequence[str] = (), device: str = "auto"
) -> "LesionModel":
    """The model of a final checkpoint, ready to draw.

    ckpt: the file, or what was read of it. config: a model YAML, by default the config.yaml that ver_train.py has
    written beside the checkpoint. overrides: keys of it, as in ["sampling.steps=8", "biomedclip.path=..."]. device:
    auto, cpu, cuda, cuda:1, ... Raises UsageError or MedSoftError, which say what is wrong and what to do.
    """
    path = ckpt.path if isinstance(ckpt, Checkpoint) else Path(ckpt)
    found = path.with_name("config.yaml") if config is None else shipped(config)
    if config is None and not found.is_file():
        raise UsageError(
            f"{found}: does not exist; name a model YAML, as in medsoft.load(CKPT, 'models/mldm_v15.yaml')"
        )
    settings = load_config(found, overrides)
    return LesionModel(load_inpainter(ckpt, settings, start_processes(device, 1, 1).device), settings.data)


class LesionModel:
    """Draws lesions with one checkpoint; see ``load``."""

    def __init__(self, inpainter: Inpainter, data: DataConfig) -> None:
        self.inpainter, self.data = inpainter, data

    def draw(
        self,
        image: Any,
        mask: Any,
        prompt: str,
        n: int = 1,
        seed: int = 0,
        *,
        name: str | None = None,
        spacing_mm: float | Sequence[float] | None = None,
        window: Sequence[float] | None = None,
        on_step: Callable[[int, int], object] | None = None,
    ) -> list[np.ndarray]:
        """The image with a lesion, ``n`` times: arrays of its size, depth and channels.

        image: a path, a NumPy array (HxW or HxWx3, uint8 or uint16) or a PIL image. mask: likewise, of the same size; 1
        (or 255, or True) is the part to inpaint; it may be soft already, as float too. Where the soft mask is 0, pixels
        equal the image's. prompt: one sentence. seed, from 0, and ``name``, by default the stem of the file or "image",
        decide the noise: these are the images of ``dataset_infer.py --image --mask --prompt --seed --variants n``.
        spacing_mm, window (of 16 bits): as in meta.json, by default that of the meta.json beside the image's file.
        on_step(k, steps) is told after each sampling step how many are done for the image k, from 0, and those drawn
        in a batch with it; what it raises ends the drawing.
        Raises MedSoftError or UsageError, naming what is wrong.
        """
        for key, value, least in (("n", n, 1), ("seed", seed, 0)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value < 2**63:
                raise UsageError(f"{key}: expected a whole number of at least {least}, found {value!r}")
        given = {"spacing_mm": spacing_mm, "window": window}
        meta = {key: np.atleast_1d(value).tolist() for key, value in given.items() if value is not None}
        source, marked = image_source("image", image), image_source("mask", mask)
        sample, prepared = prepare_one(source, marked, prompt, meta, self.data, name)
        jobs, size = [Job(int(seed), sample.sample_id, k, prompt) for k in range(n)], self.inpainter.sampling.batch_size
        found: list[np.ndarray] = []
        for first in range(0, n, size):
            progress = None if on_step is None else partial(on_step, first)
            found += self.inpainter.draw(prepared, jobs[first : first + size], progress)
        return [with_alpha(pixels, source, prepared.soft > 0) for pixels in found]
