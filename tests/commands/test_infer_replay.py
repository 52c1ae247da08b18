"""dataset_infer.py --replay: one picture again, with what its meta.json and the record of its run say."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_infer_scale import files_of
from tiny import PHANTOM, TRAIN, call, dataset_infer, edit, infer, metas

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.images import read_image
from ldm.data.png import write_png


@pytest.mark.parametrize("exact", [True, False])
def test_replay_makes_the_same_picture(final: Path, world: Path, tmp_path: Path, exact: bool) -> None:
    given = ["--train_json", world / TRAIN, "--limit", 3, "--variants", 2, "--seed", 4, "--sampler", "dpmpp_2m"]
    given += ["--guidance_scale", 3, "--guidance_interval", 0, 0.5, *(["--exact"] if exact else ["--batch_size", 4])]
    assert infer(final, tmp_path / "out", *given) == 0
    name = sorted(metas(tmp_path / "out"))[3]
    kept = Path(shutil.copytree(tmp_path / "out" / name, tmp_path / "elsewhere"))  # the folder alone is enough
    assert call(dataset_infer, "--replay", kept / "meta.json", "--output_dir", tmp_path / "again") == 0
    before, after = (files_of(tmp_path / folder) for folder in ("out", "again"))
    assert set(after) == {file for file in before if file.startswith(f"{name}/")}
    for file in after:
        if exact or file.endswith(("mask.png", "prompt.txt", "meta.json")):
            assert after[file] == before[file], file
    a, b = (read_image(tmp_path / folder / name / "image.png").astype(int) for folder in ("out", "again"))
    assert np.abs(a - b).max() <= 1


def test_replay_of_a_result_from_before_there_was_a_key(final: Path, one: Path, tmp_path: Path) -> None:
    """With the settings of its run's record, which lacks the key; the YAML has other defaults by now."""
    flags = ["--sampler", "ddim", "--step_spacing", "leading", "--steps", 3]
    assert infer(final, tmp_path / "out", "--data", one, *flags) == 0
    (name,) = metas(tmp_path / "out")
    meta, run_record = tmp_path / "out" / name / "meta.json", tmp_path / "out" / "inference.json"
    record, run = (json.loads(file.read_text()) for file in (meta, run_record))
    assert "spacing" not in run["settings"]["sampling"]  # the fingerprint is that of earlier versions
    meta.write_text(json.dumps({**record, "overrides": []}))  # as if all this came from an earlier YAML
    later = tmp_path / "later.yaml"
    later.write_text(f"base: {PHANTOM}\nsampling: {{sampler: dpmpp_2m, spacing: trailing, steps: 2}}\n")
    again = ["--replay", meta, "--output_dir", tmp_path / "again", "--config", later]
    assert call(dataset_infer, *again) == 0
    images = [(tmp_path / folder / name / "image.png").read_bytes() for folder in ("out", "again")]
    assert images[0] == images[1]


def test_replay_refuses_what_is_not_the_same(final: Path, one: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--data", one) == 0
    (name,) = metas(tmp_path / "out")
    meta = tmp_path / "out" / name / "meta.json"
    record = json.loads(meta.read_text())

    def refused(kind: type, message: str, *more: Any) -> None:
        with pytest.raises(kind, match=message):
            call(dataset_infer, "--replay", meta, "--output_dir", tmp_path / "again", *more)
        assert not (tmp_path / "again").exists()

    other = edit(final, tmp_path / "other.ckpt", keep=lambda key, value: value * 2)
    refused(
        MedSoftError, r"other\.ckpt: is not, or no longer, what .*meta\.json was made with; see --ckpt", "--ckpt", other
    )
    changed = tmp_path / "other.yaml"
    changed.write_text(f"base: {PHANTOM}\nsampling: {{guidance_scale: 2}}\n")
    run_record = (tmp_path / "out" / "inference.json").rename(tmp_path / "record.json")
    refused(MedSoftError, r"other\.yaml: is not, or no longer, what .*see --config", "--config", changed)
    run_record.rename(tmp_path / "out" / "inference.json")
    for flags in (["--steps", 3], ["--seed", 1], ["--prompt", "x"], ["sampling.eta=1"], ["--devices", 2]):
        refused(UsageError, "does not go with it", *flags)
    refused(UsageError, "exclude each other", "--data", one)
    older = {key: value for key, value in record.items() if key != "noise"}
    meta.write_text(json.dumps(older))
    refused(MedSoftError, r"meta\.json: was made with the noise of another version")
    meta.write_text(json.dumps(record))
    parent = meta.parent / record["parent_image"]
    pixels = read_image(parent)
    write_png(parent, 255 - pixels)
    refused(MedSoftError, r"image\.png: has changed since, or is another image than the one that .* was made from")
    parent.unlink()
    refused(MedSoftError, "is not there or cannot be read")
    meta.write_text(json.dumps({key: value for key, value in record.items() if key not in ("seed", "overrides")}))
    refused(MedSoftError, "has no seed, overrides; expected the meta.json of a result")
    meta.write_text("{")
    refused(MedSoftError, "not valid JSON")


def test_pictures_can_be_drawn_again_when_their_prompts_source_is_gone(
    final: Path, world: Path, tmp_path: Path
) -> None:
    """Sentence and mask lie with the picture: --replay and --like need the parent, not where the sentence came from."""
    shutil.copytree(world / "val", tmp_path / "val")
    given = ["--data", world / "val", "--choose", "healthy", "--train_json", tmp_path / "val", "--exact"]
    assert infer(final, tmp_path / "out", *given) == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    assert (tmp_path / "val" / meta["prompt_from"]).is_dir()
    shutil.rmtree(tmp_path / "val")
    record = tmp_path / "out" / name / "meta.json"
    assert call(dataset_infer, "--replay", record, "--output_dir", tmp_path / "again") == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    assert infer(final, tmp_path / "like", "--like", tmp_path / "out", "--exact") == 0
    like = files_of(tmp_path / "like")
    assert {file for file, content in files_of(tmp_path / "out").items() if like[file] != content} <= {
        f"{name}/meta.json"  # which holds the command
    }
