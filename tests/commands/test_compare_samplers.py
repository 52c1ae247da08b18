"""tool/compare_samplers.py on phantoms: what it measures, what it says, and what it refuses."""

import csv
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny import CLIP, PHANTOM, call, metas

from ldm.bench import samplers
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.images import read_image
from ldm.inference.options import InferenceOptions
from tool import compare_samplers

SETTINGS = ["ddim sampler=ddim steps=3", "fast sampler=dpmpp_2m steps=2 spacing=trailing guidance_interval=[0.5,1]"]


def compare(
    final: Path, data: Path, judge: Path, output: Path, *more: object, settings: Sequence[str] = SETTINGS
) -> int:
    given = ["--ckpt", final, "--config", PHANTOM, "--data", data, "--judge", judge, "--output_dir", output]
    flags = [word for text in settings for word in ("--setting", text)]
    return call(
        compare_samplers, *given, *flags, "--many_steps", 4, "--device", "cpu", *more, f"biomedclip.path={CLIP}"
    )


@pytest.fixture(scope="module")
def compared(final: Path, world: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of three images with two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    assert compare(final, world / "train", judge, out, "--seeds", 2, "--limit", 3) == 0
    return out


def test_same_images_with_all_settings(final: Path, world: Path, judge: Path, compared: Path) -> None:
    out = compared
    found = json.loads((out / "comparison.json").read_text())
    folders = {f"{name}_seed{seed}" for name in ("ddim", "fast", "many_steps") for seed in (0, 1)}
    written = {path.name for path in out.iterdir() if path.suffix != ".lock"}
    assert written == {*folders, "prompts.json", "comparison.json", "distances.csv"}
    assert found["half_calls"] == {"ddim": 6, "fast": 3}
    with (out / "distances.csv").open() as file:
        apart = {(int(row["seed"]), row["sample_id"]): row for row in csv.DictReader(file)}
    assert len(apart) == found["pictures"] == 6
    for seed in (0, 1):
        reference, fast = (metas(out / f"{name}_seed{seed}") for name in ("ddim", "fast"))
        for name, meta in reference.items():  # the same prompt, mask and noise
            assert all(meta[key] == fast[name][key] for key in ("seed", "variant", "parent_id", "prompt_from"))
            assert meta["severity"] != "subtle"
            masks = [out / f"{kind}_seed{seed}" / name / "mask.png" for kind in ("ddim", "fast", "many_steps")]
            assert len({mask.read_bytes() for mask in masks}) == 1
            inside = read_image(masks[0]) > 127
            truth = read_image(masks[2].with_name("image.png")).astype(float)
            for kind, mask in zip(("ddim", "fast"), masks, strict=False):
                change = (read_image(mask.with_name("image.png")) - truth)[inside]
                assert float(apart[seed, name][kind]) == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-4)
        for runs in found["seeds"].values():
            assert 0 <= runs[seed]["prompt_agreement"] <= 1
    assert set(found["measures"]["ddim"]["distance"]) == {"value"}
    for row in found["measures"]["fast"].values():
        assert row["low"] <= row["difference"] <= row["high"]
    before = (out / "comparison.json").read_text()
    assert compare(final, world / "train", judge, out, "--seeds", 2, "--limit", 3) == 0
    assert (out / "comparison.json").read_text() == before  # nothing was inpainted again


@pytest.mark.parametrize("which", ["ckpt", "judge"])
def test_one_checkpoint_and_one_judge_for_all_settings_or_no_comparison(
    final: Path, world: Path, judge: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    out, plain = shutil.copytree(compared, tmp_path / "out"), samplers.judged
    (out / "comparison.json").unlink()
    files = {"ckpt": shutil.copy(final, tmp_path / "x.ckpt"), "judge": shutil.copy(judge, tmp_path / "x.safetensors")}

    def judged(*given: Any) -> dict[str, float]:
        found = plain(*given)
        os.replace(shutil.copy(files[which], tmp_path / "new"), files[which])
        return found

    monkeypatch.setattr(samplers, "judged", judged)
    with pytest.raises(MedSoftError, match=rf"{files[which].name}: was replaced or changed after it had been read"):
        compare(files["ckpt"], world / "train", files["judge"], out, "--seeds", 2, "--limit", 3)
    assert not (out / "comparison.json").exists()


def test_images_that_one_setting_could_not_make_are_left_out_of_all(
    final: Path, world: Path, judge: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inpaint, lost = samplers.run, 1
    out = shutil.copytree(compared, tmp_path / "out")

    def partly_done(options: InferenceOptions) -> int:
        code = inpaint(options)
        if options.output_dir.name == "fast_seed1":
            for folder in sorted(options.output_dir.glob("*__v0"))[:lost]:
                shutil.rmtree(folder)
            return 3
        return code

    monkeypatch.setattr(samplers, "run", partly_done)
    assert compare(final, world / "train", judge, out, "--seeds", 2, "--limit", 3) == 3
    found = json.loads((out / "comparison.json").read_text())
    assert found["pictures"] == 3 + 2
    assert found["settings"]["fast"][0] == "sampling.sampler=dpmpp_2m"
    lost = 2
    with pytest.raises(MedSoftError, match=r"fast_seed1: 1 image in common with the others; expected at least 2"):
        compare(final, world / "train", judge, out, "--seeds", 2, "--limit", 3)


def test_the_difference_is_paired_and_has_an_interval() -> None:
    """By seed, and for the distance by image."""
    measures = [name for name in samplers.MEASURES if name != "distance"]

    def runs(*rows: tuple[float, float, float]) -> list[dict[str, float]]:
        return [dict(zip(measures, row, strict=True)) for row in rows]

    before = runs((10.0, 0.90, 0.80), (12.0, 0.94, 0.70), (17.0, 0.93, 0.60))
    after = runs((11.0, 0.88, 0.9), (13.1, 0.95, 0.8), (17.9, 0.90, 0.7))
    images = [{"seed": 0, "sample_id": f"{k}", "old": 3.0 * k, "new": 3.0 * k + 1 + 0.1 * (k % 2)} for k in range(5)]
    found = samplers.differences({"old": before, "new": after}, images)
    paired = {name: [new[name] - old[name] for old, new in zip(before, after, strict=True)] for name in measures}
    paired["distance"] = [row["new"] - row["old"] for row in images]
    for name, row in found["new"].items():
        expected = stats.t.interval(0.95, len(paired[name]) - 1, np.mean(paired[name]), stats.sem(paired[name]))
        assert row["difference"] == pytest.approx(row["value"] - found["old"][name]["value"])
        assert (row["low"], row["high"]) == pytest.approx(expected)
    assert {name: row["verdict"] for name, row in found["new"].items()} == {
        "distance": "worse",  # by 1 at each image, though the images are 3 apart; a distance is to be small
        "frechet_distance": "worse",
        "lesion_detection_rate": "no difference shown",
        "prompt_agreement": "better",
    }


def test_what_cannot_be_compared_is_refused(final: Path, world: Path, one: Path, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seeds: expected a whole number from 2 "):
        compare(final, world / "train", judge, tmp_path / "out", "--seeds", 1)
    with pytest.raises(UsageError, match=r"nowhere\.safetensors: does not exist"):
        compare(final, world / "train", tmp_path / "nowhere.safetensors", tmp_path / "out")
    with pytest.raises(MedSoftError, match="1 diseased sample, the subtle ones left out; expected at least 2"):
        compare(final, one, judge, tmp_path / "out")
    for settings, message in (
        (["fast steps=2"], "--setting: expected at least two, of different names .*, found fast"),
        (["fast steps=2", "fast steps=3"], "at least two, of different names .*, found fast, fast"),
        (["ddim", "many_steps steps=3"], "neither many_steps nor overrides"),
        (["ddim", "../fast steps=2"], r"--setting '\.\./fast steps=2': expected a name and keys, such as"),
        (["ddim", 'fast "steps=2'], "expected a name and keys, such as"),
        (["ddim", "fast steps 2"], "expected a name and keys, such as"),
        (["ddim", "fast stepps=2"], r"unknown key sampling\.stepps; did you mean sampling\.steps"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(final, world / "train", judge, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()
