"""What several tests need: the repository root on the path, and a writer of sample folders."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.images import write_png


@pytest.fixture
def write_sample() -> Callable[..., Path]:
    """``write_sample(folder, prompt="...", image=..., mask=..., meta={...})`` writes one valid sample folder.

    ``None`` for image, mask or prompt leaves that file out; by default a 24 x 20 grey image with a small lesion.
    """

    def write(folder: Path, prompt: str | None = "lytic lesion", **given: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(len(str(folder))).integers(0, 256, (20, 24), dtype=np.uint8)
        mask = np.zeros((20, 24), np.uint8)
        mask[5:10, 8:16] = 255
        for name, pixels in ({"image": image, "mask": mask} | given).items():
            if name != "meta" and pixels is not None:
                write_png(folder / f"{name}.png", pixels)
        if prompt is not None:
            (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
        if "meta" in given:
            (folder / "meta.json").write_text(json.dumps(given["meta"]), encoding="utf-8")
        return folder

    return write
