"""ldm/core/cli.py: what every command says, and how."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import children
import pytest
from tiny import ROOT

TALK = """
import logging
from ldm.core import cli
def main(args):
    from ldm.core.distributed import fabric_class
    fabric_class()
    for name in ("lightning_fabric.utilities", "open_clip", "highdicom.base", "ldm.training.run", "lightning"):
        logging.getLogger(name).info("%s informs", name)
        logging.getLogger(name).warning("%s warns", name)
cli.run(cli.parser(None), main, [])
"""


def test_packages_that_talk_of_themselves_are_quiet_until_they_warn() -> None:
    done = subprocess.run([sys.executable, "-c", TALK], capture_output=True, text=True, cwd=ROOT, check=True)
    said = done.stdout.splitlines()
    assert "ldm.training.run informs" in said
    assert [line for line in said if line.startswith(("lightning_fabric", "open_clip", "highdicom"))] == [
        "lightning_fabric.utilities warns",
        "open_clip warns",
        "highdicom.base warns",
    ]


STOPPED_TWICE = """
import os, signal, tempfile, threading, time
from ldm.core import cli
def work():
    with tempfile.TemporaryDirectory():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
def main(args):
    threading.Thread(target=work).start()
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it from the start
cli.run(cli.parser(None), main, [], at_once=True)
"""


def test_a_second_control_c_ends_a_server_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    given = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_TWICE], capture_output=True, text=True, cwd=ROOT, env=given, timeout=15
    )
    assert (done.returncode, done.stderr) == (130, "interrupted; run the same command again to go on\n")
    assert list(tmp_path.iterdir()) == []


def test_help_shows_defaults_and_keeps_the_lines_of_the_description() -> None:
    done = subprocess.run(
        [sys.executable, "tool/make_soft_masks.py", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    said = done.stdout
    assert "\n    python tool/make_soft_masks.py --data dataset" in said
    assert "its width (default: 0.25)" in " ".join(said.split())
    assert "(default: None)" not in said
    assert "(default: False)" not in said


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_names_that_the_console_cannot_show_are_spelled(tmp_path: Path, write_sample: Any, encoding: str) -> None:
    """Whatever a console can show, a command ends as it would elsewhere, and says which sample it means."""
    data, name = tmp_path / "Zürich 脊椎", "病变–Ω"
    for number in range(12):
        write_sample(data / f"good{number}", prompt="lytic lesion" if number % 2 else "healthy")
    (write_sample(data / name) / "image.png").write_bytes(b"no picture")
    output = tmp_path / "a.json"
    for words in (
        ["ver_openImagesDatasets.py", "--root_dir", data, "--output_file", output],
        ["tool/doctor.py", "--data", data, "--workers", 1],
        ["ver_openImagesDatasets.py", "--root_dir", data / name / "none", "--output_file", output],
    ):
        done = children.run(*words, folder=ROOT, timeout=120, PYTHONIOENCODING=encoding)
        said = done.stdout + done.stderr
        assert done.returncode == (1 if "none" in str(words) else 3), said
        spelled = name.encode(encoding, "backslashreplace").decode(encoding)
        assert spelled in said
        assert "Traceback" not in said
    assert json.loads((tmp_path / "a_rejects.json").read_text(encoding="utf-8"))[0]["sample_id"] == name


def test_a_file_name_that_is_no_text_is_shown_and_rejected(tmp_path: Path, write_sample: Any) -> None:
    data = tmp_path / "data"
    for number in range(12):
        write_sample(data / f"good{number}", prompt="lytic lesion" if number % 2 else "healthy")
    write_sample(Path(os.fsdecode(os.fsencode(data) + b"/bad\xff")))
    words = ["--root_dir", data, "--output_file", tmp_path / "a.json"]
    done = children.run("ver_openImagesDatasets.py", *words, folder=ROOT)
    assert done.returncode == 3, done.stderr
    assert "bad" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("given", "waits"), [({}, "PASSIVE 2000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")])
def test_threads_spin_briefly_unless_the_user_says_otherwise(given: dict[str, str], waits: str) -> None:
    ask = "from ldm.core import cli; from os import environ as e; cli.run(cli.parser(''), lambda args: print(" + (
        "e.get('OMP_WAIT_POLICY'), e.get('GOMP_SPINCOUNT')))"
    )
    bare = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", ask], env=bare | given, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (waits, "")


@pytest.mark.parametrize("place", ["flag", "working directory", "target of a link"])
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_read(
    tmp_path: Path, write_sample: Any, place: str
) -> None:
    bad = tmp_path / os.fsdecode(b"d\xff")
    write_sample(bad / "a")
    (tmp_path / "link").symlink_to(bad)
    data = {"flag": bad, "working directory": Path(), "target of a link": tmp_path / "link"}[place]
    for script, flag in (("ver_openImagesDatasets.py", "--root_dir"), ("tool/doctor.py", "--data")):
        done = subprocess.run(
            [sys.executable, ROOT / script, flag, data], capture_output=True, text=True, check=False, cwd=bad
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.endswith("d\\udcff is not valid UTF-8, which JSON files need; rename it")
