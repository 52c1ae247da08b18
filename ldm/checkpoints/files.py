"""Checkpoint files as files: told apart by their first bytes, searched for damage, written whole.

How pickles are read safely: ``ldm.checkpoints.pickles``. See docs/checkpoints.md.
"""

import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.core.errors import MedSoftError

PIECE = 1 << 22  # bytes read at once
LARGE = 1 << 28  # bytes from which reading is worth a progress bar
DIGEST, UNKNOWN_DIGEST = "medsoft_sha256", "0" * 64  # key in the metadata; its digits before they are known

SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def detect_format(path: Path) -> str:
    """zip, pickle (legacy) or safetensors, from the first bytes; anything else is a MedSoftError that names it."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(64)
    except FileNotFoundError as error:
        raise MedSoftError(f"{path}: this checkpoint does not exist") from error
    except IsADirectoryError as error:
        raise MedSoftError(f"{path}: expected a checkpoint file, found a folder") from error
    except OSError as error:
        raise MedSoftError(f"{path}: could not be read ({error.strerror or error})") from error
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if not head:
        kind = "an empty file (an interrupted download?)"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer, not the file itself; run `git lfs pull`"
    elif head.startswith(b"GGUF"):
        kind = "a GGUF file, whose weights are quantised"
    elif head.lstrip()[:1] == b"<":
        kind = "a web page; the download needs a login or another address"
    else:
        kind = f"bytes that start with {head[:8]!r}"
    raise MedSoftError(f"{path}: expected a checkpoint (.ckpt or .safetensors), found {kind}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Memory-mapped tensors and the metadata of a safetensors file; damage is a MedSoftError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise MedSoftError(
            f"{path}: damaged safetensors file ({_lengths(path)}{error}); copy or download it again"
        ) from error


def _lengths(path: Path) -> str:
    """How long a safetensors file is and should be, if its header still tells."""
    size = path.stat().st_size
    try:
        header, start = _safetensors_header(path)
        wanted = start + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{size} bytes; "
    return "" if size == wanted else f"{size} of {wanted} bytes; "


def verify(path: str | Path) -> str:
    """Read every byte of a checkpoint and compare it with what was recorded when it was written.

    Returns what was compared (one phrase). A zip file has a CRC-32 per record; our safetensors files have a SHA-256;
    legacy pickles and other programs' safetensors have nothing. Raises MedSoftError naming the damaged record.
    """
    path = Path(path)
    kind = detect_format(path)
    if kind == "zip":
        return _verify_zip(path)
    if kind == "safetensors":
        return _verify_safetensors(path)
    return "a legacy pickle records no checksum"


def _bar(label: str, total: int) -> tqdm:
    return tqdm(
        total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=None if total > LARGE else True
    )


def _verify_zip(path: Path) -> str:
    record = "its table of contents"
    try:
        with zipfile.ZipFile(path) as archive, _bar("checking", path.stat().st_size) as bar:
            for entry in archive.infolist():
                record = f"record {' '.join(entry.filename.split())}"  # damage may put line breaks there
                with archive.open(entry) as handle:
                    while piece := handle.read(PIECE):
                        bar.update(len(piece))
            return f"CRC-32 of {len(archive.infolist())} records"
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:  # "encrypted" too
        raise MedSoftError(f"{path}: damaged, {record} ({error}); copy or download it again") from error


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset at which the tensors' bytes begin."""
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return json.loads(handle.read(length)), 8 + length


def _verify_safetensors(path: Path) -> str:
    _, metadata = read_safetensors(path)
    recorded = metadata.get(DIGEST)
    if recorded is None:
        return "no checksum is recorded in it"
    _, start = _safetensors_header(path)
    digest = hashlib.sha256()
    with open(path, "rb") as handle, _bar("checking", path.stat().st_size) as bar:
        digest.update(handle.read(start).replace(recorded.encode(), UNKNOWN_DIGEST.encode(), 1))
        while piece := handle.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != recorded:
        raise MedSoftError(
            f"{path}: damaged, its SHA-256 is {digest.hexdigest()[:12]}..., recorded when it was written: "
            f"{recorded[:12]}...; copy it again or make it again"
        )
    return "SHA-256 of the whole file"


def save_pickle(content: Any, handle: BinaryIO) -> None:
    """``torch.save`` in which a full disk or an interruption stays what it is (torch makes a RuntimeError of it)."""
    try:
        torch.save(content, handle)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError | KeyboardInterrupt | SystemExit):
            raise error.__context__ from None
        raise


def save_safetensors(state: dict[str, Tensor], metadata: dict[str, str], handle: BinaryIO) -> None:
    """Write a safetensors file tensor by tensor, never holding more than one of them in memory beside ``state``.

    ``medsoft_sha256`` is added to ``metadata``: the SHA-256 of the whole file with those 64 digits replaced by zeros.
    It covers names, shapes, metadata and tensors. The library's own writers record no checksum.
    """
    order = sorted(state, key=lambda key: -state[key].element_size())  # keeps every tensor aligned to its type
    header: dict[str, Any] = {"__metadata__": {DIGEST: UNKNOWN_DIGEST, **metadata}}
    end = 0
    for key in order:
        tensor = state[key]
        if tensor.dtype not in SAFETENSORS_TYPES:
            raise MedSoftError(f"{key}: a .safetensors file cannot hold {tensor.dtype}; write a .ckpt instead")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": SAFETENSORS_TYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    handle.write(head)
    with _bar("writing", end) as bar:
        for key in order:
            piece = state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            handle.write(piece)
            digest.update(piece)
            bar.update(len(piece))
    handle.seek(head.index(UNKNOWN_DIGEST.encode()))
    handle.write(digest.hexdigest().encode())
