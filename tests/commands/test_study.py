"""tool/study.py: worlds, resuming, worlds side by side, the files it leaves."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import children
import numpy as np
import pytest
import studies
import tiny
import yaml
from studies import SMALL

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import write_json
from ldm.core.locks import exclusive
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.workflow import plans, study_design, study_run
from tool import make_phantoms, study

ROOT = tiny.ROOT
PARTS = ("train", "val", "test")
SCRIPT = ROOT / "tool" / "study.py"


@pytest.fixture(autouse=True)
def _forked_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a study that runs in this process need not import torch again."""
    monkeypatch.setattr(
        "ldm.workflow.plan_run._run_child", lambda words, step: children.run(*words[1:], folder=ROOT).returncode
    )


@pytest.fixture
def write_study(tmp_path: Path):
    """``write_study(**changes)`` writes SMALL with these keys replaced (None removes one)."""
    return partial(studies.write, tmp_path)


# ----------------------------------------------------------------------------------------------------- worlds


def test_annotation_files_that_changed_are_refused(write_study, world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "train.json"
    copy.write_bytes((world / tiny.TRAIN).read_bytes())
    files = {"train_json": str(copy), "val_json": str(world / tiny.VAL), "test_json": str(world / tiny.TEST)}
    design = study_design.load_design(write_study(worlds={"hospital": files}, phantoms=None))
    study_run.check_unchanged(design, design.worlds[0], [])
    study_run.check_unchanged(design, design.worlds[0], [])
    copy.write_text("[]")
    with pytest.raises(UsageError, match=r"hospital: holds cells of another run \(train: \w{8}… -> .*delete it"):
        study_run.check_unchanged(design, design.worlds[0], [])


def test_dataset_folders_that_changed_are_refused(write_study, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "test", tmp_path / "patients")
    files = {"train_json": str(world / tiny.TRAIN), "val_json": str(world / tiny.VAL)}
    worlds = {"hospital": files | {"test_json": str(tmp_path / "patients")}}
    arms = SMALL["arms"] | {"more": {"add": str(tmp_path / "patients")}}
    design = study_design.load_design(write_study(worlds=worlds, phantoms=None, arms=arms))
    study_run.check_unchanged(design, design.worlds[0], [])
    study_run.check_unchanged(design, design.worlds[0], [design.arms[-1]])
    other = study_design.load_design(
        write_study(worlds=worlds, phantoms=None, arms=arms | {"more": {"add": str(world)}})
    )
    with pytest.raises(UsageError, match=r"hospital: holds cells of another run \(arms.more.add: \w{8}… -> "):
        study_run.check_unchanged(other, other.worlds[0], [other.arms[-1]])
    shutil.rmtree(next(path for path in (tmp_path / "patients").iterdir() if path.is_dir()))
    with pytest.raises(UsageError, match=r"hospital: holds cells of another run \(test: "):
        study_run.check_unchanged(design, design.worlds[0], [])


def test_annotation_files_that_are_missing_are_named(write_study, world: Path, tmp_path: Path) -> None:
    files = {f"{split}_json": str(world / f"openimages_format_{split}.json") for split in ("train", "val")}
    worlds = {"hospital": files | {"test_json": str(tmp_path / "no.json")}}
    with pytest.raises(UsageError, match=r"world hospital: .*no.json does not exist; give its test annotations"):
        tiny.call(study, write_study(worlds=worlds, phantoms=None))
    assert not (tmp_path / "out" / "hospital").exists()


def test_a_world_that_is_running_is_left_alone_while_another_runs(write_study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_study(worlds=[3, 4])
    with exclusive(out / "world_3.lock", "busy"):
        with pytest.raises(UsageError, match=r"out/world_3: another run is writing here at this moment; give another"):
            tiny.call(study, path)
        assert not (out / "world_3" / "cells").exists()
        assert tiny.call(study, path, "--worlds", "world_4") == 0
    assert sorted(file.parent.name for file in out.rglob("metrics.json")) == ["duplicated_1_seed0", "real_seed0"]
    assert {row["world"] for row in rows_of(out)} == {"world_4"}
    assert tiny.call(study, path) == 0
    assert len(rows_of(out)) == 4


def test_a_world_that_the_study_does_not_have_is_named(write_study) -> None:
    for words in ([], ["--list"], ["--collect"]):
        with pytest.raises(UsageError, match="--worlds world_7: no such world in this study; it has world_3"):
            tiny.call(study, write_study(), *words, "--worlds", "world_7")


def test_added_real_images_join_the_training_annotations(write_study, world: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    assert tiny.call(make_phantoms, "--output_dir", extra, "--seed", 77, "--healthy", 1, "--diseased", 2) == 0
    files = {f"{split}_json": str(world / f"openimages_format_{split}.json") for split in ("train", "val", "test")}
    arms = SMALL["arms"] | {"more": {"add": str(extra)}}
    design = study_design.load_design(write_study(worlds={"hospital": files}, phantoms=None, arms=arms))
    study_run.add_real(design, design.worlds[0], design.arms[-1])
    added = load_samples(study_design.added_path(design, design.worlds[0], design.arms[-1]))[0]
    names = [sample.sample_id for sample in added]
    assert len(names) == len(set(names)) == len(load_samples(world / tiny.TRAIN)[0]) + 3
    (group,) = study_design.plan_groups(design)
    assert "train_more.json" in group.plan.steps[-1].run

    files["train_json"] = str(world / tiny.TRAIN)
    missing = study_design.load_design(
        write_study(
            worlds={"hospital": files}, phantoms=None, arms=SMALL["arms"] | {"more": {"add": str(tmp_path / "no")}}
        )
    )
    with pytest.raises(UsageError, match=r"arms.more.add: .*no does not exist"):
        study_run.check_unchanged(missing, missing.worlds[0], [missing.arms[-1]])


def test_added_images_that_cannot_be_read_are_listed(write_study, world: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    assert tiny.call(make_phantoms, "--output_dir", extra, "--seed", 77, "--healthy", 1, "--diseased", 2) == 0
    next(extra.glob("*/image.png")).write_bytes(b"no picture")
    files = {f"{split}_json": str(world / f"openimages_format_{split}.json") for split in ("train", "val", "test")}
    arms = SMALL["arms"] | {"more": {"add": str(extra)}}
    path = write_study(worlds={"hospital": files}, phantoms=None, arms=arms)
    for _ in range(2):  # also when nothing is left to do
        assert tiny.call(study, path) == 3
    assert len(json.loads((tmp_path / "out" / "hospital" / "train_more.rejects.json").read_text())) == 1


# ----------------------------------------------------------------------------------------------------- running


def launch(path: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, path, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def alive(pid: str) -> bool:
    """Not of a process that has ended, whether or not somebody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_study_goes_on_and_runs_each_cell_once(
    write_study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, out = write_study(), tmp_path / "out"
    begun = out / "world_3" / "cells" / "real_seed0" / "run.json"
    first = launch(path)
    deadline = time.monotonic() + 120
    while not begun.exists() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    for pid in [first.pid, *map(int, children)]:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    first.wait(60)
    while any(alive(pid) for pid in children):  # until then it has the lock of what it was writing
        time.sleep(0.02)
    assert first.returncode == -signal.SIGKILL
    assert begun.exists()
    assert not (out / "study.md").exists()

    assert tiny.call(study, path) == 0
    said = capsys.readouterr().out
    assert "phantoms ... already done" in said
    assert "study.md: 2 of 2 cells" in said
    made = {file: file.stat().st_mtime_ns for file in out.glob("world_3/cells/*/metrics.json")}
    assert len(made) == 2
    rows = rows_of(out)
    assert [(row["arm"], row["ratio"], row["seed"]) for row in rows] == [("real", "", "0"), ("duplicated", "1.0", "0")]
    for row, file in zip(rows, sorted(made, reverse=True), strict=True):
        assert (row["machine"], row["commit"]) == (plans.machine(), plans.commit())
        assert float(row["auc"]) == json.loads(file.read_text())["test"]["auc"]["value"]
    assert rows[1]["n_duplicated"] == "4"  # as many as there are diseased ones

    assert tiny.call(study, path) == 0
    assert capsys.readouterr().out.count("already done") == 5
    assert {file: file.stat().st_mtime_ns for file in made} == made


def test_a_failing_cell_stops_the_study_with_its_code(write_study, world: Path, tmp_path: Path) -> None:
    files = {f"{split}_json": str(world / f"openimages_format_{split}.json") for split in ("train", "val", "test")}
    path = write_study(worlds={"hospital": files}, phantoms=None, set=["EPOCHS=none"])
    done = launch(path)
    said = done.communicate(timeout=60)[0]
    assert done.returncode == 2
    assert "error: step real_seed0 failed (exit code 2)" in said
    assert f"go on with: python tool/study.py {path}" in said


def test_cells_of_other_settings_are_left_out_and_counted(write_study, tmp_path: Path) -> None:
    assert tiny.call(study, write_study()) == 0
    changed = SMALL["arms"] | {"duplicated": SMALL["arms"]["duplicated"] | {"set": ["lr=0.01"]}}
    path = write_study(arms=changed)
    assert tiny.call(study, path, "--collect") == 0
    assert [row["arm"] for row in rows_of(tmp_path / "out")] == ["real"]
    said = (tmp_path / "out" / "study.md").read_text()
    assert "1 of 2 cells are finished; left out, as other settings or an older generator made them: 1." in said
    assert tiny.call(study, write_study(set=[*SMALL["set"], "lr=0.01"]), "--list") == 0
    with pytest.raises(MedSoftError, match=r"out: 0 of 2 cells are finished; left out, .*: 2; run the study first"):
        tiny.call(study, write_study(set=[*SMALL["set"], "lr=0.01"]), "--collect")


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


BACK = "{output_dir}/back/classifier.safetensors"
DRAW = f"python tool/draw.py --ckpt {BACK} --output_dir {{pictures}}"
BEGUN: dict[str, dict] = {
    "begun_seed0": {"arms": {**SMALL["arms"], "begun": {"set": [f"pretrained={BACK}"]}}},
    "draw": {
        "arms": {**SMALL["arms"], "begun": {"use": "mix", "generator": "ours", "ratios": [1]}},
        "generators": {"ours": {"run": DRAW}},
    },
}


@pytest.mark.parametrize("again", BEGUN)
def test_what_is_older_than_what_it_begins_with_is_left_out_and_run_again(
    write_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, again: str
) -> None:
    """A cell, or the generator that it learns from: then a cell that is newer than both does not count either."""
    steps = [{"name": "back", "run": "python classifier.py a.json", "makes": [BACK]}]
    path = write_study(steps=steps, **BEGUN[again])
    design = study_design.load_design(path)
    groups = list(study_design.plan_groups(design))

    def ran_in(year: int, plan: plans.Plan, steps: Iterable[plans.PlanStep]) -> None:
        clock = SimpleNamespace(now=lambda zone: datetime(year, 1, 1, tzinfo=zone))
        monkeypatch.setattr("ldm.workflow.plans.datetime", clock)
        for step in steps:
            plans.PlanRecord(plan).add(step, 1.0, 0)
            for file in step.makes:
                write_json(Path(file), {"test": {"auc": {"value": 0.6}}, "validation": {"auc": 0.5}})

    write_json(Path(design.worlds[0].val), [])  # check_unchanged looks for it
    for group in groups:
        ran_in(2001, group.plan, group.plan.steps)
    ran_in(2002, plans.Plan("study", design.keys.output_dir, design.steps), design.steps)
    if again == "draw":
        ran_in(2003, groups[-1].plan, [each.step for each in groups[-1].cells])
    assert tiny.call(study, path, "--collect") == 0
    said = (tmp_path / "out" / "study.md").read_text()
    assert "2 of 3 cells are finished; left out, as other settings or an older generator made them: 1." in said
    capsys.readouterr()
    assert tiny.call(study, path, "--list") == 0
    shown = dict(re.findall(r"(\w+) \((done|to do|outdated)\):", capsys.readouterr().out))
    assert [name for name, state in shown.items() if state != "done"] == list(shown)[list(shown).index(again) :]
    assert set(shown.values()) == {"done", "outdated"}
    ran = []
    monkeypatch.setattr("ldm.workflow.plan_run._run_child", lambda words, step: ran.append(step) or 7)
    assert tiny.call(study, path) == 7
    assert [step.name for step in ran] == [again]


@pytest.mark.parametrize("change", ["other words", "its file is gone"])
def test_what_begins_with_a_step_that_is_made_anew_is_no_longer_done(
    write_study, tmp_path: Path, capsys: pytest.CaptureFixture, change: str
) -> None:
    """Of other words its cells are no longer the study's; a file that is gone has been there for them."""
    steps = [{"name": "back", "run": "python classifier.py a.json", "makes": [BACK]}]
    path, out = write_study(steps=steps, **BEGUN["begun_seed0"]), tmp_path / "out"
    once = plans.Plan("study", str(out), study_design.load_design(path).steps)
    plans.PlanRecord(once).add(once.steps[0], 1.0, 0)
    finish(path, "world_3")
    if change == "other words":
        (out / "back").mkdir()
        (out / "back" / "classifier.safetensors").touch()
        path = write_study(steps=[steps[0] | {"run": "python classifier.py b.json"}], **BEGUN["begun_seed0"])
    assert tiny.call(study, path, "--list") == 0
    assert "back (to do): " in (said := capsys.readouterr().out)
    assert "begun_seed0 (outdated): " in said
    assert "real_seed0 (done): " in said
    assert tiny.call(study, path, "--collect") == 0
    assert f"{3 - (change == 'other words')} of 3 cells are finished" in capsys.readouterr().out


def test_collecting_before_anything_ran_says_so(write_study) -> None:
    with pytest.raises(MedSoftError, match="0 of 2 cells are finished; run the study first"):
        tiny.call(study, write_study(), "--collect")


def test_the_judge_reads_every_generator_once(
    write_study, world: Path, results: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A study of drawings alone, in one world: what the judge says of a generator that copies a folder of results."""
    copy = f"python -c 'import shutil, sys; shutil.copytree(\"{results}\", sys.argv[1])' {{pictures}}"
    files = {f"{part}_json": str(world / f"openimages_format_{part}.json") for part in PARTS}
    shutil.copy(judge, tmp_path / "judge.safetensors")
    given = {
        "worlds": {"hospital": files},
        "phantoms": None,
        "arms": {},
        "compare": None,
        "generators": {"a": {"run": copy}, "b": {"run": copy}},
        "judge": {"weights": str(tmp_path / "judge.safetensors")},
        "judged": ["a", "b"],
        "hypotheses": {"H": {"minus": ["a", "b"], "of": "drawings", "endpoint": "agreement"}},
    }
    path, out = write_study(**given), tmp_path / "out"
    assert tiny.call(study, path) == 0
    rows = list(csv.DictReader((out / "drawings.csv").read_text().splitlines()))
    found = json.loads((out / "hospital" / "generators" / "a" / "judged.json").read_text())
    assert [(row["generator"], row["endpoint"]) for row in rows] == [
        (g, name) for g in "ab" for name in found["endpoints"]
    ]
    seam = found["endpoints"]["seam"]["value"]
    assert [float(row["value"]) for row in rows if row["endpoint"] == "seam"] == [seam, seam]
    assert (rows[0]["machine"], rows[0]["commit"]) == (plans.machine(), plans.commit())
    assert "2 of 2 generators' drawings are judged" in (out / "study.md").read_text()
    assert "cannot be tested: two worlds at least" in (out / "study.md").read_text()
    assert not (out / "results.csv").exists()
    capsys.readouterr()
    assert tiny.call(study, path) == 0
    assert capsys.readouterr().out.count("already done") == 4
    # What another judge has said does not count.
    (tmp_path / "judge.safetensors").write_bytes(b"another")
    with pytest.raises(MedSoftError, match=r"out: 0 of 2 .* judged; left out, as another judge .*: 2 \(delete judged"):
        tiny.call(study, path, "--collect")


def test_a_judge_that_is_not_there_is_named(write_study, tmp_path: Path) -> None:
    given = {"generators": {"a": {"run": "python a.py {pictures}"}}, "judge": {"weights": str(tmp_path / "no.pt")}}
    with pytest.raises(UsageError, match=r"judge.weights: .*no.pt does not exist; name a saved classifier, or a step"):
        tiny.call(study, write_study(**given, judged=["a"]))
    assert not (tmp_path / "out" / "world_3" / "phantoms").exists()


def test_list_shows_the_steps_and_runs_nothing(write_study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tiny.call(study, write_study(), "--list") == 0
    assert capsys.readouterr().out.count("(to do)") == 5
    assert not (tmp_path / "out").exists()


def test_list_shows_the_worlds_that_are_named_alone(write_study, capsys: pytest.CaptureFixture) -> None:
    path = write_study(worlds=[3, 4])
    assert tiny.call(study, path, "--list", "--worlds", "world_4") == 0
    said = capsys.readouterr().out
    assert said.count("world_4 [") == 5
    assert "world_3" not in said


@pytest.mark.slow
def test_every_generator_of_the_shipped_study_trains_and_draws(write_study, tmp_path: Path) -> None:
    """The shipped chains with one epoch a stage and two steps a drawing, then a cell of each arm."""
    shipped = yaml.safe_load((ROOT / "configs/study_phantom.yaml").read_text())
    generators = {
        name: {"stages": [re.sub(r"max_epochs=\d+", "max_epochs=1", stage) for stage in each["stages"]]}
        | {"set": [*each.get("set", []), "sampling.steps=2"]}
        for name, each in shipped["generators"].items()
    }
    arms = {name: arm | ({"ratios": [1]} if "use" in arm else {}) for name, arm in shipped["arms"].items()}
    del arms["clip_seen"]
    given = {key: shipped[key] for key in ("checkpoint", "model", "compare")} | {"generators": generators, "arms": arms}
    phantoms = {"healthy": 16, "diseased": 12, "fractions": [0.6, 0.4, 0], "test_healthy": 4, "test_diseased": 4}
    done = launch(write_study(**given, phantoms=phantoms, draw="--seed 0 --limit 8"))
    said = done.communicate(timeout=3600)[0]
    assert done.returncode == 0, said[-2000:]
    rows = rows_of(tmp_path / "out")
    assert [row["arm"] for row in rows] == list(arms)
    counts = {row["arm"]: (int(row["n_synthetic_used"]), int(row["n_duplicated"])) for row in rows}
    assert counts.pop("real") == (0, 0)
    assert counts.pop("duplicated") == (0, 7)
    assert set(counts.values()) == {(7, 0)}

    # Same parents, prompts and masks for all; without feather nothing between drawn and kept.
    pictures = {name: tmp_path / "out" / "world_3" / "generators" / name / "pictures" for name in generators}
    metas = {name: tiny.metas(folder) for name, folder in pictures.items()}
    for found in metas.values():
        assert {name: (m["parent_id"], m["lesion_type"]) for name, m in found.items()} == {
            name: (m["parent_id"], m["lesion_type"]) for name, m in metas["ours"].items()
        }
    levels = {name: set() for name in pictures}
    for name, folder in pictures.items():
        for path in folder.glob("*/soft_mask.png"):
            levels[name] |= set(np.unique(read_image(path)).tolist())
    assert levels["hard_mask"] == {0, 255}
    assert len(levels["ours"]) > 10

    # Without the MSC the third attention is as silent as after conversion.
    trained = tiny.tensors(pictures["no_msc"].parent / "phantom_no_msc" / "last.ckpt")
    silent = [value for key, value in trained.items() if ".attn3.to_out." in key and key.endswith("weight")]
    assert silent
    assert not any(value.any() for value in silent)


def test_the_report_holds_every_cell_and_the_difference(write_study, tmp_path: Path) -> None:
    path = write_study(worlds=[3, 4, 5], seeds=[0, 1])
    design = study_design.load_design(path)
    for group in study_design.plan_groups(design):
        for cell in group.cells:
            value = (
                0.5 + 0.1 * cell.seed + 0.2 * (cell.arm.name == "duplicated") + 0.01 * design.worlds.index(cell.world)
            )
            metrics = {"test": {"auc": {"value": value, "low": 0, "high": 1}}, "validation": {"auc": value, "loss": 1}}
            write_json(Path(cell.folder) / "metrics.json", metrics | {"n_synthetic_used": 0, "n_duplicated": 2})
    assert tiny.call(study, path, "--collect") == 0
    out = tmp_path / "out"
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 3 * 2 * 2
    text = (out / "study.md").read_text()
    assert "| duplicated at 1 | real | +0.200 (+0.200 to +0.200) | 3 | higher |" in text
    assert "12 of 12 cells are finished. Reported at commit " in text
    assert (
        "duplicated at 1 minus real: +0.200 (95 % +0.200 to +0.200) of test AUC over 3 worlds; a gain is shown." in text
    )
    assert (out / "dose_response.png").read_bytes().startswith(b"\x89PNG")
    assert "<table>" in (out / "study.html").read_text()


# ----------------------------------------------------------------------------------------------------- side by side


def finish(path: Path, world: str) -> None:
    """Leave what the study would have left of this world, without computing it."""
    design = study_design.load_design(path)
    for group in study_design.plan_groups(design):
        if group.world.name == world:
            record = plans.PlanRecord(group.plan)
            for step in group.plan.steps:
                made = Path(*step.makes)
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_text("{}")
                record.add(step, 1.0, 0)
            for cell in group.cells:
                metrics = {"test": {"auc": {"value": 0.5}}, "validation": {"auc": 0.5}}
                write_json(Path(cell.folder) / "metrics.json", metrics)


def test_worlds_run_side_by_side_and_one_that_fails_leaves_the_others(write_study, tmp_path: Path) -> None:
    names = ("good", "bad", "worse", "late")
    files = {name: {f"{part}_json": str(tmp_path / f"{name}_{part}") for part in PARTS} for name in names}
    for part in PARTS:
        (tmp_path / f"good_{part}").write_text("[]")
    path, out = write_study(worlds=files, phantoms=None), tmp_path / "out"
    finish(path, "good")
    process = launch(path, "--jobs", "2", "--worlds", "good", "bad")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 2
    assert "good ... done in" in said
    assert (out / "good.log").read_text().count("already done") == 2
    assert "2 of 8 cells are finished" in (out / "study.md").read_text()
    assert f"error: bad failed (exit code 2); {out / 'bad.log'} ends with:" in said
    assert "bad_train does not exist; give its train annotations" in said
    process = launch(path, "--jobs", "2", "--worlds", "bad", "worse", "late")
    assert process.wait(300) == 2
    assert not (out / "late.log").exists()  # no other world begins after one that failed


def test_a_signal_ends_all_worlds_that_run(write_study, tmp_path: Path) -> None:
    """Both wait in the study's first step; ended and started again, that step runs once more."""
    waits = f"python -c 'import pathlib, time; pathlib.Path(\"{tmp_path}/begun\").touch(); time.sleep(60)'"
    path = write_study(worlds=[3, 4], steps=[{"name": "wait", "run": waits}])
    first = launch(path, "--jobs", "2")
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=30)
    assert first.returncode == 143
    for world in ("world_3", "world_4"):
        with exclusive(tmp_path / "out" / f"{world}.lock", "still running"):
            pass
    assert {each["exit_code"] for each in json.loads((tmp_path / "out" / "stages.json").read_text())["steps"]} == {143}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_worlds_end_with_a_study_that_is_killed(write_study, tmp_path: Path) -> None:
    waits = f"python -c 'import pathlib, time; pathlib.Path(\"{tmp_path}/begun\").touch(); time.sleep(60)'"
    first = launch(write_study(worlds=[3, 4], steps=[{"name": "wait", "run": waits}]), "--jobs", "2")
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate(timeout=30)
    for world in ("world_3", "world_4"):  # one of them is in the step, the other one waits for it
        with exclusive(tmp_path / "out" / f"{world}.lock", "still running", wait=True):
            pass
    assert {each["exit_code"] for each in json.loads((tmp_path / "out" / "stages.json").read_text())["steps"]} == {143}
