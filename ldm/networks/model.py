"""The networks put together. The one place that knows latent scale, channel order and mask polarity.

Masks are soft, float in [0, 1], 1 = lesion region = to be inpainted. Images are (B, 3, S, S) in [-1, 1].
"""

from collections.abc import Callable, Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import PREFIXES
from ldm.config import Architecture
from ldm.diffusion.schedule import NoiseSchedule
from ldm.networks.attention import Conditioning
from ldm.networks.autoencoder import Autoencoder, Posterior
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.msc import MedicalSemanticController, patch_mask, semantic_tokens
from ldm.networks.text_encoder import TextEncoder
from ldm.networks.unet import UNet


def hidden_region(soft_mask: Tensor) -> Tensor:
    """The hard lesion region, mask >= 0.5, as a boolean tensor of the mask's shape: what no network may see."""
    return soft_mask >= 0.5


def hide(image: Tensor, soft_mask: Tensor) -> Tensor:
    """The image (B, 3, S, S) with the lesion region replaced by mid-grey, 0 in [-1, 1] (SD's training convention)."""
    return image * (~hidden_region(soft_mask))


class MedSoftModel(nn.Module):
    """The parts a stage builds, under the names they have in a checkpoint.

    ``parts`` is any of unet, autoencoder, text and msc; the others do not exist. BiomedCLIP stays outside: it is
    frozen, never stored, and its features come in as tensors.
    """

    def __init__(self, architecture: Architecture, parts: Collection[str] = PREFIXES) -> None:
        super().__init__()
        self.architecture = architecture
        self.parts = [part for part in PREFIXES if part in parts]
        self.schedule = NoiseSchedule(architecture.diffusion)
        if "unet" in self.parts:
            self.model = nn.ModuleDict({"diffusion_model": UNet(architecture.unet, architecture.pooled_tokens)})
        if "autoencoder" in self.parts:
            self.first_stage_model = Autoencoder(architecture.autoencoder)
        if "text" in self.parts:
            self.cond_stage_model = TextEncoder(architecture.text_encoder)
        if "msc" in self.parts:
            self.msc = MedicalSemanticController(architecture.msc, architecture.biomedclip)

    def drop(self, parts: Collection[str]) -> None:
        """Give up parts that are not needed any more, and their memory."""
        for part in parts:
            if part in self.parts:
                delattr(self, PREFIXES[part].partition(".")[0])
                self.parts.remove(part)

    @property
    def unet(self) -> UNet:
        """The U-Net, whose place in the model the checkpoint's names dictate."""
        return cast(UNet, self.model["diffusion_model"])

    def encode(self, image: Tensor) -> Posterior:
        """Posterior of the unscaled latent, (B, 4, s, s)."""
        return self.first_stage_model.encode(image)

    def scaled(self, latent: Tensor) -> Tensor:
        """Unscaled latent -> what the U-Net works on (times 0.18215)."""
        return latent * self.architecture.diffusion.latent_scale

    def decode(self, scaled_latent: Tensor) -> Tensor:
        """Scaled latent (B, 4, s, s) -> image (B, 3, S, S), clamped to [-1, 1]."""
        return self.first_stage_model.decode(scaled_latent / self.architecture.diffusion.latent_scale).clamp(-1, 1)

    def latent_mask(self, soft_mask: Tensor) -> Tensor:
        """Soft mask (B, 1, S, S) at latent size (B, 1, s, s), by maximum."""
        return F.adaptive_max_pool2d(soft_mask, self.architecture.latent_size)

    def patch_mask(self, soft_mask: Tensor) -> Tensor:
        """Soft mask (B, 1, S, S) -> soft patch values (B, N) on BiomedCLIP's grid, by maximum."""
        return patch_mask(soft_mask, self.architecture.biomedclip.grid)

    def semantic(self, context_tokens: Tensor, lesion_tokens: Tensor, soft_mask: Tensor) -> Tensor:
        """Tokens for the third attention (B, N / 4, D) from those around and inside the lesion (B, N, D).

        With ``unet.third_attention: table`` they are the U-Net's own, the same for every image.
        """
        if self.architecture.unet.third_attention == "table":
            return self.unet.attn3_table.expand(len(context_tokens), -1, -1)
        return semantic_tokens(context_tokens, lesion_tokens, self.patch_mask(soft_mask))

    def context_features(
        self, encoder: ImageTextEncoder, image: Tensor, soft_mask: Tensor, whole: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, N, D) and global token (B, D) of crops (B, 3, S, S) whose lesion is hidden.

        ``whole``: the whole images and their masks (see ``Architecture.sees_whole``), of which the global token is with
        ``biomedclip.view: image``. The patch tokens stay the crop's: the mask, the U-Net's third attention and the true
        tokens lie on that grid.
        """
        tokens, global_token = encoder.encode_image(image, hidden_region(soft_mask))
        if self.architecture.biomedclip.view == "image":
            assert whole is not None
            global_token = encoder.encode_image(whole[0], hidden_region(whole[1]))[1]
        return tokens, global_token

    def surroundings(
        self, encode: Callable[[Tensor], Tensor], image: Tensor, soft_mask: Tensor, whole: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """What the U-Net sees of an image (B, 3, S, S) whose lesion is hidden: its scaled latent (B, 4, s, s).

        ``encode``: from images to scaled latents. With ``unet.thumbnail`` the latent of the ``whole`` images, their
        lesions hidden too, comes after it: (B, 8, s, s).
        """
        seen = encode(hide(image, soft_mask))
        if self.architecture.unet.thumbnail:
            assert whole is not None
            seen = torch.cat([seen, encode(hide(*whole))], dim=1)
        return seen

    def predict_noise(
        self, noisy: Tensor, t: Tensor, mask: Tensor, masked_latent: Tensor, text: Tensor, semantic: Tensor | None
    ) -> Tensor:
        """The U-Net on [noisy latent, mask, masked-image latent]: (B, 4, s, s).

        noisy: scaled, (B, 4, s, s); masked_latent: of ``surroundings``; mask: (B, 1, s, s); text (B, 77, D); semantic
        (B, M, D) or None.
        """
        return self.denoise(noisy, t, mask, masked_latent, self.conditioning(mask, text, semantic))

    def conditioning(self, mask: Tensor, text: Tensor, semantic: Tensor | None) -> Conditioning:
        """What steers the U-Net, with the mask (B, 1, s, s) as the gate of the third attention unless switched off."""
        return Conditioning(text, semantic, mask if self.architecture.unet.soft_mask_attention else None)

    def denoise(self, noisy: Tensor, t: Tensor, mask: Tensor, masked_latent: Tensor, cond: Conditioning) -> Tensor:
        """``predict_noise`` with a conditioning made before: (B, 4, s, s), or k rows an image (see ``UNet``)."""
        return self.unet(self._unet_input(noisy, mask, masked_latent), t, cond)

    def noise_and_middle(
        self, noisy: Tensor, t: Tensor, mask: Tensor, masked_latent: Tensor, text: Tensor, semantic: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``predict_noise``, and the features (B, C, h, w) that leave the U-Net's middle block."""
        cond = self.conditioning(mask, text, semantic)
        return self.unet(self._unet_input(noisy, mask, masked_latent), t, cond, with_middle=True)

    def _unet_input(self, noisy: Tensor, mask: Tensor, masked_latent: Tensor) -> Tensor:
        """(B, 9, s, s), its channels in the order of Stable Diffusion inpainting; with a thumbnail (B, 13, s, s)."""
        channel = mask if self.architecture.unet.soft_mask_channel else hidden_region(mask).to(mask.dtype)
        return torch.cat([noisy, channel, masked_latent], dim=1)


def skeleton(architecture: Architecture, parts: Collection[str] = PREFIXES) -> dict[str, Tensor]:
    """Every key and shape of ``parts``, as tensors without memory (on the meta device).

    A command asks for the same ones several times: they are built once in a process, for each class put in as a part.
    """
    classes = UNet, Autoencoder, TextEncoder, MedicalSemanticController
    key = (*classes, repr(architecture), *(part for part in PREFIXES if part in parts))
    if key not in _SKELETONS:
        with torch.device("meta"):
            _SKELETONS[key] = MedSoftModel(architecture, parts).state_dict()
    return dict(_SKELETONS[key])


_SKELETONS: dict[tuple[object, ...], dict[str, Tensor]] = {}
