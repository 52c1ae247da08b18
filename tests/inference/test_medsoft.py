"""``import medsoft``: what it draws is what dataset_infer.py draws; inputs that cannot be meant are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import CLIP, PHANTOM, Small, infer, metas

import medsoft
from ldm.data.images import read_image
from ldm.data.png import write_png

PROMPT = "osteolytic lesion"


@pytest.fixture(scope="module")
def model(small: Small) -> medsoft.LesionModel:
    words = [*small.sizes, f"biomedclip.path={CLIP}", "sampling.steps=2"]
    return medsoft.load(small.last, PHANTOM, words, device="cpu")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 16-bit grey spine.png, a soft lesion.png and a meta.json that says the spacing."""
    folder = tmp_path_factory.mktemp("deep")
    rows, columns = np.mgrid[:75, :52]
    noise = np.random.default_rng(0).integers(0, 900, (75, 52))
    write_png(folder / "spine.png", (9000 + 200 * rows + 150 * columns + noise).astype(np.uint16))
    away = np.hypot(rows - 37, columns - 26)
    write_png(folder / "lesion.png", np.rint(np.clip((14 - away) / 8, 0, 1) * 255).astype(np.uint8))
    (folder / "meta.json").write_text('{"spacing_mm": 0.6}')
    return folder


def drawn_by_command(small: Small, folder: Path, image: Path, mask: Path, *more: Any) -> list[np.ndarray]:
    given = ["--image", image, "--mask", mask, "--prompt", PROMPT, "--seed", 3, "--variants", 2]
    assert infer(small.last, folder, *given, *more, *small.sizes) == 0
    return [read_image(folder / name / "image.png") for name in metas(folder)]


def test_draws_what_the_command_draws(model: medsoft.LesionModel, small: Small, deep: Path, tmp_path: Path) -> None:
    image, mask = deep / "spine.png", deep / "lesion.png"
    expected = drawn_by_command(small, tmp_path / "out", image, mask)
    pixels, soft = read_image(image), read_image(mask)
    for given in ((image, str(mask)), (Image.open(image), Image.open(mask)), (pixels, soft / 255)):
        found = model.draw(*given, PROMPT, n=2, seed=3, name="spine", spacing_mm=0.6)
        assert [each.dtype for each in found] == [np.uint16] * 2
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not np.array_equal(*expected)
    assert all(np.array_equal(each[soft == 0], pixels[soft == 0]) for each in expected)


def test_a_hard_mask_colours_and_alpha(model: medsoft.LesionModel, small: Small, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(40, 255, (40, 50, 4), np.uint8)
    pixels[:5, :5, 3] = 0
    mask = np.zeros((40, 50), bool)
    mask[10:24, 12:30] = True
    write_png(tmp_path / "image.png", pixels)
    write_png(tmp_path / "mask.png", mask.astype(np.uint8) * 255)
    drawn_by_command(small, tmp_path / "out", tmp_path / "image.png", tmp_path / "mask.png")
    found = model.draw(pixels, mask, PROMPT, n=2, seed=3)
    for each, name in zip(found, metas(tmp_path / "out"), strict=True):
        assert np.array_equal(each, np.asarray(Image.open(tmp_path / "out" / name / "image.png")))
    assert (found[0] != pixels)[mask].any()


IMAGE, MASK = np.full((24, 20), 90, np.uint8), np.zeros((24, 20), np.uint8)
MASK[5:12, 6:14] = 255
WRONG = {
    "float image": ({"image": IMAGE / 255}, r"image: expected HxW or HxWx3 pixels of 8 or 16 bits, found float64"),
    "five channels": ({"image": np.zeros((9, 9, 5), np.uint8)}, r"image: expected HxW.*shape \(9, 9, 5\)"),
    "no pixels": ({"image": np.zeros((0, 9), np.uint8)}, r"image: expected HxW.*shape \(0, 9\)"),
    "a list": ({"image": [[1]]}, "image: expected a path, a NumPy array or a PIL image, found list"),
    "PIL floats": ({"image": Image.new("F", (9, 9))}, "image: a PIL image of mode F; convert it to L, RGB or I;16"),
    "no file": ({"image": "nowhere.png"}, r"nowhere\.png: does not exist"),
    "another size": ({"mask": MASK[:20]}, "mask: has 20 x 20 pixels, its image 20 x 24"),
    "an empty mask": ({"mask": MASK * 0}, "mask: the mask is empty; mark the region to inpaint in white"),
    "a mask above 1": ({"mask": MASK * 1.0}, "mask: expected values from 0 to 1, found 0 to 255"),
    "a mask that is no number": ({"mask": MASK * np.nan}, "mask: expected values from 0 to 1, found nan"),
    "no prompt": ({"prompt": "  "}, "prompt: the prompt is empty"),
    "two lines": ({"prompt": "a\nb"}, "prompt: holds 2 lines"),
    "no picture": ({"n": 0}, "n: expected a whole number of at least 1, found 0"),
    "half a picture": ({"n": 1.5}, r"n: expected a whole number of at least 1, found 1\.5"),
    "a negative seed": ({"seed": -1}, "seed: expected a whole number of at least 0, found -1"),
    "no spacing": ({"spacing_mm": 0}, "spacing_mm: expected one or two numbers of mm"),
    "a falling window": ({"image": IMAGE.astype(np.uint16), "window": (9, 3)}, "window: expected two numbers"),
    "a window of 8 bits": ({"window": (3, 9)}, "window: the image has 8 bits, which are used as they are"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(model: medsoft.LesionModel, case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(medsoft.MedSoftError, match=message) as caught:
        model.draw(**({"image": IMAGE, "mask": MASK, "prompt": PROMPT} | given))
    assert "\n" not in str(caught.value)


def test_the_yaml_beside_a_checkpoint(small: Small, tmp_path: Path) -> None:
    ckpt = tmp_path / "last.ckpt"
    ckpt.symlink_to(small.last)
    with pytest.raises(medsoft.UsageError, match=r"config\.yaml: does not exist; name a model YAML"):
        medsoft.load(ckpt)
    (tmp_path / "config.yaml").write_text(f"base: {PHANTOM}\n")
    words = [*small.sizes, f"biomedclip.path={CLIP}", "sampling.steps=2"]
    assert medsoft.load(ckpt, overrides=words, device="cpu").inpainter.sampling.steps == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [(("none.ckpt", PHANTOM), r"none\.ckpt: this checkpoint does not exist"), (("x", "no.yaml"), r"no\.yaml")],
)
def test_a_model_that_is_not_there(given: tuple[Any, Any], message: str) -> None:
    with pytest.raises(medsoft.MedSoftError, match=message):
        medsoft.load(*given, device="cpu")


def test_an_unknown_device(small: Small) -> None:
    with pytest.raises(medsoft.UsageError, match="--device abacus"):
        medsoft.load(small.last, PHANTOM, small.sizes, device="abacus")


def test_each_step_is_told_and_what_is_raised_then_ends_the_drawing(model: medsoft.LesionModel, deep: Path) -> None:
    given, told = (deep / "spine.png", deep / "lesion.png", PROMPT), []
    with_steps = model.draw(*given, n=1, on_step=lambda k, steps: told.append((k, steps)))
    assert told == [(0, 1), (0, 2)]
    assert np.array_equal(with_steps[0], model.draw(*given, n=1)[0])

    class Enough(Exception):
        pass

    def end(k: int, steps: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        model.draw(*given, on_step=end)
