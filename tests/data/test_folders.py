"""ldm/data/folders.py: sample folders appear whole, with every kind of file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples
from ldm.data.folders import write_sample
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
