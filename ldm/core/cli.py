"""What every command shares: exit codes, one-line errors, logging. Imports nothing heavy."""

import argparse
import atexit
import dataclasses
import gc
import io
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from ldm.core.errors import MedSoftError, UsageError, say_the_rest

T = TypeVar("T")
program: str | None = None  # what usage lines name instead of the script's file: "medsoft train"
DONE, FAILED, USAGE, SOME_REJECTED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

TALKATIVE = ("httpx", "open_clip", "timm", "matplotlib", "lightning_fabric", "highdicom", "pydicom", "nibabel")


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM, so that ``finally`` blocks run before the command exits with 143."""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The lines of a description as they are, and behind each flag its default, if that is a number or a text.

    Unless the flag's own help says it.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = isinstance(action.default, bool | list | tuple | None) or "(default:" in (action.help or "")
        return action.help if unsaid else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows all flags")


@dataclasses.dataclass(frozen=True)
class Number:
    """What reads the value of a flag: an int or a float from ``low`` to ``high``; anything else is wrong usage."""

    kind: type[int] | type[float]
    low: float
    high: float

    def __call__(self, text: str) -> float:
        """The number that ``text`` says."""
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high:  # as NaN never is
            what = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} from {self.low} to {self.high}, found {text[:40]}")
        return value


COUNT, WHOLE = Number(int, 1, 10**9), Number(int, 0, 10**9)
SEED = Number(int, 0, 2**63 - 1)
PROCESSES = Number(int, 1, 1024)  # or devices, or machines: each would be started
AMOUNT, SHARE = Number(float, 0, 1e6), Number(float, 0, 1)


def devices(text: str) -> str:
    """A number of devices, or what Fabric takes instead: auto, -1, or the numbers of GPUs such as 0,1."""
    return text if text in ("auto", "-1") or "," in text else str(PROCESSES(text))


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the flags that every command understands."""
    made = _Parser(prog=program, description=description, formatter_class=_Help)
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return made


def options(kind: Callable[..., T], args: argparse.Namespace) -> T:
    """The dataclass ``kind`` from the flags that are named as its fields are."""
    return kind(**{name: getattr(args, name) for name in signature(kind).parameters})


def flag(text: str, default: Any = None, **more: Any) -> Any:
    """A dataclass field that ``add_flags`` also makes a flag: its help, its default and what else argparse takes."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


def add_flags(made: argparse.ArgumentParser, options: type) -> None:
    """Add the fields of the dataclass ``options`` that ``flag`` made; the first type of an annotation reads the value.

    A field with the default ``dataclasses.MISSING`` becomes a flag that is required.
    """
    hints = get_type_hints(options)
    for item in dataclasses.fields(options):
        about, hint = dict(item.metadata), hints[item.name]
        if not about:
            continue
        while get_args(hint):
            hint = get_args(hint)[0]
        shape = {"action": "store_true"} if hint is bool else {"type": hint, "default": item.default}
        about = shape | about  # which may say more closely how its value is read
        if item.default is dataclasses.MISSING:
            about |= {"required": True, "default": None}
        made.add_argument(f"--{item.name}", **about)


def run(
    made: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], int | None],
    argv: Any = None,
    at_once: bool = False,
) -> NoReturn:
    """Parse the arguments, call ``main`` and leave with the documented exit code.

    ``at_once``: the process ends without taking its modules apart, for commands that Ctrl-C ends.
    0 done; 1 data or I/O error; 2 wrong usage; 3 done but some inputs were rejected; 130 interrupted; 143 terminated.
    Everything a user can cause ends as one line on standard error; ``--debug`` adds the traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # what the console cannot show stands there as \u4e2d, no name is lost
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = made.parse_intermixed_args(argv)  # KEY=VALUE may stand between flags
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from None
    _set_environment()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger().handlers[0].addFilter(_worth_saying)
    signal.signal(signal.SIGTERM, _terminate)
    # At its end the interpreter would look for garbage among all objects of torch and the like, for 1.6 s.
    atexit.register(gc.freeze)
    code = _guarded(main, args)
    say_the_rest()
    if at_once:
        _join_threads()
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once:
        os._exit(code)
    raise SystemExit(code)


def _set_environment() -> None:
    """What libraries read of the environment when they are loaded; what the user has set stays."""
    # Threads that wait for each other spin for some microseconds and then sleep; read when torch loads. Two of them
    # then train phantoms at 100 to 115 items a second, where those that sleep at once reach 92; beside a busy process
    # it is 55 to 60 instead of 66 to 78. Spinning for long makes two programs on one machine many times slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Each of several threads or processes looks at an image of its own; OpenCV's own threads gain nothing beside them.
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns of the processes that read data


def _join_threads() -> None:
    """Wait for threads that have something to end."""
    try:
        for thread in set(threading.enumerate()) - {threading.current_thread()}:
            if not thread.daemon:
                thread.join()
    except KeyboardInterrupt:  # once more: nobody waits any longer, and temporary folders are deleted all the same
        raise SystemExit(INTERRUPTED) from None


def _check_encoding(args: argparse.Namespace) -> None:
    """UsageError for a text or path among the arguments that is not UTF-8: what is written could not hold it."""
    given = {"the working directory": [os.getcwd()]}
    given |= {f"--{name}": value if isinstance(value, list) else [value] for name, value in vars(args).items()}
    for name, values in given.items():
        for value in values:
            text = os.path.realpath(value) if isinstance(value, Path) else str(value)
            if not _is_utf8(text) or not _is_utf8(str(value)):
                raise UsageError(f"{name}: {ascii(text)[1:-1]} is not valid UTF-8, which JSON files need; rename it")


def _is_utf8(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode()


def _guarded(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    try:
        _check_encoding(args)
        return main(args) or DONE
    except Terminated:
        return TERMINATED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, MedSoftError):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        print(f"error: {type(error).__name__}: {error} (run again with --debug for the traceback)", file=sys.stderr)
        return FAILED


def _worth_saying(record: logging.LogRecord) -> bool:
    """False for what packages tell of themselves. Some set their loggers' level when they are loaded."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in TALKATIVE


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated(TERMINATED)
