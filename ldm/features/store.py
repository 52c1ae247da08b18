"""Files of features: written whole, with a checksum of their tensors, and memory-mapped when they are read."""

import logging
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.core.errors import MedSoftError
from ldm.core.files import atomic_file
from ldm.core.threads import thread_pool
from ldm.features.names import FeatureNames, Item

log = logging.getLogger(__name__)

# Feature -> its name in the files, where that is another one.
STORED = {
    "context_tokens": "seen",
    "context_global": "seen_global",
    "target_tokens": "true",
    "target_global": "true_global",
    "prompt_embedding": "clip_text",
}
FEATURES = {stored: name for name, stored in STORED.items()}


class FeatureStore(FeatureNames):
    """Features of Items: of each the entries of ``ldm.training.dataset.Batch`` down to ``masked_latent``, as far as
    there are encoders for them; float32 on the CPU."""

    def load(self, item: Item) -> dict[str, Tensor]:
        """The item's features and its prompt's, memory-mapped."""
        found: dict[str, Tensor] = {}
        for file in (*self.of_item(item).values(), *self.of_prompt(item.sample.prompt).values()):
            try:
                found.update(read_features(file))
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
        file = self.of_prompt("").get("text")
        return read_features(file)["text"][None].clone() if file else None


def read_features(file: Path) -> dict[str, Tensor]:
    """The features in a file; SafetensorError or OSError for one that is damaged or gone."""
    with safe_open(file, framework="pt") as handle:
        return {FEATURES.get(name, name): handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def write_features(path: Path, features: dict[str, Tensor]) -> None:
    """Write features of one item or prompt atomically, on whatever device they lie."""
    plain = {STORED.get(name, name): value.float().cpu().contiguous() for name, value in features.items()}
    if "mask" in plain:
        levels = (plain["mask"] * 255).round()
        if torch.equal(levels / 255, plain["mask"]):  # masks are quantised: a quarter of the bytes hold them
            plain["mask"] = levels.to(torch.uint8)
    with atomic_file(path) as handle:
        handle.write(save(plain, metadata={"crc32": str(_checksum(plain))}))


def sound_files(files: set[Path], thorough: bool) -> set[Path]:
    """Those of ``files`` that are whole, looked at by several threads; ``thorough`` verifies their checksums."""
    with thread_pool() as pool:
        whole = pool.map(lambda file: _whole(file, thorough), files)
        return {file for file, sound in zip(files, whole, strict=True) if sound}


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


def _checksum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy(), zlib.crc32(name.encode(), total))
    return total
