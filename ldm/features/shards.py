"""A shard: one safetensors file with the features of its items, stacked; one item is read from mapped pages.

``keys`` (N, 32) name the rows. Numbers are stored in float16 (see ``narrow``); of a soft mask the smallest rectangle
outside of which it is zero, as the levels of 255 that it has.
"""

import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.core.errors import FileError
from ldm.core.files import atomic_file

KEYS, BOXES, LEVELS = "keys", "mask_boxes", "mask_levels"  # tensors of a shard that are no features themselves
CHECKSUM = "crc32"


def narrow(value: Tensor) -> Tensor:
    """``value`` in float16, on the CPU; in float32 if float16, which ends at 65,504, cannot hold it.

    A step in bf16-mixed keeps 8 bits of what it reads, float16 has 11.
    """
    value = value.float().cpu()
    return value.half() if value.abs().max() <= torch.finfo(torch.float16).max else value


def write_shard(file: Path, rows: Mapping[bytes, Mapping[str, Tensor]]) -> None:
    """Write the features of each key atomically, in the order of ``rows``. All keys have the same features.

    Raises MedSoftError if the file cannot be written.
    """
    tensors = {KEYS: torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)}
    for name in next(iter(rows.values())):
        values = [row[name] for row in rows.values()]
        tensors.update(_packed(values) if name == "mask" else {name: torch.stack([narrow(each) for each in values])})
    with atomic_file(file) as handle:
        handle.write(save(tensors, metadata={CHECKSUM: str(_checksum(tensors))}))


def read_row(file: Path, row: int) -> dict[str, Tensor]:
    """The features in a row of a shard, in float32. SafetensorError or OSError for one that is damaged or gone."""
    state = file.stat()
    handle, names = _opened(file, state.st_size, state.st_mtime_ns)
    found = {name: handle.get_slice(name)[row].float() for name in names - {KEYS, BOXES, LEVELS}}
    if BOXES in names:
        begin, end, size, top, left, height, width = handle.get_slice(BOXES)[row].tolist()
        values = handle.get_slice(LEVELS)[begin:end]
        if end - begin == height * width:
            values = values.float() / 255
        else:
            values = values.clone().view(torch.float32)
        mask = torch.zeros(1, size, size)
        mask[0, top : top + height, left : left + width] = values.view(height, width)
        found["mask"] = mask
    return found


# Prompts lie in few shards, and so do the items of small data sets: a third of the time is opening.
@lru_cache(maxsize=16)
def _opened(file: Path, size: int, modified: int) -> tuple[Any, set[str]]:
    """A mapped shard and the names of its tensors. ``size`` and ``modified``: one that has changed is opened anew."""
    handle = safe_open(file, framework="pt")
    return handle, set(handle.keys())


def keys_of(file: Path) -> list[bytes] | None:
    """The keys of a shard's rows; None for one that is damaged or gone."""
    try:
        with safe_open(file, framework="pt") as handle:  # refuses a file whose length does not fit its header
            keys = handle.get_tensor(KEYS).numpy()
    except (SafetensorError, OSError):
        return None
    return [row.tobytes() for row in keys]


def fault_of(file: Path) -> str:
    """What is wrong with a shard, every byte of which is read, or ""; FileError for one that cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            stored = (handle.metadata() or {}).get(CHECKSUM)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return "" if stored == str(_checksum(tensors)) else "its checksum is wrong"
    except SafetensorError as error:
        return f"cut short or damaged ({error})"
    except OSError as error:
        raise FileError(
            file, f"could not be read ({error.strerror or error}); make it readable or delete it"
        ) from error


def _packed(masks: list[Tensor]) -> dict[str, Tensor]:
    """Soft masks (1, S, S) as rectangles: where each begins and ends among the levels, S, its place and size."""
    boxes, levels, begin = [], [], 0
    for mask in masks:
        values = mask[0].float().cpu()
        rows, columns = (values.any(axis).nonzero().flatten().tolist() or [0, -1] for axis in (1, 0))
        part = values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].contiguous()
        whole = (part * 255).round()
        exact = torch.equal(whole / 255, part)  # a mask with other values is kept in float32
        kept = whole.to(torch.uint8).flatten() if exact else part.flatten().view(torch.uint8)
        boxes.append([begin, begin + len(kept), len(values), rows[0], columns[0], *part.shape])
        levels.append(kept)
        begin += len(kept)
    return {BOXES: torch.tensor(boxes), LEVELS: torch.cat(levels)}


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().data, zlib.crc32(name.encode(), total))
    return total
