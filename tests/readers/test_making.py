"""reader_study.py make: what is shown, what the folder gives away, what is left out, refused and warned of."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reading import add_result, add_sample, call, make, make_world, read, told, truths

from ldm.core.errors import MedSoftError, UsageError
from ldm.data.checks import trained_on
from ldm.data.folders import read_sample
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.readers.pictures import crop_of
from ldm.readers.sizes import half_width, what_it_needs
from ldm.reviews.table import Review, add_review


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("readers"), 20)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Six samples of each kind that a test may change."""
    return make_world(tmp_path, 6)


def png(study: Path, name: str, to: Path) -> Path:
    """A picture of a study as a file."""
    text = (study / "for_readers" / "pictures" / f"{name}.js").read_text()
    to.write_bytes(base64.b64decode(re.fullmatch(rf'received\("{name}", "(.+)"\);\n', text)[1]))
    return to


def edit(folder: Path, **meta: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(read(path) | meta))


def test_what_was_rejected_in_review_is_not_shown(few: Path) -> None:
    judged = read_sample("h00__v0", few / "results" / "h00__v0")
    add_review(few / "review.csv", Review("h00__v0", "ann", "reject", str(judged.image_sha256)))
    key = read(make(few, "study", "--review", few / "review.csv") / "key.json")
    assert {"sample_id": "h00__v0", "why": "it was rejected in review"} in key["left_out"]
    assert "h00__v0" not in {each["sample_id"] for each in key["pictures"].values()}
    told = key["review"]
    assert (told["left_out"], told["never_reviewed"], told["reviewers"]) == (1, told["samples"] - 1, {"ann": 1})
    assert any(note.startswith("Review by ann (1): of 6 synthetic images, 1 rejected") for note in key["notes"])


def test_a_picture_that_is_replaced_meanwhile_is_not_shown_as_the_one_before(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crop(sample: Sample, side: int, deep: bool) -> Any:
        write_png(sample.image, 255 - read_image(sample.image))
        return crop_of(sample, side, deep)

    monkeypatch.setattr("ldm.readers.making.crop_of", crop)
    with pytest.raises(MedSoftError, match=r"image\.png: was replaced or changed after it had been read; run the same"):
        make(few, "study")
    assert [path.name for path in (few / "study").iterdir()] == ["make.json"]
    assert not read(few / "study" / "make.json")["complete"]


def test_a_study_of_single_pictures_gives_nothing_away(world: Path, tmp_path: Path) -> None:
    study = make(world, "single")
    key, page = read(study / "key.json"), told(study)
    kinds = [each["kind"] for name, each in key["pictures"].items() if key["items"][name]["repeat_of"] is None]
    assert (kinds.count("real"), kinds.count("drawn")) == (20, 20)
    types = [(each["kind"], each["lesion_type"]) for each in key["pictures"].values()]
    assert {pair: types.count(pair) for pair in types}.keys() == {(a, b) for a, b in types}
    base = [name for name, item in key["items"].items() if item["repeat_of"] is None]
    assert len({key["pictures"][name]["patient_id"] for name in base}) == 40
    repeats = {name: item["repeat_of"] for name, item in key["items"].items() if item["repeat_of"]}
    assert len(repeats) == 4 == len(page["late"]) == len(page["early"])
    assert set(repeats) == set(page["late"])
    assert set(repeats.values()) == set(page["early"])
    assert sorted(truths(key)[name] for name in repeats) == ["drawn", "drawn", "real", "real"]

    files = sorted(path.name for path in (study / "for_readers").rglob("*") if path.is_file())
    assert files == sorted(["index.html", *(f"{name}.js" for name in key["pictures"])])
    written = [path.stat().st_mtime_ns for path in sorted((study / "for_readers" / "pictures").iterdir())]
    assert written == sorted(written)
    everything = json.dumps(page)
    assert not re.search(r"real|drawn|patient|parent|h0|r0|result", everything)
    assert page["items"].keys() == key["items"].keys()
    for name, about in key["pictures"].items():
        sample = read_sample(about["sample_id"], Path(about["image"]).parent)
        path = png(study, name, tmp_path / "picture.png")
        assert np.array_equal(read_image(path), crop_of(sample, page["side"], False))
        assert Image.open(path).text == {}
    assert 64 <= page["side"] <= 96
    assert "http" not in re.sub(r"<script type=.*?</script>", "", (study / "for_readers/index.html").read_text())

    before = (study / "for_readers" / "index.html").stat().st_mtime_ns
    make(world, "single")
    assert (study / "for_readers" / "index.html").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"holds a study of another run \(seed: 0 -> 1\)"):
        make(world, "single", "--seed", 1)
    make(world, "single", "--seed", 1, "--overwrite")
    assert not set(read(study / "key.json")["pictures"]) & set(key["pictures"])


def test_pairs_have_a_side_each_and_repeats_change_it(world: Path) -> None:
    study = make(world, "pairs", "--design", "pairs", "--cases", 12)
    key = read(study / "key.json")
    truth, items = truths(key), key["items"]
    base = [name for name, item in items.items() if item["repeat_of"] is None]
    assert [truth[name] for name in base].count("left") == 6 == len(base) / 2
    for name in base:
        left, right = (key["pictures"][each] for each in items[name]["pictures"])
        assert (left["lesion_type"], left["severity"]) == (right["lesion_type"], right["severity"])
        assert left["patient_id"] != right["patient_id"]
    ((name, source),) = [(name, item["repeat_of"]) for name, item in items.items() if item["repeat_of"]]
    assert truth[name] != truth[source]
    ids = [[key["pictures"][each]["sample_id"] for each in items[which]["pictures"]] for which in (name, source)]
    assert ids[0] == ids[1][::-1]
    assert not set(items[name]["pictures"]) & set(items[source]["pictures"])


def test_16_bits_are_cut_to_the_window_on_both_sides(tmp_path: Path) -> None:
    make_world(tmp_path, 4, deep=True, window=[10000, 30000])
    study = make(tmp_path, "deep")
    key, page = read(study / "key.json"), told(study)
    assert page["levels"] == 65536
    for name, about in key["pictures"].items():
        pixels = read_image(png(study, name, tmp_path / "picture.png"))
        assert pixels.dtype == np.uint16
        crop = read_image(Path(about["image"])).astype(float)
        assert (pixels == 65535).any() == (crop >= 30000).any() or about["lesion_type"] == "osteolytic"
        assert (pixels == 0).any() or about["lesion_type"] == "osteoblastic"
    add_sample(tmp_path / "real" / "r00", "osteolytic", "patient0", 0)
    study = make(tmp_path, "mixed")
    assert told(study)["levels"] == 256
    assert any("8 bits and others 16" in note for note in read(study / "key.json")["notes"])


def test_what_would_give_the_answer_away_is_left_out(few: Path) -> None:
    edit(few / "real" / "r00", notes=["another lesion is seen in this slice: L2_b"])
    twice = few / "real" / "r01b"
    add_sample(twice, "osteoblastic", "patient1", 1, severity="severe")
    mask = np.zeros((96, 96), np.uint8)
    mask[40:56, 40:56] = mask[2:6, 2:6] = 255
    Image.fromarray(mask).save(few / "real" / "r02" / "mask.png")
    sick = few / "real" / "r03" / "image.png"
    edit(few / "results" / "h01__v0", parent_image=str(sick), mask_from="carry")
    (few / "results" / "h03__v0" / "prompt.txt").write_text("healthy")
    (few / "real" / "r04" / "image.png").write_bytes(b"")
    add_result(few / "results" / "h07__v0", "osteoblastic", "parent7", 6)
    flags = [few / "results", "--real", few / "real", "--output_dir", few / "study", "--cases", 2]
    assert call("make", *flags) == 3
    key = read(few / "study" / "key.json")
    why = {each["sample_id"]: each["why"] for each in key["left_out"]}
    assert "more than one annotated lesion" in why["r01"]
    assert why["r01"] == why["r01b"]
    assert why["r00"].startswith("its meta.json notes a second lesion")
    assert why["r02"].startswith("its mask has a second part far from the first")
    assert why["h01__v0"].startswith("its parent has a lesion of its own")
    assert why["h03__v0"].startswith("it was drawn healthy")
    assert [each["sample_id"] for each in read(few / "study" / "rejects.json")] == ["r04"]
    assert {each["sample_id"] for each in key["pictures"].values()} == {"r03", "r05", "h05__v0", "h07__v0"}


def test_doubts_are_noted(few: Path) -> None:
    for number in range(6):
        edit(few / "results" / f"h{number:02d}__v0", scanner="B", trained_on=trained_on("stage1", ["patient2"]))
    Image.fromarray(read_image(few / "real" / "r01" / "image.png")).save(few / "real" / "r01" / "image.jpg", quality=95)
    (few / "real" / "r01" / "image.png").unlink()
    notes = " ".join(read(make(few, "study") / "key.json")["notes"])
    assert "scanner alone tells drawn from real pictures (AUC 1.00; real: a (6 of 6), drawn: b (6 of 6))" in notes
    assert "Give --match scanner" in notes
    assert "JPEG: 1 real and 0 drawn images, with blocks" in notes
    assert "1 of 6 real pictures are of patients that the generator learned from" in notes
    assert "6 pictures of each kind: so few" in notes
    with pytest.raises(MedSoftError, match="no real and no drawn sample of two patients have the same"):
        make(few, "matched", "--match", "scanner")
    for number in range(3):
        edit(few / "real" / f"r{number:02d}", scanner="B")
    key = read(make(few, "matched", "--match", "scanner") / "key.json")
    assert key["strata"] == {"osteolytic, moderate, b": 2, "osteoblastic, moderate, b": 1}


def test_a_patient_is_shown_twice_only_where_that_is_asked_for(few: Path) -> None:
    for number in range(3):
        edit(few / "results" / f"h{number:02d}__v0", patient_id=f"patient{number + 1}")
    assert read(make(few, "without") / "key.json")["pairs"] < 6
    key = read(make(few, "all", "--cases", 6) / "key.json")
    assert key["pairs"] == 6
    assert any("patients are shown more than once" in note for note in key["notes"])


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--cases", 7], MedSoftError, "--cases 7: only 6 real and 6 drawn samples can be matched"),
        (
            ["--half_width", 0.1],
            MedSoftError,
            r"5 readers and 6 drawn pictures .* plus or minus 0.2\d; .*needs about 5 readers with 5\d drawn",
        ),
        (["--match", "sex"], MedSoftError, "--match sex: no real sample has this key"),
        (["--unfinished"], UsageError, "--unfinished: is no flag of make"),
        (["--crop", 97], MedSoftError, "nothing can be compared"),
        (["--design", "both"], UsageError, "invalid choice: 'both'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(few: Path, flags: list[Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make(few, "study", *flags)
    assert not (few / "study" / "key.json").exists()


def test_sources_that_are_something_else_are_refused(few: Path) -> None:
    def refused(error: type, message: str, *words: Any) -> None:
        with pytest.raises(error, match=message):
            call("make", *words, "--output_dir", few / "study")

    real, results = few / "real", few / "results"
    refused(UsageError, "expected --real", results)
    refused(MedSoftError, "6 of 6 samples do not say that they are synthetic", real, "--real", real)
    refused(MedSoftError, "--real: expected at least 2 diseased samples", results, "--real", results)
    (results / "inference.json").write_text('{"complete": false}')
    refused(MedSoftError, "inference.json: these results are not complete", results, "--real", real)


def test_the_expected_width_follows_readers_and_cases() -> None:
    for design in ("single", "pairs"):
        assert half_width(5, 100, design) < half_width(5, 50, design)
        assert half_width(10, 50, design) < half_width(3, 50, design)
        assert half_width(1000, 50, design) > half_width(1000, 200, design)  # no number of readers replaces cases
    assert half_width(5, 51, "single") <= 0.1 < half_width(5, 50, "single")
    assert what_it_needs(0.1, 5, 20, "single").endswith("5 readers with 51 drawn and as many real pictures")
    assert "readers with" in what_it_needs(0.02, 3, 20, "single")
