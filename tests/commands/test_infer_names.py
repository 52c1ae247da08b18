"""dataset_infer.py: which samples it takes, where its results go, and what their meta.json says."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PHANTOM, call, dataset_infer, infer, metas, record, whole

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations

LESION = "lytic lesion of the L3 vertebra"


def rejects(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "rejects.json").read_text())


def replay(meta: Path, output: Path, *more: Any) -> int:
    return call(dataset_infer, "--replay", meta, "--output_dir", output, "--device", "cpu", *more)


def edit_meta(folder: Path, **changes: Any) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made") / "project"


@pytest.fixture
def made(final: Path, write_sample: Callable, project: Path, tmp_path: Path) -> Path:
    """A project folder with data/a, data/b and the results of both, which are drawn once and copied."""
    if not project.exists():
        for name in ("a", "b"):
            write_sample(project / "data" / name, LESION, meta={"patient_id": name})
        assert infer(final, project / "results", "--data", project / "data") == 0
    return shutil.copytree(project, tmp_path / "project")


# ------------------------------------------------------------------------------------------------- synthetic samples


def test_synthetic_samples_are_not_taken_for_real_ones(
    final: Path, write_sample: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, prompt, synthetic in (("a", "healthy", 0), ("b", LESION, 0), ("c", "healthy", 1), ("d", "sclerotic", 1)):
        write_sample(tmp_path / "data" / name, prompt, meta={"synthetic": bool(synthetic)})
    given = ["--train_json", tmp_path / "data", "--variants", 5]
    assert infer(final, tmp_path / "out", *given) == 0
    assert {(meta["parent_id"], meta["prompt_from"]) for meta in metas(tmp_path / "out").values()} == {("a", "b")}
    assert "warning: 2 synthetic samples are left out, the first: c" in caplog.text
    assert infer(final, tmp_path / "all", "--data", tmp_path / "data", "--choose", "all", "--prompt", LESION) == 0
    assert set(metas(tmp_path / "all")) == {"a__v0", "b__v0"}
    (tmp_path / "list.txt").write_text("d\n")
    assert infer(final, tmp_path / "listed", "--data", tmp_path / "data", "--choose", tmp_path / "list.txt") == 0
    assert set(metas(tmp_path / "listed")) == {"d__v0"}


def test_nothing_but_synthetic_samples(final: Path, write_sample: Callable, tmp_path: Path) -> None:
    write_sample(tmp_path / "data" / "a", LESION, meta={"synthetic": True})
    with pytest.raises(MedSoftError, match="no sample was chosen; synthetic ones only if --choose lists them"):
        infer(final, tmp_path / "out", "--data", tmp_path / "data")
    write_sample(tmp_path / "data" / "b", "healthy")
    with pytest.raises(MedSoftError, match="has no diseased sample to take prompts from"):
        infer(final, tmp_path / "out", "--train_json", tmp_path / "data")


# ------------------------------------------------------------------------------------------------- where results go


@pytest.mark.parametrize("name", ["../victim", "a/../../victim", "/victim", "", "a\0b"])
def test_parent_id_cannot_lead_out_of_the_output_folder(made: Path, final: Path, tmp_path: Path, name: str) -> None:
    name = f"{tmp_path}{name}" if str(name).startswith("/") else name
    victim = tmp_path / "deep" / "victim__v0"
    shutil.copytree(made / "data" / "a", victim)
    before = {file: file.read_bytes() for file in victim.iterdir()}
    edit_meta(made / "results" / "a__v0", parent_id=name)
    with pytest.raises(MedSoftError, match=r"a__v0.*(leads out of|parent_id: expected text)"):
        replay(made / "results" / "a__v0" / "meta.json", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
    assert infer(final, tmp_path / "deep" / "out", "--like", made / "results") == 3  # the other one is made
    assert set(metas(tmp_path / "deep" / "out")) == {"b__v0"}
    (reject,) = rejects(tmp_path / "deep" / "out")
    assert "a__v0" in reject["file"]
    assert {file: file.read_bytes() for file in victim.iterdir()} == before
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"victim__v0", "out", ".out.lock"}


def test_link_in_the_output_folder_is_not_followed(made: Path, final: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--data", made / "data") == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "deep").symlink_to(tmp_path / "elsewhere")
    write_annotations(tmp_path / "data.json", load_samples(made / "data")[0])
    records = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([*records, records[0] | {"sample_id": "deep/a"}]))
    assert infer(final, tmp_path / "out", "--data", tmp_path / "data.json", "--overwrite") == 3
    (reject,) = rejects(tmp_path / "out")
    assert "deep/a__v0': leads out of" in reject["reason"]
    assert not list((tmp_path / "elsewhere").iterdir())
    assert set(metas(tmp_path / "out")) == {"a__v0", "b__v0"}


def test_two_results_of_one_name_are_refused_before_anything_is_made(made: Path, final: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "results" / "a__v0", made / "results" / "again__v0")
    with pytest.raises(MedSoftError, match=r"a__v0 and .*again__v0: both results would be written as a__v0"):
        infer(final, tmp_path / "out", "--like", made / "results")
    assert not (tmp_path / "out").exists()


def test_results_do_not_lie_in_one_another(final: Path, write_sample: Callable, tmp_path: Path) -> None:
    for name in ("a", "a__v0/b"):
        write_sample(tmp_path / "data" / name, LESION)
    with pytest.raises(MedSoftError, match="its result a__v0/b__v0 would lie in a__v0; rename it"):
        infer(final, tmp_path / "out", "--data", tmp_path / "data")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("long", ["b" * 243, "椎" * 80, f"{'c' * 240}/x"])
def test_too_long_a_name_is_rejected_and_the_rest_is_made(
    final: Path, write_sample: Callable, tmp_path: Path, long: str
) -> None:
    for name in ("a", long, "z"):
        write_sample(tmp_path / "data" / name, LESION)
    for _ in range(2):  # complete the second time
        assert infer(final, tmp_path / "out", "--data", tmp_path / "data") == 3
    assert set(metas(tmp_path / "out")) == {"a__v0", "z__v0"}
    whole(tmp_path / "out")
    (reject,) = rejects(tmp_path / "out")
    assert reject["sample_id"] == long
    assert "longer than 239 bytes" in reject["reason"]


def test_longest_name_that_is_taken_is_written_with_all_that_belongs_to_it(
    final: Path, write_sample: Callable, tmp_path: Path
) -> None:
    write_sample(tmp_path / "data" / ("b" * 235), LESION)
    assert infer(final, tmp_path / "out", "--data", tmp_path / "data") == 0
    whole(tmp_path / "out")
    assert len(list((tmp_path / "out" / "report_files").glob("*.png"))) == 1
    assert "no report" not in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------- what meta.json says


def test_keys_of_the_user_travel_with_the_sample(final: Path, write_sample: Callable, tmp_path: Path) -> None:
    own = {"StudyInstanceUID": "1.2.840.1", "site": "north", "nested": {"kVp": 120}, "age": 61.5}
    own |= {
        "modality": "CT",
        "region": "lumbar",
        "scanner": "one",
        "unit": "HU",
        "value_offset": -1024,
        "value_scale": 1,
    }
    own |= {"series": "abc", "instance": "def", "acquired": True, "turn": [False, True, False], "affine": [[0.0, 1.0]]}
    taken = {"seed": 99, "prompt": "theirs", "level": "L3", "spacing_mm": [2.0, 1.0]}
    write_sample(tmp_path / "data" / "a", LESION, meta=own | taken)
    assert infer(final, tmp_path / "out", "--data", tmp_path / "data", "--exact") == 0
    ((_, meta),) = metas(tmp_path / "out").items()
    assert own.items() <= meta.items()
    assert (meta["seed"], meta["prompt"], meta["level"], meta["spacing_mm"]) == (0, LESION, "L3", [2.0, 1.0])
    assert infer(final, tmp_path / "like", "--like", tmp_path / "out", "--exact") == 0
    ((_, again),) = metas(tmp_path / "like").items()
    assert own.items() <= again.items()
    assert meta | {"command": None, "prompt_from": None} == again | {"command": None, "prompt_from": None}


def test_results_and_data_can_be_moved_together(made: Path, tmp_path: Path) -> None:
    """Their paths are relative where data and results lie below one folder; other paths stay absolute."""
    before = metas(made / "results")["a__v0"]
    assert before["parent_image"] == "../../data/a/image.png"
    assert Path(before["checkpoint"]).is_absolute()
    made.rename(tmp_path / "moved")
    results = tmp_path / "moved" / "results"
    assert replay(results / "a__v0" / "meta.json", tmp_path / "moved" / "again") == 0
    assert metas(tmp_path / "moved" / "again")["a__v0"] == before
    assert replay(results / "a__v0" / "meta.json", tmp_path / "elsewhere" / "again") == 0
    ((_, meta),) = metas(tmp_path / "elsewhere" / "again").items()
    assert Path(meta["parent_image"]) == tmp_path / "moved" / "data" / "a" / "image.png"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "0", "seed: expected a whole number of at least 0, found '0'"),
        ("variant", -1, "variant: expected a whole number"),
        ("variant", True, "variant: expected a whole number"),
        ("parent_image", 3, "parent_image: expected text, found 3"),
        ("checkpoint", None, "checkpoint: expected text, found None"),
        ("overrides", "x=1", "overrides: expected a list of KEY=VALUE"),
        ("exact", 1, "exact: expected true or false, found 1"),
    ],
)
def test_replay_names_the_key_that_is_wrong(made: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    meta = edit_meta(made / "results" / "a__v0", **{key: value})
    with pytest.raises(MedSoftError, match=f"meta.json: {message}"):
        replay(meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_like_rejects_a_sample_that_is_no_result(
    made: Path, final: Path, write_sample: Callable, tmp_path: Path
) -> None:
    write_sample(made / "results" / "c", LESION)
    assert infer(final, tmp_path / "out", "--like", made / "results") == 3
    assert set(metas(tmp_path / "out")) == {"a__v0", "b__v0"}
    (reject,) = rejects(tmp_path / "out")
    assert "parent_image: expected text, found nothing; expected the meta.json of a result" in reject["reason"]
    assert record(tmp_path / "out")["rejected"] == 1


# ------------------------------------------------------------------------------------------------- the report


def test_report_shows_every_result_whatever_its_name(final: Path, write_sample: Callable, tmp_path: Path) -> None:
    """Each picture has a file of its own that a browser finds by its address."""
    from urllib.parse import unquote, urlsplit

    from test_report import Page

    deep = "/".join(f"1.2.826.0.1.3680043.8.498.{str(k) * 38}" for k in range(1, 5))
    names = ["case #1", "50%20", "what?", "p1/L3", "p1__L3", "p1_L3", "患者01", "a&b", '"q"', deep]
    for name in names:
        write_sample(tmp_path / "data" / name, LESION)
    assert infer(final, tmp_path / "out", "--data", tmp_path / "data") == 0
    page = Page(tmp_path / "out" / "report.html")
    shown = [tmp_path / "out" / unquote(urlsplit(source).path) for source in page.images]
    assert len(set(shown)) == len(names)
    assert all(path.is_file() and len(os.fsencode(path.name)) < 150 for path in shown)
    assert {path.suffix for path in (tmp_path / "out" / "report_files").iterdir()} == {".png", ".json"}
    assert len(list((tmp_path / "out" / "report_files").iterdir())) == 2 * len(names)


def test_results_that_were_copied_alone_say_what_is_missing(
    final: Path, made: Path, write_sample: Callable, tmp_path: Path
) -> None:
    copied = shutil.copytree(made / "results", tmp_path / "other" / "results")
    expected = (
        r"\(2 rejected; first: .*data/a/image\.png: is not there .* made from, .*: copy results and data together"
    )
    with pytest.raises(MedSoftError, match=expected):
        infer(final, tmp_path / "like", "--like", copied)
    with pytest.raises(MedSoftError, match=r"data/a/image\.png: is not there .*: copy results and data together"):
        replay(copied / "a__v0" / "meta.json", tmp_path / "again", "--ckpt", final, "--config", PHANTOM)
    assert len(load_samples(copied)[0]) == 2
    for name in "ab":  # other data of the same names is not taken for it
        write_sample(tmp_path / "other" / "data" / name, LESION, meta={"patient_id": name})
    with pytest.raises(
        MedSoftError, match=r"2 rejected; first: .*has changed since, or is another image than the one that"
    ):
        infer(final, tmp_path / "like", "--like", copied)


def test_lengths_in_mm_reject_what_has_no_spacing_and_what_is_too_wide(
    final: Path, write_sample: Callable, tmp_path: Path
) -> None:
    """Both are named with a cure; the others are inpainted."""
    in_mm = tmp_path / "in_mm.ckpt"
    content = torch.load(final, weights_only=True)
    content["medsoft"]["config"]["data"]["mm_per_pixel"] = 0.5  # 32 mm
    torch.save(content, in_mm)
    for name, spacing in (("good", {"spacing_mm": 1.0}), ("none", {}), ("wide", {"spacing_mm": [1.0, 9.0]})):
        write_sample(tmp_path / "data" / name, LESION, meta=spacing)
    assert infer(in_mm, tmp_path / "out", "--data", tmp_path / "data", "data.mm_per_pixel=0.5") == 3
    assert [folder.name for folder in sorted((tmp_path / "out").glob("*__v0"))] == ["good__v0"]
    found = {reject["sample_id"]: reject["reason"] for reject in rejects(tmp_path / "out")}
    assert found.keys() == {"none", "wide"}
    assert "data.mm_per_pixel=0.5: the sample's meta.json has no spacing_mm; add it" in found["none"]
    assert re.search(
        r"mm, the window of data\.mm_per_pixel=0\.5 has 32\.0 mm; data\.mm_per_pixel=\S+ is wide", found["wide"]
    )
