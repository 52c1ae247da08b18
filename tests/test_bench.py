"""tool/bench.py at phantom size."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tool"))

import bench  # noqa: E402


def test_bench_measures_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flags = ["inference", "--config", str(ROOT / "models" / "phantom.yaml"), "--batch_size", "1", "--repeats", "1"]
    assert bench.main(bench.build_parser().parse_args(flags)) == 0
    for name in ("U-Net call", "decoded picture", "third attention"):
        (line,) = [record.message for record in caplog.records if record.message.startswith(name)]
        assert float(line.split("ratio")[1]) > 0
