"""report.html beside drawn pictures: what it shows, what it weighs, and how it looks in a browser."""

import dataclasses
import json
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from test_report import Page
from tiny import TRAIN, infer, metas

from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.inference.gallery import PANELS, TILE, measures, write_gallery


class Cards(Page):
    """Its articles too, with their prompt, image and text."""

    def __init__(self, path: Path) -> None:
        self.cards: list[dict] = []
        super().__init__(path)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        known = dict(attrs)
        if tag == "article":
            self.cards.append({"prompt": known["data-prompt"], "text": ""})
        if tag == "img":
            self.cards[-1] |= {"source": known["src"], "loading": known["loading"], "alt": known["alt"]}

    def handle_data(self, data: str) -> None:
        if "article" in self.open:
            self.cards[-1]["text"] += data


def drawn(folder: Path, number: int, parent: Path, prompt: str) -> None:
    """One result by hand: a square of the parent brightened in full, beside a soft border."""
    folder.mkdir(parents=True)
    image = read_image(parent).copy()
    soft = np.zeros(image.shape[:2], np.uint8)
    soft[10:20, 10:20], soft[12:18, 12:18] = 100, 255
    image[12:18, 12:18] = np.minimum(image[12:18, 12:18].astype(int) + 51, 255).astype(np.uint8)
    write_png(folder / "image.png", image)
    write_png(folder / "soft_mask.png", soft)
    write_png(folder / "mask.png", np.where(soft == 255, soft, 0).astype(np.uint8))
    (folder / "prompt.txt").write_text(prompt)
    meta = {"parent_id": "p", "parent_image": str(parent), "seed": number, "variant": 0, "synthetic": True}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_every_name_has_an_image_that_a_browser_finds(tmp_path: Path) -> None:
    """Signs with a meaning in links, folders in folders beside their flat spelling, and deep DICOM UIDs."""
    uid = "1.2.826.0.1.3680043.8.498." + "1" * 38
    names = ["50%20", "case #1", "what?", "p1/L3", "p1__L3", "a & b", "\u80f8\u690e", f"{uid}/{uid}/{uid}/{uid}/{uid}"]
    write_png(tmp_path / "parent.png", np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8))
    for number, name in enumerate(names):
        drawn(tmp_path / "out" / f"{name}__v0", number, tmp_path / "parent.png", "a lesion")
    write_gallery(tmp_path / "out")
    page = Cards(tmp_path / "out" / "report.html")
    assert {card["alt"].split(" of ", 1)[1] for card in page.cards} == {f"{name}__v0" for name in names}
    files = [urllib.parse.unquote(urllib.parse.urlsplit(card["source"]).path) for card in page.cards]
    assert len(set(files)) == len(names)
    assert all((tmp_path / "out" / file).is_file() for file in files)
    write_gallery(tmp_path / "out")  # what is there is kept
    assert len(list((tmp_path / "out" / "report_files").glob("*.png"))) == len(names)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")
def test_a_long_name_makes_the_page_no_wider(tmp_path: Path) -> None:
    write_png(tmp_path / "parent.png", np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8))
    drawn(tmp_path / "out" / f"{'1' * 200}__v0", 0, tmp_path / "parent.png", "osteolytic" * 40)
    with Browser(tmp_path) as browser:
        browser.open(write_gallery(tmp_path / "out").resolve().as_uri())
        width, window = browser.run("[document.documentElement.scrollWidth, innerWidth]")
        told = browser.run("document.getElementById('count').textContent")
    assert width == window
    assert told == "1 image"


def test_every_run_leaves_a_report_of_its_pictures(results: Path) -> None:
    page = Cards(results / "report.html")
    found = metas(results)
    assert len(page.cards) == len(found) == 5
    for card, (name, meta) in zip(page.cards, found.items(), strict=True):
        prompt = (results / name / "prompt.txt").read_text().strip()
        assert card["prompt"] == prompt.lower()
        assert prompt in card["text"]
        assert card["loading"] == "lazy"
        assert card["alt"] == f"{', '.join(PANELS)} of {name}"
        assert f"seed {meta['seed']}" in card["text"]
        assert "changed outside 0" in card["text"]
        assert "seam " in card["text"]
        assert "change inside 0." in card["text"]
        assert read_image(results / card["source"]).shape == (TILE, 4 * TILE, 3)
    assert all(source.startswith("report_files/") for source in page.images)
    assert not page.links
    assert "http" not in page.text


def test_report_is_made_again_where_it_is_missing_and_kept_where_not(final: object, world: Path, results: Path) -> None:
    out = results.with_name("copied")  # beside the data, so that the parents are found
    shutil.copytree(results, out)
    before = {file: file.stat().st_mtime_ns for file in (out / "report_files").iterdir()}
    assert len(before) == 10
    gone = min(before)
    gone.unlink()
    (out / "report_files" / "removed__v0.png").write_bytes(b"of an image that is no longer there")
    write_gallery(out)
    after = {file: file.stat().st_mtime_ns for file in (out / "report_files").iterdir()}
    assert set(after) == set(before)
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {gone, gone.with_suffix(".png"), gone.with_suffix(".json")} & set(before)


def test_the_numbers_are_those_of_the_pixels(tmp_path: Path) -> None:
    from ldm.reports.comparison import read_all_results, read_result

    write_png(tmp_path / "p.png", np.full((32, 32), 100, np.uint8))
    drawn(tmp_path / "out" / "a__v0", 0, tmp_path / "p.png", "lytic <b>lesion</b>")
    (picture,) = map(read_result, read_all_results(tmp_path / "out"))
    # 6 x 6 of the 6 x 6 pixels that are at least half soft are 0.2 brighter; the flat original has no gradient
    assert measures(picture) == {"outside": 0, "seam": None, "inside": 0.2}
    touched = picture.result.copy()
    touched[0, 0] = 7
    assert measures(dataclasses.replace(picture, result=touched))["outside"] == 1
    write_gallery(tmp_path / "out")
    page = Cards(tmp_path / "out" / "report.html")
    assert page.cards[0]["prompt"] == "lytic <b>lesion</b>"
    assert "&lt;b&gt;lesion" in page.text


def test_two_thousand_pictures_make_four_light_pages(tmp_path: Path) -> None:
    """A page stays small, its pictures are loaded one by one; nothing but thumbnails and pages lies beside it."""
    write_png(tmp_path / "p.png", np.random.default_rng(0).integers(0, 200, (32, 32), dtype=np.uint8))
    first = tmp_path / "out" / "s0000__v0"
    drawn(first, 0, tmp_path / "p.png", "severe lytic lesion")
    write_gallery(tmp_path / "out")
    thumbnails = tmp_path / "out" / "report_files"
    for number in range(1, 2000):  # copies: what is measured is the page, not the drawing
        copy = tmp_path / "out" / f"s{number:04d}__v0"
        copy.mkdir()
        for file in first.iterdir():
            (copy / file.name).hardlink_to(file)
        for suffix in (".png", ".json"):
            (thumbnails / f"{copy.name}{suffix}").hardlink_to(thumbnails / f"{first.name}{suffix}")
    before = {file.name for file in thumbnails.iterdir()}
    pages = [write_gallery(tmp_path / "out"), *(thumbnails / f"page_{number}.html" for number in (2, 3, 4))]
    found = [Cards(page) for page in pages]
    shown = [card["alt"].split(" of ")[1] for page in found for card in page.cards]
    assert shown == [f"s{number:04d}__v0" for number in range(2000)]
    for page, parsed in zip(pages, found, strict=True):
        assert len(parsed.cards) == 500
        assert page.stat().st_size < 375_000  # 750 bytes a picture: no image is embedded
        # A browser opens it with the first pictures alone: one file each, of known size, when it comes into view.
        assert len({card["source"] for card in parsed.cards}) == 500
        assert all(card["loading"] == "lazy" and (page.parent / card["source"]).is_file() for card in parsed.cards)
        assert page.read_text().count(f'<img loading="lazy" width="{4 * TILE}" height="{TILE}"') == 500
        assert "content-visibility: auto" in page.read_text()
        assert {(page.parent / link).resolve() for link in parsed.links} == {*pages} - {page}
        assert "2000 synthetic images, page " in page.read_text()
    new = {"page_2.html", "page_3.html", "page_4.html"}
    assert {file.name for file in thumbnails.iterdir()} == before | new  # nothing was drawn again
    assert all(file.stat().st_size < 200_000 for file in thumbnails.iterdir() if file.suffix != ".html")
    for number in range(700, 2000):
        shutil.rmtree(tmp_path / "out" / f"s{number:04d}__v0")
    assert len(Cards(write_gallery(tmp_path / "out")).cards) == 500
    assert len(Cards(pages[1]).cards) == 200
    assert sorted(file.name for file in thumbnails.glob("*.html")) == ["page_2.html"]
    assert len(list(thumbnails.glob("*.png"))) == 700


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_screenshot_shows_the_pictures(final: Path, world: Path, tmp_path: Path) -> None:
    assert infer(final, tmp_path / "out", "--train_json", world / TRAIN, "--limit", 2) == 0
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,900"]
    page = (tmp_path / "out" / "report.html").as_uri()
    subprocess.run([CHROMIUM, *flags, f"--screenshot={shot}", page], check=True, timeout=120, capture_output=True)
    seen = read_image(shot)
    strip = read_image(min((tmp_path / "out" / "report_files").glob("*.png")))
    assert seen.shape[:2] == (900, 1100)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 0.1 * len(np.unique(strip.reshape(-1, 3), axis=0))
    counted = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page], check=True, timeout=120, capture_output=True, text=True
    )
    assert "2 images</span>" in counted.stdout  # the script ran
