"""A folder in BiomedCLIP's format for the stand-in: settings, BERT's configuration, a WordPiece tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import BertTokenizer

from ldm.config import BiomedClipConfig
from ldm.core.files import write_json, write_text


def write_clip_folder(
    folder: Path, prompts: list[str], clip: BiomedClipConfig, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The folder's small files in BiomedCLIP's format: settings, BERT's configuration, WordPiece tokenizer.

    ``about``: what the settings say of the training besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for prompt in prompts for word in prompt.lower().replace("-", " - ").split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *",.-'"]
    pieces += [p for p in dict.fromkeys([*words, *letters, *("##" + letter for letter in letters)]) if p not in pieces]
    write_text(folder / "vocab.txt", "\n".join(pieces) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    bert = {
        "model_type": "bert",
        "vocab_size": len(pieces),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
    }
    write_json(folder / "config.json", bert)
    vision = {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 16 * clip.grid,
    }
    text = {
        "hf_model_name": "models/phantom_base/biomedclip",
        "hf_tokenizer_name": "models/phantom_base/biomedclip",
        "hf_model_pretrained": False,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 32,
    }
    settings = {
        "model_cfg": {"embed_dim": clip.text_dim, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        **about,
    }
    write_json(folder / "open_clip_config.json", settings)
    return settings
