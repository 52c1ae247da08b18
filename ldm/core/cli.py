"""What every command shares: exit codes, one-line errors, logging. Imports nothing heavy."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ldm.core.errors import MedSoftError

program: str | None = None  # what usage lines name instead of the script's file: "medsoft train"
DONE, FAILED, USAGE, SOME_REJECTED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM, so that ``finally`` blocks run before the command exits with 143."""


def parser(description: str | None, raw: bool = False) -> argparse.ArgumentParser:
    """An argument parser with the flags that every command understands.

    ``--help`` adds the default to every flag; with ``raw`` it leaves the description's lines as they are, and the flags
    name their defaults themselves.
    """
    formatter = argparse.RawDescriptionHelpFormatter if raw else argparse.ArgumentDefaultsHelpFormatter
    made = argparse.ArgumentParser(prog=program, description=description, formatter_class=formatter)
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return made


def run(made: argparse.ArgumentParser, main: Callable[[argparse.Namespace], int | None], argv: Any = None) -> NoReturn:
    """Parse the arguments, call ``main`` and leave with the documented exit code.

    0 done; 1 data or I/O error; 2 wrong usage; 3 done but some inputs were rejected; 130 interrupted; 143 terminated.
    Everything a user can cause ends as one line on standard error; ``--debug`` adds the traceback.
    """
    args = made.parse_intermixed_args(argv)  # KEY=VALUE may stand between flags
    # Threads that spin while they wait make two programs on one machine many times slower; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for noisy in ("httpx", "open_clip", "timm", "matplotlib", "lightning", "pytorch_lightning"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    code = _guarded(main, args)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def _guarded(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    try:
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


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated(TERMINATED)
