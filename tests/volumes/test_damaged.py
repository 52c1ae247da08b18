"""Bytes that are wrong anywhere: a file is read, or refused in one line that names it, whatever the libraries raise."""

import random
from pathlib import Path

import made
import numpy as np
import pytest
import SimpleITK as sitk

from ldm.core.errors import MedSoftError
from ldm.volumes.formats import read_volume

SHAPE = (40, 36, 3)


def sound_files(folder: Path) -> list[Path]:
    values, affine = made.marked(SHAPE), made.grid("LPH", SHAPE, (1, 1, 2))
    syntaxes = [name for name in made.SYNTAXES if name != "jpeg_lossless"]  # which takes a process a file
    files = [made.write_series(folder / syntax, values, affine, syntax=syntax)[0] for syntax in syntaxes]
    files.append(made.write_multiframe(folder / "multi.dcm", values, affine))
    files.append(made.write_nifti(folder / "a.nii", values, affine))
    files.append(made.write_nifti(folder / "b.nii.gz", values, affine))
    for name in ("a.mha", "a.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(values.T), str(folder / name), useCompression=name == "a.nrrd")
        files.append(folder / name)
    return files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_are_one_line(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = sound_files(tmp_path)
    outcomes = []
    for number in range(150):
        sound = files[number % len(files)]
        content = bytearray(sound.read_bytes())
        end = len(content) if rng.random() < 0.3 else min(len(content), 2200)  # mostly in the header
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(end)] = rng.choice((0, 255, rng.randrange(256), ord("-")))
        if rng.random() < 0.15:
            del content[rng.randrange(len(content)) :]
        path = tmp_path / "damaged" / f"{number}{''.join(sound.suffixes)}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            outcomes.append(np.isfinite(read_volume(path).affine).all())
        except MedSoftError as error:
            outcomes.append("\n" not in str(error) and str(path) in str(error))
    assert all(outcomes)
    assert len(outcomes) == 150
