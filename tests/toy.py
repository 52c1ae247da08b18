"""Tiny drawn pictures in sample folders, and classifier.py on them; shared by the tests of the classifier."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

import classifier
from ldm.data.png import write_png

SIZE = 32


def draw(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Noise; a bright blob when osteoblastic, a dark one when osteolytic."""
    image = rng.normal(120, 12, (SIZE, SIZE))
    if kind != "healthy":
        rows, columns = np.mgrid[:SIZE, :SIZE]
        y, x = rng.uniform(10, 22, 2)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 30)
        image += blob * (110 if kind == "osteoblastic" else -110)
    return image.clip(0, 255).astype(np.uint8)


def add_sample(folder: Path, kind: str, image: np.ndarray, **meta: Any) -> Path:
    write_png(folder / "image.png", image)
    if kind != "healthy":
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[8:24, 8:24] = 255
        write_png(folder / "mask.png", mask)
        meta["lesion_type"] = kind
    (folder / "prompt.txt").write_text("healthy" if kind == "healthy" else f"{kind} lesion of L3")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def make_set(root: Path, prefix: str, count: int, seed: int, kinds: tuple[str, ...] = ()) -> Path:
    rng = np.random.default_rng(seed)
    kinds = kinds or ("healthy", "osteoblastic", "healthy", "osteolytic")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        add_sample(root / f"{prefix}{number:03d}", kind, draw(rng, kind), patient_id=f"{prefix}-patient{number}")
    return root


def make_world(root: Path) -> dict[str, Any]:
    """Folders with 12 training, 8 validation and 8 test pictures, and a one-epoch configuration for them."""
    for name, count, seed in (("train", 12, 0), ("val", 8, 1), ("test", 8, 2)):
        make_set(root / name, name, count, seed)
    settings = {f"{name}_json": str(root / name) for name in ("train", "val", "test")}
    settings |= {"img_size": SIZE, "Batch_Size": 8, "EPOCHS": 1, "model": "test_resnet", "GPU": "cpu"}
    return settings | {"output_dir": str(root / "out"), "dataset": "toy", "lr": 3e-3}


def run(settings: dict, *flags: str) -> int:
    path = Path(settings["output_dir"]).parent / "args.json"
    path.write_text(json.dumps(settings))
    return classifier.main(classifier.build_parser().parse_args([str(path), *flags]))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def metrics_of(settings: dict) -> dict:
    return json.loads((Path(settings["output_dir"]) / "metrics.json").read_text())


def synthetic_set(root: Path, patient: str, parent: str, count: int = 6) -> str:
    rng = np.random.default_rng(9)
    for number in range(count):
        kind = "healthy" if number == 0 else "osteolytic"
        add_sample(root / f"s{number}", kind, draw(rng, kind), patient_id=patient, parent_id=parent)
    return str(root)
