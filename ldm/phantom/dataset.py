"""Dataset folders of phantoms: every sample folder whole, the record of the arguments last."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_file, sync_folder
from ldm.core.run_folder import RunFolder
from ldm.data.folders import write_sample
from ldm.phantom.spines import (
    BIOMEDCLIP_PAIRS,
    SEVERITIES,
    VERSION,
    Phantom,
    biomedclip_pairs,
    check_size,
    plan,
    render_phantom,
)
from ldm.phantom.worlds import STANDARD, named, world_of

INDEX_FILE = "phantoms.json"
META = ("sample_id", "patient_id", "lesion_type", "level", "severity", "spacing_mm", "seed")  # of meta.json
TILE = 148  # pixels of a contact sheet; no phantom of the default world is larger
CAPTION = 22  # pixels of the line above a row of a contact sheet


def write_dataset(
    root: str | Path,
    seed: int,
    n_healthy: int,
    n_diseased: int,
    per_patient: int = 1,
    overwrite: bool = False,
    size: int | None = None,
    world: str = STANDARD,
) -> bool:
    """Write a dataset folder of phantoms; returns False when it was already complete.

    ``size``: pixels a side, within SIZES; None for images of 104 to 144. ``world``: one of WORLDS.

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
        arguments["size"] = check_size(size, world)
    types = world_of(world).lesion_types
    planned = plan(n_healthy, n_diseased, per_patient, types)
    renders = [partial(render_phantom, seed, *each, size, world) for each in planned]
    return _write(Path(root), arguments, renders, overwrite, world)


def write_biomedclip_pairs(root: str | Path, overwrite: bool, world: str) -> bool:
    """Write every image the BiomedCLIP stand-in was trained on as a dataset folder; else as ``write_dataset``."""
    arguments = {"version": VERSION, "biomedclip_pairs": BIOMEDCLIP_PAIRS}
    pairs = biomedclip_pairs(BIOMEDCLIP_PAIRS, world_of(world).lesion_types)
    renders = [partial(render_phantom, *pair, world=world) for pair in pairs]
    return _write(Path(root), arguments, renders, overwrite, world)


def phantom_folder(root: Path) -> RunFolder:
    """The folder of a phantom dataset, or of the twins of one."""
    return RunFolder(root, INDEX_FILE, what="phantoms", samples="w*p*_*/meta.json", keys=("fingerprint", "arguments"))


def _write(
    root: Path, arguments: dict[str, Any], renders: Sequence[Callable[[], Phantom]], overwrite: bool, world: str
) -> bool:
    """Write what all ``renders`` give into ``root``, unless that is done."""
    folder = phantom_folder(root)
    with folder.lock(wait=True):
        record = folder.open(arguments | named(world), overwrite, anew=overwrite)
        if record and record.get("complete"):
            return False
        folder.claim()
        for render in tqdm(renders, desc="phantoms", unit="image", disable=None):
            phantom = render()
            if not folder.has(phantom.sample_id, "meta.json"):
                _write_phantom(root, phantom)
        sync_folder(root)
        folder.finish(images=len(renders))
    return True


def _write_phantom(root: Path, phantom: Phantom) -> None:
    meta = {name: getattr(phantom, name) for name in META} | {"synthetic": False}
    if phantom.sign:
        meta["sign"] = phantom.sign
    files = {"image.png": _png(phantom.image), "anatomy.png": _png(phantom.anatomy)}
    if not phantom.healthy:
        files["mask.png"] = _png(phantom.mask.astype(np.uint8) * 255)
    write_sample(root / phantom.sample_id, files, phantom.prompt, meta)


def _png(array: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not encoded:
        raise MedSoftError("a phantom image could not be encoded as PNG")
    return data.tobytes()


def write_sheet(path: Path, seed: int, size: int | None = None, world: str = STANDARD) -> None:
    """A PNG: one row of healthy phantoms, one row for each lesion type from subtle (left) to severe (right), each under
    a line that says so.

    In another world than the standard one each lesion stands there twice, the second time with the outline of its mask.
    A ``path`` that ends in .jpg becomes a JPEG.
    """
    rows, tile = [], TILE if size is None else check_size(size, world) + TILE - 144
    columns, twice = (9, 1) if world == STANDARD else (6, 2)
    for row, lesion_type in enumerate((None, *world_of(world).lesion_types)):
        tiles = []
        for column in range(columns):
            severity = SEVERITIES[column * len(SEVERITIES) // columns] if lesion_type else None
            shown = column // twice * twice if lesion_type else column
            patient = 2 * (row * columns + shown) + (lesion_type is not None)
            phantom = render_phantom(seed, patient, lesion_type, severity, size=size, world=world)
            image = phantom.image if shown == column else _outlined(phantom)
            tiles.append(np.pad(image, [((tile - side) // 2, (tile - side + 1) // 2) for side in image.shape]))
        rows += [_caption(lesion_type, columns, tile), np.hstack(tiles)]
    suffix = path.suffix if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
    with atomic_file(path) as handle:
        handle.write(cv2.imencode(suffix, np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes())


def _caption(lesion_type: str | None, columns: int, tile: int) -> np.ndarray:
    """What the ``columns`` tiles of a row are, CAPTION x (columns * tile) uint8."""
    line = Image.new("L", (columns * tile, CAPTION))
    pen, font = ImageDraw.Draw(line), ImageFont.load_default(14)
    told = [f"{lesion_type}, {severity}" for severity in SEVERITIES] if lesion_type else ["healthy"]
    for place, text in enumerate(told):
        pen.text((place * (columns // len(SEVERITIES)) * tile + 6, 3), text, 220, font)
    return np.asarray(line)


def _outlined(phantom: Phantom) -> np.ndarray:
    """The image with a white line around what the annotator has marked."""
    around = cv2.dilate(phantom.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.where(around & ~phantom.mask, np.uint8(255), phantom.image)
