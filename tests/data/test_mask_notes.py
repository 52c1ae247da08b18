"""What preparation says of single files that it accepts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import call

import ver_openImagesDatasets
from ldm.data.annotations import load_samples


def test_preparation_names_noise_stray_parts_and_orientations(
    tmp_path: Path, write_sample: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[20:60, 30:70] = 255
    image = np.random.default_rng(0).integers(0, 256, mask.shape, dtype=np.uint8)
    for number in range(3):
        write_sample(tmp_path / "data" / f"sound{number}", image=image // (2 + number), mask=mask)
    stray = mask.copy()
    stray[95, 5] = 255
    write_sample(tmp_path / "data" / "stray", image=image, mask=stray)
    noisy = write_sample(tmp_path / "data" / "noisy", image=image + 1, mask=None)
    Image.fromarray(mask).save(noisy / "mask.jpg", quality=60)
    turned = write_sample(tmp_path / "data" / "turned", image=None, mask=mask)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image + 2).save(turned / "image.jpg", exif=exif, quality=98)
    output = tmp_path / "a.json"
    assert call(ver_openImagesDatasets, "--root_dir", tmp_path / "data", "--output_file", output) == 0
    assert "noisy: its mask has compression noise or a rim from resampling" in caplog.text
    assert "stray: its mask has a part that is tiny, or far from the largest one" in caplog.text
    assert "turned: its image, mask and label map have different EXIF orientations" in caplog.text
    assert "sound" not in caplog.text
    assert len(load_samples(output)[0]) == 6
