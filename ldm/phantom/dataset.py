"""Dataset folders of phantoms: every sample folder whole, the record of the arguments last."""

from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_file, sync_folder
from ldm.core.run_folder import RunFolder
from ldm.data.folders import write_sample
from ldm.phantom.spines import (
    BIOMEDCLIP_PAIRS,
    LESION_TYPES,
    SEVERITIES,
    VERSION,
    Phantom,
    biomedclip_pairs,
    check_size,
    plan,
    render_phantom,
)

INDEX_FILE = "phantoms.json"
META = ("sample_id", "patient_id", "lesion_type", "level", "severity", "spacing_mm", "seed")  # of meta.json
TILE = 148  # pixels of a contact sheet; no phantom of the default world is larger


def write_dataset(
    root: str | Path,
    seed: int,
    n_healthy: int,
    n_diseased: int,
    per_patient: int = 1,
    overwrite: bool = False,
    size: int | None = None,
) -> bool:
    """Write a dataset folder of phantoms; returns False when it was already complete.

    ``size``: pixels a side, within SIZES; None for the default world, whose images have 104 to 144.

    An interrupted run is finished by the next one with the same arguments; a process that finds another one at work in
    the folder waits for it. Other arguments, or a folder that is not a phantom dataset, raise UsageError; ``overwrite``
    replaces a phantom dataset (and nothing else).
    """
    arguments = {"version": VERSION, "seed": seed, "healthy": n_healthy, "diseased": n_diseased}
    arguments["per_patient"] = per_patient
    if n_healthy < 0 or n_diseased < 0 or n_healthy + n_diseased == 0 or per_patient < 1 or seed < 0:
        expected = "expected counts of at least 0 (not both 0), per_patient of at least 1, seed of at least 0"
        raise UsageError(f"{root}: {expected}; found {arguments}")
    if size is not None:
        arguments["size"] = check_size(size)
    items = [(seed, *each, size) for each in plan(n_healthy, n_diseased, per_patient)]
    return _write(Path(root), arguments, items, overwrite)


def write_biomedclip_pairs(root: str | Path, overwrite: bool = False) -> bool:
    """Write every image the BiomedCLIP stand-in was trained on as a dataset folder; else as ``write_dataset``."""
    arguments = {"version": VERSION, "biomedclip_pairs": BIOMEDCLIP_PAIRS}
    return _write(Path(root), arguments, list(biomedclip_pairs(BIOMEDCLIP_PAIRS)), overwrite)


def _write(root: Path, arguments: dict[str, int], items: list[tuple], overwrite: bool) -> bool:
    """Render every item (arguments of ``render_phantom``) into ``root``, unless that is done."""
    folder = RunFolder(root, INDEX_FILE, what="phantoms", samples="w*p*_*/meta.json", keys=("fingerprint", "arguments"))
    with folder.lock(wait=True):
        record = folder.open(arguments, overwrite, anew=overwrite)
        if record and record.get("complete"):
            return False
        folder.claim()
        for item in tqdm(items, desc="phantoms", unit="image", disable=None):
            phantom = render_phantom(*item)
            if not folder.has(phantom.sample_id, "meta.json"):
                _write_phantom(root, phantom)
        sync_folder(root)
        folder.finish(images=len(items))
    return True


def _write_phantom(root: Path, phantom: Phantom) -> None:
    meta = {name: getattr(phantom, name) for name in META} | {"synthetic": False}
    files = {"image.png": _png(phantom.image), "anatomy.png": _png(phantom.anatomy)}
    if not phantom.healthy:
        files["mask.png"] = _png(phantom.mask.astype(np.uint8) * 255)
    write_sample(root / phantom.sample_id, files, phantom.prompt, meta)


def _png(array: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not encoded:
        raise MedSoftError("a phantom image could not be encoded as PNG")
    return data.tobytes()


def write_sheet(path: Path, seed: int, columns: int = 9, size: int | None = None) -> None:
    """A PNG: one row of healthy phantoms, one row for each lesion type from subtle (left) to severe (right)."""
    rows, tile = [], TILE if size is None else check_size(size) + TILE - 144
    for row, lesion_type in enumerate((None, *LESION_TYPES)):
        tiles = []
        for column in range(columns):
            severity = SEVERITIES[column * len(SEVERITIES) // columns] if lesion_type else None
            patient = 2 * (row * columns + column) + (lesion_type is not None)
            image = render_phantom(seed, patient, lesion_type, severity, size=size).image
            tiles.append(np.pad(image, [((tile - side) // 2, (tile - side + 1) // 2) for side in image.shape]))
        rows.append(np.hstack(tiles))
    with atomic_file(path) as handle:
        handle.write(cv2.imencode(".png", np.vstack(rows))[1].tobytes())
