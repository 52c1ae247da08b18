"""ver_openImagesDatasets.py on a data set that has grown, on a split that is there, and on synthetic samples."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ver_openImagesDatasets as prepare
from ldm.core import files
from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples

Write = Callable[..., Path]


def run(folder: Path, *more: object) -> int:
    flags = ["--root_dir", folder / "data", "--output_file", folder / "o.json", *more]
    return prepare.main(prepare.build_parser().parse_args([str(value) for value in flags]))


def sides(folder: Path) -> dict[str, str]:
    """patient -> side, as the files say; a patient may be on one side only."""
    found: dict[str, str] = {}
    for side in ("train", "val", "test"):
        for record in json.loads((folder / f"o_{side}.json").read_text()):
            assert found.setdefault(record["patient_id"], side) == side
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def data(tmp_path: Path, write_sample: Write) -> Path:
    """40 patients, every other one diseased."""
    for number in range(40):
        prompt = "lytic lesion" if number % 2 else "healthy"
        write_sample(tmp_path / "data" / f"s{number:02d}", prompt, meta={"patient_id": f"p{number}"})
    return tmp_path


def test_patients_keep_their_sides_when_others_come_and_go(
    data: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(data)
    before = sides(data)
    for number in range(7):
        write_sample(data / "data" / f"a{number}", meta={"patient_id": f"new{number}"})
    (data / "data" / "s00" / "image.png").unlink()
    caplog.clear()
    assert run(data) == 3
    after = sides(data)
    assert {name: after[name] for name in before if name != "p0"} == {k: v for k, v in before.items() if k != "p0"}
    assert "39 patients keep their sides, 1 of the earlier split is gone, 7 are new (" in caplog.text
    assert [len([n for n in after.values() if n == side]) for side in ("train", "val", "test")] == [32, 5, 9]


def test_another_seed_deals_anew_and_says_who_moved(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(data)
    before = sides(data)
    assert run(data, "--seed", 1) == 0
    after = sides(data)
    moved = sum(after[name] != side for name, side in before.items())
    assert moved
    assert f"another seed or other fractions: {moved} of 40 patients are on another side than before" in caplog.text
    caplog.clear()
    assert run(data, "--seed", 1, "--fractions", 0.5, 0.25, 0.25) == 0
    assert "another seed or other fractions" in caplog.text
    assert sorted(sides(data).values()).count("train") == 20


def test_the_split_of_an_older_version_is_kept(data: Path) -> None:
    run(data)
    for side in ("train", "val", "test"):
        path = data / f"o_{side}.json"
        records = json.loads(path.read_text())
        assert {record.pop("split") for record in records} == {"seed 0, fractions 0.7 0.1 0.2"}
        path.write_text(json.dumps(records))
    moved = [json.loads((data / f"o_{side}.json").read_text()) for side in ("test", "val")]
    (data / "o_val.json").write_text(json.dumps(moved[0]))  # a split that no seed gives
    (data / "o_test.json").write_text(json.dumps(moved[1]))
    before = sides(data)
    assert run(data) == 0
    assert sides(data) == before


def test_a_split_that_is_not_whole_is_refused_and_stays(data: Path) -> None:
    run(data)
    (data / "o_test.json").rename(data / "kept.json")
    before = contents(data)
    with pytest.raises(MedSoftError, match=r"o_test\.json: is missing beside o_train\.json; .*remove the _train"):
        run(data)
    (data / "o_test.json").write_text(json.dumps(json.loads((data / "o_train.json").read_text())[:1]))
    with pytest.raises(MedSoftError, match=r"o_test\.json: patient \w+ is in train too"):
        run(data)
    (data / "o_test.json").write_text("{}")
    with pytest.raises(MedSoftError, match=r"o_test\.json: expected a JSON list .*remove the _train"):
        run(data)
    (data / "o_test.json").unlink()
    assert contents(data) == before
    for side in ("train", "val"):
        (data / f"o_{side}.json").unlink()
    assert run(data) == 0


@pytest.mark.parametrize("step", range(1, 6))
def test_the_files_appear_together_or_not_at_all(
    data: Path, write_sample: Write, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A disk that is full when one of the five files is written leaves the earlier ones as they were."""
    run(data)
    before = contents(data)
    write_sample(data / "data" / "new", meta={"patient_id": "new"})
    write_sample(data / "data" / "bad", prompt="")
    calls = {"left": step}
    sync = os.fsync

    def full(descriptor: int) -> None:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MedSoftError, match=r"o\w*\.json: could not be written \(No space left .* nothing was changed"):
        run(data)
    assert contents(data) == before
    assert not list(data.glob(".partial*"))
    assert run(data) == 3
    assert "new" in sides(data)


def test_a_folder_in_the_place_of_one_file_leaves_the_others(data: Path, write_sample: Write) -> None:
    run(data)
    write_sample(data / "data" / "bad", prompt="")
    (data / "o_rejects.json").mkdir()
    before = contents(data)
    with pytest.raises(MedSoftError, match=r"o_rejects\.json: could not be written"):
        run(data)
    assert contents(data) == before


# ------------------------------------------------------------------------------------------------ synthetic samples


def synthetic(write_sample: Write, folder: Path, parent: int, **more: Any) -> None:
    meta = {"synthetic": True, "parent_id": f"s{parent:02d}", "patient_id": f"p{parent}", **more}
    write_sample(folder, "lytic lesion", meta={key: value for key, value in meta.items() if value is not None})


def test_results_below_the_data_are_left_out_and_counted(
    data: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    run(data)
    before = contents(data)
    for number in range(0, 40, 4):
        synthetic(write_sample, data / "data" / "results" / f"s{number:02d}__v0", number)
    synthetic(write_sample, data / "data" / "results" / "s01__v0", 1, synthetic=None)  # parent_id alone says it
    assert run(data) == 0
    assert "11 of 51 samples are synthetic and left out; --synthetic takes them along" in caplog.text
    assert contents(data) == before


def test_synthetic_samples_go_to_the_side_of_their_parent(data: Path, write_sample: Write) -> None:
    run(data)
    before = sides(data)
    image = load_samples(data / "data")[0][2].image
    results = data / "data" / "results"
    for number in range(3, 40):
        synthetic(write_sample, results / f"s{number:02d}__v0", number)
    synthetic(write_sample, results / "by_name", 0, patient_id=None)
    synthetic(write_sample, results / "by_image", 99, patient_id=None, parent_image=str(image))
    synthetic(write_sample, results / "orphan", 99)
    assert run(data, "--synthetic") == 3
    assert sides(data) == before
    records = {r["sample_id"]: r for r in json.loads((data / "o.json").read_text())}
    assert records["results/s07__v0"]["synthetic"] is True
    assert records["results/by_name"]["patient_id"] == "p0"
    assert records["results/by_image"]["patient_id"] == "p2"
    (reject,) = json.loads((data / "o_rejects.json").read_text())
    assert reject["sample_id"] == "results/orphan"
    assert "neither its parent_id 's99' nor its patient is a real sample's" in reject["reason"]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_namesake_is_no_parent(tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture) -> None:
    """Results made from another data set whose sample folders have the same names, as sample_001 is everybody's."""
    for number in range(8):
        write_sample(tmp_path / "data" / f"s{number}", image=np.full((20, 24), number, np.uint8))
        write_sample(tmp_path / "other" / f"s{number}", image=np.full((20, 24), 100 + number, np.uint8))
    for number, (meta, root) in enumerate(
        [
            ({"parent_image": "../../other/s0/image.png"}, "other"),  # another data set's
            ({"parent_image": "../s0/image.png"}, "other"),  # results that were copied beside a namesake
            ({"parent_image": "../../gone/s0/image.png"}, "data"),  # moved, but the same image
        ]
    ):
        digest = digest_of(tmp_path / root / "s0" / "image.png")
        meta |= {"synthetic": True, "parent_id": "s0", "patient_id": "s0", "parent_sha256": digest}
        write_sample(tmp_path / "data" / f"s0__v{number}", meta=meta)
    assert run(tmp_path, "--synthetic") == 3
    records = [r["sample_id"] for r in json.loads((tmp_path / "o.json").read_text())]
    assert [name for name in records if "__v" in name] == ["s0__v2"]
    rejects = json.loads((tmp_path / "o_rejects.json").read_text())
    assert [reject["sample_id"] for reject in rejects] == ["s0__v0", "s0__v1"]
    assert all("synthetic, and made from another image than that of s0 here" in reject["reason"] for reject in rejects)


def test_a_parent_known_by_its_name_alone_is_said(
    data: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    synthetic(write_sample, data / "data" / "by_name", 0, patient_id=None)
    assert run(data, "--synthetic") == 0
    assert "1 synthetic sample says of the parent no more than its name or patient" in caplog.text


def test_nothing_but_synthetic_samples_is_an_error(tmp_path: Path, write_sample: Write) -> None:
    synthetic(write_sample, tmp_path / "data" / "a", 1)
    for more in ((), ("--synthetic",)):
        with pytest.raises(MedSoftError, match="1 usable sample is synthetic, none is real; nothing was written"):
            run(tmp_path, *more)
    assert not (tmp_path / "o.json").exists()


def test_samples_without_a_patient_id_are_counted(
    data: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_sample(data / "data" / "x", meta={"patient_id": "nan"}, anatomy=np.ones((20, 24), np.uint8))
    run(data)
    assert "1 of 41 samples have no patient_id: each such sample counts as a patient of its own" in caplog.text


def test_samples_keep_their_sides_when_their_patients_get_ids(tmp_path: Path, write_sample: Write) -> None:
    for number in range(20):
        write_sample(tmp_path / "data" / f"s{number:02d}", "lytic lesion" if number % 2 else "healthy")
    run(tmp_path)
    before = sides(tmp_path)
    for number in range(20):
        (tmp_path / "data" / f"s{number:02d}" / "meta.json").write_text(json.dumps({"patient_id": f"p{number}"}))
    run(tmp_path)
    assert sides(tmp_path) == {f"p{int(name[1:])}": side for name, side in before.items()}


def test_one_id_for_patients_of_two_sides_is_refused(data: Path) -> None:
    run(data)
    found = sides(data)
    one, other = next(n for n in found if found[n] == "train"), next(n for n in found if found[n] == "test")
    for name in (one, other):
        (data / "data" / f"s{int(name[1:]):02d}" / "meta.json").write_text(json.dumps({"patient_id": "both"}))
    kept = contents(data)
    with pytest.raises(
        MedSoftError, match=r"its patient, both, has another id .* in (train|test) and in (train|test); put"
    ):
        run(data)
    assert contents(data) == kept


def test_a_split_that_names_nobody_is_refused(data: Path) -> None:
    run(data)
    records = json.loads((data / "o_val.json").read_text())
    anonymous = [{k: v for k, v in record.items() if k not in ("patient_id", "sample_id")} for record in records]
    (data / "o_val.json").write_text(json.dumps(anonymous))
    with pytest.raises(MedSoftError, match=r"o_val\.json: record 0 has neither patient_id nor sample_id; put it right"):
        run(data)


def test_the_parent_of_a_synthetic_sample_is_found_by_a_relative_path(tmp_path: Path, write_sample: Write) -> None:
    for number in range(6):
        write_sample(tmp_path / "data" / "real" / f"s{number}")
    meta = {"synthetic": True, "parent_id": "s0", "patient_id": "s0", "parent_image": "../../real/s0/image.png"}
    write_sample(tmp_path / "data" / "results" / "s0__v0", meta=meta)
    assert run(tmp_path, "--synthetic") == 0
    assert len(json.loads((tmp_path / "o.json").read_text())) == 7


# ------------------------------------------------------------------------------------- those who are away for a time


def hide(folder: Path, numbers: list[int], how: str) -> Callable[[], None]:
    """Make the samples with these numbers unusable; what is returned puts them back."""
    pairs = []
    for number in numbers:
        sample = folder / "data" / f"s{number:02d}"
        path = sample if how == "folder" else sample / "image.png"
        pairs.append((path, folder / f"kept{number}"))
    for path, kept in pairs:
        path.rename(kept)

    def put_back() -> None:
        for path, kept in pairs:
            kept.rename(path)

    return put_back


@pytest.mark.parametrize("how", ["folder", "rejected"])
@pytest.mark.parametrize("named", [True, False])
def test_patients_who_were_away_come_back_to_their_sides(
    data: Path, write_sample: Write, caplog: pytest.LogCaptureFixture, how: str, named: bool
) -> None:
    caplog.set_level("INFO")
    if not named:
        for path in (data / "data").glob("*/meta.json"):
            path.unlink()
    run(data)
    before = sides(data)
    first, second = hide(data, [0, 1, 2, 3, 4, 5], how), hide(data, [6, 7, 8], how)
    code = 0 if how == "folder" else 3
    assert run(data) == code
    absent = (data / "o_absent.json").read_text()
    assert "9 of the earlier split are gone" in caplog.text
    assert "the sides of those who are gone are kept in" in caplog.text
    for number in range(9):
        assert f"s{number:02d}" not in absent, "no name is kept of somebody who was taken out"
        assert f'"p{number}"' not in absent
    second()
    for number in range(9):
        write_sample(data / "data" / f"new{number}", meta={"patient_id": f"n{number}"})
    caplog.clear()
    assert run(data) == code
    assert "3 patients are back on the sides that they had before" in caplog.text
    first()
    assert run(data) == 0
    after = sides(data)
    assert {name: after[name] for name in before} == before
    assert not (data / "o_absent.json").exists()


def test_a_sample_that_was_away_keeps_its_side_when_its_patient_has_an_id_by_then(
    tmp_path: Path, write_sample: Write
) -> None:
    for number in range(20):
        write_sample(tmp_path / "data" / f"s{number:02d}", "lytic lesion" if number % 2 else "healthy")
    run(tmp_path)
    before = sides(tmp_path)
    back = hide(tmp_path, [3, 4, 5], "folder")
    run(tmp_path)
    back()
    for number in range(20):
        (tmp_path / "data" / f"s{number:02d}" / "meta.json").write_text(json.dumps({"patient_id": f"p{number}"}))
    assert run(tmp_path) == 0
    assert sides(tmp_path) == {f"p{int(name[1:])}": side for name, side in before.items()}


def test_who_was_away_is_forgotten_where_everybody_is_dealt_anew(data: Path) -> None:
    run(data)
    back = hide(data, [0, 1, 2], "folder")
    run(data)
    assert (data / "o_absent.json").exists()
    assert run(data, "--seed", 1) == 0
    assert not (data / "o_absent.json").exists()
    run(data)
    for side in ("train", "val", "test"):
        (data / f"o_{side}.json").unlink()
    back()
    fresh = data / "fresh"
    fresh.mkdir()
    (fresh / "data").symlink_to(data / "data")
    assert run(data) == run(fresh) == 0
    assert sides(data) == sides(fresh)


@pytest.mark.parametrize("content", ["[]", '{"split": "x", "salt": 1, "patients": {}, "samples": {}}', '{"salt": "a"}'])
def test_a_damaged_record_of_who_was_away_is_refused(data: Path, content: str) -> None:
    run(data)
    hide(data, [0], "folder")
    run(data)
    (data / "o_absent.json").write_text(content)
    with pytest.raises(MedSoftError, match=r"o_absent\.json: is damaged; .*remove"):
        run(data)


def test_a_sample_that_joins_a_patient_of_another_side_is_named(
    data: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10):
        write_sample(data / "data" / f"x{number}")
    run(data)
    found = sides(data)
    one = next(f"x{n}" for n in range(10) if found[f"x{n}"] == "train")
    other = next(name for name in found if name[0] == "p" and found[name] == "test")
    (data / "data" / one / "meta.json").write_text(json.dumps({"patient_id": other}))
    assert run(data) == 0
    assert "1 sample changed sides with their patient's id" in caplog.text
    assert f"{one} from train to test, as a sample of {other}" in caplog.text
    assert "must not be judged on this split" in caplog.text


def test_a_split_that_has_lost_nearly_everybody_is_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another root gives other names to the same samples."""
    for path in (data / "data").glob("*/meta.json"):
        path.unlink()
    run(data)
    (data / "data").rename(data / "inner")
    (data / "data").mkdir()
    (data / "inner").rename(data / "data" / "inner")
    assert run(data) == 0
    assert "warning: 40 of 40 patients of the earlier split are gone and 40 are new" in caplog.text
