"""The networks of a checkpoint, and the image-text encoder that their configuration names, checked together."""

from collections.abc import Sequence

from ldm.checkpoints.checkpoint import Checkpoint, check_preparation, load_parts
from ldm.config import BiomedClipConfig, Config
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import TRAINABLE_PARTS, MedSoftModel


def open_encoder(cfg: BiomedClipConfig, checkpoint: Checkpoint | None = None) -> BiomedClip:
    """The frozen encoder of images and prompts, of the sizes in ``cfg``.

    Raises MedSoftError if its files are missing, damaged or of other sizes, or if ``checkpoint`` was trained on the
    tokens of another encoder.
    """
    encoder = BiomedClip(cfg.path)
    encoder.check(cfg)
    if checkpoint is not None:
        encoder.check_same(checkpoint)
    return encoder


def open_model(
    config: Config, checkpoint: Checkpoint, parts: Sequence[str] = TRAINABLE_PARTS
) -> tuple[MedSoftModel, BiomedClip]:
    """The networks ``parts`` with the checkpoint's weights, on the CPU, and the encoder whose tokens they read.

    Raises MedSoftError or UsageError if checkpoint, configuration and encoder do not belong together.
    """
    check_preparation(checkpoint, config)
    encoder = open_encoder(config.biomedclip, checkpoint)
    net = MedSoftModel(config, parts)
    load_parts(net, checkpoint, net.parts, config)
    return net, encoder
