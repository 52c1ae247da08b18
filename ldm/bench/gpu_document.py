"""The part of docs/gpu.md that is measured, written between two marks; the rest of the page is written by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError
from ldm.core.files import read_text, write_text
from ldm.core.tables import markdown_table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
GIB = 2**30
# Of one NVIDIA H200 at true size: items or pictures a second.
AIMS = {
    "unet_only": 150,
    "stage2_2": 100,
    "drawing_ddim50": 4.5,
    "drawing_20": 11,
    "latency": 2.5,
}
TRAINING = ("stage", "compiled", "batch", "items/s", "aim", "ms", "first step, s", "GiB", "estimate", "off by")
DRAWING = ("drawing", "compiled", "batch", "steps", "pictures/s", "aim", "s a batch", "first, s", "GiB", "levels")


def parts_of_page(path: Path) -> tuple[str, str]:
    """What stands before and after the tables of the page ``path``; MedSoftError if it has no place for them."""
    text = read_text(path, "page")
    before, mark, rest = text.partition(BEGIN)
    _, last, after = rest.partition(END)
    if not mark or not last:
        raise MedSoftError(f"{path}: expected the lines {BEGIN} and {END}, between which the tables belong")
    return before, after


def write_document(path: Path, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Put the tables of ``results`` between the marks of the page ``path``."""
    before, after = parts_of_page(path)
    write_text(path, f"{before}{BEGIN}\n{measured(about, results)}\n{END}{after}")


def measured(about: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The tables, with what they were measured on; what failed, by name."""
    sound = [row for row in results if "failed" not in row]
    dates = sorted({row["date"] for row in sound}) or ["never"]
    where = f"{about['device']}, torch {about['torch']}, {about['config']}, commit {about['commit']}, {dates[-1]}"
    training = [training_cells(row) for row in sound if "stage" in row]
    drawing = [drawing_cells(row) for row in sound if row.get("sampling") is not None and "stage" not in row]
    tests = [row["counts"] for row in sound if "counts" in row]
    parts = [f"Measured on {where}."]
    parts += [markdown_table(TRAINING, training)] if training else []
    parts += [markdown_table(DRAWING, drawing)] if drawing else []
    parts += [f"Tests that need a GPU: {', '.join(f'{n} {what}' for what, n in each.items())}." for each in tests]
    parts += [f"`{row['step']}` failed: {row['failed']}" for row in results if "failed" in row]
    return "\n\n".join(["", *parts, ""])


def training_cells(row: dict[str, Any]) -> tuple[object, ...]:
    """A line of ``TRAINING``."""
    seconds, memory = row["batch"] / row["per_second"], row["memory"]
    off = "-" if memory is None else f"{memory / row['estimate'] - 1:+.0%}"
    numbers = f"{1000 * seconds:.0f}", f"{row['first']:.1f}", _gib(memory), _gib(row["estimate"]), off
    speed = f"{row['per_second']:.1f}", AIMS.get(row["stage"], "-")
    return row["stage"], "yes" if row["compiled"] else "no", row["batch"], *speed, *numbers


def drawing_cells(row: dict[str, Any]) -> tuple[object, ...]:
    """A line of ``DRAWING``; levels: of 255, the largest difference to eager float32."""
    name = row["step"].removesuffix("_compiled")
    seconds, levels = row["batch"] / row["per_second"], row["difference"]
    speed = f"{row['per_second']:.2f}", AIMS.get(name, "-")
    numbers = f"{seconds:.2f}", f"{row['first']:.1f}", _gib(row["memory"]), "-" if levels is None else levels
    return name, "yes" if row["compiled"] else "no", row["batch"], row["steps"], *speed, *numbers


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / GIB:.1f}"
