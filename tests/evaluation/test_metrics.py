"""ldm/evaluation/metrics.py against hand-written formulas, scipy and torchmetrics."""

import math

import numpy as np
import pytest
import tiny
import torch
from scipy import linalg

from ldm.evaluation import metrics
from ldm.evaluation.metrics import (
    between_halves,
    by_halves,
    correlation,
    coverage,
    crop_features,
    density,
    frechet_distance,
    image_embeddings,
    kernel_distance,
    likeness,
    mean_of,
    ratio_of,
    text_embeddings,
)
from ldm.networks.biomedclip import BiomedClip


def features(seed: int, count: int = 120, size: int = 16, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing + shift


# ------------------------------------------------------------------------------------------------------ distances


def test_frechet_distance_agrees_with_scipy() -> None:
    first, second = features(1), features(2, 80, shift=0.3)
    a, b = first.numpy(), second.numpy()
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [120, 10])  # 10: fewer pictures than dimensions
def test_frechet_distance_of_a_set_with_itself_is_0_and_grows_with_noise(count: int) -> None:
    first = features(1, count)
    spread = float(first.var(dim=0).sum())
    assert frechet_distance(first, first) < 1e-6 * spread
    noise = features(3, count)
    grown = [frechet_distance(first, first + level * noise) for level in (0.0, 0.1, 0.3, 1.0, 3.0)]
    assert grown == sorted(grown)
    assert grown[1] > 1e-4 * spread
    assert grown[4] > spread


def test_kernel_distance_is_the_unbiased_squared_mmd_of_a_cubic_kernel() -> None:
    first, second = features(1, 40), features(2, 40, shift=1.0)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(first)
    own = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1)) for x in (first, second))
    assert kernel_distance(first, second) == pytest.approx(float(own - 2 * kernel(first, second).mean()), rel=1e-6)
    grown = [kernel_distance(first, first + shift) for shift in (0.0, 1.0, 3.0)]
    assert grown == sorted(grown)
    assert grown[0] < grown[2] / 100
    assert math.isfinite(kernel_distance(first, features(2, 17)))  # of another size


def test_density_and_coverage_count_neighbourhoods() -> None:
    real, other = features(1, 30, 4), features(2, 20, 4, shift=0.5)
    counts = np.zeros((30, 20), bool)
    for i, centre in enumerate(real.numpy()):
        radius = np.sort(np.linalg.norm(real.numpy() - centre, axis=1))[5]  # [0] is itself
        counts[i] = np.linalg.norm(other.numpy() - centre, axis=1) < radius
    assert density(real, other) == pytest.approx(counts.sum() / (5 * 20))
    assert coverage(real, other) == pytest.approx(counts.any(axis=1).mean())
    assert 0 < coverage(real, other) < 1
    assert coverage(real, real) == 1.0
    assert (density(real, other + 1000), coverage(real, other + 1000)) == (0.0, 0.0)
    assert coverage(real, real[:1].repeat(20, 1)) < 0.5 < density(real, real[:1].repeat(20, 1)) + 0.5  # one mode only


def test_sets_of_several_blocks_have_the_numbers_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(1, 90), features(2, 70, shift=0.3)
    patients = [str(k) for k in range(90)]

    def numbers() -> list[float]:
        found = [by_halves(each, first, second) for each in (frechet_distance, kernel_distance, density, coverage)]
        return [value for each in [*found, mean_of(first[:, 0].tolist(), patients)] for value in each.values()]

    whole = numbers()
    monkeypatch.setattr(metrics, "BLOCK", 16)
    assert numbers() == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_half_samples_give_an_interval_that_narrows_with_the_number_of_pictures() -> None:
    widths = []
    for count in (60, 600):
        found = by_halves(frechet_distance, features(1, count, 4), features(2, count, 4, shift=1.0))
        assert found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < 0.6 * widths[0]
    again = by_halves(frechet_distance, features(1, 600, 4), features(2, 600, 4, shift=1.0))
    assert again == found  # seeded
    assert by_halves(frechet_distance, features(1, 11, 4), features(2, 60, 4))["low"] is None


def test_half_samples_have_the_spread_of_fresh_samples() -> None:
    def measure(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a.mean() - b.mean())

    fresh = [measure(features(2 * i, 80, 4), features(2 * i + 1, 80, 4)) for i in range(200)]
    found = [by_halves(measure, features(1000 + 2 * i, 80, 4), features(1001 + 2 * i, 80, 4)) for i in range(10)]
    assert np.mean([(x["high"] - x["low"]) / (2 * 1.96) for x in found]) == pytest.approx(np.std(fresh), rel=0.2)


def test_halves_of_one_set_differ_less_than_two_kinds() -> None:
    first, second = features(1, 120, 4), features(2, 120, 4, shift=3.0)
    assert 0 < between_halves(frechet_distance, first) < frechet_distance(first, second) / 5
    assert between_halves(frechet_distance, first[:20]) is None


def test_mean_with_a_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_of(values.tolist(), [str(i) for i in range(400)])
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 2 / 20, rel=0.2)
    assert mean_of([], []) is None
    assert mean_of([2.0], ["a"])["low"] is None


def test_ratio_of_sums_with_a_bootstrap_interval() -> None:
    rng = np.random.default_rng(0)
    patients = [str(i) for i in range(200)]
    real = rng.uniform(1, 2, 200)
    found = ratio_of(1.1 * real + 0.05 * rng.standard_normal(200), real, patients)
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(1.1, abs=0.02)
    assert 0.005 < found["high"] - found["low"] < 0.1
    same = ratio_of(real, real, patients)
    assert (same["value"], same["low"], same["high"]) == (1, 1, 1)


def test_images_of_one_patient_are_resampled_together() -> None:
    """Ten copies of each patient's image tell no more than one does; images of nine patients give no interval."""
    values = np.random.default_rng(1).normal(3, 2, 30)
    patients = [str(i) for i in range(30)]
    once, often = (
        mean_of(values.tolist(), patients),
        mean_of(np.repeat(values, 10).tolist(), list(np.repeat(patients, 10))),
    )
    assert (often["value"], often["low"], often["high"]) == pytest.approx((once["value"], once["low"], once["high"]))
    few, enough = (mean_of(values.tolist(), [str(i % count) for i in range(30)]) for count in (9, 10))
    assert (few["low"], few["high"]) == (None, None)
    assert enough["low"] < few["value"] < enough["high"]


# ------------------------------------------------------------------------------------------------------ likeness


def test_likeness_looks_at_the_region_only() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(0, 1, (40, 40))
    second, region = first.copy(), np.zeros((40, 40), bool)
    second[:10] = rng.uniform(0, 1, (10, 40))
    region[20:] = True
    ssim, psnr = likeness(first, second, region)
    assert ssim == pytest.approx(1, abs=1e-6)
    assert psnr == math.inf
    above = np.zeros_like(region)
    above[:10] = True
    ssim, psnr = likeness(first, second, above)
    assert ssim < 0.3
    assert psnr == pytest.approx(-10 * math.log10(((first - second)[:10] ** 2).mean()), rel=1e-6)
    assert likeness(first, second, np.zeros_like(region)) is None
    assert likeness(first[:10, :10], second[:10, :10], np.ones((10, 10), bool)) is None


def blob(seed: int, at: tuple[int, int] = (20, 20), base: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A textured disc of radius 8 in noise, and its mask."""
    rng = np.random.default_rng(seed)
    picture = np.random.default_rng(1000 + base).normal(0, 0.3, (48, 48))
    texture = rng.normal(0, 1, (17, 17))
    rows, columns = np.mgrid[-8:9, -8:9]
    disc = rows**2 + columns**2 <= 64
    mask = np.zeros((48, 48), bool)
    place = np.s_[at[0] - 8 : at[0] + 9, at[1] - 8 : at[1] + 9]
    picture[place][disc] = texture[disc]
    mask[place] = disc
    return picture, mask


def test_correlation_finds_a_lesion_elsewhere_brighter_and_slightly_moved() -> None:
    picture, mask = blob(1)
    moved, other = blob(1, at=(30, 26), base=1)
    assert correlation(picture, mask, 0.3 * moved + 0.2, other, 3) == pytest.approx(1, abs=1e-9)
    off = np.roll(other, (2, -3), (0, 1))  # its mask is not quite where the lesion is
    assert correlation(picture, mask, moved, off, 3) == pytest.approx(1, abs=1e-9)
    assert correlation(picture, mask, moved, np.roll(other, 6, 0), 3) < 0.5
    different, there = blob(2, at=(30, 26), base=1)
    assert correlation(picture, mask, different, there, 3) < 0.5


def test_correlation_of_nothing_is_0() -> None:
    picture, mask = blob(1)
    assert correlation(np.zeros_like(picture), mask, picture, mask, 3) == 0.0
    assert correlation(picture, mask, np.ones_like(picture), mask, 3) == 0.0
    assert correlation(picture, np.zeros_like(mask), picture, mask, 3) == 0.0
    assert correlation(picture, mask, picture, np.zeros_like(mask), 3) == 0.0
    corner = np.zeros_like(mask)
    corner[:2, :2] = True
    assert -1 <= correlation(picture, corner, picture, np.flip(corner), 3) <= 1  # reaches beyond the border


# ------------------------------------------------------------------------------------------------------ features


def test_features_are_biomedclips_and_do_not_depend_on_the_batch() -> None:
    clip = BiomedClip(tiny.CLIP)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = crop_features(clip, images)
    assert torch.equal(whole, clip.encode_image(images)[1].double())
    parts = [crop_features(clip, part) for part in (images[:2], images[2:])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    hidden = torch.zeros(5, 1, 64, 64)
    hidden[:, :, :32] = 1
    below = images.clone()
    below[:, :, :24] = -below[:, :, :24]  # not so close to what is seen that resizing mixes it in
    seen = [crop_features(clip, each, hidden) for each in (images, below)]
    assert not torch.allclose(seen[0], whole)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_embeddings_are_open_clips_of_length_one() -> None:
    clip = BiomedClip(tiny.CLIP)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = clip.clip.encode_image(clip.normalise(images), normalize=True).detach()
    torch.testing.assert_close(image_embeddings(clip, images).float(), reference, rtol=1e-4, atol=1e-5)
    texts = text_embeddings(clip, ["healthy", "a severe osteolytic lesion"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2, dtype=torch.float64))
