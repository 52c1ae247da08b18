"""The classifier's network: timm by name, local weights, the device, what goes in and what comes out."""

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import adapt_input_conv

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.checkpoints.fitting import check_finite
from ldm.classifier.config import PRETRAINED_HUB
from ldm.classifier.data import ImageSet
from ldm.core.errors import MedSoftError, UsageError, first_line
from ldm.core.tables import counted

log = logging.getLogger(__name__)

CHANNELS = {"grey": 1, "rgb": 3}


def build_network(
    model: str, n_classes: int, img_size: int = 224, channels: str = "grey", pretrained: str | None = None
) -> torch.nn.Module:
    """A timm network for grey or rgb squares with random weights, those of a local file, or timm's from the hub.

    Raises UsageError for an unknown model or one without weights on the hub, MedSoftError for weights that cannot be
    read or fetched.
    """
    check_model(model, pretrained)
    options: dict[str, Any] = {"in_chans": CHANNELS[channels], "num_classes": n_classes}
    settings = timm.get_pretrained_cfg(model)
    if settings is not None and settings.fixed_input_size:
        options["img_size"] = img_size
    try:
        network = timm.create_model(model, pretrained=False, **options)
        with torch.inference_mode():
            network.eval()(torch.zeros(1, CHANNELS[channels], img_size, img_size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UsageError(f"model {model} does not work at img_size {img_size}: {first_line(error)}") from error
    if pretrained == PRETRAINED_HUB:
        return _fetch(model, options)
    if pretrained:
        _load_pretrained(network, Path(pretrained), CHANNELS[channels])
    return network


def check_model(model: str, pretrained: str | None) -> None:
    """Raise UsageError for a model that timm does not know or has no weights of, MedSoftError for a missing file."""
    if not timm.is_model(model) or ("." in model and not timm.is_model_pretrained(model)):
        tagged = timm.list_pretrained(model.split(".")[0] + ".*") if "." in model else []
        near = difflib.get_close_matches(model, tagged or timm.list_models(), n=3) or tagged[:3]
        raise UsageError(f"model {model} is not known to timm" + (f"; near: {', '.join(near)}" if near else ""))
    if pretrained == PRETRAINED_HUB and not timm.is_model_pretrained(model):
        raise UsageError(f"pretrained hub: timm has no weights of {model}; set pretrained to a file, or to null")
    if pretrained and pretrained != PRETRAINED_HUB and not Path(pretrained).is_file():
        raise MedSoftError(
            f"{pretrained}: the file that `pretrained` names does not exist; set it to null to start at random"
        )


def _fetch(model: str, options: dict[str, Any]) -> torch.nn.Module:
    log.info("fetching timm's weights of %s, unless they are in the hub's cache", model)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of its attempts, without a network
    try:
        return timm.create_model(model, pretrained=True, **options)
    except Exception as error:  # whatever the hub's client and the network raise
        raise MedSoftError(
            f"pretrained hub: the weights of {model} could not be fetched ({type(error).__name__}); without a network, "
            "download them elsewhere and set pretrained to that file, or set it to null"
        ) from error


def _load_pretrained(network: torch.nn.Module, path: Path, channels: int) -> None:
    """Everything but the classification layer must fit; a colour stem is summed over its colours for grey images."""
    state = read_checkpoint(path).state
    # timm names the first convolutions and the classification layers: none, one or several
    names = [settings_of(network).get(key) or () for key in ("first_conv", "classifier")]
    stems, heads = ((each,) if isinstance(each, str) else tuple(each) for each in names)
    for stem in stems:
        if f"{stem}.weight" in state:
            state[f"{stem}.weight"] = adapt_input_conv(channels, state[f"{stem}.weight"])
    own = network.state_dict()
    new = {key for key in own if key.startswith(tuple(f"{head}." for head in heads))}
    missing = [key for key in own if key not in new and key not in state]
    wrong = [key for key in state if key not in new and (key not in own or own[key].shape != state[key].shape)]
    if missing or wrong:
        raise MedSoftError(
            f"{path}: these weights do not fit the model: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(wrong)} unknown or of another shape ({', '.join(wrong[:3])}); give weights of the same timm model"
        )
    check_finite(state, path)
    network.load_state_dict({**own, **{key: value for key, value in state.items() if key not in new}})


def settings_of(network: torch.nn.Module) -> dict[str, Any]:
    """What timm says of a network: mean and deviation of its inputs, names of its layers."""
    return vars(network)["pretrained_cfg"]  # torch's annotations take every attribute for a tensor or a module


def pick_device(gpu: str | list[int] | list[str]) -> torch.device:
    """The device named by the ``GPU`` key: "cpu", ids as list or "0,1" (the first is used), or automatic."""
    given = gpu.split(",") if isinstance(gpu, str) else map(str, gpu)
    names = [name.strip() for name in given if name.strip()]
    if not names:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if names == ["cpu"]:
        return torch.device("cpu")
    if not all(name.isdigit() for name in names):
        raise UsageError(f'GPU must hold device numbers such as "0", or "cpu", found {json.dumps(gpu)}')
    if int(names[0]) >= torch.cuda.device_count():
        raise MedSoftError(
            f'GPU {names[0]} is not on this machine ({torch.cuda.device_count()} seen); set GPU to "" or "cpu"'
        )
    if len(names) > 1:
        log.info("GPU names %d devices; one is enough here, %s is used", len(names), names[0])
    return torch.device("cuda", int(names[0]))


def to_input(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (B, S, S) or (B, S, S, 3) to float (B, C, S, S) in [0, 1]."""
    unit = torch.from_numpy(images).to(device).float().div_(255)
    return unit.unsqueeze(1) if unit.ndim == 3 else unit.permute(0, 3, 1, 2)


def normalise(images: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
    """(B, C, S, S) in [0, 1] to the scale that the model's ImageNet weights expect, channels last in memory.

    Grey images take the average over the colours.
    """
    mean, std = (images.new_tensor(settings_of(network)[key]) for key in ("mean", "std"))
    if images.shape[1] == 1:
        mean, std = mean.mean(), std.mean()
    return ((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def compute_outputs(
    network: torch.nn.Module, images: ImageSet, batch_size: int = 64, places: Sequence[int] | np.ndarray = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K), and what the classification layer reads of the images at ``places`` (P, D), float32 on the CPU.

    No place stands twice. The network is left in evaluation mode. Raises MedSoftError naming the first sample whose
    logits are not finite.
    """
    device, pieces, pooled = next(network.eval().parameters()).device, [], []
    wanted = np.sort(np.asarray(places, int))
    timm_network: Any = network  # whose methods torch's annotations take for tensors
    for start in range(0, len(images), batch_size):
        inputs = normalise(to_input(images.images[start : start + batch_size], device), network)
        features = timm_network.forward_features(inputs)
        pieces.append(timm_network.forward_head(features).float().cpu())
        first, last = np.searchsorted(wanted, (start, start + batch_size))
        if first < last:
            read = timm_network.forward_head(features, pre_logits=True).float().cpu()
            pooled.append(read[wanted[first:last] - start])
    logits = torch.cat(pieces)
    bad = (~torch.isfinite(logits).all(1)).nonzero().flatten().tolist()
    if bad:
        raise MedSoftError(
            f"the classifier gives values that are not finite for {counted(len(bad), f'{images.name} sample')} (first: "
            f"{images.samples[bad[0]].sample_id}); lower lr, or train again"
        )
    return logits, torch.cat(pooled)[np.searchsorted(wanted, places)] if pooled else torch.empty(0, 0)
