"""ldm/data/folders.py: sample folders appear whole, with every kind of file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples
from ldm.data.folders import parent_image, write_sample
from ldm.data.images import read_image


def test_pixels_files_and_bytes_become_one_sample(tmp_path: Path) -> None:
    image = np.arange(20 * 24, dtype=np.uint16).reshape(20, 24)
    mask = np.zeros((20, 24), np.uint8)
    mask[5:9, 6:12] = 255
    Image.fromarray((mask > 0).astype(np.uint8)).save(tmp_path / "labels.png")
    anatomy = (tmp_path / "labels.png").read_bytes()
    folder = tmp_path / "data" / "deep" / "a"
    files = {"image.png": image, "mask.png": mask, "anatomy.png": tmp_path / "labels.png", "note.txt": b"hello"}
    write_sample(folder, files, "a lytic lesion", {"patient_id": "p1"}, {"Comment": "made up"})
    ((sample,), rejects) = load_samples(tmp_path / "data")
    assert (sample.sample_id, sample.prompt, sample.patient_id, rejects) == ("deep/a", "a lytic lesion", "p1", [])
    np.testing.assert_array_equal(read_image(sample.image), image)
    assert Image.open(sample.image).text["Comment"] == "made up"
    assert "Comment" not in Image.open(sample.mask).text
    assert (folder / "anatomy.png").read_bytes() == anatomy
    assert (folder / "note.txt").read_bytes() == b"hello"


def test_a_sample_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    image = np.zeros((8, 8), np.uint8)
    write_sample(tmp_path / "a", {"image.png": image}, "one", {"n": 1})
    with pytest.raises(MedSoftError, match=r"image\.png: expected HxW"):
        write_sample(tmp_path / "a", {"image.png": image.astype(np.float32)}, "two", {"n": 2})
    with pytest.raises(MedSoftError, match=r"a: could not be written .*No such file"):
        write_sample(tmp_path / "a", {"image.png": tmp_path / "gone.png"}, "two", {"n": 2})
    assert json.loads((tmp_path / "a" / "meta.json").read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_results_behind_a_link_find_their_parents(tmp_path: Path) -> None:
    """As where a cluster's scratch disk is linked into the home folder. ``..`` leads on from where they really lie."""
    image, disk = np.arange(64, dtype=np.uint8).reshape(8, 8), tmp_path / "disk"
    write_sample(disk / "data" / "a", {"image.png": image}, "healthy", {})
    meta = {"synthetic": True, "parent_image": "../../data/a/image.png", "parent_sha256": None}
    write_sample(disk / "results" / "a__v0", {"image.png": image}, "healthy", meta)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "results").symlink_to(disk / "results")
    ((sample,), _) = load_samples(tmp_path / "home" / "results")
    assert parent_image(sample) == disk / "data" / "a" / "image.png"
    # Moved away and linked: the data stayed.
    shutil.move(disk / "results", tmp_path / "far")
    (disk / "results").symlink_to(tmp_path / "far")
    ((sample,), _) = load_samples(disk / "results")
    assert parent_image(sample) == disk / "data" / "a" / "image.png"
