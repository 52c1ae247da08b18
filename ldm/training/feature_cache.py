"""Frozen features computed once and kept on disk: latents and BiomedCLIP tokens of every training item, text of every
prompt.

One file per item (or prompt) and kind of feature, named by the content of the sample's files, the preparation, and the
encoder's weights; so stages, runs and processes share them, and nothing stale is ever read. Each file appears whole,
holds a checksum of its tensors, and is memory-mapped when it is read. One process computes at a time; others wait for
it and find the work done.
"""

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ldm.config import Config
from ldm.core.errors import MedSoftError
from ldm.core.files import atomic_file, fingerprint, remove_partials, sha256_file
from ldm.core.locks import exclusive
from ldm.core.schema import identity
from ldm.data.preparation import prepare
from ldm.data.samples import Reject
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel, hidden_region, hide
from ldm.training.dataset import Item

log = logging.getLogger(__name__)

MASK_SEED = 0  # the fixed lesion-shaped masks of healthy training items are the same in every stage and run
FORMAT = 2  # raise when what is stored changes its meaning
ITEM_KINDS, PROMPT_KINDS = ("clip", "latents"), ("clip_text", "text")


class FeatureCache:
    """Features of Items: ``mask`` (1, S, S) always; with an autoencoder ``latent_mean``, ``latent_logvar`` and
    ``masked_latent`` (4, s, s; unscaled moments, scaled masked mode); with BiomedCLIP ``seen``, ``true`` (N, D),
    ``seen_global``, ``true_global`` (D,) and ``clip_text`` (D_t,); with a text encoder ``text`` (77, D_text).

    The networks are needed to build, not to load: ``forget_networks`` sets them free.
    """

    def __init__(self, folder: str | Path, config: Config, model: MedSoftModel, clip: ImageTextEncoder) -> None:
        self.folder, self.config = Path(folder), config
        self.model: MedSoftModel | None = model
        self.clip: ImageTextEncoder | None = clip
        self.kinds = {"clip": clip.fingerprint, "clip_text": clip.fingerprint}
        if "autoencoder" in model.parts:
            self.kinds["latents"] = _weights_fingerprint(model.first_stage_model)
        if "text" in model.parts:
            self.kinds["text"] = _weights_fingerprint(model.cond_stage_model)
        self._hashes: dict[Path, str] = {}
        self._names: dict[tuple[str, str], Path] = {}

    # ------------------------------------------------------------------------------------------------ building

    def build(self, items: Sequence[Item], batch_size: int = 16, thorough: bool = True) -> list[Reject]:
        """Compute what is missing or damaged, with a progress bar; items that cannot be read are returned as rejects.

        ``thorough`` verifies the checksums of what is there; without it only the files' structure is looked at.
        """
        known, rejects = self._readable(items)
        if not self._missing(known, thorough) and not self._missing_prompts(known, thorough):
            return rejects
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f"another run is computing features in {self.folder}; waiting for it"
        with exclusive(self.folder / ".lock", busy, wait=True):
            for folder in self.folder.iterdir():
                if folder.is_dir():
                    remove_partials(folder)
            missing = self._missing(known, thorough)  # what the run before us has computed is not missing any more
            for batch in _batches(missing, batch_size, "features", "item"):
                rejects += self._compute(batch)
            prompts = self._missing_prompts(known, thorough)
            for batch in _batches(prompts, batch_size, "prompts", "prompt"):
                self._compute_prompts(batch)
        return rejects

    def forget_networks(self) -> None:
        """Give up the encoders: what ``load`` needs is on the disk."""
        self.model = self.clip = None

    def _readable(self, items: Sequence[Item]) -> tuple[list[Item], list[Reject]]:
        """The items whose files can be read and named by their content, and the others."""
        known, rejects = [], []
        paths = {path for item in items for path in _files(item) if path}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, digest in zip(paths, pool.map(_hash, paths), strict=True):
                if digest is not None:
                    self._hashes[path] = digest
        for item in items:
            try:
                for kind in self._item_kinds():
                    self._file(item, kind)
                known.append(item)
            except MedSoftError as error:
                rejects.append(Reject(item.sample.sample_id, item.sample.image, error.cause(item.sample.image)))
        return known, rejects

    def _item_kinds(self) -> list[str]:
        return [kind for kind in ITEM_KINDS if kind in self.kinds]

    def _prompt_kinds(self) -> list[str]:
        return [kind for kind in PROMPT_KINDS if kind in self.kinds]

    def _missing(self, items: Sequence[Item], thorough: bool) -> list[Item]:
        files = [[self._file(item, kind) for kind in self._item_kinds()] for item in items]
        sound = _sound({file for row in files for file in row}, thorough)
        return [item for item, row in zip(items, files, strict=True) if not sound.issuperset(row)]

    def _missing_prompts(self, items: Sequence[Item], thorough: bool) -> list[str]:
        prompts = sorted({item.sample.prompt for item in items} | {""})  # the empty one stands for a dropped condition
        files = {prompt: [self._prompt_file(prompt, kind) for kind in self._prompt_kinds()] for prompt in prompts}
        sound = _sound({file for row in files.values() for file in row}, thorough)
        return [prompt for prompt, row in files.items() if not sound.issuperset(row)]

    def _compute(self, items: Sequence[Item]) -> list[Reject]:
        ready, rejects = [], []
        for item in items:
            try:
                ready.append((item, prepare(item.sample, self.config.data, MASK_SEED, item.variant, training=True)))
            except MedSoftError as error:
                rejects.append(Reject(item.sample.sample_id, item.sample.image, error.cause(item.sample.image)))
        if not ready:
            return rejects
        device = self.clip.device
        image = torch.stack([picture.image for _, picture in ready]).to(device)
        mask = torch.stack([picture.mask for _, picture in ready]).to(device)
        made = compute_features(self.model, self.clip, image, mask)
        for kind in self._item_kinds():
            for number, (item, _) in enumerate(ready):
                self._write(self._file(item, kind), {name: value[number] for name, value in made[kind].items()})
        return rejects

    @torch.no_grad()
    def _compute_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:  # one at a time: how a prompt is padded must not depend on its neighbours
            self._write(self._prompt_file(prompt, "clip_text"), {"clip_text": self.clip.encode_text([prompt])[0]})
            if "text" in self.kinds:
                self._write(self._prompt_file(prompt, "text"), {"text": self.model.cond_stage_model([prompt])[0]})

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        plain = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
        if "mask" in plain:
            levels = (plain["mask"] * 255).round()
            if torch.equal(levels / 255, plain["mask"]):  # masks are quantised: a quarter of the bytes hold them
                plain["mask"] = levels.to(torch.uint8)
        with atomic_file(path) as handle:
            handle.write(save(plain, metadata={"crc32": str(_checksum(plain))}))

    # ------------------------------------------------------------------------------------------------ loading

    def load(self, item: Item) -> dict[str, Tensor]:
        """The item's features and its prompt's, float32 on the CPU, memory-mapped."""
        files = [self._file(item, kind) for kind in self._item_kinds()]
        files += [self._prompt_file(item.sample.prompt, kind) for kind in self._prompt_kinds()]
        found: dict[str, Tensor] = {}
        for file in files:
            try:
                found.update(_read(file))
            except (SafetensorError, OSError) as error:
                raise MedSoftError(
                    f"{file}: the cached features of {item.sample.sample_id} are gone or damaged ({error}); run the "
                    "same command again: it computes them anew and goes on"
                ) from error
        if found["mask"].dtype == torch.uint8:
            found["mask"] = found["mask"].float() / 255
        return found

    def empty_text(self) -> Tensor | None:
        """Text states of the empty prompt, (1, 77, D_text), without a text encoder None."""
        return _read(self._prompt_file("", "text"))["text"][None].clone() if "text" in self.kinds else None

    # ------------------------------------------------------------------------------------------------ names

    def _file(self, item: Item, kind: str) -> Path:
        # Two folders may both have a sample of this name.
        return self._place(f"{item.sample.image} {item.name}", kind, lambda: self._key(item, kind))

    def _prompt_file(self, prompt: str, kind: str) -> Path:
        return self._place(prompt, kind, lambda: fingerprint([FORMAT, "prompt", prompt, kind, self.kinds[kind]]))

    def _place(self, name: str, kind: str, key: Callable[[], str]) -> Path:
        if (name, kind) not in self._names:
            digest = key()
            self._names[name, kind] = self.folder / digest[:2] / f"{digest}.{kind}.safetensors"
        return self._names[name, kind]

    def _key(self, item: Item, kind: str) -> str:
        sample = item.sample
        content = [self._content(path) if path else None for path in _files(item)]
        # The sample's name decides masks and shifted crops, its prompt only which of the two it gets.
        name = (sample.sample_id, sample.healthy) if sample.healthy or item.variant else None
        extra = {key: sample.meta.get(key) for key in ("window", "spacing_mm")}
        data = identity(self.config.data, "features")
        return fingerprint([FORMAT, content, name, item.variant, list(sample.box), extra, data, kind, self.kinds[kind]])

    def _content(self, path: Path) -> str:
        if path not in self._hashes:
            try:
                self._hashes[path] = sha256_file(path)
            except OSError as error:
                raise MedSoftError(f"{path}: could not be read ({error.strerror or error})") from error
        return self._hashes[path]


def cache_size(config: Config, items: Iterable[Item]) -> int:
    """Bytes that the items' features take on the disk, estimated from the configuration."""
    data, tokens = config.data, 2 * (config.biomedclip.grid**2 + 1) * config.biomedclip.token_dim
    latent = 12 * config.autoencoder.latent_channels * config.latent_size**2
    an_item, a_prompt = 4 * tokens + data.image_size**2, 4 * config.biomedclip.text_dim
    if "autoencoder" in config.training.builds:
        an_item += latent + data.image_size**2
    if "text" in config.training.builds:
        a_prompt += 4 * config.text_encoder.max_length * config.text_encoder.width
    items = list(items)
    return an_item * len(items) + a_prompt * len({item.sample.prompt for item in items})


@torch.no_grad()
def compute_features(
    model: MedSoftModel, clip: ImageTextEncoder, image: Tensor, mask: Tensor
) -> dict[str, dict[str, Tensor]]:
    """By kind, what the frozen encoders say about images (B, 3, S, S) with soft masks (B, 1, S, S)."""
    seen, seen_global = clip.encode_image(image, hidden_region(mask))
    true, true_global = clip.encode_image(image)
    tokens = {"seen": seen, "seen_global": seen_global, "true": true, "true_global": true_global}
    found = {"clip": {**tokens, "mask": mask}}
    if "autoencoder" in model.parts:
        posterior = model.encode(image)
        masked = model.scaled(model.encode(hide(image, mask)).mode)
        moments = {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar}
        found["latents"] = {**moments, "masked_latent": masked, "mask": mask}
    return found


def _files(item: Item) -> list[Path | None]:
    return [item.sample.image, item.sample.mask, item.sample.soft_mask, item.sample.anatomy]


def _hash(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None  # said where it is used


def _batches(things: Sequence, size: int, what: str, unit: str) -> Iterator[Sequence]:
    with tqdm(total=len(things), desc=what, unit=unit, disable=not things, mininterval=1) as bar:
        for first in range(0, len(things), size):
            batch = things[first : first + size]
            yield batch
            bar.update(len(batch))


def _sound(files: set[Path], thorough: bool) -> set[Path]:
    """Those of ``files`` that are whole, looked at by several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {
            file for file, whole in zip(files, pool.map(lambda f: _whole(f, thorough), files), strict=True) if whole
        }


def _whole(file: Path, thorough: bool) -> bool:
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as handle:  # refuses a file whose length does not fit its header
            stored = (handle.metadata() or {}).get("crc32")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()} if thorough else {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return False
    if thorough and stored != str(_checksum(tensors)):
        log.warning("%s: damaged features; they are computed again", file)
        return False
    return True


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dictionary)


def _checksum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy(), zlib.crc32(name.encode(), total))
    return total


def _weights_fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
