"""task: segment: Dice and the like against torchmetrics, masks that move with their images, the whole run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm
from toy import SIZE, add_sample, make_world, metrics_of, rows_of, run

from ldm.classifier.augmentation import augmented
from ldm.classifier.metrics import with_intervals
from ldm.classifier.segmentation import compare_masks, moved_masks, overlaps, segmentation_loss
from ldm.classifier.segmentation_report import FOUND, TRUTH, outlined
from ldm.data.images import read_image
from ldm.data.png import write_png

CPU = torch.device("cpu")


def discs(count: int, seed: int) -> np.ndarray:
    """Bool (N, SIZE, SIZE): a disc in each."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return np.array([(rows - y) ** 2 + (columns - x) ** 2 <= 25 for y, x in rng.uniform(9, 23, (count, 2))])


def test_overlaps_agree_with_torchmetrics() -> None:
    truth, found = discs(20, 0), discs(20, 1)
    truth[:4], found[2:6] = False, False
    measured, names = overlaps(truth, found), ("dice", "iou", "pixel_precision", "pixel_recall")
    for position in range(20):
        pair = torch.from_numpy(found[position]).int(), torch.from_numpy(truth[position]).int()
        if not truth[position].any():
            assert all(np.isnan(measured[name][position]) for name in names)
            continue
        expected = [tm.binary_f1_score(*pair), tm.binary_jaccard_index(*pair)]
        expected += [tm.binary_precision(*pair), tm.binary_recall(*pair)]
        assert [measured[name][position] for name in names] == pytest.approx([float(each) for each in expected])
        assert measured["found"][position] == (truth[position] & found[position]).any()


def test_means_are_over_lesions_and_false_alarms_over_healthy_images() -> None:
    truth, found = discs(40, 0), discs(40, 1)
    truth[:15], found[5:15] = False, False
    numbers = with_intervals(compare_masks(truth, found), [f"p{i}" for i in range(40)], lambda _: 15)
    assert numbers["false_alarms"]["value"] == pytest.approx(5 / 15)
    dice = overlaps(truth, found)["dice"][15:]
    assert numbers["dice"]["value"] == pytest.approx(dice.mean())
    rng = np.random.default_rng(0)
    plain = np.percentile([rng.choice(dice, 25).mean() for _ in range(2000)], [2.5, 97.5])
    assert [numbers["dice"]["low"], numbers["dice"]["high"]] == pytest.approx(plain, abs=0.02)
    healthy = with_intervals(compare_masks(truth[:15], found[:15]), [f"p{i}" for i in range(15)], lambda _: 15)
    assert healthy["dice"]["value"] is None


def test_a_mask_moves_with_its_image() -> None:
    masks, keys = discs(12, 2), range(12)
    images = augmented(np.where(masks, 200, 40).astype(np.uint8), keys, "light", CPU)[:, 0]
    middle = (images.amax((1, 2)) + images.amin((1, 2))) / 2
    moved = moved_masks(masks, keys, CPU)
    assert ((images >= middle[:, None, None]) == moved.bool()).float().mean() > 0.995
    assert (moved.bool() != torch.from_numpy(masks)).any(2).any(1).sum() > 8


def test_loss_counts_each_image_by_its_weight_and_is_lowest_at_the_mask() -> None:
    masks = torch.from_numpy(discs(3, 3)).float()
    masks[0] = 0
    sure = 40 * masks - 20
    ones = torch.ones(3)
    assert segmentation_loss(sure, masks, ones) < 1e-3
    wrong = sure.clone()
    wrong[1] = -wrong[1]
    shares = torch.tensor([1.0, 3.0, 0.0])
    alone = [segmentation_loss(wrong[i : i + 1], masks[i : i + 1], torch.ones(1)) for i in range(3)]
    assert segmentation_loss(wrong, masks, shares) == pytest.approx(float(alone[0] + 3 * alone[1]) / 4)


def test_outlines_have_the_colours_that_the_page_names() -> None:
    truth, found = discs(2, 4)
    shown = outlined(np.full((SIZE, SIZE), 90, np.uint8), truth, found)
    assert shown.shape == (4 * SIZE, 4 * SIZE, 3)
    for mask, colour in ((found, FOUND), (truth & ~found, TRUTH)):
        drawn = (shown == colour).all(2)
        assert drawn.any()
        assert not (drawn & ~np.kron(mask, np.ones((4, 4), bool))).sum() > drawn.sum() / 2
    assert (shown[0, 0] == 90).all()


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Bright discs to be found, of two severities; one mask of the test set is damaged."""
    root = tmp_path_factory.mktemp("segmented")
    rng = np.random.default_rng(5)
    for name, count in (("train", 48), ("val", 20), ("test", 32)):
        for number, disc in enumerate(discs(count, len(name) + count)):
            kind = ("healthy", "osteoblastic")[number % 2]
            image = rng.normal(100, 8, (SIZE, SIZE)) + (80 * disc if kind != "healthy" else 0)
            about = {"patient_id": f"{name}{number}", "severity": ("mild", "severe")[number % 4 // 2]}
            folder = add_sample(root / name / f"{name}{number:02d}", kind, image.clip(0, 255).astype(np.uint8), **about)
            if kind != "healthy":
                write_png(folder / "mask.png", disc.astype(np.uint8) * 255)
    (root / "test" / "test01" / "mask.png").write_bytes(b"no image")
    settings = {f"{name}_json": str(root / name) for name in ("train", "val", "test")}
    settings |= {"img_size": SIZE, "Batch_Size": 16, "EPOCHS": 10, "model": "test_resnet", "GPU": "cpu"}
    settings |= {"output_dir": str(root / "out"), "lr": 1e-2, "task": "segment"}
    assert run(settings) == 3  # the damaged mask
    return settings


def test_a_u_net_learns_to_outline_lesions(segmented: dict) -> None:
    folder, metrics = Path(segmented["output_dir"]), metrics_of(segmented)
    dice = metrics["test"]["dice"]
    assert dice["value"] > 0.7
    assert dice["low"] < dice["value"] < dice["high"]
    assert metrics["n_test"] == 31
    assert metrics["chosen_by"] == "validation Dice"
    history = rows_of(folder / "history.csv")
    assert metrics["validation"]["dice"] == pytest.approx(max(float(row["val_dice"]) for row in history))
    rows = rows_of(folder / "predictions_test.csv")
    assert np.mean([float(row["dice"]) for row in rows if row["dice"]]) == pytest.approx(dice["value"])
    assert {(row["lesion_type"], row["severity"]) for row in metrics["groups"]} >= {("osteoblastic", "mild")}
    (reject,) = rows_of(folder / "rejects.csv")
    assert (reject["sample_id"], reject["set"]) == ("test01", "test")
    page = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert {"loss_train", "val_dice"} <= {Path(source).stem for source in sources}
    assert sum("outline_" in source for source in sources) == 15
    assert all(read_image(folder / source).size for source in sources)


def test_a_saved_u_net_is_tested_again_and_predicts_nothing(segmented: dict) -> None:
    from ldm.classifier.run import predict
    from ldm.core.errors import UsageError

    folder = Path(segmented["output_dir"])
    before = metrics_of(segmented)["test"]
    assert run(segmented | {"train": False}, "--overwrite") == 3
    assert metrics_of(segmented)["test"] == before
    with pytest.raises(UsageError, match="trained with task segment, which names no classes"):
        predict(folder / "classifier.safetensors", segmented["test_json"], gpu="cpu")
    with pytest.raises(UsageError, match="trained with task 'segment', the configuration says 'binary'"):
        run(segmented | {"train": False, "task": "binary"})


def test_a_lesion_outside_the_crop_is_listed(tmp_path: Path) -> None:
    world = make_world(tmp_path) | {"task": "segment", "crop": 1.0}
    anatomy = np.zeros((SIZE, SIZE), np.uint8)
    anatomy[2:22, 2:22] = 1
    for path in tmp_path.glob("*/*/image.png"):
        write_png(path.with_name("anatomy.png"), anatomy)
    far = np.zeros((SIZE, SIZE), np.uint8)
    far[26:30, 26:30] = 255
    write_png(tmp_path / "test" / "test001" / "mask.png", far)
    assert run(world) == 3
    (reject,) = rows_of(tmp_path / "out" / "rejects.csv")
    assert reject["sample_id"] == "test001"
    assert "nothing of the lesion's mask is in what the network sees" in reject["reason"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["complete"]
