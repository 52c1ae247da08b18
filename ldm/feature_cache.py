"""Frozen features computed once and kept on disk: latents and BiomedCLIP tokens of every training item.

One file per item and kind of feature, named by the content of the sample's files, the preparation, and the encoder's
weights; so stages, runs and processes share them, and nothing stale is ever read. Two processes that compute the same
feature write the same bytes; each file appears whole.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.annotations import Reject
from ldm.config import ITEM_COUNTS, Config
from ldm.dataset import Item, prepare
from ldm.encoders import BiomedClip
from ldm.errors import MedSoftError
from ldm.files import atomic_file, fingerprint, sha256_file
from ldm.model import MedSoftModel, hidden_region, hide

log = logging.getLogger(__name__)

MASK_SEED = 0  # the fixed lesion-shaped masks of healthy training items are the same in every stage and run
FORMAT = 1  # raise when what is stored changes its meaning


class FeatureCache:
    """Features of Items: ``mask`` (1, S, S) always; with an autoencoder ``latent_mean``, ``latent_logvar`` and
    ``masked_latent`` (4, s, s; unscaled moments, scaled masked mode); with BiomedCLIP ``seen``, ``true`` (N, D) and
    ``seen_global``, ``true_global`` (D,)."""

    def __init__(self, folder: str | Path, config: Config, model: MedSoftModel, clip: BiomedClip) -> None:
        self.folder, self.config, self.model, self.clip = Path(folder), config, model, clip
        self.kinds = {"clip": clip.fingerprint}
        if "autoencoder" in model.parts:
            self.kinds["latents"] = _weights_fingerprint(model.first_stage_model)
        self._hashes: dict[Path, str] = {}
        self._keys: dict[str, str] = {}

    def build(self, items: Sequence[Item], batch_size: int = 16) -> list[Reject]:
        """Compute what is missing, with a progress bar. Items that cannot be read are returned as rejects."""
        missing, rejects = [], []
        for item in items:
            try:
                if not all(self._file(item, kind).is_file() for kind in self.kinds):
                    missing.append(item)
            except MedSoftError as error:
                rejects.append(Reject(item.sample.sample_id, str(item.sample.image), str(error)))
        bar = tqdm(total=len(missing), desc="features", unit="item", disable=not missing, mininterval=1)
        with bar:
            for first in range(0, len(missing), batch_size):
                rejects += self._compute(missing[first : first + batch_size])
                bar.update(len(missing[first : first + batch_size]))
        return rejects

    def load(self, item: Item) -> dict[str, Tensor]:
        """The item's features, float32 on the CPU."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found: dict[str, Tensor] = {}
        for kind in self.kinds:
            file = self._file(item, kind)
            try:
                found.update(load_file(file))
            except (SafetensorError, OSError) as error:
                raise MedSoftError(
                    f"{file}: damaged features of {item.sample.sample_id} ({error}); delete this file and run again"
                ) from error
        return found

    def _compute(self, items: Sequence[Item]) -> list[Reject]:
        ready, rejects = [], []
        for item in items:
            try:
                ready.append((item, prepare(item.sample, self.config.data, MASK_SEED, item.variant, training=True)))
            except MedSoftError as error:
                rejects.append(Reject(item.sample.sample_id, str(item.sample.image), str(error)))
        if not ready:
            return rejects
        device = self.clip.image_mean.device
        image = torch.stack([picture.image for _, picture in ready]).to(device)
        mask = torch.stack([picture.mask for _, picture in ready]).to(device)
        for kind in self.kinds:
            made = self._latents(image, mask) if kind == "latents" else self._tokens(image, mask)
            made["mask"] = mask
            for number, (item, _) in enumerate(ready):
                self._write(self._file(item, kind), {name: value[number] for name, value in made.items()})
        return rejects

    @torch.no_grad()
    def _latents(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        posterior = self.model.encode(image)
        masked = self.model.scaled(self.model.encode(hide(image, mask)).mode)
        return {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar, "masked_latent": masked}

    def _tokens(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        true, true_global = self.clip.encode_image(image)
        seen, seen_global = self.clip.encode_image(image, hidden_region(mask))
        return {"true": true, "true_global": true_global, "seen": seen, "seen_global": seen_global}

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        with atomic_file(path) as handle:
            handle.write(save({name: value.float().cpu().contiguous() for name, value in tensors.items()}))

    def _file(self, item: Item, kind: str) -> Path:
        name = f"{kind} {item.sample.image} {item.name}"  # two folders may both have a sample of this name
        if name not in self._keys:
            self._keys[name] = self._key(item, kind)
        key = self._keys[name]
        return self.folder / key[:2] / f"{key}.{kind}.safetensors"

    def _key(self, item: Item, kind: str) -> str:
        sample = item.sample
        files = [sample.image, sample.mask, sample.soft_mask, sample.anatomy]
        content = [self._hash(path) if path else None for path in files]
        # The sample's name decides masks and shifted crops; its prompt only decides whether it is healthy.
        name = sample.sample_id if sample.healthy or item.variant else None
        extra = {key: sample.meta.get(key) for key in ("window", "spacing_mm")}
        data = {key: value for key, value in asdict(self.config.data).items() if key not in ITEM_COUNTS}
        return fingerprint([FORMAT, content, name, item.variant, list(sample.box), extra, data, kind, self.kinds[kind]])

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            try:
                self._hashes[path] = sha256_file(path)
            except OSError as error:
                raise MedSoftError(f"{path}: could not be read ({error.strerror or error})") from error
        return self._hashes[path]


def _weights_fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
