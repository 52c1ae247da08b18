"""Training of the classifier: one or two phases, the epoch chosen on validation, resumable between epochs."""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ldm.checkpoints.files import save_pickle
from ldm.classifier.config import PRETRAIN, ClassifierConfig
from ldm.classifier.data import HEALTHY, ClassifierData, ImageSet
from ldm.classifier.metrics import label_indices, point_values
from ldm.classifier.network import augment, build_network, compute_logits, normalise, pick_device, to_input
from ldm.core.devices import autocast
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_file, named_seed
from ldm.core.tables import write_csv

log = logging.getLogger(__name__)

STATE_EVERY_SECONDS = 30.0  # a state of a whole run is large: a run shorter than this is simply started again


@dataclass
class Phase:
    """Some epochs on the same pictures: ``pretrain`` or ``train``."""

    name: str
    epochs: int
    images: np.ndarray  # uint8 (N, S, S) or (N, S, S, 3)
    labels: torch.Tensor  # (N,) class indices
    names: list[str]  # no two alike: order and augmentation depend on them
    shares: torch.Tensor  # (K,) weight of each class, see class_weights


def make_phases(config: ClassifierConfig, data: ClassifierData) -> list[Phase]:
    """What is trained on, in order. Repeated and synthetic pictures are in one of the phases only."""

    def phase(name: str, epochs: int, sets: Sequence[ImageSet | None]) -> Phase:
        used = [images for images in sets if images]
        labels = torch.cat([torch.from_numpy(label_indices(images, data.classes)) for images in used])
        names = [f"{images.name}/{sample.sample_id}" for images in used for sample in images.samples]
        seen: Counter[str] = Counter()
        for place, sample_name in enumerate(names):
            seen[sample_name] += 1
            if seen[sample_name] > 1:
                names[place] = f"{sample_name} ({seen[sample_name]})"
        pictures = np.concatenate([images.images for images in used])
        return Phase(name, epochs, pictures, labels, names, class_weights(labels, len(data.classes)))

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


@contextlib.contextmanager
def reproducible() -> Any:
    """Same seed, same result: deterministic kernels; the caller's random state is put back."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


class Trainer:
    """One training run. Order, sampling, augmentation and initial weights are functions of (seed, epoch, sample or
    position), so a resumed run computes what an unbroken one would."""

    def __init__(self, config: ClassifierConfig, data: ClassifierData, run: str) -> None:
        self.config, self.data, self.run = config, data, run
        self.folder = config.output
        self.phases = make_phases(config, data)
        self.val_labels = label_indices(data.val, data.classes)
        self.device = pick_device(config.GPU)
        torch.manual_seed(named_seed(config.seed, "weights"))
        network = build_network(config.model, len(data.classes), config.img_size, config.channels, config.pretrained)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # the chosen epoch so far: its history row, validation and weights

    def fit(self) -> None:
        """Train what is missing, then write history.csv and classifier.safetensors (last: the sign of completion)."""
        state = self._resume()
        self.saved = time.monotonic()
        for phase in self.phases:
            self.optimizer = torch.optim.AdamW(
                self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True
            )
            if state and state["history"][-1]["phase"] == phase.name:
                self.optimizer.load_state_dict(state["optimizer"])
            done = sum(row["phase"] == phase.name for row in self.history)
            for epoch in range(done + 1, phase.epochs + 1):
                self._fit_epoch(phase, epoch)
        write_csv(self.folder / "history.csv", self.history)
        self._save(self.folder / "classifier.safetensors", **self.best)
        (self.folder / "last.pt").unlink(missing_ok=True)

    def _fit_epoch(self, phase: Phase, epoch: int) -> None:
        train_loss = self._epoch(phase, epoch)
        validation = self._validate()
        chosen_auc = validation["auc" if len(self.data.classes) == 2 else "macro_auc"]
        row = {"phase": phase.name, "epoch": epoch, "train_loss": train_loss}
        row |= {"val_loss": validation["loss"], "val_auc": chosen_auc}
        self.history.append(row)
        shown = "undefined" if chosen_auc is None else f"{chosen_auc:.3f}"
        words = (phase.name, epoch, phase.epochs, train_loss, row["val_loss"], shown)
        log.info("%s epoch %d/%d: train %.4f, val %.4f, val AUC %s", *words)
        if phase.name == "train":
            if self._is_chosen(row):
                self.best = {"row": row, "validation": validation, "weights": _copy(self.network)}
            if self.config.save_epoch and epoch % self.config.save_epoch == 0:
                self._save(self.folder / f"epoch_{epoch}.safetensors", row, validation, _copy(self.network))
        last = phase is self.phases[-1] and epoch == phase.epochs
        if not last and time.monotonic() - self.saved >= STATE_EVERY_SECONDS:
            self._save_state()
            self.saved = time.monotonic()

    def _epoch(self, phase: Phase, epoch: int) -> float:
        from tqdm import tqdm

        moment = epoch if phase.name == "train" else f"{phase.name} {epoch}"
        rows, names = self._order(phase, moment)
        torch.manual_seed(named_seed(self.config.seed, "dropout", moment))
        self.network.train()
        n_batches = min(math.ceil(len(rows) / self.config.Batch_Size), len(rows) // 2)
        batches = np.array_split(np.arange(len(rows)), n_batches)  # of equal sizes, never of one: that has no variance
        total = 0.0
        for number, places in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=None)):
            self._set_rate((epoch - 1) * n_batches + number, phase.epochs * n_batches)
            keys = [named_seed(self.config.seed, "augment", moment, names[place]) for place in places]
            draws = np.array([np.random.default_rng(key).uniform(-1, 1, 6) for key in keys])
            loss = self._step(phase, rows[places], draws)
            if not math.isfinite(loss):
                shown = ", ".join(names[place] for place in places[:4])
                raise MedSoftError(
                    f"epoch {epoch}, step {number}: the loss is not finite (samples {shown}...); lower lr"
                )
            total += loss * len(places)
        return total / len(rows)

    def _order(self, phase: Phase, moment: int | str) -> tuple[np.ndarray, list[str]]:
        """Rows of an epoch in order, and the names that their augmentation depends on."""
        seed, count = self.config.seed, len(phase.names)
        if self.config.balance == "sampler":
            chances = phase.shares[phase.labels].double().numpy()
            rng = np.random.default_rng(named_seed(seed, "sampler", moment))
            return rng.choice(count, count, p=chances / chances.sum()), [f"position {place}" for place in range(count)]
        keys = [named_seed(seed, "order", moment, name) for name in phase.names]
        rows = np.argsort(keys, kind="stable")
        return rows, [phase.names[row] for row in rows]

    def _step(self, phase: Phase, rows: np.ndarray, draws: np.ndarray) -> float:
        """One step of the optimizer on these rows; returns the loss, and takes no step if that is not finite."""
        inputs = normalise(augment(to_input(phase.images[rows], self.device), draws), self.network)
        targets = phase.labels[torch.from_numpy(rows)].to(self.device)
        with autocast(self.device):
            logits = self.network(inputs)
        weights = phase.shares.to(self.device) if self.config.balance == "loss" else None
        loss = F.cross_entropy(logits.float(), targets, weight=weights)
        value = loss.item()
        if math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return value

    def _set_rate(self, step: int, steps: int) -> None:
        """Linear warm-up over the first twentieth of the phase's steps, then cosine to zero."""
        warm = max(1, steps // 20)
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate

    def _validate(self) -> dict[str, float | None]:
        """The loss, weighted as in training, and every number of classifier_metrics; None where undefined."""
        logits = compute_logits(self.network, self.data.val, 128, self.device)
        targets, weights = torch.from_numpy(self.val_labels), self.phases[-1].shares
        loss = float(F.cross_entropy(logits, targets, weight=weights))
        if math.isnan(loss):
            raise MedSoftError("the validation loss is not a number; lower lr")
        return {"loss": loss, **point_values(self.val_labels, torch.softmax(logits.double(), 1).numpy())}

    # --- the chosen epoch and the state -------------------------------------------------------------------------

    @property
    def _chosen_by(self) -> str:
        if self.config.test_epoch is not None:
            return "test_epoch"
        return "validation AUC" if self.history[0]["val_auc"] is not None else "validation loss"

    def _is_chosen(self, row: dict[str, Any]) -> bool:
        if self.config.test_epoch is not None:
            return row["epoch"] == self.config.test_epoch
        if row["val_auc"] is None and row["epoch"] == 1:
            log.warning("validation holds one class: its AUC is undefined, the epoch is chosen by the validation loss")
        return self.best is None or _quality(row) > _quality(self.best["row"])

    def _save(
        self, path: Path, row: dict[str, Any], validation: dict[str, float | None], weights: dict[str, torch.Tensor]
    ) -> None:
        from safetensors.torch import save

        data = self.data
        info = {
            "config": {k: v for k, v in dataclasses.asdict(self.config).items() if k not in ("overwrite", "predict")},
            "classes": data.classes,
            "run": self.run,
            "epoch": row["epoch"],
            "chosen_by": self._chosen_by if path.name == "classifier.safetensors" else "test_epoch",
            "train_loss": row["train_loss"],
            "validation": validation,
            "use_synthetic": self.config.use_synthetic,
            "n_train_healthy": len(data.train) - len(data.train.diseased),
            "n_train_diseased": len(data.train.diseased),
            "n_synthetic_used": len(data.synthetic) if data.synthetic else 0,
            "n_duplicated": len(data.duplicates) if data.duplicates else 0,
            "n_val": len(data.val),
        }
        with atomic_file(path) as handle:
            handle.write(save(weights, metadata={"classifier": json.dumps(info)}))

    def _save_state(self) -> None:
        state = {
            "run": self.run,
            "history": self.history,
            "best": self.best,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.folder / "last.pt") as handle:
            save_pickle(state, handle)

    def _resume(self) -> dict[str, Any] | None:
        """Take up the saved state, if there is one; returns it."""
        path = self.folder / "last.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            self.history, self.best, run = state["history"], state["best"], state["run"]
        except Exception as error:
            cure = "delete it to train from the start"
            raise MedSoftError(f"{path}: this state cannot be read ({type(error).__name__}); {cure}") from error
        if run != self.run:
            raise UsageError(f"{path}: this state belongs to another run; set overwrite: true to train again")
        log.info("going on after epoch %d of the phase %s", self.history[-1]["epoch"], self.history[-1]["phase"])
        return state


def _quality(row: dict[str, Any]) -> tuple[float, float]:
    """Larger is better: the validation AUC, then the lower loss; an undefined AUC leaves the loss to decide."""
    return (round(row["val_auc"] or 0.0, 6), -row["val_loss"])


def _copy(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in network.state_dict().items()}
