"""What the phantom base learns from: crops of healthy and diseased spines, generic images, image-prompt pairs."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.core.files import named_seed
from ldm.data.crop import Fit
from ldm.data.images import to_unit
from ldm.data.masks import TARGET_LABEL, Feather, Mask, lesion_shaped, soft_mask_for
from ldm.phantom.shapes import generic_image, texture
from ldm.phantom.spines import BASE_WORLD, biomedclip_pairs, render_phantom
from ldm.phantom.worlds import world_of


def healthy_crops(config: DataConfig, count: int, masks: int) -> tuple[Tensor, Tensor]:
    """Crops (count * masks, 1, S, S) in [0, 1] around lesion-shaped masks in healthy spines, and the soft masks."""
    pairs = []
    for index in tqdm(range(count), desc="healthy spines", leave=False):
        phantom = render_phantom(BASE_WORLD, index, None)
        for k in range(masks):
            hard = lesion_shaped(phantom.anatomy == TARGET_LABEL, named_seed("base", index, k))
            pairs.append(_crop(config, phantom.image, hard))
    return _stacked([crop for crop, _ in pairs]), _stacked([soft for _, soft in pairs])


def generic_images(config: DataConfig, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Generic images (count, 1, S, S) in [0, 1], soft masks around their shapes, prompts."""
    images, softs, prompts = [], [], []
    for index in tqdm(range(count), desc="generic images", leave=False):
        image, mask, prompt = generic_image(np.random.default_rng(named_seed("generic", index)))
        images.append(image)
        softs.append(_soft(config, mask))
        prompts.append(prompt)
    return _stacked(images), _stacked(softs), prompts


def textures(count: int) -> Tensor:
    """Images of one texture each (count, 1, S, S) in [0, 1]."""
    return _stacked([texture(np.random.default_rng(named_seed("texture", index))) for index in range(count)])


def clip_pairs(config: DataConfig, count: int, world: str) -> tuple[Tensor, list[str]]:
    """Crops (count, 1, S, S) in [0, 1] and their prompts: one third healthy, the rest of every type and severity."""
    crops, prompts, pairs = [], [], list(biomedclip_pairs(count, world_of(world).lesion_types))
    for seed, index, lesion_type, severity in tqdm(pairs, desc="image-prompt pairs", leave=False):
        phantom = render_phantom(seed, index, lesion_type, severity, world=world)
        hard = phantom.mask
        if phantom.healthy:
            hard = lesion_shaped(phantom.anatomy == TARGET_LABEL, named_seed("pairs", index))
        crops.append(_crop(config, phantom.image, hard)[0])
        prompts.append(phantom.prompt)
    return _stacked(crops), prompts


def _crop(config: DataConfig, image: np.ndarray, hard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The crop that the model would see around this hard mask (HxW), and the soft mask in it."""
    soft = _soft(config, hard)
    window = Fit.of(config).crop_window(image.shape, soft)
    return window.forward(to_unit(image)), window.forward_mask(soft)


def _soft(config: DataConfig, hard: np.ndarray) -> np.ndarray:
    return soft_mask_for(Mask(hard.astype(np.float32)), Feather(config.feather, config.feather_unit))


def _stacked(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images))[:, None]
