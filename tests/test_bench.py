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
    assert len(names) == 5
    assert [name.split(",")[0] for name in names[2:]] == ["decoded picture", "picture", "picture"]
    for row in found["measured"]:
        assert row["ratio"] == pytest.approx(row["theirs_s"] / row["ours_s"])
        assert row["ours_s"] > 0
        assert any(line.startswith(row["what"]) for line in caplog.messages)
