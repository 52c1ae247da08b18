"""tool/study_figures.py on studies whose cells are written by hand."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import studies
import tiny

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import write_json
from ldm.workflow import study_design
from ldm.workflow.study_figures import drawings_figure
from tool import study_figures

LIFT = {
    "real": 0.0,
    "duplicated": 0.02,
    "augmented": 0.01,
    "paste": 0.03,
    "poisson": 0.03,
    "oracle": 0.04,
    "best": 0.03,
}


def finished(folder: Path, name: str, lesions: int, **changes: object) -> Path:
    """A study of three worlds whose AUC grows with the lesions; duplicated gains 0.02, on subtle ones 0.05."""
    folder = folder / name
    folder.mkdir()
    path = studies.write(folder, worlds=[3, 4, 5], output_dir=str(folder / name), **changes)
    design = study_design.load_design(path)
    for group in study_design.plan_groups(design):
        for cell in group.cells:
            auc = 0.7 + 0.001 * lesions + LIFT[cell.arm.name] + 0.01 * design.worlds.index(cell.world)
            subtle = 0.6 + 2.5 * LIFT[cell.arm.name]
            groups = [{"lesion_type": "osteolytic", "severity": "subtle", "auc": {"value": subtle}}]
            metrics = {"test": {"auc": {"value": auc}}, "validation": {"auc": auc}, "groups": groups}
            counts = {"n_synthetic_used": 0, "n_duplicated": 2, "n_train_diseased": lesions, "converged": True}
            write_json(Path(cell.folder) / "metrics.json", metrics | counts)
    return path


def test_figures_and_tables_of_two_studies(tmp_path: Path) -> None:
    few, many = finished(tmp_path, "few", 8), finished(tmp_path, "many", 32)
    out = tmp_path / "figures"
    assert tiny.call(study_figures, few, many, "--output_dir", out) == 0
    for name in ("learning_curve", "arms_few", "arms_many"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    curve = (out / "learning_curve.svg").read_text()
    for text in ("real lesions to train on", "duplicated", "<!-- 8 -->", "<!-- 32 -->"):
        assert text in curve
    assert "duplicated at 1" not in (out / "arms_few.svg").read_text().replace("minus that of duplicated at 1", "")
    rows = list(csv.DictReader((out / "kinds_few.csv").read_text().splitlines()))
    assert [(row["lesion_type"], row["severity"], row["arm"], float(row["value"])) for row in rows] == [
        ("osteolytic", "subtle", "real", pytest.approx(0.6)),
        ("osteolytic", "subtle", "duplicated", pytest.approx(0.65)),
    ]
    page = (out / "figures.md").read_text()
    assert "| osteolytic | subtle | 0.600 | 0.650 |" in page
    assert "6 of 6 classifiers are finished." in page


def test_a_learning_curve_shows_the_arms_that_have_a_course(tmp_path: Path) -> None:
    arms = studies.SMALL["arms"] | {"augmented": {"use": "duplicate_real", "ratios": [1], "set": ["lr=0.01"]}}
    few, many = finished(tmp_path, "few", 8), finished(tmp_path, "many", 32, arms=arms)
    out = tmp_path / "figures"
    assert tiny.call(study_figures, few, many, "--output_dir", out) == 0
    assert "augmented" not in (out / "learning_curve.svg").read_text()
    assert tiny.call(study_figures, many, "--output_dir", tmp_path / "one") == 0
    assert "augmented" in (tmp_path / "one/learning_curve.svg").read_text()


def test_the_same_images_after_each_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns are those who had the same sentences, and whose drawings are not chosen; rows two of each lesion type."""
    words = "python tool/copy_paste.py --train_json {train_json} --output_dir {pictures} --seed 0"
    twins = "python tool/make_phantoms.py --twins_of {train_json} --output_dir {pictures}"
    generators = {
        "oracle": {"run": twins},
        "paste": {"run": words},
        "poisson": {"run": f"{words} --method poisson"},
        "best": {"run": words, "choose": "--best 1"},
    }
    drawn = {name: {"use": "mix", "generator": name, "ratios": [1]} for name in generators}
    phantoms = studies.SMALL["phantoms"] | {"healthy": 20, "diseased": 12}
    given = {
        "generators": generators,
        "arms": studies.SMALL["arms"] | drawn,
        "phantoms": phantoms,
        "model": "models/phantom.yaml",
    }
    path = finished(tmp_path, "drawn", 8, **given)
    design = study_design.load_design(path)
    assert drawings_figure(design) is None
    world = design.worlds[1]
    steps = [step for group in study_design.plan_groups(design) if group.world == world for step in group.drawing]
    for step in [*world.steps, *(each for each in steps if "choose_results" not in each.run)]:
        studies.run_command(step.run)
    figure = drawings_figure(design)
    assert figure is not None
    assert [each.get_title() for each in figure.axes if each.get_title()] == ["original", "paste", "poisson"]
    rows = [each.get_ylabel() for each in figure.axes if each.get_ylabel()]
    assert rows == sorted(rows)
    assert {rows.count(kind) for kind in rows} <= {1, 2}
    tiles = np.stack([each.get_images()[0].get_array() for each in figure.axes]).reshape(len(rows), 3, 128, 128)
    middle, corner = np.s_[:, :, 48:80, 48:80], np.s_[:, :, :8, :8]
    assert (np.abs(tiles - tiles[:, :1])[corner] == 0).all()  # far from the vertebra nothing changes
    assert all(np.abs(tiles - tiles[:, :1])[middle].max(axis=(2, 3))[:, 1:].ravel() > 0.02)

    out = tmp_path / "figures"
    assert tiny.call(study_figures, path, "--output_dir", out) == 0
    assert (out / "drawings_drawn.png").read_bytes().startswith(b"\x89PNG")
    assert "![drawings of drawn](drawings_drawn.png)" in (out / "figures.md").read_text()
    Path(world.train).unlink()
    assert tiny.call(study_figures, path, "--output_dir", tmp_path / "again") == 0
    assert re.search(r"warning: no drawings of drawn are shown: .*annotations_train\.json", capsys.readouterr().out)
    assert not (tmp_path / "again/drawings_drawn.png").exists()


def test_studies_without_cells_or_of_one_name_are_refused(tmp_path: Path) -> None:
    few = finished(tmp_path, "few", 8)
    with pytest.raises(UsageError, match=r"study.yaml: few is the name of another study's output folder"):
        tiny.call(study_figures, few, few, "--output_dir", tmp_path / "out")
    empty = studies.write(tmp_path)
    with pytest.raises(MedSoftError, match=r"study.yaml: no cell of it is finished; run the study first"):
        tiny.call(study_figures, few, empty, "--output_dir", tmp_path / "out")
    judge = {"weights": "judge.safetensors"}
    generators = {"a": {"run": "python tool/copy_paste.py --output_dir {pictures}"}}
    alone = {"arms": {}, "compare": None, "judge": judge, "judged": ["a"], "generators": generators}
    with pytest.raises(UsageError, match=r"study.yaml: has no arms, so there are no cells to show"):
        tiny.call(study_figures, studies.write(tmp_path, **alone), "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
