"""The errors a user may meet, each carrying the exit code of the command that meets it."""

from importlib.util import find_spec
from pathlib import Path


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
