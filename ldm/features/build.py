"""Frozen features computed once and kept on disk: latents and BiomedCLIP tokens of every training item, text of every
prompt.

They are found by content (see FeatureNames), so stages, runs and processes share them, and nothing stale is ever read.
One process computes at a time; others wait for it and find the work done.
"""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.core.devices import free_memory, out_of_memory
from ldm.core.errors import FileError, MedSoftError, first_line
from ldm.core.files import REPLACED, content_id, nearest_existing
from ldm.core.locks import exclusive
from ldm.core.threads import thread_pool
from ldm.data.images import read_image
from ldm.data.masks import Mask
from ldm.data.preparation import PreparedSample, fit_sample, prepare, whole_pictures
from ldm.data.samples import Reject, Sample
from ldm.features.known import record_in
from ldm.features.names import Item
from ldm.features.shards import narrow
from ldm.features.sizes import image_memory
from ldm.features.store import FeatureStore
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel
from ldm.transfer.carrying import Donors, NotCarried

log = logging.getLogger(__name__)

MASK_SEED = 0  # the fixed masks of healthy training items are the same in every stage and run
SHARD_BYTES = 64 * 2**20  # features that are written together; so much is computed again if one of them is damaged
SHARD_SECONDS = 300.0  # they are written earlier: no more work is lost when the process is killed


class FeatureBuilder:
    """Computes features with the frozen networks: the image-text encoder ``clip``, and the autoencoder and the text
    encoder of ``model``, if it has them."""

    def __init__(
        self,
        folder: str | Path,
        data: DataConfig,
        model: MedSoftModel,
        clip: ImageTextEncoder,
        digests: Mapping[Path | None, str],
        batch: int = 2,
    ) -> None:
        """``digests``: SHA-256 of every file of the items (see KnownFiles); ``batch``: the most items that are
        computed at once."""
        self.data, self.model, self.clip, self.batch = data, model, clip, batch
        sizes = model.architecture
        view = " of whole images" if sizes.biomedclip.view == "image" else ""
        encoders = {"clip": clip.fingerprint + clip.preparation.get("images", "") + view}
        encoders["clip_text"] = clip.fingerprint + clip.preparation.get("prompts", "")
        if "autoencoder" in model.parts:
            encoders["latents"] = _weights_fingerprint(model.first_stage_model) + " thumbnail" * sizes.unet.thumbnail
        if "text" in model.parts:
            encoders["text"] = _weights_fingerprint(model.cond_stage_model)
        self.store = FeatureStore(folder, data, encoders, digests)
        self._donors = Donors()
        self._not_carried: list[str] = []  # why masks were not carried over, one for each
        self._only_form: list[str] = []  # why no more than their form was
        self._computed: dict[str, dict[bytes, dict[str, Tensor]]] = {}  # by kind and key, not yet written
        self._bytes, self._since = 0, 0.0

    def build(self, items: Sequence[Item]) -> list[Reject]:
        """Compute what is missing or damaged, with a progress bar; items that cannot be prepared are returned.

        Raises MedSoftError if the disk is full, if the memory does not even suffice for one item, and for a file that
        is another one by now than that of its digest.
        """
        self.store.refresh()
        if not any(self._missing(items)):
            return []
        folder = self.store.folder
        if not os.access(nearest_existing(folder.absolute()), os.W_OK):
            raise MedSoftError(
                f"{folder}: features have to be computed or verified anew, but the folder may not be written to; give "
                "another --cache_dir, or a copy of this one"
            )
        with exclusive(folder / ".lock", f"another run is computing features in {folder}; waiting for it", wait=True):
            self.store.clear_up()
            self.store.verify(self.store.refresh())
            missing, prompts = self._missing(items)  # no more what the run before us has computed
            self._since = time.monotonic()
            try:
                rejects = self._compute_all(missing)
                self._say_what_was_carried(sum(item.donor is not None for item in missing))
                for prompt in tqdm(prompts, "prompts", unit="prompt", disable=not prompts, mininterval=1):
                    self.compute_prompt(prompt)
            finally:
                self._write()
        return rejects

    def _say_what_was_carried(self, wanted: int) -> None:
        if wanted:
            log.info("masks of healthy images: %d carried over", wanted - len(self._not_carried))
        for reason, count in sorted(Counter(self._not_carried).items()):
            log.warning("warning: %d of %d masks are lesion-shaped instead of carried over: %s", count, wanted, reason)
        for reason, count in sorted(Counter(self._only_form).items()):
            log.warning("warning: %d of %d masks are not placed by two vertebrae: %s", count, wanted, reason)

    def _missing(self, items: Sequence[Item]) -> tuple[list[Item], list[str]]:
        """The items and the prompts that lack one of their features."""
        prompts = sorted({item.sample.prompt for item in items} | {""})  # the empty one: guidance without a condition
        lacking = [item for item in items if self._lacking(self.store.of_item(item))]
        return lacking, [prompt for prompt in prompts if self._lacking(self.store.of_prompt(prompt))]

    def _lacking(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        return {kind: key for kind, key in keys.items() if key not in self.store}

    def _compute_all(self, items: Sequence[Item]) -> list[Reject]:
        """``compute`` batch by batch; a batch that does not fit into memory is halved, as are those after it."""
        rejects: list[Reject] = []
        batch, done = self._fitting_batch(), 0
        with tqdm(total=len(items), desc="features", unit="item", disable=not items, mininterval=1) as progress:
            while done < len(items):
                members = items[done : done + batch]
                try:
                    rejects += self.compute(members)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    batch, reason = len(members) // 2, first_line(error)
                else:
                    done += len(members)
                    progress.update(len(members))
                    continue
                if not batch:
                    raise MedSoftError(
                        f"{members[0].sample.image}: out of memory while its features were computed ({reason}); free "
                        "some memory or take a device with more of it, then run the same command again: what is "
                        f"computed is kept in {self.store.folder}"
                    )
                log.warning(
                    "out of memory with %d items (%s): computing features %d at a time", *(2 * batch, reason, batch)
                )
                if self.clip.device.type == "cuda":
                    torch.cuda.empty_cache()  # here, where the error does not hold on to the batch's tensors any more
        return rejects

    def _fitting_batch(self) -> int:
        """Items to compute at once. A full memory of the CPU raises no error: the system would end the process."""
        batch, free = self.batch, free_memory(self.clip.device)
        while batch > 1 and image_memory(self.model.architecture, self.model.parts) * batch > free:
            batch //= 2
        if batch < self.batch:
            log.warning("little memory is free: computing features %d at a time instead of %d", batch, self.batch)
        return batch

    def compute(self, items: Sequence[Item]) -> list[Reject]:
        """Compute the features that ``items`` lack; those that cannot be prepared are returned."""
        with thread_pool() as pool:
            found = list(zip(items, pool.map(self._prepared, items), strict=True))
        ready = [(item, prepared) for item, prepared in found if isinstance(prepared, PreparedSample)]
        if ready:
            lacking = [self._lacking(self.store.of_item(item)) for item, _ in ready]
            image = torch.stack([prepared.image for _, prepared in ready]).to(self.clip.device)
            mask = torch.stack([prepared.mask for _, prepared in ready]).to(self.clip.device)
            kinds = {kind for keys in lacking for kind in keys}
            whole = None
            if self.model.architecture.sees_whole:
                whole = whole_pictures([prepared for _, prepared in ready], self.clip.device)
            made = compute_features(self.model, self.clip, image, mask, kinds, whole)
            for number, keys in enumerate(lacking):
                for kind, key in keys.items():
                    self._keep(kind, key, {name: value[number] for name, value in made[kind].items()})
        return [prepared for _, prepared in found if isinstance(prepared, Reject)]

    def _prepared(self, item: Item) -> PreparedSample | Reject:
        try:
            prepared = self._read(item)
        except MedSoftError as error:
            return Reject(item.sample.sample_id, item.sample.image, error.cause(item.sample.image))
        for sample in filter(None, (item.sample, item.donor)):
            for path in filter(None, sample.files):  # else its features would be kept under the name of another one's
                if content_id(path) != self.store.digests[path]:
                    trusted = record_in(self.store.folder)
                    raise FileError(path, f"{REPLACED}; should it say so once more, delete {trusted}")
        return prepared

    def _read(self, item: Item) -> PreparedSample:
        if item.donor is not None:
            try:
                return self._with_carried_mask(item, item.donor)
            except NotCarried as reason:
                self._not_carried.append(str(reason))
        return prepare(item.sample, self.data, MASK_SEED, item.variant, training=True)

    def _with_carried_mask(self, item: Item, donor: Sample) -> PreparedSample:
        original = read_image(item.sample.image)
        found = self._donors.carry(donor, item.sample, original.shape, MASK_SEED, item.variant)
        if found.only_form:
            self._only_form.append(found.only_form)
        return fit_sample(item.sample, original, Mask(found.hard.astype(np.float32)), self.data, soft=found.soft)

    @torch.no_grad()
    def compute_prompt(self, prompt: str) -> None:
        """Compute the features that ``prompt`` lacks, by itself: how it is padded must not depend on others."""
        keys = self._lacking(self.store.of_prompt(prompt))
        if "clip_text" in keys:
            self._keep("clip_text", keys["clip_text"], {"prompt_embedding": self.clip.encode_text([prompt])[0]})
        if "text" in keys:
            self._keep("text", keys["text"], {"text": self.model.cond_stage_model([prompt])[0]})

    def _keep(self, kind: str, key: bytes, features: Mapping[str, Tensor]) -> None:
        """Have features written with others of their kind."""
        kept = {name: value.cpu() if name == "mask" else narrow(value) for name, value in features.items()}
        self._computed.setdefault(kind, {})[key] = kept
        self._bytes += sum(value.nbytes for value in kept.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self._write()

    def _write(self) -> None:
        computed, self._computed, self._bytes = self._computed, {}, 0
        for kind, rows in computed.items():
            self.store.write(kind, rows)
        self._since = time.monotonic()


@torch.no_grad()
def compute_features(
    model: MedSoftModel,
    clip: ImageTextEncoder,
    image: Tensor,
    mask: Tensor,
    kinds: Collection[str] = ("clip", "latents"),
    whole: tuple[Tensor, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """By kind, what the frozen encoders say about images (B, 3, S, S) with soft masks (B, 1, S, S).

    Latents only if the model has an autoencoder. ``whole``: the whole images and their masks, for an architecture that
    ``sees_whole``.
    """
    found = {}
    if "clip" in kinds:
        context, context_global = model.context_features(clip, image, mask, whole)
        target, target_global = clip.encode_image(image)
        if model.architecture.biomedclip.view == "image":
            assert whole is not None
            target_global = clip.encode_image(whole[0])[1]
        contexts = {"context_tokens": context, "context_global": context_global, "mask": mask}
        found["clip"] = {**contexts, "target_tokens": target, "target_global": target_global}
    if "latents" in kinds and "autoencoder" in model.parts:
        posterior = model.encode(image)
        masked = model.surroundings(lambda seen: model.scaled(model.encode(seen).mean), image, mask, whole)
        found["latents"] = {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar, "masked_latent": masked}
    return found


def _weights_fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
