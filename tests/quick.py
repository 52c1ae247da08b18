"""What makes the tests quicker, here and in the children of tests/children.py, and changes no result.

The estimate of a training's memory, which follows from sizes alone, is computed once in a run of the tests, for all
its processes. Tests of the estimate itself call the plain function. BiomedCLIP of a folder that has not changed is
built once in a process, and copied. Figures of pages are left white: they take longer than a training in small. Tests
of these pages have them drawn. And nothing waits for the disk: a killed process loses nothing that the system has.
"""

import copy
import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "MEDSOFT_TESTS_QUICK"  # the environment variable that names the folder of results

# Settings of a training that its memory does not depend on. The batch and the precision are arguments of their own.
FREE = {
    "batch_size": 1,
    "max_epochs": 1,
    "accumulate": 1,
    "precision": "auto",
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "schedule": "constant",
    "clip_norm": 0.0,
    "condition_dropout": 0.0,
    "balance": False,
    "compile": False,
    "workers": 0,
    "feature_batch": 1,
    "save_every_minutes": 0.0,
    "keep_best": 0,
    "val_draws": 1,
    "pictures": 0,
    "max_rejected": 0.0,
    "seed": 0,
}


def _memory_key(architecture: Any, training: Any, *rest: Any, **named: Any) -> str:
    rates = {name: float(rate > 0) for name, rate in training.rates.items()}
    alike = replace(training, rates=rates, ema_decay=float(training.ema_decay > 0), **FREE)
    return repr((architecture, alike, rest, sorted(named.items())))


def _once(plain: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """``plain`` with results that are kept, pickled, in the folder: one for each key."""
    from ldm.networks import model

    kept: dict[str, bytes] = {}

    @functools.wraps(plain)
    def once(*given: Any, **named: Any) -> Any:
        parts = [value for value in vars(model).values() if isinstance(value, type)]  # a test may put in another one
        key = hashlib.sha256(f"{parts} {_memory_key(*given, **named)}".encode()).hexdigest()
        file = folder / key
        if key not in kept and not file.exists():
            written = file.with_suffix(f".{os.getpid()}")
            written.write_bytes(pickle.dumps(plain(*given, **named)))
            written.replace(file)
        kept[key] = kept.get(key) or file.read_bytes()
        return pickle.loads(kept[key])

    return once


def _copied(plain: Callable[..., None]) -> Callable[..., None]:
    """``BiomedClip.__init__``, which builds one for each folder, as it is at that moment, and copies it for the rest.

    The copies share the tokenizer. What is refused, or downloaded, is read each time.
    """
    built: dict[Any, dict[str, Any]] = {}

    @functools.wraps(plain)
    def __init__(self: Any, source: str | Path) -> None:
        stats = {path: path.stat() for path in sorted(Path(source).glob("*"))}
        key = (str(source), *((path, one.st_ino, one.st_size, one.st_ctime_ns) for path, one in stats.items()))
        if key not in built:
            plain(self, source)
            if not stats:
                return
            built[key] = self.__dict__
        words = built[key]["_tokenizer"]
        self.__dict__ = copy.deepcopy(built[key], {id(words): words})

    return __init__


def _blank(path: Path, figure: "Figure", dpi: int = 150) -> None:
    """A white picture of the size that ``write_figure`` would write."""
    from ldm.data.png import write_png

    width, height = (int(dpi * inches) for inches in figure.get_size_inches())
    write_png(path, np.full((height, width, 3), 255, np.uint8))


def _fsync(descriptor: int) -> None:
    """Refuses what ``os.fsync`` refuses."""
    os.fstat(descriptor)


def install(folder: Path) -> None:
    """The package computes and builds once; ``folder`` is shared by the run's processes."""
    from ldm.evaluation import report
    from ldm.networks.biomedclip import BiomedClip
    from ldm.reports import html
    from ldm.training import estimates

    estimates.stage_memory = _once(estimates.stage_memory, folder)
    html.write_figure = report.write_figure = _blank
    BiomedClip.__init__ = _copied(BiomedClip.__init__)
    os.fsync = _fsync
