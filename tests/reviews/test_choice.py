"""What several files and reviewers say together of images, some of which were drawn again, renamed or copied since."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import Contents
from ldm.data.samples import Sample
from ldm.reviews.choice import Choice, apply_review
from ldm.reviews.table import Review, add_review, read_reviews


def content(name: str) -> str:
    """The SHA-256 of an image."""
    return hashlib.sha256(name.encode()).hexdigest()


BEFORE = content("before")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(sample_id: str, folder: str = "results", of: str = "") -> Sample:
    """A drawing in a folder of its name; its content is that of its name too, unless another one is given."""
    image = Path(folder) / sample_id / "image.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_text(of or sample_id)
    digest = content(of or sample_id)
    return Sample(sample_id, image, None, "lytic lesion", (0, 0, 1, 1), "p", image_sha256=digest)


def test_verdicts_of_several_files_about_images_of_now_and_before(tmp_path: Path) -> None:
    first = [
        Review("a", "ann", "reject", content("a")),
        Review("b", "ann", "flag", content("b")),
        Review("b", "bob", "reject", content("b"), "seam"),
        Review("c", "ann", "reject", BEFORE),
        Review("c", "bob", "accept", content("c")),  # it has been judged since
        Review("d", "ann", "reject", BEFORE),
    ]
    second = [Review("a", "ANN", "accept", content("a")), Review("e", "bob", "flag", content("e"))]
    files = [tmp_path / "first.csv", tmp_path / "second.csv"]
    for path, rows in zip(files, (first, second), strict=True):
        for row in rows:
            add_review(path, row)
    samples = [*map(drawn, "abcdef"), drawn("b", "others", "another b")]
    choice = apply_review(files, samples, Contents())
    assert choice.rejected == {samples[1].image: "bob: seam"}  # ann has thought better of a
    assert choice.kept(samples) == [samples[0], *samples[2:]]
    told = choice.record
    assert told["reviewers"] == {"ann": 2, "bob": 3}
    assert (told["samples"], told["left_out"], told["flagged"], told["never_reviewed"]) == (7, 1, 1, 3)
    assert (told["renamed"], told["changed"], told["unknown"]) == ([], ["d"], [])


ROWS = tuple[str, str, str, str]  # sample_id, reviewer, verdict, whose content


def chosen(folder: Path, rows: Iterable[ROWS], samples: Sequence[Sample]) -> tuple[Choice, set[str]]:
    """What a file of these rows says of the samples, and which of them stay."""
    for sample_id, reviewer, verdict, of in rows:
        add_review(folder / "review.csv", Review(sample_id, reviewer, verdict, content(of)))
    choice = apply_review([folder / "review.csv"], samples, Contents())
    return choice, {f"{each.image.parent.parent.name}/{each.sample_id}" for each in choice.kept(samples)}


def test_a_rejected_drawing_stays_rejected_in_a_renamed_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("old", "ann", "reject", "x"), ("gone", "ann", "reject", "nowhere"), ("b", "ann", "flag", "b")]
    choice, kept = chosen(tmp_path, rows, [drawn("new", of="x"), drawn("b"), drawn("c")])
    assert kept == {"results/b", "results/c"}
    told = choice.record
    assert (told["renamed"], told["changed"], told["unknown"]) == (["old"], [], ["gone"])
    assert (told["left_out"], told["flagged"], told["never_reviewed"], told["reviewers"]) == (1, 1, 1, {"ann": 2})
    assert "1 image judged under another name, and the verdict counts: old (now new)" in caplog.text
    assert "1 image judged, but not among these samples: gone" in caplog.text


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([("old", "ann", "reject", "x"), ("new", "ann", "accept", "x")], {"results/new", "results/b"}),
        ([("new", "ann", "accept", "x"), ("old", "ann", "reject", "x")], {"results/b"}),
        ([("old", "ann", "reject", "x"), ("older", "ann", "accept", "x")], {"results/new", "results/b"}),
        ([("old", "ann", "reject", "x"), ("new", "bob", "accept", "x")], {"results/b"}),  # two people
    ],
)
def test_of_one_reviewers_verdicts_about_a_picture_the_last_counts_whatever_its_name(
    tmp_path: Path, rows: list[ROWS], kept: set[str]
) -> None:
    assert chosen(tmp_path, rows, [drawn("new", of="x"), drawn("b")])[1] == kept


def test_a_review_that_is_written_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "review.csv"
    add_review(file, Review("a", "ann", "accept", content("a")))

    def read(path: Path) -> list[Review]:
        found = read_reviews(path)
        add_review(path, Review("b", "ann", "reject", content("b")))
        return found

    monkeypatch.setattr("ldm.reviews.choice.read_reviews", read)
    with pytest.raises(MedSoftError, match=r"review\.csv: was replaced or changed after it had been read"):
        apply_review([file], [drawn("a"), drawn("b")], Contents())


def test_an_image_that_was_replaced_since_its_sample_was_read_has_no_verdict(tmp_path: Path) -> None:
    """Its sample was read with the content that was judged; what will be trained on is another picture."""
    sample = drawn("a")
    add_review(tmp_path / "review.csv", Review("a", "ann", "accept", content("a")))
    sample.image.write_text("another a")
    with pytest.raises(FileError, match=r"results/a/image\.png: was replaced or changed after it had been read"):
        apply_review([tmp_path / "review.csv"], [sample], Contents())


def test_folders_that_have_changed_names_with_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a", "ann", "reject", "a"), ("b", "ann", "accept", "b")]
    choice, kept = chosen(tmp_path, rows, [drawn("a", of="b"), drawn("b", of="a")])
    assert kept == {"results/a"}
    assert (choice.record["renamed"], choice.record["changed"]) == (["a", "b"], [])


def test_a_renamed_drawing_whose_name_another_one_has_that_was_judged_too(tmp_path: Path) -> None:
    rows = [("a", "ann", "reject", "x"), ("a", "ann", "accept", "y")]
    choice, kept = chosen(tmp_path, rows, [drawn("b", of="x"), drawn("a", of="y")])
    assert kept == {"results/a"}
    assert (choice.record["renamed"], choice.record["changed"], choice.record["unknown"]) == (["a"], [], [])


def test_a_copy_of_a_rejected_drawing_is_left_out_until_it_is_judged_itself(tmp_path: Path) -> None:
    samples = [drawn("a"), drawn("copy", of="a"), drawn("a", "others"), drawn("b"), drawn("c")]
    choice, kept = chosen(tmp_path, [("a", "ann", "reject", "a"), ("c", "ann", "accept", "c")], samples)
    assert kept == {"results/b", "results/c"}
    assert (choice.record["left_out"], choice.record["renamed"]) == (3, [])
    (tmp_path / "again").mkdir()
    rows = [("copy", "ann", "accept", "a"), ("a", "ann", "reject", "a")]  # its sentence may be another one
    assert chosen(tmp_path / "again", rows, samples)[1] == {"results/copy", "results/b", "results/c"}


def test_that_a_drawing_was_accepted_is_not_said_of_its_copy(tmp_path: Path) -> None:
    choice, _ = chosen(tmp_path, [("a", "ann", "accept", "a")], [drawn("a"), drawn("copy", of="a")])
    assert (choice.record["never_reviewed"], choice.record["reviewers"]) == (1, {"ann": 1})


def test_a_review_of_which_only_contents_are_known_is_one_of_these_images(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"every image \(1\) is rejected"):
        chosen(tmp_path, [("old", "ann", "reject", "x")], [drawn("new", of="x")])
    with pytest.raises(FileError, match="is the review of other images: has 1 row, the first about old"):
        apply_review([tmp_path / "review.csv"], [drawn("a")], Contents())
