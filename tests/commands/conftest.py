"""Folders of phantoms to evaluate; nothing is written into them."""

import shutil
from pathlib import Path

import pytest
from evaluations import diseased

from ldm.phantom.dataset import write_dataset


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 diseased phantoms, and some healthy ones that must not matter."""
    folder = tmp_path_factory.mktemp("real") / "data"
    write_dataset(folder, 11, 3, 30)
    return folder


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 phantoms of another world, in the place of synthetic pictures."""
    folder = tmp_path_factory.mktemp("honest") / "pictures"
    write_dataset(folder, 12, 2, 40)
    return folder


@pytest.fixture(scope="session")
def few(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of them: too few for the intervals of distances, which take time, where no test reads these."""
    folder = tmp_path_factory.mktemp("few") / "pictures"
    for sample in diseased(honest)[:3]:
        shutil.copytree(sample, folder / sample.name)
    return folder
