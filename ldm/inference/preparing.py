"""What a task needs read and put together: its image, its mask, and the lesion to paste where one is wanted."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.config import DataConfig
from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import named_seed
from ldm.data.images import composite, read_image
from ldm.data.masks import TARGET_LABEL, Mask, read_anatomy, read_mask, region_for
from ldm.data.preparation import PreparedSample, fit_sample, lesion_diameter, prepare
from ldm.data.samples import Reject, Sample
from ldm.inference.tasks import MaskOrigin, Task
from ldm.transfer.carrying import CarriedMask, Donor, NotCarried, carry, map_by_shape, read_donor
from ldm.transfer.pasting import paste

log = logging.getLogger(__name__)

MOSTLY = 0.6  # more of the image marked than this is probably a mask of the wrong polarity
DONORS = 256  # lesions that are kept in memory: many results share one


class PreparedTask(NamedTuple):
    """A task that knows where its mask comes from and how its lesion was pasted, and what the networks see of it."""

    task: Task
    sample: PreparedSample


class Preparation:
    """Prepares tasks, in any thread.

    ``masks``: of ``Plan``, for the healthy samples without a mask of their own; ``method``: how lesions are pasted, see
    ``ldm.transfer.pasting.paste``.
    """

    def __init__(self, data: DataConfig, masks: str, method: str = "paste") -> None:
        self.data, self.masks, self.method = data, masks, method
        # By all of a sample's files: several lesions of one image have masks of their own.
        self._donors = functools.lru_cache(DONORS)(lambda files: read_donor(self._samples[files]))
        self._diameters = functools.cache(lambda files: lesion_diameter(self._samples[files]))
        self._samples: dict[tuple[Path | None, ...], Sample] = {}

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
        marked = float(prepared.sample.hard.mean())
        if marked > MOSTLY:
            advice = "white (1) is the lesion, the part to inpaint: if the lesion is black in this mask, invert it"
            file = task.sample.mask or task.sample.sample_id
            log.warning("warning: %s: %.0f %% of the image is marked; %s", file, 100 * marked, advice)
        return prepared

    def _masked(self, task: Task) -> PreparedTask:
        """With the mask that is fixed, is the sample's own, is carried over, or has the shape of a lesion."""
        if task.fixed_mask:
            return PreparedTask(task, self._with_fixed_mask(task))
        if not task.sample.healthy:
            return PreparedTask(task, prepare(task.sample, self.data, task.seed, task.variant))
        origin = MaskOrigin("blob")
        if task.source is not None and self.masks == "carry":
            try:
                return self._with_carried_mask(task, task.source)
            except NotCarried as reason:
                origin = MaskOrigin("blob", fallback=str(reason))
        diameter = None
        if task.source is not None:  # that of the lesion which the prompt was written about
            self._samples[task.source.files] = task.source
            diameter = self._diameters(task.source.files)
        sample = prepare(task.sample, self.data, task.seed, task.variant, diameter=diameter)
        return PreparedTask(dataclasses.replace(task, mask=origin), sample)

    def _with_fixed_mask(self, task: Task) -> PreparedSample:
        original = read_image(task.sample.image)
        assert task.sample.mask is not None  # a fixed mask is one
        mask = read_mask(task.sample.mask, original.shape, soft=task.sample.mask == task.sample.soft_mask)
        if mask.empty:
            raise MedSoftError(f"{task.sample.mask}: the mask is empty; mark the region to inpaint in white")
        sample = dataclasses.replace(task.sample, prompt="lesion")  # its own mask and soft mask are meant
        return fit_sample(sample, original, mask, self.data)

    def _with_carried_mask(self, task: Task, source: Sample) -> PreparedTask:
        donor, original = self._donor(source), read_image(task.sample.image)
        found = self._carry(task, donor, original)
        mask = Mask(found.hard.astype(np.float32))
        sample = fit_sample(task.sample, original, mask, self.data, soft=found.soft)
        origin = MaskOrigin("carry", source.sample_id)
        return PreparedTask(dataclasses.replace(task, mask=origin, pasted_by=found.matrix.tolist()), sample)

    def _carry(self, task: Task, donor: Donor, original: np.ndarray) -> CarriedMask:
        seed = named_seed("carried", task.seed, task.sample.sample_id, task.variant)
        return carry(donor, region_for(task.sample, original.shape), original.shape, seed)

    def _pasted(self, prepared: PreparedTask) -> PreparedTask:
        """With the donor's lesion pasted; where its mask was not carried over, brought to the mask by their boxes."""
        task, sample = prepared
        assert task.donor is not None
        donor, anatomy = self._donor(task.donor), task.sample.anatomy
        body = read_anatomy(anatomy, sample.original.shape) == TARGET_LABEL if anatomy is not None else None
        matrix = np.array(task.pasted_by) if task.pasted_by else map_by_shape(donor, sample.hard)
        levels = paste(donor, sample.original, body, sample.soft, matrix, self.method)
        top = np.iinfo(sample.original.dtype).max
        pixels = composite(sample.original, levels / top, sample.soft, (0, top))
        task = dataclasses.replace(task, pasted_by=matrix.tolist())
        return PreparedTask(task, dataclasses.replace(sample, pasted=pixels))

    def _donor(self, sample: Sample) -> Donor:
        self._samples[sample.files] = sample
        return self._donors(sample.files)
