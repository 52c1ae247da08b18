"""Native size and depth: every kind of file, any size, mask, feather and fit, as other readers see the result."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ldm.config import DataConfig
from ldm.data.images import composite, read_image, to_unit, with_alpha
from ldm.data.masks import Mask
from ldm.data.png import encode_png
from ldm.data.preparation import fit_sample
from ldm.data.samples import Sample

MODES = ("1", "L", "LA", "P", "P+tRNS", "RGB", "RGBA", "I;16", "JPEG", "grey RGB")
RGBA_OF = {"LA": "LA", "RGBA": "RGBA", "P+tRNS": "RGBA"}


def picture_file(folder: Path, mode: str, height: int, width: int, orientation: int, rng: np.random.Generator) -> Path:
    """A file of that kind as another program writes it, with an EXIF orientation."""
    shape = (height, width, {"LA": 2, "RGB": 3, "RGBA": 4, "JPEG": 3}.get(mode, 1))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8).squeeze(-1 if shape[2] == 1 else ())
    if mode == "I;16":
        made = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    elif mode == "1":
        made = Image.fromarray(pixels > 127)
    elif mode == "grey RGB":
        made = Image.fromarray(np.repeat(pixels[..., None], 3, axis=2))
    elif mode.startswith("P"):
        made = Image.fromarray(pixels % 7)
        made.putpalette(rng.integers(0, 256, 21, dtype=np.uint8).tolist())
        if "+" in mode:
            made.info["transparency"] = bytes([255, 0, 128, 255, 7, 255, 255])
    else:
        made = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / ("picture.jpg" if mode == "JPEG" else "picture.png")
    made.save(path, exif=exif, **({"quality": 90} if mode == "JPEG" else {}))
    return path


def seen_by_others(path: Path | io.BytesIO, mode: str) -> np.ndarray:
    """Pillow's own reading, upright, in the colour model the result should have."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        if mode in RGBA_OF:
            return np.asarray(upright.convert(RGBA_OF[mode]))
        return np.asarray(upright if mode == "I;16" else upright.convert("L" if mode in ("1", "L") else "RGB"))


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    orientation=st.integers(1, 8),
    feather=st.floats(0, 9),
    fit=st.sampled_from(["crop", "pad", "resize"]),
    least=st.sampled_from([0.0, 16.0, 64.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_outside_the_support_every_reader_sees_the_same_pixels(
    tmp_path_factory: pytest.TempPathFactory,
    mode: str,
    height: int,
    width: int,
    orientation: int,
    feather: float,
    fit: str,
    least: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    path = picture_file(tmp_path_factory.getbasetemp(), mode, height, width, orientation, rng)
    expected = seen_by_others(path, mode)
    original = read_image(path)
    hard = np.zeros(original.shape[:2], bool)
    top, left = (int(rng.integers(0, side)) for side in hard.shape)
    hard[top : top + int(rng.integers(1, 12)), left : left + int(rng.integers(1, 12))] = True
    sample = Sample("a", path, None, "lesion", (0,) * 4, "a")
    data = DataConfig(image_size=32, fit=fit, feather=feather, feather_unit="pixels", min_crop=least)
    picture = fit_sample(sample, original, Mask(hard.astype(np.float32)), data)
    assert picture.mask.max() == 1  # the lesion reaches the model, however small

    square = rng.random((32, 32, 3), dtype=np.float32)
    native = picture.crop_window.backward(square, to_unit(original, picture.intensity_range))
    drawn = composite(original, native, picture.soft, picture.intensity_range)
    whole = with_alpha(drawn, path, picture.soft > 0)

    found = seen_by_others(io.BytesIO(encode_png(whole)), mode)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found[picture.soft == 0], expected[picture.soft == 0])
    if mode in RGBA_OF:
        np.testing.assert_array_equal(found[..., -1], expected[..., -1])  # alpha is untouched, inside too
    if mode == "grey RGB":
        assert (found == found[..., :1]).all()
    with Image.open(io.BytesIO(encode_png(whole))) as result:
        assert 0x0112 not in result.getexif()
        assert result.mode in ("L", "LA", "RGB", "RGBA", "I;16")
    if original.dtype == np.uint8 and mode not in RGBA_OF:
        lesion = np.abs(found.astype(float) - native_levels(native, original))[picture.soft == 1]
        assert lesion.max() <= 0.51  # on the mask the picture is the generated one


def native_levels(native: np.ndarray, original: np.ndarray) -> np.ndarray:
    grey = original.ndim == 2 or (original == original[..., :1]).all()
    if native.ndim == 3 and grey:
        native = native.mean(axis=2, keepdims=original.ndim == 3)
    return 255.0 * native


def test_sixteen_bit_alpha_is_kept(tmp_path: Path) -> None:
    import cv2

    rng = np.random.default_rng(0)
    for name, channels in (("la", 2), ("rgba", 4)):
        layers = rng.integers(0, 65536, (6, 5, channels), dtype=np.uint16)
        layers[0, 0, -1] = 0
        path = tmp_path / f"{name}.png"
        path.write_bytes(encode_png(layers))
        original = read_image(path)
        inside = np.zeros((6, 5), bool)
        inside[2:4, 1:3] = True
        drawn = original.copy()
        drawn[inside] = 777
        whole = with_alpha(drawn, path, inside)
        assert (whole.dtype, whole.shape) == (np.uint16, layers.shape)
        np.testing.assert_array_equal(whole[~inside], layers[~inside])
        np.testing.assert_array_equal(whole[..., -1], layers[..., -1])
        assert (whole[inside][:, :-1] == 777).all()
        back = cv2.imdecode(np.frombuffer(encode_png(whole), np.uint8), cv2.IMREAD_UNCHANGED)
        assert back.dtype == np.uint16
        np.testing.assert_array_equal(back[..., -1], whole[..., -1])
