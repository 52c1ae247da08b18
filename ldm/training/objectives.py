"""What a stage minimises. An objective is a function of networks, batch and settings; a further one is a function here.

Each returns (losses (B,), cosine (B,) or None): the loss of every sample, and the similarity of predicted and true
tokens inside the lesion where the objective predicts tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.config import TrainingConfig
from ldm.diffusion.schedule import diffusion_loss
from ldm.networks.model import MedSoftModel
from ldm.networks.msc import ControllerInputs, masked_cosine, msc_loss
from ldm.training.dataset import Batch

Losses = tuple[Tensor, Tensor | None]
Objective = Callable[[MedSoftModel, Batch, TrainingConfig, float, Tensor | None], Losses]


def msc_objective(
    net: MedSoftModel, batch: Batch, training: TrainingConfig, dropout: float, empty_text: Tensor | None
) -> Losses:
    """The MSC's prediction against the tokens of the image with its lesion. Nothing is dropped."""
    tokens, global_token = net.msc(ControllerInputs.of(batch))
    soft = net.patch_mask(batch["mask"])
    loss = msc_loss(tokens, batch["target_tokens"], global_token, batch["target_global"], soft)
    return loss, masked_cosine(tokens.detach(), batch["target_tokens"], soft)


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
    semantic = semantic_tokens_of(net, batch, training.inside)
    kept = (batch["coin"] >= dropout).float()[:, None, None]
    text = torch.where(kept > 0, batch["text"], empty_text)
    mask = net.latent_mask(batch["mask"])
    predicted = net.predict_noise(noisy, t, mask, batch["masked_latent"], text, semantic * kept)
    return diffusion_loss(predicted, batch["noise"], mask, training.mask_weight), None


OBJECTIVES: dict[str, Objective] = {"msc": msc_objective, "diffusion": diffusion_objective}


def semantic_tokens_of(net: MedSoftModel, batch: Batch, inside: str) -> Tensor:
    """Tokens of the third attention (B, N / 4, D). ``inside`` the lesion they are the image's own (``true``) or those
    that the MSC predicts (``msc``)."""
    inputs = ControllerInputs.of(batch)
    lesion_tokens = batch["target_tokens"] if inside == "true" else net.msc(inputs)[0]
    return net.semantic(inputs.context_tokens, lesion_tokens, batch["mask"])
