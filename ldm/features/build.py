"""Frozen features computed once and kept on disk: latents and BiomedCLIP tokens of every training item, text of every
prompt.

Files are named by content (see FeatureNames), so stages, runs and processes share them, and nothing stale is ever read.
One process computes at a time; others wait for it and find the work done.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import Architecture, DataConfig
from ldm.core.errors import MedSoftError
from ldm.core.files import remove_partials
from ldm.core.locks import exclusive
from ldm.data.preparation import prepare
from ldm.data.samples import Reject
from ldm.features.names import Item
from ldm.features.store import FeatureStore, sound_files, write_features
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel, hidden_region, hide

MASK_SEED = 0  # the fixed lesion-shaped masks of healthy training items are the same in every stage and run
BATCH = 16


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
    ) -> None:
        """``digests``: SHA-256 of every file of the items (see ``ldm.data.preparation.digests_of``)."""
        self.data, self.model, self.clip = data, model, clip
        encoders = {"clip": clip.fingerprint, "clip_text": clip.fingerprint}
        if "autoencoder" in model.parts:
            encoders["latents"] = _weights_fingerprint(model.first_stage_model)
        if "text" in model.parts:
            encoders["text"] = _weights_fingerprint(model.cond_stage_model)
        self.store = FeatureStore(folder, data, encoders, digests)

    def build(self, items: Sequence[Item], thorough: bool = True) -> list[Reject]:
        """Compute what is missing or damaged, with a progress bar; items that cannot be prepared are returned.

        ``thorough`` verifies the checksums of what is there; without it only the files' structure is looked at.
        """
        if not any(self._missing(items, thorough)):
            return []
        rejects = []
        folder = self.store.folder
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".lock", f"another run is computing features in {folder}; waiting for it", wait=True):
            for part in folder.iterdir():
                if part.is_dir():
                    remove_partials(part)
            missing, prompts = self._missing(items, thorough)  # no more what the run before us has computed
            batches = [missing[first : first + BATCH] for first in range(0, len(missing), BATCH)]
            for batch in tqdm(batches, "features", unit="batch", disable=not batches, mininterval=1):
                rejects += self.compute(batch)
            for prompt in tqdm(prompts, "prompts", unit="prompt", disable=not prompts, mininterval=1):
                self.compute_prompt(prompt)
        return rejects

    def _missing(self, items: Sequence[Item], thorough: bool) -> tuple[list[Item], list[str]]:
        """The items and the prompts without whole files of all their features."""
        prompts = sorted({item.sample.prompt for item in items} | {""})  # the empty one: guidance without a condition
        of_items = [(item, self.store.of_item(item).values()) for item in items]
        of_prompts = [(prompt, self.store.of_prompt(prompt).values()) for prompt in prompts]
        sound = sound_files({file for _, files in [*of_items, *of_prompts] for file in files}, thorough)
        missing = [item for item, files in of_items if not sound.issuperset(files)]
        return missing, [prompt for prompt, files in of_prompts if not sound.issuperset(files)]

    def compute(self, items: Sequence[Item]) -> list[Reject]:
        """Write the features of ``items``; those that cannot be prepared are returned."""
        ready, rejects = [], []
        for item in items:
            try:
                ready.append((item, prepare(item.sample, self.data, MASK_SEED, item.variant, training=True)))
            except MedSoftError as error:
                rejects.append(Reject(item.sample.sample_id, item.sample.image, error.cause(item.sample.image)))
        if not ready:
            return rejects
        device = self.clip.device
        image = torch.stack([prepared.image for _, prepared in ready]).to(device)
        mask = torch.stack([prepared.mask for _, prepared in ready]).to(device)
        made = compute_features(self.model, self.clip, image, mask)
        for number, (item, _) in enumerate(ready):
            for kind, file in self.store.of_item(item).items():
                write_features(file, {name: value[number] for name, value in made[kind].items()})
        return rejects

    @torch.no_grad()
    def compute_prompt(self, prompt: str) -> None:
        """Write the features of ``prompt``, by itself: how it is padded must not depend on others."""
        files = self.store.of_prompt(prompt)
        write_features(files["clip_text"], {"prompt_embedding": self.clip.encode_text([prompt])[0]})
        if "text" in files:
            write_features(files["text"], {"text": self.model.cond_stage_model([prompt])[0]})


@torch.no_grad()
def compute_features(
    model: MedSoftModel, clip: ImageTextEncoder, image: Tensor, mask: Tensor
) -> dict[str, dict[str, Tensor]]:
    """By kind, what the frozen encoders say about images (B, 3, S, S) with soft masks (B, 1, S, S)."""
    context, context_global = clip.encode_image(image, hidden_region(mask))
    target, target_global = clip.encode_image(image)
    contexts = {"context_tokens": context, "context_global": context_global, "mask": mask}
    found = {"clip": {**contexts, "target_tokens": target, "target_global": target_global}}
    if "autoencoder" in model.parts:
        posterior = model.encode(image)
        masked = model.scaled(model.encode(hide(image, mask)).mean)
        moments = {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar}
        found["latents"] = {**moments, "masked_latent": masked, "mask": mask}
    return found


def cache_size(sizes: Architecture, parts: Sequence[str], items: Iterable[Item]) -> int:
    """Bytes that the items' features, as a stage with these ``parts`` needs them, take on the disk; an estimate."""
    clip, text = sizes.biomedclip, sizes.text_encoder
    an_item = 8 * (clip.grid**2 + 1) * clip.token_dim + sizes.image_size**2
    a_prompt = 4 * clip.text_dim
    if "autoencoder" in parts:
        an_item += 12 * sizes.autoencoder.latent_channels * sizes.latent_size**2 + sizes.image_size**2
    if "text" in parts:
        a_prompt += 4 * text.max_length * text.width
    items = list(items)
    return an_item * len(items) + a_prompt * len({item.sample.prompt for item in items})


def _weights_fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
