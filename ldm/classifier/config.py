"""What the classifier is told: the keys of its JSON, checked before anything is read. No torch."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import NOTHING, WEIGHTS
from ldm.core.errors import UsageError
from ldm.core.files import read_json
from ldm.core.schema import setting

MIX, PRETRAIN, DUPLICATE_REAL = "mix", "pretrain", "duplicate_real"  # what use_synthetic may be
HUB = "hub"  # what pretrained may be besides a path


@dataclass(frozen=True)
class ClassifierConfig:
    """One classifier run. Field names are the JSON's keys; relative paths start at the working directory."""

    img_size: int = setting(224, WEIGHTS)  # side of the square the classifier sees, pixels
    Batch_Size: int = setting(32, WEIGHTS)
    EPOCHS: int = setting(50, WEIGHTS)
    GPU: str | list[int] | list[str] = setting("", NOTHING)  # device ids; "" or [] = a GPU if there is one; "cpu"
    dataset: str = setting("dataset", NOTHING)  # name in titles, and of the output folder where output_dir is null
    train: bool = setting(True, NOTHING)  # false: only test and predict, with the saved classifier
    test_epoch: int | None = setting(None, WEIGHTS)  # null = the epoch chosen on validation, n = epoch n
    save_epoch: int = setting(0, WEIGHTS)  # keep the weights of every n-th epoch; 0 = of the tested epoch only
    train_json: str | None = setting(None, NOTHING)  # annotation JSON or dataset folder
    val_json: str | None = setting(None, NOTHING)
    test_json: str | None = setting(None, NOTHING)
    synthetic: list[str] = setting([], NOTHING)  # result folders of dataset_infer.py
    ratio: float | None = setting(None, WEIGHTS)  # synthetic images per real diseased training image; null = all
    # mix = train on real and synthetic together; pretrain = first on the synthetic and the real healthy images, then on
    # the real ones; duplicate_real (the control) = repeat real diseased images, as many as mix would add at this
    # ratio, and open no synthetic folder
    use_synthetic: str = setting(MIX, WEIGHTS)
    pretrain_epochs: int = setting(10, WEIGHTS)  # with use_synthetic pretrain: epochs before the EPOCHS on real images
    output_dir: str | None = setting(None, NOTHING)  # null = classifier_results/<dataset>
    seed: int = setting(0, WEIGHTS)
    lr: float = setting(1e-3, WEIGHTS)
    weight_decay: float = setting(0.05, WEIGHTS)
    # healthy and diseased count the same: loss = by their weights in it, sampler = by being drawn as often
    balance: str = setting("loss", WEIGHTS)
    model: str = setting("resnet18", WEIGHTS)  # any timm model
    channels: str = setting("grey", WEIGHTS)  # what the network sees: grey or rgb
    # weight file (safetensors, or a torch file of plain tensors); hub = timm's, fetched
    pretrained: str | None = setting(None, WEIGHTS)
    task: str = setting("binary", WEIGHTS)  # binary = healthy / diseased, type = healthy / each lesion type
    predict: list[str] = setting([], NOTHING)  # dataset folders or JSONs to predict
    overwrite: bool = setting(False, NOTHING)

    @property
    def output(self) -> Path:
        """The folder that receives everything."""
        return Path(self.output_dir) if self.output_dir else Path("classifier_results") / self.dataset


CHOICES = {
    "task": ("binary", "type"),
    "use_synthetic": (MIX, PRETRAIN, DUPLICATE_REAL),
    "balance": ("loss", "sampler"),
    "channels": ("grey", "rgb"),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ClassifierConfig:
    """Read a classifier JSON, then ``key=value`` overrides (values in JSON; what is not JSON is text).

    Raises UsageError naming file and key for an unknown key, a wrong type or a value out of range.
    """
    values = read_json(path, "classifier configuration")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object with keys such as img_size, found {type(values).__name__}")
    sources = dict.fromkeys(values, str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: not understood; write --set key=value, for instance --set EPOCHS=5")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
        sources[key] = f"--set {text}"
    return config_from_dict(values, sources, str(path))


def config_from_dict(values: dict[str, Any], sources: dict[str, str] | None = None, default: str = "config") -> Any:
    """A checked ClassifierConfig; ``sources`` says where each key came from, for the messages."""
    sources = sources or {}
    kinds = {item.name: item.type for item in dataclasses.fields(ClassifierConfig)}
    for key, value in values.items():
        source = sources.get(key, default)
        if key not in kinds:
            by_lower = {name.lower(): name for name in kinds}
            near = difflib.get_close_matches(key.lower(), by_lower, n=1)
            hint = f"did you mean {by_lower[near[0]]}?" if near else f"known keys: {', '.join(kinds)}"
            raise UsageError(f"{source}: unknown key {key}; {hint}")
        if not _fits(value, kinds[key]):
            raise UsageError(f"{source}: {key} must be {_expected(kinds[key])}, found {json.dumps(value)}")
    config = ClassifierConfig(**values)
    _check_ranges(config, sources, default)
    return config


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # exact: true is not a number here


def _expected(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list of {'texts' if typing.get_args(kind)[0] is str else 'whole numbers'}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return names[kind]


def _check_ranges(config: ClassifierConfig, sources: dict[str, str], default: str) -> None:
    least = 2 if config.train else 1  # batch normalisation cannot be trained on one image
    rules = [
        # Below 32 a ResNet halves a map of one pixel. The gradient of that convolution is now and then garbage in
        # bfloat16 on CPUs with AMX (torch 2.14).
        ("img_size", 32 <= config.img_size <= 4096, "32 to 4096"),
        ("Batch_Size", config.Batch_Size >= least, f"at least {least}{' for training' if config.train else ''}"),
        ("EPOCHS", config.EPOCHS >= 1, "at least 1"),
        ("save_epoch", config.save_epoch >= 0, "0 or more"),
        ("ratio", config.ratio is None or config.ratio >= 0, "0 or more, or null"),
        ("lr", config.lr > 0, "above 0"),
        ("weight_decay", config.weight_decay >= 0, "0 or more"),
        ("pretrain_epochs", config.pretrain_epochs >= 1, "at least 1"),
        ("dataset", config.dataset.strip() not in ("", ".", "..") and "/" not in config.dataset, "a plain name"),
        ("test_epoch", config.test_epoch is None or config.test_epoch >= 1, "null or at least 1"),
    ]
    rules += [
        (key, getattr(config, key) in names, " or ".join(json.dumps(name) for name in names))
        for key, names in CHOICES.items()
    ]
    if config.train:
        inside = config.test_epoch is None or config.test_epoch <= config.EPOCHS
        rules.append(("test_epoch", inside, f"at most EPOCHS, which is {config.EPOCHS}"))
        rules += [
            (key, getattr(config, key) is not None, "the path of a dataset") for key in ("train_json", "val_json")
        ]
        use = config.use_synthetic
        counted = use != DUPLICATE_REAL or config.ratio is not None
        rules.append(("ratio", counted, "a number with use_synthetic duplicate_real: copies per real diseased image"))
        filled = use != PRETRAIN or bool(config.synthetic)
        rules.append(("synthetic", filled, "a list of result folders with use_synthetic pretrain"))
    for key, holds, expected in rules:
        if not holds:
            source = sources.get(key, default)
            raise UsageError(f"{source}: {key} must be {expected}, found {json.dumps(getattr(config, key))}")
