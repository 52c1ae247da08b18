"""Reviews from the command line: rejected images are left out and counted, reviewers agree or not, bad files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from toy import make_world, metrics_of, run, synthetic_set

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.data.annotations import load_samples
from ldm.phantom.dataset import write_dataset
from ldm.reviews.table import Review, add_review
from tool import evaluate


def judge(folder: Path, file: Path, said: Iterable[tuple[str, str, str]], reason: str = "") -> Path:
    """Add rows to ``file``: reviewer, sample and verdict about images of ``folder`` as they are."""
    digests = {sample.sample_id: sample.image_sha256 for sample in load_samples(folder)[0]}
    for who, sample_id, verdict in said:
        add_review(file, Review(sample_id, who, verdict, digests.get(sample_id) or "0" * 64, reason, 2.0))
    return file


SAID = [("a", "s1", "reject"), ("a", "s2", "reject"), ("a", "s2", "accept"), ("b", "s2", "flag"), ("b", "s3", "accept")]


def test_a_classifier_does_not_learn_from_rejected_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.classifier import run as runs

    sets: list[Any] = []
    load = runs.load_data
    monkeypatch.setattr(runs, "load_data", lambda config: sets.append(load(config)) or sets[-1])
    world = make_world(tmp_path)
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    first = judge(Path(folder), tmp_path / "first.csv", [*SAID, ("b", "s9", "accept")])
    second = judge(Path(folder), tmp_path / "second.csv", [("c", "s5", "reject")], "visible seam")
    world |= {"synthetic": [folder]}
    assert run(world, "--review", str(first), "--review", str(second)) == 0
    metrics = metrics_of(world)
    assert sorted(sample.sample_id for sample in sets[0].synthetic.samples) == ["s2", "s3", "s4"]
    told = metrics["review"]
    assert {key: told[key] for key in ("samples", "left_out", "flagged", "never_reviewed", "unknown")} == {
        "samples": 5,  # and a healthy one
        "left_out": 2,
        "flagged": 1,
        "never_reviewed": 1,
        "unknown": ["s9"],
    }
    assert told["reviewers"] == {"a": 2, "b": 2, "c": 1}
    assert metrics["n_synthetic_used"] == 3
    note = "Review by a (2), b (2), c (1): of 5 synthetic images, 2 rejected and left out, 1 flagged and kept"
    assert any(each.startswith(note) for each in metrics["notes"])
    assert "1 image judged, but not among these samples: s9" in caplog.text
    record = json.loads((Path(world["output_dir"]) / "run.json").read_text())
    assert record["settings"]["review_sha256"] == [each["sha256"] for each in told["files"]]
    judge(Path(folder), second, [("c", "s4", "accept")])
    with pytest.raises(UsageError, match=r"holds results of another run .*review_sha256"):
        run(world | {"review": [str(first), str(second)]})
    assert sets[-1].review["never_reviewed"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"synthetic": []}, "synthetic: expected the result folders that `review` is about"),
        ({"use_synthetic": "duplicate_real", "ratio": 1}, "review: expected nothing with use_synthetic duplicate_real"),
    ],
)
def test_a_review_of_nothing_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    world = make_world(tmp_path) | {"synthetic": ["results"]} | change
    with pytest.raises(UsageError, match=message):
        run(world, "--review", "review.csv")


def test_reviews_that_do_not_belong_to_the_images_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    folder = synthetic_set(tmp_path / "results", "train-patient0", "train000")
    world |= {"synthetic": [folder]}
    other = judge(Path(folder), tmp_path / "other.csv", [("a", "t1", "accept")])
    with pytest.raises(
        FileError, match=r"other.csv: is the review of other images: has 1 row, the first about t1, none"
    ):
        run(world, "--review", str(other))
    every = judge(Path(folder), tmp_path / "every.csv", [("a", f"s{n}", "reject") for n in range(1, 6)])
    with pytest.raises(MedSoftError, match=r"every.csv: every image \(5\) is rejected"):
        run(world, "--review", str(every))
    shutil.rmtree(Path(folder) / "s5")
    for place, name in enumerate(("s1", "s2", "s3", "s4")):
        image = Path(folder) / name / "image.png"
        image.write_bytes(image.read_bytes() + bytes([place]))  # after the end of the picture: it looks the same
    with pytest.raises(FileError, match=r"every.csv: 4 images that it judges have changed since, and no"):
        run(world, "--review", str(every))
    with pytest.raises(FileError, match=r"no.csv: this review does not exist"):
        run(world, "--review", str(tmp_path / "no.csv"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 phantoms in the place of drawn images, and a healthy one."""
    folder = tmp_path_factory.mktemp("drawn") / "results"
    write_dataset(folder, 12, 1, 14)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/mask.png"))


def test_evaluation_leaves_rejected_images_out(drawn: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "real", 11, 0, 3)
    ids = names(drawn)
    said = [("a", name, "reject") for name in ids[4:]] + [("a", ids[0], "accept"), ("b", ids[1], "flag")]
    review = judge(drawn, tmp_path / "review.csv", said)
    given = [tmp_path / "real", drawn, "--output_dir", tmp_path / "out", "--config", tiny.PHANTOM]
    given += ["--biomedclip", tiny.CLIP, "--review", review]
    assert tiny.call(evaluate, *given) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["pictures"]["synthetic"] == 4
    told = found["review"]
    assert (told["left_out"], told["flagged"], told["never_reviewed"], told["samples"]) == (10, 1, 2, 14)
    assert "of 14 synthetic images, 10 rejected and left out" in found["warnings"][0]
    assert "of 14 synthetic images, 10 rejected" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(UsageError, match=r"another run .*synthetic"):
        tiny.call(evaluate, *given[:-2])
