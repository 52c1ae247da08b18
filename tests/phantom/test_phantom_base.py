"""The small world's pretrained models: the shipped ones, and the command that makes them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT

from ldm.checkpoints.checkpoint import PREFIXES, read_checkpoint
from ldm.config import load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.run_folder import RunFolder
from ldm.phantom.shapes import FILLS, SHAPES, generic_image
from ldm.phantom.spines import LESION_TYPES
from ldm.phantom.worlds import SYNONYMS
from tool import train_phantom_base

SHIPPED = ROOT / "models" / "phantom_base"
WEIGHTS = "open_clip_pytorch_model.bin"


def test_shipped_base_is_small_and_loads_safely() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    content = torch.load(SHIPPED / "sd-phantom-inpainting.ckpt", weights_only=True)
    assert all(value.dtype == torch.float16 for value in content["state_dict"].values())
    assert read_checkpoint(SHIPPED / "sd-phantom-inpainting.ckpt").parts() == ["unet", "autoencoder", "text"]


def test_shipped_base_has_sd_keys_only() -> None:
    state = read_checkpoint(SHIPPED / "sd-phantom-inpainting.ckpt").state
    assert not [key for key in state if ".attn3." in key or ".norm4." in key or key.startswith(PREFIXES["msc"])]
    assert state["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 9


def test_generic_pictures_use_no_word_of_a_lesion() -> None:
    import numpy as np

    words = {word for name in LESION_TYPES for word in name.split("-")} | {"lesion", "vertebral", "body", "severe"}
    for seed in range(300):
        picture, mask, sentence = generic_image(np.random.default_rng(seed))
        assert not words & set(sentence.split())
        assert picture.shape == mask.shape == (64, 64)
        assert mask.any()
        assert 0 <= picture.min() <= picture.max() <= 1
    assert not words & {word for name in (*SHAPES, *FILLS) for word in name.split()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base after one step of each part."""
    folder = tmp_path_factory.mktemp("base")
    run(folder)
    return folder


def run(folder: Path, *flags: str) -> int:
    steps = ["--autoencoder_steps", "1", "--clip_steps", "1", "--unet_steps", "1"]
    given = ["--output_dir", str(folder), "--config", str(ROOT / "models/phantom.yaml"), *steps, *flags]
    return train_phantom_base.main(train_phantom_base.build_parser().parse_args(given))


def test_command_makes_files_of_the_shipped_format(made: Path) -> None:
    theirs = read_checkpoint(SHIPPED / "sd-phantom-inpainting.ckpt").state
    ours = read_checkpoint(made / "sd-phantom-inpainting.ckpt").state
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    shipped = {path.name for path in (SHIPPED / "biomedclip").iterdir()}
    assert {path.name for path in (made / "biomedclip").iterdir()} == shipped
    from ldm.networks.opening import open_encoder

    open_encoder(load_config(ROOT / "models/phantom.yaml", [f"biomedclip.path={made / 'biomedclip'}"]).biomedclip)
    parts = {line.split(",")[0] for line in (made / "training_log.csv").read_text().splitlines()[1:]}
    assert parts == {"autoencoder", "clip", "unet"}


def test_finished_parts_are_not_trained_again(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    assert run(made) == 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before


def test_what_is_overwritten_is_not_called_trained_after_an_interruption(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = shutil.copytree(made, tmp_path / "base")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ldm.phantom.base_training.train_clip", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "--overwrite", "--seed", "1")
    with pytest.raises(UsageError, match=r"autoencoder was trained otherwise \(seed: 1 -> 0\); give another --output"):
        run(folder)
    assert run(folder, "--seed", "1") == 0
    assert caplog.messages.count(f"autoencoder: already trained (in {folder / 'autoencoder.safetensors'})") == 1
    assert "clip: already" not in caplog.text
    assert "unet: already" not in caplog.text
    for name in ("sd-phantom-inpainting.ckpt", f"biomedclip/{WEIGHTS}"):
        assert (folder / name).read_bytes() != (made / name).read_bytes()


def test_parts_of_other_settings_and_halves_of_a_file_are_refused(made: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"model\.bin: clip was trained otherwise \(steps: 1 -> 2\); give another"):
        run(made, "--clip_steps", "2")
    with pytest.raises(UsageError, match=r"inpainting\.ckpt: holds a U-Net that was trained on its autoencoder; give"):
        run(made, "--parts", "autoencoder", "--overwrite")
    with pytest.raises(UsageError, match=r"autoencoder\.safetensors: does not exist; train the autoencoder"):
        run(made, "--parts", "unet", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(MedSoftError, match=r"training\.json: expected an object of objects"):
        run(tmp_path)


def test_a_second_process_is_refused_and_a_unet_needs_its_autoencoder(made: Path, tmp_path: Path) -> None:
    refused = pytest.raises(UsageError, match="another run is writing here at this moment; give another --output_dir")
    with RunFolder(made, "training_log.csv").lock(), refused:
        run(made)
    with pytest.raises(UsageError, match=r"autoencoder\.safetensors: does not exist; train the autoencoder"):
        run(tmp_path, "--parts", "unet")


def test_parts_of_other_sizes_are_named(tmp_path: Path) -> None:
    """An autoencoder that an interrupted command has left, and an image tower to train beside."""
    from ldm.checkpoints.checkpoint import write_checkpoint
    from ldm.networks.autoencoder import Autoencoder

    state = Autoencoder(load_config(ROOT / "models/phantom.yaml", []).architecture.autoencoder).state_dict()
    key = "quant_conv.bias"
    write_checkpoint(tmp_path / "autoencoder.safetensors", state | {key: state[key][:1]}, {})
    expected = (
        r"autoencoder\.safetensors: does not fit --config: .*\(quant_conv\.bias \(1,\) instead of \(8,\)\); give the"
    )
    with pytest.raises(MedSoftError, match=expected):
        run(tmp_path, "--parts", "unet")
    folder = shutil.copytree(SHIPPED / "biomedclip", tmp_path / "encoder")
    state = torch.load(folder / WEIGHTS, weights_only=True)
    state["visual.trunk.cls_token"] = state["visual.trunk.cls_token"][..., :1]
    torch.save(state, folder / WEIGHTS)
    (tmp_path / "other.yaml").write_text(f"base: {ROOT}/models/phantom.yaml\nbiomedclip: {{path: {folder}}}\n")
    expected = (
        r"model\.bin: does not fit the image tower .*cls_token \(1, 1, 1\) instead of .*; name an encoder of these"
    )
    with pytest.raises(MedSoftError, match=expected):
        run(tmp_path, "--parts", "clip", "--world", "words", "--config", str(tmp_path / "other.yaml"))


def test_a_stand_in_that_knows_the_names_of_another_world_keeps_the_image_tower(made: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--parts", "clip", "--world", "words") == 0
    folder = tmp_path / "biomedclip"
    new, old = (torch.load(each / WEIGHTS, weights_only=True) for each in (folder, SHIPPED / "biomedclip"))
    towers = {key for key in old if key.startswith("visual.")}
    assert towers == {key for key in new if key.startswith("visual.")}
    assert all(torch.equal(new[key], old[key]) for key in towers)
    known = set((folder / "vocab.txt").read_text().split())
    assert len(known & {name for names in SYNONYMS.values() for name in names}) > 15
    from ldm.networks.opening import open_encoder

    open_encoder(load_config(ROOT / "models/phantom.yaml", [f"biomedclip.path={folder}"]).biomedclip)
    with pytest.raises(UsageError, match="was trained on the world words, not standard; give another --output_dir"):
        run(tmp_path, "--parts", "clip")
    with pytest.raises(UsageError, match="was trained on the world standard, not words"):
        run(made, "--parts", "clip", "--world", "words")
    with pytest.raises(UsageError, match="--world words: only clip is trained on lesions; give --parts clip"):
        run(tmp_path, "--world", "words")
