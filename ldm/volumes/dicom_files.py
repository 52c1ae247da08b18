"""DICOM files opened and their pixels decoded. Every fault is a FileError that names the file.

pydicom's plugins decode. Its first choice, GDCM, ends the whole process where bytes are damaged: what others decode is
given to them, which is faster for JPEG 2000, too; and JPEG lossless, which GDCM alone decodes, goes to a process of its
own that may end.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, iter_pixels
from pydicom.uid import UID

from ldm.core.errors import FileError, MedSoftError, first_line, reading_fault

PLUGINS = {
    **dict.fromkeys(pydicom.uid.JPEG2000TransferSyntaxes, "pylibjpeg"),
    **dict.fromkeys(pydicom.uid.JPEGLSTransferSyntaxes, "pyjpegls"),
    pydicom.uid.RLELossless: "pydicom",
    pydicom.uid.JPEGBaseline8Bit: "pillow",
}
APART = (pydicom.uid.JPEGLossless, pydicom.uid.JPEGLosslessSV1)  # decoded in a process of their own
CRASHED = "its pixels are damaged: GDCM, which decodes them, crashed; copy the file again"
RAW = "convert it to an uncompressed transfer syntax first, for example with gdcmconv --raw IN OUT"


@contextmanager
def told(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a FileError: pydicom raises dozens of kinds where bytes are damaged."""
    try:
        yield
    except MedSoftError:
        raise
    except InvalidDicomError:
        raise FileError(path, "it is not a DICOM file (no DICM at byte 128, and no image or object in it)") from None
    except EOFError:
        raise FileError(path, "the file is truncated; copy it again") from None
    except OSError as error:
        raise FileError(path, error.strerror or f"{what} ({first_line(error)})") from error
    except Exception as error:
        raise FileError(path, reading_fault(error, what)) from error


def open_file(path: Path, *, pixels: bool) -> Dataset:
    """The data set of a DICOM file, with or without its pixels. Files without a preamble are read, too."""
    with told(path, "it is no sound DICOM file"), path.open("rb") as file:
        marked = file.read(132)[128:] == b"DICM"
        file.seek(0)
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels, force=not marked)
        if not marked and "SOPClassUID" not in dataset and "Rows" not in dataset:
            raise InvalidDicomError
        return dataset


def readable(dataset: Dataset) -> Iterator[DataElement]:
    """The elements of a data set without those whose value their type cannot have (half a number)."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception:  # pydicom raises many kinds
            continue
        yield element


def transfer_syntax(path: Path, dataset: Dataset) -> UID:
    """The file's transfer syntax, for files without one as they were read; refused where no package decodes it."""
    meta = getattr(dataset, "file_meta", None) or Dataset()
    uid = meta.get("TransferSyntaxUID")
    if not uid:
        implicit, little = dataset.original_encoding
        uid = pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        uid = pydicom.uid.ImplicitVRLittleEndian if implicit else uid
    if uid == pydicom.uid.DeflatedExplicitVRLittleEndian:
        return uid
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        name = f"{uid.name} ({uid})" if uid.name != uid else f"{uid}"
        raise FileError(path, f"unknown transfer syntax {name}: no installed package decodes it; {RAW}") from None
    if not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise FileError(path, f"transfer syntax {uid.name} ({uid}): the package that decodes it is missing: {missing}")
    return uid


def decode(path: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The stored values (rows, columns) of some frames of one file, in this process."""
    with told(path, "its header is damaged"):
        dataset = open_file(path, pixels=True)
        uid = transfer_syntax(path, dataset)
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise FileError(path, "it has no pixels (no Pixel Data element); is it a header only, or no image?")
        dataset.file_meta.TransferSyntaxUID = uid
    decoded = iter_pixels(dataset, indices=list(indices), decoding_plugin=PLUGINS.get(uid, ""))
    for _ in indices:
        try:
            values = next(decoded)
        except MemoryError as error:
            raise FileError(path, reading_fault(error, "")) from error
        except Exception as error:  # decoders raise whatever they like
            raise FileError(path, _undecodable(uid, first_line(error))) from error
        yield values


class Decoder:
    """Decodes files, those of APART in another process, which is started where it is needed and lasts for all files."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def frames(self, path: Path, syntax: UID, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The stored values (rows, columns) of some frames of one file."""
        return self._apart(path, indices) if syntax in APART else decode(path, indices)

    def _apart(self, path: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
        if self.process is None:
            command = [sys.executable, "-P", "-c", "from ldm.volumes.dicom_files import serve; serve()"]
            found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, env=found)
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None  # Both are pipes; the library's annotations do not say so.
        assert answers is not None
        with told(path, CRASHED):
            requests.write(json.dumps([str(path), list(indices)]).encode() + b"\n")
            requests.flush()
        for _ in indices:
            with told(path, CRASHED):
                answer = json.loads(answers.readline())
                if len(answer) == 1:
                    raise FileError(path, answer[0])
                kind, shape, size = answer
                values = np.frombuffer(answers.read(size), kind).reshape(shape)
            yield values


def serve() -> None:
    """What the other process does: answer each request (path, indices) on stdin with frames or a reason on stdout.

    A frame is a line of JSON (type, shape, bytes) and its bytes; a reason, a line with one text, ends an answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent, which closes stdin
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin.buffer:
        path, indices = json.loads(line)
        try:
            for values in decode(Path(path), indices):
                answers.write(json.dumps([values.dtype.str, values.shape, values.nbytes]).encode() + b"\n")
                answers.write(np.ascontiguousarray(values).data)
                answers.flush()
        except FileError as error:
            answers.write(json.dumps([error.reason]).encode() + b"\n")
            answers.flush()


def _undecodable(uid: UID, reason: str) -> str:
    if uid == pydicom.uid.JPEGExtended12Bit:
        return (
            f"transfer syntax {uid.name} ({uid}) with 12 bits: only pylibjpeg-libjpeg decodes it, whose licence "
            f"is the GPL, so that it is no part of the extra dicom: run pip install pylibjpeg-libjpeg, or {RAW}"
        )
    if not uid.is_compressed or "no frame data" in reason or "end of" in reason:
        return f"the file is truncated or its header is wrong ({reason}); copy it again"
    return f"its pixels cannot be decoded, it may be truncated (transfer syntax {uid.name}: {reason})"
