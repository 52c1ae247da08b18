"""A hundred thousand images are no reason for a gigabyte of memory: the classifier and the evaluation.

Every day it is looked at where the images lie; what processes hold is measured in ``make test-full``: between two runs
of the same it differs by tens of megabytes, so that only thousands of samples tell.
"""

import dataclasses
import json
import mmap
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import tiny
from toy import make_set

from ldm.classifier.config import load_classifier_config
from ldm.classifier.data import load_data
from ldm.config import load_config
from ldm.data.annotations import load_samples, write_annotations
from ldm.evaluation.lesions import ROWS, read_lesions
from ldm.networks.opening import open_encoder
from ldm.phantom.dataset import write_dataset

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what is resident from /proc")

MANY, LIMIT = 100_000, 0.6e9  # bytes, beside what libraries, networks and one batch take


def in_a_file(array: np.ndarray) -> bool:
    """Whether an array is a view of a mapped file."""
    base: object = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return isinstance(base, mmap.mmap)


@pytest.mark.parametrize("task", ["binary", "segment"])
def test_the_classifiers_images_lie_in_files(tmp_path: Path, task: str) -> None:
    for name, seed in (("train", 3), ("val", 4)):
        make_set(tmp_path / name, name, 6, seed)
    settings = {"train_json": str(tmp_path / "train"), "val_json": str(tmp_path / "val"), "task": task}
    settings |= {"use_synthetic": "duplicate_real", "ratio": 1, "output_dir": str(tmp_path / "out")}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    data = load_data(load_classifier_config(tmp_path / "args.json"))
    for images in (data.train, data.val, data.duplicates):
        assert images is not None
        assert (images.masks is not None) == (task == "segment")
        squares = [each for each in (images.images, images.masks) if each is not None]
        assert all(in_a_file(array) for each in squares for array in each.arrays)


def test_the_evaluations_lesions_lie_in_files(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", 11, 0, 3)
    config = load_config(tiny.PHANTOM, [f"biomedclip.path={tiny.CLIP}"])
    samples, encoder = load_samples(tmp_path / "data")[0], open_encoder(config.biomedclip)
    lesions, _ = read_lesions(samples, config.data, encoder, tmp_path / "out", "real")
    assert len(lesions) == 3
    assert {name: in_a_file(array) for name, array in lesions[0].rows.items()} == dict.fromkeys(ROWS, True)


MEASURED = """
import ctypes, json, sys, threading, time
from pathlib import Path
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-3, 65536), libc.mallopt(-1, 0)  # glibc gives back what is freed: what is in use is measured
peak = 0
def watch():
    global peak
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
"""


def peak_of(code: str, *words: object) -> int:
    """The most memory of its own that a process has, in bytes, while it runs ``code`` with these words."""
    done = children.run("-c", f"{MEASURED}{code}\nprint(peak)", *words, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def of_many(peaks: dict[int, int]) -> float:
    """The memory of MANY samples, in bytes, from the peaks with fewer and with more of them."""
    (few, least), (more, most) = sorted(peaks.items())
    return (most - least) / (more - few) * MANY


def repeated(folder: Path, output: Path, count: int, **about: Any) -> Path:
    """An annotation file of ``count`` samples, which are those of a folder again and again under other names."""
    known = load_samples(folder)[0]
    samples = [known[k % len(known)] for k in range(count)]
    names = (f"{output.stem}{number:06d}" for number in range(count))
    write_annotations(
        output,
        [
            dataclasses.replace(s, sample_id=name, patient_id=f"{name[:-1]}p", **about)
            for s, name in zip(samples, names, strict=True)
        ],
    )
    return output


USE = """
from ldm.classifier.config import load_classifier_config
from ldm.classifier.data import load_data
from ldm.classifier.training import epoch_batches, make_phases
config = load_classifier_config(sys.argv[1])
(phase,) = make_phases(config, load_data(config))
for rows, _ in epoch_batches(phase, 1, config):
    phase.images[rows].sum(), phase.masks and phase.masks[rows].sum()
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("task", ["binary", "segment"])
def test_the_classifier_keeps_no_images_in_memory(tmp_path: Path, task: str) -> None:
    for name, seed in (("train", 3), ("val", 4)):
        make_set(tmp_path / name, name, 20, seed)
    peaks = {}
    for count in (2000, 12_000):
        train = repeated(tmp_path / "train", tmp_path / f"train_{count}.jsonl", count)
        settings = {"train_json": str(train), "val_json": str(tmp_path / "val"), "task": task, "img_size": 224}
        (tmp_path / "args.json").write_text(json.dumps(settings | {"output_dir": str(tmp_path / "out")}))
        peaks[count] = peak_of(USE, tmp_path / "args.json")
    assert of_many(peaks) < LIMIT


EVALUATE = """
from tool import evaluate
assert evaluate.main(evaluate.build_parser().parse_args(sys.argv[1:])) == 3  # all are copies of each other
"""


@needs_proc
@pytest.mark.slow
def test_the_evaluation_keeps_no_lesions_in_memory(tmp_path: Path) -> None:
    write_dataset(tmp_path / "real", 11, 0, 20)
    write_dataset(tmp_path / "others", 12, 0, 20)
    peaks = {}
    for count in (4000, 14_000):  # from 4000 on the matrix of all pairs is made in parts
        drawn = repeated(tmp_path / "others", tmp_path / f"drawn_{count}.jsonl", count // 2, synthetic=True)
        train = repeated(tmp_path / "others", tmp_path / f"train_{count}.jsonl", count // 2)
        flags = ["--config", tiny.PHANTOM, "--biomedclip", tiny.CLIP, "--train_json", train]
        peaks[count] = peak_of(EVALUATE, tmp_path / "real", drawn, "--output_dir", tmp_path / f"out_{count}", *flags)
        assert not list((tmp_path / f"out_{count}").glob(".partial-*"))
    assert of_many(peaks) < LIMIT
