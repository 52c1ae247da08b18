"""Annotation files with one record a line: written, read, and refused where something is wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ver_openImagesDatasets as prepare
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations

Write = Callable[..., Path]
PARTS = ("", "_train", "_val", "_test")


@pytest.fixture
def dataset(tmp_path: Path, write_sample: Write) -> Path:
    """20 patients, every other one diseased, in ``data``."""
    for number in range(20):
        prompt = "lésion lytique" if number % 2 else "healthy"
        meta = {"patient_id": f"p{number}", "level": "L3", "spacing_mm": [0.5, 1.0]}
        write_sample(tmp_path / "data" / f"s{number:02d}", prompt, meta=meta)
    return tmp_path


def run(folder: Path, name: str, *more: object) -> int:
    flags = ["--root_dir", folder / "data", "--output_file", folder / "out" / name, *more]
    return prepare.main(prepare.build_parser().parse_args([str(value) for value in flags]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sides(folder: Path) -> dict[str, str]:
    return {
        json.loads(line)["patient_id"]: part
        for part in PARTS[1:]
        for line in (folder / f"o{part}.jsonl").read_text().splitlines()
    }


def test_holds_the_records_of_the_json_file_with_paths_relative_to_its_folder(dataset: Path) -> None:
    assert (run(dataset, "o.json"), run(dataset, "o.jsonl")) == (0, 0)
    assert set(contents(dataset / "out")) == {f"o{part}.{kind}" for part in PARTS for kind in ("json", "jsonl")}
    for part in PARTS:
        plain = json.loads((dataset / "out" / f"o{part}.json").read_text(encoding="utf-8"))
        text = (dataset / "out" / f"o{part}.jsonl").read_text(encoding="utf-8")
        assert text.endswith("}\n")
        lines = [json.loads(line) for line in text.splitlines()]
        for record, line in zip(plain, lines, strict=True):
            folder = f"../data/{record['sample_id']}"
            assert line == record | {"image": f"{folder}/image.png", "mask_image": f"{folder}/mask.png"}
        assert load_samples(dataset / "out" / f"o{part}.jsonl") == load_samples(dataset / "out" / f"o{part}.json")


def test_data_and_files_may_move_together(dataset: Path, tmp_path: Path) -> None:
    run(dataset, "o.jsonl")
    before = [sample.sample_id for sample in load_samples(dataset / "out" / "o.jsonl")[0]]
    (tmp_path / "elsewhere").mkdir()
    for name in ("data", "out"):
        shutil.move(dataset / name, tmp_path / "elsewhere" / name)
    samples, rejects = load_samples(tmp_path / "elsewhere" / "out" / "o.jsonl")
    assert ([sample.sample_id for sample in samples], rejects) == (before, [])
    assert samples[0].image == tmp_path / "elsewhere" / "data" / "s00" / "image.png"


@pytest.mark.parametrize("through", ["data", "out"])
def test_a_folder_with_two_names_holds_them_under_both(dataset: Path, tmp_path: Path, through: str) -> None:
    """As where a home folder links to another disk: one path is given by the link, the other by what it leads to."""
    shutil.move(dataset / "data", tmp_path / "disk" / "deep" / "project" / "data")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep" / "project")
    folders = {"data": tmp_path / "disk" / "deep" / "project", "out": tmp_path / "disk" / "deep" / "project"}
    folders[through] = tmp_path / "link"
    words = ["--root_dir", folders["data"] / "data", "--output_file", folders["out"] / "o.jsonl"]
    assert prepare.main(prepare.build_parser().parse_args([str(word) for word in words])) == 0
    for place in (tmp_path / "link", tmp_path / "disk" / "deep" / "project"):
        assert [len(each) for each in load_samples(place / "o.jsonl")] == [20, 0]
    shutil.move(tmp_path / "disk", tmp_path / "elsewhere")
    assert [len(each) for each in load_samples(tmp_path / "elsewhere" / "deep" / "project" / "o.jsonl")] == [20, 0]


def test_data_beside_a_folder_that_is_reached_through_a_link(dataset: Path, tmp_path: Path) -> None:
    run(dataset, "o.jsonl")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "link").symlink_to(dataset / "out")
    (samples, rejects) = load_samples(tmp_path / "a" / "b" / "link" / "o.jsonl")
    assert (len(samples), rejects) == (20, [])


def test_patients_keep_their_sides_and_those_who_are_away_come_back(dataset: Path, write_sample: Write) -> None:
    run(dataset, "o.jsonl")
    before = sides(dataset / "out")
    shutil.move(dataset / "data" / "s03", dataset / "away")
    for number in range(9):
        write_sample(dataset / "data" / f"n{number}", meta={"patient_id": f"new{number}"})
    assert run(dataset, "o.jsonl") == 0
    assert (dataset / "out" / "o_absent.jsonl").exists()
    shutil.move(dataset / "away", dataset / "data" / "s03")
    assert run(dataset, "o.jsonl") == 0
    assert {name: side for name, side in sides(dataset / "out").items() if name in before} == before
    assert not (dataset / "out" / "o_absent.jsonl").exists()


def test_who_changes_to_json_lines_keeps_the_split(
    dataset: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(dataset, "o.json")
    for number in range(9):
        write_sample(dataset / "data" / f"n{number}", meta={"patient_id": f"new{number}"})
    run(dataset, "o.json")
    for part in PARTS:
        shutil.copy(dataset / "out" / f"o{part}.json", dataset / f"kept{part}.json")
    caplog.clear()
    assert run(dataset, "o.jsonl") == 0
    assert f"patients keep the sides that {dataset / 'out' / 'o.json'} and its parts give them" in caplog.text
    for part in PARTS:
        kept, _ = load_samples(dataset / f"kept{part}.json")
        assert load_samples(dataset / "out" / f"o{part}.jsonl")[0] == kept


def test_files_beside_json_lines_are_not_those_beside_json(dataset: Path, write_sample: Write) -> None:
    """Two annotation files of one name, of two data sets: each has the rejects and the absent patients of its own."""
    write_sample(dataset / "data" / "bad", prompt="")
    assert run(dataset, "o.json") == 3
    shutil.move(dataset / "data" / "s03", dataset / "away")
    assert run(dataset, "o.json") == 3
    beside = {name: (dataset / "out" / f"o_{name}.json").read_bytes() for name in ("rejects", "absent")}
    shutil.rmtree(dataset / "data" / "bad")
    shutil.move(dataset / "away", dataset / "data" / "s03")
    assert run(dataset, "o.jsonl") == 0
    assert beside == {name: (dataset / "out" / f"o_{name}.json").read_bytes() for name in beside}
    assert not any((dataset / "out" / f"o_{name}.jsonl").exists() for name in beside)


def test_rejects_are_listed_one_a_line_and_nothing_is_written_after_an_error(
    dataset: Path, write_sample: Write
) -> None:
    write_sample(dataset / "data" / "bad", prompt="")
    assert run(dataset, "o.jsonl") == 3
    (line,) = (dataset / "out" / "o_rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["sample_id"] == "bad"
    before = contents(dataset / "out")
    with pytest.raises(MedSoftError, match="1 sample cannot be used and --strict"):
        run(dataset, "o.jsonl", "--strict")
    (dataset / "out" / "o_val.jsonl").unlink()
    (dataset / "out" / "o_val.jsonl").mkdir()
    with pytest.raises(MedSoftError, match=r"o_val\.jsonl"):
        run(dataset, "o.jsonl")
    after = contents_of_files(dataset / "out")
    assert after == {name: content for name, content in before.items() if name != "o_val.jsonl"}


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines_of(folder: Path, write_sample: Write) -> list[str]:
    """Three sound lines that name the samples of ``folder``."""
    for name in "abc":
        write_sample(folder / name)
    write_annotations(folder / "o.jsonl", load_samples(folder)[0])
    return (folder / "o.jsonl").read_text().splitlines(keepends=True)


def test_blank_lines_a_mark_in_front_and_a_last_line_without_its_end_are_read(
    tmp_path: Path, write_sample: Write
) -> None:
    one, two, three = lines_of(tmp_path, write_sample)
    (tmp_path / "o.jsonl").write_text("\ufeff" + one + "\n  \r\n" + two + three.rstrip("\n"), encoding="utf-8")
    assert [sample.sample_id for sample in load_samples(tmp_path / "o.jsonl")[0]] == ["a", "b", "c"]


REFUSED: dict[str, tuple[Callable[[list[str]], str], str]] = {
    "a line that is no JSON": (lambda lines: lines[0] + '{"image": }\n' + lines[2], "line 2: not valid JSON (column "),
    "two records in a line": (
        lambda lines: lines[0] + lines[1].strip() + lines[2],
        "line 2: not valid JSON (column",
    ),
    "a last line that is cut": (
        lambda lines: "".join(lines)[:-40],
        "line 3, the last one, is cut short or damaged; copy the file again",
    ),
    "a list in a line": (lambda lines: lines[0] + "[]\n", "line 2: expected an object, found list"),
    "a wrong value": (
        lambda lines: lines[0] + lines[1].replace('"label": "lytic lesion"', '"label": ""'),
        "line 2, key 'label': expected one sentence on one line",
    ),
    "NaN": (lambda lines: lines[0].replace("[0.", "[NaN, 0.", 1), "line 1: not valid JSON (NaN is no number"),
    "a key twice": (lambda lines: lines[0].replace("{", '{"label": "x", ', 1), "line 1: not valid JSON (the key 'lab"),
    "the same sample twice": (
        lambda lines: lines[0] + lines[1] + lines[0],
        "line 1 and line 3 have the same",
    ),
    "nothing": (lambda lines: "", "holds no record; make it again with ver_openImagesDatasets.py"),
    "blank lines only": (lambda lines: "\n \n", "holds no record"),
    "a JSON list": (
        lambda lines: json.dumps([json.loads(line) for line in lines], indent=2),
        "holds a JSON list, not one record a line (JSON Lines); name it .json",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line_with_file_line_and_key(
    tmp_path: Path, write_sample: Write, name: str
) -> None:
    damage, reason = REFUSED[name]
    path = tmp_path / "o.jsonl"
    path.write_text(damage(lines_of(tmp_path, write_sample)))
    with pytest.raises(MedSoftError) as caught:
        load_samples(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_a_line_in_another_encoding_is_named(tmp_path: Path, write_sample: Write) -> None:
    lines = lines_of(tmp_path, write_sample)
    (tmp_path / "o.jsonl").write_bytes(lines[0].encode() + lines[1].replace("lytic", "lésion").encode("cp1252"))
    with pytest.raises(MedSoftError, match=r"o\.jsonl: line 2: not UTF-8 text \(byte 0xe9"):
        load_samples(tmp_path / "o.jsonl")


def test_lines_under_the_name_of_a_json_file_are_refused(tmp_path: Path, write_sample: Write) -> None:
    lines_of(tmp_path, write_sample)
    (tmp_path / "o.jsonl").rename(tmp_path / "o.json")
    with pytest.raises(MedSoftError, match=r"o\.json: holds one record a line .*; name it \.jsonl"):
        load_samples(tmp_path / "o.json")


def test_a_damaged_split_is_refused_when_it_is_prepared_again(dataset: Path) -> None:
    run(dataset, "o.jsonl")
    before = contents(dataset / "out")
    path = dataset / "out" / "o_train.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(MedSoftError, match=r"o_train\.jsonl: line 14, the last one, is cut short"):
        run(dataset, "o.jsonl")
    assert contents(dataset / "out") == before | {"o_train.jsonl": before["o_train.jsonl"][:-30]}
