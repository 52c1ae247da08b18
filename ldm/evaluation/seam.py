"""How visible the border of inpainted lesions is: diseased samples are inpainted again in their own masks."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import Config, DataConfig
from ldm.core.distributed import start_processes
from ldm.core.errors import MedSoftError
from ldm.core.files import write_json
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import FEWEST_PATIENTS, real_ones
from ldm.data.images import border_gradient, to_unit
from ldm.data.preparation import prepare
from ldm.data.samples import Sample
from ldm.evaluation.lesions import ring_around
from ldm.evaluation.metrics import ratio_of
from ldm.inference.inpainter import Inpainter, Job, load_inpainter

log = logging.getLogger("measure_seam")

BORDERS = ("band", "contour")
COMPOSITES = {"result": "soft composite", "hard": "hard composite (control)"}


class BorderGradient(NamedTuple):
    """Mean gradients across one mask's border: in the real image, in the result, in the hard composite."""

    patient_id: str
    real: float
    result: float
    hard: float


def measure_seam(
    checkpoint: Path, config: Config, source: Path, output: Path, limit: int | None, seed: int, device: str
) -> None:
    """Write to ``output``, as JSON, the gradients of ``source``'s inpainted lesions over those of the real images.

    ``limit``: at most so many diseased samples. MedSoftError without a diseased sample or a border to measure at.
    """
    diseased = [sample for sample in real_ones(source, load_samples(source)[0]) if not sample.healthy][:limit]
    if not diseased:
        raise MedSoftError(f"{source}: has no diseased sample; they are inpainted again in their own masks")
    opened = read_checkpoint(checkpoint)
    digest = opened.sha256()
    inpainter = load_inpainter(opened, config, start_processes(device, 1, 1).device)
    found = border_gradients(inpainter, diseased, config.data, seed)
    if not any(each.real for each in found["contour"]):
        raise MedSoftError(f"{source}: no mask has a border with a gradient in the real image")
    rows: dict[str, Any] = {border: {} for border in BORDERS}
    for border, gradients in found.items():
        patients, real, *inpainted = zip(*gradients, strict=True)
        for (name, text), values in zip(COMPOSITES.items(), inpainted, strict=True):
            row = rows[border][name] = {**ratio_of(values, real, patients), "pictures": len(gradients)}
            known = row["low"] is not None
            interval = (
                f"95 % [{row['low']:.3f}, {row['high']:.3f}]"
                if known
                else f"no interval: fewer than {FEWEST_PATIENTS} patients"
            )
            shown = border, text, row["value"], interval, counted(len(gradients), "image")
            log.info("%-8s %-25s %.3f of the real gradient, %s, %s", *shown)
    write_json(output, {**rows, "data": str(source), "checkpoint_sha256": digest})
    log.info("%s", output)


def border_gradients(
    inpainter: Inpainter, samples: Sequence[Sample], data: DataConfig, seed: int
) -> dict[str, list[BorderGradient]]:
    """Gradients across the band and the contour of each sample's mask; a mask that covers its image has no border."""
    found: dict[str, list[BorderGradient]] = {border: [] for border in BORDERS}
    size = inpainter.sampling.batch_size
    for first in tqdm(range(0, len(samples), size), "inpainting", unit=" batches"):
        batch = samples[first : first + size]
        prepared = [prepare(sample, data, seed, 0) for sample in batch]
        results = inpainter.inpaint(prepared, [Job(seed, sample.sample_id, 0, sample.prompt) for sample in batch])
        for sample, image, result in zip(batch, prepared, results, strict=True):
            if result.pixels is None or result.generated is None:
                raise MedSoftError(f"{sample.sample_id}: {result.error}")
            real = to_unit(image.original, image.intensity_range)
            pasted = real.copy()
            pasted[image.soft >= 0.5] = result.generated[image.soft >= 0.5]
            compared = (real, to_unit(result.pixels, image.intensity_range), pasted)
            for border, soft in (("band", image.soft), ("contour", image.soft >= 0.5)):
                across = [border_gradient(each, soft) for each in compared]
                if math.isfinite(across[0]):
                    found[border].append(BorderGradient(sample.patient_id, *across))
    return found


def border_over_surroundings(grey: np.ndarray, soft: np.ndarray) -> float | None:
    """``border_gradient`` over the mean gradient right outside the soft mask, of a grey image (HxW), real or drawn.

    None where the mask has no border, or where there is nothing outside of it.
    """
    ring, steps = ring_around(soft > 0), []
    for axis in (0, 1):
        both = ring & np.roll(ring, -1, axis)  # a pixel and the next one; the last one's next lies on the other side
        steps.append(np.abs(np.diff(grey, axis=axis))[np.delete(both, -1, axis)])
    outside, border = np.concatenate(steps), border_gradient(grey, soft)
    return border / float(outside.mean()) if math.isfinite(border) and outside.any() else None
