"""One process at a time: advisory file locks that the kernel gives up when their holder dies, however it dies."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.core.errors import MedSoftError, UsageError

log = logging.getLogger(__name__)


@contextmanager
def exclusive(path: str | Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` for the block and remove it afterwards.

    When another process holds it: UsageError ``busy``, or with ``wait`` the text is logged and the lock awaited. On a
    file system without locks the block runs unprotected, with a warning.
    """
    path = Path(path)
    descriptor = _acquire(path, busy, wait)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock is given up: whoever waits notices and starts anew
            os.close(descriptor)


def _acquire(path: Path, busy: str, wait: bool) -> int | None:
    """The locked descriptor of ``path``, or None where files cannot be locked."""
    said = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise MedSoftError(f"{path}: could not be created ({error.strerror or error})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                os.close(descriptor)
                raise UsageError(busy) from error
            if not said:
                log.info("%s", busy)
                said = True
            _wait(descriptor)
        except OSError as error:
            os.close(descriptor)
            log.warning("%s: cannot be locked here (%s); start nothing else in this folder", path, error.strerror)
            return None
        if _still_there(path, descriptor):
            return descriptor
        os.close(descriptor)


def _wait(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise


def _still_there(path: Path, descriptor: int) -> bool:
    """False if the holder before us has removed the file that we have just locked."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
