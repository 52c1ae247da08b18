"""tool/init.py on a data set that nothing of this repository has made."""

import json
import re
import shlex
from pathlib import Path

import children
import numpy as np
import pytest
import studies
import tiny
from PIL import Image

from ldm.core.errors import MedSoftError, UsageError
from ldm.workflow.plans import load_plan
from ldm.workflow.study_design import load_design, plan_groups
from tool import init, run_stages

PARTS = {
    "plan.yaml",
    "study.yaml",
    "README.md",
    *(f"classifier_{name}.json" for name in ("real", "duplicated", "augmented")),
}


def foreign(folder: Path, healthy: int, diseased: int) -> Path:
    """Flat columns of grey boxes on noise, JPEG; lesions are discs, lighter or darker, in two sizes of image."""
    rng = np.random.default_rng(1)
    for number in range(healthy + diseased):
        height, width = (96, 80) if number % 3 else (80, 88)
        rows, columns = np.mgrid[:height, :width]
        picture = 60 + 12 * rng.standard_normal((height, width))
        picture += 70 * (np.abs(columns - width / 2) < 18) * (rows % 30 > 4)
        sample = folder / f"case {number}" / "slice"
        sample.mkdir(parents=True)
        ill = number >= healthy
        if ill:
            middle = height // 30 // 2 * 30 + 16, width / 2 + rng.uniform(-6, 6)
            disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < rng.uniform(20, 49)
            picture += np.where(disc, 60 if number % 2 else -55, 0)
            Image.fromarray(np.uint8(255 * disc)).save(sample / "mask.png")
        Image.fromarray(np.uint8(picture.clip(0, 255))).save(sample / "image.jpg", quality=95)
        (sample / "prompt.txt").write_text(f"a {'light' if number % 2 else 'dark'} spot" if ill else "healthy")
        box = (np.abs(columns - width / 2) < 18) & (rows // 30 == height // 30 // 2) & (rows % 30 > 4)
        Image.fromarray(np.uint8(box)).save(sample / "anatomy.png")
        (sample / "meta.json").write_text(json.dumps({"patient_id": f"p{number}", "severity": "Grade II"}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("their data"), 24, 16)


def made(data: Path, folder: Path, *more: object) -> int:
    return tiny.call(init, data, "--output_dir", folder, "--model", "models/phantom.yaml", "--ckpt", tiny.SD, *more)


def test_a_recipe_for_foreign_data_can_be_followed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "my recipe"
    assert made(data, recipe) == 0
    assert {path.name for path in recipe.iterdir()} == PARTS
    plan, design = load_plan(recipe / "plan.yaml"), load_design(recipe / "study.yaml")
    steps = [*plan.steps, *design.steps, *(step for group in plan_groups(design) for step in group.plan.steps)]
    for step in steps:
        studies.check_command(step.run)
    runs = {step.name: shlex.split(step.run) for step in plan.steps}
    assert runs["draw"][runs["draw"].index("--limit") + 1 :] == ["12", "--variants", "3"]  # 3 * 0.7 * 16 or more
    said = (recipe / "README.md").read_text()
    assert "24 healthy and 16 diseased images of 40 patients; lesions: not named in meta.json" in said
    assert "Few diseased images are left to validate on" in said
    for command in re.findall(r"^python .*", said, re.MULTILINE):
        studies.check_command(command)

    # As a newcomer: prepare and the first classifier, whose steps are cut short here.
    path = recipe / "classifier_real.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 2, "EPOCHS": 1}))
    monkeypatch.setattr(
        "ldm.workflow.plan_run._run_child", lambda words, step: children.run(*words[1:], folder=tiny.ROOT).returncode
    )
    assert tiny.call(run_stages, recipe / "plan.yaml", "--only", "prepare", "classifier_real") == 0
    metrics = json.loads((recipe / "work" / "classifier_real" / "metrics.json").read_text())
    assert 8 <= metrics["n_train_diseased"] <= 13  # of 16
    assert metrics["test"]["auc"]["value"] is not None


def test_a_recipe_is_never_replaced(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"recipe: is there already; give another --output_dir, or delete it"):
        made(data, recipe)
    assert [path.name for path in recipe.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("healthy", "diseased", "what"), [(0, 2, "healthy one to draw on"), (2, 0, "diseased one to learn")]
)
def test_data_that_nothing_can_be_made_of(healthy: int, diseased: int, what: str, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=f"expected healthy and diseased samples, found no {what}"):
        made(foreign(tmp_path / "data", healthy, diseased), tmp_path / "recipe")
    assert not (tmp_path / "recipe").exists()


def test_a_model_without_stages_is_named(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine.yaml"
    model.write_text(f"base: {tiny.PHANTOM}")
    with pytest.raises(UsageError, match=r"mine.yaml: expected the YAMLs of its stages beside it, found none for"):
        tiny.call(init, data, "--output_dir", tmp_path / "recipe", "--model", model)


def test_samples_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "data", 2, 2)
    (folder / "case 0" / "slice" / "image.jpg").write_bytes(b"no picture")
    assert made(folder, tmp_path / "recipe") == 3
    assert "1 samples could not be used" in (tmp_path / "recipe" / "README.md").read_text()
