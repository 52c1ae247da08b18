"""ldm/core/locks.py: one holder at a time, also where a file system has no locks, and none after a kill."""

import errno
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import pytest

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.locks import exclusive


def test_lock_of_a_dead_process_holds_nobody(tmp_path: Path) -> None:
    code = "import sys, os\nfrom ldm.core.locks import exclusive\n"
    code += "with exclusive(sys.argv[1], ''): print('held', flush=True); os.kill(os.getpid(), 9)"
    path = tmp_path / "folder" / "lock"
    assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).stdout == b"held\n"
    with exclusive(path, "busy"), pytest.raises(UsageError, match="busy"), exclusive(path, "busy"):
        pass
    with exclusive(path, "busy"):
        pass


def test_waiting_says_so_and_gets_the_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = "import sys\nfrom ldm.core.locks import exclusive\n"
    code += (
        "with exclusive(sys.argv[1], ''): print('held', flush=True); sys.stdin.readline(); print('free', flush=True)"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdin is not None
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"

    class Release(logging.Handler):
        """Lets the other process go when this one has said that it waits."""

        def emit(self, record: logging.LogRecord) -> None:
            assert held.stdin is not None
            held.stdin.write("\n")
            held.stdin.flush()

    logger = logging.getLogger("ldm.core.locks")
    handler = Release()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO), exclusive(tmp_path / "lock", "somebody is at it; waiting", wait=True):
            assert held.stdout.readline() == "free\n"
    finally:
        logger.removeHandler(handler)
        held.wait(30)
    assert "somebody is at it; waiting" in caplog.text


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_without_locks_a_file_stands_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(self: Any, *args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    path = tmp_path / "lock"
    with (
        exclusive(path, "busy"),
        pytest.raises(UsageError, match=r"^busy \(if there is none, delete .*lock\.soft\)$"),
        exclusive(path, "busy"),
    ):
        pass
    assert "cannot be locked here; lock.soft stands for it" in caplog.text
    with exclusive(path, "busy"):
        pass


def test_a_lock_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MedSoftError, match=r"file/lock: could not be created"), exclusive(tmp_path / "file/lock", ""):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_lock_file_respects_the_umask(tmp_path: Path, umask: int) -> None:
    code = "import os, sys\nfrom ldm.core.locks import exclusive\n"
    code += f"os.umask({umask})\nwith exclusive(sys.argv[1], ''): pass"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=True)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666 & ~umask
