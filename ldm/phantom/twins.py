"""The oracle: for healthy phantoms their own diseased twins, the best that any generator could draw into them.

A twin is the same image of the same patient with a true lesion. It is written as a synthetic sample of its healthy
parent, in the layout that the classifier takes as ``synthetic``.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id, fingerprint, read_json, sync_folder
from ldm.data.annotations import load_samples, write_rejects
from ldm.data.checks import TRAINED_ON
from ldm.data.folders import write_sample
from ldm.data.images import read_image
from ldm.data.samples import Reject, Sample
from ldm.phantom.dataset import INDEX_FILE, phantom_folder
from ldm.phantom.spines import VERSION, Phantom, render_phantom, turn
from ldm.phantom.worlds import STANDARD, WORLDS, named

_NAME = re.compile(r"w(\d+)p(\d{6,})_(?:T1[0-2]|L[1-5])(?:_(\d+))?")
_ROUNDING = 1  # levels by which another processor may render a pixel otherwise


@dataclass(frozen=True)
class Twin:
    """A twin to render: its healthy parent, the arguments of ``render_phantom`` that gave it, and the lesion."""

    parent: Sample
    seed: int
    index: int
    image: int
    size: int | None
    world: str
    lesion_type: str
    severity: str

    @property
    def name(self) -> str:
        """The twin's folder, called as that of a first result of ``dataset_infer.py``."""
        return f"{self.parent.sample_id}__v0"

    def render(self, healthy: bool = False) -> Phantom:
        """The twin, or its ``healthy`` parent."""
        kind, severity = (None, None) if healthy else (self.lesion_type, self.severity)
        return render_phantom(self.seed, self.index, kind, severity, self.image, self.size, self.world)


def write_twins(source: Path, root: Path, limit: int | None, overwrite: bool) -> tuple[bool, int, list[Reject]]:
    """Write the twins of the first ``limit`` healthy phantoms of a folder or annotation file ``source`` into ``root``.

    Types and severities take turns, as in the diseased patients; in a world of signs a twin has the type of its
    patient's sign. Returns whether anything was left to do, how many twins there are, and the samples without one.
    Raises MedSoftError, before anything is written, unless all healthy samples are phantoms of this version whose
    dataset's record is there; a sample whose image is not the phantom of its name is a reject.
    """
    twins, rejects = plan_twins(source, limit)
    for twin in twins:
        if twin.parent.image.resolve().is_relative_to(root.resolve()):
            raise UsageError(f"--output_dir {root}: holds {twin.parent.image}, which is to have a twin; give another")
    folders = {source, *(twin.parent.image.parent.parent for twin in twins)}
    if inside := next((folder for folder in sorted(folders) if root.resolve().is_relative_to(folder.resolve())), None):
        text = f"--output_dir {root}: lies in {inside}, whose samples the twins would be among; give another"
        raise UsageError(text)
    parents = [[t.parent.sample_id, content_id(t.parent.image), t.lesion_type, t.severity] for t in twins]
    arguments = {"version": VERSION, "twins": len(twins), "parents": fingerprint(parents)}
    worlds = sorted({twin.world for twin in twins})
    folder = phantom_folder(root)
    folder.own = ("rejects.json",)
    with folder.lock(wait=True):
        record = folder.open(arguments | named(" ".join(worlds)), overwrite, anew=overwrite)
        if record and record.get("complete"):
            return False, record["images"], _stored_rejects(root)
        folder.claim()
        for twin in tqdm(twins, desc="twins", unit="image", disable=None):
            if not folder.has(twin.name, "meta.json") and (reject := _write(twin, root)):
                rejects.append(reject)
        write_rejects(root / "rejects.json", rejects)
        sync_folder(root)
        count = sum(folder.has(twin.name, "meta.json") for twin in twins)
        folder.finish(images=count)
    return True, count, rejects


def _stored_rejects(root: Path) -> list[Reject]:
    path = root / "rejects.json"
    rows = read_json(path) if path.exists() else []
    return [Reject(row["sample_id"], Path(row["file"]), row["reason"]) for row in rows]


def plan_twins(source: Path, limit: int | None) -> tuple[list[Twin], list[Reject]]:
    """The twins of ``source``, in the order of its samples, and the samples that could not be read."""
    samples, rejects = load_samples(source)
    parents = [sample for sample in samples if sample.healthy and not sample.synthetic][:limit]
    if not parents:
        raise MedSoftError(f"{source}: has no healthy phantom, which could have a diseased twin")
    records: dict[Path, dict[str, Any]] = {}
    return [_twin_of(number, parent, records) for number, parent in enumerate(parents)], rejects


def _twin_of(number: int, parent: Sample, records: dict[Path, dict[str, Any]]) -> Twin:
    """The ``number``-th twin; ``records``: what the records of the datasets say that were read already."""
    folder = parent.image.parent
    match = _NAME.fullmatch(folder.name)
    if not match:
        raise MedSoftError(f"{folder}: has no phantom's name; --twins_of takes what tool/make_phantoms.py has written")
    if folder.parent not in records:
        records[folder.parent] = _record_of(folder.parent)
    arguments = records[folder.parent]
    seed, index, image = (int(group or 0) for group in match.groups())
    world = arguments.get("world", STANDARD)
    lesion_type, severity = turn(number, WORLDS[world].lesion_types)
    lesion_type = WORLDS[world].sign_of(seed, index, None) or lesion_type
    return Twin(parent, seed, index, image, arguments.get("size"), world, lesion_type, severity)


def _record_of(folder: Path) -> dict[str, Any]:
    """The arguments with which the phantoms in ``folder`` were made; MedSoftError unless this version made them."""
    path = folder / INDEX_FILE
    if not path.exists():
        raise MedSoftError(f"{path}: does not exist, so nobody knows which world the phantoms beside it are from")
    stored = read_json(path, "record of phantoms")
    arguments = stored.get("arguments") if isinstance(stored, dict) else None
    if not isinstance(arguments, dict) or "version" not in arguments:
        raise MedSoftError(f"{path}: is not the record of a phantom dataset; make the phantoms again")
    if arguments["version"] != VERSION:
        found = f"version {arguments['version']} of the generator made these phantoms, this is version {VERSION}"
        raise MedSoftError(f"{path}: {found}, which would render other images; make them again")
    if arguments.get("world", STANDARD) not in WORLDS:
        raise MedSoftError(f"{path}: names the world {arguments['world']!r}; this version knows {', '.join(WORLDS)}")
    return arguments


def _write(twin: Twin, root: Path) -> Reject | None:
    """Write one twin, or say why not. What differs from the healthy image by the lesion alone is the twin's."""
    parent = twin.parent
    try:
        stored = read_image(parent.image)
    except MedSoftError as error:
        return Reject(parent.sample_id, parent.image, error.cause(parent.image))
    healthy, phantom = twin.render(healthy=True), twin.render()
    if stored.shape != healthy.image.shape or np.abs(stored.astype(int) - healthy.image).max() > _ROUNDING:
        reason = "is not the phantom of this name, as the generator renders it; make the phantoms again"
        return Reject(parent.sample_id, parent.image, reason)
    image = np.where(phantom.image == healthy.image, stored, phantom.image)
    files: dict[str, np.ndarray | Path | bytes] = {
        "image.png": image,
        "anatomy.png": phantom.anatomy,
        "mask.png": phantom.mask.astype(np.uint8) * 255,
    }
    write_sample(root / twin.name, files, phantom.prompt, _metadata(twin, phantom, root))
    return None


def _metadata(twin: Twin, phantom: Phantom, root: Path) -> dict[str, Any]:
    parent = twin.parent
    metadata: dict[str, Any] = {
        "sample_id": twin.name,
        "parent_id": parent.sample_id,
        "patient_id": parent.patient_id,
        "lesion_type": phantom.lesion_type,
        "severity": phantom.severity,
        "level": phantom.level,
        "spacing_mm": phantom.spacing_mm,
        "synthetic": True,
        "method": "twin",
        "seed": twin.seed,
        "variant": 0,
        "prompt": phantom.prompt,
        "parent_image": Path(os.path.relpath(parent.image.resolve(), (root / twin.name).resolve())).as_posix(),
        "parent_sha256": content_id(parent.image),
        TRAINED_ON: [],  # no patient is behind it but the parent's own
    }
    return metadata | ({"sign": phantom.sign} if phantom.sign else {})
