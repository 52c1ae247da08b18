"""tool/run_stages.py: plans, skipping, failures, signals; and the commands of configs/demo.yaml."""

import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import classifier
from ldm.classifier.config import load_classifier_config
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.locks import exclusive
from ldm.phantom.demo_report import ARMS
from ldm.workflow import plan_run, plans
from tool import run_stages

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tool" / "run_stages.py"


def touch(path: Path, exit_code: int = 0) -> str:
    """A command that appends a line to ``path`` and ends with ``exit_code``."""
    code = f"import sys; open({str(path)!r}, 'a').write('x\\n'); sys.exit({exit_code})"
    return shlex.join(["python", "-c", code])


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    def write(*steps: dict[str, Any], **other: Any) -> Path:
        path = tmp_path / "plan.yaml"
        values = {"name": "test", "output_dir": str(tmp_path / "out"), "steps": list(steps)} | other
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def run(path: Path, *flags: str) -> int:
    return run_stages.main(run_stages.build_parser().parse_args([str(path), *flags]))


def recorded(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "out" / "stages.json").read_text())["steps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": []}, "unknown key stepz"),
        (
            {"steps": [{"name": "a", "run": "python -V", "make": []}]},
            "unknown key steps.1.make; did you mean steps.1.ma",
        ),
        (
            {"steps": [{"name": "a", "run": "x"}, {"name": "a", "run": "y"}]},
            "steps: expected at least one step, each with",
        ),
        ({"steps": [{"name": "a"}]}, "steps.1.run: expected words of a command, their quotes closed, found nothing"),
        ({"steps": [{"name": "a", "run": "python 'x"}]}, "steps.1.run: expected words of a command"),
        ({"steps": [{"name": "a", "run": "x", "makes": "file"}]}, "makes: expected a list"),
        ({"steps": [{"name": "a", "run": "x", "makes": [1]}]}, "steps.1.makes: expected text, found 1"),
        ({"steps": []}, "at least one step"),
        ({"output_dir": " "}, "output_dir: expected text"),
        ({"steps": ["python -V"]}, "steps: expected keys with values, found .python -V"),
    ],
)
def test_plans_with_mistakes_are_refused(write_plan, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(write_plan(**change))


def test_missing_and_broken_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"nowhere.yaml: this plan does not exist"):
        run(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(UsageError, match="not readable as YAML"):
        run(tmp_path / "broken.yaml")


def test_steps_run_in_order_from_the_root_and_are_skipped_when_done(write_plan, tmp_path: Path, capfd) -> None:
    log = tmp_path / "log"
    where = f"import os; open({str(log)!r}, 'a').write(os.getcwd() + os.environ['MALLOC_TRIM_THRESHOLD_'] + '\\n')"
    path = write_plan(
        {"name": "first", "run": shlex.join(["python", "-c", where]), "makes": [str(log)]},
        {"name": "second", "run": touch(log), "makes": [str(log)]},
    )
    assert run(path) == 0
    assert log.read_text().splitlines() == [f"{ROOT}17179869184", "x"]
    first = recorded(tmp_path)
    assert [(step["name"], step["exit_code"]) for step in first] == [("first", 0), ("second", 0)]
    assert "[2/2] second ... done in" in capfd.readouterr().out

    assert run(path) == 0
    assert log.read_text().count("\n") == 2
    assert recorded(tmp_path) == first
    out = capfd.readouterr().out
    assert "[1/2] first ... already done" in out
    total = sum(step["seconds"] for step in first)
    assert f"{total:>9.1f}" in out.splitlines()[-1]


def test_a_changed_command_or_a_missing_output_runs_that_step_and_all_after_it(write_plan, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    steps = [{"name": file.name, "run": touch(file), "makes": [str(file)]} for file in files]
    run(write_plan(*steps))
    steps[1]["run"] += " again"
    run(write_plan(*steps))
    assert [file.read_text().count("x") for file in files] == [1, 2, 2]
    files[1].unlink()
    run(write_plan(*steps))
    assert [file.read_text().count("x") for file in files] == [1, 1, 3]
    run(write_plan(*reversed(steps)))
    assert [file.read_text().count("x") for file in files] == [1, 1, 3]


def test_what_comes_after_a_step_that_ran_stays_to_do_when_the_run_breaks_off(write_plan, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    path = write_plan(*({"name": file.name, "run": touch(file)} for file in files))
    run(path)
    run(path, "--only", "a")  # as if the runner had been killed after this step
    run(path)
    assert [file.read_text().count("x") for file in files] == [2, 2, 2]


@pytest.mark.parametrize(
    "changed", ["models/a.yaml", "models/below.yaml", "configs/classifier/c.json", "models/w.ckpt"]
)
def test_a_changed_file_that_the_command_names_runs_the_step_again(
    write_plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(plans, "ROOT", tmp_path)
    (tmp_path / "configs" / "classifier").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.yaml").write_text("# first\nbase: 'below.yaml'  # the sizes\nkey: 1\n")
    for name in ("models/below.yaml", "configs/classifier/c.json", "models/w.ckpt", "models/other.yaml"):
        (tmp_path / name).write_text("x: 1\n")
    log = tmp_path / "log"
    path = write_plan({"name": "a", "run": touch(log) + " --config ./models/a.yaml c.json --ckpt=models/w.ckpt"})
    run(path)
    with open(tmp_path / "models" / "other.yaml", "a") as handle:
        handle.write("# not named\n")
    run(path)
    assert log.read_text() == "x\n"
    with open(tmp_path / changed, "a") as handle:
        handle.write("# changed\n")
    run(path)
    assert log.read_text() == "x\nx\n"


def test_a_step_that_has_nothing_left_to_do_keeps_its_real_seconds(
    write_plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 60.0, 100.0, 100.5, 200.0, 201.0])  # at the start and the end of each of three runs
    monkeypatch.setattr(plan_run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    step = {"name": "slow once", "run": "python -c pass"}
    run(write_plan(step))
    assert recorded(tmp_path)[0]["seconds"] == 60
    run(write_plan(step), "--from", "slow once")
    assert recorded(tmp_path)[0]["seconds"] == 60.5
    run(write_plan(step | {"run": "python -c pass other"}))
    assert recorded(tmp_path)[0]["seconds"] == 1


def test_the_list_tells_what_runs_again_from_what_is_done(write_plan, tmp_path: Path, capsys) -> None:
    files = [tmp_path / name for name in "abc"]
    path = write_plan(*({"name": file.name, "run": touch(file), "makes": [str(file)]} for file in files))
    assert run(path) == 0
    files[1].unlink()
    capsys.readouterr()
    assert run(path, "--list") == 0
    shown = re.findall(r"(\w) \(([\w ]+)\):", capsys.readouterr().out)
    assert shown == [("a", "done"), ("b", "to do"), ("c", "outdated")]
    assert run(path) == 0
    assert [file.read_text().count("x") for file in files] == [1, 1, 2]


def test_from_only_and_list(write_plan, tmp_path: Path, capsys) -> None:
    files = [tmp_path / name for name in "abc"]
    path = write_plan(*({"name": file.name, "run": touch(file)} for file in files))
    assert run(path, "--list") == 0
    assert "[1/3] a (to do): python -c" in capsys.readouterr().out
    assert not files[0].exists()
    run(path, "--only", "c", "a")
    run(path, "--from", "b")
    assert [file.read_text().count("x") for file in files] == [1, 1, 2]
    with pytest.raises(UsageError, match="d: no such step in plan test; it has a, b, c"):
        run(path, "--from", "d")
    with pytest.raises(UsageError, match="exclude each other"):
        run(path, "--from", "a", "--only", "a")


def test_a_failing_step_stops_with_its_command_and_the_way_on(write_plan, tmp_path: Path, capfd) -> None:
    done, never = tmp_path / "done", tmp_path / "never"
    bad = touch(tmp_path / "bad", exit_code=7)
    path = write_plan(
        {"name": "good", "run": touch(done)}, {"name": "bad", "run": bad}, {"name": "after", "run": touch(never)}
    )
    assert run(path) == 7
    errors = capfd.readouterr().err
    assert f"step bad failed (exit code 7): {bad}" in errors
    assert f"python tool/run_stages.py {path}" in errors
    assert not never.exists()
    spent = recorded(tmp_path)[1]["seconds"]

    assert run(path) == 7  # goes on at the failed step; its time adds up
    assert done.read_text() == "x\n"
    assert recorded(tmp_path)[1]["seconds"] > spent


def test_work_of_other_settings_is_replaced_only_when_asked(write_plan, tmp_path: Path, capfd) -> None:
    """A step like ours: it refuses the folder of other settings, and with --overwrite starts again there."""
    kept = tmp_path / "kept"
    program = (
        "import os, sys\n"
        f"path, mine = {str(kept)!r}, sys.argv[1]\n"
        "old = open(path).read() if os.path.exists(path) else mine\n"
        "if old.split()[0] != mine and '--overwrite' not in sys.argv: sys.exit(2)\n"
        "open(path, 'w').write(mine + (' goes on' if old == mine else ' anew'))\n"
    )
    after = {"name": "after", "run": touch(tmp_path / "after")}

    def plan(setting: str) -> Path:
        return write_plan({"name": "train", "run": shlex.join(["python", "-c", program, setting])}, after)

    assert run(plan("a"), "--overwrite") == 0
    assert kept.read_text() == "a goes on"  # nothing refused, nothing replaced
    path = plan("b")
    assert run(path) == 2
    assert kept.read_text() == "a goes on"
    errors = capfd.readouterr().err
    assert f"python tool/run_stages.py {path}; with --overwrite it replaces the work of other settings" in errors
    assert run(path, "--overwrite") == 0
    assert kept.read_text() == "b anew"
    assert "[1/2] train: once more, with --overwrite" in capfd.readouterr().out
    assert (tmp_path / "after").read_text() == "x\nx\n"
    assert run(path, "--overwrite") == 0
    assert kept.read_text() == "b anew"  # done: not run again


def test_a_mistake_in_a_command_stays_one_with_overwrite(write_plan, tmp_path: Path, capfd) -> None:
    bad = touch(tmp_path / "bad", exit_code=2)
    assert run(write_plan({"name": "bad", "run": bad}), "--overwrite") == 2
    assert (tmp_path / "bad").read_text() == "x\nx\n"
    assert "with --overwrite it replaces" not in capfd.readouterr().err


def test_exit_3_goes_on_and_is_repeated_in_every_summary(write_plan, tmp_path: Path, capfd) -> None:
    last = tmp_path / "last"
    path = write_plan(
        {"name": "picky", "run": touch(tmp_path / "picky", exit_code=3)}, {"name": "last", "run": touch(last)}
    )
    for _ in range(2):
        assert run(path) == 3
        assert "some inputs were rejected in: picky" in capfd.readouterr().out
    assert last.read_text() == "x\n"
    assert (tmp_path / "picky").read_text() == "x\n"


def test_success_without_the_output_is_an_error(write_plan, tmp_path: Path) -> None:
    path = write_plan({"name": "liar", "run": touch(tmp_path / "a"), "makes": [str(tmp_path / "b")]})
    with pytest.raises(MedSoftError, match=r"step liar: ended with 0, but did not make .*b"):
        run(path)
    with pytest.raises(MedSoftError, match="step liar"):  # not taken for done
        run(path)


def test_a_program_that_is_not_there_and_a_killed_one(write_plan, tmp_path: Path, capfd) -> None:
    with pytest.raises(MedSoftError, match="no-such-program cannot be started"):
        run(write_plan({"name": "a", "run": "no-such-program"}))
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run(write_plan({"name": "a", "run": shlex.join(["python", "-c", code])})) == 137
    assert "Killed; often too little memory" in capfd.readouterr().err


def test_the_record_of_another_plan_or_a_damaged_one_is_refused(write_plan, tmp_path: Path) -> None:
    run(write_plan({"name": "a", "run": touch(tmp_path / "a")}))
    with pytest.raises(
        UsageError, match=r"out: holds steps of another run \(plan: test -> other\); give another output_dir, or delete"
    ):
        run(write_plan({"name": "a", "run": touch(tmp_path / "a")}, name="other"))
    for damaged, message in (("[]", "found list; delete it"), ("{}", "not a record of finished steps; delete it")):
        (tmp_path / "out" / "stages.json").write_text(damaged)
        with pytest.raises(MedSoftError, match=rf"stages\.json: .*{message}"):
            run(write_plan({"name": "a", "run": touch(tmp_path / "a")}))


def test_a_plan_that_is_running_is_refused_and_can_be_listed(write_plan, tmp_path: Path, capsys) -> None:
    path = write_plan({"name": "a", "run": touch(tmp_path / "a")})
    with exclusive(tmp_path / "out" / "stages.lock", "busy"):
        with pytest.raises(UsageError, match="out: another run is writing here at this moment; give another output_d"):
            run(path)
        assert run(path, "--list") == 0
    assert "[1/1] a (to do)" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


def test_what_a_killed_run_left_half_written_goes_with_the_next_step(write_plan, tmp_path: Path) -> None:
    path = write_plan({"name": "a", "run": touch(tmp_path / "a")})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".partial-x").write_text("{")
    assert run(path) == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["stages.json", "stages.lock"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_step_once_and_end_the_run(write_plan, tmp_path: Path, sent: int, code: int) -> None:
    ready, heard, never = tmp_path / "ready", tmp_path / "heard", tmp_path / "never"
    program = (
        "import signal, sys, time\n"
        f"def hear(number, frame):\n    open({str(heard)!r}, 'a').write(f'{{number}} ')\n"
        "    time.sleep(0.2)\n    sys.exit(1)\n"
        "signal.signal(signal.SIGINT, hear); signal.signal(signal.SIGTERM, hear)\n"
        f"open({str(ready)!r}, 'w').close(); time.sleep(30)"
    )
    path = write_plan(
        {"name": "long", "run": shlex.join(["python", "-c", program])}, {"name": "after", "run": touch(never)}
    )
    # A suite started in the background of a shell ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(path)], stdout=subprocess.DEVNULL, cwd=tmp_path)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(60) == code
    assert heard.read_text() == f"{int(sent)} "
    assert recorded(tmp_path)[0]["exit_code"] == code
    assert not never.exists()


def test_command_line_shows_one_line_and_the_exit_code(write_plan, tmp_path: Path) -> None:
    path = write_plan({"name": "a", "run": "x", "typo": 1})
    done = subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: unknown key steps.1.typo; known here: name, run, makes\n"


# -------------------------------------------------------------------------------------------- the demo and its twin


def steps_of(name: str) -> list[Any]:
    return list(plans.load_plan(ROOT / "configs" / f"{name}.yaml").steps)


def demo_steps() -> list[Any]:
    return steps_of("demo")


SHIPPED = [pytest.param(name, step, id=f"{name}-{step.name}") for name in ("demo", "large") for step in steps_of(name)]


@pytest.mark.parametrize(("plan", "step"), SHIPPED)
def test_every_command_of_a_shipped_plan_is_one_its_script_accepts(plan: str, step: Any) -> None:
    python, script, *words = shlex.split(step.run)
    assert python == "python"
    module = script.removesuffix(".py").replace("/", ".").lstrip(".")
    args = importlib.import_module(module).build_parser().parse_args(words)
    for name in ("config", "input_path", "plan"):  # what it reads from the repository exists
        given = str(getattr(args, name, f"{plan}_output"))
        assert given.startswith(f"{plan}_output") or given.endswith(".ckpt") or (ROOT / given).is_file()
    assert all(path.startswith(f"{plan}_output/") for path in step.makes)


def classifier_config(step: Any) -> Any:
    args = classifier.build_parser().parse_args(shlex.split(step.run)[2:])
    return load_classifier_config(classifier.find_config(args.args), args.set)


@pytest.mark.parametrize(("plan", "step"), [each for each in SHIPPED if "classifier.py" in each.values[1].run])
def test_the_classifiers_of_a_plan_read_what_earlier_steps_make(plan: str, step: Any) -> None:
    config, steps = classifier_config(step), steps_of(plan)
    earlier = steps[: [s.name for s in steps].index(step.name)]
    made = {path for s in earlier for path in s.makes} | {str(Path(path).parent) for s in earlier for path in s.makes}
    used = [config.train_json, config.val_json, config.test_json, *config.synthetic, *config.predict]
    assert set(used) <= made
    seeds = classifier.build_parser().parse_args(shlex.split(step.run)[2:]).seeds
    folders = {f"{config.output_dir}/seed_{seed}" for seed in seeds} if seeds else {config.output_dir}
    assert {str(Path(path).parent) for path in step.makes} == folders


def test_the_judge_and_the_test_set_share_no_world_with_anything_else() -> None:
    words = [shlex.split(step.run) for name in ("demo", "large") for step in steps_of(name) if "_phantoms" in step.run]
    seeds = {line[line.index("--output_dir") + 1]: line[line.index("--seed") + 1] for line in words}
    assert len(set(seeds.values())) == len(seeds) == 10


def test_the_large_plan_has_the_demos_steps_without_the_classifiers_and_draws_at_true_scale() -> None:
    demo, large = ({step.name: step.run for step in steps_of(name)} for name in ("demo", "large"))
    assert [name for name in demo if not name.startswith("classifier_")] == list(large)
    assert all("--size 512" in run for run in large.values() if "make_phantoms" in run)
    configs = {word for run in large.values() for word in shlex.split(run) if word.startswith("./models/")}
    assert {load_config(ROOT / path).data.image_size for path in configs} == {128}
    assert len(configs) == 5


def test_the_arms_of_the_demo_differ_in_what_they_add_alone_and_add_equally_many() -> None:
    steps = {name: next(s for s in demo_steps() if s.name == f"classifier_{name}") for name in ARMS}
    assert len({step.run.partition("--seeds")[2] for step in steps.values()}) == 1
    configs = {name: vars(classifier_config(step)) for name, step in steps.items()}
    differing = {key for key in configs["real"] if len({str(config[key]) for config in configs.values()}) > 1}
    assert differing == {"synthetic", "use_synthetic", "ratio", "output_dir"}
    assert configs["duplicated"]["ratio"] == configs["augmented"]["ratio"] > 0
    assert configs["real"]["synthetic"] == configs["duplicated"]["synthetic"] == []
