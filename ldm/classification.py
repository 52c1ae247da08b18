"""The diagnosis classifier: training with the epoch chosen on validation, one test, prediction."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ldm.annotations import Reject
from ldm.classifier_data import ClassifierConfig, Data, ImageSet, load_config, load_data, load_images
from ldm.classifier_network import augment, build_network, compute_logits, normalise, pick_device, to_input
from ldm.classifier_report import REJECT_COLUMNS, macro_auc, measure, prediction_rows, write_csv, write_test
from ldm.devices import autocast
from ldm.errors import MedSoftError, UsageError
from ldm.files import (
    atomic_file,
    fingerprint,
    named_seed,
    read_json,
    remove_partials,
    sha256_file,
    write_json,
)

__all__ = ["ClassifierConfig", "load_classifier", "load_config", "predict", "run_classifier", "train_classifier"]

log = logging.getLogger(__name__)

STATE_EVERY_SECONDS = 30.0  # a state of a whole run is large: a run shorter than this is simply started again
OWN_FILES = (  # patterns of everything a run writes, and of what --overwrite removes
    *("run.json", "last.pt", "classifier.safetensors", "epoch_*.safetensors", "history.csv", "rejects.csv"),
    *("metrics.json", "metrics.csv", "roc.png", "metrics_epoch_*", "roc_epoch_*"),
    *("predictions_*.csv", "predictions.json"),
)
# The weights do not depend on these; what the dataset paths lead to is in the data's fingerprint.
IGNORED_KEYS = ("GPU", "overwrite", "predict", "train", "dataset", "output_dir")
IGNORED_KEYS += ("train_json", "val_json", "test_json", "synthetic")


@dataclass
class Classifier:
    """A trained network in evaluation mode, and what was saved with it."""

    network: torch.nn.Module
    info: dict[str, Any]  # config, classes, epoch, run (fingerprint) and the training summary
    device: torch.device

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the outputs, healthy first."""
        return self.info["classes"]

    def probabilities(self, images: ImageSet, batch_size: int = 64) -> np.ndarray:
        """Softmax of the logits, float64 (N, K); raises MedSoftError naming a sample whose logits are not finite."""
        logits = compute_logits(self.network, images, batch_size, self.device)
        return torch.softmax(logits.double(), 1).numpy()


# --- public operations ------------------------------------------------------------------------------------------


def run_classifier(config: ClassifierConfig) -> dict[str, Any]:
    """What ``classifier.py`` does: train (or reuse the saved weights), test once, predict the listed folders.

    Returns the content of metrics.json plus ``n_rejected`` and ``already_complete``.
    """
    metrics = train_classifier(config) if config.train else _test_saved(config)
    for source, name in _prediction_names(config.predict).items():
        metrics["n_rejected"] += _predict_folder(config, source, name)
    return metrics


def train_classifier(config: ClassifierConfig) -> dict[str, Any]:
    """Train, choose the epoch on validation, score the test set once, write everything into ``config.output``.

    An interrupted run goes on from its last state; a complete one is only read. Raises MedSoftError for missing or
    leaking data and for non-finite numbers, UsageError when the folder holds another run and ``overwrite`` is false.
    """
    folder = config.output
    data = load_data(config)
    for images in (data.train, data.synthetic, data.val, data.test):
        if images is not None:
            log.info("%s: %d samples %s", images.name, len(images), images.counts())
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in IGNORED_KEYS}
    run = fingerprint([settings, data.fingerprint()])
    _claim(config, settings, run)
    weights = folder / "classifier.safetensors"
    if not weights.exists():
        with _reproducible():
            Trainer(config, data, run).fit()
    return _test(config, load_classifier(weights, config.GPU), weights, data.test, data.rejects)


def predict(
    weights: str | Path, source: str | Path, batch_size: int = 64, gpu: str | list[int] | list[str] = ""
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Predict a dataset folder or annotation JSON with saved weights; writes nothing.

    Returns the rows of predictions_*.csv (keys sample_id, patient_id, parent_id, prompt, lesion_type, severity, label,
    disease_probability, predicted, p_<class>...) and the samples that could not be read.
    """
    classifier = load_classifier(weights, gpu)
    saved = classifier.info["config"]
    images = load_images(f"predict {source}", str(source), saved["img_size"], saved["task"], need_label=False)
    rows = prediction_rows(images, classifier.probabilities(images, batch_size), classifier.classes)
    return rows, images.rejects


def load_classifier(weights: str | Path, gpu: str | list[int] | list[str] = "") -> Classifier:
    """Read a .safetensors file that this module wrote; anything else is refused with a MedSoftError."""
    from safetensors import SafetensorError, safe_open

    path = Path(weights)
    if not path.is_file():
        raise MedSoftError(f"{path}: there is no saved classifier; run the same configuration with train: true first")
    try:
        with safe_open(path, "pt") as handle:
            info = json.loads((handle.metadata() or {})["classifier"])
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise MedSoftError(
            f"{path}: not a classifier saved by classifier.py ({type(error).__name__}: {error})"
        ) from error
    network = build_network(info["config"]["model"], len(info["classes"]))
    network.load_state_dict(state)
    device = pick_device(gpu)
    return Classifier(network.to(device, memory_format=torch.channels_last).eval(), info, device)


# --- training ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reproducible() -> Any:
    """Same seed, same result: deterministic kernels; the caller's random state is put back."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Loss weight of each class (K,): half of the total for healthy (class 0), the other half for the lesion types
    in equal parts. However many types there are, an undecided network then says healthy and diseased equally often."""
    shares = torch.full((n_classes,), 0.5 / (n_classes - 1))
    shares[0] = 0.5
    return len(labels) * shares / torch.bincount(labels, minlength=n_classes)


class Trainer:
    """One training run. Order, augmentation and initial weights are functions of (seed, epoch, sample), so a resumed
    run computes what an unbroken one would."""

    def __init__(self, config: ClassifierConfig, data: Data, run: str) -> None:
        self.config, self.data, self.run = config, data, run
        self.folder = config.output
        extra = data.synthetic
        sets = [data.train, *([extra] if extra else [])]
        self.images = np.concatenate([images.images for images in sets])
        self.names = [f"{images.name}/{sample.sample_id}" for images in sets for sample in images.samples]
        self.labels = torch.tensor([data.classes.index(label) for images in sets for label in images.labels])
        self.val_labels = torch.tensor([data.classes.index(label) for label in data.val.labels])
        self.device = pick_device(config.GPU)
        self.class_weights = class_weights(self.labels, len(data.classes)).to(self.device)
        torch.manual_seed(named_seed(config.seed, "weights"))
        network = build_network(config.model, len(data.classes), config.pretrained)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.n_batches = math.ceil(len(self.labels) / config.Batch_Size)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # the chosen epoch so far: its history row and weights

    def fit(self) -> None:
        """Train what is missing, then write history.csv and classifier.safetensors (last: the sign of completion)."""
        self._resume()
        saved = time.monotonic()
        for epoch in range(len(self.history) + 1, self.config.EPOCHS + 1):
            train_loss = self._epoch(epoch)
            val_loss, val_auc = self._validate()
            row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "val_auc": val_auc}
            self.history.append(row)
            shown = "undefined" if val_auc is None else f"{val_auc:.3f}"
            log.info(
                "epoch %d/%d: train %.4f, val %.4f, val AUC %s", epoch, self.config.EPOCHS, train_loss, val_loss, shown
            )
            if self._is_chosen(row):
                self.best = {"row": row, "weights": _copy(self.network)}
            if self.config.save_epoch and epoch % self.config.save_epoch == 0:
                self._save(self.folder / f"epoch_{epoch}.safetensors", row, _copy(self.network))
            if epoch < self.config.EPOCHS and time.monotonic() - saved >= STATE_EVERY_SECONDS:
                self._save_state()
                saved = time.monotonic()
        write_csv(self.folder / "history.csv", self.history)
        self._save(self.folder / "classifier.safetensors", self.best["row"], self.best["weights"])
        (self.folder / "last.pt").unlink(missing_ok=True)

    def _epoch(self, epoch: int) -> float:
        from tqdm import tqdm

        seed, total = self.config.seed, 0.0
        keys = [named_seed(seed, "order", epoch, name) for name in self.names]
        torch.manual_seed(named_seed(seed, "dropout", epoch))
        self.network.train()
        batches = np.array_split(np.argsort(keys, kind="stable"), self.n_batches)  # equal sizes: never a batch of one
        for number, rows in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=None)):
            self._set_rate((epoch - 1) * self.n_batches + number)
            draws = [
                np.random.default_rng(named_seed(seed, "augment", epoch, self.names[i])).uniform(-1, 1, 6) for i in rows
            ]
            inputs = normalise(augment(to_input(self.images[rows], self.device), np.array(draws)))
            targets = self.labels[torch.from_numpy(rows)].to(self.device)
            with autocast(self.device):
                logits = self.network(inputs)
            loss = F.cross_entropy(logits.float(), targets, weight=self.class_weights)
            if not torch.isfinite(loss):
                names = ", ".join(self.names[i] for i in rows[:4])
                raise MedSoftError(
                    f"epoch {epoch}, step {number}: the loss is not finite (samples {names}...); lower lr"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(rows)
        return total / len(self.labels)

    def _set_rate(self, step: int) -> None:
        """Linear warm-up over the first twentieth of all steps, then cosine to zero."""
        steps = self.config.EPOCHS * self.n_batches
        warm = max(1, steps // 20)
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate

    def _validate(self) -> tuple[float, float | None]:
        logits = compute_logits(self.network, self.data.val, 128, self.device)
        loss = float(F.cross_entropy(logits, self.val_labels, weight=self.class_weights.cpu()))
        if math.isnan(loss):
            raise MedSoftError("the validation loss is not a number; lower lr")
        return loss, macro_auc(self.val_labels.numpy(), torch.softmax(logits.double(), 1).numpy())

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

    def _save(self, path: Path, row: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        diseased = sum(label != "healthy" for label in self.data.train.labels)
        info = {
            "config": {k: v for k, v in dataclasses.asdict(self.config).items() if k not in ("overwrite", "predict")},
            "classes": self.data.classes,
            "run": self.run,
            "epoch": row["epoch"],
            "chosen_by": self._chosen_by if path.name == "classifier.safetensors" else "test_epoch",
            "train_loss": row["train_loss"],
            "val_loss": row["val_loss"],
            "val_auc": row["val_auc"],
            "n_train_healthy": len(self.data.train) - diseased,
            "n_train_diseased": diseased,
            "n_synthetic": len(self.data.synthetic) if self.data.synthetic else 0,
            "n_val": len(self.data.val),
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
            torch.save(state, handle)

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history, self.best, run = state["history"], state["best"], state["run"]
        except Exception as error:
            cure = "delete it to train from the start"
            raise MedSoftError(f"{path}: this state cannot be read ({type(error).__name__}); {cure}") from error
        if run != self.run:
            raise UsageError(f"{path}: this state belongs to another run; set overwrite: true to train again")
        log.info("going on after epoch %d", len(self.history))


def _quality(row: dict[str, Any]) -> tuple[float, float]:
    """Larger is better: the validation AUC, then the lower loss; an undefined AUC leaves the loss to decide."""
    return (round(row["val_auc"] or 0.0, 6), -row["val_loss"])


def _copy(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in network.state_dict().items()}


# --- output folder ----------------------------------------------------------------------------------------------


def _claim(config: ClassifierConfig, settings: dict[str, Any], run: str) -> None:
    """Make the output folder this run's: go on in it, clear it with ``overwrite``, or raise UsageError."""
    folder = config.output
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder for the results, found a file; set output_dir elsewhere")
    remove_partials(folder)
    present = [path for pattern in OWN_FILES for path in sorted(folder.glob(pattern))]
    if present and not config.overwrite:
        if not (folder / "run.json").exists():
            raise UsageError(
                f"{present[0]}: already exists; set output_dir elsewhere, or overwrite: true to replace it"
            )
        old = read_json(folder / "run.json")
        if old.get("run") == run:
            return
        before = old.get("settings", {})
        changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v]
        what = ", ".join(changed) or "the training data have changed"
        raise UsageError(
            f"{folder}: holds another run ({what}); set output_dir elsewhere, or overwrite: true to replace it"
        )
    for path in present:
        path.unlink()
    write_json(folder / "run.json", {"run": run, "settings": settings})


def _test(
    config: ClassifierConfig,
    classifier: Classifier,
    weights: Path,
    test: ImageSet | None,
    rejects: Sequence[tuple[str, Reject]],
) -> dict[str, Any]:
    """Score the test set once and write the results; read them instead where they already answer this question."""
    folder, info = config.output, classifier.info
    suffix = "" if config.train or config.test_epoch is None else f"_epoch_{config.test_epoch}"
    path = folder / f"metrics{suffix}.json"
    question = fingerprint([sha256_file(weights), test.fingerprint() if test else None, config.dataset, config.seed])
    if path.exists() and not (config.overwrite and not config.train):
        old = read_json(path)
        if old.get("evaluation") == question:
            log.info("%s: already complete", folder)
            return {**old, "n_rejected": len(rejects), "already_complete": True}
        if not config.overwrite:
            raise UsageError(f"{path}: holds the results of another test; set overwrite: true to replace them")
    path.unlink(missing_ok=True)  # until everything beside it is new
    metrics = {key: value for key, value in info.items() if key not in ("config", "run")}
    metrics = {"dataset": config.dataset, "model": info["config"]["model"], "task": info["config"]["task"], **metrics}
    if test is None:
        metrics["notes"] = ["No test set was given."]
    else:
        probabilities = classifier.probabilities(test)
        metrics.update(measure(test, probabilities, classifier.classes, config.seed))
        write_test(folder, test, probabilities, metrics, config.dataset, suffix)
    write_csv(
        folder / "rejects.csv",
        [{"set": n, "sample_id": r.sample_id, "file": str(r.file), "reason": r.reason} for n, r in rejects],
        REJECT_COLUMNS,
    )
    metrics["evaluation"] = question
    write_json(path, metrics)
    _tell(folder, metrics)
    return {**metrics, "n_rejected": len(rejects), "already_complete": False}


def _tell(folder: Path, metrics: dict[str, Any]) -> None:
    log.info("epoch %d, chosen by %s", metrics["epoch"], metrics["chosen_by"])
    if "auc" in metrics:
        value = "undefined" if metrics["auc"] is None else f"{metrics['auc']:.3f}"
        log.info("test AUC %s, %d samples (%d diseased)", value, metrics["n_test"], metrics["n_test_diseased"])
    for note in metrics["notes"]:
        log.warning("%s", note)
    log.info("results in %s", folder)


def _test_saved(config: ClassifierConfig) -> dict[str, Any]:
    """``train: false``: test the saved classifier, or epoch ``test_epoch``, without training."""
    weights = _saved_weights(config)
    classifier = load_classifier(weights, config.GPU)
    saved = classifier.info["config"]
    for key in ("img_size", "model", "task"):
        if saved[key] != getattr(config, key):
            raise UsageError(
                f"{weights}: trained with {key} {saved[key]!r}, the configuration says {getattr(config, key)!r}"
            )
    if not config.test_json:
        return {"n_rejected": 0, "already_complete": False, "classes": classifier.classes}
    test = load_images("test", config.test_json, config.img_size, config.task)
    unknown = sorted(set(test.labels) - set(classifier.classes))
    if unknown:
        raise MedSoftError(f"{config.test_json}: lesion type {unknown[0]} is not a class of {weights}")
    return _test(config, classifier, weights, test, [("test", reject) for reject in test.rejects])


def _saved_weights(config: ClassifierConfig) -> Path:
    folder = config.output
    chosen = folder / "classifier.safetensors"
    if config.test_epoch is None:
        return chosen
    path = folder / f"epoch_{config.test_epoch}.safetensors"
    if path.exists():
        return path
    if chosen.exists() and load_classifier(chosen, "cpu").info["epoch"] == config.test_epoch:
        return chosen
    epochs = sorted(int(p.stem[6:]) for p in folder.glob("epoch_*.safetensors") if p.stem[6:].isdigit())
    raise MedSoftError(f"{path}: epoch {config.test_epoch} was not saved (saved: {epochs or 'none'}); see save_epoch")


def _prediction_names(sources: Sequence[str]) -> dict[str, str]:
    """Folder or JSON -> the name in its predictions_<name>.csv; two equal names are refused."""
    names: dict[str, str] = {}
    for source in sources:
        name = Path(source).resolve().name.removesuffix(".json")
        if name in names.values() or name == "test":
            raise UsageError(f"predict: {source} would be written to predictions_{name}.csv, which is taken; rename it")
        names[source] = name
    return names


def _predict_folder(config: ClassifierConfig, source: str, name: str) -> int:
    """Write predictions_<name>.csv; returns how many samples were rejected."""
    rows, rejects = predict(_saved_weights(config), source, gpu=config.GPU)
    record_path = config.output / "predictions.json"
    record = read_json(record_path) if record_path.exists() else {}
    where = os.path.abspath(source)
    if record.get(name, {}).get("source", where) != where and not config.overwrite:
        raise UsageError(
            f"predictions_{name}.csv already holds {record[name]['source']}; rename {source}, or set overwrite"
        )
    diseased = sum(row["predicted"] != "healthy" for row in rows)
    write_csv(config.output / f"predictions_{name}.csv", rows)
    record[name] = {
        "source": where,
        "n": len(rows),
        "n_called_diseased": diseased,
        "rejected": [{"sample_id": r.sample_id, "file": str(r.file), "reason": r.reason} for r in rejects],
    }
    write_json(record_path, record)
    log.info("%s: %d of %d called diseased", source, diseased, len(rows))
    return len(rejects)
