"""Prompts that agree with the image they are given to: what a sentence names, and how it is made to agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import infer, metas

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id
from ldm.data.annotations import write_annotations
from ldm.data.samples import Sample
from ldm.inference.options import InferenceOptions
from ldm.inference.prompts import ImageFacts, agreeing, contradiction, image_facts, levels_named
from ldm.inference.tasks import Task, plan_tasks


@pytest.mark.parametrize(
    ("prompt", "levels"),
    [
        ("severe lesion of the L3 vertebra", ["L3"]),
        ("L3椎体中度溶骨性病变", ["L3"]),
        ("腰3椎 lesion", ["L3"]),
        ("lytic lesion of Th12", ["T12"]),
        ("D12 body, LWK 4", ["T12", "L4"]),
        ("the third lumbar vertebra", ["L3"]),
        ("12th thoracic vertebra", ["T12"]),
        ("cervical vertebra 5", ["C5"]),
        ("from L2 to L4", ["L2", "L3", "L4"]),
        ("the L3/4 disc", ["L3", "L4"]),
        ("L3-L4", ["L3", "L4"]),
        ("lesion of the T1 vertebra", ["T1"]),
        ("bright on T2, dark on T1w", []),
        ("a T2-weighted image of L4", ["L4"]),
        ("a lumbar 3 mm lesion", []),
        ("CT 5, 3D, type C9, L12, 12 mm", []),
        ("sclerotic lesion", []),
    ],
)
def test_vertebrae_that_a_prompt_names(prompt: str, levels: list[str]) -> None:
    assert levels_named(prompt) == levels


def test_t2_is_a_vertebra_where_the_image_says_so() -> None:
    assert levels_named("lytic lesion of T2", "T2") == ["T2"]
    assert levels_named("T2-weighted image", "T2") == []


@pytest.mark.parametrize(
    ("prompt", "level", "region", "modality", "wrong", "agreed"),
    [
        ("lesion of the L3 vertebra", "L3", None, None, None, "lesion of the L3 vertebra"),
        ("lesion of the L3 vertebra", None, None, None, None, "lesion of the L3 vertebra"),
        ("sclerotic lesion", "L4", "lumbar", "CT", None, "sclerotic lesion"),
        ("lesion of the L3 vertebra", "T12", None, None, "names L3", "lesion of the T12 vertebra"),
        ("lumbar lesion at L3", "T12", None, None, "names L3", "thoracic lesion at T12"),
        ("the third lumbar vertebra, L3", "L1", "lumbar", None, "names L3", "the L1 vertebra, L1"),
        ("lesions of L2 and L4", "L4", None, None, None, "lesions of L2 and L4"),
        ("lesions of L2 and L4", "T4", None, None, "names L2", None),
        ("lesion of the cervical spine", None, "lumbar", None, "cervical", "lesion of the lumbar spine"),
        ("lesion of L3", None, "thoracic", None, "lumbar", None),
        ("hyperintense on T2-weighted images", None, None, "CT", "names MR", None),
        ("lytic lesion on CT", None, None, "MR", "names CT", None),
        ("T12", "T1", None, None, "names T12", "T1"),
        ("metastasis of cervical carcinoma in L3", "L3", None, None, None, "metastasis of cervical carcinoma in L3"),
        (
            "metastasis of cervical carcinoma in L3",
            "L2",
            None,
            None,
            "names L3",
            "metastasis of cervical carcinoma in L2",
        ),
        ("near the sacral promontory", "L5", "lumbar", None, None, "near the sacral promontory"),
        ("lesion of L3", "vertebra 20", None, None, "names L3", None),
        ("disc lesion at L3-L4", "l3-l4", None, None, None, "disc lesion at L3-L4"),
        # A region contradicts no vertebra of it, and is the image's where meta.json says no other one.
        ("lesion of L3", "lumbar", None, None, None, "lesion of L3"),
        ("lesion of T3", "lumbar spine", None, None, "names T3, the image's level is lumbar spine", None),
        ("lesion of the thoracic spine", "lumbar", None, None, "thoracic", "lesion of the lumbar spine"),
        ("lesion of L1", "thoracolumbar junction", None, None, None, "lesion of L1"),
        ("lesion of C2", "thoracolumbar junction", None, None, "names C2", None),
        ("lesion of S2", "sacrum", None, None, None, "lesion of S2"),
        ("lesion of L5", "sacrum", None, None, "names L5", None),
        # A level in two regions says more than the one that meta.json names.
        ("lesion of L1", "t12-l1", "thoracic", None, None, "lesion of L1"),
        ("lesion of the lumbar spine", "t12-l1", "thoracic", None, None, "lesion of the lumbar spine"),
        ("lesion of the sacral spine", "t12-l1", "thoracic", None, "region is lumbar or thoracic", None),
        # A variant is named by a range that it lies in where the image is of one.
        ("lesion of T12-L1", "T13", None, None, None, "lesion of T12-L1"),
        ("lesion of T12 to L1", "L1", None, None, None, "lesion of T12 to L1"),
        ("lesion of L5-S1", "L6", None, None, None, "lesion of L5-S1"),
        ("lesion of T12/L1", "T13", None, None, "names T12", None),
    ],
)
def test_contradictions_are_named_and_replaced_where_that_is_certain(
    prompt: str, level: str | None, region: str | None, modality: str | None, wrong: str | None, agreed: str | None
) -> None:
    facts = ImageFacts(level, region, modality)
    found = contradiction(prompt, facts)
    assert found is None if wrong is None else wrong in (found or "")
    assert agreeing(prompt, facts) == agreed


def test_meta_json_is_read_in_one_spelling() -> None:
    def facts(prompt: str = "healthy", level: str | None = None, **meta: Any) -> ImageFacts:
        return image_facts(Sample("a", Path("i.png"), None, prompt, (0, 0, 0, 0), "p", level=level, meta=meta))

    assert facts(level="th12") == ImageFacts("T12", None, None)
    assert facts(level="LWK3", modality="MRI", region="Lumbar spine") == ImageFacts("L3", "lumbar", "MR")
    assert facts(level="T1", modality="PET") == ImageFacts("T1", None, "pet")
    assert facts("lesion of L3") == ImageFacts("L3", None, None)
    assert facts(level="L3-L4").level == "l3-l4"


# ------------------------------------------------------------------------------------------------- planning


@pytest.fixture
def plan(tmp_path: Path, write_sample: Any) -> Callable[..., tuple[list[Task], list]]:
    """``plan(match, healthy, diseased, **options)``: tasks for healthy samples given as (name, level, meta)."""
    image = write_sample(tmp_path / "one") / "image.png"
    box = (0.2, 0.2, 0.5, 0.5)

    def planned(match: str, healthy: list[tuple], diseased: list[tuple], **more: Any) -> tuple[list[Task], list]:
        samples = [Sample(n, image, None, "healthy", box, n, level=level, meta=meta) for n, level, meta in healthy]
        for number, (prompt, level, meta) in enumerate(diseased):
            name = f"sick{number}"
            samples.append(Sample(name, image, image.with_name("mask.png"), prompt, box, name, level=level, meta=meta))
        write_annotations(tmp_path / "all.json", samples)
        options = InferenceOptions(
            tmp_path, train_json=tmp_path / "all.json", choose="healthy", match=match.split(), **more
        )
        return plan_tasks(options, content_id)[:2]

    return planned


LUMBAR = [("lesion of L3", "L3", {}), ("big lesion of L3", "L3", {}), ("lesion of L5", "L5", {})]


def test_prompts_come_from_the_same_level_where_there_are_some(plan: Callable) -> None:
    tasks, rejects = plan("level", [("a", "L3", {}), ("b", "T12", {})], LUMBAR, variants=20)
    assert not rejects
    of_a = {(task.source.prompt, task.prompt, task.match) for task in tasks if task.sample.sample_id == "a"}
    assert of_a == {(prompt, prompt, "same level") for prompt, level, _ in LUMBAR if level == "L3"}
    of_b = {(task.prompt, task.match) for task in tasks if task.sample.sample_id == "b"}
    replaced = {("lesion of T12", f"{level} replaced by T12") for level in ("L3", "L5")}
    assert of_b == replaced | {("big lesion of T12", "L3 replaced by T12")}


@pytest.mark.parametrize("match", ["level", "replace"])
def test_a_vertebra_that_may_be_a_sequence_is_not_given_to_another_image(plan: Callable, match: str) -> None:
    diseased = [("osteolytic metastasis in T1", "T1", {}), ("lesion of L3", "L3", {})]
    tasks, _ = plan(match, [(f"h{number}", "L1", {}) for number in range(6)], diseased)
    assert {task.prompt for task in tasks} == {"lesion of L1"}


def test_replace_takes_prompts_of_all_levels(plan: Callable) -> None:
    tasks, _ = plan("replace", [("a", "L3", {})], LUMBAR, variants=30)
    assert {task.source.level for task in tasks} == {"L3", "L5"}
    assert {task.prompt for task in tasks} == {"lesion of L3", "big lesion of L3"}


def test_none_takes_them_as_they_are_and_says_so(plan: Callable, caplog: pytest.LogCaptureFixture) -> None:
    tasks, _ = plan("none", [("a", "T12", {})], LUMBAR, variants=30)
    assert {task.prompt for task in tasks} == {prompt for prompt, _, _ in LUMBAR}
    assert {task.match for task in tasks} == {"not matched"}
    assert "30 of 30 prompts contradict meta.json (a__v0: the prompt names L" in caplog.text


def test_modality_and_region_are_those_of_the_image(plan: Callable) -> None:
    diseased = [
        ("lesion 0", None, {"modality": "CT"}),
        ("lesion 1", None, {"modality": "MRI", "region": "lumbar"}),
        ("lesion 2", None, {"modality": "MR", "region": "cervical"}),
        ("lesion 3 on T2w", None, {}),
    ]
    healthy = [("ct", None, {"modality": "CT"}), ("mr", None, {"modality": "MR", "region": "Lumbar"})]
    tasks, _ = plan("level", healthy, diseased, variants=30)
    found = {name: {task.prompt for task in tasks if task.sample.sample_id == name} for name in ("ct", "mr")}
    assert found == {"ct": {"lesion 0"}, "mr": {"lesion 1", "lesion 3 on T2w"}}


def test_sample_for_which_no_prompt_agrees_is_rejected_and_the_rest_goes_on(plan: Callable) -> None:
    diseased = [("lesions of L2 and L4", "L2", {"modality": "CT"})]
    healthy = [("far", "T7", {}), ("good", "L2", {}), ("mr", "L2", {"modality": "MR"})]
    tasks, rejects = plan("level", healthy, diseased)
    assert [task.name for task in tasks] == ["good__v0"]
    assert {reject.sample_id for reject in rejects} == {"far", "mr"}
    assert "no prompt can be made to agree with its meta.json (level T7)" in rejects[0].reason
    with pytest.raises(MedSoftError, match=r"no sample can be inpainted \(1 rejected; first: .*level T7"):
        plan("level", healthy[:1], diseased)


def test_prompt_of_the_user_is_warned_of_or_replaced(plan: Callable, caplog: pytest.LogCaptureFixture) -> None:
    healthy = [("a", "L3", {}), ("b", "L4", {}), ("c", None, {})]
    tasks, _ = plan("level", healthy, LUMBAR, prompt="lesion of the L3 vertebra")
    assert {task.prompt for task in tasks} == {"lesion of the L3 vertebra"}
    assert "1 of 3 prompts contradict meta.json (b__v0: the prompt names L3, the image's level is L4)" in caplog.text
    assert "1 prompt names a vertebra, but the image's meta.json has no level to compare it with; first: c__v0" in (
        caplog.text
    )
    caplog.clear()
    tasks, _ = plan("replace", healthy, LUMBAR, prompt="lesion of the L3 vertebra")
    assert [task.prompt for task in tasks] == [f"lesion of the {level} vertebra" for level in ("L3", "L4", "L3")]
    assert [task.match for task in tasks] == ["same level", "L3 replaced by L4", "level unknown"]
    assert "contradict" not in caplog.text


def test_prompt_of_the_user_that_cannot_agree_is_told_what_to_change(plan: Callable) -> None:
    healthy = [("a", "L3", {"modality": "CT"}), ("b", "L3", {})]
    _, (reject,) = plan("replace", healthy, LUMBAR, prompt="lytic lesion on MRI")
    assert reject.reason == (
        "--prompt cannot be made to agree with its meta.json: the prompt names MR, the image's modality is CT; leave "
        "that out of it, or give --match none"
    )
    tasks, rejects = plan("none", healthy, LUMBAR, prompt="lytic lesion on MRI")
    assert (len(tasks), rejects) == (2, [])


def test_prompt_of_the_user_that_reads_as_healthy_is_warned_of(
    plan: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    healthy = [("a", "L3", {})]
    plan("level", healthy, LUMBAR, prompt="no lesion")
    assert (
        "--prompt reads as healthy, but counts as a lesion's; write `healthy` for no lesion: 'no lesion'" in caplog.text
    )
    caplog.clear()
    plan("level", healthy, LUMBAR, prompt="healthy")
    assert "reads as healthy" not in caplog.text


def test_unknown_way_to_match(tmp_path: Path) -> None:
    (tmp_path / "some.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match="--match: expected one of level, replace, none, found level and none"):
        infer(tmp_path / "some.ckpt", tmp_path / "out", "--match", "level", "sign", "none")


def test_overrides_may_stand_behind_the_words_of_match(tmp_path: Path) -> None:
    (tmp_path / "some.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"sampling.stepz"):
        infer(tmp_path / "some.ckpt", tmp_path / "out", "--match", "level", "sign", "sampling.stepz=4")


SIGNS = [("lesion 0", None, {"sign": "lytic"}), ("lesion 1", None, {"sign": "Blastic "}), ("lesion 2", None, {})]


def test_match_by_a_key_of_meta_json_takes_samples_of_the_same_value(plan: Callable, caplog: Any) -> None:
    """Where no source has the value, or the image has none, all are taken, as without the key, and counted."""
    healthy = [("a", None, {"sign": "blastic"}), ("b", None, {"sign": "mixed"}), ("c", None, {})]
    tasks, rejects = plan("sign", healthy, SIGNS, variants=30)
    found = {name: {task.prompt for task in tasks if task.sample.sample_id == name} for name in "abc"}
    assert not rejects
    assert found == {"a": {"lesion 1"}, "b": (every := {"lesion 0", "lesion 1", "lesion 2"}), "c": every}
    assert {task.match for task in tasks if task.sample.sample_id == "a"} == {"level unknown, same sign"}
    assert "--match sign: for 60 of 90 images no diseased sample has the same; the first: b" in caplog.text
    assert tasks[30:] == plan("level", healthy, SIGNS, variants=30)[0][30:]


def test_keys_come_before_the_level_and_in_their_order(plan: Callable) -> None:
    diseased = [("one of L3", "L3", {"sign": "x"}), ("two of L4", "L4", {"sign": "y", "side": 1})]
    diseased += [("three of L5", "L5", {"sign": "y", "side": 2})]
    healthy = [("a", "L3", {"sign": "y", "side": 2})]
    for words, prompts in {"sign": {"two", "three"}, "sign side": {"three"}, "none side": {"three"}}.items():
        tasks, _ = plan(words, healthy, diseased, variants=20)
        assert {task.prompt.split()[0] for task in tasks} == prompts
    assert (tasks[0].prompt, tasks[0].match) == ("three of L5", "not matched, same side")


def test_key_that_no_sample_has(plan: Callable) -> None:
    with pytest.raises(
        UsageError, match=r"--match sing: no healthy sample of .*all.json has this .*keys there are pa.*sign"
    ):
        plan("sing", [("a", None, {"sign": "lytic"})], SIGNS)
    with pytest.raises(
        UsageError, match=r"--match side: no diseased sample of .*all.json has this .* are patient_id, sign"
    ):
        plan("side", [("a", None, {"side": "left"})], SIGNS)


def test_key_where_no_prompt_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "some.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--match sign chooses among the prompts of .* samples; --prompt takes none"):
        infer(tmp_path / "some.ckpt", tmp_path / "out", "--match", "sign", "--prompt", "lytic lesion")


def test_files_and_record_say_the_prompt_that_was_used(final: Path, write_sample: Any, tmp_path: Path) -> None:
    """The text in prompt.txt, in the PNG's tag and in meta.json is one, and names the image's own vertebra."""
    from PIL import Image

    write_sample(tmp_path / "data" / "well", "healthy", meta={"level": "L1"})
    write_sample(tmp_path / "data" / "sick", "severe lytic lesion of the L4 vertebra", meta={"level": "L4"})
    assert infer(final, tmp_path / "out", "--train_json", tmp_path / "data") == 0
    ((name, meta),) = metas(tmp_path / "out").items()
    assert (name, meta["level"], meta["prompt_match"]) == ("well__v0", "L1", "L4 replaced by L1")
    with Image.open(tmp_path / "out" / name / "image.png") as opened:
        said = opened.text["Description"]
    assert said == (tmp_path / "out" / name / "prompt.txt").read_text().strip()
    assert said == "severe lytic lesion of the L1 vertebra"
