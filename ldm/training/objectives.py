"""What a stage minimises.

An objective is a function of networks, batch and settings; a further one is a function here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.config import TrainingConfig
from ldm.diffusion.schedule import diffusion_loss, loss_inside
from ldm.networks.model import MedSoftModel
from ldm.networks.msc import ControllerInputs, masked_cosine, msc_loss
from ldm.training.alignment import NAME as ALIGNMENT
from ldm.training.alignment import alignment_loss
from ldm.training.dataset import Batch


class Losses(NamedTuple):
    """What an objective says of every sample, (B,) each. Gradients come from the first alone."""

    loss: Tensor
    cosine: Tensor | None = None  # of predicted and true tokens inside the mask, where tokens are predicted
    inside: Tensor | None = None  # the loss inside the mask alone
    published: Tensor | None = None  # the loss without the terms and weights that options add; None: it is ``loss``


Objective = Callable[[MedSoftModel, Batch, TrainingConfig, float, Tensor], Losses]


def msc_objective(
    net: MedSoftModel, batch: Batch, training: TrainingConfig, dropout: float, empty_text: Tensor
) -> Losses:
    """The MSC's tokens, (B, N, D) and (B, D), against those of the image with its lesion. Nothing is dropped."""
    tokens, global_token = net.msc(ControllerInputs.of(batch))
    soft = net.patch_mask(batch["mask"])
    loss = msc_loss(tokens, batch["target_tokens"], global_token, batch["target_global"], soft)
    return Losses(loss, masked_cosine(tokens.detach(), batch["target_tokens"], soft), loss.detach())


def diffusion_objective(
    net: MedSoftModel, batch: Batch, training: TrainingConfig, dropout: float, empty_text: Tensor
) -> Losses:
    """The noise that was added against the noise that the U-Net predicts.

    ``dropout``: share of samples that lose text and tokens together, see ``kept_conditions``; a lost text becomes
    ``empty_text`` (1, 77, D), the states of the empty prompt, lost tokens become zero. ``training.min_snr`` weighs
    samples by their time steps, ``training.msc_weight`` adds the MSC's own loss, ``training.alignment_weight`` that of
    the U-Net's middle block.
    """
    deviation = torch.exp(0.5 * batch["latent_logvar"])
    latent = net.scaled(batch["latent_mean"] + deviation * batch["posterior_noise"])
    steps = net.schedule.timesteps
    t = (batch["t"] * steps).long().clamp(max=steps - 1)  # a share just below 1 may be rounded up
    noisy = net.schedule.add_noise(latent, batch["noise"], t)
    tokens, global_token = lesion_tokens_of(net, batch, training.inside)
    semantic = net.semantic(batch["context_tokens"], tokens, batch["mask"])
    text_kept, tokens_kept = (each[:, None, None] for each in kept_conditions(batch["coin"], dropout, training.coins))
    text = torch.where(text_kept, batch["text"], empty_text)
    mask = net.latent_mask(batch["mask"])
    given = noisy, t, mask, batch["masked_latent"], text, semantic * tokens_kept.float()
    if training.alignment_weight:
        predicted, middle = net.noise_and_middle(*given)
    else:
        predicted = net.predict_noise(*given)
    published = diffusion_loss(predicted, batch["noise"], mask, training.mask_weight)
    loss, cosine = published, None
    if training.min_snr:
        loss = net.schedule.min_snr_weight(t, training.min_snr).to(loss) * loss
    soft = net.patch_mask(batch["mask"])
    if training.alignment_weight:
        projected = net.get_submodule(ALIGNMENT)(middle)
        aligned = alignment_loss(projected, batch["target_tokens"], soft, training.mask_weight)
        loss = loss + training.alignment_weight * aligned
    if training.inside == "msc":
        cosine = masked_cosine(tokens.detach(), batch["target_tokens"], soft)
        if training.msc_weight:
            own = msc_loss(tokens, batch["target_tokens"], global_token, batch["target_global"], soft)
            loss = loss + training.msc_weight * own
    return Losses(loss, cosine, loss_inside(predicted.detach(), batch["noise"], mask), published)


def kept_conditions(coin: Tensor, dropout: float, coins: str) -> tuple[Tensor, Tensor]:
    """Which samples keep their text, and which their tokens, (B,) bool each; ``coin`` (B,) in [0, 1).

    ``joint``: the share ``dropout`` loses both. ``separate``: as many lose both, as many more the text alone, and as
    many the tokens alone (after Brooks et al. 2023): two independent coins would hardly ever drop both, and both are
    what guidance leaves out.
    """
    if coins == "joint":
        return coin >= dropout, coin >= dropout
    without_tokens = (coin < dropout) | (coin >= 2 * dropout) & (coin < 3 * dropout)
    return coin >= 2 * dropout, ~without_tokens


OBJECTIVES: dict[str, Objective] = {"msc": msc_objective, "diffusion": diffusion_objective}


def lesion_tokens_of(net: MedSoftModel, batch: Batch, inside: str) -> tuple[Tensor, Tensor]:
    """Patch tokens (B, N, D) and global token (B, D) of the image with its lesion: its own (``inside`` true) or those
    that the MSC predicts (msc)."""
    if inside == "true":
        return batch["target_tokens"], batch["target_global"]
    return net.msc(ControllerInputs.of(batch))


def semantic_tokens_of(net: MedSoftModel, batch: Batch, inside: str) -> Tensor:
    """Tokens of the third attention (B, N / 4, D)."""
    return net.semantic(batch["context_tokens"], lesion_tokens_of(net, batch, inside)[0], batch["mask"])
