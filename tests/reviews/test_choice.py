"""What several files and reviewers say together of images, some of which were drawn again since."""

from pathlib import Path

from ldm.data.samples import Sample
from ldm.reviews.choice import apply_review
from ldm.reviews.table import Review, add_review

NOW, BEFORE = "0" * 64, "1" * 64


def drawn(sample_id: str, folder: str = "results", digest: str = NOW) -> Sample:
    image = Path("/") / folder / sample_id / "image.png"
    return Sample(sample_id, image, None, "lytic lesion", (0, 0, 1, 1), "p", image_sha256=digest)


def test_verdicts_of_several_files_about_images_of_now_and_before(tmp_path: Path) -> None:
    first = [
        Review("a", "ann", "reject", NOW),
        Review("b", "ann", "flag", NOW),
        Review("b", "bob", "reject", NOW, "seam"),
        Review("c", "ann", "reject", BEFORE),
        Review("c", "bob", "accept", NOW),  # it has been judged since
        Review("d", "ann", "reject", BEFORE),
    ]
    second = [Review("a", "ANN", "accept", NOW), Review("e", "bob", "flag", NOW)]
    files = [tmp_path / "first.csv", tmp_path / "second.csv"]
    for path, rows in zip(files, (first, second), strict=True):
        for row in rows:
            add_review(path, row)
    samples = [*map(drawn, "abcdef"), drawn("b", "others", BEFORE)]
    choice = apply_review(files, samples)
    assert choice.rejected == {samples[1].image: "bob: seam"}  # ann has thought better of a
    assert [samples[place] for place in choice.kept(samples)] == [samples[0], *samples[2:]]
    told = choice.record
    assert told["reviewers"] == {"ann": 2, "bob": 3}
    assert (told["samples"], told["left_out"], told["flagged"], told["never_reviewed"]) == (7, 1, 1, 3)
    assert (told["changed"], told["unknown"]) == (["d"], [])
