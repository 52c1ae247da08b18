"""HTML pages from the Jinja2 templates beside this file; whatever a template shows is escaped. No torch.

A page lies beside a folder ``<page>_files`` that holds its images, and opens from disk: nothing is loaded from anywhere
else.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ldm.core.files import write_text
from ldm.data.png import write_png
from ldm.reports.figures import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBER = re.compile(r"<?[+-]?\d+(\.\d+)?|[–-]")
TEMPLATES = Path(__file__).with_name("templates")


def number(value: Any) -> str:
    """A value for a reader: floats with three decimals, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def numeric_columns(count: int, rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Of each of ``count`` columns, whether it holds numbers, written ones too, and no other text."""
    found = []
    for place in range(count):
        values = [row[place] for row in rows if place < len(row) and row[place] is not None]
        found.append(bool(values) and all(NUMBER.fullmatch(number(each)) for each in values))
    return found


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["number"] = number
    made.globals["numeric_columns"] = numeric_columns
    return made


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Write the page ``path`` from ``templates/<template>.html``, which names every value that it needs."""
    write_text(path, _environment().get_template(f"{template}.html").render(values))


def files_folder(page_path: str | Path) -> Path:
    """The folder of a page's images: ``report.html`` -> ``report_files``."""
    path = Path(page_path)
    return path.with_name(path.stem + "_files")


def write_image(page_path: str | Path, name: str, content: "np.ndarray | Figure") -> str:
    """Write pixels or a figure as ``<page>_files/<name>.png``; returns the path to use inside the page."""
    target = files_folder(page_path) / f"{name}.png"
    if isinstance(content, np.ndarray):
        write_png(target, content)
    else:
        write_figure(target, content)
    return f"{target.parent.name}/{target.name}"
