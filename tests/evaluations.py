"""tool/evaluate.py on folders of phantoms, and what it has written."""

import json
from pathlib import Path
from typing import Any

import tiny

from tool import evaluate


def run(real: Path, synthetic: Path, output: Path, *more: Any) -> int:
    return tiny.call(
        evaluate, real, synthetic, "--output_dir", output, "--config", tiny.PHANTOM, "--biomedclip", tiny.CLIP, *more
    )


def found(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text())


def diseased(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/mask.png"))
