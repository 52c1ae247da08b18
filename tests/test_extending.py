"""docs/extending.md, change by change: a toy of each kind goes in through the places that the page names.

Another image-text encoder: tests/networks/test_encoder_seam.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import children
import numpy as np
import pytest
import torch
from tiny import CLIP, MODELS, PHANTOM, PLAIN, ROOT, TRAIN, VAL, call, changed, convert, infer, metas, tensors, train
from torch import Tensor, nn

import ver_openImagesDatasets
import ver_train
from ldm.config import SamplingConfig, TrainingConfig
from ldm.core.errors import MedSoftError
from ldm.core.files import read_json
from ldm.data import annotations
from ldm.data.folders import mask_box
from ldm.data.images import read_image
from ldm.data.masks import read_mask
from ldm.data.samples import Reject, Sample
from ldm.diffusion.samplers import SAMPLERS, ddim
from ldm.networks.msc import ControllerInputs, MedicalSemanticController
from ldm.training.objectives import OBJECTIVES, Losses, diffusion_objective, msc_objective


def allow(monkeypatch: pytest.MonkeyPatch, section: type, name: str, *choices: str) -> None:
    """Add ``choices`` to what a field of the configuration may be, as an edit of its ``Literal`` does."""
    item = next(item for item in dataclasses.fields(section) if item.name == name)
    monkeypatch.setattr(item, "type", Literal[(*item.type.__args__, *choices)])


class ScaledController(MedicalSemanticController):
    """The MSC with one more parameter, a factor for its predicted tokens."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, inputs: ControllerInputs) -> tuple[Tensor, Tensor]:
        tokens, global_token = super().forward(inputs)
        return tokens * self.factor, global_token


def test_another_msc_is_made_by_conversion_trained_and_loaded(
    world: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("networks.model", "conversion.convert"):
        monkeypatch.setattr(f"ldm.{module}.MedicalSemanticController", ScaledController)
    with pytest.raises(MedSoftError, match=r"msc\.factor"):  # the shipped MSC's checkpoint lacks it
        train("stage1", converted, tmp_path / "old", world)
    assert convert(MODELS / "phantom_base" / "sd-phantom-inpainting.ckpt", tmp_path / "start.ckpt") == 0
    assert train("stage1", tmp_path / "start.ckpt", tmp_path / "stage1", world) == 0
    assert tensors(tmp_path / "stage1" / "last.ckpt")["msc.factor"] != 1


# One more input of the MSC, the share of the image that its mask covers: file -> what stands there, and what instead.
COVERED = {
    "ldm/networks/msc.py": [
        (
            "    mask: Tensor  # (B, 1, H, W)",
            "    covered: Tensor  # (B, 1) share of the image\n    mask: Tensor  # (B, 1, H, W)",
        ),
        ('        "mask": (batch, 1, pixels', '        "covered": (batch, 1),\n        "mask": (batch, 1, pixels'),
        (
            "tail = self.global_in(inputs.context_global)",
            "tail = self.global_in(inputs.context_global + inputs.covered)",
        ),
    ],
    "ldm/features/build.py": [("    contexts = {", '    contexts = {"covered": mask.mean((2, 3)), ')],
    "ldm/inference/inpainter.py": [("(prompts), soft_mask)", "(prompts), soft_mask.mean((2, 3)), soft_mask)")],
}


ONE_AFTER_THE_OTHER = """
import json, runpy, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "ldm"]:
    del sys.modules[name]  # this tree's
sys.path.insert(0, "")
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_another_input_of_the_msc_is_cached_trained_and_inpainted(
    world: Path, converted: Path, trained: dict, one: Path, tmp_path: Path
) -> None:
    """By the edits that the page names, in a copy of this tree, beside features that were cached without it."""
    for name in ("ldm", "models"):
        shutil.copytree(ROOT / name, tmp_path / name)
    scripts = ("ver_train.py", "tool/tool_merge_for_stage2.py", "dataset_infer.py")
    for name in scripts:
        shutil.copy(ROOT / name, tmp_path / Path(name).name)
    shutil.copytree(world / "features", tmp_path / "features")
    for name, edits in COVERED.items():
        text = (tmp_path / name).read_text()
        for before, after in edits:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        (tmp_path / name).write_text(text)

    flags = ["--ckpt", converted, "--config", MODELS / "phantom_stage1.yaml", "--cache_dir", tmp_path / "features"]
    flags += ["--train_json", world / TRAIN, "--val_json", world / VAL, "--save_path", tmp_path / "stage1"]
    training = [*flags, "--biomedclip", CLIP, *(f"{key}={value}" for key, value in PLAIN.items())]
    merged, last = tmp_path / "merged.ckpt", tmp_path / "stage1" / "last.ckpt"
    merging = ["--stage1_path", last, "--input_path", trained["unet_only"].last, "--output_path", merged]
    drawing = ["--ckpt", merged, "--data", one, "--steps", 2, "--output_dir", tmp_path / "out", "--biomedclip", CLIP]
    given = [training, [*merging, "--config", PHANTOM], [*drawing, "--config", PHANTOM]]
    commands = [[Path(name).name, *map(str, words)] for name, words in zip(scripts, given, strict=True)]
    done = children.run("-c", ONE_AFTER_THE_OTHER, json.dumps(commands), folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert changed(tensors(trained["stage1"].last), tensors(last))
    assert list(metas(tmp_path / "out"))


def half_ddim(predict: Any, noise: Tensor, schedule: Any, times: list[int], *more: Any, **named: Any) -> Tensor:
    """DDIM in half of the steps."""
    return ddim(predict, noise, schedule, times[1::2], *more, **named)


def test_another_sampler_is_chosen_by_its_name(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLERS, "half_ddim", half_ddim)
    allow(monkeypatch, SamplingConfig, "sampler", "half_ddim")
    images = {}
    for sampler, steps in (("half_ddim", 4), ("ddim", 2), ("ddim", 4)):
        output = tmp_path / f"{sampler}{steps}"
        flags = ("--sampler", sampler, "--steps", steps, "--step_spacing", "leading", "--guidance_scale", 1, "--exact")
        assert infer(final, output, "--data", one, *flags) == 0
        images[sampler, steps] = read_image(next(output.glob("*/image.png")))
    assert np.array_equal(images["half_ddim", 4], images["ddim", 2])
    assert not np.array_equal(images["half_ddim", 4], images["ddim", 4])


def both_objectives(*given: Any) -> Losses:
    """The diffusion loss and the MSC's own together."""
    found = msc_objective(*given)
    return found._replace(loss=found.loss + diffusion_objective(*given).loss)


def test_another_stage_with_its_own_objective_trains(
    world: Path, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "both", both_objectives)
    allow(monkeypatch, TrainingConfig, "objective", "both")
    stage = tmp_path / "phantom_stage3.yaml"
    stage.write_text(
        f"base: {MODELS / 'phantom_stage2_1.yaml'}\n"
        "training:\n  stage: stage3\n  objective: both\n  rates: {msc: 1.0e-3, attn3: 1.0e-3}\n"
    )
    flags = ["--ckpt", final, "--config", stage, "--save_path", tmp_path / "stage3", "--biomedclip", CLIP]
    for flag, name in (("--train_json", "train"), ("--val_json", "val")):
        flags += [flag, world / f"openimages_format_{name}.json"]
    values = [f"{key}={value}" for key, value in PLAIN.items()]
    assert call(ver_train, *flags, "--cache_dir", world / "features", *values) == 0
    before, after = tensors(final), tensors(tmp_path / "stage3" / "last.ckpt")
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert any(key.startswith("msc.global_head.") for key in moved)  # the MSC's own loss reaches it
    assert any(".attn3." in key for key in moved)
    assert not any(key.startswith("first_stage_model.") for key in moved)


def read_coco_like(path: Path) -> tuple[list[Sample], list[Reject]]:
    """Samples of a JSON with ``images`` and ``annotations`` that point at them; relative to the file's folder."""
    content, folder, samples = read_json(path), path.parent, []
    images = {image["id"]: image for image in content["images"]}
    for each in content["annotations"]:
        image = images[each["image_id"]]
        mask = folder / each["mask"]
        samples.append(
            Sample(
                sample_id=str(each["id"]),
                image=folder / image["file_name"],
                mask=mask,
                prompt=each["caption"],
                box=mask_box(read_mask(mask)),
                patient_id=image["patient"],
            )
        )
    return samples, []


def test_another_data_source_is_read_by_the_commands(
    final: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = annotations.Source(lambda path: path.suffix == ".coco", read_coco_like)
    monkeypatch.setattr(annotations, "SOURCES", [source, *annotations.SOURCES])
    folder = next(one.iterdir())
    image = {"id": 7, "file_name": f"{folder.name}/image.png", "patient": "p"}
    lesion = {"id": 70, "image_id": 7, "mask": f"{folder.name}/mask.png", "caption": "lytic lesion of L3"}
    (one / "data.coco").write_text(json.dumps({"images": [image], "annotations": [lesion]}))
    assert call(ver_openImagesDatasets, "--root_dir", one / "data.coco", "--output_file", tmp_path / "o.json") == 0
    (record,) = read_json(tmp_path / "o_train.json")
    assert (record["sample_id"], record["patient_id"]) == ("70", "p")
    assert infer(final, tmp_path / "out", "--data", one / "data.coco") == 0
    made = metas(tmp_path / "out")
    assert list(made) == ["70__v0"]
    assert made["70__v0"]["patient_id"] == "p"
    assert (tmp_path / "out" / "70__v0" / "prompt.txt").read_text().strip() == "lytic lesion of L3"
