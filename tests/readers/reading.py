"""A small world for reader studies: real samples, results, readers whose rates are known. No network."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.png import write_png
from tool import reader_study

KINDS = ("osteolytic", "osteoblastic")
SIDE = 96
TAGS = {"Comment": "synthetic picture drawn by MedSoft-Diffusion"}


def add_sample(folder: Path, kind: str, patient: str, seed: int, deep: bool = False, **meta: Any) -> Path:
    """A sample folder with a lesion of 16 to 22 pixels, and these keys in its meta.json beside the usual ones."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    away = np.hypot(rows - 48, columns - 46)
    inside = away < 8 + seed % 4
    image = rng.normal(110, 12, (SIDE, SIDE)) + inside * (60 if kind == "osteoblastic" else -60)
    pixels = (image.clip(0, 255) * (200 if deep else 1)).astype(np.uint16 if deep else np.uint8)
    write_png(folder / "image.png", pixels, TAGS if meta.get("synthetic") else None)
    write_png(folder / "mask.png", inside.astype(np.uint8) * 255)
    (folder / "prompt.txt").write_text(f"{kind} lesion")
    known = {"patient_id": patient, "lesion_type": kind, "severity": "moderate", "scanner": "A"}
    (folder / "meta.json").write_text(json.dumps(known | meta))
    return folder


def add_result(folder: Path, kind: str, patient: str, seed: int, **meta: Any) -> Path:
    """The same as a result."""
    return add_sample(folder, kind, patient, seed, **{"parent_id": f"{patient}_L3", "synthetic": True} | meta)


def make_world(root: Path, count: int, **more: Any) -> Path:
    """``count`` real samples and as many results, each of a patient of its own; ``more``: of ``add_sample``."""
    for number in range(count):
        kind = KINDS[number % 2]
        add_sample(root / "real" / f"r{number:02d}", kind, f"patient{number}", number, **more)
        add_result(root / "results" / f"h{number:02d}__v0", kind, f"parent{number}", 500 + number, **more)
    (root / "results" / "inference.json").write_text('{"complete": true}')
    return root


def call(*words: Any) -> int:
    """The exit code of tool/reader_study.py, run in this process; an error as ``ldm.core.cli.run`` would get it."""
    return reader_study.main(reader_study.build_parser().parse_intermixed_args([str(word) for word in words]))


def make(root: Path, name: str, *flags: Any) -> Path:
    """A study of the world in ``root``."""
    assert call("make", root / "results", "--real", root / "real", "--output_dir", root / name, *flags) == 0
    return root / name


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def told(study: Path) -> dict[str, Any]:
    """What the page of a study knows."""
    text = (study / "for_readers" / "index.html").read_text()
    return json.loads(text.split('id="study">')[1].split("</script>")[0])


def truths(key: dict[str, Any]) -> dict[str, str]:
    """The truth of each item: real or drawn, or the drawn one's side."""
    kinds = {name: [key["pictures"][each]["kind"] for each in item["pictures"]] for name, item in key["items"].items()}
    sides = ("left", "right")
    return {name: found[0] if len(found) == 1 else sides[found.index("drawn")] for name, found in kinds.items()}


def save_answers(path: Path, key: dict[str, Any], code: str, answers: dict[str, Any], **more: Any) -> Path:
    """A file of answers as the page saves it."""
    rows = [{"item": item, "answer": answer, "seconds": 4.5} for item, answer in answers.items()]
    about = {"code": code, "years": 7, "speciality": "radiology", "seen": "never"}
    content = {
        "format": 1,
        "study": key["study"],
        "design": key["design"],
        "reader": about,
        "answers": rows,
        "comment": "",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"complete": len(rows) == len(key["items"])} | more))
    return path
