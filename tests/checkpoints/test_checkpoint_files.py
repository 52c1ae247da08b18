"""Checkpoint files as files: safe reading, damage, writing; through ldm.checkpoints.checkpoint and the commands."""

import builtins
import hashlib
import io
import json
import os
import re
import resource
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SD, convert

from ldm.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from ldm.checkpoints.files import save_pickle, verify
from ldm.core.cli import Terminated
from ldm.core.errors import MedSoftError

STATE = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "brain": torch.arange(4, dtype=torch.bfloat16),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "count": torch.tensor(7),
    "flag": torch.tensor([True, False]),
    "nothing": torch.empty(0, 3),
    "position_ids": torch.arange(77)[None],
}


def flip(path: Path, offset: int) -> None:
    """Turns over one bit of a file."""
    with open(path, "r+b") as handle:
        handle.seek(offset)
        (byte,) = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte ^ 16]))


def flip_in_record(path: Path, ending: str) -> str:
    """Turns over one bit in the data of a zip record; returns the record's name."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith(ending)]
        content = archive.read(entry)
    flip(path, path.read_bytes().index(content) + len(content) // 2)
    return entry.filename


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_file_for_which_memory_is_short_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "whole.ckpt")

    def load(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MedSoftError, match=r"whole\.ckpt: there is too little memory to read it \(\[enforce fail"):
        read_checkpoint(tmp_path / "whole.ckpt")


def test_record_marked_as_encrypted_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 8] |= 1  # the flag in the table of contents
    path.write_bytes(content)
    with pytest.raises(MedSoftError, match=r"a\.ckpt: damaged, record .*encrypted"):
        verify(path)


def test_keys_that_are_no_names_are_no_tensors_of_ours(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2), "a": torch.ones(3), "global_step": 7.5}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert list(found.state) == ["a"]
    assert found.parts() == []
    assert found.step is None


def test_flipped_bit_in_a_tensor_is_found_and_named(tmp_path: Path) -> None:
    """torch.load reads such a file without a word: the CRC is looked at in conversion."""
    bad = tmp_path / "in.ckpt"
    bad.write_bytes(SD.read_bytes())
    assert verify(bad) == "CRC-32 of 440 records"
    record = flip_in_record(bad, "/data/17")
    assert torch.load(bad, weights_only=True)
    with pytest.raises(MedSoftError, match=rf"in\.ckpt: damaged, record {re.escape(record)} \(Bad CRC-32"):
        convert(bad, tmp_path / "out.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["in.ckpt"]


def test_our_safetensors_record_their_sha256(tmp_path: Path) -> None:
    """As docs/checkpoints.md defines it: over the whole file, its own 64 digits taken as zeros."""
    path = tmp_path / "out.safetensors"
    write_checkpoint(path, STATE, {"stage": "converted"})
    content = path.read_bytes()
    (digest,) = re.findall(rb'"medsoft_sha256":"([0-9a-f]{64})"', content)
    assert hashlib.sha256(content.replace(digest, b"0" * 64)).hexdigest().encode() == digest
    assert verify(path) == "SHA-256 of the whole file"


@pytest.mark.parametrize("place", ["tensor", "name", "metadata"])
def test_flipped_bit_in_safetensors_is_found(tmp_path: Path, place: str) -> None:
    path = tmp_path / "out.safetensors"
    write_checkpoint(path, STATE, {"stage": "converted"})
    content = path.read_bytes()
    flip(
        path,
        {"tensor": len(content) - 9, "name": content.index(b"half"), "metadata": content.index(b"onverted")}[place],
    )
    assert read_checkpoint(path).state  # nothing else notices
    with pytest.raises(
        MedSoftError, match=r"out\.safetensors: damaged, its SHA-256 is .* recorded when it was written"
    ):
        verify(path)


def test_safetensors_of_others_have_no_checksum(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert verify(tmp_path / "a.safetensors") == "no checksum is recorded in it"


def test_truncated_safetensors_tell_both_lengths(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    whole = path.stat().st_size
    os.truncate(path, whole - 1000)
    with pytest.raises(MedSoftError, match=rf"damaged safetensors file \({whole - 1000} of {whole} bytes; "):
        read_checkpoint(path)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/model.ckpt", b"x")


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/x.py"):
            archive.writestr(name, b"x")


ARCHIVES = {"zip archive that is not a checkpoint": other_zip, "TorchScript archive": torchscript}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_other_archives_are_named(tmp_path: Path, kind: str) -> None:
    ARCHIVES[kind](tmp_path / "in.ckpt")
    with pytest.raises(MedSoftError, match=rf"in\.ckpt: a {kind}"):
        read_checkpoint(tmp_path / "in.ckpt")


FORMS = {
    "ckpt": lambda path: write_checkpoint(path, STATE, {"stage": "x"}),
    "safetensors": lambda path: write_checkpoint(path.with_suffix(".safetensors"), STATE, {"stage": "x"}),
    "legacy": lambda path: torch.save(
        {"a": torch.ones(3), "b": np.float64(1)}, path, _use_new_zipfile_serialization=False
    ),
    "with numpy": lambda path: torch.save({"a": torch.ones(3), "b": np.float64(1)}, path),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", FORMS)
def test_any_damage_is_an_error_of_ours(tmp_path: Path, form: str) -> None:
    """A hundred files with changed or missing bytes each: read, or refused in one line; never another exception."""
    path = tmp_path / "a.ckpt"
    FORMS[form](path)
    whole = next(tmp_path.iterdir()).read_bytes()
    random, messages = np.random.default_rng(0), []
    for _ in range(100):
        content = bytearray(whole)
        if random.random() < 0.2:
            del content[random.integers(len(content)) :]
        else:
            for place in random.integers(len(content), size=random.choice([1, 3, 10])):
                content[place] = random.integers(256)
        path.write_bytes(content)
        for action in (read_checkpoint, verify):
            try:
                action(path)
            except MedSoftError as error:
                messages.append(str(error))
    assert len(messages) > 20
    assert [text for text in messages if not text.startswith(f"{path}: ") or "\n" in text] == []


# -------------------------------------------------------------------------------------------------------- safe reading


class Calls:
    """Unpickled, it would call ``function``."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def lightning_utility() -> Callable:
    from pytorch_lightning.utilities.seed import isolate_rng

    return isolate_rng


ATTACKS = {
    "posix.system": lambda trace: Calls(os.system, f"touch {trace}"),
    "eval": lambda trace: Calls(builtins.eval, f"open({str(trace)!r}, 'w')"),
    "subprocess.Popen": lambda trace: Calls(subprocess.Popen, ["touch", str(trace)]),
    f"{io.open.__module__}.open": lambda trace: Calls(io.open, str(trace), "w"),
    "torch.hub.load": lambda trace: Calls(torch.hub.load, str(trace), "model", "github"),
    "numpy.fromfile": lambda trace: Calls(np.fromfile, str(trace)),
    "pytorch_lightning.utilities.seed.isolate_rng": lambda trace: Calls(lightning_utility()),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_beside_harmless_objects_is_refused(tmp_path: Path, name: str, form: str) -> None:
    """A file that needs placeholders gets them, and still nothing else: the call is named, and never made."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    bad, trace = tmp_path / "in.ckpt", tmp_path / "trace"
    content = {"callbacks": {ModelCheckpoint: np.float64(1)}, "state_dict": {"a": torch.ones(1)}, "x": None}
    torch.save(content, bad, _use_new_zipfile_serialization=form == "zip")
    assert read_checkpoint(bad).state
    content["x"] = ATTACKS[name](trace)
    torch.save(content, bad, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(MedSoftError, match=rf"in\.ckpt: refused, it asks for {re.escape(name)}; nothing in it was run"):
        read_checkpoint(bad)
    assert not trace.exists()


def test_foreign_objects_leave_tensors_and_plain_values(tmp_path: Path) -> None:
    import argparse
    import pathlib

    from omegaconf import OmegaConf
    from pytorch_lightning.utilities.parsing import AttributeDict

    besides = {
        "hyper_parameters": AttributeDict(rate=1, nested={"deep": 2}),
        "config": OmegaConf.create({"a": {"b": [1, 2]}}),
        "args": argparse.Namespace(x=1),
        "folder": pathlib.PurePosixPath("a/b"),
        "array": np.arange(3.0),
        "score": np.float32(0.5),
        "global_step": 12,
    }
    torch.save({"state_dict": {"a": torch.ones(2)}, **besides}, tmp_path / "in.ckpt")
    found = read_checkpoint(tmp_path / "in.ckpt")
    assert torch.equal(found.state["a"], torch.ones(2))
    assert found.step == 12
    assert found.rest["hyper_parameters"] == {"rate": 1, "nested": {"deep": 2}}
    assert "pytorch_lightning.utilities.parsing.AttributeDict" in found.external
    for key in ("config", "args", "folder", "array", "score"):
        assert type(found.rest[key]).__module__ == "ldm.checkpoints.pickles"  # inert


def memory() -> int:
    """Resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_tensors_of_large_files_are_mapped(tmp_path: Path) -> None:
    """Reading touches no data."""
    state = {str(number): torch.zeros(1 << 24) for number in range(4)}  # 256 MiB
    paths = [tmp_path / "a.ckpt", tmp_path / "a.safetensors"]
    for path in paths:
        write_checkpoint(path, state, {})
    before = memory()
    found = [read_checkpoint(path) for path in paths]
    assert memory() - before < 64 << 20
    assert all(torch.equal(checkpoint.state["3"], state["3"]) for checkpoint in found)


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_every_kind_of_tensor_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_checkpoint(path, STATE, {"step": 3})
    found = read_checkpoint(path)
    assert found.metadata == {"step": 3}
    assert set(found.state) == set(STATE)
    for key, value in STATE.items():
        assert found.state[key].dtype == value.dtype
        assert torch.equal(found.state[key], value)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_safetensors_library_reads_ours(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", STATE, {"note": "ä"})
    theirs = load_file(tmp_path / "a.safetensors")
    assert set(theirs) == set(STATE)
    assert all(torch.equal(theirs[key], value) for key, value in STATE.items())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_type_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"z: a \.safetensors file cannot hold torch\.complex64; write a \.ckpt"):
        write_checkpoint(tmp_path / "a.safetensors", {"z": torch.zeros(1, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_no_space_left_while_writing(tmp_path: Path, suffix: str) -> None:
    """A real limit on the size of a file: one message, nothing left behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))
    try:
        with pytest.raises(MedSoftError, match=rf"out\.{suffix}: could not be written \(File too large\); nothing was"):
            convert(SD, tmp_path / f"out.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", [KeyboardInterrupt, Terminated])
def test_interrupted_while_writing(fault: type[BaseException]) -> None:
    """torch makes a RuntimeError of it, and the command would end as if something was wrong."""

    class Interrupted(io.BytesIO):
        def write(self, content: Any) -> int:
            if self.tell() > 1000:
                raise fault
            return super().write(content)

    with pytest.raises(fault):
        save_pickle({"weights": torch.zeros(10_000)}, Interrupted())


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"medsoft": json.dumps({"a": 1})[:-1]})
    with pytest.raises(MedSoftError, match=r"a\.safetensors: damaged, its metadata `medsoft` is not JSON"):
        read_checkpoint(tmp_path / "a.safetensors")
