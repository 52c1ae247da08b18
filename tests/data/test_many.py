"""Data sets of many samples: each file is opened and decoded once, by several processes with the same result."""

import builtins
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import ver_openImagesDatasets as prepare
from ldm.core import threads
from ldm.data.annotations import load_samples
from ldm.data.png import encode_png
from ldm.doctor.datasets import check_data, inspect_data

Write = Callable[..., Path]
ROOT = Path(prepare.__file__).parent


def write_many(folder: Path, count: int) -> Path:
    """``count`` tiny samples of 5 each a patient, one of them damaged, some with a label map and a soft mask."""
    rng = np.random.default_rng(0)
    mask, labels = np.zeros((2, 16, 16), np.uint8)
    mask[4:9, 5:11], labels[2:13, 3:13] = 255, 1
    for number in range(count):
        place = folder / f"s{number:05d}"
        place.mkdir(parents=True)
        (place / "image.png").write_bytes(encode_png(rng.integers(20, 230, (16, 16), dtype=np.uint8)))
        (place / "mask.png").write_bytes(encode_png(mask))
        (place / "prompt.txt").write_text("lytic lesion" if number % 2 else "healthy")
        (place / "meta.json").write_text(json.dumps({"patient_id": f"p{number // 5}"}))
        if number % 3 == 0:
            (place / "anatomy.png").write_bytes(encode_png(labels))
        if number % 6 == 1:
            (place / "soft_mask.png").write_bytes(encode_png(mask))
    (folder / "s00007" / "mask.png").write_bytes(b"")
    return folder


class Opened:
    """How often each file below a folder was opened, and how many images were decoded."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.files: Counter[str] = Counter()
        self.decoded = 0
        real, load, decode = io.open, Image.open, cv2.imdecode

        def opening(file: Any, *more: Any, **named: Any) -> Any:
            if str(file).startswith(str(folder)):
                self.files[str(file)] += 1
            return real(file, *more, **named)

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def decoding(*given: Any, **named: Any) -> Any:
                self.decoded += 1
                return function(*given, **named)

            return decoding

        patch.setattr(io, "open", opening)
        patch.setattr(builtins, "open", opening)
        patch.setattr(Image, "open", counting(load))
        patch.setattr(cv2, "imdecode", counting(decode))


def test_preparation_opens_and_decodes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_many(tmp_path / "data", 30)
    seen = Opened(data, monkeypatch)
    flags = ["--root_dir", str(data), "--output_file", str(tmp_path / "o.jsonl")]
    assert prepare.main(prepare.build_parser().parse_args(flags)) == 3
    after = data / "s00007" / "soft_mask.png"  # of what made its sample a reject
    files = [str(path) for path in data.rglob("*") if path.is_file() and path != after]
    assert seen.files == Counter(files)
    assert seen.decoded == sum(path.endswith(".png") for path in files) - 1  # but for the empty one


@pytest.mark.parametrize("kind", ["folder", "annotations"])
def test_the_doctor_decodes_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = write_many(tmp_path / "data", 30)
    source = data
    if kind == "annotations":
        source = tmp_path / "o.jsonl"
        prepare.main(prepare.build_parser().parse_args(["--root_dir", str(data), "--output_file", str(source)]))
    seen = Opened(data, monkeypatch)
    sets = {"data": source}
    found, faults = inspect_data(sets, 1, tmp_path / "overlays.html")
    faults += check_data(sets, found)
    assert len(found["data"].samples) == 29
    assert (tmp_path / "overlays.html").exists()
    images = [path for path in data.rglob("*.png") if path.parent.name != "s00007"]
    rejected = [data / "s00007" / "image.png"] if kind == "folder" else []  # it is read before its mask is
    assert seen.decoded == len([*images, *rejected])
    assert len([fault for fault in faults if fault.level == "sample"]) == len(rejected)


def test_processes_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_many(tmp_path / "data", 60)
    written = []
    for name, few in (("one", 1000), ("several", 10)):
        monkeypatch.setattr(threads, "FEW", few)
        monkeypatch.setattr(threads, "cores", lambda: 2)
        for kind in ("json", "jsonl"):
            flags = ["--root_dir", str(data), "--output_file", str(tmp_path / name / f"o.{kind}")]
            assert prepare.main(prepare.build_parser().parse_args(flags)) == 3
        sets = {"data": data, "train": tmp_path / name / "o_train.jsonl"}
        found, faults = inspect_data(sets, 2, tmp_path / name / "overlays.html")
        faults += check_data(sets, found)
        said = [str(fault).replace(f"/{name}/", "/") for fault in faults]
        written.append((said, {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}))
    assert written[0] == written[1]


def left_of(group: int) -> list[str]:
    """The processes of a group that still run."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted; run the same command again to go on\n"), (signal.SIGTERM, 143, "")],
)
def test_a_signal_ends_all_processes_and_writes_nothing(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    """As a terminal or a cluster does it: every process of the job is signalled."""
    data = write_many(tmp_path / "data", 40)
    script = tmp_path / "many.py"
    script.write_text(
        "import time\n"
        "import ver_openImagesDatasets as prepare\n"
        "from ldm.core import cli, threads\n"
        "from ldm.data import folders\n"
        "before = folders.decode_sample\n"
        "def slow(*given):\n"
        f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "    time.sleep(0.5)\n"
        "    return before(*given)\n"
        "folders.decode_sample = slow\n"  # in the other processes too, which import this file
        "threads.FEW, threads.CHUNK = 10, 2\n"  # what a process has begun, it ends
        "threads.cores = lambda: 2\n"
        "if __name__ == '__main__':\n"
        "    import signal\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the shell of a background job has it ignored
        "    cli.run(prepare.build_parser(), prepare.main)\n"
    )
    command = [sys.executable, str(script), "--root_dir", str(data), "--output_file", str(tmp_path / "o.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=120)[1]
    assert (process.returncode, errors) == (code, said)
    assert not (tmp_path / "o.json").exists()
    for _ in range(200):  # the process that watches over semaphores is the last one to end
        if not left_of(process.pid):
            break
        time.sleep(0.1)
    assert not left_of(process.pid)


def test_samples_of_an_annotation_file_share_what_they_have_in_common(tmp_path: Path) -> None:
    data = write_many(tmp_path / "data", 30)
    for kind in ("json", "jsonl"):
        output = tmp_path / f"o.{kind}"
        prepare.main(prepare.build_parser().parse_args(["--root_dir", str(data), "--output_file", str(output)]))
        samples = load_samples(output)[0]
        assert len({id(sample.prompt) for sample in samples}) == 2
        assert len({id(sample.meta) for sample in samples}) == 1
        assert not hasattr(samples[0], "__dict__")
