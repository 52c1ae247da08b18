"""One process at a time: lock files that the kernel gives up when their holder dies, however it dies."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ldm.core.errors import MedSoftError, UsageError

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what flock says on file systems that have no locks


@contextmanager
def exclusive(path: str | Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; the file stays, since others may be waiting for it.

    When another process holds it: UsageError ``busy``, or with ``wait`` the text is logged and the lock awaited. On a
    file system without locks a file that must not exist yet stands for the lock, with a warning: a killed process
    leaves it behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(FileLock(path), busy, wait)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise MedSoftError(f"{path}: could not be created ({error.strerror or error})") from error
        soft = path.with_name(f"{path.name}.soft")
        log.warning("%s: cannot be locked here; %s stands for it", path, soft.name)
        lock = _acquired(SoftFileLock(soft), f"{busy} (if there is none, delete {soft})", wait)
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: BaseFileLock, busy: str, wait: bool) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise UsageError(busy) from error
        log.info("%s", busy)
        lock.acquire(timeout=-1)
    return lock
