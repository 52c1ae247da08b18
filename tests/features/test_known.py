"""What a start remembers of the data's files, when it reads one again, and what becomes of a record that is damaged."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from tiny import MODELS

from ldm.config import Config, load_config
from ldm.core.files import sha256_file
from ldm.core.locks import exclusive
from ldm.data.annotations import write_annotations
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.features import known as module
from ldm.training.dataset import read_training_inputs


def sample(folder: Path, name: str, lesion: int = 8) -> Sample:
    """One with a square lesion of so many pixels."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20 : 20 + lesion, 24 : 24 + lesion] = 255
    image = np.random.default_rng(sum(name.encode())).integers(20, 230, (64, 64), dtype=np.uint8)
    write_png(folder / f"{name}_image.png", image)
    write_png(folder / f"{name}_mask.png", mask)
    files = folder / f"{name}_image.png", folder / f"{name}_mask.png"
    return Sample(name, *files, "lytic lesion", (0.4, 0.3, 0.1, 0.1), name)


def healthy(folder: Path, name: str, label: int = 1) -> Sample:
    """One whose label map marks the vertebra, with label 1, or another one."""
    found = sample(folder, name)
    labels = np.zeros((64, 64), np.uint8)
    labels[20:40, 20:40] = label
    write_png(folder / f"{name}_anatomy.png", labels)
    return replace(found, prompt="healthy", mask=None, box=(0, 0, 0, 0), anatomy=folder / f"{name}_anatomy.png")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(module, "SETTLED", 0)


@pytest.fixture
def data(tmp_path: Path) -> list[Sample]:
    (tmp_path / "data").mkdir()
    folder = tmp_path / "data"
    return [healthy(folder, "h"), sample(folder, "a"), sample(folder, "b", lesion=10)]


class Starts:
    """Starts of a training, and what each of them read or decoded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.read = folder, folder / "cache", []
        self.config: Config = load_config(MODELS / "phantom.yaml", ["data.min_crop=16"])
        for place in ("features.known.content_id", "data.preparation.read_mask", "data.regions.read_labels"):
            self._count(monkeypatch, f"ldm.{place}")

    def _count(self, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
        name, function = place.rsplit(".", 1)
        plain = getattr(__import__(name, fromlist=[function]), function)

        def counted(path: Path, *more: Any, **named: Any) -> Any:
            self.read.append(f"{function} {path.name}")
            return plain(path, *more, **named)

        monkeypatch.setattr(place, counted)

    def __call__(self, data: list[Sample]) -> tuple[dict, dict]:
        """Digests, and the number of items of each sample; ``read`` is what was read."""
        write_annotations(self.folder / "train.json", data[:-1])
        write_annotations(self.folder / "val.json", data[-1:])
        self.read.clear()
        paths = {name: self.folder / f"{name}.json" for name in ("train", "val")}
        inputs = read_training_inputs(paths, self.config, self.cache)
        inputs.known.write()
        counts: dict[str, int] = {}
        for item in inputs.all_items:
            counts[item.sample.sample_id] = counts.get(item.sample.sample_id, 0) + 1
        return dict(inputs.digests), counts


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(tmp_path, monkeypatch)


EVERYTHING = {f"content_id {name}.png" for name in ("h_image", "h_anatomy", "a_image", "a_mask", "b_image", "b_mask")}
EVERYTHING |= {"read_labels h_anatomy.png", "read_mask a_mask.png", "read_mask b_mask.png"}


def test_what_has_not_changed_is_read_and_decoded_once(start: Starts, data: list[Sample], settled: None) -> None:
    first = start(data)
    assert set(start.read) == EVERYTHING
    assert first[1] == {"h": 4, "a": 4, "b": 4}
    assert start(data) == first
    assert start.read == []


def rewritten(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-13] ^= 1  # within the checksum of its last chunk
    file.write_bytes(content)


def replaced(file: Path) -> None:
    """By rename, of the same size, with the times of the one before."""
    state, other = file.stat(), file.with_name("other")
    other.write_bytes(file.read_bytes())
    rewritten(other)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(file)


def set_back(file: Path) -> None:
    """Changed in place, and given the modification time that it had."""
    state = file.stat()
    rewritten(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, replaced, set_back])
def test_a_changed_file_is_read_again(
    start: Starts, data: list[Sample], settled: None, change: Callable[[Path], None]
) -> None:
    digests, _ = start(data)
    image = data[1].image
    size = image.stat().st_size
    time.sleep(0.05)  # another tick of the disk's clock
    change(image)
    assert image.stat().st_size == size
    again, _ = start(data)
    assert again == digests | {image: sha256_file(image)} != digests
    assert start.read == ["content_id a_image.png"]


def test_a_new_mask_and_a_new_label_map_are_decoded_again(start: Starts, data: list[Sample], settled: None) -> None:
    start(data)
    sample(data[1].image.parent, "a", lesion=60)  # which fills the image: a single crop
    healthy(data[0].image.parent, "h", label=2)
    _, counts = start(data)
    assert counts == {"a": 1, "b": 4}
    assert {"read_mask a_mask.png", "read_labels h_anatomy.png"} <= set(start.read)
    assert "content_id b_mask.png" not in start.read


def test_other_settings_are_other_answers(start: Starts, data: list[Sample], settled: None) -> None:
    """And those of before are remembered."""
    first = start(data)
    start.config.data.min_crop = 64.0
    assert start(data)[1] == {"h": 4, "a": 1, "b": 1}
    assert start.read == ["read_mask a_mask.png", "read_mask b_mask.png"]
    start.config.data.min_crop = 16.0
    assert start(data) == first
    assert start.read == []


def test_a_file_that_may_change_in_the_same_tick_is_not_trusted(
    start: Starts, data: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk with a very coarse clock, by which the file stays as it was."""
    plain, tick = module._size_and_times, 10**13

    def coarse(path: Path) -> Any:
        found = plain(path)
        return found and (found[0], *(time // tick * tick for time in found[1:]))

    monkeypatch.setattr(module, "_size_and_times", coarse)
    monkeypatch.setattr(module, "SETTLED", tick)
    start(data)
    rewritten(data[1].image)
    digests, _ = start(data)
    assert digests[data[1].image] == sha256_file(data[1].image)


def test_fresh_files_are_remembered_once_they_have_settled(
    start: Starts, data: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED", 3600 * 10**9)
    first = start(data)
    assert not module.record_in(start.cache).exists()
    monkeypatch.setattr(module, "SETTLED", 0)
    assert start(data) == first
    assert set(start.read) == EVERYTHING
    start(data)
    assert start.read == []


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b'", {') - 1] ^= 1  # a digit of a SHA-256: the line is still JSON
    file.write_bytes(content)


def of_another_version(file: Path) -> None:
    """Whole, but with another header."""
    lines = file.read_bytes().splitlines(keepends=True)
    body = b"".join([b"0\n", *lines[1:-1]])
    file.write_bytes(body + hashlib.sha256(body).hexdigest().encode())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), ""),
        (flipped, "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "damaged"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (of_another_version, ""),
    ],
    ids=["gone", "a flipped bit", "cut", "empty", "of another version"],
)
def test_a_lost_or_damaged_record_costs_time_only(
    start: Starts,
    data: list[Sample],
    settled: None,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    first = start(data)
    file = module.record_in(start.cache)
    damage(file)
    assert start(data) == first
    assert set(start.read) == EVERYTHING
    assert caplog.text.count(f"{file}: damaged; the data are read again") == bool(said)
    assert start(data) == first
    assert start.read == []


def test_two_data_sets_share_a_record(start: Starts, data: list[Sample], settled: None, tmp_path: Path) -> None:
    """What belongs to files that are gone leaves it."""
    (tmp_path / "other").mkdir()
    other = [sample(tmp_path / "other", name) for name in ("c", "d")]
    start(data)
    start(other)
    assert not [line for line in start.read if line.split()[1][0] in "hab"]
    start(data)
    assert start.read == []
    other[0].image.unlink()
    sample(tmp_path / "data", "a", lesion=9)
    start(data)
    file = module.record_in(start.cache)
    assert "c_image" not in file.read_text()
    assert "d_image" in file.read_text()


def test_who_cannot_write_the_record_goes_on(
    start: Starts, data: list[Sample], settled: None, caplog: pytest.LogCaptureFixture
) -> None:
    record = module.record_in(start.cache)
    record.parent.mkdir(parents=True)
    with exclusive(record.with_name(".lock"), "busy"):
        first = start(data)
    assert "another run is writing it; the next start reads the data again" in caplog.text
    record.mkdir()
    assert start(data) == first
    assert "could not be written" in caplog.text


WRITE = """
import os, signal
from pathlib import Path
from ldm.core import files
from ldm.data.samples import Sample
from ldm.features import known
known.SETTLED = 0
record = known.KnownFiles(Path({cache!r}))
record.read([Sample("s", Path({image!r}), None, "healthy", (0, 0, 0, 0), "s")])
{before}
record.write()
"""
KILL = "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_writer_leaves_the_record_of_before(start: Starts, data: list[Sample], settled: None) -> None:
    first = start(data)
    image = sample(data[0].image.parent, "new").image
    code = WRITE.format(cache=str(start.cache), image=str(image), before=KILL)
    assert children.run("-c", code).returncode == -9
    record = module.record_in(start.cache)
    assert len(list(record.parent.iterdir())) == 3  # record, lock and what was half-written
    assert start(data) == first
    assert start.read == []
    assert children.run("-c", WRITE.format(cache=str(start.cache), image=str(image), before="")).returncode == 0
    assert sorted(path.name for path in record.parent.iterdir()) == [".lock", record.name]
    assert str(image) in record.read_text()
