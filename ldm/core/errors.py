"""The errors a user may meet, each with the exit code of the command that meets it; and warnings, few of each kind."""

import atexit
import logging
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

SHOWN = 3  # warnings of one kind that are said one by one


class MedSoftError(Exception):
    """Something is wrong with the data, a file or the machine (exit code 1).

    The message is one sentence for the user: which file, key or sample; what was expected; what was found;
    what to do about it. ``ldm.core.cli.run`` prints it without a traceback.
    """

    exit_code = 1

    def cause(self, path: object) -> str:
        """The sentence without ``path`` in front of it."""
        return str(self).removeprefix(f"{path}: ")


class UsageError(MedSoftError):
    """The command was called in a way that cannot work: flags, configuration keys, an existing output (exit code 2)."""

    exit_code = 2


class FileError(MedSoftError):
    """One file cannot be used. ``path`` and ``reason`` are kept apart for the list of rejected samples."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def first_line(error: BaseException) -> str:
    """The first line of the error's text, or its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reading_fault(error: Exception, otherwise: str) -> str:
    """Why a file was not read: ``otherwise`` and the error's text, unless only the memory did not suffice.

    Decoders raise whatever damaged bytes lead to; but nothing is known to be wrong with a file that found no memory.
    """
    what = "there is too little memory for what it says it holds" if isinstance(error, MemoryError) else otherwise
    return f"{what} ({first_line(error)})"


def require(package: str, extra: str) -> None:
    """MedSoftError with the line that installs ``package``, a part of one of our extras, where it is missing."""
    if find_spec(package) is None:
        raise MedSoftError(
            f"the package {package} is not installed; it belongs to the extra {extra}: in the repository's folder "
            f"run python -m pip install -e '.[{extra}]'"
        )


def warn_of_first(log: logging.Logger, lines: Iterable[object], where: object = "", shown: int = SHOWN) -> None:
    """Warn by the first of the lines, then say how many more there are, and ``where`` all of them are listed."""
    lines = list(lines)
    for line in lines[:shown]:
        log.warning("%s", line)
    if len(lines) > shown:
        listed = f"; all are listed in {where}" if where else ""
        log.warning("... and %d more like that%s", len(lines) - shown, listed)


class FewWarnings:
    """Warnings that come one by one, perhaps as many as there are samples: the first are said, the others counted.

    How many there were is said by ``close``, else at the end of the command. ``what``: what they are about, as in
    "prompts that are cut".
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self.log, self.what, self.count = log, what, 0

    def warn(self, text: str) -> None:
        """Warn of one more."""
        with _counting:
            self.count += 1
            count = self.count
        if count <= SHOWN:
            self.log.warning("%s", text)
        elif count == SHOWN + 1:
            if not _unsaid:
                atexit.register(say_the_rest)  # of a program that imports this package; a command says it itself
            _unsaid.append(self)

    def close(self) -> None:
        """Say how many there were, where not each of them was said; the next ones begin anew."""
        if self.count > SHOWN:
            self.log.warning("%s: %d in all, of which the first %d are named above", self.what, self.count, SHOWN)
            if self in _unsaid:  # no copy is
                _unsaid.remove(self)
        self.count = 0


_counting = threading.Lock()  # for all of them: a lock of its own would keep what warns from being copied
_unsaid: list[FewWarnings] = []


def say_the_rest() -> None:
    """Close all warnings that are still being counted."""
    for each in [*_unsaid]:
        each.close()
    atexit.unregister(say_the_rest)
