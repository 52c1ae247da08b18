"""Stable Diffusion's CLIP text encoder."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import TextEncoderConfig
from ldm.core.tables import shortened

log = logging.getLogger(__name__)

START, END = 49406, 49407  # CLIP's start and end of text; SD also pads with END (open_clip pads with 0)
SPECIAL = {START: "<|startoftext|>", END: "<|endoftext|>"}  # open_clip calls these two otherwise


class TruncationWarnings:
    """Says that a prompt is longer than its encoder reads: each prompt once, with what is lost."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def report(self, encoder: str, prompt: str, room: int, offsets: Sequence[tuple[int, int]]) -> None:
        """Warn that of the prompt's tokens, one (start, end) of ``offsets`` each, only ``room`` are read."""
        if prompt not in self.said:
            self.said.add(prompt)
            texts = shortened(prompt), shortened(prompt[offsets[room][0] :])
            message = 'prompt cut: %s reads %d of the %d tokens of "%s"; lost is "%s"'
            log.warning(message, encoder, room, len(offsets), *texts)


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's token ids by token, and its merges in order, from open_clip_torch: nothing is downloaded."""
    from open_clip.tokenizer import SimpleTokenizer

    shipped = SimpleTokenizer()
    return {SPECIAL.get(number, token): number for token, number in shipped.encoder.items()}, list(shipped.bpe_ranks)


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
        self._cuts = TruncationWarnings()
        clip = CLIPTextModel(CLIPTextConfig(**clip_settings(cfg)))
        self.transformer = nn.ModuleDict({"text_model": getattr(clip, "text_model", clip)})

    @cached_property
    def _tokenizer(self):
        """The class SD itself uses, on the vocabulary and merges that ship with open_clip_torch."""
        from transformers import CLIPTokenizer

        vocabulary, merges = clip_vocabulary()
        return CLIPTokenizer(vocab=vocabulary, merges=merges)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """SD's token ids (B, max_length): start, text, end, then padding with 49407.

        Long prompts lose their tail; a warning (once a prompt) says which words.
        """
        room = self.max_length - 2
        rows = []
        for prompt in prompts:
            found = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
            ids = found["input_ids"]
            if len(ids) > room:
                self._cuts.report("Stable Diffusion's text encoder", prompt, room, found["offset_mapping"])
            row = [START, *ids[:room], END]
            rows.append(row + [END] * (self.max_length - len(row)))
        return torch.tensor(rows)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """States after the final norm, (B, max_length, width); cross-attention reads the padding too."""
        device = next(self.parameters()).device
        network = self.transformer["text_model"]
        return network(input_ids=self.tokenize(prompts).to(device)).last_hidden_state
