"""The networks of a checkpoint, and the image-text encoder that their configuration names, checked together."""

from collections.abc import Collection
from typing import Any

from ldm.checkpoints.checkpoint import PREFIXES, Checkpoint
from ldm.checkpoints.fitting import NoRandomWeights, check_preparation, load_parts, parts_of
from ldm.config import Architecture, BiomedClipConfig, Config
from ldm.core.errors import MedSoftError
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.encoder import EncoderIdentity, ImageTextEncoder
from ldm.networks.model import MedSoftModel, skeleton

PREPARATION = "biomedclip_preparation"
ENCODER_KEYS = ("biomedclip", PREPARATION)  # in a checkpoint's metadata; older files lack the second


def open_encoder(cfg: BiomedClipConfig, checkpoint: Checkpoint | None = None) -> ImageTextEncoder:
    """The frozen encoder of images and prompts, of the sizes in ``cfg``. Another kind of encoder is chosen here.

    Raises MedSoftError if its files are missing, damaged or of other sizes, or if ``checkpoint`` was trained on the
    tokens of another encoder.
    """
    encoder = BiomedClip(cfg.path)
    for key in ("grid", "token_dim", "text_dim"):
        found, expected = getattr(encoder, key), getattr(cfg, key)
        if found != expected:
            raise MedSoftError(
                f"{encoder.folder}: biomedclip.{key} is {found}, the configuration expects {expected}; "
                "use the YAML that belongs to this encoder"
            )
    if checkpoint:
        check_encoder(encoder, checkpoint)
    return encoder


def identify_encoder(cfg: BiomedClipConfig) -> EncoderIdentity:
    """Which encoder ``open_encoder`` would open, for ``check_encoder``; its network is not built."""
    return BiomedClip.identify(cfg.path)


def check_encoder(encoder: ImageTextEncoder | EncoderIdentity, checkpoint: Checkpoint) -> Checkpoint:
    """The ``checkpoint``; MedSoftError if it was trained on the tokens of another encoder."""
    here, theirs = encoder_record(encoder), {key: checkpoint.metadata.get(key) for key in ENCODER_KEYS}
    for key, found in theirs.items():
        if found and found != here[key]:
            what = {PREPARATION: "prepares images or prompts otherwise than"}.get(key, "is not")
            raise MedSoftError(
                f"{encoder.folder}: {what} the BiomedCLIP that {checkpoint.path} was trained with; give that folder "
                "with --biomedclip"
            )
    return checkpoint


def encoder_record(encoder: ImageTextEncoder | EncoderIdentity) -> dict[str, Any]:
    """What a checkpoint says of the encoder whose features it was trained on, by ``ENCODER_KEYS``."""
    return {"biomedclip": encoder.fingerprint, PREPARATION: dict(encoder.preparation)}


def open_model(
    config: Config, checkpoint: Checkpoint, parts: Collection[str] | None = None, later: Collection[str] = ()
) -> tuple[MedSoftModel, ImageTextEncoder]:
    """The networks ``parts`` with the checkpoint's weights, on the CPU, and the encoder whose tokens they read.

    Without ``parts`` all that drawing needs: with a learned table of tokens (``unet.third_attention``) that is no MSC.
    Those that are wanted ``later`` must fit too, but are not built: ``loaded`` does that when there is room.
    Raises MedSoftError or UsageError if checkpoint, configuration and encoder do not belong together.
    """
    if parts is None:
        parts = [part for part in PREFIXES if part != "msc" or config.unet.third_attention == "tokens"]
    check_preparation(checkpoint, config)
    encoder = open_encoder(config.biomedclip, checkpoint)
    if later:
        whole = [part for part in PREFIXES if part in parts or part in later]
        parts_of(checkpoint, whole, config.architecture, skeleton(config.architecture, whole))
    return loaded(config.architecture, checkpoint, parts), encoder


def loaded(architecture: Architecture, checkpoint: Checkpoint, parts: Collection[str]) -> MedSoftModel:
    """The networks ``parts`` with the checkpoint's weights, on the CPU; raises as ``parts_of`` does."""
    with NoRandomWeights():
        net = MedSoftModel(architecture, parts)
    load_parts(net, checkpoint, net.parts, architecture)
    return net
