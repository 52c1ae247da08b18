"""The golden list of sd-v1-5-inpainting.ckpt against independent implementations, and files built from it."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden, original, save_original
from safetensors.torch import save_file
from tiny import MODELS, ROOT, call, model_convert

from ldm.checkpoints.checkpoint import NEW_IN_UNET, read_checkpoint
from ldm.config import Config, load_config
from ldm.conversion.diffusers_folder import diffusers_name
from ldm.core.errors import MedSoftError
from ldm.networks.model import skeleton

NETWORKS = {
    "model.diffusion_model.": 686,
    "first_stage_model.": 248,
    "cond_stage_model.transformer.text_model.": 197,
}
# Every width small, every layer there: the keys of the true size.
SMALL = ("unet.model_channels=32", "unet.context_dim=32", "unet.semantic_dim=32", "unet.num_heads=4")
SMALL += ("autoencoder.channels=32", "text_encoder.width=32", "text_encoder.heads=2", "text_encoder.vocab_size=49408")
SMALL += ("biomedclip.token_dim=32", "msc.width=32", "msc.layers=1", "msc.heads=2")


@pytest.fixture(scope="module")
def true_size() -> Config:
    return load_config(MODELS / "mldm_v15.yaml")


@pytest.fixture(scope="module")
def meta() -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in golden().items()}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_golden_list_is_the_whole_file() -> None:
    """1145 keys: three networks, twelve schedule buffers, two counters; their sizes are those of the 4.27 GB file."""
    counts = Counter(next((prefix for prefix in NETWORKS if key.startswith(prefix)), "") for key in golden())
    assert counts == {**NETWORKS, "": 14}
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in golden().values())
    assert 4.26e9 < size < 4.27e9


def test_true_size_networks_have_exactly_these_keys(true_size: Config, meta: dict) -> None:
    ours = {
        k: v
        for k, v in skeleton(true_size.architecture).items()
        if not NEW_IN_UNET.match(k) and not k.startswith("msc.")
    }
    wanted = {key: value for key, value in meta.items() if key.startswith(tuple(NETWORKS))}
    assert shapes(ours) == {key: shape for key, shape in shapes(wanted).items() if not key.endswith("position_ids")}


def test_golden_list_fits_diffusers_and_transformers(true_size: Config, meta: dict) -> None:
    """Stable Diffusion 1.5 as diffusers and transformers build it (their defaults), key by key and shape by shape."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=9, cross_attention_dim=768, attention_head_dim=8)
        widths, levels = [128, 256, 512, 512], 4
        vae = AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
        )
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    found = convert_ldm_unet_checkpoint(dict(meta), dict(unet.config))
    assert shapes(found) == shapes(unet.state_dict())
    found = convert_ldm_vae_checkpoint(dict(meta), dict(vae.config))
    assert shapes(found) == shapes(vae.state_dict())
    prefix = "cond_stage_model.transformer.text_model."
    inner = {key.removeprefix(prefix): value for key, value in meta.items() if key.startswith(prefix)}
    inner.pop("embeddings.position_ids")
    theirs = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
    theirs.pop("embeddings.position_ids", None)  # a buffer that older transformers keep
    assert shapes(inner) == shapes(theirs)


def test_diffusers_names_agree_with_diffusers(true_size: Config, meta: dict) -> None:
    """Our map from key to key against the one diffusers applies to single files: each tensor object in its place."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    vae = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    for folder, prefix, renamed in (
        ("unet", "model.diffusion_model.", convert_ldm_unet_checkpoint(dict(meta), {"layers_per_block": 2})),
        ("vae", "first_stage_model.", convert_ldm_vae_checkpoint(dict(meta), vae)),
    ):
        keys = [key for key in meta if key.startswith(prefix)]
        names = {key: diffusers_name(key, true_size.architecture) for key in keys}
        assert {name for _, name in names.values()} == set(renamed)
        assert {part for part, _ in names.values()} == {folder}
        same = [key for key, (_, name) in names.items() if renamed[name] is meta[key]]
        assert len(same) >= len(keys) - 8  # their converter makes new, flat tensors of four projections, twice


# ------------------------------------------------------------------------------- files with these keys, in small widths


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    expected = skeleton(load_config(MODELS / "mldm_v15.yaml", SMALL).architecture)
    return original(shapes(expected))


def convert_small(source: Path, output: Path) -> dict[str, torch.Tensor]:
    flags = ["--input_path", source, "--output_path", output, "--config", MODELS / "mldm_v15.yaml"]
    assert call(model_convert, *flags, *SMALL) == 0
    return read_checkpoint(output).state


def same_bytes(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    kept = [key for key in before if key.startswith(tuple(NETWORKS)) and not key.endswith("position_ids")]
    assert len(kept) == 1130
    return all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in kept)


def test_every_network_is_byte_equal(small: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    after = convert_small(save_original(tmp_path / "sd.ckpt", small), tmp_path / "out.ckpt")
    assert same_bytes(small, after)
    assert all(NEW_IN_UNET.match(key) or key.startswith("msc.") for key in after if key not in small)
    assert "left: 12 (betas, alphas_cumprod, ...): noise schedule" in caplog.text
    assert "position numbers" in caplog.text
    assert "left: 2 (model_ema.decay, model_ema.num_updates): counters" in caplog.text
    for part, tensors in (("U-Net", 686), ("autoencoder", 248), ("text encoder", 196), ("third attention", 112)):
        assert f"  {part:<16} {tensors:5d} tensors" in caplog.text


def test_safetensors_of_the_same(small: dict, tmp_path: Path) -> None:
    """With `state_dict`'s keys at the top, as such files are."""
    save_file({key: value.contiguous() for key, value in small.items()}, tmp_path / "sd-v1-5-inpainting.safetensors")
    after = convert_small(tmp_path / "sd-v1-5-inpainting.safetensors", tmp_path / "out.safetensors")
    assert same_bytes(small, after)


def old_spelling(path: Path) -> None:
    """Rewrites numpy's module names in the pickle as numpy 1 spelled them."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (pickled,) = [name for name in records if name.endswith("data.pkl")]
    assert b"cnumpy._core.multiarray\nscalar" in records[pickled]
    records[pickled] = records[pickled].replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def lightning_objects() -> dict[Any, Any]:
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.utilities.parsing import AttributeDict

    scores = {"best_model_score": np.float64(0.5), "current_score": np.float32(1), "best_model_path": "x.ckpt"}
    return {"callbacks": {ModelCheckpoint: scores}, "hyper_parameters": AttributeDict(rate=np.float64(1e-4))}


@pytest.mark.parametrize("spelling", [lambda path: None, old_spelling], ids=["numpy 2", "numpy 1"])
def test_lightning_objects_do_not_matter(
    small: dict, tmp_path: Path, spelling: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """As v1-5-pruned-emaonly.ckpt carries them."""
    caplog.set_level("INFO")
    source = save_original(tmp_path / "sd.ckpt", small, **lightning_objects())
    spelling(source)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(source, weights_only=True)
    assert same_bytes(small, convert_small(source, tmp_path / "out.ckpt"))
    assert "objects of other programs, neither imported nor used: pytorch_lightning" in caplog.text


def test_lightning_is_not_imported_for_its_objects(tmp_path: Path) -> None:
    source = save_original(tmp_path / "sd.ckpt", {"a": torch.ones(2)}, **lightning_objects())
    look = (
        "import sys; from ldm.checkpoints.checkpoint import read_checkpoint; found = read_checkpoint(sys.argv[1]); "
        "print(found.external, sum(found.state['a']), [name for name in sys.modules if 'lightning' in name]); "
        "from ldm.core.distributed import fabric_class; fabric_class(); "
        "print([name for name in sys.modules if 'torchmetrics' in name])"
    )
    done = subprocess.run([sys.executable, "-c", look, source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in done.stdout
    assert done.stdout.strip().endswith("tensor(2.) []\n[]")  # nor is torchmetrics imported for Lightning


def test_text_to_image_file_with_lightning_objects(small: dict, tmp_path: Path) -> None:
    """The usual mistake, v1-5-pruned-emaonly.ckpt: read without Lightning, then named for what it is."""
    stem = "model.diffusion_model.input_blocks.0.0.weight"
    state = {**small, stem: small[stem][:, :4].clone()}
    source = save_original(tmp_path / "v1-5-pruned-emaonly.ckpt", state, **lightning_objects())
    with pytest.raises(MedSoftError, match=r"emaonly\.ckpt: its first convolution reads 4 channels.*text-to-image"):
        convert_small(source, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
