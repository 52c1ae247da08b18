"""The page that classifier.py leaves beside its numbers."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from toy import make_set, make_world, metrics_of, rows_of, run, synthetic_set

from ldm.data.images import read_image
from ldm.reports.figures import write_figure


class Page(HTMLParser):
    """Images and section anchors of a page whose tags are balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.sections: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(known["src"])
        if tag == "section":
            self.sections.append(known["id"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One epoch on tiny pictures, with synthetic ones, a test set whose prompts hold markup, and its figures."""
    root = tmp_path_factory.mktemp("tested")
    settings = make_world(root)
    make_set(root / "test", "more", 12, 40)
    for prompt in (root / "test").glob("*/prompt.txt"):
        if prompt.read_text() != "healthy":
            prompt.write_text("lesion <b>of</b> L3")
    settings |= {"synthetic": [synthetic_set(root / "results", "train-patient0", "train000")], "dataset": "toy & co"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.reports.html.write_figure", write_figure)
        assert run(settings) == 0
    return settings


def test_page_opens_from_disk_with_every_section(tested: dict) -> None:
    folder = Path(tested["output_dir"])
    page = Page(folder / "report.html")
    assert page.sections == ["numbers", "training", "curves", "calibration", "features", "mistakes"]
    for source in page.images:
        assert len(np.unique(read_image(folder / source))) > 8, source
    plots = {Path(source).stem for source in page.images if "mistake" not in source}
    assert plots == {"loss_train", "val_auc", "roc", "pr", "confusion", "reliability", "tsne"}
    assert {path.stem for path in (folder / "report_files").iterdir()} == {Path(source).stem for source in page.images}
    assert "toy &amp; co" in page.text
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text)
    auc = metrics_of(tested)["test"]["auc"]
    value, interval = f"{auc['value']:.3f}", f"{auc['low']:.3f} to {auc['high']:.3f}"
    assert f'<td>AUC</td><td class="number">{value}</td><td>{interval}</td>' in page.text
    assert "sensitivity at 95 % specificity" in page.text
    assert "n train" not in page.text


def test_worst_mistakes_are_the_most_confident_wrong_ones(tested: dict) -> None:
    folder = Path(tested["output_dir"])
    rows = rows_of(folder / "predictions_test.csv")
    wrong = [row for row in rows if row["predicted"] != row["label"]]
    assert wrong
    expected = sorted(wrong, key=lambda row: (-float(row[f"p_{row['predicted']}"]), row["sample_id"]))
    page = Page(folder / "report.html")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.text)
    assert [caption.split("<br>")[-1] for caption in captions] == [row["sample_id"] for row in expected]
    for caption, row in zip(captions, expected, strict=True):
        chance = float(row[f"p_{row['predicted']}"])
        assert caption.startswith(f"{row['label']}, called {row['predicted']} with P {chance:.3f}")
    assert "<b>of</b>" not in page.text
    assert any("lesion &lt;b&gt;of&lt;/b&gt; L3" in caption for caption in captions) or all(
        row["label"] == "healthy" for row in expected
    )
    first = read_image(folder / "report_files" / "mistake_00.png")
    original = read_image(Path(tested["test_json"]) / expected[0]["sample_id"] / "image.png")
    assert np.array_equal(first, original)  # the toy pictures have the network's size


def test_another_run_leaves_no_picture_of_the_one_before(tested: dict) -> None:
    folder = Path(tested["output_dir"])
    (folder / "report_files" / "mistake_99.png").write_bytes(b"old")
    assert run(tested | {"seed": 1}, "--overwrite") == 0
    assert not (folder / "report_files" / "mistake_99.png").exists()
    assert Page(folder / "report.html").sections


def test_the_map_of_features_may_show_no_image_of_one_of_the_sets(
    tested: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where few synthetic images stand beside thousands to test on."""
    monkeypatch.setattr("ldm.classifier.report.MOST_POINTS", 1)
    assert run(tested | {"seed": 2}, "--overwrite") == 0
    assert "tsne" not in {path.stem for path in (Path(tested["output_dir"]) / "report_files").iterdir()}


def test_perplexity_is_lowered_where_points_are_few() -> None:
    from ldm.classifier.report import embed

    rng = np.random.default_rng(0)
    for count, expected in ((10, 3), (31, 10), (200, 30)):
        points, perplexity = embed(rng.normal(size=(count, 8)).astype(np.float32))
        assert points.shape == (count, 2)
        assert perplexity == expected
        assert np.isfinite(points).all()
    rare = np.arange(4, dtype=np.float32).repeat(10)[:, None] * np.ones(4, np.float32)
    for alike in (np.ones((40, 4), np.float32), rare):  # a network that gives the same for many pictures
        assert embed(alike)[0] is None
