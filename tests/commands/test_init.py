"""tool/init.py on a data set that nothing of this repository has made."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import children
import foreign_spines
import numpy as np
import pytest
import studies
import tiny
from PIL import Image

from ldm.core.errors import MedSoftError, UsageError
from ldm.workflow.plans import load_plan
from ldm.workflow.study_design import load_design, plan_groups
from tool import doctor, init, run_stages

PARTS = {
    "plan.yaml",
    "study.yaml",
    "README.md",
    *(f"classifier_{name}.json" for name in ("real", "duplicated", "augmented")),
}


def foreign(folder: Path, healthy: int, diseased: int, patient: str = "p") -> Path:
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
        (sample / "meta.json").write_text(json.dumps({"patient_id": f"{patient}{number}", "severity": "Grade II"}))
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
    assert "have no `anatomy.png`" not in said
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


def test_a_test_set_of_its_own_is_never_split(data: Path, tmp_path: Path) -> None:
    test, recipe = foreign(tmp_path / "test", 2, 2, "t"), tmp_path / "recipe"
    assert made(data, recipe, "--test", test) == 0
    plan, design = load_plan(recipe / "plan.yaml"), load_design(recipe / "study.yaml")
    for step in [*plan.steps, *design.steps, *(step for group in plan_groups(design) for step in group.plan.steps)]:
        studies.check_command(step.run)
    runs = {step.name: shlex.split(step.run) for step in [*plan.steps, *design.steps]}
    for name in ("prepare", "split_0", "split_2"):
        assert runs[name][runs[name].index("--fractions") + 1 :][:3] == ["0.8", "0.2", "0"]
    assert runs["evaluate"][2] == str(test)
    assert {world.test for world in design.worlds} == {str(test)}
    assert json.loads((recipe / "classifier_augmented.json").read_text())["test_json"] == str(test)


def test_a_test_set_that_shares_patients_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"patient p0 is in the .*their data0 set and in the .*test set"):
        made(data, tmp_path / "recipe", "--test", foreign(tmp_path / "test", 1, 1))
    nameless = [foreign(tmp_path / name, 1, 1) for name in ("own", "theirs")]
    for path in tmp_path.rglob("meta.json"):
        path.unlink()
    with pytest.raises(MedSoftError, match=r"theirs: case 0/slice has no patient_id, and neither has .*meta\.json"):
        made(nameless[0], tmp_path / "recipe", "--test", nameless[1])


def test_a_test_set_of_one_class_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match="test: expected healthy and diseased samples, found no healthy one to tell"):
        made(data, tmp_path / "recipe", "--test", foreign(tmp_path / "test", 0, 1, "t"))


def test_what_samples_lack_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = foreign_spines.write_samples(tmp_path / "data", seed=3, healthy=6, diseased=6, prefix="p", complete=False)
    assert tiny.call(doctor, "--data", folder, "--workers", 1, "--overlays", tmp_path / "page.html") == 0
    assert made(folder, tmp_path / "recipe", "--ckpt", tmp_path / "gone.ckpt") == 0
    healthy = [path.parent for path in folder.rglob("prompt.txt") if path.read_text() == "healthy\n"]
    vertebrae = [sample / "mask.png" for sample in healthy if (sample / "mask.png").exists()]
    named = [json.loads(path.read_text()) for path in folder.rglob("meta.json")]
    kinds = Counter(meta["lesion_type"] for meta in named if "lesion_type" in meta)
    assert 0 < len(vertebrae) < 6 < len(named) < 12  # else this test would see nothing
    assert 0 < kinds.total() < 6
    said = (tmp_path / "recipe" / "README.md").read_text()
    patients = len({meta["patient_id"] for meta in named}) + 12 - len(named)
    assert f"6 healthy and 6 diseased images of {patients} patients; lesions: " in said
    for kind, count in {**kinds, "not named": 6 - kinds.total()}.items():
        assert f"{kind}: {count}" in said
    assert f"Only {len(vertebrae)} of the healthy images can be drawn on" in said
    assert "6 of the diseased images have no `anatomy.png`: of their lesions only the form is" in said
    assert f"{12 - len(named)} of these images have no `patient_id` and count as a patient each" in said
    gone = f"{tmp_path / 'gone.ckpt'} (--ckpt)"
    assert f"needed first: {gone}. A trial without downloads: `--model models/phantom.yaml --ckpt" in said
    assert f"not there yet, and needed: {gone}" in capsys.readouterr().out
    for path in vertebrae:
        path.unlink()
    with pytest.raises(MedSoftError, match=r"data: no healthy sample has an anatomy\.png, or a mask\.png of its vert"):
        made(folder, tmp_path / "other")


def test_the_foreign_spines_share_no_code_with_the_method() -> None:
    source = Path(foreign_spines.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (ldm|medsoft|tool)\b", source, re.MULTILINE)


def test_foreign_spines_are_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        foreign_spines.main([str(tmp_path)])
    assert f"{tmp_path}: is there already; give another OUTPUT_DIR, or delete it" in capsys.readouterr().err


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
    assert "1 sample could not be used" in (tmp_path / "recipe" / "README.md").read_text()
