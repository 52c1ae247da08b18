"""The folder of BiomedCLIP as it is downloaded: found, checked, read; no network is built here.

It holds ``open_clip_config.json``, ``open_clip_pytorch_model.bin`` (or ``.safetensors``) and the tokenizer's files. It
has no BERT ``config.json``: the sizes are read off the weights instead, so the folder alone is enough offline.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import Checkpoint, plain_keys, read_checkpoint
from ldm.core.errors import MedSoftError, first_line
from ldm.core.files import read_json
from ldm.core.paths import shipped
from ldm.core.tables import counted

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer

HUB = "hf-hub:"
HUB_ID = HUB + "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "special_tokens_map.json")


class BiomedClipFolder(NamedTuple):
    """What a sound folder holds, but for the tokenizer."""

    folder: Path
    model_cfg: dict[str, Any]  # of open_clip_config.json
    preprocess_cfg: dict[str, Any]
    weights: Checkpoint  # the file as it was read
    state: dict[str, Tensor]  # its tensors by plain names
    bert: dict[str, Any]  # sizes of the text tower, as in BERT's config.json

    @property
    def context_length(self) -> int:
        """How many ids of a prompt the text tower reads."""
        return self.model_cfg["text_cfg"].get("context_length", 256)


def read_folder(source: str | Path) -> BiomedClipFolder:
    """The folder ``source``, or the one into which ``hf-hub:OWNER/NAME`` is downloaded.

    Raises MedSoftError naming the file that is missing, damaged or of another model.
    """
    folder = _downloaded(str(source)) if str(source).startswith(HUB) else shipped(Path(source))
    if not folder.is_dir():
        raise MedSoftError(
            f"{folder}: BiomedCLIP folder not found; download BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 "
            "there (open_clip_config.json, weights, tokenizer files), name another folder with --biomedclip, or "
            f"have it downloaded with --biomedclip {HUB_ID}"
        )
    settings = _read_settings(folder / "open_clip_config.json")
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise MedSoftError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")
    if not (folder / "tokenizer_config.json").is_file():
        raise MedSoftError(f"{folder}: no tokenizer_config.json; download it too")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise MedSoftError(f"{folder}: no tokenizer; expected tokenizer.json or vocab.txt")
    weights = read_checkpoint(found[0])
    state = _plain_state(weights)
    for other in found[1:]:
        differing = _differing(state, _plain_state(read_checkpoint(other)))
        if differing:
            raise MedSoftError(
                f"{folder}: {found[0].name} and {other.name} hold different weights "
                f"({counted(len(differing), 'tensor')}, first {differing[0]}); keep the one that is meant"
            )
    own = folder / "config.json"  # not in the download; kept by who has saved the text tower beside it
    try:
        bert = _own_config(own) if own.is_file() else bert_config(state)
    except KeyError as error:
        raise MedSoftError(f"{found[0]}: not BiomedCLIP's weights, there is no {error.args[0]}") from error
    return BiomedClipFolder(folder, settings["model_cfg"], settings.get("preprocess_cfg", {}), weights, state, bert)


def read_tokenizer(folder: Path, length: int, rows: int) -> "HFTokenizer":
    """The folder's tokenizer, which cuts or pads to ``length`` ids; ``rows``: how many the text encoder knows."""
    from open_clip.tokenizer import HFTokenizer

    try:
        made = HFTokenizer(str(folder), context_length=length, clean="whitespace", trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
        if "trust_remote_code" in str(error):
            raise MedSoftError(
                f"{folder}: its tokenizer_config.json asks to run code of its own (auto_map), which is never done; "
                "download the folder as it was published"
            ) from error
        raise MedSoftError(f"{folder}: damaged tokenizer files ({first_line(error)}); download them again") from error
    if made.tokenizer.pad_token_id is None or len(made.tokenizer) > rows:
        raise MedSoftError(
            f"{folder}: the tokenizer's files are of another model ({len(made.tokenizer)} words, padding "
            f"{made.tokenizer.pad_token}); the text encoder knows {rows}"
        )
    return made


def _plain_state(weights: Checkpoint) -> dict[str, Tensor]:
    state = plain_keys(weights.path, weights.state)
    state.pop("text.transformer.embeddings.position_ids", None)  # a buffer that newer transformers do not have
    return state


def _differing(state: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Keys that only one of two files has, else keys of tensors that differ in type, shape or a value."""

    def equal(a: Tensor, b: Tensor) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b)

    return sorted(state.keys() ^ other.keys()) or [key for key in state if not equal(state[key], other[key])]


def _own_config(path: Path) -> dict[str, Any]:
    """BERT's config.json without ``auto_map``, the name of code that transformers would offer to run."""
    found = read_json(path, "BERT configuration")
    if not isinstance(found, dict):
        raise MedSoftError(f"{path}: expected keys with values, found {type(found).__name__}")
    return {key: value for key, value in found.items() if key != "auto_map"}


def bert_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes in BERT's config.json, read off BiomedCLIP's weights. Raises KeyError if they hold no BERT."""
    prefix = "text.transformer."
    embeddings = state[prefix + "embeddings.word_embeddings.weight"]
    layers = {name.split(".")[4] for name in state if name.startswith(prefix + "encoder.layer.")}
    return {
        "model_type": "bert",
        "vocab_size": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, embeddings.shape[1] // 64),  # 64 channels a head in every released BERT
        "intermediate_size": state[prefix + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[prefix + "embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state[prefix + "embeddings.token_type_embeddings.weight"].shape[0],
    }


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path, "BiomedCLIP configuration")
    model: Any = settings.get("model_cfg") if isinstance(settings, dict) else None
    for section in ("embed_dim", "vision_cfg", "text_cfg"):
        if not isinstance(model, dict) or section not in model:
            raise MedSoftError(f"{path}: no model_cfg.{section}; download it again")
    for section, key in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")):
        if key not in model[section]:
            raise MedSoftError(f"{path}: no model_cfg.{section}.{key}; this CLIP is not BiomedCLIP")
    return settings


def _downloaded(name: str) -> Path:
    """The folder of ``hf-hub:OWNER/NAME`` in the hub's local cache; what is not there yet is downloaded."""
    from huggingface_hub import snapshot_download

    wanted = ("open_clip_config.json", *WEIGHTS, *TOKENIZER)
    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:
        raise MedSoftError(
            f"{name}: neither in the local cache of the hub nor reachable ({first_line(error)}); download its "
            "files elsewhere and give their folder with --biomedclip"
        ) from error
