"""Optimizer steps that are the same in every arm, and the rule that says whether training had converged."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from toy import make_world, rows_of, run, synthetic_set

from ldm.classifier.config import ClassifierConfig
from ldm.classifier.convergence import convergence, convergence_note
from ldm.classifier.data import load_data
from ldm.classifier.report import flat_metrics, number_tables
from ldm.classifier.training import Phase, epoch_batches, make_phases


def phases_of(settings: dict, **change: object) -> tuple[ClassifierConfig, list[Phase]]:
    config = ClassifierConfig(**settings | change)
    return config, make_phases(config, load_data(config))


def test_every_arm_takes_the_same_steps_of_equal_batches(tmp_path: Path) -> None:
    """12 real images, 15 with repeated ones, 17 with synthetic ones: 22 steps of 8 images in 3 epochs."""
    world = make_world(tmp_path) | {"steps": 22, "EPOCHS": 3, "output_dir": str(tmp_path / "out")}
    synthetic = [synthetic_set(tmp_path / "results", "train-patient0", "train000")]
    arms = {
        12: {},
        15: {"use_synthetic": "duplicate_real", "ratio": 0.5},
        17: {"synthetic": synthetic},
    }
    for count, change in arms.items():
        config, (phase,) = phases_of(world, **change)
        assert len(phase.names) == count
        epochs = [epoch_batches(phase, epoch, config) for epoch in (1, 2, 3)]
        assert [len(batches) for batches in epochs] == [7, 7, 8]
        assert {len(rows) for batches in epochs for rows, _ in batches} == {8}
        taken = [name for batches in epochs for _, names in batches for name in names]
        assert len(set(taken)) == 22 * 8  # one pass follows the other, in each every image once
        passes = Counter(number for number, _ in taken)
        assert list(passes.values())[:-1] == [count] * (22 * 8 // count)
        rows = np.concatenate([rows for batches in epochs for rows, _ in batches])
        assert [phase.names[row] for row in rows] == [name for _, name in taken]


def test_pretraining_and_training_share_the_steps(tmp_path: Path) -> None:
    world = make_world(tmp_path) | {"steps": 11, "EPOCHS": 3, "use_synthetic": "pretrain", "pretrain_epochs": 2}
    world["synthetic"] = [synthetic_set(tmp_path / "results", "train-patient0", "train000")]
    _, (first, second) = phases_of(world)
    assert (first.steps, second.steps) == (4, 7)


def test_steps_that_are_whole_passes_are_what_epochs_are(tmp_path: Path) -> None:
    world = make_world(tmp_path) | {"Batch_Size": 4, "EPOCHS": 2, "test_json": None}
    assert run(world) == 0
    assert run(world | {"steps": 6, "output_dir": str(tmp_path / "steps")}) == 0
    weights = [load_file(tmp_path / name / "classifier.safetensors") for name in ("out", "steps")]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    plain, counted = (rows_of(tmp_path / name / "history.csv") for name in ("out", "steps"))
    assert [row.pop("step") for row in counted] == ["3", "6"]
    assert plain == counted


@pytest.mark.parametrize(
    ("aucs", "losses", "expected"),
    [
        ([0.5, 0.7, 0.8, 0.9, 0.905], [0.7, 0.6, 0.5, 0.40, 0.395], True),
        ([0.5, 0.6, 0.7, 0.8, 0.82], [0.7, 0.6, 0.5, 0.40, 0.40], False),  # the AUC rises by 0.02
        ([0.5, 0.7, 0.8, 0.9, 0.90], [0.7, 0.6, 0.5, 0.40, 0.38], True),  # the loss falls, as the learning rate does
        ([0.5, 0.7, 0.8, 0.9, 0.85], [0.7, 0.6, 0.5, 0.40, 0.60], True),  # it gets worse: more training does not help
        ([None] * 5, [0.7, 0.6, 0.5, 0.40, 0.395], True),
        ([None] * 5, [0.7, 0.6, 0.5, 0.40, 0.38], False),  # by 5 %, and there is no AUC
        ([0.5, 0.9, 0.9, 0.9], [0.5, 0.4, 0.4, 0.4], None),
    ],
)
def test_convergence_compares_the_last_fifth_with_the_one_before(
    aucs: list, losses: list, expected: bool | None
) -> None:
    """Each epoch stands for two, whose mean counts; what the pretraining did is not looked at."""
    rows = [{"phase": "pretrain", "val_loss": "9", "val_auc": "0.1"}]
    for auc, loss in zip(aucs, losses, strict=True):
        for change in (-0.004, 0.004) if len(aucs) == 5 else (0,):
            shown = "" if auc is None else str(auc + change)
            rows.append({"phase": "train", "val_loss": str(loss - change), "val_auc": shown})
    found = convergence(rows)
    assert found["converged"] is expected
    assert (convergence_note(found) is None) == (expected is True)
    if expected is not None:
        assert found["convergence"]["epochs"] == 2
        assert found["convergence"]["loss_fall"] == pytest.approx(1 - losses[-1] / losses[-2])


def history(aucs: Iterable[float]) -> list[dict[str, str]]:
    return [{"phase": "train", "val_loss": "0.3", "val_auc": str(auc)} for auc in aucs]


def curve(kind: str, noise: float, seed: int, epochs: int = 20) -> np.ndarray:
    """Validation AUC of an epoch: a plateau, or a rise over the last two fifths, with independent noise."""
    rise = {"plateau": 0.0, "small rise": 0.004, "rise": 0.04}[kind]
    ramp = rise * np.clip((np.arange(epochs) - 0.6 * epochs) / (0.4 * epochs), 0, 1)
    return 0.9 + ramp + noise * np.random.default_rng(seed).standard_normal(epochs)


@pytest.mark.parametrize(
    ("kind", "noise", "least", "most"),
    [
        ("plateau", 0.002, 1.0, 1.0),
        ("plateau", 0.03, 0.7, 0.9),  # beyond one standard error on one side by chance: a sixth or so
        ("small rise", 0.002, 1.0, 1.0),  # less than matters
        ("rise", 0.002, 0.0, 0.0),
        ("rise", 0.01, 0.0, 0.15),
    ],
)
def test_a_noisy_plateau_has_converged_and_a_rise_has_not(kind: str, noise: float, least: float, most: float) -> None:
    found = [convergence(history(curve(kind, noise, seed)))["converged"] for seed in range(200)]
    assert least <= np.mean(found) <= most


def test_one_standard_error_of_the_difference_is_the_bound() -> None:
    """Of 2 epochs with 2 before, by hand; with five epochs too."""
    for before in ([], [0.6] * 6):
        found = convergence(history([*before, *([0.7] if not before else []), 0.80, 0.86, 0.84, 0.90]))
        assert found["convergence"]["score_rise"] == pytest.approx(0.04)
        assert found["convergence"]["score_rise_error"] == pytest.approx(0.03 * 2**0.5)
        assert found["converged"] is True
    found = convergence(history([*before, 0.80, 0.86, 0.85, 0.91]))
    assert found["converged"] is False
    note = (
        "Training had not converged: over the last 2 epochs, compared with as many before, the validation AUC rose by "
    )
    assert convergence_note(found).startswith(f"{note}0.050 (standard error 0.042); train longer")


def test_few_validation_patients_show_a_rise_but_no_plateau() -> None:
    flat, rising = history([0.9] * 10), history(np.linspace(0.5, 0.9, 10))
    assert [convergence(rows, few=True)["converged"] for rows in (flat, rising)] == [None, False]
    assert "cannot be told from so few validation patients" in convergence_note(convergence(flat, few=True))


def test_a_change_of_exactly_its_bound_is_no_rise() -> None:
    """Also where the last digits of a float say otherwise: one epoch's jump is as long as its standard error."""
    jumps = [[0.8] * 4 + [last] for last in (0.83, 0.85, 0.87, 0.9, 1.0)]
    steps = [[first] * 3 + [first + 0.01] * 2 for first in (0.7, 0.8, 0.85)]
    assert [convergence(history(aucs))["converged"] for aucs in jumps + steps] == [True] * 8


def test_the_loss_decides_where_validation_holds_one_class_of_which_there_are_always_few() -> None:
    rows = [row | {"val_auc": ""} for row in history([0.9] * 10)]
    assert convergence(rows, few=True)["converged"] is True
    falling = [row | {"val_loss": str(0.9**number)} for number, row in enumerate(rows)]
    assert convergence(falling, few=True)["converged"] is False


@pytest.mark.parametrize("column", ["val_auc", "val_loss"])
def test_numbers_that_are_not_finite_leave_it_open(column: str) -> None:
    rows = history([0.9] * 8)
    for value in ("nan", "inf"):
        found = convergence([*rows, *[rows[0] | {"val_auc": "", column: value}] * 2])
        assert found == {"converged": None, "convergence": {}}
        assert "not finite" in str(convergence_note(found))


def test_tables_say_that_a_verdict_is_open() -> None:
    for verdict, shown in ((None, "open"), (False, False), (True, True)):
        metrics = {"converged": verdict, "validation": {}, "test": {}, "groups": []}
        assert flat_metrics(metrics)["converged"] == shown
        assert dict(number_tables(metrics, [])["fact_rows"])["converged"] == shown
