"""What the pictures of a sample folder are like: windows, odd masks, images without contrast, images made here.

What is certain is put right and said, what is likely is warned of, the rest is rejected by name.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.core.errors import MedSoftError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.folders import scan_folder
from ldm.data.images import intensity_range_of
from ldm.data.masks import NOISE_NOTE
from ldm.data.png import write_png
from ldm.data.regions import ORIENTATION_NOTE, STRAY_NOTE
from ldm.inference.results import TAG

Write = Callable[..., Path]


def deep_image() -> np.ndarray:
    """16 bits, HU + 32768 as some archives keep them: 32668 to 33147."""
    return (np.arange(480, dtype=np.uint16) + 32668).reshape(20, 24)


@pytest.mark.parametrize("window", [[-450, 1050], [0, 32668], [33147, 40000], [50000.5, 60000], [-1e6, 1e6]])
def test_a_window_beside_the_image_is_refused(tmp_path: Path, write_sample: Write, window: list[float]) -> None:
    write_sample(tmp_path / "good", image=deep_image(), meta={"window": [32668, 33147]})
    folder = write_sample(tmp_path / "bad", image=deep_image(), meta={"window": window})
    _, (reject,) = scan_folder(tmp_path)
    assert (reject.sample_id, reject.file) == ("bad", folder / "meta.json")
    assert f"window: {window} does not meet the image, whose levels go from 32668 to 33147" in reject.reason
    with pytest.raises(MedSoftError, match="does not meet the image"):  # an annotation file's reader does not decode
        intensity_range_of(deep_image(), window)


SATURATED: dict[str, tuple[dict[str, Any], list[int], str | None]] = {
    "lesion white": ({}, [32600, 32700], "lesion"),
    "lesion black": ({}, [33100, 33200], "lesion"),
    "lesion inside": ({}, [32668, 33147], None),
    "vertebra white": ({"prompt": "healthy"}, [32600, 32700], "vertebra"),
    "vertebra of the anatomy": ({"anatomy": np.eye(20, 24, dtype=np.uint8)}, [32760, 32960], "vertebra"),
}


@pytest.mark.parametrize("name", SATURATED)
def test_a_window_that_hides_the_lesion_or_the_vertebra_is_warned_of(
    tmp_path: Path, write_sample: Write, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    given, window, region = SATURATED[name]
    image = np.repeat(deep_image()[..., None], 3, axis=2) if "black" in name else deep_image()
    write_sample(tmp_path / "a", image=image, meta={"window": window}, **given)
    load_samples(tmp_path)
    said = f"a: more than half of its {region} lies outside its `window`"
    assert (said in caplog.text) == (region is not None)
    assert region is not None or "lies outside" not in caplog.text


def test_a_window_of_an_8_bit_image_is_not_used_and_that_is_said(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write_sample(tmp_path / "a", meta={"window": [-450, 1050]})
    load_samples(tmp_path)
    assert "a: its image has 8 bits, which are used as they are: `window` in its meta.json is not" in caplog.text


def test_what_is_odd_about_a_mask_is_said(
    tmp_path: Path, write_sample: Write, caplog: pytest.LogCaptureFixture
) -> None:
    stray = np.zeros((60, 60), np.uint8)
    stray[5:12, 5:12] = stray[55, 55] = 255
    noisy = np.zeros((60, 60), np.uint8)
    noisy[20:40, 20:40] = 255
    folder = write_sample(tmp_path / "noise", image=stray, mask=None)
    Image.fromarray(noisy).save(folder / "mask.jpg", quality=85)
    write_sample(tmp_path / "stray", image=255 - stray, mask=stray)
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.fromarray(stray).save(write_sample(tmp_path / "turned", image=None, mask=noisy) / "image.png", exif=turned)
    assert len(load_samples(tmp_path)[0]) == 3
    for name, note in (("noise", NOISE_NOTE), ("stray", STRAY_NOTE), ("turned", ORIENTATION_NOTE)):
        assert f"warning: {name}: {note}" in caplog.text


def test_an_image_that_was_inpainted_here_is_synthetic_whatever_its_meta_json_says(
    tmp_path: Path, write_sample: Write
) -> None:
    pixels = np.arange(480, dtype=np.uint8).reshape(20, 24)
    write_png(write_sample(tmp_path / "tag", meta={"synthetic": False}) / "image.png", pixels, {"Comment": TAG})
    write_sample(tmp_path / "parent", meta={"parent_id": "s1"})
    write_sample(tmp_path / "real", meta={"parent_id": "series 3", "synthetic": False})
    write_sample(tmp_path / "said", meta={"synthetic": True})
    assert {s.sample_id: s.synthetic for s in scan_folder(tmp_path)[0]} == {
        "parent": True,
        "real": False,
        "said": True,
        "tag": True,
    }


FAINT: dict[str, tuple[np.ndarray, dict[str, Any], bool]] = {
    "one level": (np.full((20, 24), 90, np.uint8), {}, True),
    "12 bits cut down to 8": (np.tile(np.arange(16, dtype=np.uint8), (24, 20)).T[:20, :24], {}, True),
    "one bright pixel": (np.pad([[np.uint8(255)]], ((3, 16), (3, 20))), {}, True),
    "a window of all 16 bits": (deep_image(), {"window": [0, 65535]}, True),
    "one level of 16 bits": (np.full((20, 24), 900, np.uint16), {}, True),
    "a quarter": (np.tile(np.arange(24, dtype=np.uint8) * 3, (20, 1)), {}, False),
    "few levels of 16 bits": (deep_image(), {}, False),
}


@pytest.mark.parametrize("name", FAINT)
def test_an_image_of_nearly_one_brightness_is_warned_of(
    tmp_path: Path, write_sample: Write, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    image, meta, faint = FAINT[name]
    write_sample(tmp_path / "a", image=image, meta=meta)
    load_samples(tmp_path)
    assert ("the networks see next to nothing of it" in caplog.text) == faint


@pytest.mark.parametrize("stem", ["mask", "soft_mask", "anatomy"])
def test_the_image_itself_is_no_mask(tmp_path: Path, write_sample: Write, stem: str) -> None:
    folder = write_sample(tmp_path / "bad")
    write_sample(tmp_path / "good")
    (folder / f"{stem}.png").write_bytes((folder / "image.png").read_bytes())
    _, (reject,) = scan_folder(tmp_path)
    assert str(reject) == f"{folder / f'{stem}.png'}: is a copy of image.png; put the right file in its place"


def test_an_annotation_file_that_somebody_else_wrote_makes_no_result_real(tmp_path: Path, write_sample: Write) -> None:
    pixels = np.arange(480, dtype=np.uint8).reshape(20, 24)
    write_png(write_sample(tmp_path / "tag") / "image.png", pixels, {"Comment": TAG})
    write_sample(tmp_path / "plain")
    records = [
        {"image": f"{folder}/image.png", "mask_image": f"{folder}/mask.png", "label": "lytic", "box": [0, 0, 1, 1]}
        | {"sample_id": name, **more}
        for name, folder, more in (
            *[("tag", "tag", {"synthetic": False}), ("parent", "plain", {"parent_id": "s1"})],
            *[("real", "plain", {"parent_id": "s1", "synthetic": False}), ("none", "plain", {"synthetic": None})],
        )
    ]
    (tmp_path / "o.json").write_text(json.dumps(records))
    samples, _ = load_samples(tmp_path / "o.json")
    assert {s.sample_id: s.synthetic for s in samples} == {"tag": True, "parent": True, "real": False, "none": False}
    write_annotations(tmp_path / "again.json", samples)
    assert load_samples(tmp_path / "again.json") == (samples, [])
