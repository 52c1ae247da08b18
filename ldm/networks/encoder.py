"""What the method needs of a frozen image-text encoder; BiomedCLIP is one, and nothing else is asked of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ldm.networks.text_encoder import PromptReading


class EncoderIdentity(NamedTuple):
    """What tells an encoder from another one; the same three stand in an ``ImageTextEncoder``."""

    folder: Path
    fingerprint: str
    preparation: Mapping[str, str]


class ImageTextEncoder(nn.Module, ABC):
    """Encodes images to a grid of patch tokens and one global token, and prompts to one vector.

    Frozen, in evaluation mode, never stored in a checkpoint: a checkpoint keeps its ``fingerprint`` and its
    ``preparation``. The subclass's constructor sets what is declared here and ends with ``self.freeze()``.
    """

    folder: Path  # where its files lie; named in errors
    fingerprint: str  # of its weights
    preparation: Mapping[str, str] = MappingProxyType({})  # how "images" and "prompts" become its input: fingerprints
    grid: int  # patches per side
    token_dim: int  # width of the tokens
    text_dim: int  # width of a prompt's vector

    @classmethod
    def identify(cls, source: str) -> EncoderIdentity:
        """Which encoder lies in ``source``; a subclass that can tell without building its network overrides this."""
        made = cls(source)
        return EncoderIdentity(made.folder, made.fingerprint, made.preparation)

    def freeze(self) -> None:
        """No gradients, evaluation mode."""
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def encode_image(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, grid**2, token_dim) and global token (B, token_dim).

        image: (B, 3, S, S) in [-1, 1], of any size; hidden: (B, 1, S, S), > 0 (or True) where nothing may be seen.
        """

    def reading(self, prompt: str) -> PromptReading | None:
        """How a prompt is read, for who writes one; None where the encoder does not say."""
        return None

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """One vector per prompt, (B, text_dim), not normalised. Warnings (once a prompt) say what is cut or unknown."""

    @abstractmethod
    def embed_image(self, image: Tensor) -> Tensor:
        """One vector per image (B, 3, S, S) in [-1, 1], comparable with ``encode_text``: (B, text_dim)."""
