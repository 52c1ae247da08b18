"""ver_openImagesDatasets.py: from a dataset folder to the annotation files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ver_openImagesDatasets as prepare
from ldm.core.errors import MedSoftError, UsageError

Write = Callable[..., Path]
SCRIPT = Path(prepare.__file__)


def run(*argv: object) -> int:
    return prepare.main(prepare.build_parser().parse_args([str(value) for value in argv]))


@pytest.fixture
def dataset(tmp_path: Path, write_sample: Write) -> Path:
    """Ten patients, half of them diseased, two samples each."""
    for number in range(20):
        diseased = number % 4 < 2
        prompt, kind = ("lytic lesion", "lytic") if diseased else ("healthy", None)
        meta = {"patient_id": f"p{number // 2}", "lesion_type": kind}
        write_sample(tmp_path / "data" / f"s{number:02d}", prompt=prompt, meta=meta)
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writes_the_full_file_and_its_split(tmp_path: Path, dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run("--root_dir", dataset, "--output_file", tmp_path / "out" / "o.json") == 0
    files = {name: json.loads(data) for name, data in contents(tmp_path / "out").items()}
    assert set(files) == {"o.json", "o_train.json", "o_val.json", "o_test.json"}
    assert [len(files[f"o{part}.json"]) for part in ("", "_train", "_val", "_test")] == [20, 14, 2, 4]
    parts = [{r["patient_id"] for r in files[f"o_{part}.json"]} for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [7, 1, 2]
    assert len(set.union(*parts)) == 10
    assert sorted(r["sample_id"] for r in files["o.json"]) == [f"s{n:02d}" for n in range(20)]
    assert "diseased" in caplog.text
    assert str(tmp_path / "out" / "o_train.json") in caplog.text


def test_same_arguments_give_the_same_files_and_the_seed_matters(tmp_path: Path, dataset: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("--root_dir", dataset, "--output_file", tmp_path / name / "o.json", "--seed", seed) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_fractions_are_used(tmp_path: Path, dataset: Path) -> None:
    assert run("--root_dir", dataset, "--output_file", tmp_path / "o.json", "--fractions", 0.5, 0.2, 0.3) == 0
    sizes = [len(json.loads((tmp_path / f"o_{part}.json").read_text())) for part in ("train", "val", "test")]
    assert sizes == [10, 4, 6]


@pytest.mark.parametrize("name", ["plain", "o.JSON", "o.txt", "a.b"])
def test_output_without_json_suffix_gives_different_files_too(tmp_path: Path, dataset: Path, name: str) -> None:
    assert run("--root_dir", dataset, "--output_file", tmp_path / "out" / name) == 0
    written = contents(tmp_path / "out")
    base = "o" if name == "o.JSON" else name
    assert set(written) == {name, f"{base}_train.json", f"{base}_val.json", f"{base}_test.json"}
    assert len(set(written.values())) == 4


def test_grown_folder_replaces_the_output(tmp_path: Path, dataset: Path, write_sample: Write) -> None:
    run("--root_dir", dataset, "--output_file", tmp_path / "o.json")
    write_sample(dataset / "new")
    assert run("--root_dir", dataset, "--output_file", tmp_path / "o.json") == 0
    assert len(json.loads((tmp_path / "o.json").read_text())) == 21


def test_rejects_are_listed_and_the_list_goes_when_they_are_mended(
    tmp_path: Path, dataset: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    bad = write_sample(dataset / "bad one", image=None)
    assert run("--root_dir", dataset, "--output_file", tmp_path / "o.json") == 3
    rejects = json.loads((tmp_path / "o_rejects.json").read_text())
    assert rejects == [{"sample_id": "bad one", "file": str(bad / "image.png"), "reason": "does not exist"}]
    assert len(json.loads((tmp_path / "o.json").read_text())) == 20
    assert f"{bad / 'image.png'}: does not exist" in caplog.text
    assert "1 sample rejected" in caplog.text
    write_sample(dataset / "bad one")
    assert run("--root_dir", dataset, "--output_file", tmp_path / "o.json") == 0
    assert not (tmp_path / "o_rejects.json").exists()


def test_strict_writes_nothing(tmp_path: Path, dataset: Path, write_sample: Write) -> None:
    write_sample(dataset / "bad", prompt="")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "o.json").write_text("old")
    with pytest.raises(MedSoftError, match="1 sample cannot be used and --strict"):
        run("--root_dir", dataset, "--output_file", tmp_path / "out" / "o.json", "--strict")
    assert contents(tmp_path / "out") == {"o.json": b"old"}


def test_nothing_usable_is_an_error_and_writes_nothing(tmp_path: Path, write_sample: Write) -> None:
    write_sample(tmp_path / "data" / "a", mask=None)
    with pytest.raises(MedSoftError, match="its only sample cannot be used"):
        run("--root_dir", tmp_path / "data", "--output_file", tmp_path / "out" / "o.json")
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_found_before_the_data_is_read(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(UsageError, match="add up to 1"):
        run("--root_dir", gone, "--output_file", tmp_path / "o.json", "--fractions", 0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="found a folder"):
        run("--root_dir", gone, "--output_file", tmp_path)


def test_unwritable_output_is_an_error_that_names_it(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MedSoftError, match=r"file/o_train\.json: could not be written"):
        run("--root_dir", dataset, "--output_file", tmp_path / "file" / "o.json")


def test_few_patients_and_missing_ids_are_said(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_sample(tmp_path / "data" / "a", prompt="healthy", mask=None)
    assert run("--root_dir", tmp_path / "data", "--output_file", tmp_path / "o.json") == 0
    assert "no meta.json names a patient_id" in caplog.text
    assert "1 healthy sample has neither a mask nor anatomy.png" in caplog.text
    assert "o_val.json is empty: too few patients (1)" in caplog.text
    caplog.clear()
    output = tmp_path / "whole.json"
    assert run("--root_dir", tmp_path / "data", "--output_file", output, "--fractions", 1, 0, 0) == 0
    assert "is empty" not in caplog.text  # as asked


def test_command_line_from_elsewhere_exit_codes_and_no_torch(
    tmp_path: Path, dataset: Path, write_sample: Write
) -> None:
    """The real command, run in another folder: default output there, exit 3 with rejects, one line for an error."""
    write_sample(dataset / "line\nbreak", image=None)

    def command(*argv: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-X", "importtime", str(SCRIPT), *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = command("--root_dir", "data")
    assert done.returncode == 3, done.stderr
    assert "rejected: data/line\\nbreak/image.png: does not exist" in done.stdout
    assert "openimages_format_train.json" in done.stdout  # the summary
    assert str(tmp_path) not in done.stdout  # only what the user passed
    assert (tmp_path / "openimages_format_train.json").exists()
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "lightning", "matplotlib"}
    failed = command("--root_dir", "gone")
    assert failed.returncode == 1
    assert (
        failed.stderr.splitlines()[-1]
        == "error: gone: does not exist; expected a dataset folder or an annotation file (.json, .jsonl)"
    )
    assert command("--output_file", "x.json").returncode == 2
