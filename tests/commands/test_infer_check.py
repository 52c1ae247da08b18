"""dataset_infer.py --check: what is judged, drawn again, kept out and recorded; by real training lesions alone."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_infer_scale import files_of
from test_infer_tars import samples_of
from tiny import CLIP, PHANTOM, TRAIN, VAL, Small, call, dataset_infer, infer, metas, record, whole

from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import Contents
from ldm.data.annotations import load_samples
from ldm.data.images import read_image
from ldm.data.preparation import PreparedSample, prepare
from ldm.data.samples import Sample
from ldm.evaluation.check import ALL, Bound, LesionCheck, LesionChecks, prediction_bound
from ldm.inference.drawing import FURTHER, Verdict
from ldm.inference.inpainter import InpaintedImage, Inpainter
from ldm.inference.results import Result, result_of
from ldm.inference.tasks import Task
from ldm.networks.opening import open_encoder

REFUSED = {"agreement": "0.000, expected at least 0.500"}


def healthy_ones(world: Path) -> list[Sample]:
    return [sample for sample in load_samples(world / TRAIN)[0] if sample.healthy]


@pytest.fixture
def strict(world: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The check accepts all, but for the first drawing of one sample and every drawing of another: their names."""
    later, never = (sample.sample_id for sample in healthy_ones(world)[:2])
    judged = LesionCheck.__call__

    def verdicts(self: LesionCheck, results: Sequence[tuple[Result, PreparedSample]]) -> list[Verdict]:
        found = []
        for (result, _), verdict in zip(results, judged(self, results), strict=True):
            wrong = {later: result.task.seed < FURTHER, never: True}.get(result.task.sample.sample_id)
            found.append(verdict._replace(failures=REFUSED if wrong else {}))
        return found

    monkeypatch.setattr(LesionCheck, "__call__", verdicts)
    return later, never


def given(small: Small, world: Path, *more: Any) -> list[Any]:
    return ["--train_json", world / TRAIN, "--limit", 3, "--check", "--tries", 2, "--exact", *more, *small.sizes]


@pytest.fixture
def checked(small: Small, world: Path, tmp_path: Path, strict: tuple[str, str]) -> Path:
    assert infer(small.last, tmp_path / "out", *given(small, world)) == 3
    return tmp_path / "out"


def test_what_is_refused_is_drawn_again_or_kept_out(checked: Path, world: Path, strict: tuple[str, str]) -> None:
    later, never = strict
    found = metas(checked)
    whole(checked)
    assert set(found) == {f"{s.sample_id}__v0" for s in healthy_ones(world)[:3]} - {f"{never}__v0"}
    for name, meta in found.items():
        again = name == f"{later}__v0"
        assert meta["seed"] == (FURTHER if again else 0)
        assert meta["check"]["try"] == (2 if again else 1)
        assert meta["check"]["rejected"] == ([{"seed": 0, "reasons": REFUSED}] if again else [])
        assert {"change", "seam", "agreement", "contrast", "copy"} == set(meta["check"]["values"])
    (reject,) = json.loads((checked / "rejects.json").read_text())
    assert reject["sample_id"] == never
    assert reject["reason"] == "variant 0: not accepted in 2 tries: agreement 0.000, expected at least 0.500"
    counts = {"drawn": 5, "accepted": 2, "at_once": 1, "rejected_agreement": 3}
    assert (record(checked)["check"], record(checked)["rejected"]) == (counts, 1)
    standard = json.loads((checked / "check.json").read_text())
    assert standard["counts"] == counts
    assert standard["lesions"]["all types"] == sum(not s.healthy for s in load_samples(world / TRAIN)[0])
    page = (checked / "report.html").read_text()
    assert "5 drawings for 2 images, 1 accepted at once" in page
    assert "accepted at try <b>2</b>" in page
    assert str(standard["bounds"]["agreement"]["all types"]["low"]) in page


def test_replayed_continued_and_left_alone(
    checked: Path, small: Small, world: Path, tmp_path: Path, strict: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    before = files_of(checked)
    name = f"{strict[0]}__v0"
    again = ["--replay", checked / name / "meta.json", "--output_dir", tmp_path / "replayed"]
    assert call(dataset_infer, *again) == 0
    assert files_of(tmp_path / "replayed") == {file: data for file, data in before.items() if file.startswith(name)}
    assert infer(small.last, checked, *given(small, world)) == 3  # all is there
    shutil.rmtree(checked / name)
    assert infer(small.last, checked, *given(small, world)) == 3
    assert files_of(checked) == before
    with pytest.raises(UsageError, match="check"):
        infer(small.last, checked, *[word for word in given(small, world) if word not in ("--check", "--tries", 2)])


def test_what_was_refused_before_a_stop_is_not_drawn_again(
    small: Small, world: Path, tmp_path: Path, checked: Path, strict: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later, never = strict
    drawn, begun, stop = [], Inpainter.begin, [True]

    def begin(self: Inpainter, samples: Any, jobs: Sequence[Any]) -> list[Any]:
        if stop and any(job.seed >= FURTHER for job in jobs):
            raise KeyboardInterrupt
        drawn.extend((job.sample_id, job.seed) for job in jobs)
        return begun(self, samples, jobs)

    monkeypatch.setattr(Inpainter, "begin", begin)
    with pytest.raises(KeyboardInterrupt):
        infer(small.last, tmp_path / "stopped", *given(small, world))
    assert len(drawn) == 3
    stop.clear()
    drawn.clear()
    assert infer(small.last, tmp_path / "stopped", *given(small, world)) == 3
    assert sorted(drawn) == sorted([(later, FURTHER), (never, FURTHER)])
    assert files_of(tmp_path / "stopped") == files_of(checked)
    assert record(tmp_path / "stopped")["check"] == record(checked)["check"]
    rejects = [json.loads((folder / "rejects.json").read_text()) for folder in (tmp_path / "stopped", checked)]
    assert rejects[0] == rejects[1]
    (tmp_path / "stopped" / "refused" / f"{never}__v0.json").write_text("{}")
    shutil.rmtree(tmp_path / "stopped" / f"{later}__v0")
    with pytest.raises(MedSoftError, match=r"__v0\.json: expected a list of drawings that were not accepted"):
        infer(small.last, tmp_path / "stopped", *given(small, world))


def test_in_shares_and_tars(checked: Path, small: Small, world: Path, tmp_path: Path) -> None:
    codes = [
        infer(small.last, tmp_path / "tars", *given(small, world, "--share", f"{k}/2", "--format", "tar"))
        for k in (1, 2)
    ]
    assert 3 in codes
    found = {
        f"{key}/{name}": data
        for key, files in samples_of(*sorted((tmp_path / "tars").glob("*.tar")))
        for name, data in files.items()
    }
    plain = files_of(checked)
    assert set(found) == set(plain)
    assert all(found[name] == plain[name] for name in found if not name.endswith("meta.json"))
    assert record(tmp_path / "tars")["check"] == record(checked)["check"]
    assert json.loads((tmp_path / "tars" / "check.json").read_text())["counts"] == record(checked)["check"]


# ------------------------------------------------------------------------------------------------------- the verdicts


@pytest.fixture(scope="module")
def check(world: Path, judge: Path) -> LesionCheck:
    """By all eight lesions of the world, as if all of them had been trained on."""
    from ldm.classifier.run import load_judge

    config = load_config(PHANTOM, [f"biomedclip.path={CLIP}"])
    checks = LesionChecks(world / "data", 1, load_judge(judge, "cpu"))
    lesions, left_out = checks.training_lesions([], "nothing")
    assert (len(lesions), left_out) == (8, [])
    return checks.start(lesions, left_out, open_encoder(config.biomedclip), config.data)


def verdict(check: LesionCheck, parent: Sample, prepared: PreparedSample, pixels: np.ndarray, **about: Any) -> Verdict:
    source = dataclasses.replace(check.lesions[0].sample, **about)
    task = Task(parent, 0, source.prompt, 0, source)
    result = result_of(Path("home"), task, prepared, pixels, {"trained_on": []}, Contents())
    (found,) = check([(result, prepared)])
    return found


def test_what_is_wrong_with_a_drawing_is_named(
    check: LesionCheck, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = healthy_ones(world)[0]
    prepared = prepare(parent, check.data, 0, 0)
    empty = verdict(check, parent, prepared, prepared.original)
    assert empty.values["change"] == 0
    assert empty.failures["change"].startswith("0.000, expected at least 0.")
    asked = check.lesions[0].sample.lesion_type
    said = None if empty.values["type"] == asked else f"{empty.values['type']}, expected {asked}"
    assert empty.failures.get("type") == said
    noise = np.random.default_rng(0).choice([0, 255], prepared.original.shape)
    noisy = np.where(prepared.soft > 0, noise, prepared.original).astype(np.uint8)
    assert "seam" in verdict(check, parent, prepared, noisy).failures
    monkeypatch.setitem(check.bounds, "contrast", {ALL: Bound(-0.1, 0.1)})
    white = np.where(prepared.soft == 1, 255, prepared.original).astype(np.uint8)
    assert verdict(check, parent, prepared, white).failures["contrast"].endswith("expected at most 0.100")
    no_lesion = verdict(check, parent, prepared, prepared.original, prompt="healthy")
    assert set(no_lesion.values) == {"seam", "type"}
    unknown = verdict(check, parent, prepared, prepared.original, lesion_type=None)
    assert ("type" in unknown.failures) == (unknown.values["type"] == "healthy")


def test_what_cannot_be_measured_is_not_accepted(check: LesionCheck) -> None:
    """A mask that leaves nothing around it: no seam and no contrast can be seen there."""
    own = check.lesions[0].sample
    prepared = prepare(own, check.data, 0, 0)
    everything = {"hard": np.ones_like(prepared.hard), "soft": np.ones_like(prepared.soft)}
    found = verdict(check, own, dataclasses.replace(prepared, **everything), prepared.original)
    assert (found.values["seam"], found.values["contrast"]) == (None, None)
    assert found.failures["seam"] == found.failures["contrast"]
    assert found.failures["seam"].startswith("cannot be measured: too little lies around the mask")
    assert Bound().fault(None) is None


def test_bounds_and_judge_go_by_the_same_type(check: LesionCheck, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an image says which disease belongs into it (``sign``), that counts, whatever its sentence is."""
    asked = check.lesions[0].sample.lesion_type
    other = next(kind for kind in check.directions if kind != asked)
    parent = healthy_ones(world)[0]
    parent = dataclasses.replace(parent, meta={**parent.meta, "sign": other})
    prepared = prepare(parent, check.data, 0, 0)
    closed = {other: Bound(2.0, 3.0), ALL: Bound()}
    monkeypatch.setitem(check.bounds, "contrast", closed)
    found = verdict(check, parent, prepared, prepared.original)
    assert found.failures["contrast"].endswith("expected at least 2.000")
    assert found.failures.get("type", f"expected {other}").endswith(f"expected {other}")


def test_a_training_lesion_is_a_copy_and_seldom_more(check: LesionCheck) -> None:
    """Real lesions redrawn as they are: equal to one of them, and most of them like real ones in every number."""
    others = 0
    for lesion in check.lesions:
        own = lesion.sample
        prepared = prepare(own, check.data, 0, 0)
        found = verdict(check, own, prepared, prepared.original, lesion_type=own.lesion_type, prompt=own.prompt)
        assert found.values["copy"] == 1
        assert found.failures["copy"] == f"1.000 with {own.sample_id}, expected less than {check.copy[0]:.3f}"
        assert "change" not in found.values  # nobody knows what the parent was before
        others += bool(set(found.failures) - {"copy", "type"})
    assert others <= 2


def test_bounds_are_those_of_one_more_real_lesion() -> None:
    """Simulated: one more value of the same distribution lies inside in 95 % of cases."""
    rng = np.random.default_rng(0)
    for sides, logarithmic in (((True, False), False), ((False, True), True), ((True, True), False)):
        inside = 0
        for _ in range(2000):
            values = rng.normal(1, 2, 8)
            low, high = prediction_bound(np.exp(values[:7]) if logarithmic else values[:7], sides, logarithmic)
            value = np.exp(values[7]) if logarithmic else values[7]
            inside += (low is None or value >= low) and (high is None or value <= high)
        assert ((low is not None), (high is not None)) == sides
        assert 0.935 < inside / 2000 < 0.965
    assert prediction_bound([1.0], (True, True)) == (None, None)


# --------------------------------------------------------------------------------------------------- what is refused


def test_training_lesions_that_cannot_be_read_are_listed(
    small: Small, world: Path, tmp_path: Path, strict: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world / "train", tmp_path / "train")
    masks = sorted(path for path in (tmp_path / "train").glob("*/mask.png") if np.any(read_image(path)))
    masks[0].write_bytes(b"no image")
    masks[1].with_name("prompt.txt").unlink()
    more = ["--data", world / "train", "--prompt", "lesion", "--train_json", tmp_path / "train"]
    assert infer(small.last, tmp_path / "out", *given(small, world, *more)) == 3
    left_out = json.loads((tmp_path / "out" / "check.json").read_text())["left_out"]
    assert {each["sample_id"] for each in left_out} == {mask.parent.name for mask in masks[:2]}
    assert all(str(tmp_path) in each["file"] and each["reason"] for each in left_out)
    assert f"--check: 2 entries of {tmp_path / 'train'} cannot be read, no bounds come from there (" in caplog.text


def test_a_try_that_broke_counts_those_before_it(
    small: Small, world: Path, tmp_path: Path, strict: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later, _ = strict
    begun = Inpainter.begin

    def begin(self: Inpainter, samples: Any, jobs: Sequence[Any]) -> list[Any]:
        broken = [job.seed >= FURTHER and job.sample_id == later for job in jobs]
        found = begun(self, samples, jobs)
        nothing = InpaintedImage(None, None, "made up")
        return [(lambda: nothing) if bad else finish for bad, finish in zip(broken, found, strict=True)]

    monkeypatch.setattr(Inpainter, "begin", begin)
    assert infer(small.last, tmp_path / "out", *given(small, world)) == 3
    reasons = {
        each["sample_id"]: each["reason"] for each in json.loads((tmp_path / "out" / "rejects.json").read_text())
    }
    assert "made up; nothing was written" in reasons[later]
    counts = {"drawn": 4, "accepted": 1, "at_once": 1, "rejected_agreement": 3}
    assert record(tmp_path / "out")["check"] == counts


def test_lesions_that_the_checkpoint_has_not_seen(
    small: Small, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--data", world / TRAIN, "--prompt", "lesion", "--check", *small.sizes]
    with pytest.raises(MedSoftError, match=r"0 real lesions of patients that .* has learned from, --check needs at"):
        infer(small.last, tmp_path / "out", *words, "--train_json", world / VAL)
    assert "are of patients that" in caplog.text
    with pytest.raises(UsageError, match=r"none\.json: does not exist; --check compares with"):
        infer(small.last, tmp_path / "out", *words, "--train_json", tmp_path / "none.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tries", 2], "--tries belongs to --check"),
        (["--judge", CLIP], "--judge belongs to --check"),
        (["--check", "--judge", "nobody.safetensors"], r"--judge nobody\.safetensors: does not exist"),
        (["--check", "--tries", 0], "--tries"),
    ],
)
def test_refused_flags(small: Small, world: Path, tmp_path: Path, words: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        infer(small.last, tmp_path / "out", "--train_json", world / TRAIN, *words)
    assert not (tmp_path / "out").exists()


def test_replay_takes_no_check(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UsageError, match="--replay makes the same image again; check does not go with it"):
        call(dataset_infer, "--replay", tmp_path / "meta.json", "--output_dir", tmp_path / "out", "--check")


def test_a_file_that_is_no_judge(small: Small, world: Path, tmp_path: Path) -> None:
    save_file({"weight": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MedSoftError, match=r"not a classifier saved by classifier\.py"):
        infer(small.last, tmp_path / "out", *given(small, world, "--judge", tmp_path / "other.safetensors"))
