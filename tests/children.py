"""Python commands in processes of their own that need not import torch again: forked from a server that has done so.

They are killed, waited for and read as any process is; only the start of the interpreter is not what a user sees.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])


def _serve() -> None:
    """Start the server unless it runs; it finds what it imports first beside this file."""
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [path]), str(Path(__file__).parent)])
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = path


def _run(words: list[str], environment: dict[str, str], folder: str, outputs: list[str], session: bool) -> None:
    """In the child: what ``python words`` does in that folder, its two outputs written to files."""
    if session:
        os.setsid()
    for stream, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115, open until the process ends
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what was imported before has looked it up, in the server's environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell of a background job has it ignored
    multiprocessing.set_start_method("fork", force=True)  # as where it was started otherwise, for what it starts itself
    import quick
    import torch

    torch.set_num_threads(1)
    if quick.FOLDER in environment:
        quick.install(Path(environment[quick.FOLDER]))
    sys.argv = ["-c", *words[2:]] if words[0] == "-c" else words
    try:
        if words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Child:
    """A command that runs; ``process`` tells its pid and, once it has ended, its exit code."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path, session: bool) -> None:
        self.outputs, self.encoding = tempfile.TemporaryDirectory(), environment.get("PYTHONIOENCODING", "utf-8")
        files = [Path(self.outputs.name, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        given = words, os.environ | environment, str(folder), list(map(str, files)), session
        self.process = SERVER.Process(target=_run, args=given)
        _serve()
        self.process.start()

    def said_until_now(self) -> str:
        """What it has written to its stdout so far."""
        return Path(self.outputs.name, "stdout").read_text(self.encoding, errors="replace")

    def wait(self, timeout: float) -> "subprocess.CompletedProcess[str]":
        """How it ended and what it wrote; after ``timeout`` seconds it is killed, and an error says so."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        with self.outputs as folder:
            said = [Path(folder, name).read_text(self.encoding, errors="replace") for name in ("stdout", "stderr")]
        if late:
            raise subprocess.TimeoutExpired(self.process.name, timeout, *said)
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *said)


def start(*words: object, folder: Path = Path(), session: bool = False, **environment: str) -> Child:
    """``python words`` in that folder, ``session``: as the leader of a new session; keywords are its environment's."""
    return Child(list(map(str, words)), environment, folder, session)


def run(*words: object, timeout: float = 300, **given: object) -> "subprocess.CompletedProcess[str]":
    """``start`` it, and wait."""
    return start(*words, **given).wait(timeout)


def run_two(*words: object, **environment: str) -> list["subprocess.CompletedProcess[str]"]:
    """The same words in two processes that know of each other as torchrun's do; it waits for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0", "NODE_RANK": "0", **environment}
    both = [start(*words, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    return [child.wait(900) for child in both]


@contextmanager
def serving(route: str, *words: object) -> Iterator[str]:
    """The address of a server, ``words --port PORT --no_browser``, once it answers ``route``; Ctrl-C ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = start(*words, "--port", port, "--no_browser")
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while child.process.is_alive() and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}{route}").close()
            break
        except OSError:
            time.sleep(0.05)
    yield address
    os.kill(child.process.pid or 0, signal.SIGINT)
    ended = child.wait(60)
    assert (ended.returncode, ended.stderr.count("\n")) == (130, 1), ended.stderr
