"""From samples to what the networks see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.config import DataConfig
from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import content_id, named_seed
from ldm.core.threads import thread_pool
from ldm.data.crop import CropWindow, Fit
from ldm.data.images import intensity_range_of, read_image, to_unit
from ldm.data.masks import (
    DIAMETERS,
    TARGET_LABEL,
    Feather,
    Mask,
    equivalent_diameter,
    extents,
    lesion_shaped,
    read_anatomy,
    read_mask,
    region_for,
    soft_mask_for,
)
from ldm.data.regions import Recall, computed, inpainting_obstacle
from ldm.data.samples import META_TEXTS, Reject, Sample


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A sample at native size and as the networks see it.

    original: HxW or HxWx3 pixels as in the file; intensity_range: its (low, high) values that become 0 and 1; hard:
    bool HxW lesion region; soft: float32 HxW soft mask; crop_window: the part the model sees. image: (3, S, S) in
    [-1, 1]; mask: soft, (1, S, S) in [0, 1]. Where mask < 0.5, image does not depend on pixels where soft >= 0.5, and
    neither does intensity_range. pasted: of original's shape and type, with a lesion pasted where soft > 0, if wanted.
    """

    original: np.ndarray
    intensity_range: tuple[float, float]
    hard: np.ndarray
    soft: np.ndarray
    crop_window: CropWindow
    image: Tensor
    mask: Tensor
    pasted: np.ndarray | None = None

    def as_seen(self, pixels: np.ndarray) -> Tensor:
        """Pixels like ``original``'s, all of them, as the networks would see them: (3, S, S) in [-1, 1]."""
        return _as_seen(pixels, self.intensity_range, np.zeros_like(self.soft), self.crop_window)[0]


def sample_identity(sample: Sample, content: Callable[[Path | None], str | None] = content_id) -> list:
    """Everything about a sample that decides what is learned from it or generated for it, for a run's fingerprint.

    ``content`` gives a file's SHA-256, perhaps one that it remembers.
    """
    extra = (sample.meta.get("window"), sample.meta.get("spacing_mm"))
    return [sample.sample_id, sample.prompt, sample.box, extra, [content(path) for path in sample.files]]


def described_identity(sample: Sample, content: Callable[[Path | None], str | None] = content_id) -> list:
    """``sample_identity`` with all that results and reports say of a sample beside its pixels: whose it is, its lesion,
    the other keys of its ``meta.json``. Who corrects one of them means another run."""
    texts = [getattr(sample, key) for key in META_TEXTS]
    return [*sample_identity(sample, content), texts, sample.synthetic, sample.meta]


def without_scale(samples: Sequence[Sample], data: DataConfig, recall: Recall = computed) -> list[Reject]:
    """The samples that lack a spacing for lengths in mm that ``data`` asks for, or have a lesion wider than its window.

    Only a window in mm (``data.mm_per_pixel``) may be too small; masks are decoded for that, unless ``recall`` knows.
    """
    with thread_pool() as pool:
        reasons = pool.map(lambda sample: _scale_obstacle(sample, data, recall), samples)
        return [Reject(each.sample_id, each.image, why) for each, why in zip(samples, reasons, strict=True) if why]


def _scale_obstacle(sample: Sample, data: DataConfig, recall: Recall) -> str | None:
    fit, spacing = Fit.of(data), sample.meta.get("spacing_mm")
    try:
        fit.check_spacing(spacing)
        Feather(data.feather, data.feather_unit).check_spacing(spacing)
        if data.mm_per_pixel and not sample.healthy and sample.mask is not None:
            _places(sample, data, recall)
    except FileError:
        return None  # preparing it will say what is wrong
    except MedSoftError as error:
        return str(error)
    return None


def distinct_crops(sample: Sample, data: DataConfig, recall: Recall) -> int:
    """How many of the ``data.diseased_crops`` of a diseased sample differ.

    Its mask is decoded, unless ``recall`` knows, as only that says where a window can begin: an annotation's box may be
    smaller than the mask, and the soft border reaches beyond both.
    """
    if data.fit != "crop" or data.diseased_crops == 1:
        return 1
    try:
        return min(_places(sample, data, recall), data.diseased_crops)
    except MedSoftError:
        return data.diseased_crops  # preparing it will say what is wrong


def _places(sample: Sample, data: DataConfig, recall: Recall) -> int:
    """How many different windows there are for the lesion of a diseased sample.

    FileError for a mask that cannot be read, another MedSoftError for a lesion that fits into no window.
    """
    fit, feather, spacing = Fit.of(data), Feather(data.feather, data.feather_unit), sample.meta.get("spacing_mm")

    def count() -> int:
        assert sample.mask is not None  # a diseased one without has no crop
        return fit.places(_soft_mask_of(sample, read_mask(sample.mask), data), spacing)

    return recall(f"places {fit} {feather} {spacing}", (sample.mask, sample.soft_mask), count)


def _soft_mask_of(sample: Sample, mask: Mask, data: DataConfig) -> np.ndarray:
    """The soft mask (HxW) to inpaint with: a diseased sample's own ``soft_mask.png``, else that of its ``mask``."""
    if sample.soft_mask is not None and not sample.healthy:
        return read_mask(sample.soft_mask, mask.values.shape, soft=True).values
    return soft_mask_for(mask, Feather(data.feather, data.feather_unit), sample.meta.get("spacing_mm"))


def prepare(
    sample: Sample, data: DataConfig, seed: int, variant: int, training: bool = False, diameter: float | None = None
) -> PreparedSample:
    """Read one sample and bring it to the model's square.

    A diseased sample uses its own mask; in ``training``, its variants from 1 on are crops shifted by up to an eighth
    of their side, each to another place while there are more. A healthy one gets a lesion-shaped mask inside its
    vertebra. Masks and shifts are functions of (seed, sample_id, variant) alone; ``diameter`` is the size of a healthy
    one's mask, within a tenth (see ``lesion_diameter``). Raises MedSoftError naming the sample's file when something is
    wrong with it.
    """
    reason = inpainting_obstacle(sample)
    if reason:
        raise MedSoftError(f"{sample.sample_id}: {reason}")
    original = read_image(sample.image)
    if sample.healthy:
        region = region_for(sample, original.shape)
        if region is None:
            raise MedSoftError(f"{sample.sample_id}: no vertebra is marked in {sample.anatomy or sample.mask}")
        sizes = (0.9 * diameter, 1.1 * diameter) if diameter else DIAMETERS
        lesion = lesion_shaped(region, named_seed("lesion-shaped", seed, sample.sample_id, variant), sizes)
        return fit_sample(sample, original, Mask(lesion.astype(np.float32)), data)
    assert sample.mask is not None  # inpainting_obstacle has seen it
    own = read_mask(sample.mask, original.shape)
    if own.empty:
        raise MedSoftError(f"{sample.mask}: diseased, but the mask is empty")
    return fit_sample(sample, original, own, data, variant if training else 0, seed)


def lesion_diameter(sample: Sample) -> float | None:
    """Equivalent diameter of a sample's lesion, relative to the smaller side of its vertebra in ``anatomy.png``.

    None where no vertebra is marked or there is no lesion: only a vertebra tells the size of a lesion in other images.
    """
    if sample.anatomy is None or sample.mask is None:
        return None
    lesion = read_mask(sample.mask).hard
    vertebra = read_anatomy(sample.anatomy, lesion.shape) == TARGET_LABEL
    if not vertebra.any() or not lesion.any():
        return None
    smaller = min(last - first for first, last in extents(vertebra))
    return equivalent_diameter(lesion) / smaller


def fit_sample(
    sample: Sample,
    original: np.ndarray,
    mask: Mask,
    data: DataConfig,
    crop: int = 0,
    seed: int = 0,
    soft: np.ndarray | None = None,
) -> PreparedSample:
    """Put an image and the mask to inpaint together; a diseased sample's ``soft_mask.png`` is used as it is.

    ``crop``: 0 is the centred one, others are shifted, to where ``seed`` and the sample's name say. ``soft``: HxW, the
    soft mask, where ``mask`` is the hard one that goes with it.
    """
    spacing = sample.meta.get("spacing_mm")
    if soft is None:
        soft = _soft_mask_of(sample, mask, data)
    crop_window = Fit.of(data).crop_window(original.shape, soft, spacing, crop, (seed, sample.sample_id))
    hidden = soft >= 0.5
    intensity_range = intensity_range_of(original, sample.meta.get("window"), hidden)
    image, model_mask = _as_seen(original, intensity_range, soft, crop_window)
    return PreparedSample(original, intensity_range, mask.hard, soft, crop_window, image, model_mask)


def whole_pictures(samples: Sequence[PreparedSample], device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole images (B, 3, S, S) in [-1, 1], borders repeated to a square, and the soft masks (B, 1, S, S) there."""
    seen = []
    for sample in samples:
        window = Fit("pad", sample.crop_window.size).crop_window(sample.original.shape)
        seen.append(_as_seen(sample.original, sample.intensity_range, sample.soft, window))
    images, masks = zip(*seen, strict=True)
    return torch.stack(images).to(device), torch.stack(masks).to(device)


def _as_seen(
    original: np.ndarray, intensity_range: tuple[float, float], soft: np.ndarray, window: CropWindow
) -> tuple[Tensor, Tensor]:
    """What a window shows: the image (3, S, S) in [-1, 1] and the soft mask (1, S, S)."""
    unit = window.forward(to_unit(original, intensity_range), soft >= 0.5)
    rgb = np.repeat(unit[..., None], 3, axis=2) if unit.ndim == 2 else unit  # the networks read RGB
    image = torch.from_numpy(np.ascontiguousarray((rgb * 2 - 1).transpose(2, 0, 1)))
    return image, torch.from_numpy(window.forward_mask(soft))[None]
