"""tool/compare_samplers.py on phantoms: what it measures, what it says, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny import CLIP, PHANTOM, call, metas

from ldm.bench import samplers
from ldm.core.errors import MedSoftError, UsageError
from ldm.inference.options import InferenceOptions
from tool import compare_samplers


@pytest.fixture(scope="module")
def judge(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of lesion types after one epoch."""
    from ldm.classifier.data import ClassifierConfig
    from ldm.classifier.run import train_classifier

    folder = tmp_path_factory.mktemp("judge")
    given = {"train_json": str(world / "train"), "val_json": str(world / "val"), "test_json": None, "task": "type"}
    config = ClassifierConfig(img_size=32, Batch_Size=4, EPOCHS=1, GPU="cpu", output_dir=str(folder), **given)
    train_classifier(config)
    return folder / "classifier.safetensors"


def compare(final: Path, data: Path, judge: Path, output: Path, *more: object) -> int:
    given = ["--ckpt", final, "--config", PHANTOM, "--data", data, "--judge", judge, "--output_dir", output]
    return call(compare_samplers, *given, "--device", "cpu", *more, f"biomedclip.path={CLIP}", "sampling.steps=2")


def test_same_images_with_both_settings(final: Path, world: Path, judge: Path, tmp_path: Path) -> None:
    assert compare(final, world / "train", judge, tmp_path / "out", "--seeds", 2, "--limit", 2) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    folders = {f"{name}_seed{seed}" for name in ("reference", "fast") for seed in (0, 1)}
    written = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"}
    assert written == {*folders, "prompts.json", "comparison.json"}
    for seed in (0, 1):
        reference, fast = (metas(tmp_path / "out" / f"{name}_seed{seed}") for name in ("reference", "fast"))
        assert len(reference) == 2
        for name, meta in reference.items():  # the same prompt, mask and noise
            assert all(meta[key] == fast[name][key] for key in ("seed", "variant", "parent_id", "prompt_from"))
            assert meta["severity"] != "subtle"
            masks = [tmp_path / "out" / f"{kind}_seed{seed}" / name / "mask.png" for kind in ("reference", "fast")]
            assert masks[0].read_bytes() == masks[1].read_bytes()
        for runs in found["seeds"].values():
            assert 0 <= runs[seed]["prompt_agreement"] <= 1
    for row in found["measures"].values():
        assert row["low"] <= row["difference"] <= row["high"]
    before = (tmp_path / "out" / "comparison.json").read_text()
    assert compare(final, world / "train", judge, tmp_path / "out", "--seeds", 2, "--limit", 2) == 0
    assert (tmp_path / "out" / "comparison.json").read_text() == before  # nothing was inpainted again


def test_images_that_one_setting_could_not_make_are_left_out_of_both(
    final: Path, world: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inpaint = samplers.run

    def half_done(options: InferenceOptions) -> int:
        code = inpaint(options)
        if options.output_dir.name == "fast_seed1":
            shutil.rmtree(next(options.output_dir.glob("*__v0")))
            return 3
        return code

    monkeypatch.setattr(samplers, "run", half_done)
    assert compare(final, world / "train", judge, tmp_path / "out", "--seeds", 2, "--limit", 3) == 3
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["settings"]["pictures"] == 2 * (3 + 2)
    assert "sampling.steps=2" in found["settings"]["overrides"]
    with pytest.raises(MedSoftError, match=r"fast_seed1: 1 images in common; expected at least 2; inpaint more"):
        compare(final, world / "train", judge, tmp_path / "few", "--seeds", 2, "--limit", 2)


def test_the_difference_is_paired_by_seed_and_has_an_interval() -> None:
    def runs(*rows: tuple[float, float, float]) -> list[dict[str, float]]:
        return [dict(zip(samplers.MEASURES, row, strict=True)) for row in rows]

    reference = runs((10.0, 0.90, 0.80), (12.0, 0.94, 0.70), (17.0, 0.93, 0.60))
    found = samplers.differences(reference, runs((11.0, 0.88, 0.9), (13.1, 0.95, 0.8), (17.9, 0.90, 0.7)))
    for name, row in found.items():
        before, after = reference, runs((11.0, 0.88, 0.9), (13.1, 0.95, 0.8), (17.9, 0.90, 0.7))
        paired = [new[name] - old[name] for old, new in zip(before, after, strict=True)]
        expected = stats.t.interval(0.95, 2, np.mean(paired), stats.sem(paired))
        assert row["difference"] == pytest.approx(row["fast"] - row["reference"])
        assert (row["low"], row["high"]) == pytest.approx(expected)
    assert {name: row["verdict"] for name, row in found.items()} == {
        "frechet_distance": "worse",  # by 1 at each seed, though the seeds are 7 apart; a distance is to be small
        "lesion_detection_rate": "no difference shown",
        "prompt_agreement": "better",
    }


def test_what_cannot_be_compared_is_refused(final: Path, world: Path, one: Path, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seeds: expected a whole number from 2 "):
        compare(final, world / "train", judge, tmp_path / "out", "--seeds", 1)
    with pytest.raises(UsageError, match=r"nowhere\.safetensors: does not exist"):
        compare(final, world / "train", tmp_path / "nowhere.safetensors", tmp_path / "out")
    with pytest.raises(MedSoftError, match="diseased samples that are not subtle; expected at least 2"):
        compare(final, one, judge, tmp_path / "out")
    assert not (tmp_path / "out").exists()
