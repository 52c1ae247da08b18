"""Compiled drawing: the same images up to rounding, one graph for all batches; a failure is said and does no harm."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_infer_scale import files_of, images_of
from tiny import TRAIN, call, dataset_infer, infer, metas, record
from torch import nn

from ldm.core.errors import MedSoftError, UsageError
from ldm.inference import inpainter as compiling
from ldm.inference.inpainter import CompiledForward


def draw(final: Path, output: Path, world: Path, *more: Any) -> int:
    """Four diseased samples in batches of three: the last one has one image."""
    given = ["--data", world / TRAIN, "--train_json", world / TRAIN, "--choose", "diseased", "--batch_size", 3]
    return infer(final, output, *given, *more)


def test_compiled_networks_draw_the_same_images(
    world: Path, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Traced, but run without a C++ compiler, which would take minutes."""
    caplog.set_level("INFO")
    words = ("--guidance_interval", 0, 0.5, *small.sizes)
    rows = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        rows.append(max(len(each) for each in inputs if isinstance(each, torch.Tensor) and each.ndim == 4))
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", counted)
    assert draw(small.last, tmp_path / "plain", world, *words) == 0
    assert not rows
    assert draw(small.last, tmp_path / "compiled", world, *words, "--compile") == 0
    assert (
        len(rows) == 4
    )  # encoder, decoder, U-Net with and without guidance; none again for the image that is left over
    plain, compiled = images_of(tmp_path / "plain"), images_of(tmp_path / "compiled")
    assert len(plain) == 4
    assert plain.keys() == compiled.keys()
    assert max(np.abs(image - compiled[name]).max() for name, image in plain.items()) <= 2
    assert "cannot be compiled" not in caplog.text
    # What differs is rounding: the other way of computing is no other run.
    assert draw(small.last, tmp_path / "compiled", world, *words) == 0
    assert "already complete" in caplog.text
    assert record(tmp_path / "plain")["pictures"] == 4


def test_a_compiler_that_fails_is_named_and_the_run_goes_on(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*inputs: Any) -> Any:
        raise RuntimeError("no such instruction\nand much more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    assert draw(final, tmp_path / "plain", world, "--batch_size", 4) == 0
    caplog.clear()
    assert draw(final, tmp_path / "compiled", world, "--batch_size", 4, "--compile") == 0
    reason = "(RuntimeError: no such instruction); the run goes on with it uncompiled"
    said = [line for line in caplog.messages if "cannot be compiled" in line]
    assert said == [f"warning: the {name} cannot be compiled {reason}" for name in ("encoder", "U-Net", "decoder")]
    assert "Traceback" not in caplog.text
    plain, compiled = files_of(tmp_path / "plain"), files_of(tmp_path / "compiled")
    images = [name for name in plain if name.endswith("image.png")]
    assert len(images) == 4
    assert all(plain[name] == compiled[name] for name in images)


def test_memory_that_runs_out_is_no_failure_of_the_compiler(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    with pytest.raises(MedSoftError, match="out of memory with batches of 3"):
        draw(final, tmp_path / "out", world, "--compile")


def test_the_same_image_again_and_exact_files_are_not_compiled(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(forward) or forward)
    with pytest.raises(UsageError, match="--exact gives equal files on every run; --compile"):
        infer(final, tmp_path / "out", "--data", world / TRAIN, "--compile", "--exact")
    assert draw(final, tmp_path / "out", world, "--limit", 1, "--compile") == 0
    assert len(compiled) == 3
    (name,) = metas(tmp_path / "out")
    flags = ["--replay", tmp_path / "out" / name / "meta.json", "--output_dir", tmp_path / "again", "--device", "cpu"]
    assert call(dataset_infer, *flags) == 0
    assert len(compiled) == 3
    both = [images_of(tmp_path / folder)[name] for folder in ("out", "again")]
    assert np.abs(both[0] - both[1]).max() <= 2


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package says; torch's own messages are left out."""
    ours = [record for record in caplog.records if record.name.startswith("ldm")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def test_what_the_compiler_says_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise AssertionError("no kernel for this device")

    monkeypatch.setattr(compiling, "BACKEND", fails)
    network = nn.Linear(2, 3)
    forward = CompiledForward("the network", network)
    for _ in range(2):
        assert torch.equal(forward(torch.ones(1, 2)), network(torch.ones(1, 2)))
    assert warnings(caplog) == [
        "warning: the network cannot be compiled (AssertionError: no kernel for this device); the run goes on with it "
        "uncompiled"
    ]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_machine_code_computes_what_the_network_computes(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8))
    x = torch.randn(3, 6)
    expected = network(x).detach()
    network.forward = CompiledForward("the network", network)
    with torch.inference_mode():
        assert torch.allclose(network(x), expected, atol=1e-5)
        assert torch.allclose(network(x[:2]), expected[:2], atol=1e-5)
    assert network.forward.compiled is not None
    assert not warnings(caplog)
