"""ldm/reports/html.py: what templates are given is escaped, and what they miss is an error."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from ldm.reports.html import TEMPLATES, number, write_page

STUDY = {
    "conclusion": "a < b",
    "tables": {"Means": (["<arm>"], [["x & y"]])},
    "cells": (["value"], [[0.25], [None]]),
    "compared": {"endpoint": "test AUC", "main": "ours", "control": "copies", "baseline": "real"},
}


def test_everything_that_a_page_is_given_is_escaped(tmp_path: Path) -> None:
    write_page(tmp_path / "study.html", "study", name="<script>", notes=["5 > 3"], **STUDY)
    page = (tmp_path / "study.html").read_text(encoding="utf-8")
    for text in (
        "<h1>Study: &lt;script&gt;</h1>",
        "a &lt; b",
        "<th>&lt;arm&gt;</th>",
        "<td>x &amp; y</td>",
        "5 &gt; 3",
    ):
        assert text in page
    assert '<th class="number">value</th>' in page
    assert '<td class="number">0.250</td>' in page
    assert f'<td class="number">{number(None)}</td>' in page


def test_a_value_that_a_template_names_and_nobody_gives_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        write_page(tmp_path / "study.html", "study", notes=[], **STUDY)
    assert not (tmp_path / "study.html").exists()


def test_pages_load_nothing_from_elsewhere() -> None:
    for template in TEMPLATES.iterdir():
        assert "http" not in template.read_text(encoding="utf-8"), template.name
