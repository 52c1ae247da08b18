"""Images of plain shapes and textures with plain words: what the phantom base learns to draw before any spine.

They stand for the everyday images of Stable Diffusion's training set. No word of medicine occurs here.
"""

import cv2
import numpy as np

SIZE = 64
SHAPES = ("disc", "ellipse", "square", "ragged patch", "ring")
GREYS = {"dark": (0.1, 0.25), "black": (0.0, 0.08), "grey": (0.4, 0.55), "bright": (0.72, 0.88), "white": (0.92, 1)}
FILLS = (*GREYS, "striped", "checkered", "speckled", "cloudy")
DIRECTIONS = ("upright", "level", "slanted")


def smooth_noise(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Smooth random texture of zero mean and unit spread, (64, 64); ``scale`` is its grain in pixels."""
    field = cv2.GaussianBlur(rng.standard_normal((SIZE, SIZE)).astype(np.float32), (0, 0), max(scale, 0.3))
    return (field - field.mean()) / (field.std() + 1e-6)


def _shape(rng: np.random.Generator, name: str) -> np.ndarray:
    radius = rng.uniform(6, 15)
    cy, cx = rng.uniform(radius + 2, SIZE - radius - 2, 2)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    y, x = y - cy, x - cx
    if name == "square":
        return np.maximum(abs(x), abs(y)) < 0.85 * radius
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.3, 1.8) if name == "ellipse" else 1.0
    along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    distance = np.hypot(along / stretch**0.5, across * stretch**0.5)
    if name == "ring":
        return (distance < radius) & (distance > 0.55 * radius)
    if name == "ragged patch":
        distance = distance * (1 + 0.22 * smooth_noise(rng, 3.0))
    return distance < radius


def _fill(rng: np.random.Generator, name: str) -> tuple[np.ndarray, str]:
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    if name in GREYS:
        return rng.uniform(*GREYS[name]) + 0.02 * smooth_noise(rng, 1.0), name
    low, high = rng.uniform(0.0, 0.4), rng.uniform(0.6, 1.0)
    phase = rng.uniform(0, 2 * np.pi)
    if name == "striped":
        direction = DIRECTIONS[rng.integers(3)]
        angle = {"upright": 0.0, "level": np.pi / 2, "slanted": np.pi / 4}[direction] + rng.normal(0, 0.08)
        wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / rng.uniform(3.5, 7.0) + phase)
        return low + (high - low) * (0.5 + 0.5 * np.tanh(2 * wave)), f"{direction} striped"
    if name == "checkered":
        period = rng.uniform(6, 10)
        wave = np.sin(2 * np.pi * x / period + phase) * np.sin(2 * np.pi * y / period + phase)
        return low + (high - low) * (wave > 0), name
    if name == "speckled":
        return low + (high - low) / (1 + np.exp(-3 * smooth_noise(rng, rng.uniform(0.8, 1.6)))), name
    return np.clip(0.5 + 0.16 * smooth_noise(rng, rng.uniform(3, 6)), 0, 1), "cloudy"


def generic_image(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """One image: grey values (64, 64) in [0, 1], the mask of its shape (bool), and its prompt."""
    shape, fill = SHAPES[rng.integers(len(SHAPES))], FILLS[rng.integers(len(FILLS))]
    ground = rng.uniform(0.15, 0.8)
    image = ground + rng.uniform(0.01, 0.06) * smooth_noise(rng, rng.uniform(0.5, 4))
    image += rng.uniform(-0.15, 0.15) * np.linspace(-1, 1, SIZE)[:: rng.choice([-1, 1])][:, None]
    mask = _shape(rng, shape)
    inside, content = _fill(rng, fill)
    edge = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.5, 1.2))
    image = edge * inside + (1 - edge) * image
    tone = "dark" if ground < 0.35 else "grey" if ground < 0.6 else "light"
    return np.clip(image, 0, 1).astype(np.float32), mask, f"a {content} {shape} on a {tone} ground"


def texture(rng: np.random.Generator) -> np.ndarray:
    """A whole image (64, 64) in [0, 1] of one texture of any contrast: stripes, checks, speckles or clouds."""
    name = ("striped", "striped", "checkered", "speckled", "cloudy")[rng.integers(5)]
    values, _ = _fill(rng, name)
    low, high = np.sort(rng.uniform(0, 1, 2))
    slope = rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, SIZE)[:, None]
    return np.clip(low + (high - low) * values + slope, 0, 1).astype(np.float32)
