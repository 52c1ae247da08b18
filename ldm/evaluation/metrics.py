"""Numbers that compare two sets of images: distances of feature sets, density and coverage, likeness, copies.

Features are BiomedCLIP's (``crop_features``), rows of float64 (N, D). Set distances get their interval by half-samples:
resampling with replacement would put equal images into a set, which every nearest-neighbour or kernel number notices.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.data.checks import FEWEST_PATIENTS
from ldm.networks.encoder import ImageTextEncoder

NEIGHBOURS = 5  # k of density and coverage, as in their paper
HALVES, DRAWS = 100, 2000  # resamplings of a set distance, of a mean or ratio


class Estimate(TypedDict):
    """A number with its 95 % interval (None where it cannot be had), as evaluation.json holds it."""

    value: float
    low: float | None
    high: float | None


class PrecomputedFeatures(nn.Identity):
    """The extractor that torchmetrics asks for; ours has run already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size


@torch.no_grad()
def crop_features(encoder: ImageTextEncoder, images: Tensor, hidden: Tensor | None = None) -> Tensor:
    """The encoder's global token of each image (N, 3, S, S) in [-1, 1]: float64 (N, D).

    ``hidden``: (N, 1, S, S), > 0 where nothing is seen.
    """
    return encoder.encode_image(images, hidden)[1].double().cpu()


@torch.no_grad()
def image_embeddings(encoder: ImageTextEncoder, images: Tensor) -> Tensor:
    """Projected embeddings of length 1 of images (N, 3, S, S), comparable with ``text_embeddings``: float64 (N, E)."""
    return F.normalize(encoder.embed_image(images).double().cpu(), dim=1)


def text_embeddings(encoder: ImageTextEncoder, prompts: Sequence[str]) -> Tensor:
    """Projected text embeddings of length 1, float64 (N, E)."""
    return F.normalize(encoder.encode_text(prompts).double().cpu(), dim=1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (N, D) and (M, D), N and M at least 2, by torchmetrics.

    Heusel et al. 2017, squared as is usual. With fewer rows than D + 1 the covariances are singular: see
    ``small_sample_warnings``.
    """
    metric = FrechetInceptionDistance(feature=PrecomputedFeatures(first.shape[1])).set_dtype(torch.float64)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    return max(float(metric.compute()), 0.0)  # of equal sets it is 0 but for rounding


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Kernel distance (KID) of features (N, D), (M, D): unbiased squared MMD, cubic kernel, by torchmetrics.

    Binkowski et al. 2018. The larger set is cut to the smaller one's size, taken in turns.
    """
    size = min(len(first), len(second))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps the features
        metric = KernelInceptionDistance(feature=PrecomputedFeatures(first.shape[1]), subsets=1, subset_size=size)
    for features, real in ((first, True), (second, False)):
        metric.update(features.double()[torch.linspace(0, len(features) - 1, size).round().long()], real=real)
    return float(metric.compute()[0])


def density(real: Tensor, other: Tensor) -> float:
    """How many real neighbourhoods an ``other`` image lies in, over NEIGHBOURS: 1 for the real distribution itself.

    Naeem et al. 2020, "Reliable fidelity and diversity metrics". A real image's neighbourhood is the ball to its
    NEIGHBOURS-th nearest other real one. Needs more than NEIGHBOURS real rows.
    """
    return float(_inside(real, other).double().sum() / (NEIGHBOURS * len(other)))


def coverage(real: Tensor, other: Tensor) -> float:
    """Share of real neighbourhoods (see ``density``) that hold an ``other`` image: 1 = all of the variety."""
    return float(_inside(real, other).any(dim=1).double().mean())


def _inside(real: Tensor, other: Tensor) -> Tensor:
    """Bool (N, M): is the other image within the real one's neighbourhood?"""
    radius = torch.cdist(real, real).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest one is the image itself
    return torch.cdist(real, other) < radius[:, None]


def by_halves(measure: Callable[[Tensor, Tensor], float], first: Tensor, second: Tensor) -> Estimate:
    """``measure`` of two feature sets with an interval by half-samples (delete-half jackknife, Shao and Wu 1989).

    The spread of the number over random halves, taken without replacement, is its standard error on the whole; the
    interval is 1.96 of that to either side, and too wide (up to twice) where the two sets hardly differ. None with
    fewer than 2 (NEIGHBOURS + 1) rows in a set.
    """
    value, least = measure(first, second), 2 * (NEIGHBOURS + 1)
    if min(len(first), len(second)) < least:
        return Estimate(value=value, low=None, high=None)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(HALVES):
        found.append(measure(*(_random_halves(rows, generator)[0] for rows in (first, second))))
    half = 1.96 * float(np.std(found, ddof=1))
    return Estimate(value=value, low=value - half, high=value + half)


def between_halves(measure: Callable[[Tensor, Tensor], float], features: Tensor) -> float | None:
    """Mean of ``measure`` between two random halves of one set: what two sets of one kind, so small, differ by."""
    if len(features) < 4 * (NEIGHBOURS + 1):
        return None
    generator = torch.Generator().manual_seed(0)
    return float(np.mean([measure(*_random_halves(features, generator)) for _ in range(HALVES // 5)]))


def _random_halves(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]


def mean_of(values: Sequence[float], patients: Sequence[str]) -> Estimate | None:
    """Mean of one value an image, with the interval of ``ratio_of``; None for no value."""
    return ratio_of(values, [1.0] * len(values), patients) if len(values) else None


def ratio_of(numerators: Sequence[float], denominators: Sequence[float], patients: Sequence[str]) -> Estimate:
    """Sum of the numerators over sum of the denominators, of at least one image each with its patient.

    The interval is a percentile bootstrap over patients, since the images of one patient resemble each other; with as
    many patients as images that is one over images. None for fewer than FEWEST_PATIENTS: it would mean nothing.
    """
    sums = np.array([numerators, denominators], float)
    value = float(sums[0].sum() / sums[1].sum())
    known = {patient: index for index, patient in enumerate(dict.fromkeys(patients))}
    if len(known) < FEWEST_PATIENTS:
        return Estimate(value=value, low=None, high=None)
    by_patient = np.zeros((2, len(known)))
    np.add.at(by_patient.T, [known[patient] for patient in patients], sums.T)
    chosen = np.random.default_rng(0).integers(0, len(known), (DRAWS, len(known)))
    resampled = by_patient[:, chosen].sum(axis=2)
    low, high = np.percentile(resampled[0] / resampled[1], (2.5, 97.5))
    return Estimate(value=value, low=float(low), high=float(high))


def likeness(first: np.ndarray, second: np.ndarray, region: np.ndarray) -> tuple[float, float] | None:
    """SSIM (mean of its map) and PSNR in dB of two HxW images in [0, 1] within a bool region, by torchmetrics.

    PSNR is infinite where they are equal. None for an empty region, and for images below SSIM's window, 11 x 11 pixels.
    """
    if not region.any() or min(first.shape) < 11:
        return None
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).double()[None, None] for x in (first, second))
    inside = torch.from_numpy(region)[None, None]
    _, full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    equal = torch.equal(a[inside], b[inside])
    psnr = math.inf if equal else float(peak_signal_noise_ratio(a[inside], b[inside], data_range=1.0))
    return float(full[inside].mean()), psnr


def correlation(first: np.ndarray, mask: np.ndarray, second: np.ndarray, other: np.ndarray, reach: int) -> float:
    """Highest correlation of two lesions' pixels: how much one looks like the other, whatever its brightness.

    ``first`` (HxW) is compared within its bool ``mask`` with ``second`` around its own lesion ``other``, the lesions'
    centres laid over each other and moved by up to ``reach`` pixels. 1 = equal but for brightness and contrast;
    0 where there is nothing to correlate.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows) or not other.any():
        return 0.0
    there = np.argwhere(other).mean(axis=0) - (rows.mean(), columns.mean())
    steps = np.arange(-reach, reach + 1)
    down = (rows + round(there[0]) + steps[:, None])[:, None, :]  # (moves, 1, pixels)
    right = (columns + round(there[1]) + steps[:, None])[None, :, :]
    theirs = second[down.clip(0, second.shape[0] - 1), right.clip(0, second.shape[1] - 1)].reshape(-1, len(rows))
    ours = first[rows, columns] - first[rows, columns].mean()
    theirs = theirs - theirs.mean(axis=1, keepdims=True)
    scale = np.sqrt((ours**2).sum() * (theirs**2).sum(axis=1))
    found = np.divide(theirs @ ours, scale, out=np.zeros(len(theirs)), where=scale > 1e-9)
    return float(found.max())
