"""The cells of a study: intervals, pairing, the choice of the ratio, what the numbers are said to support."""

import csv
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ldm.core.errors import MedSoftError
from ldm.core.files import write_json
from ldm.workflow.study_keys import Compared
from ldm.workflow.study_report import paragraph, write_study_report
from ldm.workflow.study_results import Cell, Drawing, Drawings, Study, Treatment, interval, read_cell

SEEDS, WORLDS = (0, 1), ("w1", "w2", "w3")


def cells(values: dict[tuple[str, float | None], list[list[float]]], validation: dict | None = None) -> list[Cell]:
    """Cells from (arm, ratio) -> rows of worlds, columns of seeds; validation AUC by (arm, ratio), else 0.5."""
    return [
        Cell(w, Treatment(*key), s, {"auc": rows[i][j], "validation_auc": (validation or {}).get(key, 0.5)}, {})
        for key, rows in values.items()
        for i, w in enumerate(WORLDS[: len(rows)])
        for j, s in enumerate(SEEDS[: len(rows[i])])
    ]


def made(gain: float, noise: float = 0.001, ratio: float | None = None) -> Study:
    """Three worlds of different difficulty: ours = duplicated + gain + noise."""
    rng = np.random.default_rng(0)
    levels = np.array([[0.7, 0.72], [0.8, 0.81], [0.9, 0.88]])
    ours = (levels + gain + noise * rng.standard_normal(levels.shape)).tolist()
    values = {("real", None): levels.tolist(), ("duplicated", 1.0): levels.tolist(), ("ours", 1.0): ours}
    return Study(cells(values), Compared("real", "duplicated", "ours", ratio))


def test_interval_is_students_t_over_worlds() -> None:
    values = [0.1, 0.25, 0.2, 0.05, 0.3]
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((statistics.fmean(values), low, high))
    assert interval([0.3]).low is None


def test_an_interval_ends_where_its_quantity_does_and_that_is_said(tmp_path: Path) -> None:
    """Differences are of another quantity; what the corrected bits could be at least, nobody knows."""
    study_ = Study(cells({("a", None): [[1.0], [0.9]], ("b", None): [[0.0], [0.1]]}), Compared("b", "b", "a", None))
    assert (study_.mean(Treatment("a")).low, study_.mean(Treatment("a")).high) == (pytest.approx(0.315, abs=1e-3), 1)
    assert study_.mean(Treatment("b")).low == 0
    assert study_.difference(Treatment("a"), Treatment("b")).high == pytest.approx(0.9 + 12.706 * 0.1, abs=1e-3)
    values = {"detection": 1.0, "seam": 0.2, "asked_drawn": 0.1}, {"detection": 0.9, "seam": 2.0, "asked_drawn": 1.0}
    judged = [Drawing(f"w{n}", "ours", None, each, dict.fromkeys(each, 9)) for n, each in enumerate(values)]
    study_.drawings = Drawings(judged)
    assert study_.drawings.mean("ours", "detection").high == 1
    assert (study_.drawings.mean("ours", "seam").low, study_.drawings.mean("ours", "seam").high > 2) == (0, True)
    assert study_.drawings.mean("ours", "asked_drawn").low < 0
    write_study_report(tmp_path, "s", study_, [])
    page = (tmp_path / "study.md").read_text()
    assert "| a | 2 | 0.950 (0.315 to 1.000) |" in page
    assert (
        page.count("Where the interval of a mean would leave the values that its number can have, it ends there.") == 1
    )


def test_differences_are_paired_by_world_and_seed_then_averaged_by_world() -> None:
    study_ = Study(
        cells({("a", None): [[0.9, 0.8], [0.6, 0.6]], ("b", None): [[0.7], [0.5, 0.7]]}),
        Compared("b", "b", "a", None),
    )
    found = study_.difference(Treatment("a"), Treatment("b"))
    expected = interval([0.2, statistics.fmean([0.1, -0.1])])  # seed 1 of world 1 has no partner
    assert (found.mean, found.low, found.worlds) == pytest.approx((expected.mean, expected.low, 2))
    # As scipy has it, on complete pairs.
    whole = made(0.01)
    ours = [
        statistics.fmean([c.values["auc"] for c in whole.cells if c.world == w and c.treatment.arm == "ours"])
        for w in WORLDS
    ]
    theirs = [
        statistics.fmean([c.values["auc"] for c in whole.cells if c.world == w and c.treatment.arm == "real"])
        for w in WORLDS
    ]
    reference = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = whole.difference(Treatment("ours", 1.0), Treatment("real"))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


def test_the_ratio_is_chosen_on_validation_and_never_on_the_test_set() -> None:
    values = {("ours", 0.5): [[0.6, 0.6]], ("ours", 1.0): [[0.9, 0.9]], ("ours", 3.0): [[0.7, 0.7]]}
    validation = {("ours", 0.5): 0.8, ("ours", 1.0): 0.7, ("ours", 3.0): 0.8}
    assert (
        Study(cells(values, validation), Compared("real", "dup", "ours", None)).chosen_ratio() == 0.5
    )  # the smaller one
    assert Study(cells(values, validation), Compared("real", "dup", "ours", 3.0)).chosen_ratio() == 3.0
    assert Study([], Compared("real", "dup", "ours", None)).chosen_ratio() is None


def test_the_ratio_is_chosen_over_runs_that_all_ratios_have() -> None:
    values = {("ours", 1.0): [[0.5, 0.5], [0.5, 0.5]], ("ours", 3.0): [[0.5, 0.5]]}
    both = cells(values, {("ours", 3.0): 0.6})
    easier = [
        Cell(c.world, c.treatment, c.seed, c.values | {"validation_auc": 0.99}, {}) if c.world == "w2" else c
        for c in both
    ]
    assert Study(easier, Compared("real", "dup", "ours", None)).chosen_ratio() == 3.0


@pytest.mark.parametrize(
    ("gain", "noise", "said"),
    [
        (0.03, 0.001, "a gain is shown."),
        (-0.03, 0.001, "a loss is shown."),
        (0.001, 0.05, "a difference is not shown (the interval contains 0)."),
    ],
)
def test_the_paragraph_says_what_the_interval_supports(gain: float, noise: float, said: str) -> None:
    found = made(gain, noise, ratio=1.0)
    text = paragraph(found)
    assert "The ratio is 1 (fixed beforehand)." in text
    claim = text[text.index("The main comparison, ours at 1 minus duplicated at 1: ") :].split("; ", 1)[1]
    change = found.difference(Treatment("ours", 1.0), Treatment("duplicated", 1.0))
    assert f"95 % {change.low:+.3f} to {change.high:+.3f}" in text
    assert claim[: claim.index(". ") + 1].endswith(said)
    assert "they suggest" not in text
    assert "only worlds that nothing was tuned on can confirm" in paragraph(made(gain, noise))


def test_less_of_an_error_is_a_gain() -> None:
    study_ = made(-0.03, ratio=1.0)
    for cell in study_.cells:
        cell.values["brier"] = cell.values["auc"]
    study_ = replace(study_, compare=replace(study_.comparison, endpoint="brier"))
    assert re.search(
        r"ours at 1 minus duplicated at 1: -0\.03\d .* of test brier .*; a gain is shown\.", paragraph(study_)
    )


def test_with_hypotheses_the_main_comparison_is_a_look_among_others() -> None:
    """It is not one of Holm's family."""
    assert "One comparison is the claim; all others are looks" in paragraph(made(0.03, ratio=1.0))
    text = paragraph(made(0.03, ratio=1.0), hypotheses=True)
    assert "The hypotheses below are the claim; all others, the main comparison among them, are looks" in text


def test_worlds_that_another_study_tests_claim_nothing_themselves() -> None:
    text = paragraph(made(0.03, ratio=1.0), tested_by="configs/ruling.yaml")
    assert (
        "What is claimed of these worlds are the hypotheses of configs/ruling.yaml; all comparisons here, the " in text
    )
    assert "is the claim" not in text


def test_one_world_or_none_shows_nothing() -> None:
    single = Study([c for c in made(0.3).cells if c.world == "w1"], Compared("real", "duplicated", "ours", None))
    assert "a difference is not shown (one world)" in paragraph(single)
    assert "is shown" not in paragraph(single)
    assert paragraph(Study([], Compared("real", "dup", "ours", None))).startswith("Nothing can be said yet")


def test_cells_without_an_auc_are_left_out_and_counted(tmp_path: Path) -> None:
    found = made(0.01)
    found.cells[0] = Cell("w1", Treatment("real"), 0, {"auc": None, "validation_auc": None}, {})
    again = Study(found.cells, found.comparison)
    write_study_report(tmp_path, "s", again, [])
    assert "1 cell has no test AUC: another task, or a test set of one class." in (tmp_path / "study.md").read_text()
    assert again.mean(Treatment("real")).mean == pytest.approx(statistics.fmean([0.72, 0.805, 0.89]))


def test_metrics_that_are_none_of_a_tested_classifier_are_refused(tmp_path: Path) -> None:
    assert read_cell(tmp_path, "w", Treatment("real"), 0) is None
    for content in (
        {"test": {}},
        {"test": {"auc": {"value": 1.0}}},
        [],
        {"test": {"f1": {"value": 1}}, "validation": {"auc": 1}},
    ):
        write_json(tmp_path / "metrics.json", content)
        with pytest.raises(MedSoftError, match=r"metrics.json: not the metrics of a tested classifier"):
            read_cell(tmp_path, "w", Treatment("real"), 0)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(MedSoftError, match=r"metrics.json: not valid JSON"):
        read_cell(tmp_path, "w", Treatment("real"), 0)


def test_generator_seeds_are_averaged_within_a_world() -> None:
    found = [
        Cell(world, Treatment(arm, 1.0), 0, {"auc": auc + shift, "validation_auc": 0.5}, {}, generator_seed=generated)
        for world, shift in (("w1", 0.0), ("w2", 0.1))
        for arm, generated, auc in (("ours", 0, 0.6), ("ours", 1, 0.8), ("duplicated", None, 0.5))
    ]
    study_ = Study(found, Compared("real", "duplicated", "ours", 1.0))
    paired = study_.paired(Treatment("ours", 1.0), Treatment("duplicated", 1.0))
    assert paired == pytest.approx({"w1": 0.2, "w2": 0.2})  # two generators of a world are no two worlds
    assert study_.mean(Treatment("ours", 1.0)).worlds == 2


def test_a_world_that_the_code_of_two_commits_has_made_is_named(tmp_path: Path) -> None:
    found = [replace(each, commit="ab1" if each.world == "w2" and each.seed else "ab2") for each in made(0.01).cells]
    judged = [Drawing("w3", name, None, {"seam": 1.0}, {"seam": 9}, commit=name) for name in ("ours", "no_msc")]
    write_study_report(tmp_path, "s", Study(found, made(0.01).comparison, drawings=Drawings(judged)), [])
    said = (tmp_path / "study.md").read_text()
    assert "Cells of w2 were made by the code of several commits (ab2; ab1): whether it does the same in all" in said
    assert "Drawings of w3 were made by the code of several commits (ours; no_msc)" in said
    assert said.count("several commits") == 2


def test_a_world_whose_cells_come_from_two_machines_is_named(tmp_path: Path) -> None:
    found = made(0.01).cells
    found = [
        replace(each, machine="Xeon" if each.world == "w2" and each.seed else "EPYC", commit="abc") for each in found
    ]
    write_study_report(tmp_path, "s", Study(found, made(0.01).comparison), [])
    said = (tmp_path / "study.md").read_text()
    assert "Cells of w2 come from several machines (EPYC; Xeon)" in said
    assert said.count("several machines") == 1
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert {row["machine"] for row in rows} == {"Xeon", "EPYC"}
    assert {row["commit"] for row in rows} == {"abc"}
    assert "Xeon" in (tmp_path / "study.html").read_text()


def test_the_page_says_whose_convergence_is_open_or_judged_by_an_older_rule(tmp_path: Path) -> None:
    """By what each metrics.json holds: versions before wrote no standard error."""
    now, before = ({"score_rise": 0.0, "score_rise_error": 0.0}, {"score_rise": 0.0, "loss_fall": 0.1})
    told = [
        *((True, now), (False, now), (None, now), (None, {})),
        *((True, before), (False, before), (False, before)),
    ]
    metrics = [{"converged": verdict, "convergence": numbers} for verdict, numbers in told] + [{}]
    found = []
    for seed, each in enumerate(metrics):
        write_json(tmp_path / "metrics.json", {"test": {"auc": {"value": 0.8}}, "validation": {"auc": 0.8}} | each)
        found.append(read_cell(tmp_path, "w", Treatment("real"), seed))
    write_study_report(tmp_path, "s", Study(found, made(0.01).comparison), [])
    said = (tmp_path / "study.md").read_text()
    assert "3 of 8 classifiers had not converged; give them more `steps`, the same in every arm." in said
    assert "Whether 3 of 8 classifiers had converged is open" in said
    assert "3 of 8 classifiers were judged by the rule of an older version" in said
    rows = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    older = ["True (older rule)", *["False (older rule)"] * 2]
    assert [row["converged"] for row in rows] == ["True", "False", "open", "open", *older, ""]
    assert "<td>open</td>" in (tmp_path / "study.html").read_text()
    write_study_report(tmp_path, "s", Study([found[0]], made(0.01).comparison), [])
    assert "converged" not in (tmp_path / "study.md").read_text()


def test_segmentation_is_compared_by_its_dice(tmp_path: Path) -> None:
    groups = [{"lesion_type": "osteolytic", "severity": "all", "dice": {"value": 0.4}}]
    found = []
    for world, shift in (("w1", 0.0), ("w2", 0.1)):
        for treatment in (Treatment("real"), Treatment("duplicated", 1.0), Treatment("ours", 1.0)):
            dice = 0.5 + shift + 0.1 * (treatment.arm == "ours")
            metrics = {"test": {"dice": {"value": dice}}, "validation": {"dice": dice}, "groups": groups}
            write_json(tmp_path / "metrics.json", metrics)
            found.append(read_cell(tmp_path, world, treatment, 0))
    study_ = Study(found, Compared("real", "duplicated", "ours", None, endpoint="dice"))
    write_study_report(tmp_path, "s", study_, [])
    said = (tmp_path / "study.md").read_text()
    assert "ours at 1 minus duplicated at 1: +0.100 (95 % +0.100 to +0.100) of test dice" in said
    assert "| Dice | validation Dice |" in said
    assert study_.by_kind().mean(Treatment("real"), "osteolytic, all").mean == pytest.approx(0.4)


def test_another_number_of_added_images_than_in_the_control_is_said(tmp_path: Path) -> None:
    found = [
        Cell(
            "w1",
            Treatment(arm, ratio),
            0,
            {"auc": 0.5, "validation_auc": 0.5},
            {"n_synthetic_used": drawn, "n_duplicated": again},
        )
        for arm, ratio, drawn, again in (
            ("real", None, 0, 0),
            ("duplicated", 3.0, 0, 30),
            ("ours", 3.0, 28, 0),
            ("base", 3.0, 30, 0),
        )
    ]
    uneven = Study(found, Compared("real", "duplicated", "ours", None))
    assert uneven.uneven() == ["w1, seed 0: 28 in ours at 3, 30 in duplicated at 3"]
    write_study_report(tmp_path, "s", uneven, [])
    said = (
        "In 1 cell another number of images was added than in the control, which is unfair (the first: w1, seed 0: 28"
    )
    assert said in (tmp_path / "study.md").read_text()
    assert not Study([each for each in found if each.treatment.arm != "ours"], uneven.comparison).uneven()
