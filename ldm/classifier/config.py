"""What the classifier is told: the keys of its JSON, checked before anything is read. No torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ldm.config import NOTHING, WEIGHTS
from ldm.core.files import read_json
from ldm.core.schema import Amount, Count, Rule, Seed, Values, Whole, add_overrides, build, setting, within

MIX, PRETRAIN, DUPLICATE_REAL = "mix", "pretrain", "duplicate_real"  # what use_synthetic may be
UseSynthetic = Literal["mix", "pretrain", "duplicate_real"]
SEGMENT = "segment"  # the task that is none of classes
PRETRAINED_HUB = "hub"  # what pretrained may be besides a path

# Below 32 a ResNet halves a map of one pixel. The gradient of that convolution is now and then garbage in bfloat16 on
# CPUs with AMX (torch 2.14).
ImageSide = Annotated[int, within(32, 4096)]
Context = Annotated[float, within(1, 10)]
Positive = Annotated[float, Rule(lambda value: value > 0, "a number above 0")]
PlainName = Annotated[
    str, Rule(lambda name: name.strip() not in ("", ".", "..") and "/" not in name, "a name without /")
]


@dataclass(frozen=True)
class ClassifierConfig:
    """One classifier run. Field names are the JSON's keys; relative paths start at the working directory."""

    img_size: ImageSide = setting(224, WEIGHTS)  # side of the square the classifier sees, pixels
    Batch_Size: Count = setting(32, WEIGHTS)
    EPOCHS: Count = setting(50, WEIGHTS)
    # optimizer steps of the whole training, the same for every arm, with EPOCHS validations at equal distances; null =
    # EPOCHS passes over the images, so that an arm with more images takes more steps
    steps: Count | None = setting(None, WEIGHTS, before=lambda _: None)
    GPU: str | list[int] | list[str] = setting("", NOTHING)  # device ids; "" or [] = a GPU if there is one; "cpu"
    dataset: PlainName = setting("dataset", NOTHING)  # in titles, and the output folder's name where output_dir is null
    train: bool = setting(True, NOTHING)  # false: only test and predict, with the saved classifier
    test_epoch: Count | None = setting(None, WEIGHTS)  # null = the epoch chosen on validation, n = epoch n
    save_epoch: Whole = setting(0, WEIGHTS)  # keep the weights of every n-th epoch; 0 = of the tested epoch only
    train_json: str | None = setting(None, NOTHING)  # annotation JSON or dataset folder
    val_json: str | None = setting(None, NOTHING)
    test_json: str | None = setting(None, NOTHING)
    synthetic: list[str] = setting([], NOTHING)  # result folders of dataset_infer.py
    # review.csv files of medsoft review about the images of `synthetic`; what any reviewer rejected is left out
    review: list[str] = setting([], NOTHING)
    ratio: Amount | None = setting(None, WEIGHTS)  # synthetic images per real diseased training image; null = all
    # mix = train on real and synthetic together; pretrain = first on the synthetic and the real healthy images, then on
    # the real ones; duplicate_real (the control) = repeat real diseased images, as many as mix would add at this
    # ratio, and open no synthetic folder
    use_synthetic: UseSynthetic = setting(MIX, WEIGHTS)
    pretrain_epochs: Count = setting(10, WEIGHTS)  # before the EPOCHS on real images, with use_synthetic pretrain
    output_dir: str | None = setting(None, NOTHING)  # null = classifier_results/<dataset>
    seed: Seed = setting(0, WEIGHTS)
    lr: Positive = setting(1e-3, WEIGHTS)
    weight_decay: Amount = setting(0.05, WEIGHTS)
    # healthy and diseased count the same: loss = by their weights in it, sampler = by being taken as often
    balance: Literal["loss", "sampler"] = setting("loss", WEIGHTS)
    # light = small shifts, turns, scales, gains; trivial = TrivialAugment, rand = RandAugment, both without what would
    # change a lesion's type
    augmentation: Literal["light", "trivial", "rand"] = setting("light", WEIGHTS, before="light")
    model: str = setting("resnet18", WEIGHTS)  # any timm model
    channels: Literal["grey", "rgb"] = setting("grey", WEIGHTS)  # what the network sees: grey or rgb
    # side of the square around the vertebra that the network sees, in multiples of its longer side; null = whole image
    crop: Context | None = setting(None, WEIGHTS)
    # weight file (safetensors, or a torch file of plain tensors); hub = timm's, fetched
    pretrained: str | None = setting(None, WEIGHTS)
    # binary = healthy / diseased, type = healthy / each lesion type, segment = a U-Net that outlines the lesion
    task: Literal["binary", "type", "segment"] = setting("binary", WEIGHTS)
    predict: list[str] = setting([], NOTHING)  # dataset folders or JSONs to predict
    overwrite: bool = setting(False, NOTHING)

    @property
    def output(self) -> Path:
        """The folder that receives everything."""
        return Path(self.output_dir) if self.output_dir else Path("classifier_results") / self.dataset


def load_classifier_config(path: str | Path, overrides: Sequence[str] = ()) -> ClassifierConfig:
    """Read a classifier JSON, then ``key=value`` overrides.

    Raises UsageError naming file and key for an unknown key, a wrong type, a value out of range, or one that does not
    agree with another key.
    """
    content = read_json(path, "classifier configuration")
    values = Values(str(path))
    if not isinstance(content, dict):
        raise values.error("", "a JSON object with keys such as img_size", content)
    values.add(content, str(path))
    add_overrides(values, ClassifierConfig, overrides, "--set", "--set EPOCHS=5")
    config = build(ClassifierConfig, values)
    if config.task == SEGMENT:
        for key, plain in (("augmentation", "light"), ("pretrained", None), ("predict", [])):
            if (found := getattr(config, key)) != plain:
                raise values.error(key, f"{json.dumps(plain)} with task {SEGMENT}", found)
    if config.train:
        use = config.use_synthetic
        epochs = config.EPOCHS + (config.pretrain_epochs if use == PRETRAIN else 0)
        chosen = config.test_epoch is None or config.test_epoch <= config.EPOCHS
        rules = [
            ("Batch_Size", config.Batch_Size > 1, "at least 2 for training"),  # batch normalisation needs two images
            ("test_epoch", chosen, f"at most EPOCHS, which is {config.EPOCHS}"),
            ("steps", config.steps is None or config.steps >= epochs, f"one for each of {epochs} epochs at least"),
            ("train_json", bool(config.train_json), "the path of a dataset"),
            ("val_json", bool(config.val_json), "the path of a dataset"),
            ("ratio", use != DUPLICATE_REAL or config.ratio is not None, f"a number with use_synthetic {use}"),
            ("synthetic", use != PRETRAIN or bool(config.synthetic), f"result folders with use_synthetic {use}"),
            ("review", use != DUPLICATE_REAL or not config.review, f"nothing with use_synthetic {use}"),
            ("synthetic", bool(config.synthetic) or not config.review, "the result folders that `review` is about"),
        ]
        for key, holds, expected in rules:
            if not holds:
                raise values.error(key, expected, getattr(config, key))
    return config
