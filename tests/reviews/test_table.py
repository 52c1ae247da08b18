"""review.csv: what is written is read again, whatever the texts; what is malformed is refused by line and column."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.core.errors import FileError, MedSoftError
from ldm.core.files import Contents
from ldm.reviews.table import COLUMNS, HEADER, VERDICTS, Review, add_review, latest, now, read_reviews

DIGEST = "0123456789abcdef" * 4
ROW = f"a__v0,ann,reject,visible seam,{DIGEST},3.5,2026-01-31T12:00:00Z"
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), max_size=30)
reviews = st.builds(
    Review,
    sample_id=lines.filter(bool),
    reviewer=st.sampled_from(["ann", "B-2", "c.d_e"]),
    verdict=st.sampled_from(VERDICTS),
    image_sha256=st.sampled_from([DIGEST, DIGEST[::-1]]),
    reason=lines | st.sampled_from(["=1+1", "'=1+1", "-", 'a "b", c', ",", "''"]),
    seconds=st.none() | st.integers(0, 99999).map(lambda tenths: tenths / 10),
    when=st.sampled_from(["", "2026-01-31T12:00:00Z"]),
)


def written(folder: str | Path, rows: list[Review]) -> Path:
    path = Path(folder) / "review.csv"
    for row in rows:
        add_review(path, row)
    return path


@few
@given(st.lists(reviews, min_size=1, max_size=4))
def test_what_is_added_is_read_again(rows: list[Review]) -> None:
    with TemporaryDirectory() as folder:
        path = written(folder, rows)
        assert read_reviews(path) == rows
        text = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.removesuffix(b"\r\n"))  # as a spreadsheet saves it
        add_review(path, rows[0])
        assert read_reviews(path) == [*rows, rows[0]]


@few
@given(st.lists(reviews, min_size=1, max_size=3), st.data())
def test_a_file_that_a_crash_cut_short_keeps_its_whole_rows_and_goes_on(rows: list[Review], data: Any) -> None:
    with TemporaryDirectory() as folder:
        path = written(folder, rows)
        content = path.read_bytes()
        size = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n") - 1
        kept = read_reviews(path)
        assert kept[: max(whole, 0)] == rows[: max(whole, 0)]
        assert len(kept) <= max(whole, 0) + 1  # the last one too, where only its line break is missing
        add_review(path, rows[-1])
        assert read_reviews(path) == [*kept, rows[-1]]


@few
@given(st.binary(max_size=60), st.integers(0, 400))
def test_other_bytes_are_refused_or_read_and_nothing_else_happens(noise: bytes, place: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "review.csv"
        content = f"{HEADER}\n{ROW}\n{ROW}\n".encode()
        path.write_bytes(content[:place] + noise + content[place + len(noise) :])
        found, said = [], ""
        try:
            found = read_reviews(path)
        except FileError as error:
            said = str(error)
        assert all(row.verdict in VERDICTS and len(row.image_sha256) == 64 for row in found)
        assert not said or said.startswith(f"{path}: line ")
        assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no verdict"),
        ("sample_id,verdict\n", "line 1: expected the columns sample_id,reviewer,.*, found 'sample_id,verdict'"),
        (f"{HEADER}\nx,ann,reject\n", "line 2: expected 7 cells, found 3"),
        (f"{HEADER}\n{ROW}\n{ROW},x\n", "line 3: expected 7 cells, found 8"),
        (f"{HEADER}\n{ROW.replace('reject', 'maybe')}\n", "line 2: verdict: expected accept, reject or flag, found 'm"),
        (f"{HEADER}\n{ROW.replace('reject', 'maybe')}", "line 2: verdict"),  # without a line break at the end
        (f"{HEADER}\n{ROW.replace('ann', 'Ann Lee')}\n", "line 2: reviewer: expected a code of 1 to 32"),
        (f"{HEADER}\n{ROW.replace('a__v0', '')}\n", "line 2: sample_id"),
        (f"{HEADER}\n{ROW.replace(DIGEST, DIGEST[1:])}\n", "line 2: image_sha256: expected 64"),
        (f"{HEADER}\n{ROW.replace('3.5', '-3')}\n", "line 2: seconds"),
        (f"{HEADER}\n{ROW.replace('01-31', '02-31')}\n", "line 2: when: expected a time in UTC"),
        (f'{HEADER}\n"a\nb{ROW[5:]}\n', "line 2: expected comma-separated"),
        (f"{HEADER}\n{ROW}\nx\n{ROW}\ny\n", r"line 3: .* \(1 other line is malformed too\)"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    from ldm.reviews.choice import match_reviews

    path = tmp_path / "review.csv"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        match_reviews([path], [], Contents())
    if content:
        cut = "line 1" in message or not content.endswith("\n")
        with pytest.raises(FileError, match=message) if cut else nullcontext():
            add_review(path, Review("b", "ann", "accept", DIGEST))
        assert path.read_text().startswith(content)
        assert cut is (path.read_text() == content)
        with pytest.raises(FileError, match=message):
            read_reviews(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="this review does not exist; medsoft review"):
        read_reviews(tmp_path / "no.csv")
    with pytest.raises(FileError, match="could not be read"):
        read_reviews(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("reason", "a\nb"), ("reviewer", "=x"), ("verdict", "no"), ("sample_id", "a\udc80")]
)
def test_values_that_may_not_stand_there_are_not_written(tmp_path: Path, key: str, value: str) -> None:
    fine = {"sample_id": "a", "reviewer": "ann", "verdict": "accept", "image_sha256": DIGEST}
    with pytest.raises(MedSoftError, match=f"{key}: expected"):
        add_review(tmp_path / "review.csv", Review(**fine | {key: value}))
    assert not (tmp_path / "review.csv").exists()


def test_many_writers_at_once_lose_no_row(tmp_path: Path) -> None:
    rows = [Review(f"s{n}", "ann", "accept", DIGEST, seconds=1.0, when=now()) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: add_review(tmp_path / "review.csv", row), rows))
    assert sorted(read_reviews(tmp_path / "review.csv"), key=lambda row: int(row.sample_id[1:])) == rows
    assert (tmp_path / "review.csv").read_text().splitlines()[0].split(",") == list(COLUMNS)


@pytest.mark.parametrize("begun", [True, False])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    path, real = tmp_path / "review.csv", os.write
    if begun:
        add_review(path, Review("a", "ann", "accept", DIGEST))
    before = path.read_bytes() if begun else b""

    def full(number: int, data: bytes, write: Callable[..., int] = real) -> int:
        return write(number, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(MedSoftError, match=r"review.csv: the verdict could not be written .* as it was"):
            add_review(path, Review("b", "ann", "accept", DIGEST))
    assert path.read_bytes() == before
    add_review(path, Review("b", "ann", "reject", DIGEST))
    assert read_reviews(path)[-1].verdict == "reject"


def test_the_last_row_of_a_reviewer_counts_whose_code_is_spelled_in_two_ways(tmp_path: Path) -> None:
    said = (("Ann", "reject"), ("bob", "flag"), ("ann", "accept"))
    rows = [Review("a", *each, DIGEST) for each in said]
    found = latest(read_reviews(written(tmp_path, rows)))
    assert {key[2]: row.verdict for key, row in found.items()} == {"Ann": "accept", "bob": "flag"}
