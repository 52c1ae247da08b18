"""Asked-against-drawn information: against scikit-learn, and tables that are not a judge's."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from ldm.core.errors import MedSoftError
from ldm.data.folders import read_sample
from ldm.evaluation.information import asked_drawn, information_text, judged_types


def types(count: int, right: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Asked types of three kinds, and drawn ones that are right with this chance, else any of four."""
    rng = np.random.default_rng(seed)
    asked = rng.choice(["a", "b", "c"], count, p=[0.5, 0.3, 0.2])
    drawn = np.where(rng.random(count) < right, asked, rng.choice(["a", "b", "c", "healthy"], count))
    return asked.tolist(), drawn.tolist()


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_information_is_that_of_scikit_learn(right: float) -> None:
    asked, drawn = types(90, right)
    found = asked_drawn(asked, drawn, [f"p{number}" for number in range(90)])
    assert found["as_counted"] == pytest.approx(mutual_info_score(asked, drawn) / np.log(2))
    without = [np.delete(np.array([asked, drawn]), number, axis=1) for number in range(90)]
    mean = np.mean([mutual_info_score(*each) for each in without])
    jackknife = (90 * mutual_info_score(asked, drawn) - 89 * mean) / np.log(2)
    assert found["value"] == pytest.approx(min(jackknife, found["maximum"]))
    shares = np.unique(asked, return_counts=True)[1] / 90
    assert found["maximum"] == pytest.approx(entropy(shares, base=2))
    assert found["agreement"]["value"] == pytest.approx(np.mean(np.array(asked) == drawn))
    assert found["low"] <= found["value"] <= found["high"] <= found["maximum"] + 1e-9
    assert found["by_chance"] == pytest.approx(
        (3 - 1) * (4 - 1 if right < 1 else 3 - 1) / (2 * 90 * np.log(2)), rel=0.3
    )
    assert f"of at most {found['maximum']:.2f} ({found['as_counted']:.2f} as counted" in information_text(found)


def test_independent_types_tell_nothing_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 images of 20 patients each time; as counted they would seem to tell a sixth of a bit."""
    monkeypatch.setattr("ldm.evaluation.information.DRAWS", 2)  # this is not about intervals
    patients = [f"p{number // 3}" for number in range(60)]
    found = [asked_drawn(*types(60, 0.0, seed), patients) for seed in range(60)]
    assert np.mean([each["as_counted"] for each in found]) > 0.06
    assert np.mean([each["value"] for each in found]) == pytest.approx(0, abs=0.02)


def test_all_images_of_one_patient_are_taken_as_counted() -> None:
    asked, drawn = types(20, 0.7)
    found = asked_drawn(asked, drawn, ["p"] * 20)
    assert found["value"] == found["as_counted"] > 0


def test_one_type_always_agrees_often_and_tells_nothing() -> None:
    asked, _ = types(60, 1.0)
    found = asked_drawn(asked, ["a"] * 60, [f"p{number}" for number in range(60)])
    assert found["agreement"]["value"] > 0.4
    assert (found["value"], found["low"], found["high"]) == (0, 0, 0)


def test_images_of_the_same_patients_do_not_narrow_the_interval() -> None:
    asked, drawn = types(40, 0.7)
    patients = [f"p{number}" for number in range(40)]
    once = asked_drawn(asked, drawn, patients)
    again = asked_drawn(asked * 4, drawn * 4, patients * 4)
    assert (again["low"], again["high"]) == pytest.approx((once["low"], once["high"]))
    few = asked_drawn(asked, drawn, [f"p{number % 9}" for number in range(40)])
    assert (few["low"], few["high"], few["agreement"]["low"]) == (None, None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sample_id,predicted,p_healthy,p_diseased\nx/s0,diseased,0,1\n", "names no lesion types; expected the pred"),
        (
            "sample_id,predicted,p_healthy,p_a,p_b\nother,a,0,1,0\n",
            r"nothing about 1 sample \(the first: s0\); predict",
        ),
        ("sample_id,called\ns0,a\n", "expected a column predicted"),
    ],
)
def test_tables_that_are_no_judges_are_refused(tmp_path: Path, write_sample, content: str, message: str) -> None:
    sample = read_sample("s0", write_sample(tmp_path / "s0", meta={"lesion_type": "a"}))
    (tmp_path / "predictions.csv").write_text(content)
    with pytest.raises(MedSoftError, match=message):
        judged_types(tmp_path / "predictions.csv", [sample])


def test_images_that_do_not_say_what_was_asked_are_left_out(tmp_path: Path, write_sample) -> None:
    (tmp_path / "predictions.csv").write_text("sample_id,predicted,p_healthy,p_a,p_b\ns0,b,0,0,1\n")
    known = read_sample("s0", write_sample(tmp_path / "s0", meta={"lesion_type": "A", "patient_id": "one"}))
    others = [
        read_sample("s1", write_sample(tmp_path / "s1")),
        read_sample("s2", write_sample(tmp_path / "s2", "healthy")),
    ]
    assert judged_types(tmp_path / "predictions.csv", [known, *others]) == (["a"], ["b"], ["one"])
    with pytest.raises(MedSoftError, match="nothing to compare"):
        asked_drawn(*judged_types(tmp_path / "predictions.csv", others))
