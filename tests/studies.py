"""A small study of phantoms, and the check of a plan's commands, shared by the tests of plans and studies."""

import importlib
import shlex
from pathlib import Path
from typing import Any

import tiny
import yaml

from ldm.classifier.config import load_classifier_config
from ldm.config import load_config
from tool import make_phantoms

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


def run_command(run: str) -> None:
    """Run a plan's command in this process; it must end well."""
    _, script, *words = shlex.split(run)
    assert tiny.call(importlib.import_module(script.removesuffix(".py").replace("/", ".")), *words) == 0


def check_command(run: str) -> None:
    """The script of a plan's command accepts its words, and what they say of settings can be read.

    A start that is noised in part says with which steps: the same share of others begins at another time.
    """
    python, script, *words = shlex.split(run)
    assert python == "python"
    args = importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser()
    args = args.parse_intermixed_args(words)
    if script == "classifier.py":
        load_classifier_config(tiny.ROOT / args.args, args.set)
    if script in ("ver_train.py", "dataset_infer.py"):
        load_config(tiny.ROOT / args.config, args.overrides)
    if script == "dataset_infer.py" and args.strength not in (None, 0, 1):
        assert None not in (args.steps, args.step_spacing), run
    if script == "tool/make_phantoms.py":
        make_phantoms.check(args)
