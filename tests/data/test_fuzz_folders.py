"""Dataset folders of every kind through ver_openImagesDatasets.py, compared with what the test itself wrote.

Formats, depths, levels, orientations, names, prompts, meta.json and growing data are drawn at random. Whatever comes:
no traceback; every sample that was written is in the annotation file, among the rejects or left out by rule; and image,
mask, box, prompt and patient are those that were written, each patient on one side, which no later sample changes.
FUZZ_EXAMPLES=1000 in the environment looks longer.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import ver_openImagesDatasets as prepare
from ldm.core.errors import MedSoftError
from ldm.data.images import read_image
from ldm.data.masks import read_mask

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ORIENTATION = 0x0112  # EXIF's tag

# How the stored rows and columns come from the upright ones, by the definition of each EXIF orientation.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: np.swapaxes(upright, 0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(np.swapaxes(upright, 0, 1), 2),
    8: lambda upright: np.rot90(upright, -1),
}

PROMPTS: list[tuple[bytes, str | None]] = [  # the file, and the prompt that it means; None: no sample
    *(
        (text.encode(), text)
        for text in ("lytic lesion", "L\u00e4sion in L3", "\u6eb6\u9aa8\u6027\u75c5\u53d8", "a" * 400)
    ),
    *((text.encode(), "healthy") for text in ("healthy", "Healthy.", '"healthy"', "healthy\u200b", " HEALTHY \r\n")),
    (b"\xef\xbb\xbfhealthy", "healthy"),
    (b"normal", "normal"),
    (b"", None),
    (b" \n", None),
    (b"lytic\nlesion", None),
    (b"\xff\xfeh\0", None),
    (b"h\0e\0a\0", None),
    (b"l\xe4sion", None),
]

METAS: list[tuple[str, str | None, bool]] = [  # the file, the patient that it names, and whether it can be used
    ("{}", None, True),
    ('{"patient_id": " p1 "}', "p1", True),
    ('{"patient_id": 1, "site": "\\u00e9\\ud83d\\ude00"}', "1", True),
    ('{"patient_id": "P1", "lesion_type": "lytic"}', "P1", True),
    ('{"patient_id": "nan", "lesion_type": null}', None, True),
    ('{"patient_id": "", "spacing_mm": [0.5, 1]}', None, True),
    ('{"patient_id": "None", "age": 1e30}', None, True),
    ('{"patient_id": NaN}', None, False),
    ('{"age": Infinity}', None, False),
    ('{"age": 1e999}', None, False),
    ('{"age": ' + "9" * 4400 + "}", None, False),
    ('{"site": "\\ud800"}', None, False),
    ("[" * 5000 + "]" * 5000, None, False),
    ('{"a": ' + '{"a": ' * 80 + "1" + "}" * 81, None, False),
    ('{"patient_id": "a", "patient_id": "b"}', None, False),
    ('{"patient_id": ["a"]}', None, False),
    ('{"patient_id": true}', None, False),
    ('{"spacing_mm": [1, 0]}', None, False),
    ('{"window": [3, 1]}', None, False),
    ('{"synthetic": 1}', None, False),
    ("[]", None, False),
    ("", None, False),
]

NAMES = [
    "a",
    "A",
    "b c",
    "100%",
    "-rf",
    "\u00fc",
    "u\u0308",
    "\u810a\u690e",
    "n" * 255,
    "x\ny",
    "1.2.840.113619.2.55",
    "'\"&<>",
]


@dataclass
class Written:
    """What a folder was filled with, as the test knows it; ``fate``: kept, rejected or left out."""

    fate: str
    image: np.ndarray
    lesion: np.ndarray | None
    prompt: str | None
    patient: str


def save(path: Path, pixels: np.ndarray, orientation: int) -> None:
    """The upright ``pixels`` in a file whose EXIF says how to turn what is stored."""
    stored = np.ascontiguousarray(STORED[orientation](pixels))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"exif": exif} if orientation > 1 else {}
    Image.fromarray(stored).save(path, **options)


@st.composite
def pixels(draw: st.DrawFn) -> tuple[np.ndarray, list[str]]:
    """Upright pixels, HxW or HxWx3, and the suffixes of formats that hold them without loss."""
    height, width = draw(st.integers(5, 9)), draw(st.integers(10, 13))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["grey", "flat", "deep", "shallow deep", "colour"]))
    if kind == "colour":
        return rng.integers(0, 256, (height, width, 3), np.uint8), [".png", ".tif", ".bmp", ".TIFF"]
    if "deep" in kind:
        top = 300 if kind == "shallow deep" else 65536
        return rng.integers(0, top, (height, width), np.uint16), [".png", ".tif", ".PNG"]
    low = 200 if kind == "flat" else 0
    return rng.integers(low, 256, (height, width), np.uint8), [".png", ".tif", ".bmp", ".PNG"]


def write_mask(draw: st.DrawFn, folder: Path, shape: tuple[int, ...], orientation: int) -> tuple[np.ndarray, str]:
    """A mask and its region; "empty" and "size" are faults."""
    kind = draw(st.sampled_from(["255", "1", "colour", "soft", "empty", "size"]))
    height, width = shape[:2]
    region = np.zeros((height, width), bool)
    top, left = draw(st.integers(0, height - 4)), draw(st.integers(0, width - 5))
    region[top : top + draw(st.integers(2, 4)), left : left + draw(st.integers(2, 5))] = kind != "empty"
    levels = region * np.uint8(1 if kind == "1" else 255)
    if kind == "soft":  # a slope over most of the width
        slope = np.interp(np.arange(width), [3, width - 2], [0, 255])
        levels = np.rint(slope).astype(np.uint8)[None].repeat(height, axis=0)
        region = levels >= 127.5
    if kind == "colour":
        levels = np.stack([levels, levels * np.uint8(0), levels * np.uint8(0)], axis=2)
    if kind == "size":
        levels = np.pad(levels, ((0, 1), (0, 0)))
    name = draw(st.sampled_from(["mask.png", "Mask.png", "MASK.TIF", "mask.bmp"]))
    save(folder / name, levels, 1 if name.endswith("bmp") else orientation)
    return region, kind


def write_folder(draw: st.DrawFn, folder: Path, hidden: bool) -> Written:
    """One sample folder with any mixture of sound and faulty files."""
    folder.mkdir(parents=True)
    image, suffixes = draw(pixels())
    suffix = draw(st.sampled_from(suffixes))
    orientation = 1 if suffix == ".bmp" else draw(st.integers(1, 8))
    save(folder / (draw(st.sampled_from(["image", "Image", "IMAGE"])) + suffix), image, orientation)
    text, prompt = draw(st.sampled_from(PROMPTS))
    (folder / draw(st.sampled_from(["prompt.txt", "Prompt.TXT"]))).write_bytes(text)
    faulty = prompt is None
    lesion = None
    if draw(st.integers(0, 9)):
        lesion, kind = write_mask(draw, folder, image.shape, draw(st.integers(1, 8)))
        faulty |= kind == "size" or (kind == "empty" and prompt != "healthy")
    elif prompt != "healthy":
        faulty = True
    patient = None
    synthetic = False
    if draw(st.booleans()):
        content, patient, usable = draw(st.sampled_from(METAS))
        synthetic = usable and draw(st.integers(0, 4)) == 0
        if synthetic:
            key = draw(st.sampled_from(['"synthetic": true', '"parent_id": "s"']))
            content = content[:-1] + (", " if len(content) > 2 else "") + key + "}"
        (folder / "meta.json").write_text(content, encoding="utf-8")
        faulty |= not usable
    fate = "left out" if hidden else "rejected" if faulty else "left out" if synthetic else "kept"
    return Written(fate, image, lesion, prompt, patient or "")


def write_batch(draw: st.DrawFn, root: Path, written: dict[str, Written]) -> None:
    """Up to five more folders below ``root``."""
    for _ in range(draw(st.integers(1, 5))):
        parts = [draw(st.sampled_from(NAMES)) for _ in range(draw(st.integers(1, 3)))]
        hidden = draw(st.integers(0, 9)) == 0
        if hidden:
            parts.insert(draw(st.integers(0, len(parts))), draw(st.sampled_from([".old", "@eaDir", "__MACOSX"])))
        name = "/".join(parts)
        if not (root / name).exists():
            written[name] = write_folder(draw, root / name, hidden)


def compare(record: dict[str, Any], sample: Written, name: str) -> None:
    """A record against what was written."""
    found = read_image(record["image"])
    assert found.dtype == sample.image.dtype
    np.testing.assert_array_equal(found, sample.image)
    assert (record["label"], record["patient_id"]) == (sample.prompt, sample.patient or name)
    assert (record["mask_image"] is None) == (sample.lesion is None)
    box = [0.0, 0.0, 0.0, 0.0]
    if sample.lesion is not None:
        np.testing.assert_array_equal(read_mask(record["mask_image"], found.shape).hard, sample.lesion)
    if sample.lesion is not None and sample.lesion.any():
        rows, columns = np.nonzero(sample.lesion)
        height, width = sample.lesion.shape
        box = [columns.min() / width, rows.min() / height]
        box += [(np.ptp(columns) + 1) / width, (np.ptp(rows) + 1) / height]
    np.testing.assert_allclose(record["box"], box, atol=1e-12)


def check(folder: Path, written: dict[str, Written], kept: dict[str, str], seed: int) -> dict[str, str]:
    """Prepare, and compare all that was written; the sides of the patients."""
    flags = ["--root_dir", folder / "data", "--output_file", folder / "o.json", "--seed", seed]
    fates = {fate: {n for n, s in written.items() if s.fate == fate} for fate in ("kept", "rejected", "left out")}
    try:
        code = prepare.main(prepare.build_parser().parse_args([str(flag) for flag in flags]))
    except MedSoftError:
        assert not fates["kept"]
        return kept
    assert code == (3 if fates["rejected"] else 0)
    records = {record["sample_id"]: record for record in json.loads((folder / "o.json").read_text("utf-8"))}
    assert set(records) == fates["kept"]
    rejects = folder / "o_rejects.json"
    rejected = {row["sample_id"] for row in json.loads(rejects.read_text("utf-8"))} if rejects.exists() else set()
    assert rejected == fates["rejected"]
    for name, record in records.items():
        compare(record, written[name], name)
    sides: dict[str, str] = {}
    members = []
    for side in ("train", "val", "test"):
        for record in json.loads((folder / f"o_{side}.json").read_text("utf-8")):
            assert sides.setdefault(record["patient_id"], side) == side
            members.append(record["sample_id"])
            assert all(records[members[-1]][key] == record[key] for key in ("image", "label", "box", "patient_id"))
    assert sorted(members) == sorted(records)
    assert {name: sides.get(name, side) for name, side in kept.items()} == kept
    return sides


@FUZZ
@given(st.data())
def test_nothing_of_a_folder_is_silently_wrong(data: st.DataObject) -> None:
    written: dict[str, Written] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, kept = Path(name), {}
        seed = data.draw(st.integers(0, 2))
        for _ in range(data.draw(st.integers(1, 3))):
            write_batch(data.draw, folder / "data", written)
            kept = check(folder, written, kept, seed)
