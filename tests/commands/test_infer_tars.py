"""dataset_infer.py --format tar: WebDataset tars, whole or not there, continued, shared, reported, and unpacked."""

import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import children
import pytest
from test_infer_scale import command, files_of
from tiny import ROOT, TRAIN, infer, metas, record

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.folders import scan_folder
from ldm.data.images import read_image
from ldm.inference import tars
from ldm.inference.inpainter import Inpainter


@pytest.fixture(autouse=True)
def _small_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "SIZE", 2)
    monkeypatch.setattr(tars, "SHEET", 1)


def samples_of(*paths: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples as WebDataset's rule groups them: a key is a member's folder and its name up to the first dot; what
    follows names the file, and members of one key follow each other."""
    current, files = None, {}
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                assert member.isfile()
                key, name = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
                if key != current:
                    if files:
                        yield current, files
                    current, files = key, {}
                assert name.lower() not in files
                files[name.lower()] = archive.extractfile(member).read()
    if files:
        yield current, files


def given_to(world: Path) -> list[Any]:
    return ["--train_json", world / TRAIN, "--exact", "--format", "tar"]


def tars_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def finished(folder: Path, pictures: int) -> None:
    """The record says so, and nothing lies there but tars, indexes, records and the report."""
    assert (record(folder)["complete"], record(folder)["pictures"]) == (True, pictures)
    indexes = {path.replace(".tar", ".json") for path in tars_in(folder)}
    known = {*tars_in(folder), *indexes, "inference.json", "report.html", "report_files", "shares", "rejects.json"}
    assert {path.name for path in folder.iterdir()} <= known
    sources = re.findall(r'<img loading="lazy"[^>]* src="([^"]*)"', (folder / "report.html").read_text())
    assert len(sources) == pictures
    assert all((folder / source).is_file() for source in sources)


@pytest.fixture
def packed(final: Path, world: Path) -> Path:
    """Five results in three tars, beside the data."""
    out = world / "packed"
    if not out.exists():
        assert infer(final, out, *given_to(world)) == 0
    return out


def test_tars_hold_what_the_folders_would(final: Path, world: Path, packed: Path) -> None:
    assert infer(final, world / "folders", "--train_json", world / TRAIN, "--exact") == 0
    assert tars_in(packed) == ["000000.tar", "000001.tar", "000002.tar"]
    finished(packed, 5)
    found = dict(samples_of(*(packed / name for name in tars_in(packed))))
    assert len(found) == 5
    expected = files_of(world / "folders")
    assert {f"{key}/{name}" for key, files in found.items() for name in files} == set(expected)
    for key, files in found.items():
        for name, content in files.items():
            if name == "meta.json":  # which holds the command
                before, after = json.loads(expected[f"{key}/{name}"]), json.loads(content)
                assert {**before, "command": None} == {**after, "command": None}
            else:
                assert content == expected[f"{key}/{name}"], (key, name)
    for tar in tars_in(packed):
        index = json.loads((packed / tar.replace(".tar", ".json")).read_text())
        assert [card["sample_id"] for card in index["samples"]] == [key for key, _ in samples_of(packed / tar)]
        assert index["bytes"] == (packed / tar).stat().st_size


def test_again_is_complete_and_a_lost_tar_is_made_again(
    final: Path, world: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = {name: (packed / name).read_bytes() for name in tars_in(packed)}
    with monkeypatch.context() as patch:
        patch.setattr("ldm.inference.run.load_inpainter", lambda *_: pytest.fail("loaded the model"))
        assert infer(final, packed, *given_to(world)) == 0
    assert "already complete (5 images)" in caplog.text
    (packed / "000001.tar").write_bytes(before["000001.tar"][:1000])  # as a full disk elsewhere leaves a copy
    assert infer(final, packed, *given_to(world)) == 0
    assert {name: (packed / name).read_bytes() for name in tars_in(packed)} == before
    assert "already there: 3 of 5 images" in caplog.text
    finished(packed, 5)


def test_an_interrupted_run_ends_with_the_same_tars(
    final: Path, world: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, calls = world / "interrupted", Inpainter.begin, []

    def draw(self: Inpainter, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:  # one tar is there, and the first result of the second
            raise KeyboardInterrupt
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Inpainter, "begin", draw)
        with pytest.raises(KeyboardInterrupt):
            infer(final, out, *given_to(world))
    assert tars_in(out) == ["000000.tar"]
    assert [path.name for path in out.glob(".unpacked/*__v0")] == [key for key, _ in samples_of(packed / "000001.tar")][
        :1
    ]
    (out / "000001.tar").write_bytes(b"killed before its index was written")
    assert infer(final, out, *given_to(world)) == 0
    assert {name: (out / name).read_bytes() for name in tars_in(out)} == {
        name: (packed / name).read_bytes() for name in tars_in(packed)
    }
    finished(out, 5)


def test_killed_between_the_last_index_and_the_end_of_its_folders(final: Path, world: Path, packed: Path) -> None:
    out = world / "left_over"
    shutil.copytree(packed, out)
    (out / ".unpacked" / "some__v0").mkdir(parents=True)
    (out / ".unpacked" / "some__v0" / "meta.json").write_text("{}")
    (out / "inference.json").write_text(json.dumps(record(out) | {"complete": False}))
    assert infer(final, out, *given_to(world)) == 0
    finished(out, 5)


def test_killed_shares_go_on_and_write_tars_of_their_own(final: Path, world: Path, packed: Path) -> None:
    out = world / "shared_tars"
    code = "import runpy, sys; from ldm.inference import tars; tars.SIZE = tars.SHEET = 2; "
    code += f"sys.argv[0] = {str(ROOT / 'dataset_infer.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = command(final, out, *given_to(world), "--share", "1/2", "--variants", 2)[1:]
    run = children.start("-c", code, *words, folder=world)
    deadline = time.monotonic() + 300
    while not (out / "share-1-of-2-000000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    run.process.kill()
    run.wait(60)
    for path in out.glob("share-*.json"):
        assert len(dict(samples_of(path.with_suffix(".tar")))) == 2
    for share in ("2/2", "1/2"):
        assert infer(final, out, *given_to(world), "--variants", 2, "--share", share) == 0
    assert tars_in(out) == [f"share-{k}-of-2-{n:06d}.tar" for k in (1, 2) for n in range(3)]
    keys = [key for name in tars_in(out) for key, _ in samples_of(out / name)]
    assert len(keys) == 10
    assert keys == sorted(set(keys))
    finished(out, 10)


def test_one_line_of_tar_unpacks_them_into_sample_folders(
    final: Path, world: Path, packed: Path, tmp_path: Path
) -> None:
    """The line that docs/inference.md and the refusal give; folders in folders, and dots in names."""
    folder = sorted((world / "val").glob("*/mask.png"))[0].parent
    shutil.copytree(folder, world / "dotted" / "study 1.2" / "case 50%.7")
    out = world / "dotted_tars"
    assert infer(final, out, "--data", world / "dotted", "--format", "tar") == 0
    (key,) = dict(samples_of(out / "000000.tar"))
    assert key == "study 1.2/case 50%25%2E7__v0"
    line = next(line for line in (ROOT / "docs" / "inference.md").read_text().splitlines() if "--transform" in line)
    for source in (packed, out):
        folder = world / f"{source.name}_unpacked"
        subprocess.run(
            ["bash", "-ec", line.replace("results", source.name)], cwd=world, check=True, capture_output=True
        )
        samples, rejects = scan_folder(folder)
        assert not rejects
        assert len(samples) == record(source)["pictures"]
        assert all(sample.synthetic and sample.soft_mask for sample in samples)
    unpacked = world / "packed_unpacked"
    assert infer(final, tmp_path / "like", "--like", unpacked, "--exact") == 0  # which finds the parents
    for name in metas(unpacked):
        assert (tmp_path / "like" / name / "image.png").read_bytes() == (unpacked / name / "image.png").read_bytes()


def test_readers_of_folders_name_the_cure(final: Path, packed: Path, tmp_path: Path) -> None:
    for path, name in ((packed, "packed"), (packed / "000000.tar", "packed")):
        message = (
            rf"{path}: samples in WebDataset tars are not read; unpack them: .*{name}/\*\.tar; do tar .*--transform"
        )
        with pytest.raises(MedSoftError, match=message):
            load_samples(path)
    with pytest.raises(MedSoftError, match="unpack them"):
        infer(final, tmp_path / "out", "--like", packed)
    with pytest.raises(MedSoftError, match="unpack them"):
        scan_folder(packed)


def test_rejects_are_in_the_index_and_the_list(final: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "val", tmp_path / "data")
    write_annotations(tmp_path / "data.json", scan_folder(tmp_path / "data")[0])
    bad = min((tmp_path / "data").glob("*/mask.png"))
    bad.write_bytes(b"")
    given = ["--data", tmp_path / "data.json", "--choose", "diseased", "--format", "tar"]
    for _ in range(2):  # the second time it is complete
        assert infer(final, tmp_path / "out", *given) == 3
        (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
        assert "mask.png" in reject["reason"]
        assert json.loads((tmp_path / "out" / "000000.json").read_text())["rejects"] == [reject]
        finished(tmp_path / "out", 1)
    sheet = read_image(tmp_path / "out" / "report_files" / "000000_00.png")
    assert sheet.shape[:2] == (160, 640)
