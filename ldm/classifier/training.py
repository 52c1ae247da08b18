"""Training of the classifier: one or two phases, the epoch chosen on validation, resumable between epochs."""

import dataclasses
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tqdm import tqdm

from ldm.checkpoints.files import save_pickle
from ldm.checkpoints.unfinished import DICTIONARY, NUMBER, WHOLE, Unfinished, exactly
from ldm.classifier.augmentation import augmented
from ldm.classifier.config import PRETRAIN, SEGMENT, ClassifierConfig
from ldm.classifier.convergence import SCORES, score_column
from ldm.classifier.data import HEALTHY, ClassifierData, ImageSet
from ldm.classifier.metrics import few_patients, label_indices, point_values
from ldm.classifier.network import compute_outputs, normalise, pick_device
from ldm.classifier.segmentation import build_for_task, moved_masks, segmentation_loss, validate_masks
from ldm.classifier.square import Squares
from ldm.core.devices import autocast, out_of_memory
from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import REPLACED, atomic_file, content_id, named_seed
from ldm.core.schema import Rule
from ldm.core.tables import write_csv
from ldm.data.checks import TRAINED_ON, drawn_by

log = logging.getLogger(__name__)

STATE_EVERY_SECONDS = 30.0  # a state of a whole run is large: a run shorter than this is simply started again


@dataclass
class Phase:
    """Some epochs on the same images: ``pretrain`` or ``train``; an epoch ends with a validation."""

    name: str
    epochs: int
    steps: int  # of the optimizer, in all epochs
    images: Squares  # uint8 (N, S, S) or (N, S, S, 3)
    labels: torch.Tensor  # (N,) class indices
    names: list[str]  # no two alike: order and augmentation depend on them
    shares: torch.Tensor  # (K,) weight of each class, see class_weights
    masks: Squares | None = None  # bool (N, S, S), with task segment

    def epoch_name(self, epoch: int) -> int | str:
        """What sets an epoch apart from all others of a run; its randomness depends on it."""
        return epoch if self.name == "train" else f"{self.name} {epoch}"

    def steps_of(self, epoch: int) -> range:
        """The optimizer's steps in an epoch, those of the phase counted from 0."""
        return range(self.steps * (epoch - 1) // self.epochs, self.steps * epoch // self.epochs)


def make_phases(config: ClassifierConfig, data: ClassifierData) -> list[Phase]:
    """What is trained on, in order. Repeated and synthetic images are in one of the phases only.

    With ``steps`` two phases share them as they share the epochs.
    """

    def phase(name: str, epochs: int, steps: int | None, sets: Sequence[ImageSet | None]) -> Phase:
        """These sets as one phase; ``steps`` None: as many as ``epochs`` passes over them have."""
        used = [images for images in sets if images]
        labels = torch.cat([torch.from_numpy(label_indices(images, data.classes)) for images in used])
        names: list[str] = []
        seen: Counter[str] = Counter()
        for sample_name in (f"{images.name}/{sample.sample_id}" for images in used for sample in images.samples):
            seen[sample_name] += 1
            again = f" ({seen[sample_name]})" if seen[sample_name] > 1 else ""
            names.append(f"{sample_name}{again}")
        pixels = Squares.joined([images.images for images in used])
        # of an epoch's batches, of equal sizes, none is of one image: that has no variance
        count = min(math.ceil(len(names) / config.Batch_Size), len(names) // 2)
        steps = epochs * count if steps is None else steps
        parts = [images.masks for images in used if images.masks is not None]
        masks = Squares.joined(parts) if parts else None
        return Phase(name, epochs, steps, pixels, labels, names, class_weights(labels, len(data.classes)), masks)

    steps = config.steps
    if config.use_synthetic != PRETRAIN:
        return [phase("train", config.EPOCHS, steps, [data.train, data.synthetic, data.duplicates])]
    first = rest = None
    if steps is not None:
        first = steps * config.pretrain_epochs // (config.pretrain_epochs + config.EPOCHS)
        rest = steps - first
    healthy = data.train.subset([i for i, label in enumerate(data.train.labels) if label == HEALTHY])
    return [
        phase("pretrain", config.pretrain_epochs, first, [healthy, data.synthetic]),
        phase("train", config.EPOCHS, rest, [data.train]),
    ]


def class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Weight of a sample of each class (K,): half of the total for healthy (class 0), the other half for the lesion
    types in equal parts. However many types there are, an undecided network then says healthy and diseased equally
    often. A class without samples has weight 0."""
    counts = torch.bincount(labels, minlength=n_classes)
    shares = (counts[1:] > 0).float() * 0.5 / max(1, int((counts[1:] > 0).sum()))
    return torch.cat([torch.tensor([0.5]), shares]) * len(labels) / counts.clamp(min=1)


def fit(config: ClassifierConfig, data: ClassifierData, run: str, pretrained: str | None) -> None:
    """Train what is missing, then write history.csv and classifier.safetensors (last: the sign of completion).

    Order, sampling, augmentation and initial weights are functions of (seed, epoch, sample or position), so a resumed
    run computes what an unbroken one would; for that, torch's global generator is seeded and cuDNN made deterministic.
    ``run`` names the run in what is saved; ``pretrained``: SHA-256 of the file that it begins with, if that is one.
    MedSoftError if another one has its name by now.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    folder, device, phases = config.output, pick_device(config.GPU), make_phases(config, data)
    torch.manual_seed(named_seed(config.seed, "weights"))
    sizes = len(data.classes), config.img_size, config.channels
    network = build_for_task(config.task, config.model, *sizes, config.pretrained)
    if content_id(config.pretrained) != pretrained:
        raise FileError(Path(str(config.pretrained)), REPLACED)
    network = network.to(device).to(memory_format=torch.channels_last)
    before = resume(config, phases, network, run)
    rows, best = before.rows, before.best
    saved = time.monotonic()
    for phase in phases:
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        if rows and rows[-1]["phase"] == phase.name:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": before.moments})
        for epoch in range(sum(row["phase"] == phase.name for row in rows) + 1, phase.epochs + 1):
            train_loss = train_epoch(network, optimizer, phase, epoch, config)
            validation = validate(network, data, phases[-1].shares)
            row = history_row(config, phase, epoch, train_loss, validation)
            rows.append(row)
            _log_epoch(phase, row)
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
                with atomic_file(folder / "last.pt") as handle:  # what ``resume`` reads
                    save_pickle(state, handle)
                saved = time.monotonic()
    assert best is not None  # the last phase has an epoch, and its first one is chosen or test_epoch is in it
    write_csv(folder / "history.csv", rows)
    save_classifier(folder / "classifier.safetensors", config, data, run, best, _chosen_by(rows[0], config.test_epoch))


def _chosen_by(row: Mapping[str, Any], test_epoch: int | None) -> str:
    """By what the epoch was chosen, for a reader; ``row``: any of history.csv."""
    if test_epoch is not None:
        return "test_epoch"
    column = score_column(row)
    return "validation loss" if row[column] is None else f"validation {SCORES[column]}"


def history_row(
    config: ClassifierConfig, phase: Phase, epoch: int, train_loss: float, validation: Mapping[str, float | None]
) -> dict[str, Any]:
    """The row of history.csv of an epoch; ``validation``: what ``validate`` found after it.

    The score is the Dice of a segmentation, else the AUC, which with several lesion types is the mean over them.
    """
    score = next(validation[name] for name in ("dice", "macro_auc", "auc") if name in validation)
    column = "val_dice" if config.task == SEGMENT else "val_auc"
    row = {"phase": phase.name, "epoch": epoch, "train_loss": train_loss, "val_loss": validation["loss"], column: score}
    return row if config.steps is None else row | {"step": phase.steps_of(epoch).stop}


def _log_epoch(phase: Phase, row: Mapping[str, Any]) -> None:
    column, epoch = score_column(row), row["epoch"]
    shown = "undefined" if row[column] is None else f"{row[column]:.3f}"
    progress = phase.name, epoch, phase.epochs, phase.steps_of(epoch).stop, phase.steps
    losses = row["train_loss"], row["val_loss"], SCORES[column], shown
    log.info("%s epoch %d/%d, step %d/%d: train %.4f, val %.4f, val %s %s", *progress, *losses)


def is_chosen(row: Mapping[str, Any], best: Mapping[str, Any] | None, test_epoch: int | None) -> bool:
    """Whether the epoch of ``row`` is ``test_epoch`` or, where that is None, better than the ``best`` before it.

    Better: the higher validation AUC (or Dice), then the lower validation loss, which decides alone where the AUC is
    undefined.
    """
    if test_epoch is not None:
        return row["epoch"] == test_epoch
    column = score_column(row)
    if row[column] is None and row["epoch"] == 1:
        what = f"validation holds one class: its {SCORES[column]} is undefined"
        log.warning("%s, the epoch is chosen by the validation loss", what)
    ranks = [(round(each[column] or 0.0, 6), -each["val_loss"]) for each in (row, best) if each]
    return best is None or ranks[0] > ranks[1]


def train_epoch(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, phase: Phase, epoch: int, config: ClassifierConfig
) -> float:
    """One epoch of a phase; returns the mean loss. Raises MedSoftError where it is not finite.

    With ``balance: loss`` the loss of a sample counts as much as its class's share.
    """
    device, batches = next(network.parameters()).device, epoch_batches(phase, epoch, config)
    weight = phase.shares.to(device) if config.balance == "loss" else None
    torch.manual_seed(named_seed(config.seed, "dropout", phase.epoch_name(epoch)))
    network.train()
    total, shown = 0.0, tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=None)
    for step, (rows, names) in zip(phase.steps_of(epoch), shown, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate_factor(step, phase.steps)
        keys = [named_seed(config.seed, "augment", *name) for name in names]
        inputs = normalise(augmented(phase.images[rows], keys, config.augmentation, device), network)
        with autocast(device):
            logits = network(inputs)
        labels = phase.labels[rows].to(device)
        if phase.masks is None:
            loss = F.cross_entropy(logits.float(), labels, weight=weight)
        else:
            counts = torch.ones(len(rows), device=device) if weight is None else weight[labels]
            loss = segmentation_loss(logits.float(), moved_masks(phase.masks[rows], keys, device), counts)
        value = loss.item()
        if not math.isfinite(value):
            some = ", ".join(name for _, name in names[:4])
            raise MedSoftError(f"epoch {epoch}, step {step}: the loss is not finite (samples {some}...); lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += value * len(rows)
    return total / sum(len(rows) for rows, _ in batches)


Names = list[tuple[int | str, str]]  # what the augmentation of a sample depends on: the pass and its name


def epoch_batches(phase: Phase, epoch: int, config: ClassifierConfig) -> list[tuple[np.ndarray, Names]]:
    """The rows (batch,) of each batch of an epoch, and their names in it.

    An epoch is a pass over the images in batches of equal size. With ``steps`` every batch has exactly ``Batch_Size``
    images, one pass follows the other, and the epochs divide the steps: then every arm sees equally many images.
    """
    steps, count, size = phase.steps_of(epoch), len(phase.names), config.Batch_Size
    if config.steps is None:
        rows, names = epoch_order(phase, epoch, config)
        places: Iterable[np.ndarray] = np.array_split(np.arange(count), len(steps))
    else:
        first, last = steps.start * size, steps.stop * size
        passes = range(first // count + 1, math.ceil(last / count) + 1)
        orders = [epoch_order(phase, number, config) for number in passes]
        rows, names = np.concatenate([rows for rows, _ in orders]), [name for _, each in orders for name in each]
        places = (first % count + np.arange(last - first)).reshape(-1, size)
    return [(rows[each], [names[place] for place in each]) for each in places]


def epoch_order(phase: Phase, number: int, config: ClassifierConfig) -> tuple[np.ndarray, Names]:
    """Rows of pass ``number`` over the images in order, and the names that their augmentation depends on."""
    seed, count, moment = config.seed, len(phase.names), phase.epoch_name(number)
    if config.balance == "sampler":
        chances = phase.shares[phase.labels].double().numpy()
        rng = np.random.default_rng(named_seed(seed, "sampler", moment))
        rows = rng.choice(count, count, p=chances / chances.sum())
        return rows, [(moment, f"position {place}") for place in range(count)]
    keys = [named_seed(seed, "order", moment, name) for name in phase.names]
    rows = np.argsort(keys, kind="stable")
    return rows, [(moment, phase.names[row]) for row in rows]


def rate_factor(step: int, steps: int) -> float:
    """The learning rate's share: linear warm-up over the first twentieth of the steps, then cosine to zero."""
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def validate(network: torch.nn.Module, data: ClassifierData, shares: torch.Tensor) -> dict[str, float | None]:
    """The loss, weighted as in training, and every number of ``metrics.point_values`` or, with task segment, of
    ``compare_masks``; None where undefined."""
    labels = label_indices(data.val, data.classes)
    if data.val.masks is not None:
        return validate_masks(network, data.val, data.val.masks, shares[torch.from_numpy(labels)])
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
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("overwrite", "predict", "review")},
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
        "drawn_by": drawn_by(data.synthetic.samples) if data.synthetic else [],
        "n_duplicated": len(data.duplicates) if data.duplicates else 0,
        "n_val": len(data.val),
        "few_validation_patients": few_patients(data.val),
        **({"review": data.review} if data.review else {}),
        TRAINED_ON: data.trained_on,
    }
    with atomic_file(path) as handle:
        handle.write(save(chosen["weights"], metadata={"classifier": json.dumps(info)}))


@dataclass(frozen=True)
class Resumed:
    """What an interrupted run goes on from: ``rows`` of history.csv, the chosen epoch among them, AdamW's moments."""

    rows: list[dict[str, Any]]
    best: dict[str, Any] | None
    moments: dict[int, dict[str, torch.Tensor]]


def resume(config: ClassifierConfig, phases: Sequence[Phase], network: torch.nn.Module, run: str) -> Resumed:
    """Take up ``last.pt``, if there is one: its weights into ``network``, the rest is returned.

    Raises UsageError for a state of another run, MedSoftError for one that cannot be read or in which an entry is
    missing, of another shape or type, or no number.
    """
    path, cure = config.output / "last.pt", "delete it to train from the start"
    if not path.exists():
        return Resumed([], None, {})
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # on damaged bytes torch raises whatever the bytes lead to
        if out_of_memory(error):
            raise  # the state is sound, and must not be deleted
        raise MedSoftError(f"{path}: this state cannot be read ({type(error).__name__}); {cure}") from error
    if state.get("run") != run:
        raise UsageError(f"{path}: this state belongs to another run; set overwrite: true to train again")
    saved, last = Unfinished(path, state, cure), phases[-1].name
    order = [(phase.name, epoch) for phase in phases for epoch in range(1, phase.epochs + 1)]
    begun = Rule(lambda rows: isinstance(rows, list) and 0 < len(rows) < len(order), f"1 to {len(order) - 1} epochs")
    rows = saved.entry("history", begun)
    number = Rule(lambda value: value is None or NUMBER.holds(value), "a number or nothing")
    score = "val_dice" if config.task == SEGMENT else "val_auc"
    for place, (row, (name, epoch)) in enumerate(zip(rows, order, strict=False)):
        expected: dict[str, Any] = {"phase": exactly(name), "epoch": exactly(epoch), score: number}
        expected |= {"train_loss": NUMBER, "val_loss": NUMBER} | ({} if config.steps is None else {"step": WHOLE})
        scored = Rule(lambda row: isinstance(row, dict) and score in row, f"a dictionary with {score}")
        saved.fitting(f"history[{place}]", scored, row)
        saved.fitting(f"history[{place}]", expected, row)
    chosen = [row for row in rows if row["phase"] == last and config.test_epoch in (None, row["epoch"])]
    weights = network.state_dict()
    one_of = Rule(lambda row: row in chosen, "a row of history.csv that may be chosen")
    expected = {"row": one_of, "validation": DICTIONARY, "weights": weights}
    best = saved.entry("best", expected if chosen else None)
    moments = saved.moments("optimizer", state.get("optimizer"), {None: [*network.parameters()]})
    network.load_state_dict(saved.entry("network", weights))
    log.info("going on after epoch %d of the phase %s", rows[-1]["epoch"], rows[-1]["phase"])
    return Resumed(rows, best, moments)
