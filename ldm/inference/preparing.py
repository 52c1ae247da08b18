"""What a task needs read and put together: its image, its mask, and the lesion to paste where one is wanted."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.config import DataConfig
from ldm.core.errors import FewWarnings, FileError, MedSoftError, UsageError
from ldm.data.folders import read_meta
from ldm.data.images import ImageFile, ImageSource, composite, read_image
from ldm.data.masks import TARGET_LABEL, Mask, read_anatomy, read_mask
from ldm.data.preparation import PreparedSample, fit_sample, lesion_diameter, prepare
from ldm.data.samples import META_RULES, Reject, Sample, prompt_fault, wrong_value
from ldm.inference.single import one_sample
from ldm.inference.tasks import MaskOrigin, Task
from ldm.transfer.carrying import Donors, NotCarried, by_files, map_by_shape
from ldm.transfer.pasting import paste

log = logging.getLogger(__name__)

MOSTLY = 0.6  # more of the image marked than this is probably a mask of the wrong polarity


def with_fixed_mask(sample: Sample, image: ImageSource, mask: ImageSource, data: DataConfig) -> PreparedSample:
    """An image with the mask that is to be inpainted, hard or soft, although the sample may be healthy.

    FileError or MedSoftError for one that cannot be read, masks of another size and those that mark nothing.
    """
    original = read_image(image)
    found = read_mask(mask, original.shape, soft=mask == sample.soft_mask)
    if found.empty:
        name = mask.path if isinstance(mask, ImageFile) else mask
        raise MedSoftError(f"{name}: the mask is empty; mark the region to inpaint in white")
    sample = dataclasses.replace(sample, prompt="lesion")  # its own mask and soft mask are meant
    return fit_sample(sample, original, found, data)


def prepare_one(
    image: ImageSource, mask: ImageSource, prompt: str, meta: dict[str, Any], data: DataConfig, name: str | None
) -> tuple[Sample, PreparedSample]:
    """One image of ``image_source`` with its mask, as a sample, and what the networks see of it.

    ``meta``: keys of meta.json, which go before those of the file beside the image. ``name``: its sample_id, by default
    the stem of its file's name. Raises UsageError for a prompt or keys that cannot be meant.
    """
    if fault := prompt_fault(prompt.strip()):
        raise UsageError(f"prompt: {fault}")
    if wrong := wrong_value(meta, META_RULES):
        raise UsageError(": ".join(wrong))
    about = read_meta(image.with_name("meta.json")) | meta if isinstance(image, Path) else meta
    file, mask_file = (Path(each.path if isinstance(each, ImageFile) else each) for each in (image, mask))
    sample = one_sample(name or file.stem, file, mask_file, prompt, about)
    prepared = with_fixed_mask(sample, image, mask, data)
    if "window" in meta and prepared.original.dtype == np.uint8:
        raise UsageError("window: the image has 8 bits, which are used as they are")
    warn_if_mostly_marked(mask_file, prepared)
    return sample, prepared


def warn_if_mostly_marked(
    mask: str | Path, prepared: PreparedSample, warn: Callable[[str], None] = log.warning
) -> None:
    """A warning for a mask that is probably of the wrong polarity."""
    marked = float(prepared.hard.mean())
    if marked > MOSTLY:
        advice = "white (1) is the lesion, the part to inpaint: if the lesion is black in this mask, invert it"
        warn(f"warning: {mask}: {100 * marked:.0f} % of the image is marked; {advice}")


class PreparedTask(NamedTuple):
    """A task that knows where its mask comes from and how its lesion was pasted, and what the networks see of it."""

    task: Task
    sample: PreparedSample


class Preparation:
    """Prepares tasks, in any thread.

    ``masks``: of ``Plan``, for the healthy samples without a mask of their own; ``method``: how lesions are pasted, see
    ``ldm.transfer.pasting.paste``.
    """

    def __init__(self, data: DataConfig, masks: str, method: str) -> None:
        self.data, self.masks, self.method = data, masks, method
        self._donors = Donors()
        self._marked = FewWarnings(log, "masks that mark most of their image")
        self._diameter = by_files(lesion_diameter, None)

    def __call__(self, task: Task) -> PreparedTask | Reject:
        """The prepared task, or why it cannot be made."""
        lesion = task.donor or task.source
        try:
            prepared = self._masked(task)
            if task.donor is not None:
                prepared = self._pasted(prepared)
        except MedSoftError as error:
            of_lesion = isinstance(error, FileError) and error.path not in task.sample.files
            if lesion is not None and isinstance(error, FileError) and of_lesion and error.path in lesion.files:
                reason = f"{error.reason}; {task.name} is not made, as prompt and lesion come from this sample"
                return Reject(lesion.sample_id, error.path, reason)
            return Reject(task.sample.sample_id, task.sample.image, str(error))
        warn_if_mostly_marked(task.sample.mask or task.sample.sample_id, prepared.sample, self._marked.warn)
        return prepared

    def _masked(self, task: Task) -> PreparedTask:
        """With the mask that is fixed, is the sample's own, is carried over, or has the shape of a lesion."""
        if task.fixed_mask:
            assert task.sample.mask is not None  # a fixed mask is one
            sample = with_fixed_mask(task.sample, task.sample.image, task.sample.mask, self.data)
            return PreparedTask(task, sample)
        if not task.sample.healthy:
            return PreparedTask(task, prepare(task.sample, self.data, task.seed, task.variant))
        origin = MaskOrigin("blob")
        if task.source is not None and self.masks == "carry":
            try:
                return self._with_carried_mask(task, task.source)
            except NotCarried as reason:
                origin = MaskOrigin("blob", fallback=str(reason))
        # That of the lesion which the prompt was written about.
        diameter = None if task.source is None else self._diameter(task.source)
        sample = prepare(task.sample, self.data, task.seed, task.variant, diameter=diameter)
        return PreparedTask(dataclasses.replace(task, mask=origin), sample)

    def _with_carried_mask(self, task: Task, source: Sample) -> PreparedTask:
        original = read_image(task.sample.image)
        found = self._donors.carry(source, task.sample, original.shape, task.seed, task.variant)
        mask = Mask(found.hard.astype(np.float32))
        sample = fit_sample(task.sample, original, mask, self.data, soft=found.soft)
        origin = MaskOrigin("carry", source.sample_id, found.only_form)
        return PreparedTask(dataclasses.replace(task, mask=origin, pasted_by=found.matrix.tolist()), sample)

    def _pasted(self, prepared: PreparedTask) -> PreparedTask:
        """With the donor's lesion pasted; where its mask was not carried over, brought to the mask by their boxes."""
        task, sample = prepared
        assert task.donor is not None
        donor, anatomy = self._donors(task.donor), task.sample.anatomy
        body = read_anatomy(anatomy, sample.original.shape) == TARGET_LABEL if anatomy is not None else None
        matrix = np.array(task.pasted_by) if task.pasted_by else map_by_shape(donor, sample.hard)
        levels = paste(donor, sample.original, body, sample.soft, matrix, self.method)
        top = np.iinfo(sample.original.dtype).max
        beyond = (levels < -0.5) | (levels > top + 0.5)  # which only the lesion's are
        clipped = int(np.count_nonzero(beyond.any(axis=2) if beyond.ndim == 3 else beyond))
        pixels = composite(sample.original, levels / top, sample.soft, (0, top))
        task = dataclasses.replace(task, pasted_by=matrix.tolist(), clipped_pixels=clipped)
        return PreparedTask(task, dataclasses.replace(sample, pasted=pixels))
