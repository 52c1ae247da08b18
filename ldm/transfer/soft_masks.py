"""Soft masks for a dataset (see ``tool/make_soft_masks.py``): the same samples with new masks, as a dataset folder."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.config import FeatherUnit
from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import fingerprint, named_seed, read_json
from ldm.core.run_folder import RunFolder
from ldm.core.tables import counted
from ldm.data.annotations import load_samples, write_rejects
from ldm.data.folders import write_sample
from ldm.data.images import read_image
from ldm.data.masks import Feather, Mask, box_region, lesion_shaped, read_anatomy, read_mask, region_for, soft_mask_for
from ldm.data.preparation import described_identity, sample_identity
from ldm.data.samples import META_TEXTS, Reject, Sample, is_box

log = logging.getLogger(__name__)

Boxes = Mapping[str, Sequence[Sequence[float]]]  # sample_id -> boxes [x, y, w, h], fractions of the image


@dataclass(frozen=True)
class SoftMaskOptions:
    """Where masks come from and what their borders are like: the flags of the command, under their names."""

    source: str  # mask, anatomy, box or lesion
    labels: Sequence[int]  # of anatomy.png, for source anatomy
    boxes: Path | None  # for source box; None: the annotation's own
    feather: float
    feather_unit: FeatherUnit
    size: tuple[float, float]  # diameters of lesion-shaped masks, relative to the vertebra's smaller side
    side: str | None  # the half of the vertebra they lie in
    irregularity: float | None  # 0, an ellipse, to 1
    seed: int

    def __post_init__(self) -> None:
        if self.boxes and self.source != "box":
            raise UsageError(f"--boxes goes with --source box, not with --source {self.source}")
        if not 0 < self.size[0] <= self.size[1] <= 1:
            raise UsageError(f"--size: expected two rising numbers above 0, at most 1, found {list(self.size)}")


def make_soft_masks(data: Path, output_dir: Path, options: SoftMaskOptions, overwrite: bool) -> int:
    """Write every sample of ``data`` with its soft mask into ``output_dir``; returns the exit code.

    The same command again finishes what is missing; a process that finds another one at work in the folder waits for
    it. Raises UsageError for paths that contradict each other and for a folder of other masks (unless ``overwrite``).
    """
    _check_paths(data, output_dir)
    boxes = read_boxes(options.boxes) if options.boxes else {}
    samples, rejects = load_samples(data)
    unknown = sorted(set(boxes) - {sample.sample_id for sample in samples})
    if unknown:
        raise MedSoftError(f"{options.boxes}: {unknown[0]!r} is no sample of {data}")
    flags = {"data": data, **dataclasses.asdict(options)}
    identities = [sample_identity(sample) for sample in samples]
    content = fingerprint([described_identity(sample) for sample in samples])
    settings = {**flags, "content_of_boxes": fingerprint(boxes), "content_of_data": content}
    folder = RunFolder(output_dir, "soft_masks.json", what="masks", own=("rejects.json",), samples="soft_mask.png")
    with folder.lock(wait=True):
        record = folder.open(settings, overwrite, legacy=fingerprint([flags, boxes, identities]))
        if record and record["complete"] and _written(folder, samples) == record["masks"]:
            log.info("%s: already complete (%s)", output_dir, counted(record["masks"], "soft mask"))
            return cli.SOME_REJECTED if record["rejected"] else cli.DONE
        folder.claim()
        rejects += _write_missing(folder, samples, options, boxes)
        write_rejects(output_dir / "rejects.json", rejects)
        written = _written(folder, samples)
        if not written:
            raise MedSoftError(f"{data}: no mask could be made; first: {rejects[0]}")
        folder.finish(masks=written, rejected=len(rejects), source=options.source)
    log.info("%s: %s", output_dir, counted(written, "soft mask"))
    if rejects:
        log.warning("%s rejected, listed in %s", counted(len(rejects), "sample"), output_dir / "rejects.json")
    return cli.SOME_REJECTED if rejects else cli.DONE


def _check_paths(data: Path, output_dir: Path) -> None:
    if not data.exists():
        raise UsageError(f"--data {data}: does not exist")
    source, output = data.resolve(), output_dir.resolve()
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise UsageError(f"--output_dir {output_dir}: lies inside --data or holds it; give another folder")


def _written(folder: RunFolder, samples: Sequence[Sample]) -> int:
    return sum(folder.has(sample.sample_id, "soft_mask.png") for sample in samples)


def _write_missing(
    folder: RunFolder, samples: Sequence[Sample], options: SoftMaskOptions, boxes: Boxes
) -> list[Reject]:
    """Write the samples that are not there yet; returns those that have nothing to make a mask from."""
    feather = Feather(options.feather, options.feather_unit)
    rejects = []
    for sample in tqdm(samples, "soft masks", unit=" samples"):
        if folder.has(sample.sample_id, "soft_mask.png"):
            continue
        try:
            mask = mask_of(sample, read_image(sample.image).shape, options, boxes)
            soft = soft_mask_for(mask, feather, sample.meta.get("spacing_mm"))
        except MedSoftError as error:
            rejects.append(Reject(sample.sample_id, sample.image, str(error)))
        else:
            _write(folder.path / sample.sample_id, sample, mask.hard, soft)
    return rejects


def _write(folder: Path, sample: Sample, hard: np.ndarray, soft: np.ndarray) -> None:
    """The sample with its new masks; image and anatomy are copies, meta.json says what is known of the sample."""
    known = {key: getattr(sample, key) for key in META_TEXTS}
    meta = {key: value for key, value in known.items() if value is not None} | sample.meta
    meta |= {"synthetic": True} if sample.synthetic else {}
    originals = {"image": sample.image, "anatomy": sample.anatomy}
    files: dict[str, np.ndarray | Path | bytes] = {
        f"{stem}{file.suffix}": file for stem, file in originals.items() if file is not None
    }
    files["mask.png"] = hard.astype(np.uint8) * 255
    files["soft_mask.png"] = np.rint(soft * 255).astype(np.uint8)
    write_sample(folder, files, sample.prompt, meta)


def mask_of(sample: Sample, shape: tuple[int, ...], options: SoftMaskOptions, boxes: Boxes) -> Mask:
    """The mask to soften, for an image of ``shape``; MedSoftError if the sample has nothing to make it from."""
    if options.source == "lesion":
        vertebra = region_for(sample, shape)
        if vertebra is None:
            raise MedSoftError("neither anatomy.png nor a mask nor a box says where the vertebra is")
        seed = named_seed("soft-mask", options.seed, sample.sample_id)
        hard = lesion_shaped(vertebra, seed, options.size, options.side, options.irregularity)
    elif options.source == "mask":
        if sample.mask is None:
            raise MedSoftError("has no mask")
        own = read_mask(sample.mask, shape)
        if own.soft:
            return own  # used as it is
        hard = own.hard
    elif options.source == "anatomy":
        if sample.anatomy is None:
            raise MedSoftError("has no anatomy.png")
        hard = np.isin(read_anatomy(sample.anatomy, shape), options.labels)
    else:
        hard = np.zeros(shape[:2], bool)
        for box in boxes.get(sample.sample_id, []) if options.boxes else [sample.box]:
            hard |= box_region(box, shape)
    if not hard.any():
        raise MedSoftError(f"nothing is marked by its {options.source}")
    return Mask(hard.astype(np.float32))


def read_boxes(path: Path) -> Boxes:
    """sample_id -> boxes; MedSoftError naming the sample for anything that is not a box inside the image."""
    found = read_json(path, "list of boxes")
    if not isinstance(found, dict) or not found:
        raise MedSoftError(f"{path}: expected a JSON object from sample_id to box, found {type(found).__name__}")
    boxes = {name: value if value and isinstance(value[0], list) else [value] for name, value in found.items()}
    for name, some in boxes.items():
        for box in some:
            if not (is_box(box) and box[2] > 0 and box[3] > 0):
                raise MedSoftError(
                    f"{path}: {name}: {box} is no box inside the image; expected [x, y, w, h] as fractions"
                )
    return boxes
