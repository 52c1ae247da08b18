"""Typed configurations: every key of a stage's YAML with its type, its limits and what it decides."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml

from ldm.core.errors import UsageError
from ldm.core.paths import shipped
from ldm.core.schema import (
    Amount,
    Count,
    Rule,
    Seed,
    Share,
    Values,
    Whole,
    add_overrides,
    build,
    read_yaml,
    restore_before,
    setting,
    within,
)

Part = Literal["unet", "autoencoder", "text", "biomedclip", "msc"]
Group = Literal["msc", "attn3", "unet"]
FitMode = Literal["crop", "pad", "resize"]
FeatherUnit = Literal["diameter", "pixels", "mm"]
CropUnit = Literal["pixels", "mm"]
Sampler = Literal["ddim", "dpmpp_2m"]
Spacing = Literal["leading", "trailing", "polynomial", "fitted"]
Init = Literal["noise", "image", "paste"]
Logger = Literal["wandb", "mlflow", "trackio"]  # packages that are installed and imported only where they are named
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]  # weights and optimizer stay float32 in all of them
SamplingPrecision = Literal["32-true", "bf16-true"]
GROUPS, SAMPLERS, SPACINGS, INITS = get_args(Group), get_args(Sampler), get_args(Spacing), get_args(Init)
SAMPLING_PRECISIONS = get_args(SamplingPrecision)

Channels = Annotated[int, Rule(lambda count: count % 32 == 0, "a multiple of 32 (group normalisation has 32 groups)")]
Grid = Annotated[int, Rule(lambda side: side % 2 == 0, "an even number: tokens are pooled 2x2")]
RISING = "two shares, [from, to], rising from 0 to 1"
Interval = Annotated[list[float], Rule(lambda ends: len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1, RISING)]

# What a field decides: the scopes of ``identity``. Two runs are the same where all that decides their result is equal.
NETWORK = frozenset({"architecture", "images", "weights"})  # shapes of the parameters
PREPARATION = frozenset({"features", "images", "weights"})  # what the networks see of an image and its mask
METHOD = frozenset({"images", "weights"})  # how the networks are used, in training and in inference
WEIGHTS = frozenset({"weights"})  # how the networks are trained
IMAGES = frozenset({"images"})  # how images are generated
ROUNDING = frozenset({"rounding"})  # the last digits of the weights, memory and speed: free when a run is resumed
NOTHING: frozenset[str] = frozenset()  # where files lie, speed, what is kept, shown or measured beside the training


def _min_crop_before(data: Any) -> float:
    """The lower bound of a crop before it was a key: the model's own size; of no effect where nothing is cropped."""
    return float(data.image_size) if data.fit == "crop" else DataConfig.min_crop


@dataclass
class DataConfig:
    """How images and masks reach the networks; the same block serves training and inference."""

    image_size: Count = setting(512, PREPARATION)  # side of the model's square, pixels
    fit: FitMode = setting("crop", PREPARATION)  # crop (with context around the lesion), pad or resize
    context: Annotated[float, within(1)] = setting(2.0, PREPARATION)  # crop side / longest lesion side
    # smallest side of a crop, in the native image
    min_crop: Amount = setting(64.0, PREPARATION, before=_min_crop_before)
    min_crop_unit: CropUnit = setting("pixels", PREPARATION, before="pixels")
    # above 0: crops of image_size times that on each side, instead of the above
    mm_per_pixel: Amount = setting(0.0, PREPARATION, before=0.0)
    feather: Amount = setting(0.25, PREPARATION)  # width of the soft border
    feather_unit: FeatherUnit = setting("diameter", PREPARATION)  # diameter: of the lesion's equivalent circle
    healthy_masks: Count = setting(4, WEIGHTS)  # training: fixed masks per healthy image
    # training: lesion-shaped ones, or those of the diseased training samples, carried over by the vertebrae
    healthy_masks_from: Literal["blob", "carry"] = setting("blob", WEIGHTS, before="blob")
    diseased_crops: Count = setting(4, WEIGHTS)  # training: fixed crops per diseased image, the first unshifted


@dataclass
class UNetConfig:
    """Sizes of the U-Net (defaults: Stable Diffusion 1.5 inpainting)."""

    in_channels: int = setting(9, NETWORK)
    out_channels: int = setting(4, NETWORK)
    model_channels: Channels = setting(320, NETWORK)
    channel_mult: list[int] = setting([1, 2, 4, 4], NETWORK)
    num_res_blocks: int = setting(2, NETWORK)
    attention_levels: list[int] = setting([0, 1, 2], NETWORK)
    num_heads: int = setting(8, NETWORK)
    context_dim: int = setting(768, NETWORK)  # width of the text encoder
    semantic_dim: int = setting(768, NETWORK)  # width of the MSC's output tokens (BiomedCLIP's patch tokens)
    # table: a control of the same size, whose third attention reads learned tokens that know no image and no prompt
    third_attention: Literal["tokens", "table"] = setting("tokens", NETWORK, before="tokens")
    # true: a control that sees the whole image beside the crop, as a further latent, without BiomedCLIP
    thumbnail: bool = setting(False, NETWORK, before=False)
    soft_mask_channel: bool = setting(True, METHOD)  # false: a hard mask channel (mask >= 0.5), as in Stable Diffusion
    soft_mask_attention: bool = setting(True, METHOD)  # false: third attention ungated, as in CAT-Diffusion


@dataclass
class AutoencoderConfig:
    """Sizes of the KL autoencoder (defaults: Stable Diffusion 1.x)."""

    in_channels: int = setting(3, NETWORK)
    channels: Channels = setting(128, NETWORK)
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
    grid: Grid = setting(14, NETWORK)  # patches per side
    token_dim: int = setting(768, NETWORK)
    text_dim: int = setting(512, NETWORK)
    # what the global token is of: the crop, as the patch tokens, or the whole image
    view: Literal["crop", "image"] = setting("crop", PREPARATION, before="crop")


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
    builds: list[Part] = setting([], WEIGHTS)
    rates: dict[Group, Amount] = setting({}, WEIGHTS)  # learning rates; a group of rate 0 or not named is frozen
    objective: Literal["diffusion", "msc"] = setting("diffusion", WEIGHTS)  # msc: the MSC loss
    inside: Literal["msc", "true"] = setting("msc", WEIGHTS)  # tokens inside the mask: predicted or true
    batch_size: Count = setting(16, WEIGHTS)
    max_epochs: Count = setting(20, WEIGHTS)
    accumulate: Count = setting(1, WEIGHTS)  # batches per optimizer step
    precision: Precision = setting("auto", ROUNDING)  # auto: bf16-mixed where the device multiplies it fast
    weight_decay: Amount = setting(0.01, WEIGHTS)
    warmup_steps: Whole = setting(50, WEIGHTS)
    schedule: Literal["constant", "cosine"] = setting("cosine", WEIGHTS)  # cosine: to zero at the last step
    clip_norm: Amount = setting(1.0, WEIGHTS)  # 0 = no clipping
    mask_weight: Amount = setting(2.0, WEIGHTS)  # w of the diffusion loss; 0 = Stable Diffusion's own
    # share of samples that lose text and MSC tokens together
    condition_dropout: Annotated[float, within(0, 0.99)] = setting(0.1, WEIGHTS)
    # separate: as many samples more lose the text alone, and as many the tokens alone
    coins: Literal["joint", "separate"] = setting("joint", WEIGHTS, before="joint")
    msc_weight: Amount = setting(0.0, WEIGHTS, before=0.0)  # of stage 1's loss beside the diffusion loss
    # of the loss that aligns the U-Net's middle block with the true BiomedCLIP tokens (the papers': 0.5); 0 = none
    alignment_weight: Amount = setting(0.0, WEIGHTS, before=0.0)
    min_snr: Amount = setting(0.0, WEIGHTS, before=0.0)  # gamma of min-SNR weights (usually 5); 0 = none
    balance: bool = setting(True, WEIGHTS)  # sample the groups of balance_by equally often
    balance_by: Literal["class", "prompt"] = setting("class", WEIGHTS)  # healthy and diseased, or every prompt
    # above 0: validation and the finished checkpoint use the weights' moving average
    ema_decay: Annotated[float, within(0, 0.999999)] = setting(0.0, WEIGHTS)
    activation_checkpointing: bool = setting(False, ROUNDING)
    compile: bool = setting(False, ROUNDING)  # torch.compile of the networks that a step runs
    # fsdp: weights, gradients and moments are shared out among the devices; auto: each holds all of them
    strategy: Literal["auto", "fsdp"] = setting("auto", ROUNDING, before="auto")
    # data-loader processes per device; -1: two beside a GPU, none beside a CPU
    workers: Annotated[int, within(-1)] = setting(-1, NOTHING)
    # items whose features are computed at once; halved where memory does not suffice
    feature_batch: Count = setting(2, NOTHING)
    save_every_minutes: Amount = setting(10.0, NOTHING)
    keep_best: Whole = setting(1, NOTHING)  # how many of the best epochs' weights are kept beside last.ckpt
    # the number in metrics.csv by which the best epochs are chosen: of all items, or inside the mask of diseased ones
    best_by: Literal["val_loss", "val_lesion_loss"] = setting("val_loss", WEIGHTS, before="val_loss")
    val_draws: Count = setting(2, NOTHING)  # times a validation sample is seen, each with other noise, mask or crop
    # experiment trackers that are told the numbers of a run, beside steps.csv, metrics.csv and TensorBoard
    loggers: Annotated[list[Logger], Rule(lambda names: len({*names}) == len(names), "each name once")] = setting(
        [], NOTHING
    )
    pictures: Whole = setting(2, NOTHING)  # fixed validation items that are inpainted now and then; 0 = none
    max_rejected: Share = setting(0.01, NOTHING)  # training stops when a larger share of the samples cannot be read
    seed: Seed = setting(0, WEIGHTS)

    @property
    def previews(self) -> bool:
        """Whether images are inpainted while it trains, which takes a U-Net."""
        return self.pictures > 0 and "unet" in self.builds


@dataclass
class SamplingConfig:
    """How images are generated; flags of dataset_infer.py override it."""

    sampler: Sampler = setting("ddim", IMAGES)  # ddim or dpmpp_2m (DPM-Solver++ 2M)
    steps: Count = setting(50, IMAGES)
    # of the time steps; trailing: from the noisiest on; polynomial, fitted: also denser towards the clean end
    spacing: Spacing = setting("leading", IMAGES, before="leading")
    # what sampling begins with: noise, the image itself, or the image with a pasted lesion
    init: Init = setting("noise", IMAGES, before="noise")
    strength: Share = setting(1.0, IMAGES, before=1.0)  # share of the steps that such a start is noised for
    guidance_scale: Amount = setting(7.5, IMAGES)  # 1 = no guidance
    # From which to which share of the steps guidance acts (0 = the first, noisiest step). Outside, the prompt alone
    # steers, at half the cost.
    guidance_interval: Interval = setting([0.0, 1.0], IMAGES)
    guidance_rescale: Share = setting(0.7, IMAGES)  # share of its gain in contrast inside the mask that is taken back
    eta: Share = setting(0.0, IMAGES)  # 0 = deterministic DDIM, 1 = as noisy as ancestral sampling
    differential: bool = setting(True, IMAGES)  # soft mask released over the steps (differential schedule)
    precision: SamplingPrecision = setting("32-true", IMAGES)  # bf16-true: networks in bfloat16, the latent in float32
    batch_size: Count = setting(8, NOTHING)
    compile: bool = setting(False, NOTHING)  # torch.compile of U-Net and autoencoder; changes rounding only


@dataclass(frozen=True)
class Architecture:
    """What the networks are built from; ``part`` names the part of a checkpoint that a section gives its shape."""

    unet: UNetConfig = field(metadata={"part": "unet"})
    autoencoder: AutoencoderConfig = field(metadata={"part": "autoencoder"})
    text_encoder: TextEncoderConfig = field(metadata={"part": "text"})
    biomedclip: BiomedClipConfig = field(metadata={"part": "msc"})
    msc: MSCConfig = field(metadata={"part": "msc"})
    diffusion: DiffusionConfig
    image_size: int = setting(512, PREPARATION)

    @property
    def latent_size(self) -> int:
        """Side of the latent for the model's square."""
        return self.image_size // self.autoencoder.factor

    @property
    def sees_whole(self) -> bool:
        """Whether a network is given the whole image beside the crop: BiomedCLIP or the U-Net."""
        return self.biomedclip.view == "image" or self.unet.thumbnail

    @property
    def pooled_tokens(self) -> int:
        """How many tokens the third attention reads: BiomedCLIP's patches, pooled 2x2."""
        return self.biomedclip.grid**2 // 4


@dataclass
class Config:
    """A whole YAML file from ``models/``."""

    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    biomedclip: BiomedClipConfig = field(default_factory=BiomedClipConfig)
    msc: MSCConfig = field(default_factory=MSCConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def architecture(self) -> Architecture:
        """The sections that the networks are built from; they are shared, not copied."""
        sections = self.unet, self.autoencoder, self.text_encoder, self.biomedclip, self.msc, self.diffusion
        return Architecture(*sections, image_size=self.data.image_size)

    def agreements(self) -> Iterator[tuple[str, bool, str]]:
        """Every key whose value depends on others: whether it agrees with them, and what is expected of it."""
        data, unet, sampling, training = self.data, self.unet, self.sampling, self.training
        last = self.diffusion.timesteps - 1  # the first time step of the leading spacing must exist
        yield "sampling.steps", sampling.steps <= last, f"at most {last}"
        deterministic = not sampling.eta or sampling.sampler == "ddim"
        yield "sampling.eta", deterministic, f"0 with sampling.sampler={sampling.sampler}"
        whole = sampling.init != "noise" or sampling.strength == 1
        yield "sampling.strength", whole, "1 with sampling.init=noise, which begins with nothing else"
        visits = sampling.strength == 0 or int(sampling.steps * sampling.strength) > 0
        least = f"{math.ceil(1000 / sampling.steps) / 1000:g} with {sampling.steps} steps"
        yield "sampling.strength", visits, f"0, or at least {least}: one of them"
        multiple = self.autoencoder.factor * 2 ** (len(unet.channel_mult) - 1)
        yield "data.image_size", data.image_size % multiple == 0, f"a multiple of {multiple}"
        cropped = data.fit == "crop"
        yield "data.mm_per_pixel", cropped or not data.mm_per_pixel, f"0 with data.fit={data.fit}"
        views = cropped or self.biomedclip.view == "crop"
        yield "biomedclip.view", views, f"crop with data.fit={data.fit}, which cuts nothing off"
        yield "unet.thumbnail", cropped or not unet.thumbnail, f"false with data.fit={data.fit}, which cuts nothing off"
        channels = 2 * self.autoencoder.latent_channels + 1
        inputs = f"{channels} (noisy latent + mask + masked-image latent)"
        yield "unet.in_channels", unet.in_channels == channels, inputs
        whole_weights, table = training.strategy != "fsdp", unet.third_attention == "table"
        yield "training.compile", whole_weights or not training.compile, "false with training.strategy=fsdp"
        yield "training.strategy", whole_weights or not table, "auto with unet.third_attention=table"
        by_diffusion = training.objective == "diffusion"
        reads_msc = by_diffusion and training.inside == "msc"
        reads_one = not (table and training.stage and reads_msc)
        yield "training.inside", reads_one, "true with unet.third_attention=table, which reads no MSC"
        dropped = training.coins == "joint" or training.condition_dropout <= 1 / 3
        yield "training.condition_dropout", dropped, "at most 1/3 with training.coins=separate"
        unstaged = not training.stage  # a file that stages are based on: nothing is trained with it alone
        by_msc = unstaged or not training.msc_weight or (reads_msc and "msc" in training.rates)
        yield "training.msc_weight", by_msc, "0 in a stage that does not train an MSC by its diffusion"
        by_unet = by_diffusion and not {"attn3", "unet"}.isdisjoint(training.rates)
        aligned = unstaged or not training.alignment_weight or by_unet
        yield "training.alignment_weight", aligned, "0 in a stage that trains no part of the U-Net by its diffusion"
        width, token_dim = self.text_encoder.width, self.biomedclip.token_dim
        yield "unet.context_dim", unet.context_dim == width, f"text_encoder.width, which is {width}"
        yield "unet.semantic_dim", unet.semantic_dim == token_dim, f"biomedclip.token_dim, which is {token_dim}"


def load_config(path: str | Path, overrides: Sequence[str] = (), spelled: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, its ``base:`` files first, then ``overrides`` such as ``training.batch_size=4``.

    ``spelled``: for messages, what was typed for those overrides that stand for a flag, as in "--strength 0.5".

    Raises UsageError for a missing file, a syntax error, an unknown key (naming the nearest known one), a value of
    the wrong type or out of range, an interpolation (``${...}``), or a loop of bases.
    """
    values = read_yaml(Path(path), "configuration", "; the shipped ones are in models/")
    add_overrides(values, Config, overrides, "override", "training.batch_size=4", spelled)
    return _checked(values)


def stage_configs(path: Path, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The stage that a YAML names, or all stages that stand beside a YAML without one, ``<its name>_*.yaml``.

    Those of another YAML without a stage, whose name goes on from this one's, are not among them. In an order in which
    they can be trained: those that build less come first. UsageError if there is none.
    """
    path = shipped(path)
    config = load_config(path, overrides)
    if config.training.stage:
        return {config.training.stage: config}
    beside = {file.stem: load_config(file, overrides) for file in sorted(path.parent.glob(f"{path.stem}_*.yaml"))}
    families = [f"{name}_" for name, found in beside.items() if not found.training.stage]  # phantom_large of phantom
    stages = [found for name, found in beside.items() if found.training.stage and not name.startswith(tuple(families))]
    if not stages:
        raise UsageError(f"{path}: names no stage, and no {path.stem}_*.yaml beside it does")
    return {found.training.stage: found for found in sorted(stages, key=lambda each: len(each.training.builds))}


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """A Config from the plain dictionary stored in a checkpoint; ``source`` names it in errors.

    A key that the dictionary's section lacks has the value that every run had before there was this key.
    """
    config = _checked(Values(source, values))
    for section in dataclasses.fields(config):
        if isinstance(given := values.get(section.name), dict):
            restore_before(getattr(config, section.name), given)
    return config


def as_yaml(config: Config) -> str:
    """The whole configuration as YAML, which ``load_config`` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _checked(values: Values) -> Config:
    """The configuration; UsageError where a key is wrong in itself, or does not agree with another one."""
    config = build(Config, values)
    config.training.rates = {group: rate for group, rate in config.training.rates.items() if rate}  # 0: frozen
    for key, agrees, expected in config.agreements():
        if not agrees:
            raise values.error(key, expected, attrgetter(key)(config))
    return config
