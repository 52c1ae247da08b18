"""Sample folders: one image with its mask, prompt and facts."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.files import atomic_folder, write_json, write_text
from ldm.data.images import write_png


def write_sample(
    folder: Path,
    files: Mapping[str, np.ndarray | Path | bytes],
    prompt: str,
    meta: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a sample folder, whole or not at all; one that is there is replaced.

    ``files``: file name -> pixels to write as PNG (uint8 or uint16; HxW, HxWx3 or with alpha), a file to copy,
    or bytes.
    Beside them come ``prompt.txt`` and ``meta.json``. ``tags`` become text tags of ``image.png``, if it is pixels.
    Raises MedSoftError naming what could not be written.
    """
    with atomic_folder(folder) as partial:
        for name, content in files.items():
            if isinstance(content, np.ndarray):
                write_png(partial / name, content, tags if name == "image.png" else None)
            else:
                _write_file(partial / name, content)
        write_text(partial / "prompt.txt", prompt + "\n")
        write_json(partial / "meta.json", dict(meta))


def _write_file(path: Path, content: Path | bytes) -> None:
    """A copy of a file, or bytes, on the disk before the folder gets its name."""
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
