"""The diagnosis classifier or segmentation: training with the epoch chosen on validation, one test, prediction."""

import dataclasses
import glob
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoints.files import detect_format, read_safetensors
from ldm.checkpoints.fitting import load_exactly
from ldm.classifier.config import SEGMENT, ClassifierConfig
from ldm.classifier.convergence import convergence, convergence_note, read_history
from ldm.classifier.data import ImageSet, class_separations, load_data, load_images, require_source
from ldm.classifier.metrics import few_patients, predicted_classes, summarise
from ldm.classifier.network import check_model, compute_outputs, pick_device
from ldm.classifier.report import Scored, map_points, prediction_rows, write_test
from ldm.classifier.segmentation import build_for_task, headline, mask_rows, outlines, summarise_masks
from ldm.classifier.segmentation_report import write_segmentation
from ldm.classifier.square import Squares, square
from ldm.classifier.training import fit
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id, fingerprint, read_json, sha256_file, unchanged, write_json
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity
from ldm.core.tables import counted, write_csv
from ldm.data.checks import TRAINED_ON, check_unseen, groups_of
from ldm.data.samples import Reject, Sample
from ldm.reviews.choice import review_settings, sentence

log = logging.getLogger(__name__)

OWN_FILES = (  # patterns of what a run writes, but for its predictions, whose names predictions.json holds
    *("last.pt", "classifier.safetensors", "epoch_*.safetensors", "history.csv", "rejects.csv", "predictions.json"),
    *("metrics.json", "metrics.csv", "metrics_epoch_*", "report.html", "report_epoch_*.html", "report*_files"),
    *("predictions_test.csv", "predictions_test_epoch_*.csv"),
)


@dataclass
class Classifier:
    """A trained network in evaluation mode, and what was saved with it."""

    network: torch.nn.Module
    info: dict[str, Any]  # config, classes (healthy first, as the outputs), epoch, run and the training summary

    def score(self, images: ImageSet, places: Sequence[int] | np.ndarray = ()) -> Scored:
        """Class probabilities of a set, and features of the images at ``places``.

        MedSoftError naming a sample whose logits are not finite.
        """
        logits, pooled = compute_outputs(self.network, images, places=places)
        return Scored(images, torch.softmax(logits.double(), 1).numpy(), pooled.numpy())

    def probabilities(self, samples: Sequence[Sample], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Class probabilities (N, K) of images (HxW or HxWx3 each) that stand in place of those of ``samples``."""
        saved = self.info["config"]
        given = saved["img_size"], saved["channels"], saved["crop"]
        found = np.stack([square(each, sample, *given) for each, sample in zip(pixels, samples, strict=True)])
        seen = Squares([found])
        blank = [""] * len(samples)
        return self.score(ImageSet("drawn", list(samples), seen, blank, blank, [{} for _ in samples], [])).probabilities


@dataclass(frozen=True)
class Judge:
    """A classifier as the judge of drawn images; ``name``: its file as given, ``sha256``: of that file."""

    classifier: Classifier
    name: str
    sha256: str

    @property
    def classes(self) -> list[str]:
        """What it may say, ``healthy`` first."""
        return self.classifier.info["classes"]

    def __call__(self, samples: Sequence[Sample], pixels: Sequence[np.ndarray]) -> list[str]:
        """The class of each image; see ``Classifier.probabilities``."""
        return [self.classes[k] for k in predicted_classes(self.classifier.probabilities(samples, pixels))]


def load_judge(weights: Path, device: str) -> Judge:
    """A saved classifier as a judge, on ``cpu`` or else on the GPU, if there is one; UsageError for a segmentation."""
    with unchanged(weights):
        classifier, digest = load_classifier(weights, "cpu" if device == "cpu" else ""), sha256_file(weights)
    if classifier.info["config"]["task"] == SEGMENT:
        raise UsageError(f"--judge {weights}: was trained with task {SEGMENT}, which names no classes")
    return Judge(classifier, str(weights), digest)


def run_classifier(config: ClassifierConfig) -> dict[str, Any]:
    """What ``classifier.py`` does: train (or reuse the saved weights), test once, predict the listed folders.

    Returns the content of metrics.json plus ``n_rejected`` and ``already_complete``.
    """
    names = _prediction_names(config.predict)
    metrics = train_classifier(config) if config.train else None
    with _run_folder(config.output).lock():
        metrics = _test_saved(config) if metrics is None else metrics
        for source, name in names.items():
            metrics["n_rejected"] += _predict_folder(config, source, name)
    return metrics


def train_classifier(config: ClassifierConfig) -> dict[str, Any]:
    """Train, choose the epoch on validation, score the test set once, write everything into ``config.output``.

    An interrupted run goes on from its last state; a complete one is only read. Raises MedSoftError for missing or
    leaking data and for non-finite numbers, UsageError when the folder holds another run and ``overwrite`` is false.
    """
    check_model(config.model, config.pretrained)  # before minutes of reading
    pretrained = content_id(config.pretrained)
    data = load_data(config)
    for images in data.sets:
        log.info("%s: %s %s", images.name, counted(len(images), "sample"), images.counts())
    settings = identity(config, "weights")
    run = fingerprint([settings, pretrained, data.fingerprint()])  # in the saved state and weights
    settings |= {"pretrained_sha256": pretrained, "training_data": data.fingerprint()}
    settings |= review_settings(data.review)
    folder, weights = _run_folder(config.output), config.output / "classifier.safetensors"
    with folder.lock():
        record = folder.open(settings, config.overwrite, legacy=run, anew=config.overwrite)
        complete = bool(record and record.get("complete"))
        if not complete:
            folder.claim()
        if not weights.exists():
            fit(config, data, run, pretrained)
        (config.output / "last.pt").unlink(missing_ok=True)  # also that of a run that was killed before it came here
        saved = load_classifier(weights, config.GPU)
        metrics = _test(config, saved, weights, data.real_sets, data.rejects, data.synthetic)
        if not complete:
            folder.finish()
    return metrics


def _run_folder(path: Path) -> RunFolder:
    """The output folder, in which other files may lie: a run's are OWN_FILES and those in predictions.json."""
    own = (*OWN_FILES, *(f"predictions_{glob.escape(name)}.csv" for name in _predicted(path)))
    return RunFolder(path, "run.json", own=own, shared=True, flag="output_dir", overwrite_flag="overwrite: true")


def _predicted(folder: Path) -> dict[str, Any]:
    """predictions.json: what has been predicted, by the name in predictions_<name>.csv; empty without it."""
    path = folder / "predictions.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise MedSoftError(f"{path}: expected a JSON object, found {type(found).__name__}; delete it to predict again")
    return found


def predict(
    weights: str | Path, source: str | Path, gpu: str | list[int] | list[str] = "", folder: Path | None = None
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Predict a dataset folder or annotation JSON with saved weights; leaves nothing on the disk of ``folder``.

    Returns the rows of predictions_*.csv (keys sample_id, patient_id, parent_id, prompt, lesion_type, severity, label,
    disease_probability, predicted, p_<class>...) and the samples that could not be read.
    """
    classifier = load_classifier(weights, gpu)
    saved = classifier.info["config"]
    if saved["task"] == SEGMENT:
        raise UsageError(f"{weights}: was trained with task {SEGMENT}, which names no classes; nothing to predict")
    sizes = (saved["img_size"], saved["task"], saved["channels"], saved["crop"])
    images = load_images(f"predict {source}", str(source), *sizes, need_label=False, folder=folder)
    return prediction_rows(images, classifier.score(images).probabilities, classifier.info["classes"]), images.rejects


def load_classifier(weights: str | Path, gpu: str | list[int] | list[str] = "") -> Classifier:
    """Read a .safetensors file that this module wrote; anything else is refused with a MedSoftError."""
    path = Path(weights)
    if not path.exists():
        raise MedSoftError(f"{path}: there is no saved classifier; run the same configuration with train: true first")
    if detect_format(path) != "safetensors":  # which also tells what else may have this name, a folder first of all
        cure = "give the classifier.safetensors of its output_dir"
        raise MedSoftError(
            f"{path}: expected a classifier that classifier.py has saved, found a checkpoint of torch; {cure}"
        )
    state, metadata = read_safetensors(path)
    try:
        info = json.loads(metadata["classifier"])
        saved, classes = {**info["config"]}, list(info["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise MedSoftError(f"{path}: not a classifier saved by classifier.py (it lacks the metadata of one)") from error
    # Keys that classifiers saved before do not have stand for what was done then, which is their default.
    saved = info["config"] = {**dataclasses.asdict(ClassifierConfig()), **saved}
    network = build_for_task(saved["task"], saved["model"], len(classes), saved["img_size"], saved["channels"])
    to = f"the model {saved['model']} as timm makes it here"
    load_exactly(network, state, path, to, "take the timm it was trained with, or train it again")
    return Classifier(network.to(pick_device(gpu)).to(memory_format=torch.channels_last).eval(), info)


def _test(
    config: ClassifierConfig,
    classifier: Classifier,
    weights: Path,
    sets: Mapping[str, ImageSet],
    rejects: Sequence[tuple[str, Reject]],
    synthetic: ImageSet | None = None,
) -> dict[str, Any]:
    """Score the test set once and write the results; read them instead where they already answer this question.

    ``sets``: the real ones by name, of which only ``test``, if there is one, is scored.
    """
    folder, info, test = config.output, classifier.info, sets.get("test")
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
    metrics = {key: value for key, value in info.items() if key not in ("config", "run", TRAINED_ON)}
    metrics = {"dataset": config.dataset, "model": info["config"]["model"], "task": info["config"]["task"], **metrics}
    few = few_patients(sets["val"]) if "val" in sets else info.get("few_validation_patients")
    found, notes = _about_training(folder, sets, few)
    notes = [sentence(info["review"]), *notes] if "review" in info else notes
    metrics |= found
    if test is None:
        metrics["notes"] = ["No test set was given.", *notes]
    elif test.masks is not None:
        outlined = outlines(classifier.network, test, folder)
        metrics.update(summarise_masks(test, test.masks, outlined, config.seed))
        metrics["notes"] += notes
        outlined_rows = mask_rows(test, test.masks, outlined)
        write_segmentation(folder, metrics, test, test.masks, outlined, outlined_rows, suffix)
    else:
        points = map_points(len(test) + (len(synthetic) if synthetic else 0))
        scored = classifier.score(test, points[points < len(test)])
        drawn = classifier.score(synthetic, points[points >= len(test)] - len(test)) if synthetic else None
        metrics.update(summarise(test, scored.probabilities, classifier.info["classes"], config.seed))
        metrics["notes"] += notes
        write_test(folder, metrics, scored, drawn, suffix)
    rows = [{"set": name, **vars(reject)} for name, reject in rejects]
    write_csv(folder / "rejects.csv", rows, ["set", "sample_id", "file", "reason"])
    metrics["evaluation"] = question
    write_json(path, metrics)
    _log_summary(folder, metrics)
    return {**metrics, "n_rejected": len(rejects), "already_complete": False}


def _about_training(folder: Path, sets: Mapping[str, ImageSet], few: str | None) -> tuple[dict[str, Any], list[str]]:
    """What metrics.json says whatever is tested: confounds in the ``sets`` by name, convergence; sentences on both.

    ``few``: what ``few_patients`` says of validation; None where nobody knows, and convergence is not judged.
    """
    separated = {name: class_separations(images) for name, images in sets.items()}
    about: dict[str, Any] = {}
    about["confounds"] = [
        {"set": name, "attribute": each.attribute, "auc": each.auc, "p_value": each.p_value, "values": each.values}
        for name, found in separated.items()
        for each in found
    ]
    notes = [
        f"{counted(images.left_out, 'synthetic sample was', 'synthetic samples were')} left out of the {name} set."
        for name, images in sets.items()
        if images.left_out
    ]
    if few:
        notes.append(f"Validation holds few patients of a class ({few}): which epoch is chosen on it is partly luck.")
    if few is not None and (history := read_history(folder)):
        about |= (trained := convergence(history, bool(few)))
        notes += [note for note in [convergence_note(trained)] if note]
    notes += [f"{name}: {each.warning}." for name, found in separated.items() for each in found if each.suspicious]
    return about, notes


def _log_summary(folder: Path, metrics: dict[str, Any]) -> None:
    log.info("epoch %d, chosen by %s", metrics["epoch"], metrics["chosen_by"])
    if metrics.get("converged"):
        log.info("training had converged: validation no longer got better")
    if "test" in metrics:
        name, found = headline(metrics)
        value = "undefined" if found["value"] is None else f"{found['value']:.3f}"
        between = f"95 % {found['low']:.3f} to {found['high']:.3f}" if found["low"] is not None else "no interval"
        counts = counted(metrics["n_test"], "sample"), metrics["n_test_diseased"]
        log.info("test %s %s (%s), %s (%d diseased)", name, value, between, *counts)
    for note in metrics["notes"]:
        log.warning("%s", note)
    log.info("results in %s; look at report.html there", folder)


def _test_saved(config: ClassifierConfig) -> dict[str, Any]:
    """``train: false``: test the saved classifier, or epoch ``test_epoch``, without training."""
    weights = _saved_weights(config)
    classifier = load_classifier(weights, config.GPU)
    saved = classifier.info["config"]
    for key in ("img_size", "model", "task", "channels", "crop"):
        if saved[key] != getattr(config, key):
            given = f"the configuration says {getattr(config, key)!r}"
            raise UsageError(f"{weights}: trained with {key} {saved[key]!r}, {given}")
    if not config.test_json:
        return {"n_rejected": 0, "already_complete": False, "classes": classifier.info["classes"]}
    sizes = (config.img_size, config.task, config.channels, config.crop)
    test = load_images("test", config.test_json, *sizes, only_real=True, folder=config.output)
    check_unseen("test_json", test.samples, groups_of(classifier.info, weights), weights)
    if unknown := sorted(set(test.labels) - set(classifier.info["classes"])):
        raise MedSoftError(f"{config.test_json}: lesion type {unknown[0]} is not a class of {weights}")
    return _test(config, classifier, weights, {"test": test}, [("test", reject) for reject in test.rejects])


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
    """Folder or JSON -> the name in its predictions_<name>.csv; missing sources and two equal names are refused."""
    names: dict[str, str] = {}
    for source in sources:
        require_source("predict", source)
        name = re.sub(r"\.jsonl?$", "", Path(source).resolve().name)
        if name in names.values() or name == "test":
            raise UsageError(f"predict: {source} would be written to predictions_{name}.csv, which is taken; rename it")
        names[source] = name
    return names


def _predict_folder(config: ClassifierConfig, source: str, name: str) -> int:
    """Write predictions_<name>.csv; returns how many samples were rejected."""
    record, path = _predicted(config.output), config.output / f"predictions_{name}.csv"
    where = os.path.abspath(source)
    if name not in record and path.exists():
        raise UsageError(f"{path}: was not written by this command; rename it, or {source}")
    if record.get(name, {}).get("source", where) != where and not config.overwrite:
        known = record[name]["source"]
        raise UsageError(f"predictions_{name}.csv already holds {known}; rename {source}, or set overwrite")
    rows, rejects = predict(_saved_weights(config), source, config.GPU, config.output)
    diseased = sum(row["predicted"] != "healthy" for row in rows)
    rejected = [{**vars(reject), "file": str(reject.file)} for reject in rejects]
    record[name] = {"source": where, "n": len(rows), "n_called_diseased": diseased, "rejected": rejected}
    write_json(config.output / "predictions.json", record)  # first: the table is then known as this command's
    write_csv(path, rows)
    log.info("%s: %d of %d called diseased", source, diseased, len(rows))
    return len(rejects)
