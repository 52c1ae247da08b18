"""``task: segment``: a U-Net that outlines the lesion, its loss, and Dice and the like with intervals over patients."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import PretrainedCfg
from torch import Tensor, nn

from ldm.classifier.augmentation import light_draws, move
from ldm.classifier.data import HEALTHY, ImageSet
from ldm.classifier.metrics import RESAMPLES, few_patients, patients_by_class, sample_groups, with_intervals
from ldm.classifier.network import CHANNELS, build_network, normalise, to_input
from ldm.classifier.square import Squares
from ldm.core.errors import MedSoftError, UsageError, first_line
from ldm.core.tables import RowFile
from ldm.data.checks import FEWEST_PATIENTS

CUT = 0.5  # a pixel of at least this probability is called lesion
WIDEST = 64  # channels of the decoder
BATCH = 64  # images at once where nothing is learned


class UNet(nn.Module):
    """A timm network as the contracting half, skip connections and a small decoder (Ronneberger et al. 2015)."""

    def __init__(self, model: str, channels: int) -> None:
        super().__init__()
        encoder: Any = timm.create_model(model, pretrained=False, features_only=True, in_chans=channels)
        self.encoder: nn.Module = encoder
        self.pretrained_cfg = (timm.get_pretrained_cfg(model) or PretrainedCfg()).to_dict()
        *skips, width = encoder.feature_info.channels()  # which an nn.Module does not have
        blocks = []
        for skip in (*reversed(skips), channels):
            narrow = min(WIDEST, max(skip, 16))
            blocks.append(nn.Sequential(_convolution(width + skip, narrow), _convolution(narrow, narrow)))
            width = narrow
        self.decoder = nn.ModuleList(blocks)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) as ``normalise`` gives them -> logits (B, S, S)."""
        *skips, x = self.encoder(images)
        for block, skip in zip(self.decoder, (*reversed(skips), images), strict=True):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        return self.head(x).squeeze(1)


def _convolution(width: int, narrow: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, narrow, 3, padding=1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True))


def build_for_task(
    task: str, model: str, n_classes: int, img_size: int, channels: str, pretrained: str | None = None
) -> nn.Module:
    """The network of a task: ``build_network``'s, or with ``segment`` a U-Net; UsageError for a model that is none."""
    if task != "segment":
        return build_network(model, n_classes, img_size, channels, pretrained)
    try:
        network = UNet(model, CHANNELS[channels])
        with torch.inference_mode():
            network.eval()(torch.zeros(1, CHANNELS[channels], img_size, img_size))
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UsageError(f"model {model} makes no U-Net at img_size {img_size}: {reason}; try resnet18") from error
    return network


def moved_masks(masks: np.ndarray, keys: Sequence[int], device: torch.device) -> Tensor:
    """Masks bool (B, S, S) under the light augmentation that images with these ``keys`` have: float 0 or 1."""
    given = torch.from_numpy(masks).to(device).float().unsqueeze(1)
    return (move(given, light_draws(keys)).squeeze(1) >= CUT).float()


def segmentation_loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the pixels and, of images with a lesion, 1 - soft Dice (Milletari et al. 2016).

    ``logits`` and ``masks`` (B, S, S); ``weights`` (B,): how much an image counts.
    """
    return (image_losses(logits, masks) * weights).sum() / weights.sum()


def image_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """``segmentation_loss`` of each image alone (B,)."""
    probability = logits.sigmoid()
    both, sizes = (probability * masks).sum((1, 2)), probability.sum((1, 2)) + masks.sum((1, 2))
    dice = torch.where(masks.any(2).any(1), 1 - (2 * both + 1) / (sizes + 1), 0)
    return F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2)) + dice


@torch.inference_mode()
def segment(network: nn.Module, images: ImageSet) -> Iterator[Tensor]:
    """Logits of BATCH images after the other (B, S, S), float32 on the CPU.

    MedSoftError naming the first sample whose logits are not finite.
    """
    device = next(network.eval().parameters()).device
    for start in range(0, len(images), BATCH):
        inputs = normalise(to_input(images.images[start : start + BATCH], device), network)
        logits = network(inputs).float().cpu()
        bad = (~torch.isfinite(logits).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            name = images.samples[start + bad[0]].sample_id
            said = f"the network gives values that are not finite for {images.name} sample {name}; lower lr"
            raise MedSoftError(said)
        yield logits


def validate_masks(network: nn.Module, images: ImageSet, truth: Squares, weights: Tensor) -> dict[str, float | None]:
    """The loss, and every number of ``compare_masks``; None where undefined. ``weights`` (N,)."""
    losses, counts = [], []
    for start, logits in zip(range(0, len(images), BATCH), segment(network, images), strict=True):
        masks = truth[start : start + BATCH]
        losses.append(image_losses(logits, torch.from_numpy(masks).float()))
        counts.append(pixel_counts(masks, called(logits)))
    loss = (torch.cat(losses) * weights).sum() / weights.sum()
    values = compare_counts(np.concatenate(counts, axis=1))(np.ones((1, len(images))))
    return {"loss": float(loss), **{name: None if np.isnan(x[0]) else float(x[0]) for name, x in values.items()}}


def called(logits: Tensor) -> np.ndarray:
    """Which pixels are called lesion, bool (B, S, S)."""
    return (logits.sigmoid() >= CUT).numpy()


def outlines(network: nn.Module, images: ImageSet, folder: Path) -> np.ndarray:
    """Which pixels of a set are ``called`` lesion, bool (N, S, S), in a file on the disk of ``folder``."""
    found = RowFile(folder, images.images.shape[1:3], "bool", len(images), f"outlines of the {images.name} set")
    for logits in segment(network, images):
        found.append(called(logits))
    return found.array()


def pixel_counts(truth: Squares | np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each image (N, S, S) the pixels in both masks, in the true one, in the one found: float (3, N)."""
    parts = [slice(start, start + BATCH) for start in range(0, len(found), BATCH)]
    pairs = ((truth[part], found[part]) for part in parts)
    counts = [[each.sum((1, 2)) for each in (true & named, true, named)] for true, named in pairs]
    return np.concatenate(counts, axis=1).astype(float)


def overlaps(truth: Squares | np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """Of each image (N, S, S) the Dice coefficient and others (N,); 0 where nothing is found, NaN without a lesion."""
    return _overlaps(pixel_counts(truth, found))


def _overlaps(counts: np.ndarray) -> dict[str, np.ndarray]:
    both, true, named = counts
    lesion = np.where(true > 0, 1.0, np.nan)
    return {
        "dice": lesion * 2 * both / np.maximum(true + named, 1),
        "iou": lesion * both / np.maximum(true + named - both, 1),
        "pixel_precision": lesion * both / np.maximum(named, 1),
        "pixel_recall": lesion * both / np.maximum(true, 1),
        "found": lesion * (both > 0),
    }


def compare_masks(truth: Squares | np.ndarray, found: np.ndarray) -> Any:
    """A ``measure`` for ``with_intervals`` of masks (N, S, S), see ``compare_counts``."""
    return compare_counts(pixel_counts(truth, found))


def compare_counts(counts: np.ndarray, kept: np.ndarray | None = None) -> Any:
    """A ``measure`` for ``with_intervals``, of ``pixel_counts``: means over the images with a lesion (or the ``kept``
    (N,) of them), and the ``false_alarms``, the share of images without a lesion in which something is found."""
    lesion, alarm = counts[1] > 0, counts[2] > 0
    values = _overlaps(counts)
    among = lesion if kept is None else lesion & kept

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        of_lesions, of_others = weights * among, weights * ~lesion
        with np.errstate(invalid="ignore"):
            means = {name: of_lesions @ np.nan_to_num(x) / of_lesions.sum(1) for name, x in values.items()}
            return means | {"false_alarms": of_others @ alarm / of_others.sum(1)}

    return measure


def summarise_masks(images: ImageSet, truth: Squares, found: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """What metrics.json says about a test set: ``test`` and ``groups`` as ``metrics.summarise``, counts and notes."""
    counts, patients = pixel_counts(truth, found), [sample.patient_id for sample in images.samples]
    sides = patients_by_class([label != HEALTHY for label in images.labels], patients)

    def least(name: str) -> int:
        """Patients with a lesion, or without one for ``false_alarms``."""
        return sides.get(name != "false_alarms", 0)

    groups = [
        {"lesion_type": kind, "severity": severity} | _group(counts, inside, patients, seed)
        for (kind, severity), inside in sample_groups(images.samples).items()
    ]
    few, notes = few_patients(images), []
    if few:
        left_out = f"an interval from fewer than {FEWEST_PATIENTS} is meaningless and left out"
        notes.append(f"The test set holds few patients of a class ({few}): {left_out}.")
    return {
        "test": with_intervals(compare_counts(counts), patients, least, seed),
        "groups": groups,
        "threshold": CUT,
        "resamples": RESAMPLES,
        "n_test": len(images),
        "n_test_diseased": len(images.diseased),
        "n_test_patients": len(set(patients)),
        "notes": notes,
    }


def _group(counts: np.ndarray, inside: np.ndarray, patients: Sequence[str], seed: int) -> dict[str, Any]:
    """What ``summarise_masks`` says of the samples ``inside`` (N,) a group."""
    count = len({patient for patient, kept in zip(patients, inside, strict=True) if kept})
    measured = with_intervals(compare_counts(counts, inside), patients, lambda _: count, seed)
    return {"n": int(inside.sum()), "n_patients": count} | {name: measured[name] for name in ("dice", "found")}


def mask_rows(images: ImageSet, truth: Squares, found: np.ndarray) -> list[dict[str, Any]]:
    """One row per sample, as in predictions_test.csv: who it is, how large lesion and outline are, Dice."""
    dice = overlaps(truth, found)["dice"]
    return [
        {
            **{key: getattr(sample, key) or "" for key in ("sample_id", "patient_id", "parent_id", "prompt")},
            **{key: getattr(sample, key) or "" for key in ("lesion_type", "severity")},
            "label": label,
            "lesion_pixels": int(mask.sum()),
            "found_pixels": int(outline.sum()),
            "dice": None if np.isnan(value) else float(value),
        }
        for sample, label, mask, outline, value in zip(images.samples, images.labels, truth, found, dice, strict=True)
    ]


def headline(metrics: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The most important test number of metrics.json, with its name for a reader."""
    name = "dice" if metrics["task"] == "segment" else "auc"
    return {"dice": "Dice", "auc": "AUC"}[name], metrics["test"][name]
