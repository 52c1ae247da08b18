"""Lateral images of lumbar spines, healthy and with four kinds of lesion, that share no code with the shipped phantoms.

    python tests/foreign_spines.py OUTPUT_DIR    # cohort, testset, judge_train, judge_val: 1445 images, 23 s of CPU

It exists so that the recipe of tool/init.py is tried on images that the method's own generator has not made
(docs/evaluation.md), and therefore imports nothing of ``ldm``. It is not clinical: shapes, grey values and wording are
made up, and no number measured on these images says anything about patients.

Images have 128 x 128 pixels of 8 bits. Lengths are in pixels or shares of a vertebral body, brightness in grey values
(0 to 255). The patient looks to the left: anterior is left, cranial is up. A grade is 0, 1 or 2, from faint to gross.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 128
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(float)
MIDDLE = 3  # of seven vertebrae: the one that the image is about
CORNER = 5.0  # radius of a vertebral body's corners
LEVELS = ("L1", "L2", "L3", "L4")
SEVERITIES = (  # three readers' words for each grade; the first one also stands in sentences
    ("faint", "Genant 1", "low"),
    ("clear", "Genant 2", "intermediate"),
    ("gross", "Genant 3", "high"),
)


class Patient(NamedTuple):
    """What the images of one patient share."""

    width: float  # of a vertebral body, about 37 pixels
    height: float  # of a vertebral body, about 26 pixels
    disc: float  # height of a disc, 0.2 to 0.32 of a body's
    lordosis: float  # angle between the middle vertebra and the third one from it, about 0.12 radian
    waist: float  # how far the walls of a body are drawn in at half its height, 0.6 to 1.8 pixels
    density: float  # brightness of spongy bone, about 122
    blur: float  # 0 (sharp) to 1
    gain: float  # of all brightness, about 1
    offset: float  # of all brightness, about 0
    collimation: int  # 0: none, 1 or 2: a dark edge of 6 or 11 pixels on the right


class Vertebra(NamedTuple):
    """A vertebral body as maps [SIDE, SIDE] in pixels, and its size."""

    distance: np.ndarray  # to its outline, negative inside
    u: np.ndarray  # from its centre along the endplates, negative in front
    v: np.ndarray  # from its centre along its axis, negative above
    width: float
    height: float


Drawn = tuple[np.ndarray, np.ndarray]  # an image [SIDE, SIDE], float, and a lesion's mask [SIDE, SIDE], bool


def sample_patient(rng: np.random.Generator) -> Patient:
    return Patient(
        width=rng.normal(37, 2),
        height=rng.normal(26, 1.3),
        disc=rng.uniform(0.2, 0.32),
        lordosis=rng.normal(0.12, 0.1),
        waist=rng.uniform(0.6, 1.8),
        density=rng.normal(122, 8),
        blur=rng.uniform(0, 1),
        gain=rng.normal(1, 0.06),
        offset=rng.normal(0, 5),
        collimation=int(rng.random() < 0.25) * int(rng.integers(1, 3)),
    )


def texture(rng: np.random.Generator, vertical: float, horizontal: float) -> np.ndarray:
    """Noise [SIDE, SIDE] of standard deviation 1, smoothed by these standard deviations in pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), (vertical, horizontal), mode="wrap")
    return noise / noise.std()


def inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 where the distance is negative, 0 where it is positive, and a soft edge of this many pixels between."""
    return 1 / (1 + np.exp(distance / softness))


def ridge(distance: np.ndarray, width: float) -> np.ndarray:
    """1 where the distance is 0, falling to 0 on both sides of it within about twice the width in pixels."""
    return np.exp(-((distance / width) ** 2))


def vertebra(x: float, y: float, angle: float, width: float, height: float, waist: float) -> Vertebra:
    """A rectangle with round corners and drawn-in walls: centre (x, y) in pixels, turned by an angle in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    u = (COLUMNS - x) * cosine + (ROWS - y) * sine
    v = -(COLUMNS - x) * sine + (ROWS - y) * cosine
    half = width / 2 - waist * np.cos(np.pi * np.clip(v / height, -0.5, 0.5))
    past_wall, past_plate = np.abs(u) - half + CORNER, np.abs(v) - height / 2 + CORNER
    outside = np.hypot(np.maximum(past_wall, 0), np.maximum(past_plate, 0))
    distance = outside + np.minimum(np.maximum(past_wall, past_plate), 0) - CORNER
    return Vertebra(distance, u, v, width, height)


def sample_spine(rng: np.random.Generator, patient: Patient) -> list[Vertebra]:
    """Seven vertebrae along a curve, from above; the one at MIDDLE lies near the centre of the image."""
    width, height = patient.width * rng.normal(1, 0.02), patient.height * rng.normal(1, 0.02)
    step = height + height * patient.disc
    lordosis, lean = patient.lordosis + rng.normal(0, 0.03), rng.normal(0, 0.06)
    x, y = SIDE / 2 + rng.normal(0, 5), SIDE / 2 + rng.normal(0, 5)
    vertebrae = []
    for place in range(-MIDDLE, MIDDLE + 1):
        angle = lean + lordosis * place / 3
        along = y + place * step * np.cos(angle * 0.5)
        across = x - np.sin(lean) * place * step + 14 * lordosis * (place / 2) ** 2
        vertebrae.append(vertebra(across, along, angle, width, height, patient.waist))
    return vertebrae


def soft_tissue(rng: np.random.Generator) -> np.ndarray:
    """Brightness of about 40 to 80, with three darker clouds of bowel gas in the front third."""
    image = 62 + 18 * np.cos((COLUMNS - SIDE * 0.55) / 42) + 5 * texture(rng, 14, 9)
    for _ in range(3):
        x, y, radius = rng.uniform(-5, 35), rng.uniform(0, SIDE), rng.uniform(6, 13)
        image -= 16 * np.exp(-(((COLUMNS - x) / radius) ** 2 + ((ROWS - y) / (radius * 0.7)) ** 2))
    return image


def process(bone: Vertebra, u: float, v: float, half_width: float, half_height: float) -> np.ndarray:
    """A blunt oval [SIDE, SIDE], 0 to 1, behind a body: place and size as shares of the body's width and height."""
    across = (bone.u - bone.width * u) / (bone.width * half_width)
    along = (bone.v - bone.height * v) / (bone.height * half_height)
    return np.exp(-((across**2 + along**2) ** 2))


def add_bone(rng: np.random.Generator, image: np.ndarray, patient: Patient, spine: list[Vertebra]) -> np.ndarray:
    """Bodies with trabeculae, a bright shell and a paler core; pedicles and spinous processes behind them."""
    trabeculae = 5.5 * texture(rng, 2.6, 0.7) + 3 * texture(rng, 0.8, 1.8)
    for bone in spine:
        core = np.exp(-((bone.v / (bone.height * 0.3)) ** 2) - (bone.u / (bone.width * 0.33)) ** 2)
        body = patient.density + trabeculae - 9 * core + 34 * ridge(bone.distance + 1.3, 1.1)
        share = inside(bone.distance, 0.55)
        image = image * (1 - share) + body * share
        image += 30 * process(bone, 0.78, -0.08, 0.22, 0.2)
        image += 22 * process(bone, 1.35, 0.25, 0.3, 0.17)
    return image


def draw_wedge(rng: np.random.Generator, image: np.ndarray, bone: Vertebra, grade: int) -> Drawn:
    """Anterior wedge fracture: the upper endplate sinks in front, by about 22, 36 or 52 % of the body's height.

    It sinks less and less towards the back wall and keeps its height there; the bone below is pressed together, and a
    bright line of impaction (up to 30 grey values) lies under the endplate. The disc and the lower end of the vertebra
    above are drawn down with it, which no real fracture does, and which lies outside the mask: that reaches from the
    old endplate to 28 % of the height below the new one.
    """
    u, v, width, height = bone.u, bone.v, bone.width, bone.height
    loss = (0.22, 0.36, 0.52)[grade] * rng.uniform(0.85, 1.15)
    forward = np.clip((0.45 * width - u) / width, 0, 1)  # 0 at the back wall, about 1 at the front one
    sunk = loss * height * forward
    endplate = -height * 0.5 + sunk
    reach = np.clip(1 - np.abs(u) / (width * 0.72), 0, 1) ** 0.3 * (np.abs(u) < width * 0.72)
    pressed = np.clip((height * 0.45 - v) / np.maximum(height * 0.95 - sunk, 1), 0, 1)
    moved = np.where(v < endplate, 1, pressed) * np.clip((v + height * 0.95) / (height * 0.3), 0, 1)
    image = ndimage.map_coordinates(image, [ROWS - sunk * moved * reach, COLUMNS], order=1, mode="nearest")
    image += 30 * (ridge(v - (endplate + 2.5), 2.4) * (np.abs(u) < width * 0.47) * forward)
    mask = (np.abs(u) < width * 0.53) & (v > -height * 0.55) & (v < endplate + height * 0.28) & (forward > 0.12)
    return image, ndimage.binary_opening(mask, iterations=1)


def draw_lysis(rng: np.random.Generator, image: np.ndarray, bone: Vertebra, grade: int) -> Drawn:
    """Moth-eaten lysis: a group of 4, 6 or 9 round holes, 26, 38 or 48 grey values deep, somewhere in the body.

    Their standard deviation is 1.5, 1.8 or 2.1 pixels, times 0.8 to 1.3. The mask holds them and the bone between.
    """
    u, v = rng.uniform(-0.22, 0.22) * bone.width, rng.uniform(-0.16, 0.16) * bone.height
    count, depth, radius = (4, 6, 9)[grade], (26, 38, 48)[grade], (1.5, 1.8, 2.1)[grade]
    holes = np.zeros((SIDE, SIDE))
    for _ in range(count):
        across, along = u + rng.normal(0, 0.13 * bone.width), v + rng.normal(0, 0.13 * bone.height)
        squared = (bone.u - across) ** 2 + (bone.v - along) ** 2
        holes = np.maximum(holes, np.exp(-(squared / (2 * (radius * rng.uniform(0.8, 1.3)) ** 2))))
    holes *= bone.distance < -1
    mask = holes > 0.2
    return image - depth * holes, ndimage.binary_closing(mask, iterations=4) | mask


def draw_sclerosis(rng: np.random.Generator, image: np.ndarray, bone: Vertebra, grade: int) -> Drawn:
    """Ivory patch: a ragged oval, 22, 34 or 46 grey values brighter, its radius 13, 17 or 23 % of the body's width."""
    u, v = rng.uniform(-0.25, 0.25) * bone.width, rng.uniform(-0.2, 0.2) * bone.height
    radius = (0.13, 0.17, 0.23)[grade] * bone.width
    ragged = 1 + 0.22 * texture(rng, 3, 3)
    from_centre = np.hypot(bone.u - u, (bone.v - v) * 1.25) * ragged
    patch = inside(from_centre - radius, 0.9) * (bone.distance < -0.5)
    return image + (22, 34, 46)[grade] * patch, patch > 0.45


def draw_node(rng: np.random.Generator, image: np.ndarray, bone: Vertebra, grade: int) -> Drawn:
    """Schmorl's node: a half disc of disc tissue in one of the endplates, with a bright rim of 20 grey values.

    It is 45, 55 or 62 grey values darker than the bone, its radius 13, 18 or 23 % of the body's width. The mask holds
    the rim as well.
    """
    endplate = rng.choice([-1, 1]) * bone.height * 0.5
    u = rng.uniform(-0.2, 0.25) * bone.width
    radius = (0.13, 0.18, 0.23)[grade] * bone.width
    from_centre = np.hypot(bone.u - u, (bone.v - endplate) * 1.15)
    core, rim = inside(from_centre - radius, 0.7), ridge(from_centre - radius - 1.6, 1.1)
    body = bone.distance < 1.0
    image = image - (45, 55, 62)[grade] * core * body + 20 * rim * body
    return image, (from_centre < radius + 2.2) & (bone.distance < 1.5)


class Lesion(NamedTuple):
    """A kind of lesion: how it is drawn, its ``lesion_type``, and sentences about it at a level, with a severity."""

    draw: Callable[[np.random.Generator, np.ndarray, Vertebra, int], Drawn]
    name: str
    sentences: tuple[str, str, str]


LESIONS = {
    "wedge": Lesion(
        draw_wedge,
        "anterior wedge fracture",
        (
            "anterior wedge fracture of {level}",
            "{level} collapsed in front, wedge fracture",
            "wedge-shaped {level}, {severity} loss of anterior height",
        ),
    ),
    "moth": Lesion(
        draw_lysis,
        "moth-eaten lysis",
        (
            "moth-eaten lysis in {level}",
            "{severity} permeative, moth-eaten holes in the body of {level}",
            "{level} shows moth-eaten bone destruction",
        ),
    ),
    "ivory": Lesion(
        draw_sclerosis,
        "ivory patch",
        (
            "ivory patch in {level}",
            "dense ivory-like area, {level}",
            "{severity} sclerotic ivory patch of the {level} body",
        ),
    ),
    "schmorl": Lesion(
        draw_node,
        "Schmorl's node",
        (
            "Schmorl's node of {level}",
            "endplate of {level} with a Schmorl's node",
            "{severity} intravertebral disc herniation (Schmorl) at {level}",
        ),
    ),
}


def draw_image(rng: np.random.Generator, patient: Patient, kind: str | None, grade: int) -> Drawn:
    """An image [SIDE, SIDE], uint8, and the mask of its lesion, or without a kind of its middle vertebral body."""
    spine = sample_spine(rng, patient)
    image = add_bone(rng, soft_tissue(rng), patient, spine)
    mask = spine[MIDDLE].distance < 0
    if kind:
        image, mask = LESIONS[kind].draw(rng, image, spine[MIDDLE], grade)
    image = ndimage.gaussian_filter(image, 0.55 + 0.25 * patient.blur)
    image = image * patient.gain + patient.offset + 3.2 * rng.standard_normal((SIDE, SIDE))
    if patient.collimation:
        edge = 5 * patient.collimation + 1
        image[:, -edge:] = 12 + rng.standard_normal((SIDE, edge))
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_sample(
    rng: np.random.Generator, folder: Path, patient_id: str, patient: Patient, kind: str | None, complete: bool
) -> None:
    """A sample folder with one image; see ``write_samples``."""
    level, grade = LEVELS[int(rng.integers(4))], int(rng.integers(3))
    image, mask = draw_image(rng, patient, kind, grade)
    meta = {"patient_id": patient_id, "level": level, "machine": "bucky 1" if patient.blur < 0.5 else "bucky 2"}
    if kind:
        lesion = LESIONS[kind]
        severity, sentence = SEVERITIES[grade][int(rng.integers(3))], lesion.sentences[int(rng.integers(3))]
        prompt = sentence.format(level=level, severity=SEVERITIES[grade][0])
        if complete or rng.random() < 0.8:
            meta["lesion_type"] = lesion.name
        if rng.random() < 0.5:
            meta["severity"] = severity
    else:
        prompt = "healthy"
    folder.mkdir(parents=True)
    Image.fromarray(image).save(folder / "image.png")
    (folder / "prompt.txt").write_text(prompt + "\n")
    if kind or complete or rng.random() < 0.85:
        Image.fromarray(np.uint8(255 * mask)).save(folder / "mask.png")
    if complete or rng.random() < 0.75:
        (folder / "meta.json").write_text(json.dumps(meta))
    if complete:
        (folder / "truth.txt").write_text(kind or "healthy")


def write_samples(folder: Path, seed: int, healthy: int, diseased: int, prefix: str, complete: bool) -> Path:
    """Sample folders PREFIX001/exposure_a ..., one to three of each patient; the kinds of lesion are equally frequent.

    As collected in a clinic, 15 % of the healthy samples lack the mask of their vertebra, 20 % of the diseased ones the
    lesion type, and a quarter of all ``meta.json``. With ``complete`` none does, and ``truth.txt`` names the kind.
    Half of the diseased samples have no severity either way. Returns the folder.
    """
    rng = np.random.default_rng(seed)
    kinds = [str(kind) for kind in np.resize(list(LESIONS), diseased)]
    rng.shuffle(kinds)
    left: list[str | None] = [*[None] * healthy, *kinds]
    number = 0
    while left:
        number += 1
        patient, patient_id = sample_patient(rng), f"{prefix}{number:03d}"
        for exposure in "abc"[: int(rng.integers(1, 4))]:
            if left:
                write_sample(
                    rng, folder / patient_id / f"exposure_{exposure}", patient_id, patient, left.pop(), complete
                )
    return folder


SETS: dict[str, dict[str, Any]] = {
    "cohort": {"seed": 4711, "healthy": 150, "diseased": 45, "prefix": "RX", "complete": False},
    "testset": {"seed": 815, "healthy": 100, "diseased": 100, "prefix": "TX", "complete": True},
    "judge_train": {"seed": 1234, "healthy": 400, "diseased": 500, "prefix": "JX", "complete": True},
    "judge_val": {"seed": 1235, "healthy": 60, "diseased": 90, "prefix": "KX", "complete": True},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="new folder for the four sets")
    folder = parser.parse_args(argv).output_dir
    if folder.exists():
        parser.error(f"{folder}: is there already; give another OUTPUT_DIR, or delete it")
    for name, settings in SETS.items():
        written = write_samples(folder / name, **settings)
        print(f"{written}: {settings['healthy']} healthy and {settings['diseased']} diseased samples")


if __name__ == "__main__":
    main()
