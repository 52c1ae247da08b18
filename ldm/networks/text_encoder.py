"""Stable Diffusion's CLIP text encoder."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.config import TextEncoderConfig
from ldm.core.errors import FewWarnings
from ldm.core.tables import shortened

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)

START, END = 49406, 49407  # CLIP's start and end of text; SD also pads with END (open_clip pads with 0)
SPECIAL = {START: "<|startoftext|>", END: "<|endoftext|>"}  # open_clip calls these two otherwise


Span = tuple[int, int]  # (start, end) of a part of a prompt, letters


class PromptReading(NamedTuple):
    """How an encoder reads a prompt: its tokens, how many of them it has room for, and what it has no token for.

    ``unknown``: (start, end) of such parts of the prompt; ``read``: up to which letter the prompt is read.
    """

    tokens: int
    room: int
    unknown: list[Span]
    read: int

    @classmethod
    def of(cls, prompt: str, offsets: Sequence[Span], unknown: list[Span], room: int) -> "PromptReading":
        """The reading of a prompt whose tokens stand at ``offsets``, of which the first ``room`` are read."""
        return cls(len(offsets), room, unknown, offsets[room][0] if len(offsets) > room else len(prompt))


class PromptWarnings:
    """Says what an encoder does not read of a prompt: the tail, and what it has no token for.

    Once for each prompt, by name for the first few prompts; at the end of the command how many they were.

    ``unknown_as``: what the encoder reads in the place of the latter. It is said where their share of the tokens is
    above ``tolerated``.
    """

    def __init__(self, encoder: str, unknown_as: str, tolerated: float = 0.0) -> None:
        self.encoder, self.unknown_as, self.tolerated = encoder, unknown_as, tolerated
        self.said: set[str] = set()
        self._cut = FewWarnings(log, f"prompts cut by {encoder}")
        self._unknown = FewWarnings(log, f"prompts with what {encoder} has no token for")

    def report(self, prompt: str, reading: PromptReading) -> None:
        """Warn of what is lost of a prompt that is read like this."""
        if prompt in self.said:
            return
        self.said.add(prompt)
        count, unknown = reading.tokens, len(reading.unknown)
        if count > reading.room:
            lost = shortened(prompt[reading.read :])
            read = f'{self.encoder} reads {reading.room} of the {count} tokens of "{shortened(prompt)}"'
            self._cut.warn(f'prompt cut: {read}; lost is "{lost}"')
        if unknown > self.tolerated * count:
            share = f"{unknown} of the {count} tokens ({100 * unknown / count:.0f} %)"
            read = f'{self.encoder} reads {share} of "{shortened(prompt)}" as {self.unknown_as}'
            self._unknown.warn(f"prompt unknown: {read}; write it in English")


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's token ids by token, and its merges in order, from open_clip_torch: nothing is downloaded."""
    from open_clip.tokenizer import SimpleTokenizer

    shipped = SimpleTokenizer()
    return {SPECIAL.get(number, token): number for token, number in shipped.encoder.items()}, list(shipped.bpe_ranks)


@cache
def clip_tokenizer() -> "CLIPTokenizer":
    """The class SD itself uses, on the vocabulary and merges that ship with open_clip_torch."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]  # its hints know no pairs


def clip_settings(cfg: TextEncoderConfig) -> dict[str, Any]:
    """The same sizes under the names of transformers' CLIPTextConfig."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": 4 * cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": cfg.max_length,
        "projection_dim": cfg.width,
        "hidden_act": "quick_gelu",
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }


class TextEncoder(nn.Module):
    """CLIP's text transformer, its parameters named ``transformer.text_model.*`` as in SD's checkpoint.

    The names do not depend on the installed transformers: releases from 5.6 on drop the ``text_model`` level from
    CLIPTextModel's own keys, older ones have it; here the inner network is always stored under ``text_model``.
    """

    def __init__(self, cfg: TextEncoderConfig) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.max_length = cfg.max_length
        unknown_as = "bytes of letters it has no token for"
        self._warnings = PromptWarnings("Stable Diffusion's text encoder", unknown_as, tolerated=0.25)
        clip = CLIPTextModel(CLIPTextConfig(**clip_settings(cfg)))
        self.transformer = nn.ModuleDict({"text_model": getattr(clip, "text_model", clip)})

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """SD's token ids (B, max_length): start, text, end, then padding with 49407.

        Long prompts lose their tail; a warning (once a prompt) says which words. Letters without a token of their own
        are read byte by byte; a warning says how many tokens are such bytes where they are more than a quarter.
        """
        rows = []
        for prompt in prompts:
            ids, reading = _tokens_of(prompt, self.max_length)
            self._warnings.report(prompt, reading)
            row = [START, *ids[: reading.room], END]
            rows.append(row + [END] * (self.max_length - len(row)))
        return torch.tensor(rows)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """States after the final norm, (B, max_length, width); cross-attention reads the padding too."""
        device = next(self.parameters()).device
        network = self.transformer["text_model"]
        return network(input_ids=self.tokenize(prompts).to(device)).last_hidden_state


def clip_reading(prompt: str, max_length: int) -> PromptReading:
    """What ``TextEncoder.tokenize`` makes of a prompt; letters that are read byte by byte have no token of their own.

    No network is needed for it.
    """
    return _tokens_of(prompt, max_length)[1]


def _tokens_of(prompt: str, max_length: int) -> tuple[list[int], PromptReading]:
    """The ids of all tokens of a prompt, and how it is read."""
    found = clip_tokenizer()(prompt, add_special_tokens=False, return_offsets_mapping=True)
    offsets = found["offset_mapping"]
    unknown = [span for span, shared in zip(offsets, _shared_letters(offsets), strict=True) if shared]
    return found["input_ids"], PromptReading.of(prompt, offsets, unknown, max_length - 2)


def _shared_letters(offsets: Sequence[Span]) -> list[bool]:
    """Which tokens, one (start, end) each, share a letter with a neighbour: they are parts of letters."""
    shared = [right[0] < left[1] for left, right in pairwise(offsets)]
    return [a or b for a, b in zip([False, *shared], [*shared, False], strict=True)] if offsets else []
