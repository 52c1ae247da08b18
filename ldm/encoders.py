"""The frozen encoders: Stable Diffusion's CLIP text encoder and BiomedCLIP."""

import json
import logging
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import BiomedClipConfig, TextEncoderConfig
from ldm.errors import MedSoftError
from ldm.files import read_json, sha256_file

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint

log = logging.getLogger(__name__)

START, END = 49406, 49407  # CLIP's start and end of text; SD also pads with END (open_clip pads with 0)


class TextEncoder(nn.Module):
    """CLIP's text transformer, its parameters named ``transformer.text_model.*`` as in SD's checkpoint.

    The names do not depend on the installed transformers: releases from 5.6 on drop the ``text_model`` level from
    CLIPTextModel's own keys, older ones have it; here the inner network is always stored under ``text_model``.
    """

    def __init__(self, cfg: TextEncoderConfig) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.max_length = cfg.max_length
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=cfg.vocab_size,
                hidden_size=cfg.width,
                intermediate_size=4 * cfg.width,
                num_hidden_layers=cfg.layers,
                num_attention_heads=cfg.heads,
                max_position_embeddings=cfg.max_length,
                hidden_act="quick_gelu",
                projection_dim=cfg.width,
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=END,
            )
        )
        self.transformer = nn.ModuleDict({"text_model": getattr(clip, "text_model", clip)})

    @cached_property
    def _tokenizer(self):
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer()  # its vocabulary file ships with open_clip_torch

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """SD's token ids (B, max_length): start, text, end, then padding with 49407. Long prompts lose their tail."""
        rows = []
        for prompt in prompts:
            ids = self._tokenizer.encode(prompt)
            room = self.max_length - 2
            if len(ids) > room:
                log.warning("prompt cut to %d of its %d tokens: %s...", room, len(ids), prompt[:60])
            row = [START, *ids[:room], END]
            rows.append(row + [END] * (self.max_length - len(row)))
        return torch.tensor(rows)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """States after the final norm, (B, max_length, width); cross-attention reads the padding too."""
        device = next(self.parameters()).device
        network = self.transformer["text_model"]
        return network(input_ids=self.tokenize(prompts).to(device)).last_hidden_state


def _located(folder: Path) -> Path:
    """``folder`` as seen from the working directory, or else from the repository, for the shipped YAMLs."""
    in_repository = Path(__file__).resolve().parents[1] / folder
    return in_repository if not folder.exists() and in_repository.is_dir() else folder


class BiomedClip(nn.Module):
    """BiomedCLIP from a folder as it is downloaded: frozen, in evaluation mode, never stored in our checkpoints.

    The folder holds ``open_clip_config.json``, ``open_clip_pytorch_model.bin`` (or ``.safetensors``) and the
    tokenizer's files. It has no BERT ``config.json``, which open_clip would fetch from the hub: the sizes are read off
    the weights instead, so the folder alone is enough offline.
    """

    WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = _located(Path(folder))
        settings, weights_file = self._check_folder()
        from open_clip.model import CustomTextCLIP
        from open_clip.tokenizer import HFTokenizer

        from ldm.checkpoint import read_tensors

        state = read_tensors(weights_file)
        state.pop("text.transformer.embeddings.position_ids", None)  # a buffer that newer transformers do not have
        model = settings["model_cfg"]
        vision = {**model["vision_cfg"], "timm_model_pretrained": False}
        with tempfile.TemporaryDirectory() as scratch:
            bert = self._bert_folder(state, Path(scratch))
            text = {**model["text_cfg"], "hf_model_name": str(bert), "hf_model_pretrained": False}
            self.clip = CustomTextCLIP(model["embed_dim"], vision, text)
        try:
            self.clip.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise MedSoftError(f"{weights_file}: does not fit open_clip_config.json beside it: {error}") from error
        length = model["text_cfg"].get("context_length", 256)
        self._tokenizer = HFTokenizer(str(self.folder), context_length=length, clean="whitespace")
        self.fingerprint = sha256_file(weights_file)
        preprocess = settings.get("preprocess_cfg", {})
        self.register_buffer("image_mean", torch.tensor(preprocess.get("mean", [0.5] * 3))[:, None, None], False)
        self.register_buffer("image_std", torch.tensor(preprocess.get("std", [0.5] * 3))[:, None, None], False)
        self.image_size = int(vision["image_size"])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "BiomedClip":
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def _check_folder(self) -> tuple[dict, Path]:
        if not self.folder.is_dir():
            raise MedSoftError(
                f"{self.folder}: BiomedCLIP folder not found; download BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 "
                "there (open_clip_config.json, weights, tokenizer files), or name another folder with --biomedclip"
            )
        settings = read_json(self.folder / "open_clip_config.json", "BiomedCLIP configuration")
        found = [self.folder / name for name in self.WEIGHTS if (self.folder / name).is_file()]
        if not found:
            raise MedSoftError(f"{self.folder}: no weights; expected one of {', '.join(self.WEIGHTS)}")
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            raise MedSoftError(f"{self.folder}: no tokenizer; expected tokenizer.json or vocab.txt")
        for section in ("embed_dim", "vision_cfg", "text_cfg"):
            if section not in settings.get("model_cfg", {}):
                raise MedSoftError(f"{self.folder / 'open_clip_config.json'}: no model_cfg.{section}")
        return settings, found[0]

    def _bert_folder(self, state: dict[str, Tensor], scratch: Path) -> Path:
        """A folder with BERT's config.json: BiomedCLIP's own if it has one, else one made from the weights' shapes."""
        if (self.folder / "config.json").is_file():
            return self.folder
        prefix = "text.transformer."
        words = state[prefix + "embeddings.word_embeddings.weight"]
        layers = {name.split(".")[4] for name in state if name.startswith(prefix + "encoder.layer.")}
        config = {
            "model_type": "bert",
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(1, words.shape[1] // 64),  # 64 channels a head in every released BERT
            "intermediate_size": state[prefix + "encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_position_embeddings": state[prefix + "embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": state[prefix + "embeddings.token_type_embeddings.weight"].shape[0],
        }
        (scratch / "config.json").write_text(json.dumps(config))
        return scratch

    def check(self, cfg: BiomedClipConfig) -> None:
        """Raise a MedSoftError unless the folder's sizes are those the configuration was written for."""
        trunk = self.clip.visual.trunk
        grid = self.image_size // trunk.patch_embed.patch_size[0]
        found = {"grid": grid, "token_dim": trunk.num_features, "text_dim": self.clip.text.output_dim}
        for key, value in found.items():
            if value != getattr(cfg, key):
                raise MedSoftError(
                    f"{self.folder}: biomedclip.{key} is {value}, the configuration expects {getattr(cfg, key)}; "
                    "use the YAML that belongs to this encoder"
                )

    def check_same(self, checkpoint: "Checkpoint") -> None:
        """Raise a MedSoftError if the checkpoint was trained on the tokens of another BiomedCLIP."""
        known = checkpoint.about.get("biomedclip")
        if known and known != self.fingerprint:
            raise MedSoftError(
                f"{self.folder}: is not the BiomedCLIP that {checkpoint.path} was trained with; give that folder with "
                "--biomedclip"
            )

    def normalise(self, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Image (B, 3, S, S) in [-1, 1] -> encoder input; ``hidden`` (B, 1, S, S) > 0 becomes 0 after normalisation."""
        size = (self.image_size, self.image_size)
        resized = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = ((resized + 1) / 2 - self.image_mean) / self.image_std
        if hidden is None:
            return pixels
        gone = F.interpolate(hidden.float(), size=size, mode="bilinear", antialias=True) > 0  # every touched pixel
        return pixels * (~gone)

    @torch.no_grad()
    def encode_image(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, grid**2, D) and CLS token (B, D) after the trunk's final norm. Image as in ``normalise``."""
        features = self.clip.visual.trunk.forward_features(self.normalise(image, hidden))
        return features[:, 1:], features[:, 0]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Projected text embeddings (B, text_dim), not normalised."""
        device = self.image_mean.device
        return self.clip.encode_text(self._tokenizer(list(prompts)).to(device))
