"""Import of DICOM series: slices a second and memory of tool/import_volumes.py, for files that are made for it.

Every slice becomes a sample: read, cut in the acquired plane, written as 16-bit PNG. The command runs as users run it,
with its start, its checks and its sheets.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from ldm.bench.common import BenchOptions, this_machine
from ldm.core.errors import MedSoftError
from ldm.core.paths import SHIPPED
from ldm.core.tables import markdown_head, markdown_row

log = logging.getLogger("bench")

PATIENTS, SLICES, SIDE = 20, 50, 512
SYNTAXES = {"uncompressed": ExplicitVRLittleEndian, "JPEG 2000, lossless": JPEG2000Lossless}
EVERY = 0.25  # seconds between looks at the memory


def main(options: BenchOptions) -> dict[str, Any]:
    """Log the Markdown table; returns the numbers for JSON."""
    name = this_machine()[1].partition(",")[0]
    results = []
    log.info("%s", markdown_head(("files", "slices", "seconds", "slices a second", "memory, GB")))
    for title, syntax in SYNTAXES.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_patients(Path(scratch) / "scans", syntax)
            seconds, memory = timed(Path(scratch) / "scans", Path(scratch) / "data")
        number = PATIENTS * SLICES
        results.append({"files": title, "slices": number, "seconds": seconds, "memory": memory})
        shown = f"{seconds:.1f}", f"{number / seconds:.0f}", f"{memory / 1e9:.2f}" if memory else "unknown"
        log.info("%s", markdown_row((title, number, *shown)))
    log.info("%d patients, %d slices of %d x %d each; all processes together (%s)", PATIENTS, SLICES, SIDE, SIDE, name)
    return {"where": name, "measured": results}


def write_patients(folder: Path, syntax: pydicom.uid.UID) -> None:
    """CT series of 12 bits: soft tissue with noise in air, a denser spine. The patients share their pixels."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    body, spine = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, x**2 + (y - 0.25) ** 2 < 0.01
    rng = np.random.default_rng(0)
    slices = []
    for _ in range(SLICES):
        values = 24 + 1050 * body + 300 * spine + rng.normal(0, 15, (SIDE, SIDE)) * body
        slices.append(_slice(values.clip(0, 4095).astype(np.uint16), syntax))
    for patient in range(PATIENTS):
        place = folder / f"patient_{patient:02d}"
        place.mkdir(parents=True)
        series, study = generate_uid(), generate_uid()
        for number, dataset in enumerate(slices):
            dataset.PatientID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"ID {patient}", series, study
            dataset.SOPInstanceUID, dataset.InstanceNumber = generate_uid(), number
            dataset.ImagePositionPatient = [0, 0, 2 * number]
            dataset.save_as(place / f"{number:03d}.dcm", enforce_file_format=True)


def _slice(pixels: np.ndarray, syntax: pydicom.uid.UID) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CTImageStorage, generate_uid(), "CT"
    dataset.ImageOrientationPatient, dataset.PixelSpacing, dataset.SliceThickness = [1, 0, 0, 0, 1, 0], [0.7, 0.7], 2
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax.is_compressed:
        with _silent():
            dataset.compress(syntax)
    return dataset


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the encoder prints for every image, past Python."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def timed(source: Path, output: Path) -> tuple[float, int]:
    """Seconds of the command, and the most bytes that its processes held together (0 where that is not known)."""
    flags = ["--plane", "axial", "--slices", "all", "--output_dir", str(output)]
    command = [sys.executable, str(SHIPPED / "tool" / "import_volumes.py"), str(source), *flags]
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, held(process.pid))
            time.sleep(EVERY)
        seconds = time.perf_counter() - start
        said = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise MedSoftError(f"tool/import_volumes.py ended with exit code {process.returncode}: {said.strip()[-300:]}")
    return seconds, most


def held(pid: int) -> int:
    """Bytes of a process and its children that are in memory, as Linux counts them; 0 elsewhere."""
    folder = Path("/proc") / str(pid)
    try:
        fields = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
        own = 1024 * int(fields["Pss"].split()[0])  # what processes share is counted once
        children = (folder / "task" / str(pid) / "children").read_text().split()
    except (OSError, KeyError):  # it has just ended
        return 0
    return own + sum(held(int(child)) for child in children)
