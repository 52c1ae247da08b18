"""The README's commands from the converted file to the last stage, at true size, each in a process of its own.

About 23 GB of memory, 35 GB of disk and seven minutes on two free cores; only in ``make test-full``.
"""

import csv
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import original, save_original
from test_train import belongs
from test_true_size_checkpoints import measured
from tiny import MODELS, ROOT, STAGES, changed

from ldm.bench.common import random_biomedclip
from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.data.png import write_png

GIB = 2**30
# Two training steps of one sample each, and no pictures: two of them alone would take 200 calls of the U-Net.
SMALL = ["data.healthy_masks=1", "data.diseased_crops=1", "training.max_epochs=1", "training.pictures=0"]
SMALL += ["training.keep_best=0", "training.activation_checkpointing=true"]


def samples(folder: Path, count: int = 4) -> None:
    """So many patients with images larger than 512 pixels, every second one with a lesion."""
    rng = np.random.default_rng(0)
    for number in range(count):
        sample = folder / f"sample_{number}"
        mask = np.zeros((700, 620), np.uint8)
        if number % 2:
            mask[300:380, 250:350] = 255
        write_png(sample / "image.png", rng.integers(0, 256, mask.shape, dtype=np.uint8))
        write_png(sample / "mask.png", mask)
        write_png(sample / "anatomy.png", np.ones_like(mask))
        (sample / "prompt.txt").write_text("osteolytic lesion" if number % 2 else "healthy", encoding="utf-8")
        (sample / "meta.json").write_text(f'{{"patient_id": "p{number}"}}', encoding="utf-8")


def sensible(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The random tensors scaled so that activations neither die out nor blow up."""
    for key, value in state.items():
        if value.ndim > 1 and value.is_floating_point():
            value.mul_(10 / value[0].numel() ** 0.5)
        elif key.endswith("weight"):
            value.add_(1)
    return state


def starting_files(folder: Path) -> None:
    """The original file and a BiomedCLIP, random."""
    save_original(folder / "sd-v1-5-inpainting.ckpt", sensible(original()))
    random_biomedclip(load_config(MODELS / "mldm_v15.yaml").biomedclip, folder)


@pytest.mark.slow
def test_every_stage_trains_at_true_size(tmp_path: Path) -> None:
    making = get_context("spawn").Process(target=starting_files, args=(tmp_path,))  # whose memory ends with it
    making.start()
    making.join()
    assert making.exitcode == 0
    source, clip = tmp_path / "sd-v1-5-inpainting.ckpt", tmp_path / "biomedclip"
    samples(tmp_path / "data")
    files = {name: tmp_path / f"{name}.ckpt" for name in ("ckpt_for_stage1", "ckpt_for_stage2")}
    annotations = tmp_path / "a.json"
    yaml = ["--config", MODELS / "mldm_v15.yaml"]
    given = ["--root_dir", tmp_path / "data", "--output_file", annotations, "--fractions", 0.5, 0.5, 0]
    measured(ROOT / "ver_openImagesDatasets.py", *given)
    convert = ["--input_path", source, "--output_path", files["ckpt_for_stage1"], *yaml]
    measured(ROOT / "tool" / "model_convert.py", *convert)
    source.unlink()
    starts = {"stage1": files["ckpt_for_stage1"], "unet_only": files["ckpt_for_stage1"]}
    starts |= {"stage2_1": files["ckpt_for_stage2"], "stage2_2": tmp_path / "stage2_1" / "last.ckpt"}
    for stage in STAGES:
        if stage == "stage2_1":
            given = ["--stage1_path", tmp_path / "stage1" / "last.ckpt", "--output_path", files["ckpt_for_stage2"]]
            given += ["--input_path", tmp_path / "unet_only" / "last.ckpt", *yaml]
            measured(ROOT / "tool" / "tool_merge_for_stage2.py", *given)
            files["ckpt_for_stage1"].unlink()
        folder = tmp_path / stage
        flags = ["--ckpt", starts[stage], "--config", MODELS / f"mldm_v15_{stage}.yaml", "--save_path", folder]
        flags += ["--train_json", tmp_path / "a_train.json", "--val_json", tmp_path / "a_val.json"]
        peak, seconds, _ = measured(ROOT / "ver_train.py", *flags, "--biomedclip", clip, "--batch_size", 1, *SMALL)
        steps = list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))
        print(f"\n{stage}: peak {peak / GIB:.2f} GiB, {seconds:.0f} s, {steps}")
        assert len(steps) == 2
        before, after = read_checkpoint(starts[stage]), read_checkpoint(folder / "last.ckpt")  # memory-mapped
        moved = changed(before.state, after.state)
        assert moved
        assert all(belongs(stage, key) for key in moved)
        assert after.metadata["stage"] == stage
        if stage == "stage2_1":
            files["ckpt_for_stage2"].unlink()
