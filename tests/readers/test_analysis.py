"""reader_study.py analyse: known rates are found again, kappas agree with others', bad answers are named."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import call, make, make_world, read, save_answers, truths
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from ldm.core.errors import MedSoftError, UsageError
from ldm.readers.agreement import fleiss_kappa
from ldm.readers.numbers import obuchowski_rockette

# Fourteen raters, ten subjects, five categories; kappa 0.210 (Wikipedia, "Fleiss' kappa", worked example).
WORKED = (
    """0 0 0 0 14, 0 2 6 4 2, 0 0 3 5 6, 0 3 9 2 0, 2 2 8 1 1, 7 7 0 0 0, 3 2 6 3 0, 2 5 3 2 2, 6 5 2 1 0, 0 2 2 3 7"""
)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study of single pictures and one of pairs, with six readers each in ``answers`` beside the key."""
    root = make_world(tmp_path_factory.mktemp("analysis"), 30)
    made = {}
    for design in ("single", "pairs"):
        study = made[design] = make(root, design, "--design", design)
        key = read(study / "key.json")
        for number, code in enumerate(("PERFECT", "RANDOM1", "RANDOM2", "SKILLED1", "SKILLED2", "BIASED")):
            about = {"code": code, "years": 4 * number, "speciality": "radiology", "seen": "never"}
            save_answers(study / "answers" / f"{code}.json", key, code, answers_of(key, code), reader=about)
    return made


def answers_of(key: dict[str, Any], code: str) -> dict[str, Any]:
    """Perfect: always right. Random: by chance. Skilled: AUC 0.76, or right in 0.76. Biased: no skill, 5, 6 or left."""
    rng, truth = np.random.default_rng(3000 + len(code) + 10 * ord(code[-1])), truths(key)
    found: dict[str, Any] = {}
    for item in rng.permutation(list(truth)):
        right = bool(rng.random() < {"P": 1, "S": 0.76}.get(code[0], 0.5))
        if key["design"] == "pairs":
            other = {"left": "right", "right": "left"}[truth[item]]
            found[str(item)] = "left" if code == "BIASED" else truth[item] if right else other
        elif code.startswith("SKILLED"):  # two normal distributions one standard deviation apart, cut into six steps
            felt = rng.normal(0.5 if truth[item] == "drawn" else -0.5)
            found[str(item)] = int(np.searchsorted([-1.2, -0.6, 0, 0.6, 1.2], felt)) + 1
        else:
            low, high = (5, 7) if code == "BIASED" else (1, 7)
            found[str(item)] = (
                (6 if truth[item] == "drawn" else 1) if code == "PERFECT" else int(rng.integers(low, high))
            )
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_rates_of_single_pictures_are_found_again(studies: dict[str, Path], tmp_path: Path) -> None:
    study, out = studies["single"], tmp_path / "out"
    assert call("analyse", study, study / "answers", "--output_dir", out) == 0
    found, key = read(out / "analysis.json"), read(study / "key.json")
    codes = found["readers"]
    rows = [row for row in rows_of(out / "answers.csv") if not row["repeat_of"]]
    by_reader = {code: [row for row in rows if row["reader"] == code] for code in codes}
    numbers = found["numbers"]
    for place, code in enumerate(codes):
        truth = [row["truth"] == "drawn" for row in by_reader[code]]
        steps = [int(row["answer"]) for row in by_reader[code]]
        assert numbers["auc"]["readers"][place]["value"] == pytest.approx(roc_auc_score(truth, steps))
        assert numbers["accuracy"]["readers"][place]["value"] == pytest.approx(np.mean((np.array(steps) > 3) == truth))
        expected = {"P": 1, "S": 0.76}.get(code[0], 0.5)
        low, high = (numbers["auc"]["readers"][place][name] for name in ("low", "high"))
        assert low <= expected <= high, code
    assert numbers["called_drawn"]["readers"][codes.index("BIASED")]["value"] == 1
    assert numbers["specificity"]["readers"][codes.index("BIASED")]["value"] == 0
    mean = numbers["auc"]
    assert mean["value"] == pytest.approx(np.mean([each["value"] for each in mean["readers"]]))
    for name in ("over_readers", "over_cases"):
        assert mean["low"] <= mean[name][0] <= mean["value"] <= mean[name][1] <= mean["high"]
    true_mean = (1 + 3 * 0.5 + 2 * 0.76) / 6
    assert mean["obuchowski_rockette"][0] < true_mean < mean["obuchowski_rockette"][1]

    kappas = found["agreement"]["weighted"]
    steps = {code: {row["item"]: int(row["answer"]) for row in by_reader[code]} for code in codes}
    pair = [[steps[code][item] for item in steps["SKILLED1"]] for code in ("SKILLED1", "SKILLED2")]
    assert kappas["SKILLED1 SKILLED2"] == pytest.approx(cohen_kappa_score(*pair, weights="quadratic"))
    assert found["agreement"]["intra_by_reader"]["PERFECT"] == 1
    assert found["agreement"]["intra_by_reader"]["RANDOM1"] < 0.9
    assert set(found["by_type"]) == {"osteolytic", "osteoblastic"}
    assert {name: each["readers"] for name, each in found["by_experience"].items()} == {
        "under 5 years": 2,
        "5 to 10 years": 1,
        "over 10 years": 3,
    }
    table = {row["reader"]: row for row in rows_of(out / "readers.csv")}
    assert float(table["PERFECT"]["auc"]) == 1
    assert float(table["PERFECT"]["median_seconds"]) == 4.5
    assert "6 readers rated 30 real and 30 drawn pictures in six steps" in found["paragraph"]
    assert key["study"] in (out / "report.html").read_text()
    assert {path.name for path in out.glob("*.png")} == {"by_reader.png", "steps.png", "roc.png", "time.png"}

    before = (out / "report.html").stat().st_mtime_ns
    assert call("analyse", study, study / "answers", "--output_dir", out) == 0
    assert (out / "report.html").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="holds an analysis of another run"):
        call("analyse", study, study / "answers" / "RANDOM1.json", "--output_dir", out)


def test_rates_of_pairs_are_found_again(studies: dict[str, Path], tmp_path: Path) -> None:
    study = studies["pairs"]
    assert call("analyse", study, study / "answers", "--output_dir", tmp_path / "out") == 0
    found = read(tmp_path / "out" / "analysis.json")
    entry, codes = found["numbers"]["accuracy"], found["readers"]
    for place, code in enumerate(codes):
        low, high = (entry["readers"][place][name] for name in ("low", "high"))
        assert low <= {"P": 1, "S": 0.76}.get(code[0], 0.5) <= high, code
    assert found["numbers"]["called_left"]["readers"][codes.index("BIASED")]["value"] == 1
    assert found["agreement"]["intra_by_reader"]["PERFECT"] == 1  # although the repeats have changed sides
    assert "30 pairs of a real and a drawn picture" in found["paragraph"]
    assert any("BIASED gave one answer to everything" in note for note in found["notes"])


def test_fleiss_kappa_is_that_of_the_worked_example() -> None:
    counts = np.array([row.split() for row in WORKED.split(", ")], int)
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.vstack([counts, [[1, 0, 0, 0, 0]]])) == fleiss_kappa(counts)  # one answer is no agreement
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1


def test_the_interval_of_obuchowski_and_rockette_by_hand() -> None:
    """Two readers, 0.6 and 0.8, whose resampled values have the variance 0.01 and the covariance 0.005."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2000, 1)), rng.normal(size=(2000, 2))
    noise = np.hstack([shared, own])
    noise = np.linalg.solve(np.linalg.cholesky(np.cov(noise.T)), (noise - noise.mean(0)).T).T  # exactly uncorrelated
    resampled = 0.7 + 0.1 * np.sqrt(0.5) * (noise[:, :1] + noise[:, 1:])
    low, high = obuchowski_rockette(np.array([0.6, 0.8]), resampled)
    mean_square, total = 0.02, 0.02 + 2 * 0.005
    freedom = (total / mean_square) ** 2  # 2.25, whose quantile is 3.889
    assert freedom == pytest.approx(2.25)
    assert (low + high) / 2 == pytest.approx(0.7, abs=0.15)
    assert high == 1.0  # 0.7 + 3.889 * sqrt(0.015) is beyond
    assert low == pytest.approx(0.7 - 3.889 * np.sqrt(0.015), abs=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(study="0123456789ab"), "study: expected .*: answers of another study"),
        (lambda found: found["answers"][3].update(item="abc"), r"answers\[3\].item: 'abc' is none of this study"),
        (lambda found: found["answers"][3].update(found["answers"][2]), r"answers\[3\].item: \w+ is answered twice"),
        (lambda found: found["answers"][3].update(answer=7), r"answers\[3\].answer: expected one of 1, 2, .*, found 7"),
        (lambda found: found["answers"][3].update(answer=True), r"answers\[3\].answer: .*, found True"),
        (lambda found: found["answers"][3].update(seconds=-1), r"answers\[3\].seconds: expected seconds, found -1"),
        (lambda found: found["answers"].pop(), "answers: says it is complete, but lacks"),
        (lambda found: found["answers"].clear(), "answers: holds none"),
        (lambda found: found["reader"].update(code="../x"), "reader.code: expected up to 20 letters and digits"),
        (lambda found: found["reader"].update(years="ten"), "reader.years: expected a number from 0 to 70"),
        (lambda found: found.pop("reader"), "reader, answers: expected a file that the study's page has saved"),
    ],
)
def test_a_file_that_is_not_as_saved_is_refused(
    studies: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    content = read(studies["single"] / "answers" / "SKILLED1.json")
    change(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(MedSoftError, match=rf"none of 1 file of answers can be used; the first: .*bad.json: {message}"):
        call("analyse", studies["single"], tmp_path / "bad.json", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


def test_bad_files_do_not_stop_the_others_and_unfinished_readers_are_used_by_rule(
    studies: dict[str, Path], tmp_path: Path
) -> None:
    key, answers = read(studies["single"] / "key.json"), tmp_path / "answers"
    for code in ("RANDOM1", "SKILLED1"):
        save_answers(answers / f"{code}.json", key, code, answers_of(key, code))
    save_answers(answers / "copy.json", key, "random1", answers_of(key, "RANDOM2"))
    half = dict(list(answers_of(key, "SKILLED2").items())[:40])
    save_answers(answers / "half.json", key, "HALF", half)
    (answers / "broken.json").write_text('{"study": ')
    assert call("analyse", studies["single"], answers, "--output_dir", tmp_path / "out") == 3
    reasons = {Path(each["file"]).name: each["reason"] for each in read(tmp_path / "out" / "rejects.json")}
    assert reasons.keys() == {"RANDOM1.json", "copy.json", "broken.json"}
    assert reasons["copy.json"] == "reader.code: RANDOM1 is the reader of RANDOM1.json too; keep one"
    found = read(tmp_path / "out" / "analysis.json")
    assert found["readers"] == ["SKILLED1"]
    assert "Reader HALF has answered 40 of 66 items; this is left out (--unfinished uses it)." in found["notes"]
    assert found["numbers"]["auc"]["low"] is None  # of a single reader
    assert found["numbers"]["auc"]["over_cases"]

    assert call("analyse", studies["single"], answers, "--output_dir", tmp_path / "all", "--unfinished") == 3
    found = read(tmp_path / "all" / "analysis.json")
    assert found["readers"] == ["HALF", "SKILLED1"]
    assert any("HALF has answered 40 of 66 items; this is used as far as it goes" in note for note in found["notes"])
    assert any("2 readers are too few to speak of others" in note for note in found["notes"])


def test_readers_who_stopped_before_they_had_seen_both_kinds(studies: dict[str, Path], tmp_path: Path) -> None:
    study = studies["single"]
    key, answers = read(study / "key.json"), tmp_path / "answers"
    real = [item for item, kind in truths(key).items() if kind == "real" and not key["items"][item]["repeat_of"]]
    save_answers(answers / "one_kind.json", key, "ONEKIND", dict.fromkeys(real[:12], 2))
    words = ["--unfinished", "--output_dir"]
    assert call("analyse", study, answers, *words, tmp_path / "alone") == 0
    found = read(tmp_path / "alone" / "analysis.json")
    assert found["numbers"]["auc"]["value"] is None
    assert "The mean AUC was undefined (nobody rated both kinds), the accuracy 1.00" in found["paragraph"]

    perfect = study / "answers" / "PERFECT.json"
    assert call("analyse", study, answers, perfect, *words, tmp_path / "both") == 0
    found = read(tmp_path / "both" / "analysis.json")
    assert "Reader ONEKIND rated pictures of one kind alone: the mean AUC is that of the others." in found["notes"]
    auc = found["numbers"]["auc"]
    assert auc["value"] == 1
    assert auc["readers"][0] == {"value": None, "low": None, "high": None}

    repeats = [item for item, about in key["items"].items() if about["repeat_of"]]
    path = save_answers(tmp_path / "repeats.json", key, "REPEATS", dict.fromkeys(repeats, 2))
    with pytest.raises(MedSoftError, match=r"repeats.json: answers: holds none, or of hidden repeats alone"):
        call("analyse", study, path, *words, tmp_path / "repeats")


def test_the_same_again_is_complete_and_a_corrected_key_is_not(
    studies: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    key = read(studies["pairs"] / "key.json")
    (tmp_path / "key.json").write_text(json.dumps(key))
    words = ["analyse", tmp_path, studies["pairs"] / "answers" / "PERFECT.json", "--output_dir", tmp_path / "out"]
    for _ in range(2):
        assert call(*words) == 0
    assert caplog.messages.count(f"{tmp_path / 'out'}: already complete") == 1
    first = next(iter(key["pictures"].values()))
    first["lesion_type"] = "mixed"
    (tmp_path / "key.json").write_text(json.dumps(key))
    with pytest.raises(UsageError, match=r"holds an analysis of another run \(key: "):
        call(*words)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["{study}"], UsageError, "expected the study's folder, then files of answers"),
        (["{study}", "{study}/none"], MedSoftError, "none: does not exist"),
        (["{study}", "{study}/for_readers"], MedSoftError, "holds no file of answers"),
        (["{study}/answers", "{study}/answers"], MedSoftError, "key.json: this key of a reader study does not exist"),
        (["{study}", "{study}/answers", "--cases", "3"], UsageError, "--cases: is no flag of analyse"),
    ],
)
def test_what_is_no_study_and_no_answers_is_refused(
    studies: dict[str, Path], tmp_path: Path, words: list[str], error: type, message: str
) -> None:
    given = [word.format(study=studies["single"]) for word in words]
    with pytest.raises(error, match=message):
        call("analyse", *given, "--output_dir", tmp_path / "out")
