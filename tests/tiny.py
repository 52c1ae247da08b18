"""The shipped commands on phantoms, made small in time by flags; shared by the tests of the commands."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tool")]

import model_convert  # noqa: E402
import tool_merge_for_stage2  # noqa: E402

import dataset_infer  # noqa: E402
import ver_train  # noqa: E402

MODELS = ROOT / "models"
CLIP = MODELS / "phantom_base" / "biomedclip"
SD = MODELS / "phantom_base" / "sd-phantom-inpainting.ckpt"
PHANTOM = MODELS / "phantom.yaml"
STAGES = ("stage1", "unet_only", "stage2_1", "stage2_2")

# Plain steps at the full rate from the first one on, so that what is trained moves, and nothing decays on its own.
PLAIN = {
    "training.precision": "32-true",
    "training.warmup_steps": 0,
    "training.weight_decay": 0,
    "training.max_epochs": 1,
    "training.batch_size": 3,
    "training.balance": "false",
    "data.healthy_masks": 2,
}


def call(module: ModuleType, *argv: Any) -> int:
    """The command's exit code, run in this process; flags in any place, KEY=VALUE anywhere."""
    words = [str(word) for word in argv]
    free = [word for word in words if "=" in word and " " not in word and not word.startswith(("-", "/"))]
    return module.main(module.build_parser().parse_args([word for word in words if word not in free] + free))


def convert(source: Path, output: Path, *more: Any) -> int:
    return call(model_convert, "--input_path", source, "--output_path", output, "--config", PHANTOM, *more)


def merge(stage1: Path, rest: Path, output: Path, *more: Any) -> int:
    flags = ["--stage1_path", stage1, "--input_path", rest, "--output_path", output, "--config", PHANTOM]
    return call(tool_merge_for_stage2, *flags, *more)


def train(
    stage: str, ckpt: Path, save_path: Path, world: Path, *more: Any, family: str = "phantom", **plain: Any
) -> int:
    """ver_train.py with the shipped YAML of ``stage`` on world/train and world/val; ``plain`` overrides PLAIN."""
    flags = ["--ckpt", ckpt, "--config", MODELS / f"{family}_{stage}.yaml", "--save_path", save_path]
    given = [str(word) for word in more]
    for flag, name in (("--train_json", "train"), ("--val_json", "val"), ("--cache_dir", "features")):
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
