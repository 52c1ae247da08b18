"""The demo's numbers and images in one place: summary.json, report.html and sheet.png. No torch.

Only what the steps of configs/demo.yaml, or of a plan with steps of the same names, have left in the folder is read;
no network computes anything here.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ldm.classifier.report import shown_name
from ldm.config import stage_configs
from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, write_json
from ldm.core.paths import SHIPPED
from ldm.core.run_folder import RunFolder
from ldm.core.tables import read_table
from ldm.data.samples import Sample
from ldm.evaluation.drawings import JudgedImage, verdict_of
from ldm.evaluation.information import asked_drawn, information_text
from ldm.reports.comparison import facts, interleave, read_all_results, read_result, write_cards, write_sheet
from ldm.reports.figures import loss_figure, validation_figure
from ldm.reports.html import number, write_image, write_page
from ldm.workflow.plans import load_plan
from ldm.workflow.study_results import SHARE, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

COARSE = ("moderate", "severe")
MINUTES = {"demo": 15}  # what the steps of a plan may take together
SHOWN, CONTROLS = 24, 6
RESULTS = {"results": "draw", "results_healthy": "redraw_healthy", "results_base": "draw_base"}  # folder -> its step
PARENTS = "openimages_format_train"
# Arms of the classifier, each trained with several seeds by a step classifier_<name>, if the plan has it.
ARMS = {"real": "real images only", "duplicated": "with real ones repeated", "augmented": "with synthetic ones"}
CLASSIFIER_ROWS = ("auc", "average_precision", "balanced_accuracy", "recall", "specificity", "precision", "f1")
COUNTS = ("n_train_healthy", "n_train_diseased", "n_duplicated", "n_synthetic_used", "n_test", "n_test_diseased")


def report_demo(folder: Path, plan: Path) -> None:
    """Read what the steps of ``plan`` left in ``folder``, write report.html and sheet.png there, then summary.json.

    MedSoftError names the step to run for whatever is missing or does not fit.
    """
    inputs = read_inputs(Source(folder, plan))
    summary = summarise(inputs)
    with RunFolder(folder, "summary.json").lock(wait=True):
        write_report(inputs, summary)
        write_json(folder / "summary.json", summary)
    for key, (limit, _) in bars(summary).items():
        verdict = "MISSED" if key in summary["missed"] else "met"
        log.info("%-32s %-8s expected %s: %s", key, _shown(summary, key), limit, verdict)
    for arm, values in summary["classifiers"].items():
        log.info("test AUC %s: %s", ARMS[arm], _shown_interval(values["auc"]))
    for pair, change in summary["auc_differences"].items():
        log.info("test AUC, %s: %s", pair, _shown_interval(change, "+"))
    log.info("report in %s", folder / "report.html")


def _shown(summary: Mapping[str, Any], key: str) -> str:
    return f"{summary[key]:.1f}" if key == "minutes" else number(summary[key])


@dataclass(frozen=True)
class Inpainted:
    """An image of the folder ``results`` with its twins in the two control folders, and what the judge says."""

    samples: dict[str, Sample]  # by folder
    verdicts: dict[str, JudgedImage]  # by folder; PARENTS: of the original

    @property
    def sample(self) -> Sample:
        """The image itself."""
        return self.samples["results"]

    def agrees(self, folder: str) -> bool:
        """Whether the judge's most probable lesion type, healthy left aside, is the one of the prompt."""
        return self.verdicts[folder].lesion_type == self.sample.lesion_type


@dataclass(frozen=True)
class Source:
    """The folder in which the steps of a plan, a YAML, leave their files."""

    folder: Path
    plan: Path

    def again(self, step: str) -> str:
        """What to do to have a step's files."""
        return f"run the step {step}: python tool/run_stages.py {self.plan} --only {step}"

    def need(self, name: str | Path, step: str) -> Path:
        """The path of a file that a step makes; MedSoftError if it is not there."""
        path = self.folder / name
        if not path.exists():
            raise MedSoftError(f"{path}: does not exist; {self.again(step)}")
        return path


@dataclass(frozen=True)
class Inputs:
    """Everything that is read."""

    source: Source
    plan: str  # its name
    images: list[Inpainted]
    judge: dict[str, Any]
    heldout: list[dict[str, str]]  # the judge's predictions of real phantoms
    classifiers: dict[str, list[dict[str, Any]]]  # the metrics of every seed, by arm
    logs: dict[str, list[dict[str, str]]]  # by stage
    seconds: dict[str, float]


def read_inputs(source: Source) -> Inputs:
    """Read what the report needs from the plan's folder; MedSoftError naming the step to run for what is missing."""
    record, plan = source.folder / "stages.json", load_plan(source.plan)
    if not record.exists():
        raise MedSoftError(f"{record}: does not exist; run the {plan.name}: python tool/run_stages.py {source.plan}")
    seconds = {step["name"]: step["seconds"] for step in read_json(record)["steps"]}
    judge = _metrics(source, "classifier_judge", "judge")
    seeds = sorted(path.name for path in (source.folder / "classifier_real").glob("seed_*")) or ["seed_0"]
    steps = [f"classifier_{arm}" for arm in ARMS]
    classifiers = {
        step.removeprefix("classifier_"): [_metrics(source, f"{step}/{seed}", step) for seed in seeds]
        for step in steps
        if step in {each.name for each in plan.steps}
    }
    columns = ("epoch", "train_loss", "val_loss")
    logs = {
        stage: read_table(source.need(f"{stage}/metrics.csv", stage), columns, "training log")
        for stage in stage_configs(SHIPPED / "models" / "phantom.yaml")
    }
    heldout = _predictions(source, "heldout")
    return Inputs(source, plan.name, _read_images(source), judge, heldout, classifiers, logs, seconds)


def _metrics(source: Source, name: str, step: str) -> dict[str, Any]:
    """A classifier's metrics.json with its test numbers by name and the AUC's interval as ``auc_ci95``."""
    path = source.need(f"{name}/metrics.json", step)
    metrics = read_json(path)
    auc = metrics.get("test", {}).get("auc")
    if auc is None or auc["value"] is None:
        raise MedSoftError(f"{path}: holds no test AUC; {source.again(step)}")
    bounds = None if auc["low"] is None else [auc["low"], auc["high"]]
    return {**metrics, **{name: entry["value"] for name, entry in metrics["test"].items()}, "auc_ci95": bounds}


def _predictions(source: Source, name: str) -> list[dict[str, str]]:
    path = source.need(f"classifier_judge/predictions_{name}.csv", "judge")
    return read_table(path, ("sample_id", "predicted", "disease_probability", "p_healthy"), "predictions")


def _read_images(source: Source) -> list[Inpainted]:
    """MedSoftError unless both controls hold the same images, inpainted with the prompts they are controls for."""
    judged = {name: {row["sample_id"]: row for row in _predictions(source, name)} for name in (*RESULTS, PARENTS)}
    found = {name: read_all_results(source.need(name, step)) for name, step in RESULTS.items()}
    by_key = {name: {(each.parent_id, each.meta.get("variant")): each for each in found[name]} for name in RESULTS}
    images = []
    for key, sample in by_key["results"].items():
        samples = {name: _look_up(source, by_key[name], key, name, step) for name, step in RESULTS.items()}
        for name, expected in (("results_healthy", "healthy"), ("results_base", sample.prompt)):
            if samples[name].prompt != expected:
                wrong = f"inpainted with {samples[name].prompt!r}, expected {expected!r}"
                raise MedSoftError(f"{samples[name].image}: {wrong}; {source.again(RESULTS[name])}")
        ids = {**{name: each.sample_id for name, each in samples.items()}, PARENTS: sample.parent_id}
        rows = {
            name: _look_up(source, judged[name], own, f"predictions_{name}.csv", "judge") for name, own in ids.items()
        }
        images.append(Inpainted(samples, {name: verdict_of(row) for name, row in rows.items()}))
    return images


def _look_up(source: Source, known: Mapping[Any, Any], key: Any, where: str, step: str) -> Any:
    if key not in known:
        raise MedSoftError(f"{where}: holds nothing about {key}; {source.again(step)}")
    return known[key]


def rate(values: Iterable[bool]) -> float | None:
    """The share of true values; None of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def rates(images: Sequence[Inpainted]) -> dict[str, Any]:
    """How many there are, and which shares the judge calls diseased or names as the prompt does, with the controls."""
    return {
        "n": len(images),
        "detection_rate": rate(each.verdicts["results"].diseased for each in images),
        "prompt_agreement": rate(each.agrees("results") for each in images),
        "healthy_redraw_detection_rate": rate(each.verdicts["results_healthy"].diseased for each in images),
        "base_detection_rate": rate(each.verdicts["results_base"].diseased for each in images),
        "base_prompt_agreement": rate(each.agrees("results_base") for each in images),
    }


def summarise(inputs: Inputs) -> dict[str, Any]:
    """The numbers of summary.json. Rates are over prompts of moderate and severe lesions; subtle ones stand beside."""
    coarse = [each for each in inputs.images if each.sample.severity in COARSE]
    if not coarse:
        folder, again = inputs.source.folder / "results", inputs.source.again("draw")
        raise MedSoftError(f"{folder}: holds no moderate or severe lesion; {again}")
    subtle = rates([each for each in inputs.images if each.sample.severity == "subtle"])
    of_all = rates(coarse)
    kinds = [each.sample.lesion_type or "unknown" for each in coarse]
    chance = chance_agreement(kinds, [each.verdicts["results_base"].lesion_type for each in coarse])
    every = [sample for each in inputs.images for sample in each.samples.values()]
    parents = {each.sample.parent_id: each.verdicts[PARENTS].diseased for each in coarse}
    by_type = {
        kind: rates([each for each, own in zip(coarse, kinds, strict=True) if own == kind]) for kind in set(kinds)
    }
    classifiers = {arm: _over_seeds(every) for arm, every in inputs.classifiers.items()}
    summary = {
        "plan": inputs.plan,
        "n_pictures": len(inputs.images),
        "n_moderate_severe": of_all.pop("n"),
        "n_subtle": subtle["n"],
        "lesion_detection_rate": of_all.pop("detection_rate"),
        "parent_detection_rate": rate(parents.values()),
        **of_all,
        "asked_drawn": _asked_drawn(coarse, kinds),
        "chance_agreement": chance,
        "base_agreement_limit": chance + 1.96 * math.sqrt(chance * (1 - chance) / len(coarse)),
        "subtle_detection_rate": subtle["detection_rate"],
        "subtle_prompt_agreement": subtle["prompt_agreement"],
        # Counted from the files of all three folders, not taken from what dataset_infer.py reports.
        "changed_outside_pixels": sum(
            read_result(s).changed_outside for s in tqdm(every, "comparing pixels", disable=None)
        ),
        **{f"auc_{arm}": values["auc"]["mean"] for arm, values in classifiers.items()},
        "auc_differences": _auc_differences(inputs.classifiers),
        "minutes": round(sum(inputs.seconds.values()) / 60, 2),
        "judge": _judge_numbers(inputs),
        "by_type": dict(sorted(by_type.items())),
        "classifiers": classifiers,
    }
    if "augmented" in classifiers:
        summary["n_synthetic"] = classifiers["augmented"]["n_synthetic_used"]
    summary["missed"] = [key for key, (_, met) in bars(summary).items() if not met(summary[key])]
    return summary


def _asked_drawn(images: Sequence[Inpainted], kinds: Sequence[str]) -> dict[str, Any]:
    verdicts = [each.verdicts["results"] for each in images]
    drawn = [verdict.lesion_type if verdict.diseased else "healthy" for verdict in verdicts]
    return asked_drawn(kinds, drawn, [each.sample.patient_id for each in images])


def bars(summary: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What each number must reach, as text and as a test. The AUCs have no bar: any value of theirs is a result."""
    limit = summary["base_agreement_limit"]
    made = {
        "lesion_detection_rate": ("at least 0.90", lambda value: value >= 0.90),
        "parent_detection_rate": ("at most 0.10", lambda value: value <= 0.10),
        "healthy_redraw_detection_rate": ("at most 0.20", lambda value: value <= 0.20),
        "prompt_agreement": ("at least 0.75", lambda value: value >= 0.75),
        "base_prompt_agreement": (f"chance, at most {limit:.3f}", lambda value: value <= limit),
        "changed_outside_pixels": ("0", lambda value: value == 0),
    }
    if minutes := MINUTES.get(summary["plan"]):
        made["minutes"] = (f"at most {minutes}", lambda value: value <= minutes)
    return made


def chance_agreement(prompted: Sequence[str], named: Sequence[str]) -> float:
    """Expected agreement if what the judge names had nothing to do with the prompt: sum over types of both shares."""
    return sum(prompted.count(kind) * named.count(kind) for kind in set(prompted)) / (len(prompted) * len(named))


def _over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, interval and values of each number over the seeds of an arm; the counts, which are the same for all.

    A number that is undefined for one of the seeds is left out.
    """
    defined = [name for name in CLASSIFIER_ROWS if all(each.get(name) is not None for each in metrics)]
    found = {name: _mean([each[name] for each in metrics], *SHARE) for name in defined}
    return found | {name: metrics[0].get(name) for name in COUNTS}


def _auc_differences(classifiers: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Differences of the test AUC between arms, paired by seed: each arm's minus those of the arms before it."""
    aucs = {arm: [each["auc"] for each in metrics] for arm, metrics in classifiers.items()}
    return {
        f"{more} - {less}": _mean([one - two for one, two in zip(aucs[more], aucs[less], strict=True)])
        for less, more in combinations(aucs, 2)
    }


def _mean(values: list[float], *within: float) -> dict[str, Any]:
    """Mean and 95 % interval (Student's t), which ends where ``within`` does, and the values."""
    found = interval(values, *within)
    return {"mean": found.mean, "low": found.low, "high": found.high, "values": values}


def _shown_interval(found: Mapping[str, Any], sign: str = "") -> str:
    bounds = "" if found["low"] is None else f" ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"
    return f"{found['mean']:{sign}.3f}{bounds}"


def _judge_numbers(inputs: Inputs) -> dict[str, Any]:
    """How good the judge is on real phantoms: its own test set, and the moderate and severe held-out ones."""
    judged = [(row, verdict_of(row)) for row in inputs.heldout]
    diseased = [(row, verdict) for row, verdict in judged if row.get("severity") in COARSE]
    return {
        **{f"test_{key}": inputs.judge.get(key) for key in ("auc", "auc_ci95", "type_accuracy", "macro_auc")},
        "n_test": inputs.judge.get("n_test"),
        "heldout_detection_rate": rate(verdict.diseased for _, verdict in diseased),
        "heldout_type_agreement": rate(verdict.lesion_type == row.get("lesion_type") for row, verdict in diseased),
        "heldout_false_alarm_rate": rate(v.diseased for row, v in judged if row.get("label") == "healthy"),
    }


def write_report(inputs: Inputs, summary: Mapping[str, Any]) -> None:
    """Write report.html with its images, and sheet.png."""
    path = inputs.source.folder / "report.html"
    coarse = [each for each in inputs.images if each.sample.severity in COARSE]
    columns = ["lesion type", *(name.replace("_", " ") for name in rates([]))]
    type_rows = [[lesion, *row.values()] for lesion, row in summary["by_type"].items()]
    total = sum(inputs.seconds.values())
    rows = [(each.sample.prompt, read_result(each.sample)) for each in _first(coarse, CONTROLS)]
    write_sheet(inputs.source.folder / "sheet.png", rows)
    write_page(
        path,
        "demo",
        summary=summary,
        information=information_text(summary["asked_drawn"]),
        bars=[(key, _shown(summary, key), limit) for key, (limit, _) in bars(summary).items()],
        samples=write_cards(path, "sample", _sample_cards(inputs.images)),
        controls=write_cards(path, "control", _control_cards(coarse)),
        type_table=(columns, type_rows),
        judge_rows=[
            [key, "{:.3f} to {:.3f}".format(*value) if isinstance(value, list) else value]
            for key, value in summary["judge"].items()
        ],
        time_rows=[[name, f"{each:.1f}"] for name, each in [*inputs.seconds.items(), ("total", total)]],
        **_training_plots(inputs, path),
        **_classifiers(summary, path),
    )


def _sample_cards(images: Sequence[Inpainted]) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    for each in _first(images, SHOWN):
        image, verdict = read_result(each.sample), each.verdicts["results"]
        judge = f"{verdict.lesion_type}, P(disease) {verdict.probability:.2f}"
        yield each.sample.prompt, image.panels(), {**facts(each.sample, image), "judge": judge}


def _control_cards(images: Sequence[Inpainted]) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    for each in _first(images, CONTROLS):
        panels = {name: read_result(sample).panels() for name, sample in each.samples.items()}
        shown = {"original": panels["results"]["original"]}
        probabilities = {"P(disease) original": f"{each.verdicts[PARENTS].probability:.2f}"}
        for title, name in zip(("with the prompt", "with healthy", "base model"), RESULTS, strict=True):
            shown[title] = panels[name]["result"]
            probabilities[title] = f"{each.verdicts[name].probability:.2f}"
        yield each.sample.prompt, shown, probabilities


def _first(images: Sequence[Inpainted], count: int) -> list[Inpainted]:
    by_id = {each.sample.sample_id: each for each in images}
    return [by_id[sample.sample_id] for sample in interleave([each.sample for each in images], count)]


def _training_plots(inputs: Inputs, path: Path) -> dict[str, Any]:
    whole = write_image(path, "validation", validation_figure(inputs.logs))
    figures = {stage: loss_figure(rows, stage) for stage, rows in inputs.logs.items()}
    plots = {f"loss of {stage}": write_image(path, f"loss_{stage}", figure) for stage, figure in figures.items()}
    return {"validation_plot": whole, "loss_plots": plots}


def _classifiers(summary: Mapping[str, Any], path: Path) -> dict[str, Any]:
    arms = summary["classifiers"]
    if not arms:
        return {}
    shown = {n: [_shown_interval(each[n]) if n in each else None for each in arms.values()] for n in CLASSIFIER_ROWS}
    shown |= {name: [each[name] for each in arms.values()] for name in COUNTS}
    rows = [[shown_name(name), *values] for name, values in shown.items()]
    return {
        "classifier_head": ["", *(ARMS[arm] for arm in arms)],
        "classifier_rows": rows,
        "difference_rows": [[p, _shown_interval(each, "+")] for p, each in summary["auc_differences"].items()],
        "auc_plot": write_image(path, "auc", auc_figure({ARMS[arm]: values["auc"] for arm, values in arms.items()})),
    }


def auc_figure(arms: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """The test AUC of each arm by its title: a dot for a seed, a line for the mean, a bar for its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, found in enumerate(arms.values()):
        axes.scatter([place] * len(found["values"]), found["values"], color="tab:blue", alpha=0.7, zorder=3)
        axes.hlines(found["mean"], place - 0.2, place + 0.2, color="black", zorder=4)
        if found["low"] is not None:
            axes.vlines(place + 0.12, found["low"], found["high"], color="0.6", linewidth=4)
    axes.set_xticks(range(len(arms)), [title.replace(" ", "\n", 1) for title in arms])
    axes.set(ylabel="test AUC", xlim=(-0.5, len(arms) - 0.5))
    axes.grid(alpha=0.25, axis="y")
    return figure
