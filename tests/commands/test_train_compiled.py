"""Training whose networks are compiled: the same weights, once a run, and without a compiler too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STAGES, changed, tensors, train

from ldm.core.errors import UsageError

GIVEN = {"batch_size": 4, "max_epochs": 2, "pictures": 1}  # nine samples: the last batch of an epoch is one


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch.compiler.reset()  # what other tests have compiled
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: plain(self, dynamic=dynamic, backend=backend))


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("stage2_2", {}),
        ("unet_only", {"activation_checkpointing": "true"}),
        ("unet_only", {"precision": "bf16-mixed"}),
    ],
)
def test_compiled_networks_train_like_plain_ones(
    world: Path, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, more: dict
) -> None:
    """Traced but run without a C++ compiler, which would take minutes; once through AOT autograd too."""
    networks = 3 if stage == "stage2_2" else 1  # the middle block's projection is one
    graphs, runs = [], []

    def counted(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(len(graphs))
        forward = graph.forward if more else torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*values: Any) -> Any:
            runs.append(torch.is_grad_enabled())
            return forward(*values)

        return run

    compile_with(monkeypatch, counted)
    for name, chosen in (("plain", "false"), ("compiled", "true")):
        words = [f"training.compile={chosen}", "training.rates.attn3=0.01", "sampling.steps=2", *small.sizes]
        words += ["training.alignment_weight=0.5"] * (networks == 3)
        assert train(stage, small.last, tmp_path / name, world, *words, **GIVEN, **more) == 0
    if "activation_checkpointing" in more:  # blocks that are computed again are graphs of their own
        assert 1 < len(graphs) < 16
    else:
        assert len(graphs) == networks  # not again for the last, smaller batch, validation or pictures
        assert len(runs) == 5 * networks  # four full batches, of which the first is also what is compiled on
    assert all(runs)
    without, with_it = (tensors(tmp_path / name / "last.ckpt") for name in ("plain", "compiled"))
    assert without.keys() == with_it.keys()
    assert changed(tensors(small.last), with_it)
    exact = 1e-2 if torch.cuda.is_available() or more.get("precision") else 1e-4  # convolutions in TF32 there
    assert max(float((without[key] - with_it[key]).abs().max()) for key in without) < exact


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("unet_only", "stage2_2")])  # see above
def test_every_stage_is_compiled_whole(
    world: Path, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """One graph for each network that a step runs; forward and backward pass through AOT autograd."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compile_with(monkeypatch, counted)
    words = ["training.compile=true", *small.sizes]
    assert train(stage, small.last, tmp_path / "s", world, *words, batch_size=4) == 0
    assert len(graphs) == (2 if stage.startswith("stage2") else 1)
    assert changed(tensors(small.last), tensors(tmp_path / "s" / "last.ckpt"))


def test_without_a_compiler_training_goes_on_uncompiled(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list) -> Any:
        raise RuntimeError("No working C++ compiler found\nsearched: g++")

    compile_with(monkeypatch, broken)
    for name, chosen in (("plain", "false"), ("compiled", "true")):
        words = [f"training.compile={chosen}"]
        assert train("stage1", converted, tmp_path / name, world, *words, batch_size=4, max_epochs=2) == 0
    (said,) = [text for text in caplog.messages if "uncompiled" in text]
    assert said.startswith("warning: the networks of a step cannot be compiled (")
    assert "No working C++ compiler found" in said
    assert "\n" not in said
    assert not changed(tensors(tmp_path / "plain" / "last.ckpt"), tensors(tmp_path / "compiled" / "last.ckpt"))


def test_compiled_and_shared_out(world: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training\.compile.* false with training\.strategy=fsdp"):
        train("stage1", converted, tmp_path / "s", world, "training.compile=true", "training.strategy=fsdp")
