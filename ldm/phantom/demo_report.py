"""The demo's numbers and images in one place: summary.json, report.html and sheet.png. No torch.

Only what the steps of configs/demo.yaml have left in the folder is read; no network computes anything here.
"""

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, write_json
from ldm.core.run_folder import RunFolder
from ldm.core.tables import read_table
from ldm.data.samples import Sample
from ldm.reports.comparison import facts, interleave, read_all_results, read_result, write_cards, write_sheet
from ldm.reports.figures import loss_figure, roc_figure, validation_figure
from ldm.reports.html import number, write_image, write_page

log = logging.getLogger(__name__)

COARSE = ("moderate", "severe")
MINUTES = 15
STAGES = ("stage1", "unet_only", "stage2_1", "stage2_2")
SHOWN, CONTROLS = 24, 6
RESULTS = {"results": "draw", "results_healthy": "redraw_healthy", "results_base": "draw_base"}  # folder -> its step
PARENTS = "openimages_format_train"
CLASSIFIER_ROWS = (
    *("auc", "auc_ci95", "average_precision", "balanced_accuracy", "recall", "specificity", "precision", "f1"),
    *("n_train_healthy", "n_train_diseased", "n_synthetic_used", "n_test", "n_test_diseased", "epoch"),
)


def report_demo(folder: Path) -> None:
    """Read what the demo's steps left in ``folder``, write report.html and sheet.png there, then summary.json.

    MedSoftError names the step to run for whatever is missing or does not fit.
    """
    inputs = read_inputs(folder)
    summary = summarise(inputs)
    with RunFolder(folder, "summary.json").lock(wait=True):
        write_report(inputs, summary)
        write_json(folder / "summary.json", summary)
    for key, (limit, _) in bars(summary).items():
        verdict = "MISSED" if key in summary["missed"] else "met"
        log.info("%-32s %-8s expected %s: %s", key, _shown(summary, key), limit, verdict)
    aucs = number(summary["auc_real"]), number(summary["auc_augmented"])
    log.info("AUC with real images only %s, with synthetic ones too %s", *aucs)
    log.info("report in %s", folder / "report.html")


def _shown(summary: Mapping[str, Any], key: str) -> str:
    return f"{summary[key]:.1f}" if key == "minutes" else number(summary[key])


Key = tuple[str | None, Any]  # (parent_id, variant) of a synthetic image


@dataclass(frozen=True)
class Verdict:
    """What the judge says about one image.

    ``diseased``: of all its classes the most probable one is a lesion; ``lesion_type``: the most probable lesion,
    ``healthy`` left aside; ``probability``: of all lesions together.
    """

    diseased: bool
    lesion_type: str
    probability: float


@dataclass
class Inputs:
    """Everything that is read. Synthetic samples have one ``Key`` in all three folders of results."""

    folder: Path
    judge: dict[str, Any]
    classifiers: dict[str, dict[str, Any]]
    test_rows: dict[str, list[dict[str, str]]]
    seconds: dict[str, float]
    samples: dict[str, dict[Key, Sample]] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Verdict]] = field(default_factory=dict)  # by predicted set, then sample_id
    heldout: list[dict[str, str]] = field(default_factory=list)

    def verdict(self, folder: str, key: Key) -> Verdict:
        """The judge's verdict on a synthetic image."""
        name = self.samples[folder][key].sample_id
        return _look_up(self.verdicts[folder], name, f"predictions_{folder}.csv", "judge")

    def parent(self, key: Key) -> Verdict:
        """The judge's verdict on the original of a synthetic image."""
        return _look_up(self.verdicts[PARENTS], key[0], f"predictions_{PARENTS}.csv", "judge")


def _look_up(known: Mapping[Any, Any], key: Hashable, where: str, step: str) -> Any:
    if key not in known:
        raise MedSoftError(f"{where}: holds nothing about {key}; {_again(step)}")
    return known[key]


def _again(step: str) -> str:
    return f"run the step {step}: python tool/run_stages.py configs/demo.yaml --only {step}"


def _need(path: Path, step: str) -> Path:
    if not path.exists():
        raise MedSoftError(f"{path}: does not exist; {_again(step)}")
    return path


def read_inputs(folder: Path) -> Inputs:
    """Read what the report needs from the demo's folder; MedSoftError naming the step to run for what is missing."""

    def classifier(name: str, step: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
        metrics = read_json(_need(folder / name / "metrics.json", step))
        if "test" not in metrics:
            raise MedSoftError(f"{folder / name / 'metrics.json'}: holds no test numbers; {_again(step)}")
        columns = ("label", "disease_probability")
        rows = read_table(_need(folder / name / "predictions_test.csv", step), columns, "predictions")
        return _with_test_numbers(metrics), rows

    if not (folder / "stages.json").exists():
        run = "run the demo: python tool/run_stages.py configs/demo.yaml"
        raise MedSoftError(f"{folder / 'stages.json'}: does not exist; {run}")
    record = read_json(folder / "stages.json")
    seconds = {step["name"]: step["seconds"] for step in record["steps"]}
    judge, _ = classifier("classifier_judge", "judge")
    both = {name: classifier(f"classifier_{name}", f"classifier_{name}") for name in ("real", "augmented")}
    metrics = {name: values for name, (values, _) in both.items()}
    inputs = Inputs(folder, judge, metrics, {name: rows for name, (_, rows) in both.items()}, seconds)
    for stage in STAGES:
        _need(folder / stage / "metrics.csv", stage)
    for name in (*RESULTS, PARENTS, "heldout"):
        path = _need(folder / "classifier_judge" / f"predictions_{name}.csv", "judge")
        rows = read_table(path, ("sample_id", "predicted", "disease_probability", "p_healthy"), "predictions")
        inputs.verdicts[name] = {row["sample_id"]: _verdict(row) for row in rows}
        if name == "heldout":
            inputs.heldout = rows
    for name, step in RESULTS.items():
        samples = read_all_results(_need(folder / name, step))
        inputs.samples[name] = {(sample.parent_id, sample.meta.get("variant")): sample for sample in samples}
    _check_pairs(inputs)
    return inputs


def _with_test_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The file's content with its test numbers by name, and the interval of the AUC as ``auc_ci95``."""
    auc = metrics["test"]["auc"]
    interval = None if auc["low"] is None else [auc["low"], auc["high"]]
    return {**metrics, **{name: entry["value"] for name, entry in metrics["test"].items()}, "auc_ci95": interval}


def _verdict(row: dict[str, str]) -> Verdict:
    lesions = {key[2:]: float(value) for key, value in row.items() if key.startswith("p_") and key != "p_healthy"}
    likeliest = max(lesions, key=lambda name: lesions[name])
    return Verdict(row["predicted"] != "healthy", likeliest, float(row["disease_probability"]))


def _check_pairs(inputs: Inputs) -> None:
    """MedSoftError unless both controls hold the same images, inpainted with the prompts they are controls for."""
    for key, sample in inputs.samples["results"].items():
        healthy = _look_up(inputs.samples["results_healthy"], key, "results_healthy", "redraw_healthy")
        base = _look_up(inputs.samples["results_base"], key, "results_base", "draw_base")
        if not healthy.healthy:
            wrong = f"drawn with {healthy.prompt!r}, expected healthy"
            raise MedSoftError(f"{healthy.image}: {wrong}; {_again('redraw_healthy')}")
        if base.prompt != sample.prompt:
            wrong = f"drawn with {base.prompt!r}, expected {sample.prompt!r}"
            raise MedSoftError(f"{base.image}: {wrong}; {_again('draw_base')}")


def rate(values: Iterable[bool]) -> float | None:
    """The share of true values; None of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def summarise(inputs: Inputs) -> dict[str, Any]:
    """The numbers of summary.json. Rates are over prompts of moderate and severe lesions; subtle ones stand beside."""
    results = inputs.samples["results"]
    coarse = [key for key, sample in results.items() if sample.severity in COARSE]
    subtle = [key for key, sample in results.items() if sample.severity == "subtle"]
    if not coarse:
        raise MedSoftError(f"{inputs.folder / 'results'}: holds no moderate or severe lesion; {_again('draw')}")
    named = [inputs.verdict("results_base", key).lesion_type for key in coarse]
    chance = chance_agreement([results[key].lesion_type for key in coarse], named)
    every = [sample for samples in inputs.samples.values() for sample in samples.values()]
    parents = {key[0]: inputs.parent(key).diseased for key in coarse}
    summary = {
        "n_pictures": len(results),
        "n_moderate_severe": len(coarse),
        "n_subtle": len(subtle),
        "lesion_detection_rate": _detection_rate(inputs, "results", coarse),
        "parent_detection_rate": rate(parents.values()),
        "healthy_redraw_detection_rate": _detection_rate(inputs, "results_healthy", coarse),
        "prompt_agreement": _type_agreement(inputs, "results", coarse),
        "base_detection_rate": _detection_rate(inputs, "results_base", coarse),
        "base_prompt_agreement": _type_agreement(inputs, "results_base", coarse),
        "chance_agreement": chance,
        "base_agreement_limit": chance + 1.96 * math.sqrt(chance * (1 - chance) / len(coarse)),
        "subtle_detection_rate": _detection_rate(inputs, "results", subtle),
        "subtle_prompt_agreement": _type_agreement(inputs, "results", subtle),
        # Counted from the files of all three folders, not taken from what dataset_infer.py reports.
        "changed_outside_pixels": sum(
            read_result(s).changed_outside for s in tqdm(every, "comparing pixels", disable=None)
        ),
        "auc_real": inputs.classifiers["real"].get("auc"),
        "auc_augmented": inputs.classifiers["augmented"].get("auc"),
        "n_synthetic": inputs.classifiers["augmented"]["n_synthetic_used"],
        "minutes": round(sum(inputs.seconds.values()) / 60, 2),
        "judge": _judge_numbers(inputs),
        "by_type": _by_type(inputs, coarse),
        "classifiers": {
            name: {key: metrics.get(key) for key in CLASSIFIER_ROWS} for name, metrics in inputs.classifiers.items()
        },
    }
    summary["missed"] = [key for key, (_, met) in bars(summary).items() if not met(summary[key])]
    return summary


def bars(summary: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What each number must reach, as text and as a test. The AUCs have no bar: any value of theirs is a result."""
    limit = summary["base_agreement_limit"]
    return {
        "lesion_detection_rate": ("at least 0.90", lambda value: value >= 0.90),
        "parent_detection_rate": ("at most 0.10", lambda value: value <= 0.10),
        "healthy_redraw_detection_rate": ("at most 0.20", lambda value: value <= 0.20),
        "prompt_agreement": ("at least 0.75", lambda value: value >= 0.75),
        "base_prompt_agreement": (f"chance, at most {limit:.3f}", lambda value: value <= limit),
        "changed_outside_pixels": ("0", lambda value: value == 0),
        "minutes": (f"at most {MINUTES}", lambda value: value <= MINUTES),
    }


def chance_agreement(prompted: Sequence[str | None], named: Sequence[str]) -> float:
    """Expected agreement if what the judge names had nothing to do with the prompt: sum over types of both shares."""
    return sum(prompted.count(kind) * named.count(kind) for kind in set(prompted)) / (len(prompted) * len(named))


def _detection_rate(inputs: Inputs, folder: str, keys: Sequence[Key]) -> float | None:
    return rate(inputs.verdict(folder, key).diseased for key in keys)


def _type_agreement(inputs: Inputs, folder: str, keys: Sequence[Key]) -> float | None:
    """How often the judge's most probable lesion type, healthy left aside, is the one of the prompt."""
    return rate(inputs.verdict(folder, key).lesion_type == inputs.samples["results"][key].lesion_type for key in keys)


def _judge_numbers(inputs: Inputs) -> dict[str, Any]:
    """How good the judge is on real phantoms: its own test set, and the moderate and severe held-out ones."""
    diseased = [row for row in inputs.heldout if row.get("severity") in COARSE]
    healthy = [row for row in inputs.heldout if row.get("label") == "healthy"]
    verdicts = inputs.verdicts["heldout"]
    return {
        **{f"test_{key}": inputs.judge.get(key) for key in ("auc", "auc_ci95", "type_accuracy", "macro_auc")},
        "n_test": inputs.judge.get("n_test"),
        "heldout_detection_rate": rate(verdicts[row["sample_id"]].diseased for row in diseased),
        "heldout_type_agreement": rate(verdicts[r["sample_id"]].lesion_type == r.get("lesion_type") for r in diseased),
        "heldout_false_alarm_rate": rate(verdicts[row["sample_id"]].diseased for row in healthy),
    }


def _by_type(inputs: Inputs, coarse: Sequence[Key]) -> dict[str, dict[str, Any]]:
    results = inputs.samples["results"]
    kinds = sorted({results[key].lesion_type or "unknown" for key in coarse})
    groups = {kind: [key for key in coarse if (results[key].lesion_type or "unknown") == kind] for kind in kinds}
    return {
        kind: {
            "n": len(keys),
            "detection_rate": _detection_rate(inputs, "results", keys),
            "prompt_agreement": _type_agreement(inputs, "results", keys),
            "healthy_redraw_detection_rate": _detection_rate(inputs, "results_healthy", keys),
            "base_detection_rate": _detection_rate(inputs, "results_base", keys),
            "base_prompt_agreement": _type_agreement(inputs, "results_base", keys),
        }
        for kind, keys in groups.items()
    }


def write_report(inputs: Inputs, summary: Mapping[str, Any]) -> None:
    """Write report.html with its images, and sheet.png."""
    path, results = inputs.folder / "report.html", inputs.samples["results"]
    coarse = [sample for sample in results.values() if sample.severity in COARSE]
    columns = list(next(iter(summary["by_type"].values())))
    type_rows = [[lesion, *(row[column] for column in columns)] for lesion, row in summary["by_type"].items()]
    total = sum(inputs.seconds.values())
    write_sheet(inputs.folder / "sheet.png", [read_result(sample) for sample in interleave(coarse, CONTROLS)])
    write_page(
        path,
        "demo",
        summary=summary,
        bars=[(key, _shown(summary, key), limit) for key, (limit, _) in bars(summary).items()],
        samples=write_cards(path, "sample", _sample_cards(inputs)),
        controls=write_cards(path, "control", _control_cards(inputs, coarse)),
        type_table=(["lesion type", *(column.replace("_", " ") for column in columns)], type_rows),
        judge_rows=[[key, _interval(value)] for key, value in summary["judge"].items()],
        time_rows=[[name, f"{each:.1f}"] for name, each in [*inputs.seconds.items(), ("total", total)]],
        **_training_plots(inputs, path),
        **_classifiers(inputs, path),
    )


def _sample_cards(inputs: Inputs) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    for sample in interleave(list(inputs.samples["results"].values()), SHOWN):
        image = read_result(sample)
        verdict = inputs.verdict("results", (sample.parent_id, sample.meta.get("variant")))
        judge = f"{verdict.lesion_type}, P(disease) {verdict.probability:.2f}"
        yield sample.prompt, image.panels(), {**facts(image), "judge": judge}


def _control_cards(
    inputs: Inputs, coarse: Sequence[Sample]
) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    for sample in interleave(coarse, CONTROLS):
        key = (sample.parent_id, sample.meta.get("variant"))
        panels = {name: read_result(inputs.samples[name][key]).panels() for name in RESULTS}
        images = {"original": panels["results"]["original"]}
        probabilities = {"P(disease) original": f"{inputs.parent(key).probability:.2f}"}
        for title, name in zip(("with the prompt", "with healthy", "base model"), RESULTS, strict=True):
            images[title] = panels[name]["result"]
            probabilities[title] = f"{inputs.verdict(name, key).probability:.2f}"
        yield sample.prompt, images, probabilities


def _training_plots(inputs: Inputs, path: Path) -> dict[str, Any]:
    columns = ("epoch", "train_loss", "val_loss")
    stages = {stage: read_table(inputs.folder / stage / "metrics.csv", columns, "training log") for stage in STAGES}
    whole = write_image(path, "validation", validation_figure(stages))
    figures = {stage: loss_figure(rows, stage) for stage, rows in stages.items()}
    plots = {f"loss of {stage}": write_image(path, f"loss_{stage}", figure) for stage, figure in figures.items()}
    return {"validation_plot": whole, "loss_plots": plots}


def _classifiers(inputs: Inputs, path: Path) -> dict[str, Any]:
    names = {"real": "real images only", "augmented": "with synthetic images"}
    curves = {
        names[name]: ([row["label"] != "healthy" for row in rows], [float(row["disease_probability"]) for row in rows])
        for name, rows in inputs.test_rows.items()
    }
    rows = [[key, *(_interval(inputs.classifiers[name].get(key)) for name in names)] for key in CLASSIFIER_ROWS]
    return {"classifier_rows": rows, "roc_plot": write_image(path, "roc", roc_figure(curves))}


def _interval(value: Any) -> Any:
    return f"{value[0]:.3f} to {value[1]:.3f}" if isinstance(value, list) else value
