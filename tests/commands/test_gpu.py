"""tool/gpu.py without a GPU: the same steps at phantom size, each in a process of its own."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import children
import pytest
import torch
from tiny import PHANTOM, ROOT, call, on_cpu

from ldm.bench import gpu as bench
from ldm.core.errors import MedSoftError, UsageError
from tool import gpu

pytestmark = on_cpu


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return shutil.copyfile(ROOT / "docs" / "gpu.md", tmp_path / "page.md")


def measure(page: Path, *more: Any, device: str = "cpu") -> int:
    folder = page.parent / "gpu_output"
    given = ["--device", device, "--config", PHANTOM, "--output_dir", folder, "--document", page, "--repeats", 2]
    return call(gpu, *given, *more)


class Forked:
    """What ``in_own_process`` uses of a ``subprocess.Popen``, of a process that need not import torch again."""

    returncode = -1

    def __init__(self, words: list[str], **_: Any) -> None:
        self.child = children.start(*words[1:])
        self.pid = self.child.process.pid

    def communicate(self, timeout: float) -> tuple[None, str]:
        done = self.child.wait(timeout)
        self.returncode = done.returncode
        return None, done.stderr


def results(page: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in (page.parent / "gpu_output").glob("*.json")}


def test_steps_are_measured_once_and_the_page_keeps_its_words(
    page: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = page.read_text()
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))
    assert measure(page, "--only", "stage1", "drawing_fast_compiled") == 0
    found = results(page)
    assert found.keys() == {"stage1", "drawing_fast_compiled"}
    row, drawn = found["stage1"], found["drawing_fast_compiled"]
    assert (row["batch"], row["compiled"], row["stage"]) == (2, False, "stage1")
    assert row["per_second"] > 0
    assert row["estimate"] > 1e6
    assert row["about"]["torch"] == torch.__version__
    assert 0 <= drawn["difference"] < 64  # bfloat16 against float32, random weights
    text = page.read_text()
    assert f"| stage1 | no | 2 | {row['per_second']:.1f} | - |" in text
    assert f"| drawing_fast | no | 2 | {drawn['steps']} | {drawn['per_second']:.2f} |" in text
    assert "No card has been measured" not in text
    begin, end = "<!-- measured: begin -->", "<!-- measured: end -->"
    assert text.partition(begin)[0] == words.partition(begin)[0]
    assert text.partition(end)[2] == words.partition(end)[2]
    monkeypatch.setattr(bench, "in_own_process", None)  # nothing is measured again, and nothing begins without time
    caplog.clear()
    assert measure(page, "--only", "stage1", "unet_only", "--minutes", 0) == 0
    assert "stage1: measured already" in caplog.messages
    assert "unet_only: no time is left; the same command goes on here" in caplog.messages
    assert page.read_text() == text


def test_steps_that_fail_are_named_and_stop_nothing(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is too slow, one breaks; a repeated command takes them again."""
    steps = {step.name: step for step in bench.STEPS}
    slow, broken = replace(steps["unet_only"], seconds=0.2), replace(steps["stage1"], stage="stage9")
    monkeypatch.setattr(bench, "STEPS", (slow, broken))
    monkeypatch.setattr(bench, "SHIPPED", page.parent)
    (page.parent / "tool").mkdir()
    (page.parent / "tool" / "gpu.py").write_text(
        "import sys, time\n"
        "if 'unet_only' in sys.argv: time.sleep(60)\n"
        "print('error: the device is on fire', file=sys.stderr)\n"
        "sys.exit(1)\n"
    )
    assert measure(page) == 3
    assert {name: row["failed"] for name, row in results(page).items()} == {
        "unet_only": "stopped after 1 s",
        "stage1": "the device is on fire",
    }
    assert "`unet_only` failed: stopped after 1 s" in page.read_text()
    assert "`stage1` failed: the device is on fire" in page.read_text()
    (page.parent / "tool" / "gpu.py").write_text("import sys; sys.exit('error: again')\n")
    assert measure(page) == 3
    assert {row["failed"] for row in results(page).values()} == {"again"}


def test_without_a_gpu_one_line_says_so(page: Path) -> None:
    with pytest.raises(UsageError, match=r"no GPU is there .*; --device cpu takes the same steps here"):
        measure(page, device="cuda")


def test_step_that_does_not_exist(page: Path) -> None:
    with pytest.raises(UsageError, match=r"--only stage9: expected one of unet_only, stage2_2, "):
        measure(page, "--only", "stage9")


def test_page_without_a_place_for_the_tables(page: Path) -> None:
    page.write_text("# Mine\n")
    with pytest.raises(MedSoftError, match=r"page\.md: expected the lines <!-- measured: begin --> and "):
        measure(page, "--only", "stage1")
    assert not (page.parent / "gpu_output").exists()
