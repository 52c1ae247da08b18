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
from ldm.training.dataset import Batch


class Losses(NamedTuple):
    """What an objective says of every sample, (B,) each. Gradients come from the first alone."""

    loss: Tensor
    cosine: Tensor | None = None  # of predicted and true tokens inside the mask, where tokens are predicted
    inside: Tensor | None = None  # the loss inside the mask alone


Objective = Callable[[MedSoftModel, Batch, TrainingConfig, float, Tensor | None], Losses]


def msc_objective(
    net: MedSoftModel, batch: Batch, training: TrainingConfig, dropout: float, empty_text: Tensor | None
) -> Losses:
    """The MSC's prediction against the tokens of the image with its lesion. Nothing is dropped."""
    tokens, global_token = net.msc(ControllerInputs.of(batch))
    soft = net.patch_mask(batch["mask"])
    loss = msc_loss(tokens, batch["target_tokens"], global_token, batch["target_global"], soft)
    return Losses(loss, masked_cosine(tokens.detach(), batch["target_tokens"], soft), loss.detach())


def diffusion_objective(
    net: MedSoftModel, batch: Batch, training: TrainingConfig, dropout: float, empty_text: Tensor | None
) -> Losses:
    """The noise that was added against the noise that the U-Net predicts.

    ``dropout``: share of samples that lose text and MSC tokens together, by one coin each; those get ``empty_text``
    (1, 77, D), the states of the empty prompt.
    """
    deviation = torch.exp(0.5 * batch["latent_logvar"])
    latent = net.scaled(batch["latent_mean"] + deviation * batch["posterior_noise"])
    steps = net.schedule.timesteps
    t = (batch["t"] * steps).long().clamp(max=steps - 1)  # a share just below 1 may be rounded up
    noisy = net.schedule.add_noise(latent, batch["noise"], t)
    lesion_tokens = lesion_tokens_of(net, batch, training.inside)
    semantic = net.semantic(batch["context_tokens"], lesion_tokens, batch["mask"])
    kept = (batch["coin"] >= dropout).float()[:, None, None]
    text = torch.where(kept > 0, batch["text"], empty_text)
    mask = net.latent_mask(batch["mask"])
    predicted = net.predict_noise(noisy, t, mask, batch["masked_latent"], text, semantic * kept)
    loss = diffusion_loss(predicted, batch["noise"], mask, training.mask_weight)
    cosine = None
    if training.inside == "msc":
        cosine = masked_cosine(lesion_tokens.detach(), batch["target_tokens"], net.patch_mask(batch["mask"]))
    return Losses(loss, cosine, loss_inside(predicted.detach(), batch["noise"], mask))


OBJECTIVES: dict[str, Objective] = {"msc": msc_objective, "diffusion": diffusion_objective}


def lesion_tokens_of(net: MedSoftModel, batch: Batch, inside: str) -> Tensor:
    """Tokens (B, N, D) inside the lesion: the image's own (``inside`` true) or those that the MSC predicts (msc)."""
    return batch["target_tokens"] if inside == "true" else net.msc(ControllerInputs.of(batch))[0]


def semantic_tokens_of(net: MedSoftModel, batch: Batch, inside: str) -> Tensor:
    """Tokens of the third attention (B, N / 4, D)."""
    return net.semantic(batch["context_tokens"], lesion_tokens_of(net, batch, inside), batch["mask"])
