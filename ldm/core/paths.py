"""Where the files that come with the code lie: models/, configs/, the phantom base and the scripts; and its version.

In a checkout that is its root. The wheel holds the same tree in a folder of the package.
"""

import os
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ldm.core.errors import MedSoftError

_PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = (_PACKAGE / "shipped").is_dir()
SHIPPED = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parent

# Relative paths of plans and studies begin here: at the checkout's root, wherever the runner is called from; without a
# checkout, at the working directory.
ROOT = Path.cwd() if INSTALLED else SHIPPED


def software_version() -> str:
    """The installed version of this package; ``unknown`` in a checkout that is not installed."""
    try:
        return version("medsoft-diffusion")
    except PackageNotFoundError:
        return "unknown"


def shipped(path: Path | str) -> Path:
    """``path``, or the shipped file or folder of that name where the working directory has none.

    So ``models/phantom.yaml`` and ``configs/demo.yaml`` can be named from anywhere.
    """
    path = Path(path)
    return SHIPPED / path if not path.exists() and (SHIPPED / path).exists() else path


def confined(folder: Path, name: str) -> Path:
    """``folder / name``, for a ``name`` that a file gave: a sample_id, a parent_id, a file of a dataset.

    Raises MedSoftError unless that lies below ``folder``, links followed: an absolute name, one with ``..`` or one that
    is a link may lead out of it, and writing there would replace what is not ours.
    """
    path, root = folder / name, folder.resolve()
    if "\0" in name or root not in path.resolve().parents:
        raise MedSoftError(f"{name!r}: leads out of {folder}; expected the name of something inside that folder")
    return path


def walk(top: Path, leave_out: Collection[Path] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from ``top`` on, in the order of their names, with the sorted names of its files.

    Links to folders are followed, but no folder is met twice, and none that lies in ``top`` or above it by a link.
    Hidden folders, and those of ``leave_out`` (resolved), are left out.
    """
    root = top.resolve()
    seen = {*leave_out}

    def is_new(folder: Path) -> bool:
        """Whether a folder is met for the first time; from then on it is not."""
        real = folder.resolve()
        if real in seen or (folder.is_symlink() and (real.is_relative_to(root) or root.is_relative_to(real))):
            return False
        seen.add(real)
        return True

    for place, folders, files in os.walk(top, followlinks=True):
        folders[:] = [name for name in sorted(folders) if name[0] != "." and is_new(Path(place, name))]
        yield Path(place), sorted(files)
