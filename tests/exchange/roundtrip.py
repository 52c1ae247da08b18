"""A slice as the import writes it with its private mapping, and a result on it as dataset_infer.py writes it.

The drawing itself is faked: noise in the soft mask, through the project's own composite and writer of results.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from tiny import call

from ldm.config import DataConfig
from ldm.core.files import Contents
from ldm.data.checks import TRAINED_ON
from ldm.data.folders import read_sample, write_sample
from ldm.data.images import composite, read_image
from ldm.data.preparation import PreparedSample, prepare
from ldm.exchange.privacy import Pseudonyms, read_key
from ldm.inference.results import FolderResults, result_of
from ldm.inference.tasks import Task
from ldm.volumes.dicom import find_series, read_series
from ldm.volumes.intensity import levels_of
from ldm.volumes.volume import Slice, Volume, cut, square
from tool import export_dicom

PROMPT = "large osteolytic lesion of the L3 vertebra"


@dataclass
class World:
    """``data`` (imported samples), ``data.private``, ``results`` and ``exported`` below one folder."""

    root: Path
    mapping: dict[str, Any] = field(default_factory=lambda: {"series": {}, "instances": {}, "patients": {}})

    @property
    def private(self) -> Path:
        return self.root / "data.private"

    @property
    def out(self) -> Path:
        return self.root / "exported"

    def import_slice(
        self,
        volume: Volume,
        plane: str,
        index: int,
        paths: Sequence[Path],
        *,
        frames: Sequence[int] | None = None,
        mm_per_pixel: float | None = None,
        kind: str = "dicom",
        prompt: str = PROMPT,
        **more: Any,
    ) -> Slice:
        """Write the sample ``case/PLANE_INDEX`` with a lesion; ``paths``: the file of each stored frame."""
        self.private.mkdir(exist_ok=True)
        pseudonyms = Pseudonyms(read_key(self.private / "key"))
        image = square(cut(volume, plane, index), mm_per_pixel)
        levels = levels_of(volume)
        pixels = levels.pixels(image.pixels)
        series = pseudonyms.digest("series", str(paths[0]))
        patient, origin = pseudonyms.patient("P-4711"), volume.affine[:3, 3]
        affine = image.affine.copy()
        affine[:3, 3] -= origin
        meta: dict[str, Any] = {"patient_id": patient, "level": "L3", "modality": volume.modality, "plane": plane}
        meta |= {"slice": index, "acquired": image.acquired, "affine": affine.tolist(), "series": series}
        meta |= {"value_offset": levels.value_offset, "value_scale": levels.value_scale, "unit": volume.unit}
        meta |= {"spacing_mm": image.spacing and list(image.spacing)}
        self.mapping["series"][series] = {
            "series_uid": pydicom.dcmread(paths[0]).get("SeriesInstanceUID") if kind == "dicom" else None,
            "study_uid": None if kind == "nifti" else "1.2.3",
            "patient_id": "P-4711",
            "patient": patient,
            "kind": kind,
            "paths": list(map(str, paths)),
            "origin": origin.tolist(),
        }
        if image.acquired and kind == "dicom":
            assert image.frame is not None
            path, number = paths[image.frame], frames[image.frame] if frames else None
            header = pydicom.dcmread(path, stop_before_pixels=True)
            uid = str(header.get("SOPInstanceUID") or header.file_meta.MediaStorageSOPInstanceUID)
            digest = pseudonyms.digest("instance", uid if number is None else f"{uid}#{number}")
            self.mapping["instances"][digest] = {"sop_uid": uid, "path": str(path), "frame": number}
            meta |= {"turn": list(image.turn), "instance": digest}
        (self.private / "mapping.json").write_text(json.dumps(self.mapping))
        files: dict[str, Any] = {"image.png": pixels, "mask.png": lesion_in(pixels.shape)}
        known = {key: value for key, value in (meta | more).items() if value is not None}
        write_sample(self.root / "data" / "case" / f"{plane}_{index:03d}", files, prompt, known)
        return image

    def inpaint(self, name: str, variant: int = 0) -> PreparedSample:
        """Write the result on a sample into ``results`` under ``NAME__vK``; returns what was drawn on."""
        sample = read_sample(name, self.root / "data" / name)
        prepared = prepare(sample, DataConfig(feather=6, feather_unit="pixels"), 0, 0)
        noise = np.random.default_rng(variant).random(prepared.original.shape)
        pixels = composite(prepared.original, noise, prepared.soft, prepared.intensity_range)
        assert (pixels != prepared.original).any()
        provenance = {"checkpoint": "last.ckpt", "config": "phantom.yaml", TRAINED_ON: []}
        task = Task(sample, variant, sample.prompt, 0, sample, fixed_mask=True)
        results = FolderResults(self.root / "results")
        results.write(result_of(results.path, task, prepared, pixels, provenance, Contents()))
        return prepared

    def round_trip(self, path: Path, plane: str, index: int, *more: Any) -> tuple[Path, Path, np.ndarray]:
        """Read, cut, inpaint and export one slice: the source's file, the result's exported folder, its soft mask."""
        volume = read(path)
        paths, frames = (volume.source[key] for key in ("paths", "frames"))
        name = self.import_and_inpaint(volume, plane, index, [Path(path) for path in paths], frames=frames)
        assert self.export(*more) == 0
        soft = read_image(self.root / "results" / name / "soft_mask.png")
        return Path(paths[cut(volume, plane, index).frame or 0]), self.out / name, soft

    def import_and_inpaint(self, volume: Volume, plane: str, index: int, paths: Sequence[Path], **given: Any) -> str:
        """Both; returns the result's name."""
        self.import_slice(volume, plane, index, paths, **given)
        self.inpaint(f"case/{plane}_{index:03d}")
        return f"case/{plane}_{index:03d}__v0"

    def export(self, *more: Any) -> int:
        return call(export_dicom, self.root / "results", "--private", self.private, "--output_dir", self.out, *more)


def read(path: Path) -> Volume:
    """The one series in a folder or file, by the project's reader."""
    series, rejects = find_series(path)
    assert not rejects
    (only,) = series
    return read_series(only)


def lesion_in(shape: tuple[int, int]) -> np.ndarray:
    """A lesion that is not in the middle, so that no turn and no flip maps it onto itself."""
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 3 : shape[0] // 3 + 6, shape[1] // 2 : shape[1] // 2 + 9] = 255
    return mask


def volume_of(values: np.ndarray, affine: np.ndarray, acquired: str | None, **more: Any) -> Volume:
    """What the readers make of a series with these stored values."""
    given = {"offset": -1024.0, "scale": 1.0, "modality": "CT", "unit": "HU"} | more
    return Volume(values, affine, acquired=acquired, name="made", **given)
