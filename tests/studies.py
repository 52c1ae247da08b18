"""A small study of phantoms, shared by the tests of tool/study.py."""

from pathlib import Path
from typing import Any

import yaml

SMALL = {
    "name": "small",
    "worlds": [3],
    "seeds": [0],
    "phantoms": {"healthy": 8, "diseased": 8, "fractions": [0.5, 0.5, 0], "test_healthy": 4, "test_diseased": 4},
    "classifier": "configs/classifier/phantom.json",
    "set": ["EPOCHS=1", "img_size=32", "Batch_Size=8"],
    "arms": {"real": {}, "duplicated": {"use": "duplicate_real", "ratios": [1]}},
    "compare": {"baseline": "real", "control": "duplicated", "main": "duplicated", "ratio": None},
}
GENERATOR = {"checkpoint": "a.ckpt", "model": "models/phantom.yaml"}


def write(folder: Path, **changes: Any) -> Path:
    """``SMALL`` with these keys replaced (None removes one), as ``study.yaml`` in the folder; its output is ``out``."""
    values = {"output_dir": str(folder / "out"), **SMALL, **changes}
    path = folder / "study.yaml"
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path
