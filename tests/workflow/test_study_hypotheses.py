"""ldm/workflow/study_hypotheses.py beside scipy: t tests, equivalence, Holm's correction, Fieller's interval."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ldm.workflow.study_hypotheses import equivalence_test, fieller, holm, outcomes, share_of_attainable, t_test
from ldm.workflow.study_keys import Compared, Hypothesis
from ldm.workflow.study_report import write_study_report
from ldm.workflow.study_results import Cell, Drawing, Drawings, Study, Treatment

GAINS = [0.021, 0.004, 0.018, 0.032, 0.011]
ARMS = ("real", "duplicated", "ours", "paste", "oracle")


def test_p_values_are_those_of_scipy() -> None:
    assert t_test(GAINS) == pytest.approx(stats.ttest_1samp(GAINS, 0.0).pvalue)
    below = stats.ttest_1samp(GAINS, 0.05, alternative="less").pvalue
    above = stats.ttest_1samp(GAINS, -0.05, alternative="greater").pvalue
    assert equivalence_test(GAINS, 0.05) == pytest.approx(max(below, above))
    assert equivalence_test([-each for each in GAINS], 0.05) == pytest.approx(max(below, above))
    assert equivalence_test(GAINS, 0.01) > 0.5  # their mean lies outside


def test_worlds_that_all_say_the_same_need_no_noise() -> None:
    assert (t_test([0.2, 0.2]), t_test([0.0, 0.0])) == (0.0, 1.0)
    assert (equivalence_test([0.0, 0.0], 0.01), equivalence_test([0.2, 0.2], 0.01)) == (0.0, 1.0)


def test_holms_correction_steps_down() -> None:
    # By hand: sorted 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, each at least the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_fiellers_bounds_are_where_students_test_turns() -> None:
    rng = np.random.default_rng(0)
    below = 0.042 + 0.01 * rng.standard_normal(6)
    above = 0.5 * below + 0.006 * rng.standard_normal(6)
    share = fieller(above.tolist(), below.tolist())
    assert share.value == pytest.approx(above.mean() / below.mean())
    for bound in (share.low, share.high):
        assert stats.ttest_1samp(above - bound * below, 0).pvalue == pytest.approx(0.05)
    assert stats.ttest_1samp(above - share.value * below, 0).pvalue == pytest.approx(1)
    # What can be gained is itself not told from nothing: no bounds.
    assert fieller([0.01, 0.02, 0.03], [0.05, -0.04, 0.03]).low is None
    assert fieller([0.01], [0.02]).value == pytest.approx(0.5)


def worlds_of(gains: dict[str, list[float]]) -> Study:
    """Cells of two seeds: real at 0.8, and the other arms so much above it, a number for each world."""
    cells = [
        Cell(f"w{n}", Treatment(arm, None if arm == "real" else 3.0), seed, {"auc": 0.8 + gain}, {})
        for arm, values in {"real": [0.0] * len(GAINS), **gains}.items()
        for n, gain in enumerate(values)
        for seed in (0, 1)
    ]
    compared = Compared("real", "duplicated", "ours", 3.0, "oracle")
    return Study(cells, compared, frozenset(cell.key for cell in cells))


@pytest.fixture
def study_() -> Study:
    same = [0.03, 0.02, 0.035, 0.01, 0.04]
    ours = [a + b for a, b in zip(same, GAINS, strict=True)]
    near = [a + 0.001 * (-1) ** n for n, a in enumerate(ours)]
    return worlds_of({"duplicated": same, "ours": ours, "paste": near, "oracle": [each + 0.04 for each in same]})


HYPOTHESES = {
    "H1": Hypothesis(("ours", "duplicated")),
    "H2": Hypothesis(("duplicated", "ours")),
    "H3": Hypothesis(("ours", "paste")),
    "H4": Hypothesis(("ours", "paste"), equivalence=0.01),
    "H5": Hypothesis(("ours", "duplicated"), equivalence=0.01),
    "H6": Hypothesis(("ours", "real"), endpoint="brier"),
}


def test_the_verdicts_follow_from_the_corrected_tests(study_: Study) -> None:
    found = {each.name: each for each in outcomes(HYPOTHESES, study_, {})}
    assert found["H1"].p == pytest.approx(stats.ttest_1samp(GAINS, 0).pvalue)
    assert found["H1"].adjusted == pytest.approx(5 * found["H1"].p)  # H4 is the smallest of six
    assert {name: each.verdict for name, each in found.items()} == {
        "H1": "a difference is not shown",  # 0.024 alone, not as one of six
        "H2": "a difference is not shown",
        "H3": "a difference is not shown",
        "H4": "equivalent within ±0.01",
        "H5": "equivalence within ±0.01 is not shown",
        "H6": "cannot be tested: two worlds at least",
    }
    alone = {name: HYPOTHESES[name] for name in ("H1",)}
    assert outcomes(alone, study_, {})[0].verdict == "higher"
    assert outcomes({"H2": HYPOTHESES["H2"]}, study_, {})[0].verdict == "lower"


def test_nothing_is_said_before_all_cells_are_finished(study_: Study) -> None:
    half = replace(study_, cells=[cell for cell in study_.cells if cell.world != "w4" or cell.treatment.arm != "ours"])
    found = {each.name: each for each in outcomes({name: HYPOTHESES[name] for name in ("H1", "H4")}, half, {})}
    assert {each.verdict for each in found.values()} == {"open: 2 cells to come"}
    assert {each.adjusted for each in found.values()} == {1.0}


def test_a_hypothesis_may_be_about_the_worlds_of_another_study(study_: Study) -> None:
    other = worlds_of({"duplicated": [0.0] * 5, "ours": [0.05, 0.06, 0.05, 0.06, 0.05]})
    hypothesis = Hypothesis(("ours", "duplicated"), study="other.yaml")
    (found,) = outcomes({"H": hypothesis}, study_, {"other.yaml": other})
    assert found.change.mean == pytest.approx(0.054)
    assert found.asked == "ours at 3 minus duplicated at 3 (other.yaml)"


def test_the_page_shows_hypotheses_and_shares(study_: Study, tmp_path: Path) -> None:
    share = share_of_attainable(study_, "ours")
    assert share.value == pytest.approx(np.mean(GAINS) / 0.04)
    for oracle in (None, "real"):  # not asked for; below the control
        assert share_of_attainable(replace(study_, compare=replace(study_.comparison, oracle=oracle)), "ours") is None
    write_study_report(tmp_path, "s", study_, [], outcomes(HYPOTHESES, study_, {}))
    for file in ("study.md", "study.html"):
        said = (tmp_path / file).read_text()
        assert "equivalent within ±0.01" in said
        assert f"{share.low:.2f} to {share.high:.2f}" in said
    assert "The hypotheses below are the claim" in (tmp_path / "study.md").read_text()


def drawn(generators: dict[str, list[float]]) -> Drawings:
    """Agreement of two seeds of each generator, 0.02 apart, in worlds of these means; of one seed for ``oracle``."""
    found = [
        Drawing(
            f"w{n}", name, seed, {"agreement": value + (0.01, -0.01, 0)[-1 if seed is None else seed]}, {"agreement": 9}
        )
        for name, values in generators.items()
        for n, value in enumerate(values)
        for seed in ((None,) if name == "oracle" else (0, 1))
    ]
    return Drawings(found, frozenset(each.key for each in found))


def test_hypotheses_may_be_about_the_drawings(tmp_path: Path) -> None:
    base = [0.5, 0.6, 0.4, 0.55, 0.52]
    drawings = drawn({"ours": [a + b for a, b in zip(base, GAINS, strict=True)], "no_msc": base, "oracle": [0.9] * 5})
    alone = Study([], None, drawings=drawings)
    asked = {"of": "drawings", "endpoint": "agreement"}
    hypotheses = {"H": Hypothesis(("ours", "no_msc"), **asked), "E": Hypothesis(("ours", "oracle"), **asked)}
    found = {each.name: each for each in outcomes(hypotheses, alone, {})}
    assert found["H"].p == pytest.approx(stats.ttest_1samp(GAINS, 0).pvalue)
    assert (found["H"].asked, found["H"].verdict, found["E"].verdict) == ("ours minus no_msc", "higher", "lower")
    (elsewhere,) = outcomes({"H": replace(hypotheses["H"], study="o.yaml")}, Study([], None), {"o.yaml": alone})
    assert elsewhere.p == pytest.approx(found["H"].p)
    open_ = replace(drawings, judged=[each for each in drawings.judged if each.key != ("w1", "ours", 1)])
    assert outcomes(hypotheses, Study([], None, drawings=open_), {})[0].verdict == "open: 1 drawing to come"

    write_study_report(tmp_path, "s", alone, [], list(found.values()))
    said = (tmp_path / "study.md").read_text()
    assert "No classifier learns from these drawings; a judge reads them. The hypotheses below are the claim" in said
    assert "| H | ours minus no_msc | agreement of the drawings | +0.017 (" in said
    assert "| oracle | 5 | 0.900 (0.900 to 0.900) |" in said
    assert "| ours | oracle | 5 | -0.369 (" in said
    assert "dose_response" not in said + (tmp_path / "study.html").read_text()
    rows = (tmp_path / "drawings.csv").read_text().splitlines()
    assert rows[0] == "world,generator,generator_seed,endpoint,value,n,machine,commit,settings"
    assert len(rows) == 1 + 5 * (2 + 2 + 1)


def test_each_outcome_says_of_how_many_worlds_it_is(study_: Study, tmp_path: Path) -> None:
    """On the page and in hypotheses.csv; a number whose worlds are fewer than its row's says it, too."""
    cells = [cell for cell in study_.cells if cell.world not in ("w3", "w4") or cell.treatment.arm != "paste"]
    cells = [
        replace(cell, values=cell.values | {"brier": 0.1} if cell.world == "w0" else cell.values) for cell in cells
    ]
    half = replace(study_, cells=cells)
    write_study_report(tmp_path, "s", half, [], outcomes({name: HYPOTHESES[name] for name in ("H1", "H3")}, half, {}))
    said = (tmp_path / "study.md").read_text()
    assert "| endpoint | difference | worlds | p |" in said
    assert re.search(r"\| H1 \| ours at 3 minus duplicated at 3 \| auc \| \+0.017 \(.*\) \| 5 \| 0.0", said)
    assert re.search(r"\| H3 \| ours at 3 minus paste at 3 \| auc \| .* \| 3 \| ", said)
    assert re.search(r"\| ours at 3 \| 5 \| 0.844 \(.*\) \| 0.100 \(1 world\) \|", said)
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "hypotheses.csv").read_text().splitlines())}
    assert [rows[name]["worlds"] for name in ("H1", "H3")] == ["5", "3"]
    assert float(rows["H1"]["mean"]) == pytest.approx(np.mean(GAINS))
    assert rows["H3"]["verdict"] == "open: 4 cells to come"


def test_arms_of_unequal_worlds_or_numbers_of_drawings_are_named(study_: Study, tmp_path: Path) -> None:
    cells = [cell for cell in study_.cells if cell.world != "w4" or cell.treatment.arm != "paste"]
    half = replace(study_, cells=cells)
    write_study_report(tmp_path, "s", half, [], outcomes({"H3": HYPOTHESES["H3"]}, half, {}))
    said = (tmp_path / "study.md").read_text()
    assert "H3: ours at 3 is there in 5 worlds, paste at 3 in 4; their difference is over the 4 that both have." in said
    assert (
        "3 comparisons are of arms that are finished in different worlds (the first: paste at 3 is there in 4" in said
    )
    write_study_report(tmp_path, "s", study_, [], outcomes(HYPOTHESES, study_, {}))
    assert "is there in" not in (tmp_path / "study.md").read_text()


def test_cells_of_a_hypothesis_with_unequal_numbers_of_added_images_are_named(study_: Study) -> None:
    cells = [
        replace(cell, counts={"n_synthetic_used": 28 if cell.treatment.arm == "paste" and cell.world == "w2" else 30})
        for cell in study_.cells
    ]
    (found,) = outcomes({"H3": HYPOTHESES["H3"]}, replace(study_, cells=cells), {})
    assert found.unequal == "in 1 world another number of images was added (w2: 30 in ours at 3, 28 in paste at 3)"


def test_drawings_of_unequal_numbers_are_named(tmp_path: Path) -> None:
    drawings = drawn({"ours": [0.5, 0.6, 0.4], "no_msc": [0.4, 0.5, 0.3], "oracle": [0.9, 0.9]})
    drawings.judged = [
        replace(each, counts={"agreement": 7}) if each.generator == "no_msc" and each.world == "w1" else each
        for each in drawings.judged
    ]
    alone = Study([], None, drawings=drawings)
    hypotheses = {"H": Hypothesis(("no_msc", "oracle"), of="drawings", endpoint="agreement")}
    write_study_report(tmp_path, "s", alone, [], outcomes(hypotheses, alone, {}))
    said = (tmp_path / "study.md").read_text()
    assert "ours and no_msc: in 1 world another number of drawings was read (w1: 9 of ours, 7 of no_msc)." in said
    assert "ours and oracle: ours is there in 3 worlds, oracle in 2; their difference is over the 2 that bo" in said
    assert "H: no_msc is there in 3 worlds, oracle in 2; their difference is over the 2 that both have; in 1 wo" in said


def test_a_world_whose_drawings_come_from_two_machines_is_named(tmp_path: Path) -> None:
    drawings = drawn({"ours": [0.5, 0.6], "no_msc": [0.4, 0.5]})
    drawings.judged = [
        replace(each, machine="Xeon" if each.world == "w1" and each.generator == "ours" else "EPYC")
        for each in drawings.judged
    ]
    write_study_report(tmp_path, "s", Study([], None, drawings=drawings), [])
    said = (tmp_path / "study.md").read_text()
    assert "Drawings of w1 come from several machines (Xeon; EPYC)" in said
    assert said.count("several machines") == 1


def test_less_of_an_error_of_the_drawings_is_better(tmp_path: Path) -> None:
    drawings = drawn({"ours": [0.1, 0.2], "no_msc": [0.3, 0.3]})
    for each in drawings.judged:
        each.values["seam_error"] = each.values.pop("agreement")
        each.counts["seam_error"] = 9
    hypotheses = {"H": Hypothesis(("ours", "no_msc"), of="drawings", endpoint="seam_error")}
    alone = Study([], None, drawings=drawings)
    write_study_report(tmp_path, "s", alone, [], outcomes(hypotheses, alone, {}))
    assert "| seam_error of the drawings (less is better) |" in (tmp_path / "study.md").read_text()
