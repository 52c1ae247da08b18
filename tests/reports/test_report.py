"""ldm/reports and tool/demo_report.py on a small demo_output with known numbers."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import STAGES

from ldm.core.errors import MedSoftError
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.reports import comparison
from ldm.reports.figures import write_figure
from tool import demo_report

KINDS = ("haemangioma", "osteolytic")


# (lesion type, severity) of the pictures on parents p0, p1, ...; then what the judge says about each, as
# (P(healthy), P(haemangioma), P(osteolytic)): drawn, parent, redrawn healthy, base
WELL, SICK_H, SICK_O, LEAN_H = (0.9, 0.06, 0.04), (0.2, 0.5, 0.3), (0.1, 0.2, 0.7), (0.45, 0.35, 0.2)
CASES = [
    (("osteolytic", "severe"), SICK_O, WELL, WELL, WELL),
    (("osteolytic", "moderate"), SICK_O, WELL, SICK_H, SICK_H),
    (("haemangioma", "severe"), SICK_H, SICK_O, WELL, WELL),
    (("haemangioma", "moderate"), LEAN_H, WELL, WELL, SICK_O),  # not called diseased, type right all the same
    (("osteolytic", "moderate"), SICK_H, WELL, WELL, LEAN_H),  # called diseased, wrong type
    (("haemangioma", "subtle"), WELL, WELL, WELL, SICK_H),
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def prediction(sample_id: str, says: tuple[float, float, float], label: str = "", severity: str = "") -> dict[str, Any]:
    row = {"sample_id": sample_id, "label": label or "healthy", "lesion_type": label, "severity": severity}
    row |= {"disease_probability": says[1] + says[2], "predicted": ("healthy", *KINDS)[int(np.argmax(says))]}
    row["p_healthy"] = says[0]
    return row | {f"p_{kind}": value for kind, value in zip(KINDS, says[1:], strict=True)}


def draw(folder: Path, parent: Path, prompt: str, kind: str | None, severity: str | None, shift: int = 0) -> None:
    """One result: the lesion square brightened, and ``shift`` pixels outside it changed."""
    folder.mkdir(parents=True)
    image = read_image(parent).copy()
    soft = np.zeros((32, 32), np.uint8)
    soft[10:20, 10:20], soft[12:18, 12:18] = 100, 255
    image[12:18, 12:18] = 250
    image[0, :shift] += 1
    write_png(folder / "image.png", image)
    write_png(folder / "soft_mask.png", soft)
    write_png(folder / "mask.png", np.where(soft == 255, soft, 0).astype(np.uint8))
    (folder / "prompt.txt").write_text(prompt)
    meta = {"parent_id": parent.stem, "lesion_type": kind, "severity": severity, "synthetic": True}
    meta |= {"seed": 0, "variant": 0, "parent_image": str(parent)}
    (folder / "meta.json").write_text(json.dumps(meta))


def write_metrics(folder: Path, arm: str = "", **values: float) -> None:
    """metrics.json of a classifier of this arm with these test numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"n_train_healthy": 9, "n_train_diseased": 2, "n_test": 20, "n_test_diseased": 10}
    counts |= {"n_synthetic_used": 6 * (arm == "augmented"), "n_duplicated": 6 * (arm == "duplicated")}
    measured = {key: {"value": value, "low": 0.7, "high": 0.9} for key, value in values.items()}
    (folder / "metrics.json").write_text(json.dumps({"test": measured, **counts}))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    out = tmp_path / "demo_output"
    judged = {name: [] for name in ("results", "results_healthy", "results_base", "openimages_format_train")}
    for n, ((kind, severity), drawn, parent_says, healthy, base) in enumerate(CASES):
        parent = tmp_path / "parents" / f"p{n}.png"
        write_png(parent, np.random.default_rng(n).integers(0, 200, (32, 32), dtype=np.uint8))
        prompt = f"a {severity} {kind} lesion <L{n}>"
        draw(out / "results" / f"p{n}__v0", parent, prompt, kind, severity)
        draw(out / "results_healthy" / f"p{n}__v0", parent, "healthy", None, None, shift=2 if n == 1 else 0)
        draw(out / "results_base" / f"p{n}__v0", parent, prompt, kind, severity, shift=3 if n == 2 else 0)
        for name, says in (("results", drawn), ("results_healthy", healthy), ("results_base", base)):
            judged[name].append(prediction(f"p{n}__v0", says))
        judged["openimages_format_train"].append(prediction(f"p{n}", parent_says))
    judged["heldout"] = [
        prediction("h0", WELL),
        prediction("h1", SICK_O),
        prediction("h2", SICK_O, "osteolytic", "severe"),
        prediction("h3", SICK_O, "haemangioma", "moderate"),
        prediction("h4", WELL, "haemangioma", "subtle"),
    ]
    for name, rows in judged.items():
        write_csv(out / "classifier_judge" / f"predictions_{name}.csv", rows)
    write_metrics(out / "classifier_judge", auc=0.99, type_accuracy=0.9)
    aucs = {"real": (0.8, 0.84), "duplicated": (0.83, 0.85), "augmented": (0.85, 0.89)}
    for arm, values in aucs.items():
        for seed, auc in enumerate(values):
            write_metrics(out / f"classifier_{arm}" / f"seed_{seed}", arm, auc=auc, recall=0.5)
    for stage in STAGES:
        cosine = 0.5 if stage == "stage1" else ""
        rows = [{"epoch": e, "train_loss": 1 / (e + 1), "val_loss": 0.5, "val_cosine": cosine} for e in range(3)]
        write_csv(out / stage / "metrics.csv", rows)
    steps = [{"name": "stage1", "seconds": 90.0}, {"name": "draw", "seconds": 60.0}]
    (out / "stages.json").write_text(json.dumps({"plan": "demo", "steps": steps}))
    return out


def run(folder: Path, *arguments: str) -> int:
    return demo_report.main(demo_report.build_parser().parse_args(["--output_dir", str(folder), *arguments]))


class Page(HTMLParser):
    """Checks that tags are balanced; collects images, anchors and links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.images, self.ids, self.links = [], [], set(), set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "img":
            self.images.append(known["src"])
        if "id" in known:
            self.ids.add(known["id"])
        if tag == "a":
            self.links.add(known["href"])
        if tag not in ("img", "meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_summary_holds_exactly_the_known_numbers(demo: Path) -> None:
    assert run(demo) == 0
    summary = json.loads((demo / "summary.json").read_text())
    expected = {
        "n_pictures": 6,
        "n_moderate_severe": 5,
        "n_subtle": 1,
        "lesion_detection_rate": 4 / 5,
        "parent_detection_rate": 1 / 5,
        "healthy_redraw_detection_rate": 1 / 5,
        "prompt_agreement": 4 / 5,
        "base_detection_rate": 2 / 5,
        "base_prompt_agreement": 1 / 5,
        "chance_agreement": pytest.approx((3 * 1 + 2 * 4) / 25),
        "subtle_detection_rate": 0.0,
        "subtle_prompt_agreement": 1.0,
        "changed_outside_pixels": 5,
        "auc_real": pytest.approx(0.82),
        "auc_duplicated": pytest.approx(0.84),
        "auc_augmented": pytest.approx(0.87),
        "n_synthetic": 6,
        "minutes": 2.5,
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["missed"] == ["lesion_detection_rate", "parent_detection_rate", "changed_outside_pixels"]
    assert summary["by_type"]["osteolytic"]["prompt_agreement"] == pytest.approx(2 / 3)
    judge = summary["judge"]
    assert (judge["test_auc"], judge["test_type_accuracy"]) == (0.99, 0.9)
    assert (judge["heldout_detection_rate"], judge["heldout_type_agreement"]) == (1.0, 0.5)
    assert judge["heldout_false_alarm_rate"] == 0.5
    arms = summary["classifiers"]
    assert arms["augmented"]["auc"]["values"] == [0.85, 0.89]
    assert {arm: (each["n_duplicated"], each["n_synthetic_used"]) for arm, each in arms.items()} == {
        "real": (0, 0),
        "duplicated": (6, 0),
        "augmented": (0, 6),
    }
    change = summary["auc_differences"]["augmented - duplicated"]
    assert change["values"] == pytest.approx([0.02, 0.04])
    half = 12.706 * 0.01  # Student's t for two values: 12.706 times their standard error
    assert [change[key] for key in ("mean", "low", "high")] == pytest.approx([0.03, 0.03 - half, 0.03 + half], abs=1e-4)
    assert arms["augmented"]["auc"]["high"] == 1  # not 0.87 + 12.706 * 0.02
    assert set(summary["auc_differences"]) == {
        "duplicated - real",
        "augmented - real",
        "augmented - duplicated",
    }


def test_one_seed_has_no_interval(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in demo.glob("classifier_*/seed_1"):
        shutil.rmtree(folder)
    caplog.set_level("INFO")
    assert run(demo) == 0
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["classifiers"]["real"]["auc"] == {"mean": 0.8, "low": None, "high": None, "values": [0.8]}
    assert "test AUC real images only: 0.800" in caplog.messages


def test_a_plan_without_classifiers_is_reported_without_them_and_without_the_demos_time(demo: Path) -> None:
    assert run(demo) == 0
    whole = json.loads((demo / "summary.json").read_text())
    for arm in ("real", "duplicated", "augmented"):
        shutil.rmtree(demo / f"classifier_{arm}")
    plan = ("--plan", "configs/large.yaml")
    assert run(demo, *plan) == 0
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["plan"] == "large"
    assert summary["classifiers"] == {}
    assert {key for key in whole if key not in summary} == {
        "auc_real",
        "auc_duplicated",
        "auc_augmented",
        "n_synthetic",
    }
    same = {key for key in summary if summary[key] == whole[key]}
    assert set(summary) - same == {"plan", "classifiers", "auc_differences"}
    page = Page(demo / "report.html")
    assert "No step of the plan trains classifiers" in page.text
    assert "at most 15" not in page.text
    (demo / "results_base").rename(demo / "elsewhere")
    with pytest.raises(MedSoftError, match=r"run_stages.py configs/large.yaml --only draw_base"):
        run(demo, *plan)


def test_a_seed_that_an_arm_lacks_or_has_not_tested_is_named_with_its_step(demo: Path) -> None:
    metrics = demo / "classifier_augmented" / "seed_1" / "metrics.json"
    metrics.write_text('{"n_test": 0}')
    with pytest.raises(MedSoftError, match=r"metrics.json: holds no test AUC; run the step classifier_augmented"):
        run(demo)
    metrics.unlink()
    with pytest.raises(MedSoftError, match=r"seed_1/metrics.json: does not exist; run the step classifier_augmented"):
        run(demo)


def test_the_report_parses_and_everything_it_shows_exists(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its figures are drawn."""
    monkeypatch.setattr("ldm.reports.html.write_figure", write_figure)
    run(demo)
    page = Page(demo / "report.html")
    assert len(page.images) == 1 + 6 * 4 + 5 * 4 + 4 + 1 + 1
    for source in page.images:
        assert (demo / source).is_file()
        assert read_image(demo / source).ndim == 3
    assert page.links == {f"#{anchor}" for anchor in page.ids}
    assert "&lt;L0&gt;" in page.text
    assert "not clinical evidence" in page.text
    assert "http" not in page.text  # opens from disk, without a network
    curves = read_image(demo / "report_files" / "validation.png")
    assert len(np.unique(curves)) > 8
    assert curves.shape[1] > 4 * curves.shape[0]  # four stages side by side
    sheet = read_image(demo / "sheet.png")
    assert sheet.shape[1] == 3 * 288 + 4 * 12
    assert sheet.shape[0] > 5 * 288


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("results", "draw"),
        ("results_healthy", "redraw_healthy"),
        ("results_base", "draw_base"),
        ("classifier_judge/metrics.json", "judge"),
        ("classifier_judge/predictions_results_base.csv", "judge"),
        ("classifier_real/seed_0/metrics.json", "classifier_real"),
        ("classifier_duplicated", "classifier_duplicated"),
        ("unet_only/metrics.csv", "unet_only"),
    ],
)
def test_what_is_missing_is_named_with_its_step(demo: Path, path: str, step: str) -> None:
    (demo / path).rename(demo / "elsewhere")
    with pytest.raises(MedSoftError, match=rf"{path}\S*: does not exist; run the step {step}: .* --only {step}$"):
        run(demo)
    assert not (demo / "summary.json").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedSoftError, match=r"stages.json: does not exist; run the demo"):
        run(tmp_path)


def test_controls_that_do_not_match_the_pictures_are_refused(demo: Path) -> None:
    prompt = demo / "results_base" / "p0__v0" / "prompt.txt"
    right = prompt.read_text()
    prompt.write_text("healthy")
    with pytest.raises(MedSoftError, match=r"inpainted with 'healthy', expected .*; run the step draw_base"):
        run(demo)
    prompt.write_text(right)
    (demo / "results_healthy" / "p1__v0" / "prompt.txt").write_text("lesion")
    with pytest.raises(MedSoftError, match="expected 'healthy'; run the step redraw_healthy"):
        run(demo)


def test_pictures_the_judge_has_not_seen_are_refused(demo: Path) -> None:
    path = demo / "classifier_judge" / "predictions_results.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(MedSoftError, match=r"predictions_results.csv: holds nothing about p4__v0; run the step judge"):
        run(demo)


def test_results_without_their_parent_or_of_another_size_are_refused(demo: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "parents" / "p3.png", np.zeros((16, 32), np.uint8))
    with pytest.raises(MedSoftError, match=r"p3__v0.image.png: uint8 pixels of shape \(32, 32\), but its original"):
        run(demo)
    (tmp_path / "parents" / "p3.png").unlink()
    with pytest.raises(MedSoftError, match=r"p3.png: is not there .*: copy results and data together, or put it back"):
        run(demo)


def test_difference_is_white_where_nothing_changed() -> None:
    original = np.full((4, 5), 0.5, np.float32)
    result = original.copy()
    result[0, 0], result[1, 1] = 1.0, 0.25
    shown = comparison.signed_colours(result, original)
    assert shown[0, 0].tolist() == [255, 0, 0]
    assert shown[1, 1].tolist() == [128, 128, 255]
    shown[0, 0] = shown[1, 1] = 255
    assert (shown == 255).all()


def test_sheet_shows_16_bit_and_colour_pictures(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 400 * 300).reshape(400, 300).astype(np.uint16)
    soft = np.zeros((400, 300), np.float32)
    soft[100:150, 100:160] = 1
    rgb = np.zeros((32, 32, 3), np.uint8)
    pictures = [
        comparison.ResultImage(grey, grey + (soft > 0).astype(np.uint16), soft, (0, 65535)),
        comparison.ResultImage(rgb, rgb + np.uint8(9), np.zeros((32, 32), np.float32), (0, 255)),
    ]
    assert [picture.changed_outside for picture in pictures] == [0, 32 * 32]
    comparison.write_sheet(tmp_path / "sheet.png", [("severe lytic lesion", picture) for picture in pictures])
    assert read_image(tmp_path / "sheet.png").shape == (34 + 2 * (36 + 288) + 12, 3 * 288 + 4 * 12, 3)


def test_rows_take_turns_over_types_and_start_with_the_severe(demo: Path) -> None:
    chosen = comparison.interleave(comparison.read_all_results(demo / "results"), 4)
    assert [(sample.lesion_type, sample.severity) for sample in chosen] == [
        ("haemangioma", "severe"),
        ("osteolytic", "severe"),
        ("haemangioma", "moderate"),
        ("osteolytic", "moderate"),
    ]
