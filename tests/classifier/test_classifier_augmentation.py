"""How training images are changed: by a function of their keys, by nothing that turns one lesion into another."""

from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import autoaugment

from ldm.classifier.augmentation import augmented

CPU = torch.device("cpu")
MOVES = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}


def images_of(channels: str, count: int = 8) -> np.ndarray:
    shape = (count, 32, 32) if channels == "grey" else (count, 32, 32, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", ["grey", "rgb"])
@pytest.mark.parametrize("kind", ["light", "trivial", "rand"])
def test_an_image_is_changed_by_its_key_alone(kind: str, channels: str) -> None:
    images, keys = images_of(channels), [2**63 + 5 * number for number in range(8)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    whole = augmented(images, keys, kind, CPU)
    assert torch.equal(torch.get_rng_state(), before)  # which drop-out reads
    assert whole.shape == (8, 1 if channels == "grey" else 3, 32, 32)
    assert whole.dtype == torch.float32
    assert 0 <= whole.min() < whole.max() <= 1
    backwards = augmented(images[::-1].copy(), keys[::-1], kind, CPU).flip(0)
    assert torch.allclose(whole, backwards)
    others = augmented(images, [key + 1 for key in keys], kind, CPU)
    assert sum(not torch.equal(one, two) for one, two in zip(whole, others, strict=True)) >= 6


@pytest.mark.parametrize(("kind", "each"), [("trivial", 1), ("rand", 2)])
def test_policies_use_what_leaves_a_grey_picture_what_it_is(
    kind: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, apply = [], autoaugment._apply_op

    def noted(image: torch.Tensor, name: str, magnitude: float, *given: object, **named: object) -> torch.Tensor:
        used.append((name, magnitude))
        return apply(image, name, magnitude, *given, **named)

    monkeypatch.setattr(autoaugment, "_apply_op", noted)
    augmented(images_of("grey", 200), range(200), kind, CPU)
    counts = Counter(name for name, _ in used)
    assert sum(counts.values()) == 200 * each
    expected = MOVES | {"Identity", "AutoContrast", "Equalize", "Brightness", "Contrast", "Sharpness"}
    assert set(counts) == expected
    assert max(abs(size) for name, size in used if name.startswith("Translate")) <= 0.1501 * 32
    assert max(abs(size) for name, size in used if name == "Rotate") <= 30
