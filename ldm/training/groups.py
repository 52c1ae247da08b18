"""Which parameters a stage trains, in groups with a learning rate each."""

from torch import nn

from ldm.config import TrainingConfig
from ldm.core.errors import UsageError

Groups = dict[str, dict[str, nn.Parameter]]  # group -> checkpoint key -> parameter


def group_of(key: str, objective: str) -> str | None:
    """The group of a parameter: ``msc``, ``attn3`` (third attention and its norm), ``unet`` (the rest of the U-Net).

    The MSC's global head has no part in the diffusion loss and belongs to no group under that objective.
    """
    if key.startswith("msc."):
        return None if objective == "diffusion" and key.startswith("msc.global_head.") else "msc"
    if key.startswith("model.diffusion_model."):
        return "attn3" if ".attn3." in key or ".norm4." in key else "unet"
    return None


def training_groups(net: nn.Module, training: TrainingConfig) -> Groups:
    """The parameters of each group in ``training.rates``; UsageError for one that has none."""
    groups: Groups = {name: {} for name in training.rates}
    for key, parameter in net.named_parameters():
        group = group_of(key, training.objective)
        if group in groups:
            groups[group][key] = parameter
    for name, members in groups.items():
        if not members:
            parts = ", ".join(getattr(net, "parts", ()))
            raise UsageError(f"training.rates.{name}: no parameter of the parts {parts} is in it")
    if not groups:
        raise UsageError("training.rates: names no group, so nothing would be trained; give at least one of msc, attn3")
    return groups
