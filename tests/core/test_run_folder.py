"""ldm/core/run_folder.py: one process, one run, its own files only, the record last."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import fingerprint
from ldm.core.run_folder import RunFolder

SETTINGS: dict[str, Any] = {"seed": 1, "sampling": {"steps": 50, "sampler": "ddim"}, "data": fingerprint("a")}


def folder(path: Path, **given: Any) -> RunFolder:
    return RunFolder(path / "out", "record.json", **{"own": ("report.html",), "samples": "*__v*/meta.json"} | given)


def sample(results: RunFolder, name: str) -> Path:
    made = results.path / name
    made.mkdir(parents=True)
    (made / "meta.json").write_text("{}")
    return made


def finished(path: Path, **given: Any) -> RunFolder:
    """A complete run with one sample and a report."""
    results = folder(path, **given)
    assert results.open(SETTINGS) is None
    results.claim()
    sample(results, "deep/a__v0")
    (results.path / "report.html").write_text("old")
    results.finish(images=1)
    return results


def test_the_same_run_finds_its_record_and_its_items(tmp_path: Path) -> None:
    finished(tmp_path)
    again = folder(tmp_path)
    record = again.open(dict(reversed(SETTINGS.items())))
    assert record is not None
    assert (record["complete"], record["images"], record["settings"]) == (True, 1, SETTINGS)
    assert again.has("deep/a__v0", "meta.json")
    assert not again.has("deep/a__v0", "meta.json", "image.png")
    again.claim()
    assert (again.path / "report.html").exists()
    assert json.loads(again.record.read_text())["complete"] is False


def test_another_run_is_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    results = finished(tmp_path)
    before = results.record.read_bytes()
    other = {**SETTINGS, "sampling": {"steps": 20, "sampler": "ddim"}, "data": fingerprint("b"), "new": 1}
    message = r"of another run \(sampling.steps: 50 -> 20, data: \w{8}… -> \w{8}…\); give another --out"
    with pytest.raises(UsageError, match=message) as caught:
        folder(tmp_path).open(other)
    assert "new" not in str(caught.value)
    assert results.record.read_bytes() == before
    many = {**SETTINGS, "sampling": {f"x{k}": k for k in range(9)}}
    with pytest.raises(UsageError, match=r"sampling.x0: null -> 0, .* and 7 more\)"):
        folder(tmp_path).open(many)


def test_overwrite_deletes_what_runs_have_written_and_nothing_else(tmp_path: Path) -> None:
    results = finished(tmp_path)
    thesis = results.path / "deep" / "thesis.txt"
    thesis.write_text("years of work")
    other = folder(tmp_path)
    assert other.open({**SETTINGS, "seed": 2}, overwrite=True) is None
    assert (results.path / "report.html").exists()  # nothing before claim()
    other.claim(command="x")
    assert sorted(path.name for path in results.path.rglob("*")) == ["deep", "record.json", "thesis.txt"]
    assert json.loads(other.record.read_text())["command"] == "x"


def test_anew_replaces_the_work_of_the_same_run(tmp_path: Path) -> None:
    finished(tmp_path)
    again = folder(tmp_path)
    assert again.open(SETTINGS, overwrite=True, anew=True) is None
    again.claim()
    assert not (again.path / "report.html").exists()


def test_files_that_no_run_has_written_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    for given in ({}, {"shared": True}):
        with pytest.raises(UsageError, match=r"is not empty and holds no results .*report.html is there, record.json"):
            folder(tmp_path, **given).open(SETTINGS, overwrite=True)
    (tmp_path / "out" / "report.html").rename(tmp_path / "out" / "other.html")
    with pytest.raises(UsageError, match=r"other\.html is there"):
        folder(tmp_path).open(SETTINGS, overwrite=True)
    shared = folder(tmp_path, shared=True)
    assert shared.open(SETTINGS) is None
    shared.claim()
    shared.finish()
    assert (tmp_path / "out" / "other.html").read_text() == "mine"


def test_partials_of_a_killed_run_go_and_do_not_count_as_files(tmp_path: Path) -> None:
    for name in ("out/.partial-a/image.png", "out/.partial-b"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    results = folder(tmp_path)
    results.open(SETTINGS)
    results.claim()
    assert [path.name for path in results.path.iterdir()] == ["record.json"]
    inner = results.path / "deep" / ".partial-x"
    inner.mkdir(parents=True)
    flat = folder(tmp_path, samples="")
    flat.open(SETTINGS)
    flat.claim()
    assert inner.exists()  # a folder without sample folders looks at its own level only
    results.claim()
    assert not inner.exists()


def test_a_run_stopped_while_it_deletes_leaves_nobodys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = finished(tmp_path)
    sample(results, "b__v0")
    other = folder(tmp_path)
    other.open({**SETTINGS, "seed": 2}, overwrite=True)
    import ldm.core.run_folder as module

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove", stop)
        with pytest.raises(KeyboardInterrupt):
            other.claim()
    for settings in (SETTINGS, {**SETTINGS, "seed": 2}):
        with pytest.raises(UsageError, match="holds results of another run"):
            folder(tmp_path).open(settings)


def test_a_record_without_work_is_in_nobodys_way(tmp_path: Path) -> None:
    first = folder(tmp_path)
    first.open(SETTINGS)
    first.claim()
    assert folder(tmp_path).open({**SETTINGS, "seed": 2}) is None


def test_records_of_older_versions_are_known_by_their_fingerprint(tmp_path: Path) -> None:
    results = finished(tmp_path)
    results.record.write_text(json.dumps({"run": "abc", "complete": True}))
    assert folder(tmp_path).open(SETTINGS, legacy="abc") == {"run": "abc", "complete": True}
    with pytest.raises(UsageError, match="its data or settings are others; the record does not say which"):
        folder(tmp_path).open(SETTINGS, legacy="abd")


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_damaged_record_is_named_and_overwritten(tmp_path: Path, content: str) -> None:
    results = finished(tmp_path)
    results.record.write_text(content)
    with pytest.raises(MedSoftError, match=r"record.json: .*; --overwrite replaces"):
        folder(tmp_path).open(SETTINGS)
    again = folder(tmp_path)
    assert again.open(SETTINGS, overwrite=True) is None
    again.claim()
    assert not (again.path / "report.html").exists()


def test_a_path_that_can_become_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with (
        pytest.raises(UsageError, match=r"--save_path .*: expected a folder, found a file"),
        folder(tmp_path, flag="--save_path").lock(),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


HOLD = """
import sys
from ldm.core.run_folder import RunFolder
with RunFolder(sys.argv[1], "record.json").lock():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "out"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdin is not None
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    refused = pytest.raises(UsageError, match="another run is writing here at this moment; give another")
    with refused, RunFolder(path, "record.json").lock():
        pass
    with RunFolder(path, "record.json").lock(first=False):  # another process of the run that holds it
        pass
    assert not path.exists()
    held.communicate("\n")
    with RunFolder(path, "record.json").lock():
        assert os.listdir(tmp_path) == [".out.lock"]
