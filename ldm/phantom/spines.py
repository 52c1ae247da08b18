"""Sagittal spine phantoms: CT-like images of one vertebra and its neighbours, healthy or with one lesion.

A phantom is a pure function of (seed, patient, image, lesion type, severity, size): the same arguments give the same
bytes, however many others are made, and the healthy twin of a diseased phantom (``lesion_type=None``) is the same
image but for the lesion. Front (anterior) is left. Phantoms are made up and are no clinical evidence.

By default an image shows a vertebra and its neighbours, 104 to 144 pixels a side. With a ``size`` it has that many
pixels a side and shows FIELD pixels of the default world, as a CT of the whole spine does: at 512 the same anatomy has
1.6 times the resolution (0.5 to 0.6 mm a pixel), and a lesion is 4 to 8 % of the image's side. What belongs to the
patient scales with the resolution, all by one factor; what belongs to the scanner (blur, grain of the noise, rings)
keeps its width in pixels.

How hard they are, ``python tool/make_phantoms.py --calibrate`` measures (docs/results.md).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from ldm.core.errors import UsageError
from ldm.core.files import named_seed
from ldm.phantom.findings import draw_signs
from ldm.phantom.lesions import LESION_TYPES, SEVERITIES, Body, Lesion, draw_benign, rows_of, smooth_noise
from ldm.phantom.worlds import STANDARD, world_of

LEVELS = ("T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5")
BASE_WORLD = 90_000  # phantom worlds from here on belong to the phantom base alone; no demo or study uses them
BIOMEDCLIP_PAIRS = 3000  # images that the BiomedCLIP stand-in was trained on
FIELD = 320.0  # side of what an image of a given size shows, in pixels of the default world
SIZES = (256, 2048)  # of images of a given size: below, a lesion has hardly ten pixels
VERSION = 3  # raise it when the images change, so that a stored dataset is not taken for a new one

# in every eight lesions of one type: two subtle, three moderate, three severe
_SEVERITY_CYCLE = ("moderate", "severe", "subtle", "moderate", "severe", "moderate", "subtle", "severe")


@dataclass(frozen=True)
class Phantom:
    """One image and everything known about it."""

    image: np.ndarray  # uint8 HxW
    mask: np.ndarray  # bool HxW, the lesion; all False when healthy
    anatomy: np.ndarray  # uint8 HxW: 0 background, 1 target body, 2 other bodies, 3 discs, 4 spinal canal
    prompt: str  # "healthy" without a lesion
    lesion_type: str | None
    severity: str | None
    level: str
    spacing_mm: float
    patient_id: str
    sample_id: str
    seed: int
    sign: str | None = None  # the type that other vertebrae show, in a world of signs

    @property
    def healthy(self) -> bool:
        """Whether there is no lesion."""
        return self.lesion_type is None


def check_size(size: int, world: str = STANDARD) -> int:
    """``size`` if phantoms can be rendered with so many pixels a side; UsageError otherwise."""
    if world != STANDARD:
        raise UsageError(f"size: only the world standard has images of a given size, not {world}; leave one out")
    if not SIZES[0] <= size <= SIZES[1]:
        raise UsageError(f"size: {size} pixels a side; expected {SIZES[0]} to {SIZES[1]}")
    return size


def render_phantom(
    seed: int,
    index: int,
    lesion_type: str | None,
    severity: str | None = None,
    image: int = 0,
    size: int | None = None,
    world: str = STANDARD,
) -> Phantom:
    """Render image ``image`` of patient ``index`` of the seed ``seed`` in one of WORLDS.

    ``lesion_type`` None renders the healthy image, otherwise one of the world's; ``severity`` None lets the patient
    decide (a quarter subtle). Sides 104-144 px, the body in the middle about 40x30 px; with ``size`` that many pixels
    a side (see above). ValueError for unknown names, UsageError for an unknown world or one together with a size.
    """
    kind = world_of(world)
    if size is not None:
        check_size(size, world)
    if lesion_type is not None and lesion_type not in kind.lesion_types:
        raise ValueError(f"lesion type {lesion_type!r} is unknown; expected one of {', '.join(kind.lesion_types)}")
    if severity is not None and severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r} is unknown; expected one of {', '.join(SEVERITIES)}")
    patient_rng = np.random.default_rng(named_seed("phantom patient", seed, index))
    image_rng = np.random.default_rng(named_seed("phantom picture", seed, index, image))
    spine = _Spine.of(patient_rng, image_rng, size)
    if kind.scanner:
        spine = replace(spine, **kind.scanner(np.random.default_rng(named_seed("phantom scanner", seed, index))))
    canvas, anatomy, bodies = _draw_spine(spine, image_rng)
    if sign := kind.sign_of(seed, index, lesion_type):
        sign_rng = np.random.default_rng(named_seed("phantom sign", seed, index, image))
        x, y = spine.pixels()
        draw_signs(sign_rng, sign, canvas, bodies, (x - spine.centre[0], y - spine.centre[1]), spine.tilt)
    lesion_rng = np.random.default_rng(named_seed("phantom lesion", seed, index, image, lesion_type, severity))
    lesion, prompt = None, "healthy"
    if lesion_type is None:
        severity = None
    else:
        severity = severity or str(lesion_rng.choice(_SEVERITY_CYCLE))
        lesion = kind.draw(lesion_rng, lesion_type, severity, canvas, bodies[spine.target])
        prompt = kind.say(lesion_rng, lesion_type, severity, spine.level)
    patient_id = f"w{seed}p{index:06d}"
    return Phantom(
        image=_acquire(spine, image_rng, canvas, lesion),
        mask=np.zeros(canvas.shape, bool) if lesion is None else lesion.mask,
        anatomy=anatomy,
        prompt=prompt,
        lesion_type=lesion_type,
        severity=severity,
        level=spine.level,
        spacing_mm=spine.spacing_mm,
        patient_id=patient_id,
        sample_id=f"{patient_id}_{spine.level}" + (f"_{image}" if image else ""),
        seed=seed,
        sign=sign,
    )


@dataclass(frozen=True)
class _Spine:
    """The numbers that describe one image before it is drawn.

    Angles are in radians, lengths in pixels of the default world; only ``shape`` and ``blur`` count the image's own.
    """

    shape: tuple[int, int]
    scale: float  # how many of its pixels a length of one has
    level: str
    centre: tuple[float, float]  # x, y of the target body
    tilt: float
    curvature: float  # 1 / length, positive where the column bends backwards at both ends
    widths: np.ndarray  # of the bodies in view, an odd number, the target in the middle
    heights: np.ndarray
    discs: np.ndarray  # heights of the discs below all bodies but the last
    bone: float
    tissue: float
    canal: float
    blur: float
    noise: float
    gain: float
    offset: float
    spacing_mm: float
    grain: float = 1.0  # of the noise, in that of the standard world
    sharp: float = 0.0  # how far the scanner enhances edges
    reach: int = 2  # pixels outside its extent in which a lesion is seen

    @classmethod
    def of(cls, patient_rng: np.random.Generator, image_rng: np.random.Generator, size: int | None) -> "_Spine":
        """Drawn by chance: what a patient's images share from ``patient_rng``, the rest from ``image_rng``."""
        wider, ratio, disc = patient_rng.normal(0, 1.4), patient_rng.uniform(0.72, 0.80), patient_rng.uniform(6.0, 9.5)
        bend, bone = patient_rng.normal(0, 0.0012), patient_rng.uniform(0.44, 0.60)
        tissue, canal, gain = (patient_rng.uniform(*ends) for ends in ((0.26, 0.33), (13.0, 18.0), (0.6, 1.4)))
        rank = int(image_rng.integers(len(LEVELS)))
        width = float(np.clip(37.5 + 0.9 * rank + wider, 36, 46))
        height = float(np.clip(width * ratio, 26, 36))
        scale, beyond = (1.0, 2) if size is None else (size / FIELD, 6)  # bodies in view on either side of the target
        steps = np.arange(-beyond, beyond + 1)
        growth = 1 + 0.025 * steps + image_rng.normal(0, 0.015, len(steps)) * (steps != 0)
        lumbar = (rank - 2) / 5  # from kyphosis above zero to lordosis
        shape = (size, size) if size else (int(image_rng.integers(104, 145)), int(image_rng.integers(104, 145)))
        high, wide = (side / scale for side in shape)
        return cls(
            shape=shape,
            scale=scale,
            level=LEVELS[rank],
            centre=(wide * image_rng.uniform(0.36, 0.58), high * image_rng.uniform(0.41, 0.59)),
            tilt=math.radians(-7 + 18 * max(0.0, lumbar) ** 2 + image_rng.normal(0, 9)),
            curvature=float(0.0035 * lumbar + bend),
            widths=(width * growth).astype(np.float32),
            heights=(height * growth * (1 + image_rng.normal(0, 0.025, len(steps)) * (steps != 0))).astype(np.float32),
            discs=np.clip(disc * (1 + 0.05 * rank) * image_rng.uniform(0.75, 1.2, 2 * beyond), 3.5, 12).astype("f4"),
            bone=bone,
            tissue=tissue,
            canal=canal,
            blur=image_rng.uniform(0.45, 0.95),
            noise=image_rng.uniform(0.012, 0.032),
            gain=gain,
            offset=image_rng.normal(0, 0.06),
            spacing_mm=round((31 + 0.9 * rank) / width / scale, 3),
        )

    @property
    def target(self) -> int:
        """The number of the target body."""
        return len(self.widths) // 2

    @property
    def half(self) -> float:
        """Half of the target body's width."""
        return self.widths[self.target] / 2

    def texture(self, rng: np.random.Generator, sigma: float, sigma_y: float = 0.0) -> np.ndarray:
        """``smooth_noise`` over the whole image, ``sigma`` a length."""
        return smooth_noise(rng, self.shape, sigma * self.scale, sigma_y * self.scale)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the pixels lie, across and down: two float32 HxW."""
        y, x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32) / self.scale
        return x, y


def _draw_spine(spine: _Spine, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[Body]]:
    """The clean canvas (float32 HxW), the label map (uint8 HxW) and all bodies."""
    count = len(spine.widths)
    t, s = _column_frame(spine, rng)
    gaps = np.concatenate([[np.float32(0)], (spine.heights[:-1] + spine.heights[1:]) / 2 + spine.discs])
    middles = np.cumsum(gaps) - np.cumsum(gaps)[spine.target]
    nearest = np.searchsorted((middles[:-1] + middles[1:]) / 2, s).astype(np.intp)
    slips = (rng.normal(0, 0.5, count) * (np.arange(count) != spine.target)).astype(np.float32)
    u, v = t - slips[nearest], s - middles[nearest]
    depth = _body_depth(spine, u, v, nearest, rng)
    canvas = _soft_tissue(spine, t, s, rng)
    canal_mask = _canal(spine, canvas, t, s, rng)
    marrow = spine.bone * rng.uniform(0.8, 1.0) + 0.04 * spine.texture(rng, 1.1)
    behind = t - spine.half - spine.canal
    for k in range(count):
        rows = rows_of((np.abs(s - middles[k]) < 60) & (behind > -10) & (behind < 60))  # no process reaches further
        _spinous_process(spine, canvas[rows], marrow[rows], behind[rows], s[rows] - middles[k], rng)
    disc_mask = _discs(spine, canvas, t, depth, nearest, v, rng)
    depths = [np.where(nearest == k, depth, -9).astype(np.float32) for k in range(count)]
    bodies = [Body(u, v, depths[k], spine.widths[k] / 2, spine.heights[k] / 2, spine.scale) for k in range(count)]
    _bone(spine, canvas, u, v, depth, rng)
    for body in bodies:
        if (body.depth > 0).any():
            draw_benign(rng, canvas, body)
    anatomy = np.zeros(spine.shape, np.uint8)
    anatomy[canal_mask] = 4
    anatomy[disc_mask] = 3
    anatomy[depth > 0] = np.where(nearest == spine.target, 1, 2)[depth > 0]
    return canvas, anatomy, bodies


def _column_frame(spine: _Spine, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the bent column: ``t`` from front to back, ``s`` downwards; zero in the target's middle."""
    x, y = spine.pixels()
    x, y = x - spine.centre[0], y - spine.centre[1]
    sine, cosine = math.sin(spine.tilt), math.cos(spine.tilt)
    across, along = x * cosine - y * sine, x * sine + y * cosine
    t = across - spine.curvature / 2 * along**2 + 0.5 * spine.texture(rng, 5)
    s = along * (1 + spine.curvature * t) + 0.5 * spine.texture(rng, 5)
    return t.astype(np.float32), s.astype(np.float32)


def _body_depth(
    spine: _Spine, u: np.ndarray, v: np.ndarray, nearest: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Distance from the surface of the nearest body, positive inside: a waisted box with round corners."""
    count = len(spine.widths)
    waist = rng.uniform(0.04, 0.10, count).astype(np.float32)[nearest]
    hollow = rng.uniform(0.3, 1.8, count).astype(np.float32)[nearest]
    wedge = rng.normal(0.02, 0.03, count).astype(np.float32)[nearest]
    spur = (rng.uniform(1, 4.5, count) * (rng.random(count) < 0.35)).astype(np.float32)[nearest]
    half_width, half_height = spine.widths[nearest] / 2, spine.heights[nearest] / 2
    low, across = v / half_height, u / half_width
    front = u < 0
    wall = half_width * (1 - waist * np.clip(1 - low**2, 0, 1))
    wall = wall + np.where(front, spur * np.clip(np.abs(low), 0, 1.1) ** 8, 0)  # osteophytes at the front corners
    plate = half_height * (1 + wedge * across) - hollow * np.clip(1 - across**2, -0.3, 1)
    return _rounded(wall - np.abs(u), plate - np.abs(v), np.where(front, np.float32(2.5), np.float32(3.5)))


def _rounded(a: np.ndarray, b: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Depth in a box whose walls are ``a`` and ``b`` away, its corners rounded by ``radius``."""
    a, b = radius - a, radius - b
    return radius - np.hypot(np.maximum(a, 0), np.maximum(b, 0)) - np.minimum(np.maximum(a, b), 0)


def _soft_tissue(spine: _Spine, t: np.ndarray, s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Muscle, fat and the great vessels around the column."""
    half = spine.half
    canvas = spine.tissue + 0.025 * spine.texture(rng, 7) + 0.012 * spine.texture(rng, 1.5)
    fat = 0.16 + 0.015 * spine.texture(rng, 2)
    start, width = -half - rng.uniform(5, 9), rng.uniform(11, 17)
    wobble = t + 1.5 * spine.texture(rng, 9)
    front = np.clip((start - wobble) / 2 + 0.5, 0, 1)
    vessel = front * np.clip((wobble - (start - width)) / 2 + 0.5, 0, 1)
    patchy = np.clip(0.5 + 1.4 * spine.texture(rng, 6), 0, 1)
    canvas += front * (1 - vessel) * patchy * (fat - canvas)
    canvas += vessel * rng.uniform(0.02, 0.09)
    gap = np.exp(-(((wobble - start) / 1.6) ** 2))  # fat between the vessel and the spine
    canvas += 0.8 * gap * (fat - canvas)
    back = np.clip((t - half - spine.canal - 3) / 3, 0, 1)
    streaks = np.clip(0.35 + 0.8 * spine.texture(rng, 2.2, 6), 0, 1)
    canvas += back * streaks * (fat - canvas)
    if rng.random() < 0.2:  # bowel gas at the front
        x, y = start - width - rng.uniform(8, 20), rng.uniform(-40, 40)
        gas = np.clip(1.2 - np.hypot((t - x) / rng.uniform(4, 9), (s - y) / rng.uniform(6, 14)), 0, 0.25) * 4
        canvas += gas * (0.03 - canvas)
    return canvas.astype(np.float32)


def _canal(spine: _Spine, canvas: np.ndarray, t: np.ndarray, s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw epidural fat, the sac and the cord; returns the canal as bool HxW."""
    start = spine.half - 1
    inside = np.clip(np.minimum(t - start, start + spine.canal + 1 - t) + 0.5, 0, 1)
    canvas += inside * (0.18 - canvas)
    wave = 0.8 * np.sin(s / rng.uniform(9, 14) + rng.uniform(0, 6))
    sac = np.clip(np.minimum(t - start - 2.5 - 0.4 * wave, start + spine.canal - 1.2 + wave - t), 0, 1)
    canvas += sac * (spine.tissue - 0.04 - canvas)
    middle = start + spine.canal / 2 + rng.normal(0, 0.6)
    cord = np.clip(spine.canal * rng.uniform(0.16, 0.24) - np.abs(t - middle), 0, 1)
    canvas += cord * rng.uniform(0.01, 0.05)
    return inside > 0.5


def _spinous_process(
    spine: _Spine, canvas: np.ndarray, marrow: np.ndarray, t: np.ndarray, s: np.ndarray, rng: np.random.Generator
) -> None:
    """Lamina and spinous process of one level; ``t`` starts at the canal's back wall, ``s`` at the body's middle."""
    thoracic = spine.level.startswith("T")
    slope = math.radians(rng.uniform(24, 36) if thoracic else rng.uniform(6, 17))
    length, half = rng.uniform(24, 34), rng.uniform(4.0, 5.5) if thoracic else rng.uniform(6.0, 9.0)
    low = s - spine.heights[spine.target] * rng.uniform(0.20, 0.34)
    along, across = t * math.cos(slope) + low * math.sin(slope), low * math.cos(slope) - t * math.sin(slope)
    reach = np.clip(along / length, 0, 1)
    wall = half * (0.72 + 0.35 * reach) + 0.5 * np.sin(along / 3.0 + rng.uniform(0, 6))
    depth = _rounded(length / 2 - np.abs(along - length / 2 - 0.5), wall - np.abs(across), 3.0)
    cover = np.clip(depth + 0.5, 0, 1)
    shell = np.exp(-((np.clip(depth - 0.6, 0, None) / 1.1) ** 2))
    canvas += cover * (marrow + shell * np.clip(rng.uniform(0.68, 0.88) - marrow, 0, 1) - canvas)


def _discs(
    spine: _Spine,
    canvas: np.ndarray,
    t: np.ndarray,
    depth: np.ndarray,
    nearest: np.ndarray,
    v: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw the discs between the bodies; returns them as bool HxW."""
    reach = spine.widths[nearest] / 2 + rng.uniform(-1.0, 1.2)
    between = np.abs(v) > spine.heights[nearest] / 2 - 4
    cover = np.clip(reach - np.abs(t) + 0.5, 0, 1) * between
    core = np.clip(1 - np.abs(t) / (0.75 * reach), 0, 1)
    grey = spine.tissue + 0.09 + rng.normal(0, 0.015) - 0.03 * core + 0.012 * spine.texture(rng, 1.6)
    canvas += cover * (grey - canvas)
    if rng.random() < 0.15:  # gas in a worn disc
        k = int(rng.integers(1, len(spine.discs)))
        edge = spine.heights[k] / 2 + spine.discs[min(k, len(spine.discs) - 1)] / 2
        line = np.exp(-(((np.abs(v) - edge) / 1.0) ** 2)) * (nearest == k) * np.clip(core * 3, 0, 1)
        canvas += line * (0.06 - canvas) * 0.8
    return (cover > 0.5) & (depth <= 0)


def _bone(
    spine: _Spine, canvas: np.ndarray, u: np.ndarray, v: np.ndarray, depth: np.ndarray, rng: np.random.Generator
) -> None:
    """Draw all bodies: spongy bone with trabeculae that run mostly upright, and a cortical shell."""
    inner = spine.bone + rng.uniform(0.015, 0.035) * spine.texture(rng, 0.9, 2.0)
    inner += rng.uniform(0.015, 0.035) * spine.texture(rng, 1.2) + 0.02 * spine.texture(rng, 5)
    shell = np.exp(-((np.clip(depth - 0.7, 0, None) / rng.uniform(0.9, 1.5)) ** 2))
    peak = rng.uniform(0.78, 0.95) + 0.04 * spine.texture(rng, 3)
    steep = 0.75 + 0.25 * np.clip(np.abs(v) / (np.abs(u) + 1e-3), 0, 1)  # endplates are brighter than the walls
    canvas += np.clip(depth + 0.5, 0, 1) * (inner + shell * steep * np.clip(peak - inner, 0, 1) - canvas)


def _optics(spine: _Spine, layer: np.ndarray) -> np.ndarray:
    """What the scanner's optics make of a layer of the canvas."""
    image = cv2.GaussianBlur(layer, (0, 0), spine.blur)
    return image + spine.sharp * (image - cv2.GaussianBlur(image, (0, 0), 1.2)) if spine.sharp else image


def _acquire(spine: _Spine, rng: np.random.Generator, canvas: np.ndarray, lesion: Lesion | None) -> np.ndarray:
    """What the scanner makes of the canvas: blur, noise, streaks and rings, window. uint8 HxW.

    The lesion goes through the same optics but is cut off ``reach`` pixels (two) outside its extent, so that a healthy
    and a diseased twin are equal, bit for bit, everywhere else.
    """
    image = _optics(spine, canvas)
    if lesion is not None:
        kernel = (2 * spine.reach + 1,) * 2
        near = np.minimum(1, 2 * cv2.GaussianBlur(lesion.extent.astype(np.float32), kernel, 0.45 * spine.reach))
        image = image + _optics(spine, lesion.change) * near
    grain = 0.75 * smooth_noise(rng, spine.shape, 0.55 * spine.grain)
    grain = grain + 0.5 * smooth_noise(rng, spine.shape, 1.1 * spine.grain)
    image = image + spine.noise * grain
    y, x = np.mgrid[: spine.shape[0], : spine.shape[1]].astype(np.float32)
    wider = max(1.0, max(spine.shape) / 144)  # than a default image
    ends = 60 * wider
    image = image + rng.normal(0, 0.025) * (x / ends - 1) + rng.normal(0, 0.025) * (y / ends - 1)  # shading
    if rng.random() < 0.25:  # streaks from dense structures outside the image
        angle = rng.normal(0, 0.25)
        wave = smooth_noise(rng, (1, int(512 * wider)), 2.0)[0]
        rows = np.clip(y * math.cos(angle) + x * math.sin(angle) + 150 * wider, 0, len(wave) - 1).astype(np.intp)
        image = image + rng.uniform(0.008, 0.022) * wave[rows]
    if rng.random() < 0.2:  # a ring around the scanner's axis
        radius = np.hypot(x - rng.uniform(-80, spine.shape[1] + 80), y - rng.uniform(-80, spine.shape[0] + 80))
        ring = np.exp(-(((radius - wider * rng.uniform(40, 140)) / 1.2) ** 2))
        image = image + (1 if rng.random() < 0.5 else -1) * rng.uniform(0.03, 0.07) * ring
    image = (image - 0.45) * spine.gain + 0.45 + spine.offset
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def plan(
    n_healthy: int, n_diseased: int, per_patient: int = 1, lesion_types: Sequence[str] = LESION_TYPES
) -> Iterator[tuple[int, str | None, str | None, int]]:
    """The dataset's images as (patient index, lesion type, severity, image of that patient).

    Healthy patients have even numbers, diseased ones odd numbers; types and severities take turns. So a larger
    dataset of the same seed contains the smaller one.
    """
    for n in range(n_healthy):
        yield 2 * (n // per_patient), None, None, n % per_patient
    for n in range(n_diseased):
        yield 2 * (n // per_patient) + 1, *turn(n, lesion_types), n % per_patient


def turn(n: int, lesion_types: Sequence[str]) -> tuple[str, str]:
    """Lesion type and severity of the ``n``-th lesion of a dataset."""
    return lesion_types[n % len(lesion_types)], _SEVERITY_CYCLE[n // len(lesion_types) % len(_SEVERITY_CYCLE)]


def biomedclip_pairs(
    count: int, lesion_types: tuple[str, ...] = LESION_TYPES
) -> Iterator[tuple[int, int, str | None, str | None]]:
    """What the BiomedCLIP stand-in has seen, as the first arguments of ``render_phantom``: one third is healthy."""
    for index in range(count):
        rng = np.random.default_rng(named_seed("pairs", index))
        lesion_type = None if index % 3 == 0 else lesion_types[rng.integers(len(lesion_types))]
        yield BASE_WORLD + 1, index, lesion_type, None if lesion_type is None else SEVERITIES[rng.integers(3)]
