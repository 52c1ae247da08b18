"""Folders laid out as the hub has them: SD's tokenizer, BiomedCLIP; and open_clip's own reading of the latter."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tiny import CLIP
from torch import Tensor

from ldm.bench.common import BIOMEDCLIP

# open_clip_config.json of microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224.
RELEASED = {
    "model_cfg": BIOMEDCLIP,
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
# config.json of microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract, which is not in that folder.
BIOMEDBERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
FILES = (
    "open_clip_config.json",
    "open_clip_pytorch_model.bin",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def write_download(folder: Path, settings: dict[str, Any], state: dict[str, Tensor], words: list[str]) -> Path:
    """The six files of the released folder, for other sizes; ``words`` is the vocabulary, [PAD] first."""
    from tokenizers import BertWordPieceTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True).save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    split = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **split, **special}))
    positions = state["text.transformer.embeddings.position_embeddings.weight"].shape[0]
    old = {"text.transformer.embeddings.position_ids": torch.arange(positions)[None]}  # as in the released file
    torch.save({**state, **old}, folder / "open_clip_pytorch_model.bin")
    return folder


def phantom_download(folder: Path) -> Path:
    """The shipped phantom BiomedCLIP as a download, with the released folder's names and normalisation."""
    settings = json.loads((CLIP / "open_clip_config.json").read_text())
    text = {**RELEASED["model_cfg"]["text_cfg"], "context_length": 32}
    settings = {**RELEASED, "model_cfg": {**settings["model_cfg"], "text_cfg": text}}
    state = torch.load(CLIP / "open_clip_pytorch_model.bin", weights_only=True)
    return write_download(folder, settings, state, (CLIP / "vocab.txt").read_text(encoding="utf-8").split())


def read_by_open_clip(folder: Path, scratch: Path, bert: dict[str, Any]) -> tuple[Any, Any, Any]:
    """open_clip's own network, evaluation transform and tokenizer for a download.

    Offline, open_clip needs BERT's published config.json (``bert``) beside the weights, and its name in the settings.
    """
    import open_clip

    scratch.mkdir()
    for name in FILES:
        (scratch / name).symlink_to(folder / name)
    (scratch / "config.json").write_text(json.dumps(bert))
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"] |= {"hf_model_name": str(scratch), "hf_tokenizer_name": str(scratch)}
    (scratch / "open_clip_config.json").unlink()
    (scratch / "open_clip_config.json").write_text(json.dumps(settings))
    where = f"local-dir:{scratch}"
    # pretrained_hf: the text tower's weights are in the same file, not in a second download
    network, transform = open_clip.create_model_from_pretrained(where, pretrained_hf=False)
    return network.eval(), transform, open_clip.get_tokenizer(where)


def put_in_hub_cache(folder: Path, cache: Path, name: str) -> Path:
    """``folder`` as huggingface_hub keeps a downloaded repository ``name``; returns the snapshot."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    kept = cache / f"models--{name.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision)
    shutil.copytree(folder, kept / "snapshots" / revision)
    return kept / "snapshots" / revision


def sd_tokenizer_folder(folder: Path) -> Path:
    """The files of Stable Diffusion's ``tokenizer`` folder, from the vocabulary in open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    shipped = SimpleTokenizer()
    names = {49406: "<|startoftext|>", 49407: "<|endoftext|>"}  # open_clip calls these two otherwise
    vocabulary = {names.get(number, token): number for token, number in shipped.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in shipped.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@contextmanager
def serve_hub(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine with the repository ``name`` = ``folder``: its address, and the files fetched so far."""
    revision, fetched = "0123456789abcdef0123456789abcdef01234567", []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, whole: bool) -> None:
            self.send_response(200)
            if self.path.startswith(f"/api/models/{name}"):
                files = [
                    {"type": "file", "rfilename": path.name, "path": path.name, "oid": "0", "size": path.stat().st_size}
                    for path in sorted(folder.iterdir())
                ]
                about = files if "/tree/" in self.path else {"id": name, "sha": revision, "siblings": files}
                body = json.dumps(about).encode()
                self.send_header("Content-Type", "application/json")
            else:
                path = folder / self.path.rsplit("/", 1)[1]
                body = path.read_bytes()
                self.send_header("ETag", f'"{path.name}"')
                self.send_header("X-Repo-Commit", revision)
                if whole:
                    fetched.append(path.name)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if whole:
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
