"""Tables and the page of a segmentation's test: numbers, losses, pictures of the outlines. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ldm.classifier.data import HEALTHY, ImageSet
from ldm.classifier.report import number_tables, training_plots, write_tables
from ldm.classifier.square import Squares
from ldm.reports.html import write_image, write_page

SHOWN, ALARMS = 24, 8  # pictures of lesions, evenly from the worst to the best, and of false alarms
SCALE = 4  # of the pictures on the page
TRUTH, FOUND = (80, 220, 100), (255, 64, 64)  # colours of the outlines


def write_segmentation(
    folder: Path,
    metrics: Mapping[str, Any],
    images: ImageSet,
    truth: Squares,
    found: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    suffix: str = "",
) -> None:
    """predictions_test.csv, metrics.csv and report.html.

    ``truth`` and ``found``: masks, bool (N, S, S); ``rows``: see ``mask_rows``.
    """
    path = write_tables(folder, rows, metrics, suffix)
    lesions = sorted((i for i, row in enumerate(rows) if row["dice"] is not None), key=lambda i: rows[i]["dice"])
    places = np.linspace(0, len(lesions) - 1, min(SHOWN, len(lesions))).round().astype(int)
    alarms = [i for i, row in enumerate(rows) if row["label"] == HEALTHY and row["found_pixels"]]
    alarms.sort(key=lambda i: -rows[i]["found_pixels"])
    write_page(
        path,
        "segmentation",
        **number_tables(metrics, ("dice", "found")),
        training_plots=training_plots(folder, path, metrics["epoch"]),
        outlines=_pictures(path, "outline", images, truth, found, rows, [lesions[place] for place in places]),
        alarms=_pictures(path, "alarm", images, truth, found, rows, alarms[:ALARMS]),
        alarm_count=len(alarms),
    )


def _pictures(
    path: Path,
    name: str,
    images: ImageSet,
    truth: Squares,
    found: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
) -> list[dict[str, Any]]:
    return [
        {
            **{key: rows[i][key] for key in ("sample_id", "prompt", "dice")},
            "source": write_image(path, f"{name}_{n:02d}", outlined(images.images[i], truth[i], found[i])),
            "lesion": " ".join(filter(None, (rows[i]["severity"], rows[i]["lesion_type"]))),
        }
        for n, i in enumerate(chosen)
    ]


def outlined(image: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The image (S, S) or (S, S, 3) SCALE times enlarged, with the outlines of both masks (S, S): uint8 RGB."""
    side = SCALE * len(image)
    large = cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)
    shown = large if large.ndim == 3 else np.repeat(large[..., None], 3, axis=2)
    for mask, colour in ((truth, TRUTH), (found, FOUND)):
        area = cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
        lines, _ = cv2.findContours(area, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        shown = cv2.drawContours(np.ascontiguousarray(shown), lines, -1, colour, 1)
    return shown
