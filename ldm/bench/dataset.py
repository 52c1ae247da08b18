"""Many samples: seconds of CPU and memory of preparation, tool/doctor.py and the reading of annotation files.

The samples are tiny (24 x 24 pixels), so what is measured is the work beside the pixels. The commands run as users run
them, with their start. Seconds of CPU are those of all processes of a command; memory is that of its largest process.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bench.common import BenchOptions, this_machine
from ldm.core.errors import MedSoftError
from ldm.core.paths import SHIPPED
from ldm.core.tables import markdown_head, markdown_row
from ldm.data.png import encode_png

log = logging.getLogger("bench")

SIDE, OF_A_PATIENT = 24, 4
LOAD = "import sys; from ldm.data.annotations import load_samples; load_samples(sys.argv[1])"
# Runs a command and prints the seconds of CPU of all its processes and the bytes of the largest one.
WATCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stderr[-300:], used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


def main(options: BenchOptions) -> dict[str, Any]:
    """Log the Markdown table; returns the numbers for JSON."""
    machine = this_machine()[1]
    rows = []
    log.info("%s", markdown_head(("of samples", "what", "CPU seconds", "memory, MB")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_samples(folder / "data", options.samples)
        for what, command in commands(folder).items():
            seconds, memory = measured(command)
            rows.append({"what": what, "samples": options.samples, "cpu_seconds": seconds, "bytes": memory})
            log.info("%s", markdown_row((options.samples, what, f"{seconds:.1f}", f"{memory / 1e6:.0f}")))
    log.info("%d samples of %d x %d pixels (%s)", options.samples, SIDE, SIDE, machine)
    return {"where": machine, "measured": rows}


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured, in this order, on the samples below ``folder``."""
    prepare = [str(SHIPPED / "ver_openImagesDatasets.py"), "--root_dir", str(folder / "data"), "--output_file"]
    parts = [word for part in ("train", "val", "test") for word in (f"--{part}_json", str(folder / f"o_{part}.jsonl"))]
    doctor = [str(SHIPPED / "tool" / "doctor.py"), *parts, "--overlays", str(folder / "overlays.html")]
    return {
        "prepare, JSON": [*prepare, str(folder / "json" / "o.json")],
        "prepare, JSON Lines": [*prepare, str(folder / "o.jsonl")],
        "read, JSON": ["-c", LOAD, str(folder / "json" / "o.json")],
        "read, JSON Lines": ["-c", LOAD, str(folder / "o.jsonl")],
        "doctor": doctor,
    }


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds of CPU of a Python command's processes, and the most bytes that one of them held."""
    environment = os.environ | {"PYTHONPATH": str(SHIPPED)}
    watched = [sys.executable, "-c", WATCH, sys.executable, *command]
    done = subprocess.run(watched, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    code, said, seconds, memory = json.loads(done.stdout)
    if code:
        raise MedSoftError(f"{command[0]} ended with exit code {code}: {said.strip()}")
    return seconds, memory * (1 if sys.platform == "darwin" else 1024)


def write_tiny_samples(folder: Path, count: int) -> None:
    """``count`` sample folders, half of them with a lesion, four of a patient."""
    rng = np.random.default_rng(0)
    for number in range(count):
        patient, diseased = f"p{number // OF_A_PATIENT:06d}", number % 2 == 1
        place = folder / patient / f"s{number:06d}"
        place.mkdir(parents=True)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        row, column = rng.integers(4, 12, 2)
        mask[row : row + 8, column : column + 8] = 255
        meta: dict[str, Any] = {"patient_id": patient, "level": f"L{1 + number % 5}", "spacing_mm": [1.0, 1.0]}
        prompt = "healthy"
        if diseased:
            meta["lesion_type"] = ("lytic", "blastic", "mixed")[number % 3]
            prompt = f"{meta['lesion_type']} lesion in the vertebral body"
        (place / "image.png").write_bytes(encode_png(rng.integers(20, 230, (SIDE, SIDE), dtype=np.uint8)))
        (place / "mask.png").write_bytes(encode_png(mask))
        (place / "prompt.txt").write_text(prompt, encoding="utf-8")
        (place / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
