"""tool/doctor.py through its command line: each fault it looks for is found and named."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLIP, MODELS, TRAIN, VAL, call, without_label_1

from ldm.core.errors import MedSoftError, UsageError
from ldm.data import checks as dataset_checks
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.samples import Reject
from ldm.doctor.installation import check_torchvision, check_versions
from tool import doctor

PRIVACY = "results and reports carry that on; use codes instead"
BODY = np.random.default_rng(0).integers(20, 200, (20, 24), dtype=np.uint8)


def findings(tmp_path: Path, *given: Any) -> tuple[int, list[dict[str, str]]]:
    written = ("--output", tmp_path / "findings.json", "--overlays", tmp_path / "overlays.html")
    code = call(doctor, *given, *written, "--workers", 1)
    return code, json.loads((tmp_path / "findings.json").read_text())


def texts(found: list[dict[str, str]], level: str) -> str:
    return "\n".join(f"{item['where']}: {item['text']}" for item in found if item["level"] == level)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 24), dtype=np.uint8)


def test_sound_data_and_checkpoint(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.chdir(world)
    given = ("--config", MODELS / "phantom_stage1.yaml", "--ckpt", converted, "--biomedclip", CLIP)
    code, found = findings(tmp_path, *given)
    assert (code, texts(found, "error"), texts(found, "sample")) == (0, "", "")
    assert "0 errors, 0 samples that cannot be used" in caplog.text
    (said,) = [line for line in caplog.messages if "decoded in" in line]
    count, seconds, rate = map(float, re.findall(r"[\d.]+", said))
    assert count == 9 + 3 + 4
    low, high = seconds - 0.05, seconds + 0.05  # they are rounded
    assert rate * low - 1 <= 60 * count <= (rate + 1) * high


def test_samples_without_spacing_or_too_wide_where_lengths_are_in_mm(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are named; what is left to learn from is counted in crops and masks."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "train", tmp_path / "data")
    metas = {path: json.loads(path.read_text()) for path in (tmp_path / "data").glob("*/meta.json")}
    changed, wide, *_ = (path for path, meta in metas.items() if meta["lesion_type"])
    del metas[changed]["spacing_mm"]
    metas[wide]["spacing_mm"] = [1.0, 90.0]  # the window would have three or four columns
    for path in (changed, wide):
        path.write_text(json.dumps(metas[path]))
    config = ("--config", MODELS / "phantom_stage1.yaml", "--biomedclip", CLIP, "data.mm_per_pixel=5")
    code, found = findings(tmp_path, "--data", tmp_path / "data", *config)
    assert code == 3
    (line,) = [line for line in texts(found, "sample").splitlines() if "spacing_mm" in line]
    assert line.startswith(f"{changed.with_name('image.png')}: data.mm_per_pixel=5: the sample's meta.json has no")
    (line,) = [line for line in texts(found, "sample").splitlines() if "is wide enough" in line]
    assert line.startswith(f"{wide.with_name('image.png')}: the lesion with its soft border has")
    assert "2 distinct crops of 2 diseased images, 20 masks in 5 healthy ones" in caplog.text


def test_masks_that_cannot_be_carried_over(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_annotations(tmp_path / TRAIN, without_label_1(load_samples(world / "train")[0], tmp_path))
    config = ("--config", MODELS / "phantom_stage1.yaml", "--biomedclip", CLIP, "data.healthy_masks_from=carry")
    code, found = findings(tmp_path, *config)
    assert code == 1
    assert "train: data.healthy_masks_from=carry needs diseased samples with a mask, and" in texts(found, "error")


def test_faults_of_single_samples(tmp_path: Path, write_sample: Any) -> None:
    data = tmp_path / "data"
    for number in range(4):
        write_sample(data / f"good{number}", prompt="lytic lesion", image=picture(number))
    write_sample(data / "healthy", prompt="healthy", image=picture(9), mask=None)
    cut = write_sample(data / "cut", image=picture(10)) / "image.png"
    cut.write_bytes(cut.read_bytes()[:60])
    write_sample(data / "empty", image=picture(11), mask=np.zeros((20, 24), np.uint8))
    write_sample(data / "size", image=picture(12), mask=np.eye(30, dtype=np.uint8) * 255)
    code, found = findings(tmp_path, "--data", data)
    assert code == 3
    said = texts(found, "sample")
    assert "cut/image.png: truncated PNG" in said
    assert "empty/mask.png: the mask is empty" in said
    assert "size/mask.png: has 30 x 30 pixels, its image 24 x 20" in said
    assert len(said.splitlines()) == 3


def test_what_separates_the_classes_besides_lesions(tmp_path: Path, write_sample: Any) -> None:
    """Healthy 20 x 24 pixels of one site, diseased 60 x 72 of another: no lesion needs to be looked at."""
    for number in range(8):
        write_sample(tmp_path / "data" / f"h{number}", prompt="healthy", image=picture(number), mask=None)
        large = np.kron(picture(20 + number), np.ones((3, 3), np.uint8))
        mask = np.kron(np.eye(20, 24, dtype=np.uint8), np.full((3, 3), 255, np.uint8))
        write_sample(tmp_path / "data" / f"d{number}", prompt="lytic lesion", image=large, mask=mask)
    for number in range(8):
        for kind in "hd":
            (tmp_path / "data" / f"{kind}{number}" / "meta.json").write_text(json.dumps({"site": f"hospital {kind}"}))
    code, found = findings(tmp_path, "--data", tmp_path / "data")
    assert code == 0
    said = texts(found, "warning")
    assert (
        "site alone tells diseased from healthy samples (AUC 1.00; healthy: hospital h (8 of 8), diseased: hosp" in said
    )
    assert (
        "size in pixels alone tells diseased from healthy samples (AUC 1.00; healthy: 21.91 (8 of 8), diseased: 65.7"
        in said
    )


def test_files_that_changed_after_preparation(tmp_path: Path, write_sample: Any) -> None:
    """The annotation is read, but the files are not what they were."""
    for number in range(3):
        write_sample(tmp_path / "data" / f"s{number}", image=picture(number))
    write_annotations(tmp_path / "train.json", load_samples(tmp_path / "data")[0])
    (tmp_path / "data" / "s0" / "image.png").unlink()
    mask = tmp_path / "data" / "s1" / "mask.png"
    write_png(mask, np.zeros((20, 24), np.uint8))
    (tmp_path / "data" / "s2" / "prompt.txt").write_text("sclerotic lesion")
    code, found = findings(tmp_path, "--train_json", tmp_path / "train.json")
    assert code == 3
    assert "s0/image.png: the annotation names it" in texts(found, "sample")
    assert "s1/mask.png: the mask is empty (all zero)" in texts(found, "sample")
    assert "s2/prompt.txt: is not what the annotation file says" in texts(found, "warning")


def test_a_mask_that_reaches_beyond_its_box_in_the_annotation(tmp_path: Path, write_sample: Any) -> None:
    """The annotation was made of another mask."""
    for number in range(3):
        write_sample(tmp_path / "data" / f"s{number}", image=picture(number))
    samples = load_samples(tmp_path / "data")[0]
    x, y, width, height = samples[0].box
    half, nearly = replace(samples[0], box=(x, y, width / 2, height)), (x + 1 / 24, y, width - 1 / 24, height)
    write_annotations(tmp_path / "a.json", [half, samples[1], replace(samples[2], box=nearly)])
    (said,) = [each for each in findings(tmp_path, "--data", tmp_path / "a.json")[1] if "the box" in each["text"]]
    assert (said["level"], said["where"]) == ("warning", str(samples[0].mask))


def test_samples_without_a_patient_are_counted(tmp_path: Path, write_sample: Any) -> None:
    for number in range(3):
        meta = {"patient_id": f"p{number}"} if number else {}
        write_sample(tmp_path / "data" / f"s{number}", image=picture(number), meta=meta)
    said = texts(findings(tmp_path, "--data", tmp_path / "data")[1], "warning")
    assert "data: 1 of 3 samples without patient_id in meta.json: each counts as a patient of its own" in said
    (tmp_path / "data" / "s0" / "meta.json").write_text('{"patient_id": "p0"}')
    assert "patient_id" not in texts(findings(tmp_path, "--data", tmp_path / "data")[1], "warning")


def test_inverted_and_huge_masks(tmp_path: Path, write_sample: Any) -> None:
    inverted = np.full((20, 24), 255, np.uint8)
    inverted[5:10, 16:] = 0  # a lesion at the border
    for number in range(3):
        write_sample(tmp_path / "data" / f"s{number}", image=picture(number), mask=inverted)
    inside = np.full((20, 24), 255, np.uint8)
    inside[5:10, 8:16] = 0
    write_sample(tmp_path / "data" / "certain", image=picture(5), mask=inside)
    write_sample(tmp_path / "data" / "h", prompt="healthy", image=picture(7), mask=None)
    code, found = findings(tmp_path, "--data", tmp_path / "data")
    assert code == 1
    assert "probably inverted: 3 of 3 masks; 1 (white) must be the lesion" in texts(found, "error")
    assert "s0/mask.png: its mask marks most of the image or of its border: inverted?" in texts(found, "warning")
    assert "certain/mask.png: marks the whole border and 92% of the image: inverted?" in texts(found, "sample")


def test_depths_sizes_and_empty_pictures(tmp_path: Path, write_sample: Any) -> None:
    write_sample(tmp_path / "data" / "deep", image=BODY.astype(np.uint16) * 16)
    mask = np.zeros((100, 120), np.uint8)
    mask[40:50, 40:50] = 255
    write_sample(tmp_path / "data" / "large", image=np.kron(BODY, np.ones((5, 5), np.uint8)), mask=mask)
    write_sample(tmp_path / "data" / "flat", image=np.full((20, 24), 7, np.uint8))
    code, found = findings(tmp_path, "--data", tmp_path / "data")
    assert code == 0
    said = texts(found, "warning")
    assert "8- and 16-bit images are mixed" in said
    assert "sizes from 24 x 20 to 120 x 100 pixels" in said
    assert "flat/image.png: every pixel is 7" in said


def test_prompts(tmp_path: Path, write_sample: Any) -> None:
    prompts = ["lytic lesion of L3", "Lytic lesion of L3.", "caf\ufffd", "x" * 400]
    for number, prompt in enumerate(prompts):
        write_sample(tmp_path / "data" / f"s{number}", prompt=prompt, image=picture(number))
    code, found = findings(tmp_path, "--data", tmp_path / "data")
    said = texts(found, "warning")
    assert code == 0
    assert "nearly the same, learned as different ones: 'lytic lesion of L3' | 'Lytic lesion of L3.'" in said
    assert "s2/prompt.txt: odd characters, saved in another encoding?" in said
    assert "s3/prompt.txt: 400 characters: the text encoder reads 75 tokens only" in said


def test_doubtful_texts_and_notes_are_findings_said_once(
    tmp_path: Path, write_sample: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, prompt, patient in (("a", "normal", "P1"), ("b", "lytic lesion", "p1"), ("c", '"healthy"', "p2")):
        write_sample(tmp_path / "data" / name, prompt=prompt, image=picture(ord(name)), meta={"patient_id": patient})
    code, found = findings(tmp_path, "--data", tmp_path / "data")
    said, printed = texts(found, "warning"), caplog.text
    assert code == 0
    for text in (
        "a prompt counts as diseased but reads as healthy",
        "different patients, but for case",
        "is read as `",
    ):
        assert said.count(text) == 1
        assert printed.count(text) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Mueller_Anna", "a person's name"),
        ("Mueller, Anna", "a person's name"),
        ("DOE^JOHN", "a person's name"),
        ("scan 2021-03-09", "a date"),
        ("09.03.2021", "a date"),
        ("p7_20210309", "a date"),
        ("Patient_Seven", None),
        ("Lumbar_Spine", None),
        ("w7p000012_L3", None),
        ("lytic lesion", None),
        ("1.2.826.0.1.3680043.8.498.11111111111111111111111111111111111111", None),
        ("2021", None),
        ("00012345", None),
    ],
)
def test_names_that_look_like_a_persons_or_a_date(
    tmp_path: Path, write_sample: Any, name: str, kind: str | None
) -> None:
    write_sample(tmp_path / "data" / name, meta={"patient_id": "p1", "site": "north"})
    code, found = findings(tmp_path, "--data", tmp_path / "data")
    assert code == 0
    said = [item["text"] for item in found if item["where"] == "privacy"]
    assert said == ([f"1 sample or id looks like {kind} ({name}): {PRIVACY}"] if kind else [])


def test_keys_that_say_who_somebody_is_and_prompts_that_contradict_meta_json(tmp_path: Path, write_sample: Any) -> None:
    meta = {"PatientName": "x", "StudyDate": "y", "patient_birth_date": None, "names": 1, "level": "L4"}
    write_sample(tmp_path / "data" / "a", prompt="lytic lesion of L3", meta=meta)
    said = texts(findings(tmp_path, "--data", tmp_path / "data")[1], "warning")
    assert [line.split(" (")[0] for line in said.splitlines() if line.startswith("privacy")] == [
        f"privacy: 1 sample or id has the key {key} in meta.json" for key in ("PatientName", "StudyDate")
    ]
    assert (
        "a/prompt.txt: contradicts meta.json: the prompt names L3, the image's level is L4; correct one of them" in said
    )


def test_patients_and_pictures_on_both_sides(tmp_path: Path, write_sample: Any) -> None:
    for split, patients in (("train", "ab"), ("val", "bc")):
        for patient in patients:
            folder = write_sample(
                tmp_path / split / patient,
                image=picture(ord(patient) + 10 * (split == "val")),
                meta={"patient_id": patient},
            )
    shutil.copy(tmp_path / "train" / "a" / "image.png", folder / "image.png")
    code, found = findings(tmp_path, "--train_json", tmp_path / "train", "--val_json", tmp_path / "val")
    assert code == 1
    said = texts(found, "error")
    assert "patient b is in the train set and in the val set (sample b)" in said
    assert "sample a of the train set and sample c of the val set are the same image, pixel for pixel" in said


def test_same_pixels_in_another_file_are_the_same_picture(tmp_path: Path, write_sample: Any) -> None:
    import cv2

    write_sample(tmp_path / "train" / "a", image=BODY)
    folder = write_sample(tmp_path / "val" / "b", image=BODY)
    cv2.imwrite(str(folder / "image.png"), BODY, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert np.array_equal(read_image(folder / "image.png"), BODY)
    assert (folder / "image.png").read_bytes() != (tmp_path / "train" / "a" / "image.png").read_bytes()
    code, found = findings(tmp_path, "--train_json", tmp_path / "train", "--val_json", tmp_path / "val")
    assert code == 1
    assert "are the same image" in texts(found, "error")


def test_training_set_without_lesions(tmp_path: Path, write_sample: Any) -> None:
    write_sample(tmp_path / "train" / "a", prompt="healthy", image=BODY, mask=None)
    code, found = findings(tmp_path, "--train_json", tmp_path / "train")
    assert code == 1
    assert "the only sample that can be used is healthy" in texts(found, "error")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("msc.width=64",), r"does not fit this configuration: .*of another size"),
        (("training.rates={unet: 0.1}",), r"training\.rates\.unet: no parameter of the parts msc"),
        (("biomedclip.path=nowhere",), "nowhere"),
    ],
)
def test_checkpoint_against_configuration(
    world: Path, converted: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    given = ["--data", world / "val", "--config", MODELS / "phantom_stage1.yaml", "--ckpt", converted]
    more = tuple(word for word in more)
    if "rates" in more[0]:
        config = tmp_path / "stage.yaml"
        config.write_text(
            f"base: {MODELS / 'phantom.yaml'}\ntraining: {{stage: stage1, builds: [biomedclip, msc], "
            "objective: msc, rates: {unet: 0.1}}\n"
        )
        given[3], more = config, ()
    code, found = findings(tmp_path, *given, *more)
    assert code == 1
    assert re.search(message, texts(found, "error"))


def test_checkpoint_with_a_value_that_is_not_a_number(world: Path, converted: Path, tmp_path: Path) -> None:
    content = torch.load(converted, weights_only=True)
    content["state_dict"]["msc.position"][0] = float("inf")
    torch.save(content, tmp_path / "broken.ckpt")
    given = ("--data", world / "val", "--config", MODELS / "phantom_stage1.yaml", "--ckpt", tmp_path / "broken.ckpt")
    code, found = findings(tmp_path, *given)
    assert code == 1
    assert "1 tensor holds NaN or infinite values, first msc.position" in texts(found, "error")


def test_too_little_disk_and_memory(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    monkeypatch.setattr("ldm.training.estimates.free_memory", lambda device: 1000)
    given = ("--train_json", world / TRAIN, "--val_json", world / VAL, "--config", MODELS / "phantom_stage1.yaml")
    code, found = findings(tmp_path, *given)
    assert code == 1
    assert "0.0 MiB are free, but saving takes" in texts(found, "error")
    assert re.search(r"a step needs about \d+\.\d MiB, 0\.0 MiB are free: .* helps", texts(found, "warning"))
    expected = r"features needs about \d+\.\d MiB, 0\.0 MiB are free: training\.feature_batch=1 helps"
    assert re.search(expected, texts(found, "warning"))


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"torch": "2.14.1", "torchvision": "0.29.1"}, None),
        ({"torch": "2.15.0", "torchvision": "0.29.2"}, None),  # a pair that the registry itself chooses
        ({"torch": "2.14.1+cpu", "torchvision": "0.29.1+cu130"}, "built for 0.29.1+cu130, torch for 2.14.1+cpu"),
        ({"torch": "2.9.0", "torchvision": "0.24.0"}, "releases before 2.10 have a fault in safe loading"),
        ({"pytorch-lightning": "2.6.5"}, "releases before 2.6.6 have a security hole"),
    ],
)
def test_versions(versions: dict[str, str], expected: str | None) -> None:
    found = [finding.text for finding in check_versions(versions)]
    assert found == [] if expected is None else expected in "\n".join(found)


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule about version numbers: what counts is whether torchvision finds its operators."""
    assert list(check_torchvision()) == []
    monkeypatch.delattr("torchvision.ops.nms")
    assert [finding.text.partition(" (")[0] for finding in check_torchvision()] == ["cannot be used with this torch"]


def test_nothing_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no data to look at: give --data"):
        call(doctor)
    with pytest.raises(UsageError, match=r"--ckpt a\.ckpt: give the --config"):
        call(doctor, "--ckpt", "a.ckpt")


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    code, found = findings(tmp_path, "--data", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere: does not exist" in texts(found, "error")


@pytest.mark.parametrize(("bad", "total", "stops"), [(1, 1000, False), (10, 1000, False), (11, 1000, True)])
def test_share_of_rejected_samples(bad: int, total: int, stops: bool) -> None:
    rejects = [Reject(str(number), Path(f"{number}.png"), "truncated") for number in range(bad)]
    if not stops:
        dataset_checks.check_rejected(rejects, total, 0.01)
        return
    with pytest.raises(MedSoftError, match=r"11 of 1000 samples cannot be read, .*the first: 0\.png: truncated"):
        dataset_checks.check_rejected(rejects, total, 0.01)
