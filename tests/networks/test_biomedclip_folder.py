"""BiomedCLIP folders that are not as published: other layouts of the weights, two files, quantised, own code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from downloads import phantom_download
from safetensors.torch import save_file
from torch import Tensor

from ldm.core.errors import MedSoftError
from ldm.networks.biomedclip import BiomedClip

BIN, SAFE = "open_clip_pytorch_model.bin", "open_clip_model.safetensors"
PROMPTS = ["severe osteolytic lesion of the L3 vertebra", "healthy"]


@pytest.fixture
def download(tmp_path: Path) -> Path:
    return phantom_download(tmp_path / "clip")


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in torch.load(folder / BIN, weights_only=True).items()}


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict]] = {
    "DistributedDataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "open_clip's training": lambda state: {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
    },
    "nested twice": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_as_programs_nest_them(download: Path, name: str) -> None:
    expected = BiomedClip(download).encode_text(PROMPTS)
    torch.save(LAYOUTS[name](weights(download)), download / BIN)
    assert torch.equal(BiomedClip(download).encode_text(PROMPTS), expected)


def test_a_key_with_and_without_its_level(download: Path) -> None:
    state = weights(download)
    torch.save({**state, "module.visual.trunk.cls_token": state["visual.trunk.cls_token"]}, download / BIN)
    with pytest.raises(MedSoftError, match=rf"{BIN}: module\.visual\.trunk\.cls_token is there twice"):
        BiomedClip(download)


def test_two_equal_weight_files(download: Path) -> None:
    expected = BiomedClip(download).encode_text(PROMPTS)
    save_file({key: value for key, value in weights(download).items() if "position_ids" not in key}, download / SAFE)
    assert torch.equal(BiomedClip(download).encode_text(PROMPTS), expected)


DIFFERENT: dict[str, Callable[[dict[str, Tensor]], dict]] = {
    "a value": lambda state: {**state, "visual.trunk.cls_token": state["visual.trunk.cls_token"] + 1e-3},
    "a type": lambda state: {**state, "visual.trunk.cls_token": state["visual.trunk.cls_token"].half()},
    "a key": lambda state: {key: value for key, value in state.items() if key != "visual.trunk.cls_token"},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_two_weight_files_that_differ(download: Path, name: str) -> None:
    save_file(DIFFERENT[name](weights(download)), download / SAFE)
    with pytest.raises(
        MedSoftError, match=rf"clip: {SAFE} and {BIN} hold different weights \(1 tensor, first visual\.tr"
    ):
        BiomedClip(download)


def test_whole_numbers_are_quantised_weights(download: Path) -> None:
    state, key = weights(download), "visual.trunk.blocks.0.attn.qkv.weight"
    torch.save({**state, key: (state[key] * 100).to(torch.int8)}, download / BIN)
    message = rf"{BIN}: does not fit .*1 quantised to whole numbers \({key} torch\.int8 instead of torch\.float32\)"
    with pytest.raises(MedSoftError, match=message):
        BiomedClip(download)


def test_scales_beside_weights(download: Path) -> None:
    torch.save({**weights(download), "visual.trunk.blocks.0.attn.qkv.weight_scale": torch.ones(1)}, download / BIN)
    with pytest.raises(MedSoftError, match=r"1 left over \(visual\.trunk\.blocks\.0\.attn\.qkv\.weight_scale\)"):
        BiomedClip(download)


# -------------------------------------------------------------------------------------------------- code in the folder


def add_code(folder: Path) -> Path:
    """Files that leave a trace if they are imported."""
    trace = folder.parent / "trace"
    for name in ("tokenization_own", "configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    return trace


def answer_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def test_code_of_a_tokenizer_is_not_run(download: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = add_code(download)
    answer_yes(monkeypatch)
    own = {"AutoTokenizer": ["tokenization_own.Own", None]}
    change_json(download / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    (download / "tokenizer.json").unlink()
    with pytest.raises(
        MedSoftError, match=r"clip: its tokenizer_config\.json asks to run code of its own \(auto_map\)"
    ):
        BiomedClip(download)
    assert not trace.exists()


def test_code_beside_a_known_tokenizer_is_left_alone(download: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = BiomedClip(download).encode_text(PROMPTS)
    trace = add_code(download)
    answer_yes(monkeypatch)
    change_json(download / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    assert torch.equal(BiomedClip(download).encode_text(PROMPTS), expected)
    assert not trace.exists()


def test_code_of_the_text_tower_is_not_run(download: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.networks.biomedclip_folder import bert_config

    trace = add_code(download)
    answer_yes(monkeypatch)
    expected = BiomedClip(download).encode_text(PROMPTS)
    own = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    (download / "config.json").write_text(json.dumps({**bert_config(weights(download)), "auto_map": own}))
    assert torch.equal(BiomedClip(download).encode_text(PROMPTS), expected)
    change_json(download / "config.json", model_type="own")
    with pytest.raises(MedSoftError, match=r"builds no network"):
        BiomedClip(download)
    assert not trace.exists()


def test_configuration_of_the_text_tower_that_is_a_list(download: Path) -> None:
    (download / "config.json").write_text("[]")
    with pytest.raises(MedSoftError, match=r"clip/config\.json: expected keys with values, found list"):
        BiomedClip(download)


# ---------------------------------------------------------------------------------------------------- unknown tokens


def test_words_that_biomedclip_does_not_know_are_said_once(download: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip, prompt = BiomedClip(download), "L3椎体中度溶骨性病变"
    for _ in range(2):
        clip.encode_text([prompt])
    (said,) = caplog.messages
    tokens = clip._tokenizer.tokenizer.tokenize(prompt)
    share = f"{tokens.count('[UNK]')} of the {len(tokens)} tokens ({100 * tokens.count('[UNK]') / len(tokens):.0f} %)"
    assert said.startswith(f'prompt unknown: BiomedCLIP reads {share} of "{prompt}" as [UNK]')
    assert tokens.count("[UNK]") > 5


def test_known_words_are_not_said(download: Path, caplog: pytest.LogCaptureFixture) -> None:
    BiomedClip(download).encode_text([*PROMPTS, ""])
    assert not caplog.messages
