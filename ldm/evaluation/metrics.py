"""Numbers that compare two sets of images: distances of feature sets, density and coverage, likeness, copies.

Features are BiomedCLIP's (``crop_features``), rows of float64 (N, D). Set distances get their interval by half-samples:
resampling with replacement would put equal images into a set, which every nearest-neighbour or kernel number notices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.data.checks import FEWEST_PATIENTS
from ldm.networks.encoder import ImageTextEncoder

NEIGHBOURS = 5  # k of density and coverage, as in their paper
HALVES, DRAWS = 100, 2000  # resamplings of a set distance, of a mean or ratio
BLOCK = 2048  # rows of features that are worked on at once, with as many others; most sets are one block
TEXTS = 64  # prompts that the encoder reads at once


class Estimate(TypedDict):
    """A number with its 95 % interval (None where it cannot be had), as evaluation.json holds it."""

    value: float
    low: float | None
    high: float | None


class Picked:
    """Rows of a set of features, such as a half of it, that are taken out of it block by block, where they are needed.

    It stands for the tensor of these rows in all measures below.
    """

    def __init__(self, rows: Tensor, places: Tensor) -> None:
        self.rows, self.places = rows, places
        self.shape = torch.Size((len(places), rows.shape[1]))

    def __len__(self) -> int:
        return len(self.places)

    def split(self, size: int) -> Iterator[Tensor]:
        """The rows, ``size`` at a time."""
        return (self.rows[places] for places in self.places.split(size))


Features = Tensor | Picked
Measure = Callable[[Features, Features], float]


def rows_at(rows: Features, places: Tensor) -> Features:
    """These rows: at once where they make one block, else as they are needed."""
    if isinstance(rows, Picked):
        return rows_at(rows.rows, rows.places[places])
    return rows[places] if len(places) <= BLOCK else Picked(rows, places)


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
    parts = [prompts[start : start + TEXTS] for start in range(0, len(prompts), TEXTS)]
    return F.normalize(torch.cat([encoder.encode_text(part).double().cpu() for part in parts]), dim=1)


def frechet_distance(first: Features, second: Features) -> float:
    """Frechet distance of two Gaussians fitted to features (N, D) and (M, D), N and M at least 2, by torchmetrics.

    Heusel et al. 2017, squared as is usual. With fewer rows than D + 1 the covariances are singular: see
    ``small_sample_warnings``.
    """
    metric = FrechetInceptionDistance(feature=PrecomputedFeatures(first.shape[1])).set_dtype(torch.float64)
    for features, real in ((first, True), (second, False)):
        for block in features.split(BLOCK):
            metric.update(block.double(), real=real)
    return max(float(metric.compute()), 0.0)  # of equal sets it is 0 but for rounding


def kernel_distance(first: Features, second: Features) -> float:
    """Kernel distance (KID) of features (N, D), (M, D): unbiased squared MMD, cubic kernel.

    Binkowski et al. 2018. The larger set is cut to the smaller one's size, taken in turns. Not by torchmetrics, which
    holds all pairs at once, and shuffles the rows by chance, so that the last digits are others each time.
    """
    size = min(len(first), len(second))
    first, second = (rows_at(x, torch.linspace(0, len(x) - 1, size).round().long()) for x in (first, second))
    own = sum(_kernel_sum(x, x) - _kernel_diagonal(x) for x in (first, second)) / (size * (size - 1))
    return own - 2 * _kernel_sum(first, second) / size**2


def _kernel_sum(first: Features, second: Features) -> float:
    """The cubic kernel of all pairs of rows, summed."""
    pairs = ((a.double(), b.double()) for a in first.split(BLOCK) for b in second.split(BLOCK))
    return sum(float(((a @ b.T / a.shape[1] + 1) ** 3).sum()) for a, b in pairs)


def _kernel_diagonal(features: Features) -> float:
    """The same of each row with itself."""
    blocks = (block.double() for block in features.split(BLOCK))
    return sum(float((((x * x).sum(dim=1) / x.shape[1] + 1) ** 3).sum()) for x in blocks)


def density(real: Features, other: Features) -> float:
    """How many real neighbourhoods an ``other`` image lies in, over NEIGHBOURS: 1 for the real distribution itself.

    Naeem et al. 2020, "Reliable fidelity and diversity metrics". A real image's neighbourhood is the ball to its
    NEIGHBOURS-th nearest other real one. Needs more than NEIGHBOURS real rows.
    """
    return float(_inside(real, other).sum().double() / (NEIGHBOURS * len(other)))


def coverage(real: Features, other: Features) -> float:
    """Share of real neighbourhoods (see ``density``) that hold an ``other`` image: 1 = all of the variety."""
    return float((_inside(real, other) > 0).double().mean())


def _inside(real: Features, other: Features) -> Tensor:
    """How many other images lie within each real one's neighbourhood (N,)."""
    counts = []
    for rows in real.split(BLOCK):
        own = rows.double()
        near = own.new_empty(len(own), 0)
        for part in real.split(BLOCK):  # of all distances only the shortest ones are kept
            near = torch.cat([near, torch.cdist(own, part.double())], dim=1)
            near = near.topk(min(NEIGHBOURS + 1, near.shape[1]), dim=1, largest=False).values
        radius = near.amax(dim=1, keepdim=True)  # the nearest one is the image itself
        within = ((torch.cdist(own, part.double()) < radius).sum(dim=1) for part in other.split(BLOCK))
        counts.append(sum(within, torch.zeros_like(radius[:, 0], dtype=torch.long)))
    return torch.cat(counts)


def by_halves(measure: Measure, first: Tensor, second: Tensor) -> Estimate:
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


def between_halves(measure: Measure, features: Tensor) -> float | None:
    """Mean of ``measure`` between two random halves of one set: what two sets of one kind, so small, differ by."""
    if len(features) < 4 * (NEIGHBOURS + 1):
        return None
    generator = torch.Generator().manual_seed(0)
    return float(np.mean([measure(*_random_halves(features, generator)) for _ in range(HALVES // 5)]))


def _random_halves(rows: Tensor, generator: torch.Generator) -> tuple[Features, Features]:
    order = torch.randperm(len(rows), generator=generator)
    return rows_at(rows, order[: len(rows) // 2]), rows_at(rows, order[len(rows) // 2 :])


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
    rng, at_once = np.random.default_rng(0), max(1, BLOCK**2 // len(known))
    drawn = [
        by_patient[:, rng.integers(0, len(known), (min(at_once, DRAWS - first), len(known)))].sum(axis=2)
        for first in range(0, DRAWS, at_once)
    ]
    resampled = np.concatenate(drawn, axis=1)
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
