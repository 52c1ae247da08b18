"""Names, prompts, ids and meta.json of sample folders.

What is certain is put right and said, what is likely is warned of, the rest is rejected by name.
"""

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm.core.errors import FileError
from ldm.core.files import read_json
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.checks import Row, check_disjoint
from ldm.data.folders import scan_folder
from ldm.data.samples import probably_healthy

Write = Callable[..., Path]


# ------------------------------------------------------------------------------------------------ names


def test_capitals_in_file_names_do_not_matter(tmp_path: Path, write_sample: Write) -> None:
    folder = write_sample(tmp_path / "a", meta={"patient_id": "p"}, anatomy=np.ones((20, 24), np.uint8))
    for name in ("image.png", "mask.png", "prompt.txt", "meta.json", "anatomy.png"):
        (folder / name).rename(folder / name.upper())
    ((sample,), rejects) = scan_folder(tmp_path)
    assert not rejects
    assert [file.name for file in sample.files if file] == ["IMAGE.PNG", "MASK.PNG", "ANATOMY.PNG"]
    assert (sample.patient_id, sample.prompt) == ("p", "lytic lesion")


@pytest.mark.parametrize("name", ["image.png", "mask.png", "prompt.txt", "meta.json"])
def test_a_name_in_small_and_in_capital_letters_is_ambiguous(tmp_path: Path, write_sample: Write, name: str) -> None:
    folder = write_sample(tmp_path / "a", meta={})
    twin = folder / name.capitalize()
    if twin.exists():
        pytest.skip("this file system does not tell capitals apart")
    twin.write_bytes((folder / name).read_bytes())
    _, (reject,) = scan_folder(tmp_path)
    assert reject.reason == f"ambiguous: {twin.name} and {name} are both here; keep one"


@pytest.mark.parametrize("name", ["image.dcm", "mask.nii.gz", "Image.webp", "anatomy.npy", "soft_mask.mha"])
def test_a_format_that_is_not_read_is_rejected_with_its_name(tmp_path: Path, write_sample: Write, name: str) -> None:
    stem = name.lower().partition(".")[0]
    write_sample(tmp_path / "good")
    folder = write_sample(tmp_path / "bad", prompt="healthy" if stem == "mask" else "lytic lesion", **{stem: None})
    (folder / name).write_bytes(b"x")
    samples, (reject,) = scan_folder(tmp_path)
    assert [sample.sample_id for sample in samples] == ["good"]
    assert reject.file == folder / name
    assert f"export it as {stem}.png" in reject.reason


def test_a_folder_with_nothing_but_another_format_counts_as_a_sample(tmp_path: Path, write_sample: Write) -> None:
    write_sample(tmp_path / "good")
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "image.dcm").write_bytes(b"x")
    _, (reject,) = scan_folder(tmp_path)
    assert reject.sample_id == "scan"


@pytest.mark.parametrize("hidden", [".trash", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"])
def test_hidden_and_system_folders_are_left_out_and_counted(
    tmp_path: Path, write_sample: Write, hidden: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / hidden / "b")
    write_sample(tmp_path / "a" / hidden)
    (tmp_path / "a" / hidden / "image.jpg").mkdir()  # as a thumbnail server makes them
    samples, rejects = scan_folder(tmp_path)
    assert ([sample.sample_id for sample in samples], rejects) == (["a"], [])
    assert "2 sample folders are left out, as hidden or a system's own; the first: " in caplog.text


def test_a_dataset_below_a_hidden_folder_is_read(tmp_path: Path, write_sample: Write) -> None:
    write_sample(tmp_path / ".cache" / "data" / "a")
    assert [sample.sample_id for sample in scan_folder(tmp_path / ".cache" / "data")[0]] == ["a"]


def test_deep_and_long_names_are_read_and_written(tmp_path: Path, write_sample: Write) -> None:
    uid = "1.2.840.113619.2.55.3.604688119.969.1234567890.123"
    deep = Path(*[uid] * 8, "n" * 255)
    write_sample(tmp_path / "data" / deep)
    samples, rejects = scan_folder(tmp_path / "data")
    assert (samples[0].sample_id, rejects) == (deep.as_posix(), [])
    write_annotations(tmp_path / "o.json", samples)
    assert load_samples(tmp_path / "o.json") == (samples, [])


# ------------------------------------------------------------------------------------------------ prompts

SPELLED = [
    *("Healthy.", '"healthy"', "healthy\u200b", "\u2060 healthy", "'HEALTHY'", "(healthy)", "hea\u00adlthy"),
    *("\u201eHealthy\u201c", "\uff48\uff45\uff41\uff4c\uff54\uff48\uff59"),
]


@pytest.mark.parametrize("text", SPELLED)
def test_healthy_in_decoration_is_healthy_and_that_is_said(
    tmp_path: Path, write_sample: Write, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_sample(tmp_path / "a", prompt=text)
    write_sample(tmp_path / "b", prompt=text)
    samples, _ = load_samples(tmp_path)
    assert [sample.prompt for sample in samples] == ["healthy", "healthy"]
    assert "warning: a (and 1 more sample): the prompt" in caplog.text
    records = json.dumps([{"image": "a/image.png", "label": text, "box": [0, 0, 0, 0]}])
    (tmp_path / "o.json").write_text(records, encoding="utf-8")
    assert load_samples(tmp_path / "o.json")[0][0].prompt == "healthy"  # no mask is asked of it


LIKELY = [
    *("normal", "no lesion", "healthy vertebra", "正常", "unhealthy", "healthy?", "!healthy", "No fracture."),
    *("The L3 vertebra without lesion", "normal spine, no metastases", "unremarkable", "ohne Befund", "无病变"),
    *(
        "there is no lesion in L3",
        "There are no signs of fracture.",
        "none",
        "n/a",
        "N/A",
        "nan",
        "-",
        "nothing",
        "nil",
    ),
    *("healhty", "helthy", "Haelthy", "nromal", "lesion-free", "fracture free L4 vertebra", "negative for fracture"),
    *("NAD", "WNL", "within normal limits", "intact vertebra", "no abnormality detected", "nothing abnormal"),
    *("D12: no lesion", "T12-L1 without lesion", "LWK 4/5: no fracture", "lumbar vertebra 2: no fracture"),
    *("fracture: none seen", "metastasis: absent in L3", "lesion: no", "fracture: no evidence"),
    "lumbar vertebra 2: no evidence of fracture",
    *(
        "lesion: none",
        "lesion not seen",
        "fracture absent",
        "w/o lesion",
        "free from metastases",
        "healthy, no other finding",
    ),
    *("aucune lésion", "pas de lésion", "unauffällig", "keine Läsion", "sin lesiones", "nessuna lesione", "sem lesão"),
    *(
        "geen afwijking",
        "未见异常",
        "異常なし",
        "без патологии",
        "vertèbre normale",
        "There is no fracture but L3 is normal",
    ),
]


@pytest.mark.parametrize("text", LIKELY)
def test_healthy_in_other_words_is_warned_of(
    tmp_path: Path, write_sample: Write, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_sample(tmp_path / "a", prompt=text)
    ((sample,), _) = load_samples(tmp_path)
    assert (sample.prompt, sample.healthy) == (text, False)
    assert f"counts as diseased but reads as healthy; write `healthy` if there is no lesion: a: {text!r}" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        *("moderate osteolytic lesion of the L3 vertebra", "lytic lesion without fracture", "abnormal signal in L2"),
        *("compression fracture, otherwise normal", "hemangioma of L1, no fracture", "L3 vertebra", "healthy"),
        *("no other lesion", "lytic lesion, no other lesion", "lesion of L3 with intact endplates", "unclear finding"),
        *("benign-looking lytic lesion, margins normal", "no fracture but a lytic lesion", "oedema, normal height"),
        *("hemangioma with intact endplates", "Schmorl node, normal discs", "bone island, otherwise normal"),
        *("osteolyse, aucune fracture", "Läsion ohne Fraktur", "spondylitis, negative for fracture", "病变"),
        *("vertebra without fracture and with a blastic focus", "no longer normal after collapse", "non-union"),
        *(
            "fracture, not displaced",
            "not healthy bone, destroyed",
            "lesion with no sclerotic rim",
            "tumor-free margin lost",
        ),
    ],
)
def test_a_lesion_is_not_warned_of(text: str) -> None:
    assert not probably_healthy(text)


def test_a_healthy_sample_with_the_mask_of_a_lesion_is_named(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    body = np.zeros((20, 24), np.uint8)
    body[2:18, 2:22] = 1
    part = np.zeros((20, 24), np.uint8)
    part[5:10, 8:16] = 255
    for name, mask in {"part": part, "whole": body * 255, "none": None, "empty": part * 0}.items():
        write_sample(tmp_path / name, prompt="healthy", mask=mask, anatomy=body)
    write_sample(tmp_path / "made", prompt="healthy", mask=part, anatomy=body, meta={"synthetic": True})
    write_sample(tmp_path / "lesion", mask=part, anatomy=body)
    write_sample(tmp_path / "planned", prompt="healthy", mask=part, anatomy=body, soft_mask=part)
    load_samples(tmp_path)
    assert caplog.text.count("covers less than half of the vertebra in anatomy.png: a lesion's?") == 1
    assert "warning: part: its prompt is `healthy`, but its mask" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "kind", "opposed"),
    [
        *[("healthy", "osteolytic", True), ("lytic lesion", "healthy", True), ("lytic lesion", "no lesion", True)],
        *[("healthy", "healthy", False), ("healthy", "none", False), ("healthy", "Normal", False)],
        *[("healthy", None, False), ("lytic lesion", "osteolytic", False), ("lytic lesion", None, False)],
    ],
)
def test_a_prompt_and_a_lesion_type_that_contradict_each_other_are_named(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture, prompt: str, kind: str | None, opposed: bool
) -> None:
    write_sample(tmp_path / "a", prompt=prompt, meta={"lesion_type": kind})
    load_samples(tmp_path)
    said = (
        f"prompt and lesion_type in meta.json contradict each other; which of them is wrong?: a: {prompt!r}, {kind!r}"
    )
    assert (said in caplog.text) == opposed
    assert opposed or "contradict" not in caplog.text


PROMPTS: dict[str, tuple[bytes, str]] = {
    "two lines": (b"lytic lesion\nhealthy\n", "holds 2 lines; expected one sentence"),
    "control characters": (b"lytic \x1b[31mlesion", "holds the control character U+001B"),
    "two lines of an old Mac": (b"lytic\rlesion", "holds 2 lines"),
    "UTF-16 without a mark": ("healthy".encode("utf-16-le"), "UTF-16 without a mark"),
    "big-endian": ("a lytic lesion".encode("utf-16-be"), "UTF-16 without a mark"),
    "UTF-16 with a mark": ("healthy".encode("utf-16"), "not UTF-8 text"),
    "invisible": ("\u200b \n".encode(), "the prompt is empty"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_not_one_sentence_is_rejected(tmp_path: Path, write_sample: Write, name: str) -> None:
    content, reason = PROMPTS[name]
    (write_sample(tmp_path / "a") / "prompt.txt").write_bytes(content)
    _, (reject,) = scan_folder(tmp_path)
    assert (reject.file.name, reason in reject.reason) == ("prompt.txt", True), reject


def test_every_kind_of_note_has_a_line(tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture) -> None:
    spelled = [f"{before}healthy{after}" for before in ('"', "'", "(", " [", "`") for after in (".", ";", "!")]
    for number, prompt in enumerate(spelled):
        for copy in range(2):
            write_sample(tmp_path / f"s{number:02d}{copy}", prompt, anatomy=np.ones((20, 24), np.uint8), mask=None)
    load_samples(tmp_path)
    said = [message for message in caplog.messages if "is read as `healthy`" in message]
    assert len(said) == len(spelled)
    assert all("(and 1 more sample)" in message for message in said)
    assert "more like that" not in caplog.text


# ------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "", "  ", "null", "<NA>", "N/A", "NaT"])
def test_words_for_nothing_are_no_id(tmp_path: Path, write_sample: Write, word: str) -> None:
    for name in "ab":
        write_sample(tmp_path / name, meta={"patient_id": word, "lesion_type": word, "parent_id": word})
    samples, _ = load_samples(tmp_path)
    assert [(s.patient_id, s.lesion_type, s.parent_id, s.synthetic) for s in samples] == [
        ("a", None, None, False),
        ("b", None, None, False),
    ]
    record = {"image": "a/image.png", "label": "healthy", "box": [0, 0, 0, 0], "sample_id": "x", "patient_id": word}
    (tmp_path / "o.json").write_text(json.dumps([record]))
    assert load_samples(tmp_path / "o.json")[0][0].patient_id == "x"


ACCENT = "Müller"


@pytest.mark.parametrize(
    ("key", "what", "pair"),
    [
        ("patient_id", "patients", ("P1", "p1")),
        ("patient_id", "patients", (ACCENT, unicodedata.normalize("NFD", ACCENT))),
        ("patient_id", "patients", ("p1", "p1\u200b")),
        ("patient_id", "patients", ("p 1", "p  1")),
        ("patient_id", "patients", ("017", "17")),  # as tables write numbers
        ("patient_id", "patients", ("17", "17.0")),
        ("patient_id", "patients", ("P-1", "P_01")),
        ("lesion_type", "lesion types", ("Lytic", "lytic")),
    ],
)
def test_ids_and_classes_that_are_nearly_the_same_are_named(
    tmp_path: Path, write_sample: Write, key: str, what: str, pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in zip("ab", pair, strict=True):
        write_sample(tmp_path / name, meta={key: value})
    samples, _ = load_samples(tmp_path)
    assert tuple(getattr(sample, key) for sample in samples) == pair
    names = " | ".join(map(repr, pair))
    assert f"different {what}, but for case or the form of characters the same: {names}" in caplog.text
    caplog.clear()
    write_sample(tmp_path / "b", meta={key: pair[0]})
    load_samples(tmp_path)
    assert "the same" not in caplog.text


def test_ids_that_are_nearly_the_same_in_two_sets_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row("training", "a", "017", None), Row("training", "b", "p 2", None), Row("validation", "c", "17", None)]
    check_disjoint([*rows, Row("validation", "d", "170", None)])
    (line,) = caplog.messages
    assert line == (
        "warning: one patient in two sets?: patients '017' | '17' are in different sets, but for case or the form of "
        "characters they are the same"
    )


def test_sample_folders_that_are_nearly_the_same_are_named(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write_sample(tmp_path / "Case1")
    write_sample(tmp_path / "case1")
    if len(os.listdir(tmp_path)) < 2:
        pytest.skip("this file system does not tell capitals apart")
    load_samples(tmp_path)
    assert "different samples, but for case or the form of characters the same: 'Case1' | 'case1'" in caplog.text


# ------------------------------------------------------------------------------------------------ meta.json

FAULTY: dict[str, tuple[str, str]] = {
    "NaN": ('{"age": NaN}', "NaN is no number"),
    "Infinity": ('{"deep": [{"age": -Infinity}]}', "-Infinity is no number"),
    "a float beyond all": ('{"age": 1e999}', "1e999 is no number, or too large"),
    "a whole number beyond all": (f'{{"age": {"9" * 400}}}', "or too large"),
    "a number of too many digits": (f'{{"age": {"9" * 5000}}}', "or too large"),
    "half of a pair": ('{"site": "\\ud800"}', "\\ud800 is half of a surrogate pair"),
    "half of a pair as a key": ('{"\\udfff": 1}', "\\udfff is half of a surrogate pair"),
    "too deep": ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested deeper than the 64 levels"),
    "far too deep": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than the 64 levels"),
    "a key twice": ('{"patient_id": "a", "patient_id": "b"}', "the key 'patient_id' stands twice"),
    "zero bytes": ('{"patient_id": "a\0"}', "holds zero bytes"),
    "a window too large": ('{"window": [0, 1e999]}', "or too large"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_is_not_json_rejects_that_sample_alone(tmp_path: Path, write_sample: Write, name: str) -> None:
    content, reason = FAULTY[name]
    write_sample(tmp_path / "good", meta={"site": "😀", "age": 61.5, "uid": 10**30})
    folder = write_sample(tmp_path / "bad")
    (folder / "meta.json").write_text(content)
    ((good,), (reject,)) = scan_folder(tmp_path)
    assert (reject.sample_id, reject.file) == ("bad", folder / "meta.json")
    assert reason in reject.reason
    assert good.meta == {"site": "😀", "age": 61.5, "uid": 10**30}
    write_annotations(tmp_path / "o.json", [good])
    assert load_samples(tmp_path / "o.json") == ([good], [])


def test_an_annotation_file_is_read_as_strictly(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text('[{"image": "a.png", "label": "x", "box": [NaN, 0, 1, 1]}]')
    with pytest.raises(FileError, match=r"o\.json: not valid JSON \(NaN is no number"):
        read_json(tmp_path / "o.json")
