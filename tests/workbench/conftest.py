"""One editor for all tests of its routes; 16 bits to draw on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from editing import Page, started
from tiny import CLIP, PHANTOM, Small

from ldm.data.png import write_png
from ldm.workbench.options import EditOptions


@pytest.fixture(scope="session")
def model(small: Small) -> EditOptions:
    words = [*small.sizes, f"biomedclip.path={CLIP}", "sampling.steps=2"]
    return EditOptions(ckpt=small.last, config=PHANTOM, overrides=words, device="cpu")


@pytest.fixture(scope="session")
def page(model: EditOptions, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    editor = started(model, tmp_path_factory.mktemp("edit") / "edited", path=world)
    yield Page(editor)
    editor.queue.close()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A 16-bit image without anything beside it."""
    pixels = np.random.default_rng(0).integers(0, 60000, (40, 48)).astype(np.uint16)
    write_png(tmp_path / "deep.png", pixels)
    return tmp_path / "deep.png"
