"""tool/study.py: the YAML, the plans, resuming, the files it leaves."""

import csv
import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import tiny
import yaml

import classifier
import dataset_infer
import ver_openImagesDatasets
import ver_train
from ldm.classifier.config import load_classifier_config
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import write_json
from ldm.core.locks import exclusive
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.workflow import plans, study_design, study_run
from tool import make_phantoms, study

ROOT = tiny.ROOT
SCRIPT = ROOT / "tool" / "study.py"

SHIPPED = ("configs/study_phantom.yaml", "configs/study_phantom_confirmation.yaml")
SMALL = {
    "name": "small",
    "worlds": [3],
    "seeds": [0],
    "phantoms": {"healthy": 8, "diseased": 8, "fractions": [0.5, 0.5, 0], "test_healthy": 4, "test_diseased": 4},
    "classifier": "configs/classifier/phantom.json",
    "set": ["EPOCHS=1", "img_size=32", "Batch_Size=8"],
    "arms": {"real": {}, "duplicated": {"use": "duplicate_real", "ratios": [1]}},
    "compare": {"baseline": "real", "control": "duplicated", "main": "duplicated", "ratio": None},
}


@pytest.fixture(autouse=True)
def _forked_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a study that runs in this process need not import torch again."""
    monkeypatch.setattr(
        "ldm.workflow.plan_run._run_child", lambda words, step: children.run(*words[1:], folder=ROOT).returncode
    )


@pytest.fixture
def write_study(tmp_path: Path):
    """``write_study(**changes)`` writes SMALL with these keys replaced (None removes one)."""

    def write(**changes: Any) -> Path:
        values = {"output_dir": str(tmp_path / "out"), **SMALL, **changes}
        path = tmp_path / "study.yaml"
        kept = {key: value for key, value in values.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return path

    return write


# ----------------------------------------------------------------------------------------------------- the YAML

GENERATOR = {"checkpoint": "a.ckpt", "model": "models/phantom.yaml"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key colour"),
        ({"name": None}, "name: expected text that is not blank, found nothing"),
        ({"seeds": 3}, "seeds: expected a list of a number of at least 0, found 3"),
        ({"seeds": []}, r"seeds: expected different whole numbers, found \[\]"),
        ({"seeds": [0, 0]}, r"seeds: expected different whole numbers, found \[0, 0\]"),
        ({"seeds": [0.5]}, "seeds: expected a whole number, found 0.5"),
        ({"worlds": None}, "worlds: expected different whole numbers or keys with values, found nothing"),
        ({"worlds": [10_000]}, "worlds: expected seeds below 10000; others are test worlds, found 10000"),
        ({"worlds": {"a": {"train_json": "x"}}}, "worlds.a.val_json: expected text that is not blank, found nothing"),
        ({"worlds": {"a/b": dict.fromkeys(("train_json", "val_json", "test_json"), "x")}}, "a name of letters, digits"),
        ({"phantoms": {"healthy": 3}}, "phantoms.diseased: expected a number of at least 0, found"),
        ({"phantoms": SMALL["phantoms"] | {"healthy": "8"}}, "phantoms.healthy: expected a whole number, found .8"),
        (
            {"phantoms": SMALL["phantoms"] | {"fractions": 0.6}},
            "fractions: expected a list of a whole number or a number, found 0.6",
        ),
        ({"arms": {"real": {"uses": "mix"}}}, "unknown key arms.real.uses; did you mean arms.real.use"),
        ({"arms": {"a": {"use": "mixed"}}}, "arms.a.use: expected one of mix, pretrain, duplicate_real, found .mixed"),
        (
            {"arms": {"a": {"use": "mix", "ratios": [1]}}},
            "arms.a: expected use: mix or pretrain together with a generator",
        ),
        ({"arms": {"a": {"use": "duplicate_real"}}}, "arms.a: expected ratios together with use"),
        (
            {"arms": {"a": {"use": "duplicate_real", "ratios": [0]}}},
            "arms.a.ratios: expected a number above 0, found 0",
        ),
        ({"arms": {"a": {"use": "duplicate_real", "ratios": [1, 1]}}}, "arms.a.ratios: expected ratios, each once"),
        ({"arms": {"a": {"set": [3]}}}, "arms.a.set: expected text, found 3"),
        ({"arms": {"a": {"generator": "g", "use": "mix", "ratios": [1]}}}, "a.generator: expected one of , found .g"),
        ({"generators": {"g": {}}}, r"generators.g: expected one of stages, run and from, found \[\]"),
        (
            {"generators": {"g": {"run": "python a.py {pictures}", "from": "h"}}},
            r'generators.g: expected one of stages, run and from, found \["run", "from"\]',
        ),
        ({"generators": {"g": {"run": "python a.py"}}}, "generators.g.run: expected {pictures}, the folder to write"),
        ({"generators": {"g": {"run": "a.py {pictures} {test_json}"}}}, "no other braces than train_json, val_json"),
        (
            {"generators": {"g": {"run": "python a.py {pictures}", "set": ["a=1"]}}},
            "generators.g.set: expected nothing beside run, whose words say all",
        ),
        (
            {"generators": {"g": {"run": "python a.py {pictures}", "draw": "--limit 3"}}},
            "generators.g.draw: expected nothing beside run, whose words say all",
        ),
        (
            {**GENERATOR, "generators": {"g": {"stages": []}, "h": {"from": "h"}}},
            r"generators.h.from: expected a generator with stages \(g\), found .h",
        ),
        ({"generator_seeds": [1, 1]}, "generator_seeds: expected different whole numbers"),
        ({"phantoms": SMALL["phantoms"] | {"flags": "--a '"}}, "phantoms.flags: expected words of a command"),
        (
            {"compare": SMALL["compare"] | {"oracle": "real"}},
            "compare.oracle: expected an arm with a ratio of duplicated, found .real",
        ),
        (
            {"hypotheses": {"H": {"minus": ["real", "ours"]}}},
            "hypotheses.H.minus: expected two of the arms real, duplicated, found",
        ),
        ({"hypotheses": {"H": {"minus": ["real"]}}}, "hypotheses.H.minus: expected two different arms, found"),
        (
            {"hypotheses": {"H": {"minus": ["real", "duplicated"], "equivalence": 0}}},
            "hypotheses.H.equivalence: expected a number between 0 and 1, found 0",
        ),
        (
            {
                "arms": SMALL["arms"] | {"more": {"use": "duplicate_real", "ratios": [2]}},
                "compare": SMALL["compare"] | {"ratio": 1},
                "hypotheses": {"H": {"minus": ["more", "duplicated"]}},
            },
            "hypotheses.H.minus: expected arms with the ratio 1 of compare, or without ratios, found .more",
        ),
        ({"generators": {"g": {"stages": []}}}, "checkpoint: expected a path, since the generator g needs it"),
        ({**GENERATOR, "generators": {"g": {"stage": []}}}, "unknown key generators.g.stage; did you mean"),
        ({**GENERATOR, "generators": {"g": {"stages": ["a.yaml", "merge"]}}}, "expected merge once, as the third"),
        ({**GENERATOR, "generators": {"g": {"stages": ["a.yaml", "b/a.yaml"]}}}, "expected YAMLs of different names"),
        ({"compare": {"baseline": "real"}}, "compare.control: expected text, found nothing"),
        ({"compare": SMALL["compare"] | {"main": "ours"}}, "compare.main: expected one of the arms real, duplicated"),
        (
            {"compare": SMALL["compare"] | {"ratio": 2}},
            "compare.ratio: expected a ratio of duplicated or null, found 2",
        ),
        ({"steps": [{"name": "a", "runs": "x"}]}, "unknown key steps.1.runs"),
        ({"base": "study.yaml"}, "its `base:` leads back to itself"),
        ({"compare": SMALL["compare"] | {"main": "real"}}, "compare.main: expected an arm with ratios, found .real"),
        (
            {"compare": SMALL["compare"] | {"baseline": "duplicated"}},
            "compare.baseline: expected an arm without ratios, found .dupl",
        ),
        (
            {
                "arms": SMALL["arms"] | {"twice": {"use": "duplicate_real", "ratios": [1, 2]}},
                "compare": SMALL["compare"] | {"main": "twice"},
            },
            "compare.control: expected an arm with the ratios 1, 2 of twice, found .dupl",
        ),
        (
            {"arms": SMALL["arms"] | {"duplicated_1": {}}},
            "arms: expected arms whose cells have different names, found .duplicated_1",
        ),
        ({"draw": "--prompt 'osteolytic"}, "draw: expected words of a command, their quotes closed"),
        (
            {**GENERATOR, "generators": {"g": {"stages": ["a.yaml training.rates='{"]}}},
            "generators.g.stages: expected words of a command",
        ),
    ],
)
def test_faults_of_a_study_are_named(write_study, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        study_design.load_design(write_study(**change))


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"nowhere.yaml: this study does not exist"):
        study_design.load_design(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match=r"broken.yaml: not readable as YAML"):
        study_design.load_design(tmp_path / "broken.yaml")
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {other}.yaml")
    with pytest.raises(UsageError, match=r"two.yaml: its `base:` leads back to itself"):
        study_design.load_design(tmp_path / "one.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UsageError, match=r"expected keys with values, found \[1\]"):
        study_design.load_design(tmp_path / "list.yaml")


def test_command_line_ends_with_one_line_and_code_2(write_study) -> None:
    path = write_study(colour=1)
    done = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: unknown key colour; known here: name")
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- the plans


@pytest.mark.parametrize("name", SHIPPED)
def test_every_command_of_the_shipped_studies_is_one_its_script_accepts(name: str) -> None:
    modules = (classifier, dataset_infer, ver_openImagesDatasets, ver_train)
    modules = (*modules, make_phantoms, tiny.model_convert, tiny.tool_merge_for_stage2)
    scripts = {module.__name__.replace(".", "/") + ".py": module for module in modules}
    design = study_design.load_design(ROOT / name)
    groups = [group for group in study_design.plan_groups(design) if group.world is design.worlds[-1]]
    seen = set()
    for step in [*design.steps, *(step for group in groups for step in group.plan.steps)]:
        python, script, *words = shlex.split(step.run)
        assert python == "python"
        args = scripts[script].build_parser().parse_intermixed_args(words)
        if script == "classifier.py":
            load_classifier_config(ROOT / args.args, args.set)
        if script in ("ver_train.py", "dataset_infer.py"):
            load_config(ROOT / args.config, args.overrides)
        seen.add(script)
    assert seen == set(scripts)


def test_each_cell_of_the_shipped_study_is_planned_once() -> None:
    design = study_design.load_design(ROOT / SHIPPED[0])
    cells = [cell for group in study_design.plan_groups(design) for cell in group.cells]
    assert len({cell.folder for cell in cells}) == len(cells) == 5 * 3 * (1 + 4 + 4 + 1 + 1 + 1 + 1 + 1)


def test_development_confirmation_test_and_base_share_no_phantom_world() -> None:
    designs = [study_design.load_design(ROOT / name) for name in SHIPPED]
    seeds: list[str] = []
    for design in designs:
        for step in [step for world in design.worlds for step in world.steps if "make_phantoms" in step.run]:
            line = shlex.split(step.run)
            seeds.append(line[line.index("--seed") + 1])
    assert len(set(seeds)) == len(seeds) == 20
    assert max(map(int, seeds)) < 90_000  # the phantom base's worlds begin there
    ours, theirs = ({arm.name: arm for arm in design.arms} for design in designs)
    ratio = designs[1].keys.compare.ratio
    assert ratio is not None
    for name, arm in theirs.items():  # the same treatments, at the ratio that was chosen before
        assert arm == dataclasses.replace(ours[name], ratios=arm.ratios)
        assert arm.all_ratios in ((None,), (ratio,))
    assert designs[0].keys.generators == designs[1].keys.generators
    assert designs[0].keys.set == designs[1].keys.set


def test_generator_stages_start_where_they_must(write_study) -> None:
    stages = ["models/phantom_stage1.yaml", "models/phantom_unet_only.yaml", "merge", "models/phantom_stage2_1.yaml"]
    given = {
        "g": {"stages": [*stages, "models/phantom_stage2_2.yaml training.max_epochs=2"], "set": ["data.feather=0"]}
    }
    arms = SMALL["arms"] | {"g": {"use": "mix", "generator": "g", "ratios": [1]}}
    design = study_design.load_design(write_study(**GENERATOR, generators=given, arms=arms, draw="--limit 4"))
    group = next(group for group in study_design.plan_groups(design) if group.plan.name == "world_3/g")
    runs = {step.name: shlex.split(step.run) for step in group.plan.steps}
    start = {name: Path(line[line.index("--ckpt") + 1]).parts[-2:] for name, line in runs.items() if "--ckpt" in line}
    assert start == {
        "phantom_stage1": ("g", "converted.ckpt"),
        "phantom_unet_only": ("g", "converted.ckpt"),
        "phantom_stage2_1": ("g", "merged.ckpt"),
        "phantom_stage2_2": ("phantom_stage2_1", "last.ckpt"),
        "draw": ("phantom_stage2_2", "last.ckpt"),
    }
    told = [name for name, line in runs.items() if "data.feather=0" in line]
    assert told == ["convert", *(Path(s.split()[0]).stem for s in given["g"]["stages"]), "draw"]
    assert "training.max_epochs=2" in runs["phantom_stage2_2"]
    assert "--limit" in runs["draw"]


def test_generators_may_be_commands_and_share_a_checkpoint(write_study) -> None:
    """One checkpoint, two ways of drawing with it, for each generator seed; a command is run as it stands."""
    stages = ["models/phantom_unet_only.yaml --seed {seed}"]
    generators = {
        "ours": {"stages": stages, "set": ["data.feather=0"]},
        "again": {"from": "ours", "draw": "--seed {seed} --limit 2", "set": ["sampling.steps=3"]},
        "paste": {"run": "python tool/paste.py '{train_json}' --v {val_json} --out {pictures} --seed {seed}"},
        "plain": {"run": "python tool/plain.py --out {pictures}"},
    }
    arms = {name: {"use": "mix", "generator": name, "ratios": [1]} for name in generators}
    given = {**GENERATOR, "generators": generators, "generator_seeds": [0, 1], "draw": "--seed {seed} --limit 4"}
    design = study_design.load_design(write_study(**given, arms=SMALL["arms"] | arms))
    groups = {group.plan.name: group for group in study_design.plan_groups(design)}
    assert list(groups) == [
        "world_3",
        *(f"world_3/{name}" for name in ("ours_g0", "ours_g1", "paste_g0", "paste_g1", "plain")),
    ]
    home = design.folder("world_3", "generators")
    steps = {step.name: step for step in groups["world_3/ours_g1"].plan.steps}
    assert [name for name in steps if "draw" in name] == ["draw", "draw_again_g1"]
    drawn = shlex.split(steps["draw_again_g1"].run)
    assert drawn[drawn.index("--ckpt") + 1] == f"{home}/ours_g1/phantom_unet_only/last.ckpt"
    assert drawn[-6:] == ["--seed", "1", "--limit", "2", "data.feather=0", "sampling.steps=3"]
    assert "--seed 1" in steps["phantom_unet_only"].run
    cells = {cell.step.name: cell for cell in groups["world_3/ours_g1"].cells}
    assert list(cells) == ["ours_1_g1_seed0", "again_1_g1_seed0"]
    assert f'synthetic=["{home}/again_g1/pictures"]' in shlex.split(cells["again_1_g1_seed0"].step.run)
    assert steps["draw_again_g1"] not in cells["ours_1_g1_seed0"].before  # it may be newer
    assert steps["draw_again_g1"] in cells["again_1_g1_seed0"].before
    train, val = (design.folder("world_3", f"annotations_{name}.json") for name in ("train", "val"))
    pictures = f"{home}/paste_g1/pictures"
    (paste,) = (step for step in groups["world_3/paste_g1"].plan.steps if step.name == "draw")
    assert paste.run == f"python tool/paste.py {train} --v {val} --out {pictures} --seed 1"
    assert paste.makes == (pictures,)
    assert [cell.step.name for cell in groups["world_3/plain"].cells] == ["plain_1_seed0"]


def test_what_is_trained_alike_is_trained_once(write_study) -> None:
    """Where only the drawing names the seed, all seeds draw with one checkpoint."""
    generators = {"base": {"stages": ["models/phantom_unet_only.yaml"]}}
    arms = SMALL["arms"] | {"base": {"use": "mix", "generator": "base", "ratios": [1]}}
    given = {**GENERATOR, "generators": generators, "generator_seeds": [4, 5], "draw": "--seed {seed}"}
    group = list(study_design.plan_groups(study_design.load_design(write_study(**given, arms=arms))))[-1]
    assert [step.name for step in group.plan.steps if step not in group.world.steps] == [
        *("convert", "phantom_unet_only", "draw_base_g4", "draw_base_g5", "base_1_g4_seed0", "base_1_g5_seed0")
    ]


def test_phantom_worlds_of_another_kind(write_study) -> None:
    phantoms = SMALL["phantoms"] | {"world": "edge", "flags": "--few 2", "test_flags": "--other"}
    (world,) = study_design.load_design(write_study(phantoms=phantoms)).worlds
    own, _, test = (shlex.split(step.run) for step in world.steps)
    assert own[-4:] == ["--world", "edge", "--few", "2"]
    assert test[-3:] == ["--world", "edge", "--other"]


def test_hypotheses_about_another_study_are_checked_before_anything_runs(write_study, tmp_path: Path) -> None:
    other = write_study(output_dir=str(tmp_path / "other")).rename(tmp_path / "other.yaml")
    wrong = {"H": {"minus": ["real", "ours"], "study": str(other)}}
    with pytest.raises(UsageError, match=r"other.yaml: hypotheses.H.minus: expected two of the arms real, duplicated"):
        tiny.call(study, write_study(hypotheses=wrong))
    with pytest.raises(UsageError, match=r"no.yaml: this study does not exist"):
        tiny.call(study, write_study(hypotheses={"H": {"minus": ["real", "ours"], "study": str(tmp_path / "no.yaml")}}))
    assert not (tmp_path / "out").exists()


def test_worlds_of_annotation_files_are_used_as_they_are(write_study, world: Path) -> None:
    files = {f"{split}_json": str(world / f"openimages_format_{split}.json") for split in ("train", "val", "test")}
    design = study_design.load_design(write_study(worlds={"hospital": files}, phantoms=None))
    (group,) = study_design.plan_groups(design)
    assert [step.name for step in group.plan.steps] == ["real_seed0", "duplicated_1_seed0"]
    assert f'test_json="{files["test_json"]}"' in shlex.split(group.plan.steps[0].run)


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
    with pytest.raises(UsageError, match="--worlds world_7: no such world in this study; it has world_3"):
        tiny.call(study, write_study(), "--worlds", "world_7")


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


def test_a_killed_study_goes_on_and_runs_each_cell_once(write_study, tmp_path: Path) -> None:
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
    assert first.returncode == -signal.SIGKILL
    assert begun.exists()
    assert not (out / "study.md").exists()

    second = launch(path)
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
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

    third = launch(path)
    said = third.communicate(timeout=120)[0]
    assert third.returncode == 0
    assert said.count("already done") == 5
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


def test_collecting_before_anything_ran_says_so(write_study) -> None:
    with pytest.raises(MedSoftError, match="0 of 2 cells are finished; run the study first"):
        tiny.call(study, write_study(), "--collect")


def test_list_shows_the_steps_and_runs_nothing(write_study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tiny.call(study, write_study(), "--list") == 0
    assert capsys.readouterr().out.count("(to do)") == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_generator_of_the_shipped_study_trains_and_draws(write_study, tmp_path: Path) -> None:
    """The shipped chains with one epoch a stage and two steps a drawing, then a cell of each arm."""
    shipped = yaml.safe_load((ROOT / SHIPPED[0]).read_text())
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
