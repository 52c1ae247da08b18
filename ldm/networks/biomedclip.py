"""The frozen encoders: Stable Diffusion's CLIP text encoder and BiomedCLIP."""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import Checkpoint, check_finite, compare, read_tensors
from ldm.config import BiomedClipConfig
from ldm.core.errors import MedSoftError
from ldm.core.files import read_json, sha256_file
from ldm.core.paths import shipped
from ldm.networks.text_encoder import TruncationWarnings

if TYPE_CHECKING:
    from open_clip.model import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer

log = logging.getLogger(__name__)


HUB = "hf-hub:"
HUB_ID = HUB + "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


def _downloaded(name: str) -> Path:
    """The folder of ``hf-hub:OWNER/NAME`` in the hub's local cache; what is not there yet is downloaded."""
    from huggingface_hub import snapshot_download

    wanted = ("open_clip_config.json", *BiomedClip.WEIGHTS, *BiomedClip.TOKENIZER)
    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:
        raise MedSoftError(
            f"{name}: neither in the local cache of the hub nor reachable ({_first_line(error)}); download its "
            "files elsewhere and give their folder with --biomedclip"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def bert_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes in BERT's config.json, read off BiomedCLIP's weights. Raises KeyError if they hold no BERT."""
    prefix = "text.transformer."
    words = state[prefix + "embeddings.word_embeddings.weight"]
    layers = {name.split(".")[4] for name in state if name.startswith(prefix + "encoder.layer.")}
    return {
        "model_type": "bert",
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, words.shape[1] // 64),  # 64 channels a head in every released BERT
        "intermediate_size": state[prefix + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[prefix + "embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state[prefix + "embeddings.token_type_embeddings.weight"].shape[0],
    }


def build_clip(model_cfg: dict[str, Any], bert: dict[str, Any]) -> "CustomTextCLIP":
    """open_clip's network for ``model_cfg`` of an open_clip_config.json, random, its text tower sized by ``bert``.

    open_clip itself would fetch BERT's config.json from the hub; nothing is fetched here.
    """
    from open_clip.model import CustomTextCLIP

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(bert))
        vision = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
        text = {**model_cfg["text_cfg"], "hf_model_name": scratch, "hf_model_pretrained": False}
        return CustomTextCLIP(model_cfg["embed_dim"], vision, text)


class BiomedClip(nn.Module):
    """BiomedCLIP: frozen, in evaluation mode, never stored in our checkpoints.

    ``source`` is a folder as it is downloaded, or ``hf-hub:OWNER/NAME``, which is fetched into the hub's local cache.
    The folder holds ``open_clip_config.json``, ``open_clip_pytorch_model.bin`` (or ``.safetensors``) and the
    tokenizer's files. It has no BERT ``config.json``: the sizes are read off the weights instead, so the folder alone
    is enough offline. Raises MedSoftError naming the file that is missing, damaged or of another model.
    """

    WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
    TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "special_tokens_map.json")

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.folder = _downloaded(str(source)) if str(source).startswith(HUB) else shipped(Path(source))
        settings, weights_file = self._check_folder()
        state = read_tensors(weights_file)
        state.pop("text.transformer.embeddings.position_ids", None)  # a buffer that newer transformers do not have
        self.clip = self._build(settings["model_cfg"], state, weights_file)
        self._tokenizer = self._read_tokenizer(settings["model_cfg"]["text_cfg"].get("context_length", 256))
        self._cuts = TruncationWarnings()
        self.fingerprint = sha256_file(weights_file)
        preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, **settings.get("preprocess_cfg", {})}
        self.register_buffer("image_mean", torch.tensor(preprocess["mean"])[:, None, None], False)
        self.register_buffer("image_std", torch.tensor(preprocess["std"])[:, None, None], False)
        self.image_size = self.clip.visual.trunk.patch_embed.img_size[0]
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "BiomedClip":
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def _check_folder(self) -> tuple[dict, Path]:
        if not self.folder.is_dir():
            raise MedSoftError(
                f"{self.folder}: BiomedCLIP folder not found; download BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 "
                "there (open_clip_config.json, weights, tokenizer files), name another folder with --biomedclip, or "
                f"have it downloaded with --biomedclip {HUB_ID}"
            )
        config_file = self.folder / "open_clip_config.json"
        settings = read_json(config_file, "BiomedCLIP configuration")
        model = settings.get("model_cfg") if isinstance(settings, dict) else None
        for section in ("embed_dim", "vision_cfg", "text_cfg"):
            if not isinstance(model, dict) or section not in model:
                raise MedSoftError(f"{config_file}: no model_cfg.{section}; download it again")
        for section, key in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")):
            if key not in model[section]:
                raise MedSoftError(f"{config_file}: no model_cfg.{section}.{key}; this CLIP is not BiomedCLIP")
        found = [self.folder / name for name in self.WEIGHTS if (self.folder / name).is_file()]
        if not found:
            raise MedSoftError(f"{self.folder}: no weights; expected one of {', '.join(self.WEIGHTS)}")
        if not (self.folder / "tokenizer_config.json").is_file():
            raise MedSoftError(f"{self.folder}: no tokenizer_config.json; download it too")
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            raise MedSoftError(f"{self.folder}: no tokenizer; expected tokenizer.json or vocab.txt")
        return settings, found[0]

    def _build(self, model_cfg: dict, state: dict[str, Tensor], weights_file: Path) -> "CustomTextCLIP":
        """The network with the weights of the folder."""
        own = self.folder / "config.json"  # not in the download; kept by who has saved the text tower beside it
        try:
            bert = read_json(own) if own.is_file() else bert_config(state)
        except KeyError as error:
            raise MedSoftError(f"{weights_file}: not BiomedCLIP's weights, there is no {error.args[0]}") from error
        try:
            made = build_clip(model_cfg, bert)
        except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise MedSoftError(
                f"{self.folder}: its open_clip_config.json builds no network ({_first_line(error)})"
            ) from error
        if getattr(made.visual.trunk, "num_prefix_tokens", None) != 1:
            raise MedSoftError(
                f"{self.folder}: {model_cfg['vision_cfg']['timm_model_name']} has no patch tokens and one CLS token; "
                "expected a vision transformer, as BiomedCLIP's"
            )
        problems = compare(made.state_dict(), state)
        if problems:
            raise MedSoftError(f"{weights_file}: does not fit open_clip_config.json beside it: {'; '.join(problems)}")
        check_finite(state, weights_file)
        made.load_state_dict(state, strict=True)
        return made

    def _read_tokenizer(self, length: int) -> "HFTokenizer":
        from open_clip.tokenizer import HFTokenizer

        try:
            made = HFTokenizer(str(self.folder), context_length=length, clean="whitespace")
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
            raise MedSoftError(
                f"{self.folder}: damaged tokenizer files ({_first_line(error)}); download them again"
            ) from error
        rows = self.clip.text.vocab_size
        if made.tokenizer.pad_token_id is None or len(made.tokenizer) > rows:
            raise MedSoftError(
                f"{self.folder}: the tokenizer's files are of another model ({len(made.tokenizer)} words, padding "
                f"{made.tokenizer.pad_token}); the text encoder knows {rows}"
            )
        return made

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

    def check_same(self, checkpoint: Checkpoint) -> None:
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
        """Projected text embeddings (B, text_dim), not normalised. A warning (once a prompt) says what is cut off."""
        wrapped, room = self._tokenizer, self._tokenizer.context_length - 2
        for prompt in prompts:
            found = wrapped.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(found) > room:
                self._cuts.report("BiomedCLIP", prompt, room, found)
        return self.clip.encode_text(wrapped(list(prompts)).to(self.image_mean.device))
