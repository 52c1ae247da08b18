"""tool/bench.py at phantom size."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tool"))

import bench  # noqa: E402


def test_inference_measures_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = ["inference", "--config", str(ROOT / "models" / "phantom.yaml"), "--batch_size", "1", "--repeats", "1"]
    flags += ["--steps", "2", "--output", str(tmp_path / "bench.json"), "--precision", "bf16-true"]
    assert bench.main(bench.build_parser().parse_args(flags)) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["precision"], found["steps"], found["batch_size"]) == ("bf16-true", 2, 1)
    names = [row["what"] for row in found["measured"]]
    assert names[:5] == [
        "U-Net call with guidance",
        "U-Net call with the prompt alone",
        "encoded picture",
        "decoded picture",
        "picture, 2 steps of DDIM with guidance",
    ]
    assert names[5:] == [
        "50 steps of DDIM with guidance (sum of the calls)",
        "20 steps of 2M, 17 guided / 50 of DDIM (sum of the calls)",
    ]
    guided, prompted, encoding, decoding, _, equal, fast = found["measured"]
    ends = 2 * encoding["ours_s"] + decoding["ours_s"]
    assert equal["ours_s"] == pytest.approx(50 * guided["ours_s"] + ends)
    assert fast["ours_s"] == pytest.approx(17 * guided["ours_s"] + 3 * prompted["ours_s"] + ends)
    for row in (equal, fast):
        assert row["theirs_s"] == pytest.approx(50 * guided["theirs_s"] + encoding["theirs_s"] + decoding["theirs_s"])
    for row in found["measured"]:
        assert row["ratio"] == pytest.approx(row["theirs_s"] / row["ours_s"])
        assert row["ours_s"] > 0
        assert any(line.startswith(row["what"]) for line in caplog.messages)
