"""Typed configurations: YAML with ``base:`` inheritance and dotted overrides; unknown keys are refused by name."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.core.errors import UsageError
from ldm.core.paths import shipped
from ldm.core.schema import setting

PARTS = ("unet", "autoencoder", "text", "biomedclip", "msc")
GROUPS = ("msc", "attn3", "unet")
SAMPLERS = ("ddim", "dpmpp_2m")
SAMPLING_PRECISIONS = ("32-true", "bf16-true")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")  # weights and optimizer stay float32 in all of them

# What a field decides: the scopes of ``identity``. Two runs are the same where all that decides their result is equal.
NETWORK = frozenset({"architecture", "images", "weights"})  # shapes of the parameters
PREPARATION = frozenset({"features", "images", "weights"})  # what the networks see of an image and its mask
METHOD = frozenset({"images", "weights"})  # how the networks are used, in training and in inference
WEIGHTS = frozenset({"weights"})  # how the networks are trained
IMAGES = frozenset({"images"})  # how images are generated
ROUNDING = frozenset({"rounding"})  # the last digits of the weights, memory and speed: free when a run is resumed
NOTHING = frozenset()  # where files lie, speed, what is kept, shown or measured beside the training


@dataclass
class DataConfig:
    """How images and masks reach the networks; the same block serves training and inference."""

    image_size: int = setting(512, PREPARATION)  # side of the model's square, pixels
    fit: str = setting("crop", PREPARATION)  # crop (with context around the lesion), pad or resize
    context: float = setting(2.0, PREPARATION)  # crop side / longest lesion side, at least the model's square
    feather: float = setting(0.25, PREPARATION)  # width of the soft border
    feather_unit: str = setting("diameter", PREPARATION)  # diameter (of the lesion's equivalent circle), pixels or mm
    healthy_masks: int = setting(4, WEIGHTS)  # training: fixed lesion-shaped masks per healthy image
    diseased_crops: int = setting(4, WEIGHTS)  # training: fixed crops per diseased image, all but the first one shifted


@dataclass
class UNetConfig:
    """Sizes of the U-Net (defaults: Stable Diffusion 1.5 inpainting)."""

    in_channels: int = setting(9, NETWORK)
    out_channels: int = setting(4, NETWORK)
    model_channels: int = setting(320, NETWORK)
    channel_mult: list[int] = setting([1, 2, 4, 4], NETWORK)
    num_res_blocks: int = setting(2, NETWORK)
    attention_levels: list[int] = setting([0, 1, 2], NETWORK)
    num_heads: int = setting(8, NETWORK)
    context_dim: int = setting(768, NETWORK)  # width of the text encoder
    semantic_dim: int = setting(768, NETWORK)  # width of the MSC's output tokens (BiomedCLIP's patch tokens)
    soft_mask_channel: bool = setting(True, METHOD)  # false: a hard mask channel (mask >= 0.5), as in Stable Diffusion
    soft_mask_attention: bool = setting(True, METHOD)  # false: third attention ungated, as in CAT-Diffusion


@dataclass
class AutoencoderConfig:
    """Sizes of the KL autoencoder (defaults: Stable Diffusion 1.x)."""

    in_channels: int = setting(3, NETWORK)
    channels: int = setting(128, NETWORK)
    channel_mult: list[int] = setting([1, 2, 4, 4], NETWORK)
    num_res_blocks: int = setting(2, NETWORK)
    latent_channels: int = setting(4, NETWORK)

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass
class TextEncoderConfig:
    """Sizes of the CLIP text encoder (defaults: CLIP ViT-L/14, as in Stable Diffusion 1.x)."""

    vocab_size: int = setting(49408, NETWORK)
    width: int = setting(768, NETWORK)
    layers: int = setting(12, NETWORK)
    heads: int = setting(12, NETWORK)
    max_length: int = setting(77, NETWORK)


@dataclass
class BiomedClipConfig:
    """Where BiomedCLIP lies, and the sizes the other networks are built for (checked against the folder)."""

    path: str = setting("./biomedclip", NOTHING)
    grid: int = setting(14, NETWORK)  # patches per side
    token_dim: int = setting(768, NETWORK)
    text_dim: int = setting(512, NETWORK)


@dataclass
class MSCConfig:
    """Sizes of the Medical Semantic Controller."""

    width: int = setting(768, NETWORK)
    layers: int = setting(24, NETWORK)
    heads: int = setting(12, NETWORK)
    soft_mask_mixing: bool = setting(True, METHOD)  # false: one mask embedding or the other (s >= 0.5), no mixture


@dataclass
class DiffusionConfig:
    """The noise schedule and the latent scale."""

    timesteps: int = setting(1000, METHOD)
    beta_start: float = setting(0.00085, METHOD)
    beta_end: float = setting(0.0120, METHOD)
    latent_scale: float = setting(0.18215, METHOD)


@dataclass
class TrainingConfig:
    """One training stage."""

    stage: str = setting("", WEIGHTS)
    builds: list[str] = setting([], WEIGHTS)  # of PARTS
    rates: dict[str, float] = setting({}, WEIGHTS)  # of GROUPS -> learning rate; what is not named is frozen
    objective: str = setting("diffusion", WEIGHTS)  # diffusion, or msc (the MSC loss)
    inside: str = setting("msc", WEIGHTS)  # tokens inside the mask: msc (predicted) or true (of the real image)
    batch_size: int = setting(16, WEIGHTS)
    max_epochs: int = setting(20, WEIGHTS)
    accumulate: int = setting(1, WEIGHTS)  # batches per optimizer step
    precision: str = setting("auto", ROUNDING)  # of PRECISIONS; auto: bf16-mixed where the device multiplies it fast
    weight_decay: float = setting(0.01, WEIGHTS)
    warmup_steps: int = setting(0, WEIGHTS)
    schedule: str = setting("constant", WEIGHTS)  # or cosine (to zero at the last step)
    clip_norm: float = setting(1.0, WEIGHTS)  # 0 = no clipping
    mask_weight: float = setting(0.0, WEIGHTS)  # w of the diffusion loss; 0 = Stable Diffusion's own
    condition_dropout: float = setting(0.1, WEIGHTS)  # share of samples that lose text and MSC tokens together
    balance: bool = setting(False, WEIGHTS)  # draw the groups of balance_by equally often
    balance_by: str = setting("class", WEIGHTS)  # class (healthy, diseased), or prompt (every distinct sentence)
    ema_decay: float = setting(0.0, WEIGHTS)  # above 0: validation and the finished checkpoint use the moving average
    activation_checkpointing: bool = setting(False, ROUNDING)
    compile: bool = setting(False, ROUNDING)  # torch.compile of the U-Net
    workers: int = setting(-1, NOTHING)  # data-loader processes per device; -1: two beside a GPU, none beside a CPU
    save_every_minutes: float = setting(10.0, NOTHING)
    keep_best: int = setting(1, NOTHING)  # how many of the best epochs' weights are kept beside last.ckpt
    val_draws: int = setting(1, NOTHING)  # times a validation sample is seen, with other noise, time step, mask or crop
    pictures: int = setting(2, NOTHING)  # fixed validation items that are drawn now and then; 0 = none
    max_rejected: float = setting(0.01, NOTHING)  # training stops when a larger share of the samples cannot be read
    seed: int = setting(0, WEIGHTS)


@dataclass
class SamplingConfig:
    """How pictures are drawn; flags of dataset_infer.py override it."""

    sampler: str = setting("ddim", IMAGES)  # ddim or dpmpp_2m (DPM-Solver++ 2M)
    steps: int = setting(50, IMAGES)
    guidance_scale: float = setting(7.5, IMAGES)  # 1 = no guidance
    # From which to which share of the steps guidance acts (0 = the first, noisiest step). Outside, the prompt alone
    # steers, at half the cost.
    guidance_interval: list[float] = setting([0.0, 1.0], IMAGES)
    guidance_rescale: float = setting(0.0, IMAGES)  # share of its gain in contrast inside the mask that is taken back
    eta: float = setting(0.0, IMAGES)  # 0 = deterministic DDIM, 1 = as noisy as ancestral sampling
    differential: bool = setting(True, IMAGES)  # soft mask released over the steps (differential schedule)
    precision: str = setting("32-true", IMAGES)  # bf16-true: networks in bfloat16, the latent in float32
    batch_size: int = setting(8, NOTHING)


@dataclass
class Config:
    """A whole YAML file from ``models/``; ``part`` names the part of a checkpoint that a section gives its shape."""

    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig, metadata={"part": "unet"})
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig, metadata={"part": "autoencoder"})
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig, metadata={"part": "text"})
    biomedclip: BiomedClipConfig = field(default_factory=BiomedClipConfig, metadata={"part": "msc"})
    msc: MSCConfig = field(default_factory=MSCConfig, metadata={"part": "msc"})
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def latent_size(self) -> int:
        """Side of the latent for the model's square."""
        return self.data.image_size // self.autoencoder.factor


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, its ``base:`` files first, then ``overrides`` such as ``training.batch_size=4``.

    Raises UsageError for a missing file, a syntax error, an unknown key (naming the nearest known one), a value of
    the wrong type or out of range, an interpolation (``${...}``), or a loop of bases.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.structured(Config)
    for source, node in [*_layers(Path(path), ()), *_override_layers(overrides)]:
        merged = _merge(merged, node, source)
    config = OmegaConf.to_object(merged)
    _validate(config, path)
    return config


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """A Config from the plain dictionary stored in a checkpoint; ``source`` names it in errors."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(_merge(OmegaConf.structured(Config), values, source))
    _validate(config, source)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    from ldm.core.files import write_text

    write_text(path, as_yaml(config))


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, Any]]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path = shipped(path)
    if path.resolve() in seen:
        raise UsageError(f"{path}: its `base:` leads back to itself")
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: this configuration does not exist; the shipped ones are in models/") from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    plain = OmegaConf.to_container(node, resolve=False)
    if not isinstance(plain, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {type(plain).__name__}")
    base = plain.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: base is {base!r}, expected the name of another YAML file")
    below = _layers(path.parent / base, (*seen, path.resolve())) if base else []
    return [*below, (str(path), plain)]


def _override_layers(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    from omegaconf import OmegaConf

    for text in overrides:
        if "=" not in text or text.startswith("-"):
            raise UsageError(f"{text}: not understood; an override looks like training.batch_size=4")
    return [(f"override {text}", OmegaConf.to_container(OmegaConf.from_dotlist([text]))) for text in overrides]


def _merge(merged: Any, values: Any, source: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_keys(values, Config, "", source)
    try:
        return OmegaConf.merge(merged, values)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise UsageError(f"{source}: {key}: {str(error).splitlines()[0]}") from error


def _check_keys(values: Any, kind: Any, prefix: str, source: str) -> None:
    if isinstance(values, str) and "${" in values:
        raise UsageError(f"{source}: {prefix.rstrip('.')}: interpolations (${{...}}) are not supported")
    if not dataclasses.is_dataclass(kind) and isinstance(values, (dict, list)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            _check_keys(value, None, f"{prefix}{key}.", source)
    if not dataclasses.is_dataclass(kind):
        return
    if not isinstance(values, dict):
        raise UsageError(f"{source}: {prefix.rstrip('.')}: expected a section with keys, found {values!r}")
    known = {item.name: item.type for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UsageError(f"{source}: unknown key {prefix}{key}; {hint}")
        _check_keys(value, known[key], f"{prefix}{key}.", source)


def _validate(config: Config, source: str | Path) -> None:
    def refuse(key: str, value: Any, expected: str) -> None:
        raise UsageError(f"{source}: {key} is {value!r}, expected {expected}")

    def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            refuse(key, value, "one of " + ", ".join(allowed))

    one_of("data.fit", config.data.fit, ("crop", "pad", "resize"))
    one_of("data.feather_unit", config.data.feather_unit, ("diameter", "pixels", "mm"))
    one_of("training.objective", config.training.objective, ("diffusion", "msc"))
    one_of("training.inside", config.training.inside, ("msc", "true"))
    one_of("training.schedule", config.training.schedule, ("constant", "cosine"))
    one_of("training.balance_by", config.training.balance_by, ("class", "prompt"))
    one_of("sampling.sampler", config.sampling.sampler, SAMPLERS)
    one_of("sampling.precision", config.sampling.precision, SAMPLING_PRECISIONS)
    for part in config.training.builds:
        one_of("training.builds", part, PARTS)
    one_of("training.precision", config.training.precision, PRECISIONS)
    for group, rate in config.training.rates.items():
        one_of("training.rates", group, GROUPS)
        if not rate > 0:
            refuse(f"training.rates.{group}", rate, "a learning rate above 0 (leave the group out to freeze it)")
    _validate_ranges(config, refuse)
    interval = config.sampling.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        refuse("sampling.guidance_interval", interval, "two shares of the steps, [from, to], rising from 0 to 1")
    if not 0 <= config.sampling.guidance_rescale <= 1:
        refuse("sampling.guidance_rescale", config.sampling.guidance_rescale, "a share from 0 to 1")
    if config.sampling.eta and config.sampling.sampler != "ddim":
        refuse("sampling.eta", config.sampling.eta, f"0 with sampling.sampler={config.sampling.sampler}")
    latent, rest = divmod(config.data.image_size, config.autoencoder.factor)
    step = 2 ** (len(config.unet.channel_mult) - 1)
    if config.data.image_size < 1 or rest or latent % step:
        refuse("data.image_size", config.data.image_size, f"a multiple of {config.autoencoder.factor * step}")
    channels = 2 * config.autoencoder.latent_channels + 1
    if config.unet.in_channels != channels:
        refuse("unet.in_channels", config.unet.in_channels, f"{channels} (noisy latent + mask + masked-image latent)")
    if config.unet.context_dim != config.text_encoder.width:
        refuse("unet.context_dim", config.unet.context_dim, f"text_encoder.width, which is {config.text_encoder.width}")
    if config.unet.semantic_dim != config.biomedclip.token_dim:
        refuse("unet.semantic_dim", config.unet.semantic_dim, f"biomedclip.token_dim ({config.biomedclip.token_dim})")
    if config.biomedclip.grid % 2:
        refuse("biomedclip.grid", config.biomedclip.grid, "an even number: tokens are pooled 2x2")
    for key in ("unet.model_channels", "autoencoder.channels"):
        section, name = key.split(".")
        if getattr(getattr(config, section), name) % 32:
            refuse(key, getattr(getattr(config, section), name), "a multiple of 32 (group normalisation has 32 groups)")


def _validate_ranges(config: Config, refuse: Any) -> None:
    """Numbers that have a lowest (and highest) sensible value."""
    highest = config.diffusion.timesteps - 1  # the first time step of the leading spacing must exist
    limits = {
        "data.healthy_masks": (1, None),
        "data.diseased_crops": (1, None),
        "data.context": (1, None),
        "data.feather": (0, None),
        "training.batch_size": (1, None),
        "training.max_epochs": (1, None),
        "training.accumulate": (1, None),
        "training.weight_decay": (0, None),
        "training.warmup_steps": (0, None),
        "training.mask_weight": (0, None),
        "training.clip_norm": (0, None),
        "training.workers": (-1, None),
        "training.condition_dropout": (0, 0.99),
        "training.ema_decay": (0, 0.999999),
        "training.save_every_minutes": (0, None),
        "training.keep_best": (0, None),
        "training.val_draws": (1, None),
        "training.pictures": (0, None),
        "training.max_rejected": (0, 1),
        "sampling.steps": (1, highest),
        "sampling.guidance_scale": (0, None),
        "sampling.eta": (0, 1),
        "sampling.batch_size": (1, None),
    }
    for key, (low, high) in limits.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not (value >= low and (high is None or value <= high)):
            refuse(key, value, f"at least {low}" + ("" if high is None else f", at most {high}"))
