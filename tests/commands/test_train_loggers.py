"""training.loggers: experiment trackers are told a run's numbers; stand-ins on the path record what they are told."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import CLIP, PHANTOM, train

from ldm.config import load_config
from ldm.core.errors import UsageError
from ldm.training.records import Trackers

RECORDS_CALLS = """
calls = []
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *given, **named: calls.append((name, given, named))
"""
NAMES = ("wandb", "mlflow", "trackio")


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the three names, of which trackio fails at the first number."""
    for name in NAMES:
        fails = "\ndef log(*given, **named):\n    raise RuntimeError('no room')\n" if name == "trackio" else ""
        (tmp_path / f"{name}.py").write_text(RECORDS_CALLS + fails)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("trackers")
def test_trackers_are_told_what_the_files_say(
    world: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train("stage1", converted, tmp_path / "run", world, f"training.loggers=[{','.join(NAMES)}]") == 0
    told = {name: sys.modules[name].calls for name in NAMES}
    steps = list(csv.DictReader((tmp_path / "run/steps.csv").read_text().splitlines()))
    (epoch,) = csv.DictReader((tmp_path / "run/metrics.csv").read_text().splitlines())
    for name, call in (("wandb", "log"), ("mlflow", "log_metrics")):
        logged = [(given[0], named["step"]) for what, given, named in told[name] if what == call]
        assert [(step, values["train/loss"]) for values, step in logged[:-1]] == [
            (int(row["step"]), float(row["loss"])) for row in steps
        ]
        assert logged[-1][0]["epoch/val_loss"] == pytest.approx(float(epoch["val_loss"]), rel=1e-5)
    (_, _, kept_back), first, *_, last = told["wandb"]
    assert kept_back == {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True}
    assert (first[0], last[0]) == ("init", "finish")
    assert first[2]["config"]["training"]["batch_size"] == 3
    assert first[2]["name"] == "run"
    names = [call[0] for call in told["mlflow"]]
    assert names[:4] == ["set_tracking_uri", "set_experiment", "start_run", "log_params"]
    assert names[-1] == "end_run"
    unsaid = {"mlflow.user": "unknown", "mlflow.source.name": "ver_train.py"}
    assert told["mlflow"][2][2]["tags"] == {"medsoft.run": first[2]["id"], **unsaid}
    assert str(CLIP) not in repr(told)  # a path, which decides no weight
    assert "trackio failed (no room); the run goes on without it" in caplog.text
    assert [call[0] for call in told["trackio"]] == ["init"]


class Fails:
    """A tracker whose errors say nothing."""

    def log(self, values: dict[str, float], step: int) -> None:
        raise RuntimeError("\n")


def test_a_tracker_that_fails_without_a_word_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers([], tmp_path, {})
    trackers.open_ones["wandb"] = Fails()
    trackers.log({"train/loss": 1.0}, 1)
    assert "wandb failed (RuntimeError); the run goes on without it" in caplog.text
    assert not trackers.open_ones


def test_what_is_not_installed_is_refused_first(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"loggers: trackio is not installed; `pip install trackio`, or leave"):
        train("stage1", tmp_path / "not there.ckpt", tmp_path / "run", world, "training.loggers=[trackio]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [("[comet]", "expected one of wandb, mlflow, trackio, found .comet"), ("[wandb,wandb]", "expected each name once")],
)
def test_other_names(given: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(PHANTOM, [f"training.loggers={given}"])
