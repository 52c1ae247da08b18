"""One result of dataset_infer.py as DICOM or NIfTI files in a folder of its own."""

import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ldm.core.errors import FileError
from ldm.data.images import dimensions, read_image
from ldm.data.masks import read_mask
from ldm.data.samples import Sample
from ldm.exchange.headers import MAKER
from ldm.exchange.instances import (
    Frame,
    Identity,
    SegmentIdentity,
    check_source,
    lesion_segmentation,
    place,
    read_frame,
    reference_to,
    soft_mask_segmentation,
    synthetic_image,
    write_instance,
)
from ldm.exchange.origins import Origin
from ldm.exchange.privacy import Pseudonyms
from ldm.volumes.dicom_files import open_file

_OF_META = ("modality", "region", "site", "scanner", "plane", "slice", "spacing_mm", "unit")
_HEX = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class ExportedResult:
    """A result to export: where it comes from, and its place in a new series (``series`` names it)."""

    sample: Sample
    origin: Origin
    series: str
    series_number: int
    number: int

    @property
    def name(self) -> str:
        """Its folder."""
        return self.sample.sample_id


def files_of(result: ExportedResult, suffix: str) -> list[str]:
    """The files that stand for a result; one that is healthy has no lesion."""
    names = ("image", "soft_mask") if result.sample.healthy else ("image", "lesion", "soft_mask")
    return [f"{name}{suffix}" for name in names]


def known(result: ExportedResult) -> dict[str, Any]:
    """What is said of a result beside its files, None for what nobody knows."""
    sample = result.sample
    own = {key: getattr(sample, key) for key in ("prompt", "level", "lesion_type", "severity")}
    return own | {key: sample.meta.get(key) for key in _OF_META}


@dataclass(frozen=True, eq=False)
class Pixels:
    """A result's files on one grid: image (H, W) uint8 or uint16, lesion bool, soft float in [0, 1]."""

    image: np.ndarray
    lesion: np.ndarray
    soft: np.ndarray

    def on(self, origin: Origin) -> "Pixels":
        """The same on the grid of the stored frame, where the result has one."""
        if origin.instance is None:
            return self
        return Pixels(*map(origin.instance.turned_back, (self.image, self.lesion, self.soft)))


def read_pixels(sample: Sample) -> Pixels:
    """Read a result; FileError where something is wrong with its files."""
    image = read_image(sample.image)
    if image.ndim != 2:
        raise FileError(sample.image, "is a colour image; expected grey, as the import writes it")
    assert sample.mask is not None  # the plan has seen both
    assert sample.soft_mask is not None
    lesion = read_mask(sample.mask, image.shape).hard
    return Pixels(image, lesion, read_mask(sample.soft_mask, image.shape, soft=True).values)


def write_nifti(folder: Path, result: ExportedResult) -> dict[str, Any]:
    """Write a result as volumes of one slice, in the place that it has in the patient; returns what is said of it.

    Real values as integers where they are some; else pixels with a slope.
    """
    origin, pixels = result.origin, read_pixels(result.sample)
    affine = TO_RAS @ origin.affine
    image, slope, inter = pixels.image, origin.value_scale, origin.value_offset
    if slope == 1 and float(inter).is_integer():
        real = image.astype(np.int32) + int(inter)
        small = real.min() >= -(2**15) and real.max() < 2**15
        image, slope, inter = real.astype(np.int16) if small else real, 1.0, 0.0
    volumes = {"image": image, "soft_mask": pixels.soft.astype(np.float32)}
    if not result.sample.healthy:
        volumes["lesion"] = pixels.lesion.astype(np.uint8)
    for name, values in volumes.items():
        volume = nibabel.Nifti1Image(values[..., None], affine)
        volume.header.set_xyzt_units("mm")
        volume.header.set_slope_inter(*((slope, inter) if name == "image" else (1.0, 0.0)))
        volume.header["descrip"] = f"synthetic, {MAKER}; not for clinical use"
        nibabel.save(volume, folder / f"{name}.nii.gz")
    return {"kind": "slice", "patient": origin.patient, **known(result)}


def write_dicom(
    folder: Path,
    result: ExportedResult,
    pseudonyms: Pseudonyms,
    run: str,
    started: str,
    same_study: bool,
    link_source: bool,
) -> dict[str, Any]:
    """Write a result as a DICOM image and segmentations of its lesion and soft mask; returns what is said of it.

    ``run`` and ``started`` (date and time): those of the export, the same for all its results. FileError if the source
    is not there any more, or is not what the result was made from.
    """
    sample, origin = result.sample, result.origin
    pixels = read_pixels(sample).on(origin)
    frame, stored = _as_stored(result, pixels)
    names = _Names(pseudonyms, run, result)
    sources = [origin.instance.path] if origin.instance else origin.paths
    linked = sources if link_source else []
    identity = names.identity(frame, started, same_study, tuple(map(_reference, linked)))
    how = f"A lesion was inpainted by {MAKER} inside the soft mask; prompt: {sample.prompt}"
    how = how if origin.instance else f"A {origin.place[0]} slice was reformatted from its series. {how}"
    image = synthetic_image(frame, stored, identity, how)
    if origin.instance is None:
        place(image, origin.affine)
    write_instance(folder / "image.dcm", image)
    back = read_frame(folder / "image.dcm", None if frame.number is None else 1)
    if not np.array_equal(back.values, stored):  # what is promised of the values is seen in the file
        raise FileError(folder / "image.dcm", "its stored values cannot be read back")
    masks = {"soft_mask": soft_mask_segmentation(image, pixels.soft, names.segment("soft_mask", 2))}
    if not sample.healthy:
        segment = names.segment("lesion", 1)
        masks["lesion"] = lesion_segmentation(image, pixels.lesion, sample.prompt, sample.level, segment)
    for name, mask in masks.items():
        write_instance(folder / f"{name}.dcm", mask)
    return {
        "kind": "slice" if origin.instance is None else "frame",
        "patient": str(image.PatientID) if not same_study else origin.patient,
        **known(result),
        "study": None if same_study else identity.study,
        "series": identity.series,
        "instance": identity.instance,
        "changed_values": int(np.count_nonzero(stored != frame.values)) if origin.instance else None,
    }


def _as_stored(result: ExportedResult, pixels: Pixels) -> tuple[Frame, np.ndarray]:
    """The frame in whose place a result is stored, or one of its series, and the result's stored values (HxW)."""
    origin, path = result.origin, result.sample.image
    if origin.instance is None:
        frame = _template(origin.paths[0], origin.series_uid)
        return frame, derived_values(frame, pixels, origin, path)
    frame = read_frame(origin.instance.path, origin.instance.frame)
    check_source(frame, origin.instance.path, origin.instance.sop_uid)
    return frame, changed_values(frame, pixels, origin, path)


def changed_values(frame: Frame, pixels: Pixels, origin: Origin, path: Path) -> np.ndarray:
    """The stored values of ``frame`` (HxW) with those of a result where it differs from it inside the soft mask.

    Padding stays padding. FileError for ``path`` if the result is not one of this frame.
    """
    if pixels.image.shape != frame.values.shape:
        reason = (
            f"has {dimensions(pixels.image)} pixels on the grid of its source, which has {dimensions(frame.values)}"
        )
        raise FileError(path, reason)
    expected = np.rint((frame.real - origin.value_offset) / origin.value_scale)
    differs = (pixels.image != expected) & ~frame.padded
    inside = pixels.soft > 0
    if count := np.count_nonzero(differs & ~inside):
        raise FileError(
            path,
            f"{count} of its pixels outside the soft mask are not those of its source; the image, its meta.json or the "
            "source has changed since the import",
        )
    stored = frame.values.copy()
    change = differs & inside
    stored[change] = frame.stored(origin.real(pixels.image[change]))
    return stored


def derived_values(frame: Frame, pixels: Pixels, origin: Origin, path: Path) -> np.ndarray:
    """Stored values (HxW) for a whole slice, as ``frame`` (any one of its series) stores them.

    FileError for ``path`` if the slice holds values that the series cannot store.
    """
    real = origin.real(pixels.image)
    stored = np.where(pixels.soft > 0, frame.stored(real), frame.stored(real, padding=True))
    outside = np.abs(frame.meanings[stored - frame.levels[0]] - real)[pixels.soft == 0]
    if outside.size and outside.max() > 0.501 * abs(origin.value_scale):
        raise FileError(path, f"its values cannot be stored as its series stores them (off by up to {outside.max():g})")
    return stored


@cache
def _template(path: Path, series_uid: str | None) -> Frame:
    """A frame of a series, for the header of slices that are none; FileError if the file is of another series now."""
    header = open_file(path, pixels=False)
    if (header.get("SeriesInstanceUID") or series_uid) != series_uid:
        raise FileError(path, "is of another series than the one that was imported from there; put that one back")
    return read_frame(path, 1 if "NumberOfFrames" in header else None)


@cache
def _reference(path: Path) -> tuple[str, str]:
    return reference_to(open_file(path, pixels=False))


@dataclass(frozen=True)
class _Names:
    """Identifiers that follow from the private key, the run and the result, so that a second export writes the same."""

    pseudonyms: Pseudonyms
    run: str
    result: ExportedResult

    def uid(self, *names: str) -> str:
        digest = self.pseudonyms.digest("uid", "\x1f".join(names), 32)
        return f"2.25.{uuid.UUID(int=int(digest.translate(_HEX), 16), version=4).int}"

    def identity(self, frame: Frame, started: str, same_study: bool, sources: tuple) -> Identity:
        result, origin = self.result, self.result.origin
        date, time = started.split(" ")
        reference = str(frame.dataset.get("FrameOfReferenceUID") or origin.series)
        kind = "synthetic lesions" if origin.instance else f"synthetic lesions, {origin.place[0]} slices"
        return Identity(
            patient=f"SYN-{origin.patient.removeprefix('p_')}",
            study=self.uid("study", origin.study_uid or origin.series),
            series=self.uid("series", self.run, result.series),
            instance=self.uid("instance", self.run, result.name, "image"),
            frame_of_reference=self.uid("frame of reference", reference),
            series_number=result.series_number,
            number=result.number,
            date=date,
            time=time,
            description=kind,
            same_study=same_study,
            sources=sources,
        )

    def segment(self, kind: str, step: int) -> SegmentIdentity:
        return SegmentIdentity(
            self.uid("series", self.run, self.result.series, kind),
            self.uid("instance", self.run, self.result.name, kind),
            self.result.series_number + step,
            self.result.number,
        )
