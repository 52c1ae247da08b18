"""The oracle: true lesions in healthy phantoms, as synthetic samples that the classifier takes."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny

from ldm.classifier.config import ClassifierConfig
from ldm.classifier.data import load_data
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.folders import parent_image
from ldm.data.images import read_image
from ldm.phantom.dataset import write_dataset
from ldm.phantom.spines import LESION_TYPES, render_phantom
from tool import make_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five healthy phantoms and a diseased one."""
    folder = tmp_path_factory.mktemp("phantoms") / "p"
    write_dataset(folder, 5, 5, 1)
    return folder


def _twins(source: Path, out: Path, *more: str | int) -> int:
    return tiny.call(make_phantoms, "--twins_of", source, "--output_dir", out, *more)


def test_twins_are_true_lesions_in_the_healthy_images(phantoms: Path, tmp_path: Path, capsys) -> None:
    assert _twins(phantoms, tmp_path / "t") == 0
    twins, rejects = load_samples(tmp_path / "t")
    parents = [sample for sample in load_samples(phantoms)[0] if sample.healthy]
    assert not rejects
    assert [twin.parent_id for twin in twins] == [parent.sample_id for parent in parents]
    assert [twin.lesion_type for twin in twins] == [*LESION_TYPES, LESION_TYPES[0]]
    assert [twin.severity for twin in twins] == ["moderate"] * 4 + ["severe"]
    for twin, parent in zip(twins, parents, strict=True):
        assert twin.synthetic
        assert (twin.patient_id, twin.level) == (parent.patient_id, parent.level)
        assert parent_image(twin) == parent.image
        phantom = render_phantom(5, int(twin.patient_id[3:]), twin.lesion_type, twin.severity)
        image = read_image(twin.image)
        assert np.array_equal(image, phantom.image)
        assert np.array_equal(read_image(twin.mask) > 0, phantom.mask)
        assert twin.prompt == phantom.prompt
        beyond = cv2.dilate(phantom.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
        assert np.array_equal(image[beyond], read_image(parent.image)[beyond])
    assert _twins(phantoms, tmp_path / "t") == 0
    assert "already complete (twins of 5 healthy phantoms)" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"another run \(twins: 5 -> 2, .*--overwrite"):
        _twins(phantoms, tmp_path / "t", "--limit", 2)


def test_the_classifier_takes_twins_of_the_training_patients(world: Path, tmp_path: Path, caplog) -> None:
    train, val, test = (str(world / name) for name in (tiny.TRAIN, tiny.VAL, tiny.TEST))
    assert _twins(Path(train), tmp_path / "t", "--limit", 3) == 0
    config = ClassifierConfig(
        train_json=train,
        val_json=val,
        test_json=test,
        synthetic=[str(tmp_path / "t")],
        output_dir=str(tmp_path / "c"),
        img_size=32,
    )
    with caplog.at_level(logging.WARNING):
        data = load_data(config)
    assert data.synthetic is not None
    assert len(data.synthetic) == 3
    assert not [text for text in caplog.messages if "synthetic" in text]
    assert _twins(Path(val), tmp_path / "held_out") == 0
    config = replace(config, synthetic=[str(tmp_path / "held_out")])
    with pytest.raises(MedSoftError, match="only children of training patients"):
        load_data(config)


def test_a_twin_has_the_disease_that_its_patient_shows_elsewhere(tmp_path: Path) -> None:
    write_dataset(tmp_path / "p", 5, 3, 0, world="elsewhere")
    assert _twins(tmp_path / "p", tmp_path / "t") == 0
    for path in (tmp_path / "t").glob("*/meta.json"):
        meta = json.loads(path.read_text())
        parent = tmp_path / "p" / meta["parent_id"]
        assert meta["lesion_type"] == meta["sign"] == json.loads((parent / "meta.json").read_text())["sign"]
        changed = read_image(path.parent / "image.png") != read_image(parent / "image.png")
        assert not (changed & (cv2.imread(str(parent / "anatomy.png"), cv2.IMREAD_UNCHANGED) == 2)).any()
    assert json.loads((tmp_path / "t" / "phantoms.json").read_text())["arguments"]["world"] == "elsewhere"


def test_a_changed_phantom_has_no_twin_and_the_others_have(phantoms: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(phantoms, tmp_path / "p")
    changed = sorted((tmp_path / "p").glob("w*/image.png"))[0]
    cv2.imwrite(str(changed), 255 - read_image(changed))
    for said in ("twins of 4 healthy phantoms", "already complete (twins of 4"):
        assert _twins(tmp_path / "p", tmp_path / "t") == 3
        out = capsys.readouterr().out
        assert said in out
        assert f"{changed}: is not the phantom of this name, as the generator renders it" in out
    assert len(json.loads((tmp_path / "t" / "rejects.json").read_text())) == 1


def _damaged(phantoms: Path, folder: Path, what: str) -> Path:
    """A copy of the phantoms in which something is wrong."""
    shutil.copytree(phantoms, folder)
    record = folder / "phantoms.json"
    stored = json.loads(record.read_text())
    if what == "no record":
        record.unlink()
    if what == "not a record":
        record.write_text("[]")
    if what in ("version", "world"):
        stored["arguments"][what] = 2 if what == "version" else "moon"
        record.write_text(json.dumps(stored))
    for sample in list(folder.glob("w*")) if what in ("names", "healthy") else []:
        meta = json.loads((sample / "meta.json").read_text())
        if what == "healthy" and meta["lesion_type"] is None:
            shutil.rmtree(sample)
        if what == "names":
            sample.rename(folder / sample.name.replace("w", "patient"))
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no record", r"phantoms\.json: does not exist, so nobody knows which world"),
        ("not a record", r"phantoms\.json: is not the record of a phantom dataset"),
        ("version", r"phantoms\.json: version 2 of the generator made these phantoms, this is version 3"),
        ("world", r"phantoms\.json: names the world 'moon'; this version knows standard, edge"),
        ("names", r"patient5p000000_\w+: has no phantom's name"),
        ("healthy", "has no healthy phantom, which could have a diseased twin"),
    ],
)
def test_what_is_no_phantom_of_this_version_is_refused(phantoms: Path, tmp_path: Path, what: str, said: str) -> None:
    with pytest.raises(MedSoftError, match=said) as caught:
        _twins(_damaged(phantoms, tmp_path / "p", what), tmp_path / "t")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_twins_are_not_written_over_their_parents(phantoms: Path) -> None:
    with pytest.raises(UsageError, match=r"holds .*, which is to have a twin; give another"):
        _twins(phantoms, phantoms, "--overwrite")


def test_twins_are_not_written_among_the_phantoms(phantoms: Path, tmp_path: Path) -> None:
    for source in (phantoms, tmp_path / "all.json"):
        write_annotations(tmp_path / "all.json", load_samples(phantoms)[0])
        with pytest.raises(UsageError, match=r"tw: lies in .*, whose samples the twins would be among; give another"):
            _twins(source, phantoms / "tw")
    assert not (phantoms / "tw").exists()


@pytest.mark.parametrize("flag", ["--diseased", "--lesions_per_type", "--healthy", "--per_patient", "--seed"])
def test_twins_are_as_many_as_their_parents(phantoms: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(UsageError, match=f"--twins_of: leave out .*{flag}"):
        _twins(phantoms, tmp_path / "t", flag, 3)
