"""How hard phantoms are: the diagnosis classifier trained on few and on many diseased patients, tested on others."""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from ldm.classifier.config import load_classifier_config
from ldm.classifier.run import train_classifier
from ldm.core.paths import SHIPPED
from ldm.core.tables import read_table
from ldm.phantom.dataset import write_dataset
from ldm.phantom.spines import SEVERITIES

# healthy and diseased patients; epochs
FEW, MANY, VALIDATION, TEST = (160, 35), (700, 700), (80, 80), (160, 160)
FEW_EPOCHS, MANY_EPOCHS = 20, 12
FEW_RUNS = 3  # one run on 35 diseased patients says little: the mean of three, each on its own patients


def calibrate(seed: int, world: str) -> str:
    """Train on few and on many patients of a world, test on others (seeds derived from ``seed``); a line of results."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_dataset(home / "val", 1600 + seed, *VALIDATION, world=world)
        write_dataset(home / "test", 1000 + seed, *TEST, world=world)
        runs = [_test_auc(home, 2000 + FEW_RUNS * seed + run, FEW, FEW_EPOCHS, world) for run in range(FEW_RUNS)]
        many = _test_auc(home, 1500 + seed, MANY, MANY_EPOCHS, world)
        columns = ("severity", "predicted")
        rows = read_table(home / f"classifier_{1500 + seed}" / "predictions_test.csv", columns, "predictions")
    called: dict[str, list[bool]] = {}
    for row in rows:
        called.setdefault(row["severity"] or "healthy", []).append(row["predicted"] != "healthy")
    rates = ", ".join(f"{statistics.fmean(called[name]):.1%} {name}" for name in ("healthy", *SEVERITIES))
    return (
        f"test AUC {statistics.fmean(runs):.3f} ({min(runs):.3f}-{max(runs):.3f}, {len(runs)} runs) with {FEW[1]} "
        f"diseased and {FEW[0]} healthy patients; {many:.3f} with {MANY[1]} and {MANY[0]} (called diseased: {rates}); "
        f"{sum(TEST)} test patients"
    )


def _test_auc(home: Path, seed: int, counts: tuple[int, int], epochs: int, world: str) -> float:
    """The classifier of the demo's settings, trained on ``counts`` healthy and diseased patients of ``seed``."""
    write_dataset(home / f"train_{seed}", seed, *counts, world=world)
    shipped = load_classifier_config(SHIPPED / "configs" / "classifier" / "phantom.json")
    config = replace(
        shipped,
        EPOCHS=epochs,
        seed=seed,
        train_json=str(home / f"train_{seed}"),
        val_json=str(home / "val"),
        test_json=str(home / "test"),
        output_dir=str(home / f"classifier_{seed}"),
    )
    return train_classifier(config)["test"]["auc"]["value"]
