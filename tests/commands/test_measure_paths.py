"""tool/measure_paths.py on phantoms: what it measures, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLIP, PHANTOM, call

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.preparation import prepare
from ldm.mechanism.paths import PATHS, REDRAWN, PathInpainter, cosines_of_type_means
from ldm.networks.model import hidden_region
from ldm.networks.msc import ControllerInputs
from ldm.networks.opening import open_model
from tool import measure_paths

LIMIT = 3


def measured(ckpt: Path, data: Path, judge: Path, output: Path) -> dict[str, Any]:
    flags = ["--ckpt", ckpt, "--config", PHANTOM, "--data", data, "--judge", judge, "--output", output]
    assert call(measure_paths, *flags, "--limit", LIMIT, "sampling.steps=2", f"biomedclip.path={CLIP}") == 0
    return json.loads(output.read_text())


def test_a_trained_model_depends_on_its_tokens(final: Path, world: Path, judge: Path, tmp_path: Path) -> None:
    found = measured(final, world / "data", judge, tmp_path / "a.json")
    assert found["samples"] == {"healthy": LIMIT, "diseased": LIMIT}
    assert tuple(found["drawings"]) == PATHS
    assert tuple(found["redrawn"]) == (*REDRAWN, "themselves")
    held_out = found["held_out"]
    for name in ("zero_tokens", "other_tokens", "true_tokens", "other_text", "empty_text"):
        assert abs(held_out[f"added_by_{name}"]["mean"]) > 1e-7
    assert held_out["loss_inside"]["mean"] > 0
    assert measured(final, world / "data", judge, tmp_path / "b.json") == found  # the same command, the same numbers


def test_cosine_of_the_tokens_by_hand(final: Path, world: Path, judge: Path, tmp_path: Path) -> None:
    """On the lesions of the first of each type, in the order of the types' names."""
    config = load_config(PHANTOM, [f"biomedclip.path={CLIP}"])
    samples = [each for each in load_samples(world / "data")[0] if not each.healthy and each.severity != "subtle"]
    first: dict[Any, Any] = {}
    for sample in samples:
        first.setdefault(sample.lesion_type, sample)
    chosen = [first[name] for name in sorted(first)][:LIMIT]
    assert len(chosen) == LIMIT
    write_annotations(
        tmp_path / "few.json", [*chosen, *(each for each in load_samples(world / "data")[0] if each.healthy)]
    )
    net, clip = open_model(config, read_checkpoint(final))
    values = []
    for sample in chosen:
        prepared = prepare(sample, config.data, 0, 0)
        image, mask = prepared.image[None], prepared.mask[None]
        with torch.no_grad():
            context = clip.encode_image(image, hidden_region(mask))
            predicted, _ = net.msc(ControllerInputs(*context, clip.encode_text([sample.prompt]), mask))
            true, _ = clip.encode_image(image)
        soft = torch.nn.functional.adaptive_max_pool2d(mask, 10).flatten()
        similar = (predicted * true).sum(2) / (predicted.norm(dim=2) * true.norm(dim=2))
        values.append(float((similar[0] * soft).sum() / soft.sum()))
    held_out = measured(final, tmp_path / "few.json", judge, tmp_path / "a.json")["held_out"]
    assert held_out["cosine"]["mean"] == pytest.approx(np.mean(values), abs=1e-4)


def test_what_redraws_a_lesion(final: Path, world: Path) -> None:
    config = load_config(PHANTOM, [f"biomedclip.path={CLIP}"])
    net, clip = open_model(config, read_checkpoint(final))
    sample = next(each for each in load_samples(world / "data")[0] if not each.healthy)
    prepared = prepare(sample, config.data, 0, 0)
    image, mask = prepared.image[None], prepared.mask[None]
    inpainter = PathInpainter(net, clip, config.sampling)
    inpainter.others = ["osteolytic lesion of L1" if "blastic" in sample.prompt else "osteoblastic lesion of L1"]
    given = {}
    with torch.no_grad():
        for inpainter.path in REDRAWN:
            given[inpainter.path] = inpainter.condition(image, mask, [sample.prompt])
        seen, hidden = clip.encode_image(image)[0], clip.encode_image(image, hidden_region(mask))[0]
    soft = torch.nn.functional.adaptive_max_pool2d(mask, 10).flatten()[:, None]
    mixed = (soft * seen[0] + (1 - soft) * hidden[0]).unflatten(0, (10, 10)).permute(2, 0, 1)
    expected = torch.nn.functional.avg_pool2d(mixed, 2).flatten(1).T
    assert torch.allclose(given["true_tokens"][1][0], expected, atol=1e-5)
    assert not torch.allclose(given["both"][1][0], expected, atol=1e-2)
    assert torch.equal(given["both"][0], given["true_tokens"][0])
    with torch.no_grad():
        inpainter.path = "both"
        other = inpainter.condition(image, mask, inpainter.others)
    assert all(torch.equal(one, two) for one, two in zip(given["swapped"], other, strict=True))
    assert not torch.allclose(given["swapped"][0], given["both"][0])


def test_a_lesion_has_no_part_in_the_mean_of_its_type_that_it_is_compared_with() -> None:
    true = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 4.0]]])  # a lesion a row, one patch each
    found = cosines_of_type_means(["a", "a", "b"], true, torch.ones(3, 1))
    assert found.tolist() == [0.0, 0.0]  # of b there is no other one to compare with


def test_where_the_third_attention_is_silent_tokens_do_nothing(
    converted: Path, world: Path, judge: Path, tmp_path: Path
) -> None:
    found = measured(converted, world / "data", judge, tmp_path / "a.json")
    for name in ("zero_tokens", "other_tokens", "true_tokens"):
        assert found["held_out"][f"added_by_{name}"] == {"mean": 0.0, "error": 0.0}
    assert found["drawings"]["both"] == found["drawings"]["text"] == found["drawings"]["crossed"]
    assert found["redrawn"]["both"] == found["redrawn"]["true_tokens"]


def test_what_cannot_be_measured_is_refused(final: Path, world: Path, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: does not exist"):
        measured(final, world / "data", tmp_path / "nowhere", tmp_path / "a.json")
    healthy = [each for each in load_samples(world / "data")[0] if each.healthy]
    write_annotations(tmp_path / "healthy.json", healthy)
    with pytest.raises(MedSoftError, match=r"healthy\.json: expected diseased samples of at least two lesion types"):
        measured(final, tmp_path / "healthy.json", judge, tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
