"""A data set grows: nobody changes sides, and the shares stay near what is asked."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.samples import Sample
from ldm.data.splits import SPLITS, prepare_dataset, split_by_patient

FEW = settings(max_examples=30, deadline=None)
FRACTIONS = [(0.7, 0.1, 0.2), (0.5, 0.25, 0.25), (0.8, 0.2, 0.0), (1.0, 0.0, 0.0)]
KINDS = [None, None, "lytic", "blastic", "mixed"]


def sample(name: str, patient: str, kind: str | None) -> Sample:
    prompt = f"{kind} lesion" if kind else "healthy"
    return Sample(name, Path("/i.png"), Path("/m.png"), prompt, (0, 0, 1, 1), patient, lesion_type=kind)


def sides(split: dict[str, list[Sample]]) -> dict[str, str]:
    return {member.patient_id: name for name, members in split.items() for member in members}


@st.composite
def growing(draw: st.DrawFn) -> list[list[Sample]]:
    """Samples that come in one to four batches; later ones may belong to patients who are there already."""
    batches, count = [], 0
    for _ in range(draw(st.integers(1, 4))):
        batch = []
        for _ in range(draw(st.integers(1, 25))):
            batch.append(sample(f"s{count}", f"p{draw(st.integers(0, 60))}", draw(st.sampled_from(KINDS))))
            count += 1
        batches.append(batch)
    return batches


@FEW
@given(growing(), st.integers(0, 3), st.sampled_from(FRACTIONS), st.randoms(use_true_random=False))
def test_adding_samples_moves_nobody(
    batches: list[list[Sample]], seed: int, fractions: tuple[float, ...], order: Any
) -> None:
    there: list[Sample] = []
    kept: dict[str, str] = {}
    for batch in batches:
        there += batch
        split = split_by_patient(there, seed, fractions, kept)
        found = sides(split)
        assert {name: found[name] for name in kept} == kept
        assert Counter(s.sample_id for members in split.values() for s in members) == Counter(
            s.sample_id for s in there
        )
        assert sum(len({s.patient_id for s in members}) for members in split.values()) == len(found)  # on one side each
        shuffled = list(there)
        order.shuffle(shuffled)
        assert split_by_patient(shuffled, seed, fractions, kept) == split
        kept = found
    for name, share in zip(SPLITS, fractions, strict=True):
        assert abs(list(kept.values()).count(name) - share * len(kept)) <= 2.5


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_shares_of_every_kind_stay_near_what_is_asked(batch: int) -> None:
    rng = random.Random(0)
    there: list[Sample] = []
    kept: dict[str, str] = {}
    while len(there) < 300:
        there += [sample(f"s{len(there) + k}", f"p{len(there) + k}", rng.choice(KINDS)) for k in range(batch)]
        kept = sides(split_by_patient(there, 0, kept=kept))
    for kind in set(KINDS):
        members = [kept[s.patient_id] for s in there if s.lesion_type == kind]
        for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
            assert abs(members.count(name) - share * len(members)) <= 2, (kind, name)


def test_without_the_earlier_split_one_patient_more_moves_hardly_anybody() -> None:
    """Sides that are dealt anew, from another folder say, agree with the earlier ones on nearly everybody."""
    there = [sample(f"s{k}", f"p{k}", KINDS[k % 5]) for k in range(280)]
    before = sides(split_by_patient(there))
    for number in range(40):
        after = sides(split_by_patient([*there, sample("new", f"q{number}", KINDS[number % 5])]))
        assert sum(after[name] != side for name, side in before.items()) <= 8  # two of each kind


def test_patients_who_are_gone_count_for_nothing() -> None:
    there = [sample(f"s{k}", f"p{k}", None) for k in range(10)]
    kept = {f"gone{k}": "train" for k in range(90)} | {"p0": "test"}
    found = sides(split_by_patient(there, kept=kept))
    assert Counter(found.values()) == {"train": 7, "val": 1, "test": 2}
    assert found["p0"] == "test"


def test_a_side_that_was_empty_is_filled_from_the_new_patients_only() -> None:
    there = [sample(f"s{k}", f"p{k}", None) for k in range(2)]
    kept = sides(split_by_patient(there))
    assert kept == {"p0": "train", "p1": "train"}
    there += [sample(f"s{k}", f"p{k}", None) for k in (2, 3)]
    found = sides(split_by_patient(there, kept=kept))
    assert {found["p2"], found["p3"]} == {"val", "test"}
    assert {found["p0"], found["p1"]} == {"train"}


@pytest.mark.parametrize("named", [False, True], ids=["by their folders", "by patient_id"])
def test_renamed_folders_keep_their_sides(
    tmp_path: Path, write_sample: Callable[..., Path], caplog: pytest.LogCaptureFixture, named: bool
) -> None:
    """Other names for folders and patients, a folder above more, another form of accents: the images are the same."""
    rng = np.random.default_rng(0)
    for number in range(24):
        image = rng.integers(0, 255, (16, 16)).astype(np.uint8)
        meta = {"patient_id": f"p{number}"} if named else {}
        write_sample(tmp_path / "data" / f"s{number:02d}", prompt="healthy", image=image, mask=None, meta=meta)
    output = tmp_path / "a.json"
    prepare_dataset(tmp_path / "data", output)
    before = sides_of(output)
    for number in range(0, 24, 2):
        folder = tmp_path / "data" / f"s{number:02d}"
        if named:
            (folder / "meta.json").write_text(json.dumps({"patient_id": f"site/p{number}"}))
        folder.rename(folder.with_name(f"renamed{number:02d}"))
    (tmp_path / "data").rename(tmp_path / "sub")
    (tmp_path / "data").mkdir()
    (tmp_path / "sub").rename(tmp_path / "data" / "sub")
    caplog.clear()
    caplog.set_level("INFO")
    prepare_dataset(tmp_path / "data", output)
    after = sides_of(output)
    expected = {f"sub/{name if int(name[1:]) % 2 else 'renamed' + name[1:]}": side for name, side in before.items()}
    assert after == expected
    assert "24 patients keep their sides, 0 of the earlier split are gone, 0 are new" in caplog.text
    assert "warning" not in caplog.text


def sides_of(output: Path) -> dict[str, str]:
    files = {name: output.with_name(f"{output.stem}_{name}.json") for name in SPLITS}
    return {record["sample_id"]: name for name, file in files.items() for record in json.loads(file.read_text())}
