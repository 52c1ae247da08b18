"""What features will take before they are computed: memory while they are, and disk."""

from collections.abc import Collection, Iterable

from ldm.config import Architecture
from ldm.features.names import Item
from ldm.networks.model import skeleton

ENCODERS = ("autoencoder", "text")  # the parts of a model that make features, beside the image-text encoder
MAPS = 7  # of the first width at full size, which the autoencoder's encoder holds at once (measured: docs/memory.md)
TOWER_LAYERS, VOCABULARY = 12, 30_522  # of BiomedCLIP's two towers, and of BERT's words


def encoder_memory(sizes: Architecture, parts: Collection[str]) -> int:
    """Bytes of the networks that make the features of a stage with these ``parts``, in float32."""
    width = sizes.biomedclip.token_dim
    towers = 2 * TOWER_LAYERS * 12 * width**2 + VOCABULARY * width
    made = skeleton(sizes, [part for part in ENCODERS if part in parts])
    return 4 * (towers + sum(value.numel() for value in made.values()))


def image_memory(sizes: Architecture, parts: Collection[str]) -> int:
    """Bytes that computing the features of one item holds at once; an estimate."""
    channels = sizes.autoencoder.channels if "autoencoder" in parts else 3
    return 4 * MAPS * channels * sizes.image_size**2


def cache_size(sizes: Architecture, parts: Collection[str], items: Iterable[Item]) -> int:
    """Bytes that the items' features, as a stage with these ``parts`` needs them, take on the disk, at most."""
    clip, text = sizes.biomedclip, sizes.text_encoder
    an_item = 4 * (clip.grid**2 + 1) * clip.token_dim + sizes.image_size**2  # masks are smaller: only their lesion
    a_prompt = 2 * clip.text_dim
    if "autoencoder" in parts:
        latents = 4 if sizes.unet.thumbnail else 3
        an_item += 2 * latents * sizes.autoencoder.latent_channels * sizes.latent_size**2
    if "text" in parts:
        a_prompt += 2 * text.max_length * text.width
    items = list(items)
    return an_item * len(items) + a_prompt * len({item.sample.prompt for item in items})
