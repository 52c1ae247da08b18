"""Training of the classifier: one or two phases, the epoch chosen on validation, resumable between epochs."""

import dataclasses
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tqdm import tqdm

from ldm.checkpoints.files import save_pickle
from ldm.classifier.config import PRETRAIN, ClassifierConfig
from ldm.classifier.data import HEALTHY, ClassifierData, ImageSet
from ldm.classifier.metrics import label_indices, point_values
from ldm.classifier.network import augment, build_network, compute_outputs, normalise, pick_device, to_input
from ldm.core.devices import autocast
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_file, named_seed
from ldm.core.tables import write_csv
from ldm.data.checks import TRAINED_ON

log = logging.getLogger(__name__)

STATE_EVERY_SECONDS = 30.0  # a state of a whole run is large: a run shorter than this is simply started again


@dataclass
class Phase:
    """Some epochs on the same images: ``pretrain`` or ``train``."""

    name: str
    epochs: int
    images: np.ndarray  # uint8 (N, S, S) or (N, S, S, 3)
    labels: torch.Tensor  # (N,) class indices
    names: list[str]  # no two alike: order and augmentation depend on them
    shares: torch.Tensor  # (K,) weight of each class, see class_weights

    def epoch_name(self, epoch: int) -> int | str:
        """What sets an epoch apart from all others of a run; its randomness depends on it."""
        return epoch if self.name == "train" else f"{self.name} {epoch}"


def make_phases(config: ClassifierConfig, data: ClassifierData) -> list[Phase]:
    """What is trained on, in order. Repeated and synthetic images are in one of the phases only."""

    def phase(name: str, epochs: int, sets: Sequence[ImageSet | None]) -> Phase:
        used = [images for images in sets if images]
        labels = torch.cat([torch.from_numpy(label_indices(images, data.classes)) for images in used])
        names, seen = [], Counter()
        for sample_name in (f"{images.name}/{sample.sample_id}" for images in used for sample in images.samples):
            seen[sample_name] += 1
            again = f" ({seen[sample_name]})" if seen[sample_name] > 1 else ""
            names.append(f"{sample_name}{again}")
        pixels = np.concatenate([images.images for images in used])
        return Phase(name, epochs, pixels, labels, names, class_weights(labels, len(data.classes)))

    if config.use_synthetic != PRETRAIN:
        return [phase("train", config.EPOCHS, [data.train, data.synthetic, data.duplicates])]
    healthy = data.train.subset([i for i, label in enumerate(data.train.labels) if label == HEALTHY])
    return [
        phase("pretrain", config.pretrain_epochs, [healthy, data.synthetic]),
        phase("train", config.EPOCHS, [data.train]),
    ]


def class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Weight of a sample of each class (K,): half of the total for healthy (class 0), the other half for the lesion
    types in equal parts. However many types there are, an undecided network then says healthy and diseased equally
    often. A class without samples has weight 0."""
    counts = torch.bincount(labels, minlength=n_classes)
    shares = (counts[1:] > 0).float() * 0.5 / max(1, int((counts[1:] > 0).sum()))
    return torch.cat([torch.tensor([0.5]), shares]) * len(labels) / counts.clamp(min=1)


def fit(config: ClassifierConfig, data: ClassifierData, run: str) -> None:
    """Train what is missing, then write history.csv and classifier.safetensors (last: the sign of completion).

    Order, sampling, augmentation and initial weights are functions of (seed, epoch, sample or position), so a resumed
    run computes what an unbroken one would; for that, torch's global generator is seeded and cuDNN made deterministic.
    ``run`` names the run in what is saved.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    folder, device, phases = config.output, pick_device(config.GPU), make_phases(config, data)
    torch.manual_seed(named_seed(config.seed, "weights"))
    network = build_network(config.model, len(data.classes), config.img_size, config.channels, config.pretrained)
    network = network.to(device).to(memory_format=torch.channels_last)
    rows, best, moments = resume(folder / "last.pt", network, run)
    saved = time.monotonic()
    for phase in phases:
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        if moments and rows[-1]["phase"] == phase.name:
            optimizer.load_state_dict(moments)
        for epoch in range(sum(row["phase"] == phase.name for row in rows) + 1, phase.epochs + 1):
            train_loss = train_epoch(network, optimizer, phase, epoch, config)
            validation = validate(network, data, phases[-1].shares)
            auc = validation.get("macro_auc", validation["auc"])  # with lesion types, the mean over them
            row = {"phase": phase.name, "epoch": epoch, "train_loss": train_loss}
            row |= {"val_loss": validation["loss"], "val_auc": auc}
            rows.append(row)
            shown = "undefined" if auc is None else f"{auc:.3f}"
            progress = phase.name, epoch, phase.epochs, train_loss, row["val_loss"], shown
            log.info("%s epoch %d/%d: train %.4f, val %.4f, val AUC %s", *progress)
            chosen = phase is phases[-1] and is_chosen(row, best and best["row"], config.test_epoch)
            kept = phase is phases[-1] and config.save_epoch and epoch % config.save_epoch == 0
            if chosen or kept:
                weights = {key: each.to("cpu", copy=True).contiguous() for key, each in network.state_dict().items()}
                found = {"row": row, "validation": validation, "weights": weights}
                best = found if chosen else best
                if kept:
                    save_classifier(folder / f"epoch_{epoch}.safetensors", config, data, run, found, "test_epoch")
            last = phase is phases[-1] and epoch == phase.epochs
            if not last and time.monotonic() - saved >= STATE_EVERY_SECONDS:
                state = {"run": run, "history": rows, "best": best}
                state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
                with atomic_file(folder / "last.pt") as handle:
                    save_pickle(state, handle)
                saved = time.monotonic()
    assert best is not None  # the last phase has an epoch, and its first one is chosen or test_epoch is in it
    chosen_by = "validation loss" if rows[0]["val_auc"] is None else "validation AUC"
    chosen_by = chosen_by if config.test_epoch is None else "test_epoch"
    write_csv(folder / "history.csv", rows)
    save_classifier(folder / "classifier.safetensors", config, data, run, best, chosen_by)
    (folder / "last.pt").unlink(missing_ok=True)


def is_chosen(row: Mapping[str, Any], best: Mapping[str, Any] | None, test_epoch: int | None) -> bool:
    """Whether the epoch of ``row`` is ``test_epoch`` or, where that is None, better than the ``best`` before it.

    Better: the higher validation AUC, then the lower validation loss, which decides alone where the AUC is undefined.
    """
    if test_epoch is not None:
        return row["epoch"] == test_epoch
    if row["val_auc"] is None and row["epoch"] == 1:
        log.warning("validation holds one class: its AUC is undefined, the epoch is chosen by the validation loss")
    ranks = [(round(each["val_auc"] or 0.0, 6), -each["val_loss"]) for each in (row, best) if each]
    return best is None or ranks[0] > ranks[1]


def train_epoch(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, phase: Phase, epoch: int, config: ClassifierConfig
) -> float:
    """One pass over the images of a phase; returns the mean loss. Raises MedSoftError where it is not finite.

    With ``balance: loss`` the loss of a sample counts as much as its class's share.
    """
    moment, device = phase.epoch_name(epoch), next(network.parameters()).device
    rows, names = epoch_order(phase, epoch, config)
    weight = phase.shares.to(device) if config.balance == "loss" else None
    torch.manual_seed(named_seed(config.seed, "dropout", moment))
    network.train()
    n_batches = min(math.ceil(len(rows) / config.Batch_Size), len(rows) // 2)
    batches = np.array_split(np.arange(len(rows)), n_batches)  # of equal sizes, never of one: that has no variance
    total = 0.0
    for number, places in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=None)):
        rate = config.lr * rate_factor((epoch - 1) * n_batches + number, phase.epochs * n_batches)
        for group in optimizer.param_groups:
            group["lr"] = rate
        keys = [named_seed(config.seed, "augment", moment, names[place]) for place in places]
        draws = np.array([np.random.default_rng(key).uniform(-1, 1, 6) for key in keys])
        inputs = normalise(augment(to_input(phase.images[rows[places]], device), draws), network)
        with autocast(device):
            logits = network(inputs)
        loss = F.cross_entropy(logits.float(), phase.labels[rows[places]].to(device), weight=weight)
        value = loss.item()
        if not math.isfinite(value):
            shown = ", ".join(names[place] for place in places[:4])
            raise MedSoftError(f"epoch {epoch}, step {number}: the loss is not finite (samples {shown}...); lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += value * len(places)
    return total / len(rows)


def epoch_order(phase: Phase, epoch: int, config: ClassifierConfig) -> tuple[np.ndarray, list[str]]:
    """Rows of an epoch in order, and the names that their augmentation depends on."""
    seed, count, moment = config.seed, len(phase.names), phase.epoch_name(epoch)
    if config.balance == "sampler":
        chances = phase.shares[phase.labels].double().numpy()
        rng = np.random.default_rng(named_seed(seed, "sampler", moment))
        return rng.choice(count, count, p=chances / chances.sum()), [f"position {place}" for place in range(count)]
    keys = [named_seed(seed, "order", moment, name) for name in phase.names]
    rows = np.argsort(keys, kind="stable")
    return rows, [phase.names[row] for row in rows]


def rate_factor(step: int, steps: int) -> float:
    """The learning rate's share: linear warm-up over the first twentieth of the steps, then cosine to zero."""
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def validate(network: torch.nn.Module, data: ClassifierData, shares: torch.Tensor) -> dict[str, float | None]:
    """The loss, weighted as in training, and every number of ``metrics.point_values``; None where undefined."""
    labels = label_indices(data.val, data.classes)
    logits, _ = compute_outputs(network, data.val, 128)
    loss = float(F.cross_entropy(logits, torch.from_numpy(labels), weight=shares))
    if math.isnan(loss):
        raise MedSoftError("the validation loss is not a number; lower lr")
    return {"loss": loss, **point_values(labels, torch.softmax(logits.double(), 1).numpy())}


def save_classifier(
    path: Path, config: ClassifierConfig, data: ClassifierData, run: str, chosen: Mapping[str, Any], chosen_by: str
) -> None:
    """Write the weights of one epoch and what is known of them; ``chosen``: its row, validation and weights."""
    info = {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("overwrite", "predict")},
        "classes": data.classes,
        "run": run,
        "epoch": chosen["row"]["epoch"],
        "chosen_by": chosen_by,
        "train_loss": chosen["row"]["train_loss"],
        "validation": chosen["validation"],
        "use_synthetic": config.use_synthetic,
        "n_train_healthy": len(data.train) - len(data.train.diseased),
        "n_train_diseased": len(data.train.diseased),
        "n_synthetic_used": len(data.synthetic) if data.synthetic else 0,
        "n_duplicated": len(data.duplicates) if data.duplicates else 0,
        "n_val": len(data.val),
        TRAINED_ON: data.trained_on,
    }
    with atomic_file(path) as handle:
        handle.write(save(chosen["weights"], metadata={"classifier": json.dumps(info)}))


def resume(
    path: Path, network: torch.nn.Module, run: str
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, dict[str, Any] | None]:
    """Take up the saved state, if there is one: its weights into ``network``.

    Returns the rows of history.csv so far, the chosen epoch among them and the optimizer's state. Raises MedSoftError
    for a state that cannot be read, UsageError for one of another run.
    """
    if not path.exists():
        return [], None, None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state["network"])
        rows, best, saved_run = state["history"], state["best"], state["run"]
    except Exception as error:
        cure = "delete it to train from the start"
        raise MedSoftError(f"{path}: this state cannot be read ({type(error).__name__}); {cure}") from error
    if saved_run != run:
        raise UsageError(f"{path}: this state belongs to another run; set overwrite: true to train again")
    log.info("going on after epoch %d of the phase %s", rows[-1]["epoch"], rows[-1]["phase"])
    return rows, best, state["optimizer"]
