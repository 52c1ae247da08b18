"""Put the demo's numbers and pictures together: summary.json, report.html and sheet.png.

    python tool/demo_report.py --output_dir demo_output

Only reads what the steps of configs/demo.yaml have left in the folder; nothing is computed by a network here.
"""

import argparse
import html
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core import cli
from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from ldm.data.samples import Sample

log = logging.getLogger(__name__)

COARSE = ("moderate", "severe")
MINUTES = 15
STAGES = ("stage1", "unet_only", "stage2_1", "stage2_2")
SHOWN, CONTROLS = 24, 6
DRAWN = {"results": "draw", "results_healthy": "redraw_healthy", "results_base": "draw_base"}  # folder -> its step
PARENTS = "openimages_format_train"
NOT_EVIDENCE = (
    "Everything here was made and measured on computer-drawn phantoms. They show that the method runs and does what it "
    "says; they are not clinical evidence, and nothing here is for clinical use."
)
CLASSIFIER_ROWS = (
    *("auc", "auc_ci95", "average_precision", "balanced_accuracy", "recall", "specificity", "precision", "f1"),
    *("n_train_healthy", "n_train_diseased", "n_synthetic_used", "n_test", "n_test_diseased", "epoch"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser("Write summary.json, report.html and sheet.png from what the demo's other steps have left.")
    made.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="the demo's output folder")
    return made


def main(args: argparse.Namespace) -> int:
    """Read, compute, write; numbers that miss their bar are reported, not hidden, and are no error."""
    inputs = read_inputs(args.output_dir)
    summary = summarise(inputs)
    write_report(inputs, summary)
    write_json(args.output_dir / "summary.json", summary)
    for key, (words, _) in bars(summary).items():
        verdict = "MISSED" if key in summary["missed"] else "met"
        log.info("%-32s %-8s expected %s: %s", key, _shown(summary, key), words, verdict)
    aucs = _short(summary["auc_real"]), _short(summary["auc_augmented"])
    log.info("AUC with real images only %s, with synthetic ones too %s", *aucs)
    log.info("report in %s", args.output_dir / "report.html")
    return cli.DONE


def _short(value: Any) -> str:
    from ldm.reports.pages import number

    return number(value)


def _shown(summary: dict[str, Any], key: str) -> str:
    return f"{summary[key]:.1f}" if key == "minutes" else _short(summary[key])


# ------------------------------------------------------------------------------------------------------ inputs


@dataclass(frozen=True)
class Verdict:
    """What the judge says about one picture.

    ``diseased``: of all its classes the most probable one is a lesion; ``lesion_type``: the most probable lesion,
    ``healthy`` left aside; ``probability``: of all lesions together.
    """

    diseased: bool
    lesion_type: str
    probability: float


@dataclass
class Inputs:
    """Everything that is read. Drawn samples are known by (parent_id, variant), the same in all three folders."""

    folder: Path
    judge: dict[str, Any]
    classifiers: dict[str, dict[str, Any]]
    test_rows: dict[str, list[dict[str, str]]]
    seconds: dict[str, float]
    drawn: dict[str, dict[tuple[str, Any], "Sample"]] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Verdict]] = field(default_factory=dict)  # by predicted set, then sample_id
    heldout: list[dict[str, str]] = field(default_factory=list)

    def verdict(self, folder: str, key: tuple[str, Any]) -> Verdict:
        """The judge's verdict on a drawn picture."""
        return _look_up(self.verdicts[folder], self.drawn[folder][key].sample_id, f"predictions_{folder}.csv", "judge")

    def parent(self, key: tuple[str, Any]) -> Verdict:
        """The judge's verdict on the image it was drawn on."""
        return _look_up(self.verdicts[PARENTS], key[0], f"predictions_{PARENTS}.csv", "judge")


def _look_up(known: dict[Any, Any], key: Any, where: str, step: str) -> Any:
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
    from ldm.reports.pages import read_all_results, read_table

    def classifier(name: str, step: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
        metrics = read_json(_need(folder / name / "metrics.json", step))
        if "test" not in metrics:
            raise MedSoftError(f"{folder / name / 'metrics.json'}: holds no test numbers; {_again(step)}")
        columns = ("label", "disease_probability")
        rows = read_table(_need(folder / name / "predictions_test.csv", step), columns, "predictions")
        return _with_test_numbers(metrics), rows

    if not (folder / "stages.json").exists():
        raise MedSoftError(
            f"{folder / 'stages.json'}: does not exist; run the demo: python tool/run_stages.py configs/demo.yaml"
        )
    record = read_json(folder / "stages.json")
    seconds = {step["name"]: step["seconds"] for step in record["steps"]}
    judge, _ = classifier("classifier_judge", "judge")
    both = {name: classifier(f"classifier_{name}", f"classifier_{name}") for name in ("real", "augmented")}
    metrics = {name: values for name, (values, _) in both.items()}
    inputs = Inputs(folder, judge, metrics, {name: rows for name, (_, rows) in both.items()}, seconds)
    for stage in STAGES:
        _need(folder / stage / "metrics.csv", stage)
    for name in (*DRAWN, PARENTS, "heldout"):
        path = _need(folder / "classifier_judge" / f"predictions_{name}.csv", "judge")
        rows = read_table(path, ("sample_id", "predicted", "disease_probability", "p_healthy"), "predictions")
        inputs.verdicts[name] = {row["sample_id"]: _verdict(row) for row in rows}
        if name == "heldout":
            inputs.heldout = rows
    for name, step in DRAWN.items():
        samples = read_all_results(_need(folder / name, step))
        inputs.drawn[name] = {(sample.parent_id, sample.meta.get("variant")): sample for sample in samples}
    _check_pairs(inputs)
    return inputs


def _with_test_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The file's content with its test numbers by name, and the interval of the AUC as ``auc_ci95``."""
    auc = metrics["test"]["auc"]
    interval = None if auc["low"] is None else [auc["low"], auc["high"]]
    return {**metrics, **{name: entry["value"] for name, entry in metrics["test"].items()}, "auc_ci95": interval}


def _verdict(row: dict[str, str]) -> Verdict:
    lesions = {key[2:]: float(value) for key, value in row.items() if key.startswith("p_") and key != "p_healthy"}
    return Verdict(row["predicted"] != "healthy", max(lesions, key=lesions.get), float(row["disease_probability"]))


def _check_pairs(inputs: Inputs) -> None:
    """The two controls must hold the same pictures, drawn with the prompts they are controls for."""
    for key, sample in inputs.drawn["results"].items():
        healthy = _look_up(inputs.drawn["results_healthy"], key, "results_healthy", "redraw_healthy")
        base = _look_up(inputs.drawn["results_base"], key, "results_base", "draw_base")
        if not healthy.healthy:
            raise MedSoftError(
                f"{healthy.image}: drawn with {healthy.prompt!r}, expected healthy; {_again('redraw_healthy')}"
            )
        if base.prompt != sample.prompt:
            raise MedSoftError(
                f"{base.image}: drawn with {base.prompt!r}, expected {sample.prompt!r}; {_again('draw_base')}"
            )


# ----------------------------------------------------------------------------------------------------- numbers


def rate(values: Iterable[bool]) -> float | None:
    """The share of true values; None of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def summarise(inputs: Inputs) -> dict[str, Any]:
    """The numbers of summary.json. Rates are over prompts of moderate and severe lesions; subtle ones stand beside."""
    results = inputs.drawn["results"]
    coarse = [key for key, sample in results.items() if sample.severity in COARSE]
    subtle = [key for key, sample in results.items() if sample.severity == "subtle"]
    if not coarse:
        raise MedSoftError(f"{inputs.folder / 'results'}: holds no moderate or severe lesion; {_again('draw')}")
    chance = chance_agreement(
        [results[key].lesion_type for key in coarse],
        [inputs.verdict("results_base", key).lesion_type for key in coarse],
    )
    parents = {key[0]: inputs.parent(key).diseased for key in coarse}
    summary = {
        "n_pictures": len(results),
        "n_moderate_severe": len(coarse),
        "n_subtle": len(subtle),
        "lesion_detection_rate": _detected(inputs, "results", coarse),
        "parent_detection_rate": rate(parents.values()),
        "healthy_redraw_detection_rate": _detected(inputs, "results_healthy", coarse),
        "prompt_agreement": _agreed(inputs, "results", coarse),
        "base_detection_rate": _detected(inputs, "results_base", coarse),
        "base_prompt_agreement": _agreed(inputs, "results_base", coarse),
        "chance_agreement": chance,
        "base_agreement_limit": chance + 1.96 * math.sqrt(chance * (1 - chance) / len(coarse)),
        "subtle_detection_rate": _detected(inputs, "results", subtle),
        "subtle_prompt_agreement": _agreed(inputs, "results", subtle),
        "changed_outside_pixels": _changed_outside(inputs),
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


def bars(summary: dict[str, Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What each number must reach: in words, and as a test. The AUCs have no bar: they are what they are."""
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


def chance_agreement(prompted: Sequence[str], named: Sequence[str]) -> float:
    """Expected agreement if what the judge names had nothing to do with the prompt: sum over types of both shares."""
    return sum(prompted.count(kind) * named.count(kind) for kind in set(prompted)) / (len(prompted) * len(named))


def _detected(inputs: Inputs, folder: str, keys: Sequence[Any]) -> float | None:
    return rate(inputs.verdict(folder, key).diseased for key in keys)


def _agreed(inputs: Inputs, folder: str, keys: Sequence[Any]) -> float | None:
    """How often the judge's most probable lesion type, healthy left aside, is the one of the prompt."""
    return rate(inputs.verdict(folder, key).lesion_type == inputs.drawn["results"][key].lesion_type for key in keys)


def _changed_outside(inputs: Inputs) -> int:
    """Counted from the files of all three folders, not taken from what dataset_infer.py reports."""
    from tqdm import tqdm

    from ldm.reports.pages import read_result

    samples = [sample for drawn in inputs.drawn.values() for sample in drawn.values()]
    return sum(read_result(sample).changed_outside for sample in tqdm(samples, "comparing pixels", disable=None))


def _judge_numbers(inputs: Inputs) -> dict[str, Any]:
    """How good the judge is on real phantoms: its own test set, and the moderate and severe held-out ones."""
    sick = [row for row in inputs.heldout if row.get("severity") in COARSE]
    well = [row for row in inputs.heldout if row.get("label") == "healthy"]
    verdicts = inputs.verdicts["heldout"]
    return {
        **{f"test_{key}": inputs.judge.get(key) for key in ("auc", "auc_ci95", "type_accuracy", "macro_auc")},
        "n_test": inputs.judge.get("n_test"),
        "heldout_detection_rate": rate(verdicts[row["sample_id"]].diseased for row in sick),
        "heldout_type_agreement": rate(verdicts[r["sample_id"]].lesion_type == r.get("lesion_type") for r in sick),
        "heldout_false_alarm_rate": rate(verdicts[row["sample_id"]].diseased for row in well),
    }


def _by_type(inputs: Inputs, coarse: Sequence[Any]) -> dict[str, dict[str, Any]]:
    results = inputs.drawn["results"]
    kinds = sorted({results[key].lesion_type or "unknown" for key in coarse})
    groups = {kind: [key for key in coarse if (results[key].lesion_type or "unknown") == kind] for kind in kinds}
    return {
        kind: {
            "n": len(keys),
            "detection_rate": _detected(inputs, "results", keys),
            "prompt_agreement": _agreed(inputs, "results", keys),
            "healthy_redraw_detection_rate": _detected(inputs, "results_healthy", keys),
            "base_detection_rate": _detected(inputs, "results_base", keys),
            "base_prompt_agreement": _agreed(inputs, "results_base", keys),
        }
        for kind, keys in groups.items()
    }


# ------------------------------------------------------------------------------------------------------ report


def write_report(inputs: Inputs, summary: dict[str, Any]) -> None:
    """Write report.html with its images, and sheet.png."""
    from ldm.reports.pages import image, interleave, page, read_result, write_sheet

    path, results = inputs.folder / "report.html", inputs.drawn["results"]
    coarse = [sample for sample in results.values() if sample.severity in COARSE]
    write_sheet(inputs.folder / "sheet.png", [read_result(sample) for sample in interleave(coarse, CONTROLS)])
    sheet = image("sheet.png", "six pictures: original, result, difference", "sheet")
    note = '<p class="note">The first of each lesion type by name, not chosen by quality; three times enlarged.</p>'
    sections = [
        ("summary", "Summary", _summary_html(summary)),
        ("sheet", "Six pictures", note + sheet),
        ("samples", "Samples", _samples_html(inputs, path)),
        ("controls", "Controls", _controls_html(inputs, path)),
        ("training", "Training", _training_html(inputs, path)),
        ("classifier", "Classifier", _classifier_html(inputs, path)),
        ("judge", "Judge", _judge_html(summary)),
        ("time", "Time", _time_html(inputs)),
    ]
    write_text(path, page("MedSoft-Diffusion: the demo on phantoms", sections, NOT_EVIDENCE))


def _summary_html(summary: dict[str, Any]) -> str:
    meanings = {
        "lesion_detection_rate": "synthetic images that the judge calls diseased",
        "parent_detection_rate": "their healthy originals that it calls diseased",
        "healthy_redraw_detection_rate": 'the same images redrawn in the same masks with the prompt "healthy"',
        "prompt_agreement": "the judge's most probable lesion type is the one of the prompt",
        "base_prompt_agreement": "the same for the base model before any stage",
        "changed_outside_pixels": "pixels outside the soft mask that differ from the original, all pictures",
        "minutes": "all steps of the demo together",
    }
    rows = []
    for key, (words, _) in bars(summary).items():
        missed = key in summary["missed"]
        mark = f'<span class="{"missed" if missed else "met"}">{"missed" if missed else "met"}</span>'
        cells = (f"<code>{key}</code>", html.escape(meanings[key]), f"<b>{_shown(summary, key)}</b>", words, mark)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    beside = {
        "subtle lesions called diseased": summary["subtle_detection_rate"],
        "subtle lesions: type agrees": summary["subtle_prompt_agreement"],
        "base model: called diseased": summary["base_detection_rate"],
        "AUC, real images only": summary["auc_real"],
        "AUC, with synthetic images": summary["auc_augmented"],
        "synthetic images added": summary["n_synthetic"],
    }
    said = " · ".join(f"{html.escape(key)}: <b>{_short(value)}</b>" for key, value in beside.items())
    return (
        f"<p>Rates over the {summary['n_moderate_severe']} pictures "
        f"drawn with prompts of moderate and severe lesions ({summary['n_subtle']} subtle ones stand below the table). "
        "The judge is a classifier of healthy and each lesion type, trained on real phantoms only, of patients that no "
        "other part has seen; it calls a picture diseased when a lesion is its most probable class.</p>"
        '<div class="wide"><table><thead><tr><th>number</th><th>meaning</th><th>value</th><th>must be</th><th></th>'
        f'</tr></thead><tbody>{"".join(rows)}</tbody></table></div><p class="note">{said}</p>'
    )


def _samples_html(inputs: Inputs, path: Path) -> str:
    from ldm.reports.pages import facts, interleave, read_result, write_cards

    def cards() -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        for sample in interleave(list(inputs.drawn["results"].values()), SHOWN):
            picture = read_result(sample)
            verdict = inputs.verdict("results", (sample.parent_id, sample.meta.get("variant")))
            says = f"{verdict.lesion_type}, P(disease) {verdict.probability:.2f}"
            yield picture.panels(), {**facts(picture), "judge": says}

    note = (
        '<p class="note">Lesion types take turns, severe ones first, otherwise by name: not chosen by quality. '
        "Difference: red brighter, blue darker, white unchanged.</p>"
    )
    return note + write_cards(path, "sample", cards())


def _controls_html(inputs: Inputs, path: Path) -> str:
    from ldm.reports.pages import interleave, read_result, write_cards

    def cards() -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        coarse = [sample for sample in inputs.drawn["results"].values() if sample.severity in COARSE]
        for sample in interleave(coarse, CONTROLS):
            key = (sample.parent_id, sample.meta.get("variant"))
            drawn = {name: read_result(inputs.drawn[name][key]).panels() for name in DRAWN}
            panels = {
                "original": drawn["results"]["original"],
                "with the prompt": drawn["results"]["result"],
                "with healthy": drawn["results_healthy"]["result"],
                "base model": drawn["results_base"]["result"],
            }
            values = {name: inputs.verdict(name, key).probability for name in DRAWN}
            yield (
                panels,
                {
                    "prompt": sample.prompt,
                    "P(disease) original": f"{inputs.parent(key).probability:.2f}",
                    "with the prompt": f"{values['results']:.2f}",
                    "with healthy": f"{values['results_healthy']:.2f}",
                    "base model": f"{values['results_base']:.2f}",
                },
            )

    note = (
        '<p class="note">The same image, mask and noise: with its prompt, with the prompt &quot;healthy&quot;, and by '
        "the base model.</p>"
    )
    return note + write_cards(path, "control", cards())


def _training_html(inputs: Inputs, path: Path) -> str:
    from ldm.reports.pages import image, loss_figure, read_table, validation_figure, write_image

    columns = ("epoch", "train_loss", "val_loss")
    stages = {stage: read_table(inputs.folder / stage / "metrics.csv", columns, "training log") for stage in STAGES}
    whole = image(write_image(path, "validation", validation_figure(stages)), "validation loss of the stages", "sheet")
    plots = [
        image(write_image(path, f"loss_{stage}", loss_figure(rows, stage)), f"loss of {stage}", "plot")
        for stage, rows in stages.items()
    ]
    said = '<p class="note">Validation loss of each epoch; below, beside the training loss of the same epoch.</p>'
    return f'{said}{whole}<div class="plots">{"".join(plots)}</div>'


def _classifier_html(inputs: Inputs, path: Path) -> str:
    from ldm.reports.pages import image, roc_figure, table, write_image

    names = {"real": "real images only", "augmented": "with synthetic images"}
    curves = {
        names[name]: ([row["label"] != "healthy" for row in rows], [float(row["disease_probability"]) for row in rows])
        for name, rows in inputs.test_rows.items()
    }
    rows = [[key, *(_interval(inputs.classifiers[name].get(key)) for name in names)] for key in CLASSIFIER_ROWS]
    source = write_image(path, "roc", roc_figure(curves))
    return (
        "<p>Healthy against diseased, tested once on held-out phantoms; the same network, settings and seed.</p>"
        f'<div class="plots"><div>{table(["", *names.values()], rows)}</div>{image(source, "ROC curves", "plot")}</div>'
    )


def _interval(value: Any) -> Any:
    return f"{value[0]:.3f} to {value[1]:.3f}" if isinstance(value, list) else value


def _judge_html(summary: dict[str, Any]) -> str:
    from ldm.reports.pages import table

    own = table(["on real phantoms", ""], [[key, _interval(value)] for key, value in summary["judge"].items()])
    kinds = summary["by_type"]
    columns = list(next(iter(kinds.values())))
    heads = ["lesion type", *(column.replace("_", " ") for column in columns)]
    each = table(heads, [[kind, *(row[c] for c in columns)] for kind, row in kinds.items()])
    return f"{own}<h3>Moderate and severe prompts by lesion type</h3>{each}"


def _time_html(inputs: Inputs) -> str:
    from ldm.reports.pages import table

    rows = [[name, f"{seconds:.1f}"] for name, seconds in inputs.seconds.items()]
    total = f"{sum(inputs.seconds.values()):.1f}"
    return table(["step", "seconds"], [*rows, ["total", total]])


if __name__ == "__main__":
    cli.run(build_parser(), main)
