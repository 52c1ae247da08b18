"""Memory of a run at true size whose items are more than one batch of features; only in ``make test-full``.

About 11 GB of memory, 10 GB of disk and ten minutes on one free core. With TRUE_SIZE_ITEMS=64 in the environment there
are 64 items instead of three, which takes half an hour.
"""

import os
import re
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from test_true_size_training import SMALL, samples, starting_files
from tiny import MODELS, ROOT

from ldm.data.annotations import load_samples, write_annotations
from ldm.features.shards import keys_of

GIB = 2**30
LIBRARIES = 0.5 * GIB  # docs/memory.md
ITEMS = int(os.environ.get("TRUE_SIZE_ITEMS", "3"))


def peaks(log: Path, *command: object) -> dict[str, float]:
    """The most bytes that a command, which must succeed, held in memory: of its own, and with pages of mapped files."""
    found = dict.fromkeys(("RssAnon", "VmHWM"), 0)
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, *map(str, command)], stderr=stream, stdout=stream)
    while True:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = max(found[name], int(value.split()[0]) * 1024)
        ended, status, _ = os.wait4(process.pid, os.WNOHANG)
        if ended:
            assert status == 0, log.read_text()
            return found
        time.sleep(0.02)


@pytest.mark.slow
def test_unet_only_stays_within_its_estimate(tmp_path: Path) -> None:
    """Features of all items, two at a time, then an epoch; the last item validates."""
    making = get_context("spawn").Process(target=starting_files, args=(tmp_path,))
    making.start()
    making.join()
    assert making.exitcode == 0
    samples(tmp_path / "data", ITEMS)
    found = load_samples(tmp_path / "data")[0]
    write_annotations(tmp_path / "train.json", found[:-1])
    write_annotations(tmp_path / "val.json", found[-1:])
    converted = tmp_path / "ckpt_for_stage1.ckpt"
    flags = ["--input_path", tmp_path / "sd-v1-5-inpainting.ckpt", "--output_path", converted]
    peaks(tmp_path / "log", ROOT / "tool" / "model_convert.py", *flags, "--config", MODELS / "mldm_v15.yaml")
    flags = ["--ckpt", converted, "--config", MODELS / "mldm_v15_unet_only.yaml", "--save_path", tmp_path / "run"]
    flags += [
        "--train_json",
        tmp_path / "train.json",
        "--val_json",
        tmp_path / "val.json",
        "--cache_dir",
        tmp_path / "c",
    ]
    flags += ["--biomedclip", tmp_path / "biomedclip", "--batch_size", 1]
    settings = [each for each in SMALL if "checkpointing" not in each]
    measured = peaks(tmp_path / "log", ROOT / "ver_train.py", *flags, *settings)
    said = (tmp_path / "log").read_text()
    step = float(re.search(r"memory on cpu: about ([\d.]+) GiB", said)[1])
    features = float(re.search(r"memory for features, before: about ([\d.]+) GiB", said)[1])
    assert sum(len(keys_of(file)) for file in (tmp_path / "c").glob("*-latents-*")) == ITEMS
    estimate = max(step, features) * GIB + LIBRARIES
    shown = {name: f"{value / GIB:.2f}" for name, value in measured.items()}
    print(f"\nstep {step}, features {features}, with libraries {estimate / GIB:.2f} GiB; measured {shown}")
    assert measured["RssAnon"] == pytest.approx(estimate, rel=0.15)
    assert measured["VmHWM"] < 10 * GIB
