"""tool/study.py: its YAML and the plans that come from it."""

import dataclasses
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
from studies import GENERATOR, SMALL

from ldm.core.errors import MedSoftError, UsageError
from ldm.workflow import study_design
from tool import study

ROOT = tiny.ROOT
RUNS = {name: {"run": f"python tool/{name}.py {{pictures}}"} for name in ("paste", "poisson")}
JUDGED = {"generators": RUNS, "judge": {"weights": "judge.safetensors"}, "judged": ["paste", "poisson"]}
SCRIPT = ROOT / "tool" / "study.py"


@pytest.fixture
def write_study(tmp_path: Path):
    """``write_study(**changes)`` writes SMALL with these keys replaced (None removes one)."""
    return partial(studies.write, tmp_path)


# ----------------------------------------------------------------------------------------------------- the YAML


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
            {"generators": {"paste": RUNS["paste"] | {"choose": "--best 1"}}},
            "model: expected a path, since the generator paste needs it, found null",
        ),
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
        (
            {"hypotheses": {"H": {"minus": ["real"]}}},
            "hypotheses.H.minus: expected two different arms or generators, found",
        ),
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
        ({"compare": None}, "compare: expected which arms are compared, found null"),
        ({"arms": {}, "compare": None}, "arms: expected arms, or a judge and the generators that it reads"),
        ({"judge": {"weight": "a"}}, "unknown key judge.weight; did you mean judge.weights"),
        ({"judge": {"weights": "a", "steps": [{"name": "b"}]}}, "judge.steps.1.run: expected words of a command"),
        ({**JUDGED, "judged": ["paint"]}, "judged: expected some of the generators paste, poisson, found .paint"),
        ({**JUDGED, "judged": []}, "judged: expected different names"),
        ({**JUDGED, "judge": None}, "judge: expected a classifier for the drawings that `judged` names, found null"),
        (
            {**JUDGED, "hypotheses": {"H": {"minus": ["paste", "poisson"], "of": "drawings"}}},
            "hypotheses.H.endpoint: expected one of detection, agreement, .*, of drawings, found null",
        ),
        (
            {**JUDGED, "hypotheses": {"H": {"minus": ["real", "paste"], "of": "drawings", "endpoint": "seam"}}},
            "hypotheses.H.minus: expected two of the judged generators paste, poisson, found",
        ),
        (
            {"hypotheses": {"H": {"minus": ["a", "b"], "of": "lines"}}},
            "H.of: expected one of cells, drawings, found .li",
        ),
        (
            {**GENERATOR, "generators": {"g": {"stages": [], "draw": "--data {test_json}"}}},
            "generators.g.draw: expected no other braces than train_json, val_json, seed, found",
        ),
        (
            {**GENERATOR, "generators": {"g": {"stages": []}}, "draw": "{x}"},
            "yaml: draw: expected no other braces",
        ),
        ({"tested_by": " "}, "tested_by: expected text that is not blank"),
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


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("study_*.yaml")))
def test_every_command_of_the_shipped_studies_is_one_its_script_accepts(name: str) -> None:
    design = study_design.load_design(ROOT / "configs" / name)
    groups = [group for group in study_design.plan_groups(design) if group.world is design.worlds[-1]]
    for step in dict.fromkeys([*design.steps, *(step for group in groups for step in group.plan.steps)]):
        if not re.search(r"_seed[1-9]$|_g[1-9]", step.name):  # which differ in a number only
            studies.check_command(step.run)


@pytest.mark.parametrize("name", ["controls", "edge", "words_drawings"])
def test_the_confirmation_draws_as_it_drew_whatever_the_default_becomes(name: str) -> None:
    design = study_design.load_design(ROOT / f"configs/study_{name}_confirmation.yaml")
    steps = [step for group in study_design.plan_groups(design) for step in group.plan.steps]
    drawn = {step.name: step.run for step in steps if step.run.startswith("python dataset_infer.py")}
    assert {run.partition("--step_spacing ")[2].split()[0] for run in drawn.values()} <= {"polynomial", "trailing"}
    assert any("--step_spacing polynomial" in run for run in drawn.values())


def test_each_cell_of_the_shipped_study_is_planned_once() -> None:
    design = study_design.load_design(ROOT / "configs/study_phantom.yaml")
    cells = [cell for group in study_design.plan_groups(design) for cell in group.cells]
    assert len({cell.folder for cell in cells}) == len(cells) == 5 * 3 * (1 + 4 + 4 + 1 + 1 + 1 + 1 + 1)


@pytest.mark.parametrize("name", ["phantom", "controls", "edge", "words_drawings"])
def test_development_confirmation_test_and_base_share_no_phantom_world(name: str) -> None:
    """The confirmation has the same treatments at a ratio that was chosen before, in worlds that nobody looked at."""
    designs = [study_design.load_design(ROOT / f"configs/study_{name}{end}.yaml") for end in ("", "_confirmation")]
    seeds: list[str] = []
    for design in designs:
        for step in [step for world in design.worlds for step in world.steps if "make_phantoms" in step.run]:
            line = shlex.split(step.run)
            seeds.append(line[line.index("--seed") + 1])
    assert len(set(seeds)) == len(seeds) == 2 * sum(len(design.worlds) for design in designs)
    assert max(map(int, seeds)) < 90_000  # the phantom base's worlds begin there
    assert min(designs[1].keys.worlds) >= (100 if name == "phantom" else 200)
    ours, theirs = ({arm.name: arm for arm in design.arms} for design in designs)
    ratio = designs[1].keys.compare.ratio if theirs else None
    assert ratio is not None or designs[1].keys.read_by_judge
    for arm in theirs.values():
        assert arm == dataclasses.replace(ours[arm.name], ratios=arm.ratios)
        assert arm.all_ratios in ((None,), (ratio,))
    if name != "phantom":  # the first study had no judge; one of another world would read worse
        judges = [[step.run.replace(each.keys.output_dir, "") for step in each.keys.judge.steps] for each in designs]
        assert judges[0] == judges[1]
    for key in ("generators", "set", "phantoms", "draw", "classifier"):
        values = [repr(getattr(each.keys, key)).replace(each.keys.output_dir, "") for each in designs]
        assert values[0] == values[1]


def test_the_confirmation_asks_what_was_written_down() -> None:
    keys = study_design.load_design(ROOT / "configs/study_controls_confirmation.yaml").keys
    asked = {name: (*each.minus, each.equivalence or each.endpoint) for name, each in keys.hypotheses.items()}
    assert asked == {
        "H1": ("hybrid", "paste", None),
        "H2": ("ours", "paste", None),
        "H3a": ("ours", "no_msc", "agreement"),
        "H3b": ("ours", "hard_mask", None),
        "H3c": ("ours", "hard_mask", "seam_error"),
        "H3d": ("ours_heldout", "no_msc_heldout", "agreement"),
        "E1": ("ours", "no_msc", 0.01),
        "E2": ("ours", "hard_mask", 0.01),
    }
    assert (keys.generator_seeds, keys.seeds, len(keys.worlds)) == ([0, 1], [0, 1, 2], 8)
    for study_ in dict.fromkeys(each.study for each in keys.hypotheses.values() if each.study):
        assert study_design.load_design(ROOT / study_).keys.tested_by == "configs/study_controls_confirmation.yaml"


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
        "strange": {"from": "ours", "draw": "--seed {seed} --data {train_json} --train_json {val_json}"},
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
    assert [name for name in steps if "draw" in name] == ["draw", "draw_again_g1", "draw_strange_g1"]
    drawn = shlex.split(steps["draw_again_g1"].run)
    assert drawn[drawn.index("--ckpt") + 1] == f"{home}/ours_g1/phantom_unet_only/last.ckpt"
    assert drawn[-6:] == ["--seed", "1", "--limit", "2", "data.feather=0", "sampling.steps=3"]
    assert "--seed 1" in steps["phantom_unet_only"].run
    strange = shlex.split(steps["draw_strange_g1"].run)
    train, val = (design.folder("world_3", f"annotations_{name}.json") for name in ("train", "val"))
    assert [strange[strange.index(flag) + 1] for flag in ("--data", "--train_json")] == [train, val]
    assert strange.count("--train_json") == 1
    cells = {cell.step.name: cell for cell in groups["world_3/ours_g1"].cells}
    assert list(cells) == ["ours_1_g1_seed0", "again_1_g1_seed0", "strange_1_g1_seed0"]
    assert f'synthetic=["{home}/again_g1/pictures"]' in shlex.split(cells["again_1_g1_seed0"].step.run)
    assert steps["draw_again_g1"] not in cells["ours_1_g1_seed0"].before  # it may be newer
    assert steps["draw_again_g1"] in cells["again_1_g1_seed0"].before
    pictures = f"{home}/paste_g1/pictures"
    (paste,) = (step for step in groups["world_3/paste_g1"].plan.steps if step.name == "draw")
    assert paste.run == f"python tool/paste.py {train} --v {val} --out {pictures} --seed 1"
    assert paste.makes == (pictures,)
    assert [cell.step.name for cell in groups["world_3/plain"].cells] == ["plain_1_seed0"]


def test_the_best_drawings_of_a_generator_may_be_chosen(write_study) -> None:
    """Classifiers and judge then get what is chosen; another arm may get all that the checkpoint draws."""
    generators = {
        "ours": {"stages": ["models/phantom_unet_only.yaml"], "set": ["data.feather=0"]},
        "best": {"from": "ours", "draw": "--variants 4", "choose": "--best 1", "set": ["sampling.steps=3"]},
        "paste": {"run": "python tool/paste.py {pictures}", "choose": "--least 0"},
    }
    arms = SMALL["arms"] | {name: {"use": "mix", "generator": name, "ratios": [1]} for name in generators}
    given = {**GENERATOR, "generators": generators, "judge": {"weights": "judge.safetensors"}}
    design = study_design.load_design(write_study(**given, arms=arms))
    groups = {group.plan.name: group for group in study_design.plan_groups(design)}
    group, home = groups["world_3/ours"], design.folder("world_3", "generators")
    steps = {step.name: step for step in group.plan.steps}
    order = ["draw", "draw_best", "choose_best", "ours_1_seed0", "best_1_seed0", "judge", "judge_best"]
    assert [*steps][-7:] == order
    assert steps["choose_best"].run == (
        f"python tool/choose_results.py {home}/best/pictures --output_dir {home}/best/chosen "
        "--config models/phantom.yaml --best 1 data.feather=0 sampling.steps=3"
    )
    assert steps["choose_best"].makes == (f"{home}/best/chosen/kept.json",)
    cells = {cell.step.name: cell for cell in group.cells}
    assert f'synthetic=["{home}/best/chosen/kept.json"]' in shlex.split(cells["best_1_seed0"].step.run)
    assert f'synthetic=["{home}/ours/pictures"]' in shlex.split(cells["ours_1_seed0"].step.run)
    assert steps["choose_best"] in cells["best_1_seed0"].before
    assert f"judge_results.py {home}/best/chosen/kept.json --judge" in steps["judge_best"].run
    pasted = {step.name: step for step in groups["world_3/paste"].plan.steps}
    assert pasted["choose"].run.endswith("--config models/phantom.yaml --least 0")


def test_what_is_trained_alike_is_trained_once(write_study) -> None:
    """Where only the drawing names the seed, all seeds draw with one checkpoint."""
    generators = {"base": {"stages": ["models/phantom_unet_only.yaml"]}}
    arms = SMALL["arms"] | {"base": {"use": "mix", "generator": "base", "ratios": [1]}}
    given = {**GENERATOR, "generators": generators, "generator_seeds": [4, 5], "draw": "--seed {seed}"}
    group = list(study_design.plan_groups(study_design.load_design(write_study(**given, arms=arms))))[-1]
    assert [step.name for step in group.plan.steps if step not in group.world.steps] == [
        *("convert", "phantom_unet_only", "draw_base_g4", "draw_base_g5", "base_1_g4_seed0", "base_1_g5_seed0")
    ]


def test_the_judge_reads_what_is_drawn_last(write_study) -> None:
    """Generators of the arms, or those that are named; its own steps run once for the study."""
    arms = SMALL["arms"] | {"paste": {"use": "mix", "generator": "paste", "ratios": [1]}}
    judge = {"weights": "{output_dir}/judge", "steps": [{"name": "train", "run": "python a.py {output_dir}/judge"}]}
    runs = {"paste": {"run": "python tool/paste.py {pictures} --seed {seed}"}, "poisson": RUNS["poisson"]}
    given = {"arms": arms, "generators": runs, "judge": judge, "generator_seeds": [4, 5]}
    design = study_design.load_design(write_study(**given))
    assert [step.run for step in design.steps] == [f"python a.py {design.folder('judge')}"]
    groups = {group.plan.name: group for group in study_design.plan_groups(design)}
    assert [name for name, group in groups.items() if group.judged] == ["world_3/paste_g4", "world_3/paste_g5"]
    group = groups["world_3/paste_g5"]
    assert [step.name for step in group.plan.steps[3:]] == ["draw", "paste_1_g5_seed0", "judge"]
    assert [step.name for step in group.drawing] == ["draw"]
    (judged,) = group.judged
    assert judged.before == (*group.world.steps, *group.drawing)
    home, train = design.folder("world_3", "generators", "paste_g5"), design.folder("world_3", "annotations_train.json")
    assert judged.step.run == (
        f"python tool/judge_results.py {home}/pictures --judge {design.folder('judge')} --real {train} "
        f"--output {home}/judged.json"
    )
    alone = study_design.load_design(write_study(**given | {"arms": {}, "compare": None, "judged": ["poisson"]}))
    (group,) = study_design.plan_groups(alone)
    assert [step.name for step in group.plan.steps[3:]] == ["draw", "judge"]


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


def test_the_study_that_tests_another_must_name_it(write_study, tmp_path: Path) -> None:
    for wrong in ({}, {"hypotheses": {"H": {"minus": ["real", "duplicated"]}}}):
        ruling = write_study(**wrong, output_dir=str(tmp_path / "ruling")).rename(tmp_path / "ruling.yaml")
        with pytest.raises(UsageError, match=r"tested_by: expected a study with a hypothesis about this one"):
            tiny.call(study, write_study(tested_by=str(ruling)))
    assert not (tmp_path / "out").exists()


def test_worlds_of_annotation_files_are_used_as_they_are(write_study, world: Path) -> None:
    files = {f"{split}_json": str(world / f"openimages_format_{split}.json") for split in ("train", "val", "test")}
    design = study_design.load_design(write_study(worlds={"hospital": files}, phantoms=None))
    (group,) = study_design.plan_groups(design)
    assert [step.name for step in group.plan.steps] == ["real_seed0", "duplicated_1_seed0"]
    assert f'test_json="{files["test_json"]}"' in shlex.split(group.plan.steps[0].run)
