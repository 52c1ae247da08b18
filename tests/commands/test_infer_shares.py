"""dataset_infer.py --share K/N: several commands fill one folder, each image once, with one record at the end."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import children
import pytest
from test_infer_scale import command, files_of
from tiny import TRAIN, infer, metas, record, whole

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.run_folder import RunFolder
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.folders import scan_folder
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.inference.shares import Share


@pytest.fixture(scope="module")
def single(final: Path, world: Path) -> Path:
    """The run of one command: five healthy samples, two variants each."""
    out = world / "single"  # beside the data, as the runs that are compared with it
    assert infer(final, out, *given_to(world)) == 0
    return out


def given_to(world: Path) -> list[Any]:
    return ["--train_json", world / TRAIN, "--variants", 2, "--exact"]


def without_command(files: dict[str, bytes]) -> dict[str, Any]:
    """What does not depend on the words of the command."""
    texts = {name: json.loads(content) for name, content in files.items() if name.endswith("meta.json")}
    return files | {name: {**meta, "command": None, "overrides": None} for name, meta in texts.items()}


@pytest.mark.parametrize(("items", "count"), [(10, 3), (2, 5), (0, 2), (1000, 7), (6, 6)])
def test_shares_are_all_of_the_work_once_and_equally_large(items: int, count: int) -> None:
    blocks = [Share(number, count).of(range(items)) for number in range(1, count + 1)]
    assert [item for block in blocks for item in block] == [*range(items)]
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("share", ["0/4", "5/4", "4", "a/b", "1/0", "-1/4", "1/4/4", "1.5/4"])
def test_a_share_that_does_not_exist(final: Path, tmp_path: Path, share: str) -> None:
    with pytest.raises(UsageError, match=rf"--share: expected K/N, such as 1/4, with K from 1 to N, found {share}"):
        infer(final, tmp_path / "out", f"--share={share}")
    assert not (tmp_path / "out").exists()


def test_shares_in_any_order_are_the_files_of_one_run(
    final: Path, world: Path, single: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = world / "shared"
    counts = []
    for share in ("2/3", "3/3", "1/3"):
        assert infer(final, out, *given_to(world), "--share", share) == 0
        counts.append(len(metas(out)))
        assert record(out)["complete"] is (share == "1/3")
        assert (out / "report.html").exists() is (share == "1/3")
        assert ("1 of 3 shares unfinished, the first: share 1/3" in caplog.text) is (share != "2/3")
    assert counts == [3, 7, 10]
    assert without_command(files_of(out)) == without_command(files_of(single))
    whole(out)
    kept, other = record(out), record(single)
    assert (kept["pictures"], kept["rejected"], kept["changed_outside_pixels"]) == (10, 0, 0)
    assert kept["checkpoint_sha256"] == other["checkpoint_sha256"]
    assert (out / "report.html").read_text().count("<article ") == 10
    assert not (out / "rejects.json").exists()
    caplog.clear()
    assert infer(final, out, *given_to(world), "--share", "2/3") == 0  # again
    assert "shared, share 2/3: already complete (4 images)" not in caplog.text
    assert "shared, share 2/3: already complete (3 images)" in caplog.text
    # What is missing is inpainted again by the share that it belongs to, and by no other.
    gone = sorted(metas(out))[4]
    shutil.rmtree(out / gone)
    assert infer(final, out, *given_to(world), "--share", "1/3") == 0
    assert not (out / gone).exists()
    assert infer(final, out, *given_to(world), "--share", "2/3") == 0
    assert without_command(files_of(out)) == without_command(files_of(single))
    assert (record(out)["complete"], record(out)["pictures"]) == (True, 10)


def start(final: Path, world: Path, out: Path, share: str, *more: Any) -> children.Child:
    return children.start(*command(final, out, *given_to(world), "--share", share, *more), folder=world)


def test_two_shares_at_once_one_of_them_killed_and_begun_again(final: Path, world: Path, single: Path) -> None:
    """As two commands at the same time; the first of them with two processes of its own."""
    out = world / "at_once"
    one, two = start(final, world, out, "1/2", "--devices", 2), start(final, world, out, "2/2")
    last = sorted(metas(single))[5:]  # those of the second share
    deadline = time.monotonic() + 300
    while not any((out / name).exists() for name in last) and time.monotonic() < deadline:
        time.sleep(0.002)
    two.process.kill()
    assert two.wait(60).returncode == -signal.SIGKILL
    done = one.wait(300)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 shares unfinished" in done.stdout
    assert record(out)["complete"] is False
    with pytest.raises(
        UsageError, match=r"at_once: holds results of another run \(shares: 2 -> 1\); give --share K/2 "
    ):
        infer(final, out, *given_to(world))
    done = start(final, world, out, "2/2").wait(300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 images, 0 pixels changed") == 1
    assert without_command(files_of(out)) == without_command(files_of(single))
    whole(out)
    assert (record(out)["complete"], record(out)["pictures"]) == (True, 10)


def test_what_does_not_go_together_is_refused_by_name(final: Path, world: Path, single: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", given_to(world)
    assert infer(final, out, *given, "--share", "1/2") == 0
    before = sorted(out.rglob("*"))

    def refused(message: str, *more: Any, folder: Path = out) -> None:
        with pytest.raises(UsageError, match=message):
            infer(final, folder, *given, *more)

    again = "give another --output_dir|else another --output_dir"
    refused(
        rf"holds results of another run \(shares: 2 -> 3\); give --share K/2 to go on with it, {again}",
        "--share",
        "1/3",
    )
    refused(r"\(shares: 2 -> 1\); give --share K/2 to go on with it")
    refused(r"\(shares: 2 -> 3, format: folder -> tar\)", "--share", "1/3", "--format", "tar")
    refused(r"\(format: folder -> tar\); give --format folder to go", "--share", "2/2", "--format", "tar")
    refused(r"holds results of another run \(seed: 0 -> 1\); give another", "--share", "2/2", "--seed", 1)
    refused(r"\(sampling.steps: 2 -> 3\)", "--share", "2/2", "--steps", 3)
    refused(r"single: holds .* \(shares: 1 -> 2\); give no --share to go on with it", "--share", "1/2", folder=single)
    with RunFolder(out, "inference.json").lock(part=Share(2, 2).name):  # as another command holds it
        refused(r"another command works at share-2-of-2 at this moment; wait for it to end", "--share", "2/2")
    assert sorted(out.rglob("*")) == before
    assert infer(final, out, *given, "--share", "2/2") == 0
    assert record(out)["complete"] is True


def test_running_shares_are_not_deleted_by_another_run(final: Path, one: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", ["--data", one, "--variants", 2]
    assert infer(final, out, *given, "--share", "1/2") == 0
    file = out / "shares" / "1-of-2.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"complete": False}))
    with (
        RunFolder(out, "inference.json").lock(part=Share(1, 2).name),
        pytest.raises(UsageError, match="share 1/2 of another run is at work here; wait for it to end"),
    ):
        infer(final, out, *given, "--seed", 1, "--overwrite")
    assert len(metas(out)) == 1
    assert infer(final, out, *given, "--seed", 1, "--overwrite") == 0
    assert not file.exists()


def test_each_share_rejects_its_own_and_looks_at_its_own_inputs(final: Path, world: Path, tmp_path: Path) -> None:
    """More shares than images; one image cannot be read, one is not there, another changes while it is at work."""
    shutil.copytree(world / "train", tmp_path / "data")
    samples = [sample for sample in scan_folder(tmp_path / "data")[0] if not sample.healthy]
    write_annotations(tmp_path / "data.json", samples)
    first, second, third, fourth = (sample.image for sample in samples)
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    given = ["--data", tmp_path / "data.json", "--choose", "diseased"]
    codes = {number: infer(final, tmp_path / "out", *given, "--share", f"{number}/6") for number in (6, 5, 4, 3, 2)}
    assert sorted(codes.values()) == [0, 0, 0, 0, 3]  # of six shares three have one image each
    third_share = next(number for number in codes if number_of(tmp_path / "out", number) == 1)
    assert record(tmp_path / "out")["complete"] is False
    write_png(third, 255 - read_image(third))
    write_png(fourth, 255 - read_image(fourth))
    said = rf"share {third_share}/6 was begun with other images or prompts \(images: \w+ -> \w+\)"
    for more in ([], ["--overwrite"]):
        with pytest.raises(UsageError, match=rf"{said}; .* run all shares again: --overwrite replaces whole runs only"):
            infer(final, tmp_path / "out", *given, "--share", f"{third_share}/6", *more)
    assert infer(final, tmp_path / "out", *given, "--share", "1/6") == 3  # reports what no share could read
    assert (record(tmp_path / "out")["pictures"], record(tmp_path / "out")["rejected"]) == (2, 2)
    rejects = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert {reject["file"] for reject in rejects} == {str(first), str(second)}


def number_of(out: Path, number: int) -> int:
    return json.loads((out / "shares" / f"{number}-of-6.json").read_text())["pictures"]


def test_results_again_in_shares(final: Path, single: Path, tmp_path: Path) -> None:
    """--like: the same images and masks; two results that would be one folder are refused, whatever their shares."""
    for share in ("1/2", "2/2"):
        assert infer(final, tmp_path / "out", "--like", single, "--exact", "--share", share) == 0
    images = {name: content for name, content in files_of(single).items() if name.endswith("image.png")}
    again = files_of(tmp_path / "out")
    assert len(images) == 10
    assert all(again[name] == content for name, content in images.items())
    samples = load_samples(single)[0]
    write_annotations(tmp_path / "twice.json", [*samples, *samples])
    records = json.loads((tmp_path / "twice.json").read_text())
    for number, each in enumerate(records):
        each["sample_id"] = f"{number}/{each['sample_id']}"
    (tmp_path / "twice.json").write_text(json.dumps(records))
    with pytest.raises(MedSoftError, match=r"both results would be written as .*; keep one of them"):
        infer(final, tmp_path / "twice", "--like", tmp_path / "twice.json", "--share", "1/2")
