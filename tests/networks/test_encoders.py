"""The frozen encoders against transformers, open_clip and tokenizers; what is wrong with a BiomedCLIP folder."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from downloads import FILES, phantom_download, put_in_hub_cache, read_by_open_clip, sd_tokenizer_folder, serve_hub
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_networks import noise, relative_error, scrambled
from tiny import CLIP, MODELS, TRAIN, VAL, call, infer
from torch import Tensor

import ver_train
from ldm.config import TextEncoderConfig, load_config
from ldm.core.errors import MedSoftError
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.opening import open_encoder
from ldm.networks.text_encoder import TextEncoder, clip_tokenizer

PROMPTS = [
    "",
    "Healthy",
    "Osteolytic lesion of L3, moderate; 12 mm (T2-weighted)",
    "Métastase ostéoblastique — vertèbre T11",
    "a diffuse lesion with a salt and pepper texture, " * 12,
]
HUB_NAME = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------ SD's tokenizer


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    with torch.no_grad():
        return scrambled(TextEncoder(TextEncoderConfig(width=24, layers=2, heads=2)))


def ids(encoder: TextEncoder, prompt: str) -> list[int]:
    """The ids of the prompt alone, without start, end and padding."""
    row = encoder.tokenize([prompt])[0].tolist()
    assert row[0] == 49406
    return row[1 : row.index(49407)]


@pytest.mark.parametrize(
    ("prompt", "published"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a photo of a dog", [320, 1125, 539, 320, 1929]),
        ("Hello, world!", [3306, 267, 1002, 256]),
    ],
)
def test_token_ids_known_from_clip(text_encoder: TextEncoder, prompt: str, published: list[int]) -> None:
    assert ids(text_encoder, prompt) == published


def test_token_ids_are_those_of_stable_diffusion(text_encoder: TextEncoder, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(sd_tokenizer_folder(tmp_path))
    found = text_encoder.tokenize(PROMPTS)
    expected = theirs(PROMPTS, padding="max_length", truncation=True)["input_ids"]
    assert found.tolist() == expected
    # The same as open_clip's but for the padding, which cross-attention reads.
    padded = open_clips_tokenizer()(PROMPTS, context_length=77)
    for row, open_clip_row, end in zip(found, padded, padded.argmax(dim=1), strict=True):
        assert torch.equal(row[: end + 1], open_clip_row[: end + 1])
        assert (row[end:] == 49407).all()


# Letters with and without accents, Greek, Cyrillic, digits, punctuation, mathematics and symbols.
WRITTEN = st.characters(max_codepoint=0x2AFF, exclude_categories=("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
WORDS = st.sampled_from(["osteolytic", "L3", "T11", "12 mm", "Métastase", "vertèbre", "MODIC-1", "≥", "µm", "n°", "'s"])


@cache
def open_clips_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.one_of(WORDS, st.text(WRITTEN, max_size=8)), max_size=8))
def test_token_ids_agree_with_open_clips_byte_pairs(text_encoder: TextEncoder, pieces: list[str]) -> None:
    """Any sentence that open_clip does not rewrite (it straightens quotes, unescapes HTML; SD does not)."""
    prompt = " ".join(pieces)
    shipped = open_clips_tokenizer()
    plain = " ".join(unicodedata.normalize("NFC", prompt).split())
    assume(shipped.clean_fn(prompt) == "".join(letter.lower() for letter in plain))
    expected = shipped.encode(prompt)
    assume(len(expected) <= 75)
    assert ids(text_encoder, prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "same_as"),
    [
        ("Me\u0301tastase", "métastase"),  # composed
        ("  lesion\u00a0of\n L3\t", "lesion of l3"),  # every white space is one space
        ("<start_of_text> lesion", "< start _ of _ text > lesion"),  # open_clip's marker is text, not a mark
    ],
)
def test_spellings_of_the_same_prompt(text_encoder: TextEncoder, prompt: str, same_as: str) -> None:
    assert ids(text_encoder, prompt) == ids(text_encoder, same_as)


@pytest.mark.parametrize(("prompt", "other"), [("L3&amp;L4", "L3&L4"), ("l’os", "l'os"), ("ﬁbrous", "fibrous")])
def test_nothing_is_rewritten(text_encoder: TextEncoder, prompt: str, other: str) -> None:
    assert ids(text_encoder, prompt) != ids(text_encoder, other)


def test_prompt_of_300_words_is_cut_with_a_warning(text_encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a lytic lesion " * 100
    for _ in range(2):
        row = text_encoder.tokenize([prompt])
        assert row.shape == (1, 77)
        assert row[0, [0, -1]].tolist() == [49406, 49407]
    (said,) = [record.getMessage() for record in caplog.records]  # once, not at every use
    assert "reads 75 of the" in said
    count = int(said.split("reads 75 of the ")[1].split()[0])
    assert count == len(clip_tokenizer()(prompt, add_special_tokens=False)["input_ids"]) > 300
    assert '"a lytic lesion a lytic' in said


def test_warning_names_the_words_that_are_lost(text_encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    text_encoder.tokenize(["a " * 75 + "sclerotic rim"])
    assert 'lost is "sclerotic rim"' in caplog.text
    caplog.clear()
    text_encoder.tokenize(["b " * 75])  # fits exactly
    assert not caplog.records


# ---------------------------------------------------------------------------------------- SD's text encoder


def test_text_states_agree_with_transformers(text_encoder: TextEncoder) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(
        CLIPTextConfig(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    keys = [key.removeprefix("text_model.") for key in theirs.state_dict()]
    stored = text_encoder.state_dict()
    # SD's own names, whatever level the installed transformers puts above them.
    theirs.load_state_dict(
        {name: stored[f"transformer.text_model.{key}"] for name, key in zip(theirs.state_dict(), keys, strict=True)}
    )
    expected = theirs(input_ids=text_encoder.tokenize(PROMPTS)).last_hidden_state
    assert relative_error(text_encoder(PROMPTS), expected) < 1e-5


def open_clip_text(encoder: TextEncoder, heads: int) -> Callable[[Tensor], Tensor]:
    """open_clip's text transformer, another implementation of CLIP's, with the encoder's weights; ids -> states."""
    from open_clip.transformer import QuickGELU, TextTransformer

    stored = {key.removeprefix("transformer.text_model."): value for key, value in encoder.state_dict().items()}
    words = stored["embeddings.token_embedding.weight"]
    layers = {key.split(".")[2] for key in stored if key.startswith("encoder.layers.")}
    theirs = TextTransformer(
        77, words.shape[0], words.shape[1], heads, len(layers), act_layer=QuickGELU, output_tokens=True
    )
    state = {
        "token_embedding.weight": words,
        "positional_embedding": stored["embeddings.position_embedding.weight"],
        "text_projection": theirs.text_projection,
    }
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = stored[f"final_layer_norm.{kind}"]
        for layer in layers:
            source, target = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            joined = [stored[f"{source}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{target}attn.in_proj_{kind}"] = torch.cat(joined)
            for here, there in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                state[f"{target}{there}.{kind}"] = stored[f"{source}{here}.{kind}"]
    theirs.load_state_dict(state, strict=True)
    return lambda numbers: theirs.eval()(numbers)[1]


def test_text_states_agree_with_open_clip(text_encoder: TextEncoder) -> None:
    expected = open_clip_text(text_encoder, heads=2)(text_encoder.tokenize(PROMPTS))
    assert relative_error(text_encoder(PROMPTS), expected) < 1e-5


# ------------------------------------------------------------------------------------------------ BiomedCLIP


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """The phantom BiomedCLIP as if downloaded; its files may be changed."""
    return phantom_download(tmp_path / "clip")


def agrees_with_open_clip(folder: Path, scratch: Path, bert: dict, prompts: list[str], limit: float) -> BiomedClip:
    """Tokens, global token, embeddings, preparation and ids of ``folder``, ours against open_clip's."""
    from PIL import Image

    theirs, transform, tokenizer = read_by_open_clip(folder, scratch, bert)
    ours = BiomedClip(folder)
    assert relative_error(ours.encode_text(prompts), theirs.encode_text(tokenizer(prompts))) < limit

    pixels = np.random.default_rng(0).integers(0, 256, (2, ours.image_size, ours.image_size, 3), dtype=np.uint8)
    prepared = torch.stack([transform(Image.fromarray(picture)) for picture in pixels])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    assert relative_error(ours.normalise(image), prepared) < 1e-5
    tokens, token = ours.encode_image(image)
    assert relative_error(theirs.visual.head(token), theirs.encode_image(prepared)) < limit
    # The last block's output through the final norm, which open_clip hands out as an intermediate.
    found = theirs.forward_intermediates(
        prepared,
        image_indices=1,
        normalize_intermediates=True,
        image_output_fmt="NLC",
        image_output_extra_tokens=True,
    )
    assert relative_error(tokens, found["image_intermediates"][-1]) < limit
    assert relative_error(token[:, None], found["image_intermediates_prefix"][-1]) < limit
    return ours


def test_download_agrees_with_open_clip(download: Path, tmp_path: Path) -> None:
    bert = json.loads((CLIP / "config.json").read_text())
    prompts = ["", "Healthy", "severe osteolytic lesion of the L3 vertebra", "lésion of L3 " * 40]
    ours = agrees_with_open_clip(download, tmp_path / "theirs", bert, prompts, 1e-5)
    assert sorted(path.name for path in download.iterdir()) == list(FILES)
    tokens, token = ours.encode_image(noise(1, 3, 64, 64).clamp(-1, 1))
    assert (tokens.shape, token.shape) == ((1, 100, 64), (1, 64))
    assert ours.encode_text(["healthy"]).shape == (1, 64)


def test_phantom_biomedclip_opens_in_open_clip_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    folder = CLIP.relative_to(MODELS.parent)
    monkeypatch.chdir(MODELS.parent)  # the configuration in the folder names its text encoder relative to it
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours = BiomedClip(CLIP)
    prompts = ["healthy", "severe osteolytic lesion of the L3 vertebra"]
    assert relative_error(ours.encode_text(prompts), theirs.encode_text(tokenizer(prompts))) < 1e-5


def test_preparation_of_other_sizes_agrees_with_open_clip(download: Path, tmp_path: Path) -> None:
    from PIL import Image

    _, transform, _ = read_by_open_clip(download, tmp_path / "theirs", json.loads((CLIP / "config.json").read_text()))
    ours = BiomedClip(download)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.BICUBIC))
    image = torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    # Pillow rounds to whole grey values after each of two passes, ours does not. 0.26: the smallest deviation.
    assert (ours.normalise(image)[0] - transform(Image.fromarray(smooth))).abs().max() < 1.5 / 255 / 0.26


def test_no_pixel_of_the_encoders_input_depends_on_a_hidden_one() -> None:
    """Sizes above and below the encoder's own, odd regions: resampling reaches across the region's border."""
    clip = BiomedClip(CLIP)
    generator = torch.Generator().manual_seed(0)
    for size in (48, 64, 75, 200):
        hidden = torch.zeros(1, 1, size, size)
        hidden[..., size // 3 : size // 2, size // 5 : size // 2 + 1] = 1
        first = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
        other = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
        second = torch.where(hidden > 0, other, first)
        assert torch.equal(clip.normalise(first, hidden), clip.normalise(second, hidden))


def test_text_ids_agree_with_word_pieces_of_their_own(download: Path) -> None:
    from tokenizers import BertWordPieceTokenizer

    theirs = BertWordPieceTokenizer(str(download / "vocab.txt"), lowercase=True)
    theirs.enable_truncation(32)
    theirs.enable_padding(length=32)
    prompts = ["", "Severe  osteolytic lesion of the L3 vertebra; 12 mm", "lésion " * 50]
    found = BiomedClip(download)._tokenizer(prompts)
    assert found.tolist() == [encoding.ids for encoding in theirs.encode_batch(prompts)]


@pytest.mark.parametrize("absent", ["tokenizer.json", "vocab.txt", "special_tokens_map.json"])
def test_a_second_copy_of_the_vocabulary_is_not_needed(download: Path, absent: str) -> None:
    prompts = ["severe osteolytic lesion of the L3 vertebra", "xyz"]
    complete = BiomedClip(download).encode_text(prompts)
    (download / absent).unlink()
    assert torch.equal(BiomedClip(download).encode_text(prompts), complete)


def test_long_text_is_cut_with_a_warning(download: Path, caplog: pytest.LogCaptureFixture) -> None:
    BiomedClip(download).encode_text(["lesion " * 300, "lesion"])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "BiomedCLIP reads 30 of the 300 tokens" in said


def change_settings(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "open_clip_pytorch_model.bin"
    state = {key: value.clone() for key, value in torch.load(path, weights_only=True).items()}
    change(state)
    torch.save(state, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_words(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with open(folder / "vocab.txt", "a", encoding="utf-8") as handle:
        handle.writelines(f"word{number}\n" for number in range(50))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 783734177\n"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (
        lambda folder: (folder / "open_clip_config.json").unlink(),
        r"open_clip_config\.json: this BiomedCLIP configuration does not exist",
    ),
    "no weights": (
        lambda folder: (folder / "open_clip_pytorch_model.bin").unlink(),
        r"clip: no weights; expected one of .*open_clip_pytorch_model\.bin",
    ),
    "no tokenizer_config": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        r"clip: no tokenizer_config\.json; download it too",
    ),
    "no vocabulary": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "vocab.txt")],
        r"clip: no tokenizer; expected tokenizer\.json or vocab\.txt",
    ),
    "settings cut": (lambda folder: cut(folder / "open_clip_config.json"), r"open_clip_config\.json: not valid JSON"),
    "settings a list": (
        lambda folder: (folder / "open_clip_config.json").write_text("[]"),
        r"open_clip_config\.json: no model_cfg\.embed_dim",
    ),
    "another CLIP": (
        lambda folder: change_settings(
            folder, lambda s: s["model_cfg"].update(vision_cfg={"layers": 12, "width": 768})
        ),
        r"open_clip_config\.json: no model_cfg\.vision_cfg\.timm_model_name; this CLIP is not BiomedCLIP",
    ),
    "unknown vision network": (
        lambda folder: change_settings(folder, lambda s: s["model_cfg"]["vision_cfg"].update(timm_model_name="vit_x")),
        r"clip: its open_clip_config\.json builds no network \(.*vit_x",
    ),
    "convolutional vision network": (
        lambda folder: change_settings(
            folder, lambda s: s["model_cfg"]["vision_cfg"].update(timm_model_name="test_resnet")
        ),
        r"clip: test_resnet has no patch tokens and one CLS token; expected a vision transformer",
    ),
    "unknown pooling": (
        lambda folder: change_settings(folder, lambda s: s["model_cfg"]["text_cfg"].update(hf_pooler_type="other")),
        r"clip: its open_clip_config\.json builds no network \('other'\)",
    ),
    "another width": (
        lambda folder: change_settings(folder, lambda s: s["model_cfg"].update(embed_dim=32)),
        r"open_clip_pytorch_model\.bin: does not fit open_clip_config\.json beside it: .*of another size",
    ),
    "vision tower missing": (
        lambda folder: change_weights(
            folder, lambda s: [s.pop(key) for key in list(s) if key.startswith("visual.trunk.blocks.0.")]
        ),
        r"does not fit open_clip_config\.json beside it: \d+ missing \(visual\.trunk\.blocks\.0\.",
    ),
    "text tower missing": (
        lambda folder: change_weights(folder, lambda s: [s.pop(key) for key in list(s) if key.startswith("text.")]),
        r"not BiomedCLIP's weights, there is no text\.transformer\.embeddings\.word_embeddings\.weight",
    ),
    "NaN": (
        lambda folder: change_weights(folder, lambda s: s["visual.trunk.cls_token"].fill_(torch.nan)),
        r"1 tensor holds NaN or infinite values, first visual\.trunk\.cls_token",
    ),
    "LFS pointer": (
        lambda folder: (folder / "open_clip_pytorch_model.bin").write_text(LFS),
        r"open_clip_pytorch_model\.bin: .*a Git LFS pointer",
    ),
    "weights cut": (
        lambda folder: cut(folder / "open_clip_pytorch_model.bin"),
        r"open_clip_pytorch_model\.bin: damaged or cut short",
    ),
    "tokenizer cut": (lambda folder: cut(folder / "tokenizer.json"), r"clip: damaged tokenizer files \("),
    "tokenizer_config cut": (
        lambda folder: cut(folder / "tokenizer_config.json"),
        r"clip: damaged tokenizer files \(",
    ),
    "words of another model": (other_words, r"clip: the tokenizer's files are of another model \(160 words"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_biomedclip_folder(download: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(download)
    with pytest.raises(MedSoftError, match=message) as caught:
        BiomedClip(download)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_id_reads_the_local_cache(download: Path, hub: Path) -> None:
    snapshot = put_in_hub_cache(download, hub, HUB_NAME)
    ours = BiomedClip(Path(f"hf-hub:{HUB_NAME}"))  # as argparse hands it on
    assert ours.folder == snapshot
    assert torch.equal(ours.encode_text(["healthy"]), BiomedClip(download).encode_text(["healthy"]))


def test_hub_id_is_downloaded(download: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By huggingface_hub's own client, from a hub on this machine: the six files and nothing else of the repository."""
    from huggingface_hub import constants

    (download / "biomed_clip_example.ipynb").write_text("{}")
    with serve_hub(download, HUB_NAME) as (endpoint, fetched):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        ours = BiomedClip(f"hf-hub:{HUB_NAME}")
        assert sorted(fetched) == list(FILES)
        BiomedClip(f"hf-hub:{HUB_NAME}")
        assert len(fetched) == len(FILES)  # the second time everything is there
    assert ours.folder.is_relative_to(hub)
    assert torch.equal(ours.encode_text(["healthy"]), BiomedClip(download).encode_text(["healthy"]))


def test_hub_id_offline(hub: Path, world: Path, converted: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", converted, "--config", MODELS / "phantom_stage1.yaml", "--save_path", tmp_path / "s"]
    flags += ["--train_json", world / TRAIN, "--val_json", world / VAL, "--biomedclip", f"hf-hub:{HUB_NAME}"]
    message = rf"hf-hub:{HUB_NAME}: neither in the local cache of the hub nor reachable .*--biomedclip"
    with pytest.raises(MedSoftError, match=message):
        call(ver_train, *flags)
    assert not (tmp_path / "s" / "last.ckpt").exists()
    with pytest.raises(MedSoftError, match=message):
        infer(
            converted, tmp_path / "out", "--data", world / "val", "--prompt", "x", "--biomedclip", f"hf-hub:{HUB_NAME}"
        )
    assert not (tmp_path / "out").exists()


def test_hub_download_that_was_interrupted(download: Path, hub: Path) -> None:
    snapshot = put_in_hub_cache(download, hub, HUB_NAME)
    (snapshot / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(MedSoftError, match=r"no weights; expected one of"):
        BiomedClip(f"hf-hub:{HUB_NAME}")


def test_name_that_no_hub_has(hub: Path) -> None:
    with pytest.raises(MedSoftError, match=r"hf-hub:a/b/c: .*Repo id must be"):
        BiomedClip("hf-hub:a/b/c")


def test_true_size_yaml_asks_for_biomedclips_sizes(download: Path) -> None:
    with pytest.raises(MedSoftError, match=r"clip: biomedclip\.grid is 10, the configuration expects 14"):
        open_encoder(load_config(MODELS / "mldm_v15.yaml", [f"biomedclip.path={download}"]).biomedclip)
