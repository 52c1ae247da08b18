"""The shipped commands on phantoms, made small in time by flags; shared by the tests of the commands."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import dataset_infer
import ver_train
from ldm.core.errors import MedSoftError
from ldm.data.crop import CropWindow
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.preparation import PreparedSample
from ldm.data.samples import Sample
from ldm.inference.inpainter import InpaintedImage, Inpainter, Job
from tool import export_diffusers, inspect_checkpoint, model_convert, tool_merge_for_stage2

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
CLIP = MODELS / "phantom_base" / "biomedclip"
SD = MODELS / "phantom_base" / "sd-phantom-inpainting.ckpt"
PHANTOM = MODELS / "phantom.yaml"
TRAIN, VAL, TEST = (f"openimages_format_{name}.json" for name in ("train", "val", "test"))
STAGES = ("stage1", "unet_only", "stage2_1", "stage2_2")

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit, or on two devices: on the CPU")

# Plain steps at the full rate from the first one on, so that what is trained moves, and nothing decays on its own.
PLAIN = {
    "training.precision": "32-true",
    "training.warmup_steps": 0,
    "training.weight_decay": 0,
    "training.max_epochs": 1,
    "training.batch_size": 3,
    "training.val_draws": 1,
    "training.balance": "false",
    "training.pictures": 0,
    "data.healthy_masks": 2,
    "data.diseased_crops": 2,
}


@dataclass
class Small:
    """A checkpoint whose U-Net and MSC have every kind of layer once or twice, and the words that give its sizes."""

    last: Path
    sizes: tuple[str, ...] = ("unet.channel_mult=[1,2]", "unet.attention_levels=[]", "msc.layers=1")


def call(module: ModuleType, *argv: Any) -> int:
    """The command's exit code, run in this process; arguments parsed as ``ldm.core.cli.run`` does."""
    return module.main(module.build_parser().parse_intermixed_args([str(word) for word in argv]))


def without_label_1(samples: Iterable[Sample], folder: Path) -> list[Sample]:
    """The samples; the ``anatomy.png`` of diseased ones, written into ``folder``, says that no vertebra is there."""
    changed = []
    for sample in samples:
        if not sample.healthy:
            anatomy = folder / f"{sample.sample_id}.png"
            write_png(anatomy, np.zeros_like(read_image(sample.image)))
            sample = replace(sample, anatomy=anatomy)
        changed.append(sample)
    return changed


def convert(source: Path, output: Path, *more: Any) -> int:
    return call(model_convert, "--input_path", source, "--output_path", output, "--config", PHANTOM, *more)


def refused(source: Path, message: str) -> None:
    """Conversion of ``source`` is refused in one line that begins with its name, and leaves nothing."""
    output = source.parent / "out.ckpt"
    with pytest.raises(MedSoftError, match=message) as caught:
        convert(source, output)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    assert not output.exists()


def merge(stage1: Path, rest: Path, output: Path, *more: Any) -> int:
    flags = ["--stage1_path", stage1, "--input_path", rest, "--output_path", output, "--config", PHANTOM]
    return call(tool_merge_for_stage2, *flags, *more)


def export(ckpt: Path, folder: Path, *more: Any) -> int:
    return call(export_diffusers, "--ckpt", ckpt, "--output_dir", folder, *more)


def inspect(path: Path, *more: Any) -> int:
    return call(inspect_checkpoint, path, *more)


def train(
    stage: str, ckpt: Path, save_path: Path, world: Path, *more: Any, family: str = "phantom", **plain: Any
) -> int:
    """ver_train.py with the shipped YAML of ``stage`` on the world's JSON files; ``plain`` overrides PLAIN."""
    flags = ["--ckpt", ckpt, "--config", MODELS / f"{family}_{stage}.yaml", "--save_path", save_path]
    given = [str(word) for word in more]
    for flag, name in (("--train_json", TRAIN), ("--val_json", VAL), ("--cache_dir", "features")):
        if flag not in given:
            flags += [flag, world / name]
    values = PLAIN | {f"training.{key}": value for key, value in plain.items()}
    return call(ver_train, *flags, *more, "--biomedclip", CLIP, *(f"{key}={value}" for key, value in values.items()))


def infer(ckpt: Path, output: Path, *more: Any) -> int:
    """dataset_infer.py with two sampling steps."""
    flags = ["--ckpt", ckpt, "--config", PHANTOM, "--output_dir", output, "--biomedclip", CLIP, "--steps", 2]
    return call(dataset_infer, *flags, "--device", "cpu", *more)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Keys of ``after`` whose tensor differs from ``before``'s in any bit."""
    return {key for key, value in after.items() if not torch.equal(value, before[key])}


def edit(source: Path, target: Path, **keys: Any) -> Path:
    """A copy of a checkpoint in which ``keep(key, tensor) -> tensor | None`` has looked at every tensor."""
    content = torch.load(source, weights_only=True)
    seen = {key: keys["keep"](key, value) for key, value in content["state_dict"].items()}
    content["state_dict"] = {key: value for key, value in seen.items() if value is not None}
    torch.save(content, target)
    return target


def awake(key: str, value: torch.Tensor) -> torch.Tensor:
    """The third attention's output projection no longer zero, as after unet_only: then gradients pass through it."""
    if ".attn3.to_out." in key:
        generator = torch.Generator().manual_seed(len(key))
        return torch.randn(value.shape, generator=generator) * 0.02
    return value


# ------------------------------------------------------------------------------------------ results of dataset_infer.py


def metas(folder: Path) -> dict[str, dict]:
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/meta.json"))}
    assert found
    return found


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inference.json").read_text())


def whole(folder: Path) -> None:
    """Nothing half-written lies there, and every sample folder has all its files."""
    assert not list(folder.rglob(".partial-*"))
    for meta in folder.rglob("meta.json"):
        names = {file.name for file in meta.parent.iterdir()}
        assert names - {"anatomy.png"} == {"image.png", "mask.png", "soft_mask.png", "prompt.txt", "meta.json"}


def whole_samples(image: torch.Tensor, mask: torch.Tensor) -> list[PreparedSample]:
    """Images (B, 3, S, S) in [-1, 1] and soft masks (B, 1, S, S) as samples of the model's size, which no crop enlarges
    or reduces."""
    side = image.shape[-1]
    original = np.zeros((side, side, 3), np.uint8)
    original[..., 0] = 1  # a colour, since a grey original would make the result grey
    window = CropWindow(0, 0, side, side, side)
    samples = []
    for pixels, own in zip(image, mask, strict=True):
        soft = own[0].numpy()
        samples.append(PreparedSample(original, (0.0, 255.0), soft >= 0.5, soft, window, pixels, own))
    return samples


def stacked(results: Sequence[InpaintedImage]) -> torch.Tensor:
    """What was drawn, before it was composited: (B, 3, S, S) in [-1, 1]."""
    assert [result.error for result in results] == [None] * len(results)
    return torch.from_numpy(np.stack([result.generated for result in results])).permute(0, 3, 1, 2) * 2 - 1


def squares(inpainter: Inpainter, image: torch.Tensor, mask: torch.Tensor, jobs: Sequence[Job]) -> torch.Tensor:
    """What ``inpainter`` draws into model squares, before it is composited: as ``whole_samples`` and ``stacked``."""
    return stacked(inpainter.inpaint(whole_samples(image, mask), jobs))
