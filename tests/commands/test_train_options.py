"""Options of a stage: validation that sees lesions, the MSC's own loss, frozen groups."""

import csv
from pathlib import Path

import pytest
from tiny import MODELS, VAL, changed, tensors, train

from ldm.config import load_config
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations
from ldm.training.estimates import stage_memory


def last_row(folder: Path) -> dict[str, str]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))[-1]


def validation_set(world: Path, path: Path, healthy: bool) -> Path:
    """Annotations of the healthy or the diseased validation samples alone."""
    write_annotations(path, [each for each in load_samples(world / VAL)[0] if each.healthy == healthy])
    return path


def test_validation_of_lesions_is_that_of_the_diseased_samples_alone(
    trained: dict, world: Path, converted: Path, tmp_path: Path
) -> None:
    """Same training, a validation set of diseased samples: its loss is the other set's loss of lesions."""
    diseased = validation_set(world, tmp_path / "val.json", healthy=False)
    given = ("--val_json", diseased, "training.best_by=val_lesion_loss")
    assert train("stage1", converted, tmp_path / "s", world, *given) == 0
    alone, mixed = last_row(tmp_path / "s"), last_row(trained["stage1"].folder)
    assert alone["train_loss"] == mixed["train_loss"]
    for name in ("loss", "cosine"):
        assert float(alone[f"val_{name}"]) == pytest.approx(float(mixed[f"val_lesion_{name}"]), rel=1e-4)
        assert float(mixed[f"val_{name}"]) != pytest.approx(float(mixed[f"val_lesion_{name}"]), rel=1e-3)


def test_the_best_epoch_may_be_that_of_the_lesions(trained: dict, world: Path, tmp_path: Path) -> None:
    merged = trained["stage2_1"].source
    assert train("stage2_1", merged, tmp_path / "s", world, "training.best_by=val_lesion_loss") == 0
    row = last_row(tmp_path / "s")
    (best,) = (tmp_path / "s").glob("best_*.ckpt")
    assert best.name == f"best_epoch0000_loss{row['val_lesion_loss']}.ckpt"
    assert row["val_loss"] == last_row(trained["stage2_1"].folder)["val_loss"] != row["val_lesion_loss"]


def test_no_lesion_to_choose_the_best_epoch_by(world: Path, converted: Path, tmp_path: Path) -> None:
    given = ("--val_json", validation_set(world, tmp_path / "val.json", healthy=True))
    with pytest.raises(MedSoftError, match=r"val\.json: training\.best_by=val_lesion_loss needs diseased samples"):
        train("stage1", converted, tmp_path / "s", world, *given, "training.best_by=val_lesion_loss")
    assert not (tmp_path / "s").exists()


def test_the_mscs_own_loss_trains_its_global_head_too(trained: dict, world: Path, tmp_path: Path) -> None:
    """What is validated stays the published loss."""
    merged = trained["stage2_1"].source
    assert train("stage2_1", merged, tmp_path / "s", world, "training.msc_weight=0.1") == 0
    moved = changed(tensors(merged), tensors(tmp_path / "s" / "last.ckpt"))
    assert moved == {key for key in tensors(merged) if key.startswith("msc.")}
    with_own, without = last_row(tmp_path / "s"), last_row(trained["stage2_1"].folder)
    assert float(with_own["train_loss"]) > float(without["train_loss"]) + 0.01
    assert float(with_own["val_loss"]) == pytest.approx(float(without["val_loss"]), abs=0.01)
    assert with_own["val_lesion_cosine"] != without["val_lesion_cosine"]


def test_a_frozen_msc_stays_and_costs_no_gradients(trained: dict, world: Path, tmp_path: Path) -> None:
    source = trained["stage2_2"].source
    assert train("stage2_2", source, tmp_path / "s", world, "training.rates.msc=0") == 0
    moved = changed(tensors(source), tensors(tmp_path / "s" / "last.ckpt"))
    assert moved == {key for key in tensors(source) if key.startswith("model.diffusion_model.")}
    assert last_row(tmp_path / "s")["val_lesion_cosine"] == last_row(trained["stage2_1"].folder)["val_lesion_cosine"]
    trains, frozen = (
        stage_memory(config.architecture, config.training, 2, half=False)
        for config in (load_config(MODELS / "phantom_stage2_2.yaml", more) for more in ([], ["training.rates.msc=0"]))
    )
    assert frozen.activations < trains.activations
    assert frozen.optimizer < trains.optimizer
