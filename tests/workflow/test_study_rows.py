"""Rows of a study that another machine has computed: they count as if they had been computed in here."""

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import studies
import tiny
from hypothesis import given
from hypothesis import strategies as st

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import write_json
from ldm.core.tables import write_csv
from ldm.workflow import study_design
from ldm.workflow.plans import PlanRecord
from ldm.workflow.study_hypotheses import outcomes
from ldm.workflow.study_results import Cell, Drawing, Drawings, Study, Treatment
from ldm.workflow.study_rows import ELSEWHERE, cell_rows, drawing_rows, read_rows, with_rows_from_elsewhere
from tool import study

CONFIRMATION = "configs/study_controls_confirmation.yaml"
HYPOTHESES = {"H": {"minus": ["duplicated", "real"]}}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8)
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
WHOLE = st.none() | st.integers(0, 10**6)


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """``write_study(name)``: a study of two worlds with a hypothesis, whose output is ``name``/out."""

    def write(name: str, **changes: object) -> Path:
        (tmp_path / name).mkdir()
        return studies.write(tmp_path / name, worlds=[3, 4], seeds=[0, 1], hypotheses=HYPOTHESES, **changes)

    return write


def finish(path: Path, *worlds: str) -> None:
    """Leave the metrics that these worlds' classifiers would have."""
    design = study_design.load_design(path)
    for group in study_design.plan_groups(design):
        for number, cell in enumerate(group.cells):
            if cell.world.name in worlds:
                value = 0.6 + 0.01 * number + 0.1 * (cell.arm.name == "duplicated") / int(cell.world.name[-1])
                metrics = {"test": {"auc": {"value": value}, "brier": {"value": None}}, "validation": {"auc": 0.5}}
                metrics |= {"n_duplicated": 2, "n_train_diseased": 4, "converged": None}
                write_json(Path(cell.folder) / "metrics.json", metrics)


def record(path: Path, *worlds: str) -> None:
    """Leave those metrics, and in the plans' records that their cells have been run."""
    finish(path, *worlds)
    for group in study_design.plan_groups(study_design.load_design(path)):
        for cell in group.cells:
            if cell.world.name in worlds:
                PlanRecord(group.plan).add(cell.step, 1.0, 0)


@pytest.fixture
def _same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the checkout of these tests looks like."""
    for module in ("plans", "study_run"):
        monkeypatch.setattr(f"ldm.workflow.{module}.commit", lambda: "abc1")


def bring(path: Path, text: str, name: str = "node7.csv") -> Path:
    """Put a file beside the study's own results."""
    file = Path(study_design.load_design(path).keys.output_dir) / ELSEWHERE / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_rows_of_other_machines_give_the_numbers_of_one(write_study, tmp_path: Path) -> None:
    whole, first, second = write_study("whole"), write_study("first"), write_study("second")
    finish(whole, "world_3", "world_4")
    finish(first, "world_3")
    finish(second, "world_4")
    for path in (whole, first):
        assert tiny.call(study, path, "--collect") == 0
    assert "open: 4 cells" in (tmp_path / "first/out/hypotheses.csv").read_text()
    bring(second, (tmp_path / "first/out/results.csv").read_text())
    assert tiny.call(study, second, "--collect") == 0
    assert (
        "of other machines (elsewhere/*.csv): 4 cells, 0 generators'" in (tmp_path / "second/out/study.md").read_text()
    )
    for name in ("results.csv", "hypotheses.csv"):
        rows = [list(csv.reader((tmp_path / each / "out" / name).open())) for each in ("whole", "second")]
        assert sorted(rows[0]) == sorted(rows[1]), name


@pytest.mark.usefixtures("_same_code")
def test_rows_of_other_settings_are_refused_wherever_the_folder_was(write_study, tmp_path: Path) -> None:
    first, same = write_study("first"), write_study("same")
    record(first, "world_3")
    tiny.call(study, first, "--collect")
    rows = (tmp_path / "first/out/results.csv").read_text()
    bring(same, rows)
    tiny.call(study, same, "--collect")
    assert "not checked" not in (tmp_path / "same/out/study.md").read_text()
    assert (tmp_path / "same/out/results.csv").read_text() == rows
    other = write_study("other", set=["EPOCHS=2", "img_size=32", "Batch_Size=8"])
    file = bring(other, rows)
    said = (
        r"world_3, real, 0 was made with other settings \(expected \w{16}, found \w{16}, commit abc1\): .* compute it"
    )
    for flags in (["--collect"], []):
        with pytest.raises(MedSoftError, match=rf"{file}, line 2: {said}"):
            tiny.call(study, other, *flags)


@pytest.mark.usefixtures("_same_code")
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            "world_3,real,,,0,0.5,4,,1.5,EPYC,abc1\n",
            "not checked: the settings of 1 of them, which do not say theirs; not t",
        ),
        (
            "world_3,real,,,0,0.5,4,,1.5,EPYC,7c1bd90\n",
            "and whether code of another commit does the same (7c1bd90); not t",
        ),
        (
            "world_3,real,,,0,0.5,4,,1.5,EPYC,\n",
            "and whether code of another commit does the same (unknown); not there",
        ),
        ("world_3,real,,,0,0.5,4,,1.5,EPYC,abc1\n", "; not there, and not run here: 3 of world_3. Reported at"),
    ],
)
def test_what_cannot_be_checked_of_rows_is_said(write_study, tmp_path: Path, row: str, said: str) -> None:
    path = write_study("here")
    bring(path, CELLS + row)
    tiny.call(study, path, "--collect")
    assert said in (tmp_path / "here/out/study.md").read_text()


def test_settings_are_those_of_what_is_made_once_too_where_it_is_used(tmp_path: Path) -> None:
    made = {}
    for seed in (1, 2):
        run = f"python classifier.py configs/classifier/phantom.json --set seed={seed} output_dir={{output_dir}}/back"
        steps = [{"name": "back", "run": run, "makes": ["{output_dir}/back/classifier.safetensors"]}]
        arms = {"real": {}, "duplicated": {"use": "duplicate_real", "ratios": [1]}}
        arms["begun"] = {"set": ["pretrained={output_dir}/back/classifier.safetensors"]}
        design = study_design.load_design(studies.write(tmp_path, steps=steps, arms=arms))
        cells = [each for group in study_design.plan_groups(design) for each in group.cells]
        made[seed] = {each.arm.name: study_design.settings_of(design, each) for each in cells}
    assert [name for name in made[1] if made[1][name] != made[2][name]] == ["begun"]
    assert len(set(made[1].values())) == 3


def committed(path: str, folder: Path, files: Sequence[str] = ()) -> Study:
    """A study of ``configs`` with the rows of these files of ``docs``, by default those of its confirmation."""
    name = Path(path).stem.removeprefix("study_").removesuffix("_confirmation").removesuffix("_drawings")
    rows = (f"study_{name}_confirmation.csv", f"study_{name}_drawings_confirmation.csv")
    files = files or [each for each in rows if (tiny.ROOT / "docs" / each).exists()]
    design = study_design.load_design(tiny.ROOT / path)
    groups = list(study_design.plan_groups(design))
    cells = [(each, each.made and each.made.seed) for group in groups for each in group.cells]
    planned = [(each.world.name, Treatment(each.arm.name, each.ratio), seed, each.seed) for each, seed in cells]
    judged = [(each.world.name, each.made.name, each.made.seed) for group in groups for each in group.judged]
    study = Study([], design.keys.compare, frozenset(planned), Drawings([], frozenset(judged)))
    (folder / ELSEWHERE).mkdir(parents=True)
    for file in files:
        shutil.copy(tiny.ROOT / "docs" / file, folder / ELSEWHERE)
    return with_rows_from_elsewhere(study, folder)


def test_the_committed_rows_give_the_documented_hypotheses(tmp_path: Path) -> None:
    """What docs/results.md says of each hypothesis, from the raw rows beside it."""
    keys = study_design.load_design(tiny.ROOT / CONFIRMATION).keys
    paths = {each.study or CONFIRMATION for each in keys.hypotheses.values()}
    studies = {path: committed(path, tmp_path / Path(path).stem) for path in paths}
    said = " ".join((tiny.ROOT / "docs/results.md").read_text().split())
    found = {each.name: each for each in outcomes(keys.hypotheses, studies[CONFIRMATION], studies)}
    assert list(found) == ["H1", "H2", "H3a", "H3b", "H3c", "H3d", "E1", "E2"]
    for name, each in found.items():
        assert not each.missing, name
        assert each.change.worlds == 8
        shown = f"{each.change.mean:+.3f} ({each.change.low:+.3f} to {each.change.high:+.3f})"
        assert shown.replace("-0.000", "+0.000") in said, name  # as in a report, no zero is negative
        assert each.unequal is None


def test_the_committed_rows_give_the_documented_looks(tmp_path: Path) -> None:
    """What docs/results.md says of the untrained base, and of the controls of the MSC's knowledge."""
    files = ("looks/study_controls_base.csv", "looks/study_controls_base_drawings.csv")
    base = committed("configs/study_controls_base.yaml", tmp_path / "base", files)
    words = committed("configs/study_words_knowledge.yaml", tmp_path / "words", ["study_words_knowledge.csv"])
    ours, control, drawn = (base.at(arm, 3.0) for arm in ("ours", "duplicated", "base"))
    told = [base.difference(drawn, control), base.difference(ours, drawn)]
    told += [words.drawings.difference("ours", other, "agreement") for other in ("unknown", "attn3_table", "no_msc")]
    said = " ".join((tiny.ROOT / "docs/results.md").read_text().split())
    for each in told:
        assert each
        assert each.worlds == 8
        assert f"{each.mean:+.3f} ({each.low:+.3f} to {each.high:+.3f})" in said


def test_the_committed_rows_give_the_documented_hypotheses_of_shape(tmp_path: Path) -> None:
    path = "configs/study_shape_confirmation.yaml"
    study, said = committed(path, tmp_path), " ".join((tiny.ROOT / "docs/results.md").read_text().split())
    found = outcomes(study_design.load_design(tiny.ROOT / path).keys.hypotheses, study, {})
    assert [each.name for each in found] == ["H4", "H5"]
    for each in found:
        assert not each.missing
        assert each.change
        assert each.change.worlds == 8
        assert f"{each.change.mean:+.3f} ({each.change.low:+.3f} to {each.change.high:+.3f})" in said
    assert [each.adjusted < 0.001 for each in found] == [False, True]


def test_the_committed_rows_give_the_documented_ablations(tmp_path: Path) -> None:
    """What docs/evaluation.md says of the drawings of two changes of training."""
    found = committed("configs/study_ablations.yaml", tmp_path, ["study_ablations_drawings.csv"]).drawings
    said = " ".join((tiny.ROOT / "docs/evaluation.md").read_text().split())
    for name in ("checked", "best_of_4", "healthy_carry", "msc_kept"):
        each = found.difference(name, "ours", "agreement")
        assert each
        assert each.worlds == 4
        assert f"{each.mean:+.3f} ({each.low:+.3f} to {each.high:+.3f})" in said


def test_worlds_of_other_machines_are_not_run_here(write_study, tmp_path: Path, capsys, monkeypatch) -> None:
    other, path = write_study("other"), write_study("here")
    finish(other, "world_3")
    tiny.call(study, other, "--collect")
    bring(path, (tmp_path / "other/out/results.csv").read_text())
    monkeypatch.setattr("ldm.workflow.plan_run._run_child", lambda words, step: 7)
    assert tiny.call(study, path) == 7
    said = capsys.readouterr().out
    assert f"not run here, as rows of them are in {tmp_path / 'here/out/elsewhere'}: world_3" in said
    assert "--- world_4" in said
    assert "--- world_3" not in said
    with pytest.raises(UsageError, match=r"--worlds world_3: another machine's rows of it are in .*elsewhere; remove"):
        tiny.call(study, path, "--worlds", "world_3")


def test_where_all_worlds_are_of_other_machines_nothing_runs_and_the_report_is_written(
    write_study, tmp_path: Path, monkeypatch
) -> None:
    """No judge is trained for it, either."""
    other, path = write_study("other"), write_study("here")
    finish(other, "world_3", "world_4")
    tiny.call(study, other, "--collect")
    bring(path, (tmp_path / "other/out/results.csv").read_text())
    monkeypatch.setattr("ldm.workflow.plan_run._run_child", lambda words, step: 7)
    assert tiny.call(study, path) == 0
    assert "8 of 8 cells are finished" in (tmp_path / "here/out/study.md").read_text()


def test_a_world_that_was_computed_here_too_is_refused(write_study, tmp_path: Path) -> None:
    path = write_study("here")
    finish(path, "world_3", "world_4")
    tiny.call(study, path, "--collect")
    bring(path, (tmp_path / "here/out/results.csv").read_text())
    with pytest.raises(MedSoftError, match=r"world_3: has rows in .*elsewhere and results in .*remove either"):
        tiny.call(study, path, "--collect")


CELLS = "world,arm,ratio,generator_seed,seed,auc,n_train_diseased,converged,seconds,machine,commit\n"
GOOD = "world_3,real,,,0,0.5,4,,1.5,EPYC,abc\n"
JUDGED = "world,generator,generator_seed,endpoint,value,n,machine,commit\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a header and at least one row"),
        ("arm,seed\nreal,0\n", "expected a column world, found arm, seed"),
        (CELLS.replace(",commit", "") + GOOD.replace(",abc", ""), "expected a column commit, found"),
        ("world,name\nworld_3,a\n", "expected a column generator, found world, name"),
        (
            CELLS + GOOD.replace("world_3", "world_5"),
            "line 2: the study plans no cell world_5, real, 0; is it a",
        ),
        (CELLS + GOOD.replace("real", "ours"), "line 2: the study plans no cell world_3, ours, 0"),
        (CELLS + GOOD.replace("real,", "duplicated,2"), "line 2: the study plans no cell world_3, duplicated at 2, 0"),
        (CELLS + GOOD + GOOD, "line 3: a second row of the cell world_3, real, 0; keep one"),
        (CELLS + GOOD.replace("0.5", "good"), "line 2: auc: expected a number or nothing, found 'good'"),
        (CELLS + GOOD.replace("0.5", "nan"), "line 2: auc: expected a number or nothing, found 'nan'"),
        (CELLS + GOOD.replace(",0,", ",,", 1), "line 2: the study plans no cell world_3, real; is it"),
        (CELLS + GOOD.replace(",0,", ",0.5,", 1), "line 2: seed: expected a whole number or nothing, found '0.5'"),
        (CELLS + "world_3,real\n", "row 1 below the header ends before its column ratio"),
        (JUDGED + "world_3,ours,0,agreement,0.5,9,EPYC,abc\n", "line 2: the study judges no drawings world_3, ours, 0"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(write_study, text: str, said: str) -> None:
    path = write_study("here")
    file = bring(path, text)
    for flags in (["--collect"], []):
        with pytest.raises(MedSoftError) as caught:
            tiny.call(study, path, *flags)
        assert str(caught.value).startswith(str(file)), caught.value
        assert said in str(caught.value)


def test_a_second_number_of_the_same_drawings_is_refused(tmp_path: Path) -> None:
    drawing = Drawing("w", "ours", 0, {"agreement": 0.5}, {"agreement": 9})
    (tmp_path / ELSEWHERE).mkdir()
    write_csv(tmp_path / ELSEWHERE / "a.csv", drawing_rows(Drawings([drawing, drawing])))
    with pytest.raises(MedSoftError, match=r"a.csv, line 3: a second agreement of w, ours, 0; keep one"):
        read_rows(Study([], None, drawings=Drawings([], frozenset([drawing.key]))), tmp_path)


def test_drawings_of_other_settings_are_refused(tmp_path: Path) -> None:
    drawing = Drawing("w", "ours", 0, {"agreement": 0.5}, {"agreement": 9}, commit="abc", settings="12ab")
    (tmp_path / ELSEWHERE).mkdir()
    write_csv(tmp_path / ELSEWHERE / "a.csv", drawing_rows(Drawings([drawing])))
    planned = Study([], None, drawings=Drawings([], frozenset([drawing.key])), settings={drawing.key: "34cd"})
    with pytest.raises(
        MedSoftError, match=r"a.csv, line 2: w, ours, 0 was made .*expected 34cd, found 12ab, commit abc"
    ):
        read_rows(planned, tmp_path)


@given(st.data())
def test_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    treatment = Treatment(data.draw(TEXTS), data.draw(NUMBERS))
    values = {name: data.draw(NUMBERS) for name in ("auc", "brier", "validation_auc")}
    counts = {"n_synthetic_used": data.draw(WHOLE), "n_duplicated": data.draw(WHOLE)}
    more = {"machine": data.draw(TEXTS), "commit": data.draw(TEXTS), "converged": data.draw(TEXTS)}
    more |= {"settings": data.draw(TEXTS)}
    more |= {"n_train_diseased": data.draw(WHOLE), "seconds": data.draw(NUMBERS), "generator_seed": data.draw(WHOLE)}
    cell = Cell(data.draw(TEXTS), treatment, data.draw(st.integers(0, 9)), values, counts, **more)
    judged = Drawing(cell.world, data.draw(TEXTS), cell.generator_seed, {"seam": values["auc"]}, {"seam": 3})
    folder = tmp_path_factory.mktemp("study")
    (folder / ELSEWHERE).mkdir()
    write_csv(folder / ELSEWHERE / "a.csv", cell_rows(Study([cell], None)))
    write_csv(folder / ELSEWHERE / "b.csv", drawing_rows(Drawings([judged])))
    planned = Study([], None, frozenset([cell.key]), Drawings([], frozenset([judged.key])))
    assert read_rows(planned, folder) == ([cell], [judged])
