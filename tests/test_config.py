"""Every shipped configuration loads; every kind of wrong one is refused in one sentence that names file and key."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm.classifier.config import ClassifierConfig
from ldm.config import Config, as_yaml, config_from_dict, load_config, stage_configs
from ldm.core.errors import UsageError
from ldm.core.files import fingerprint
from ldm.core.schema import identity, stored_overrides

MODELS = Path(__file__).resolve().parents[1] / "models"
SHIPPED = sorted(MODELS.glob("*.yaml"))
STAGES = ("stage1", "unet_only", "stage2_1", "stage2_2")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_yaml_loads(path: Path) -> None:
    config = load_config(path)
    stage = next((name for name in STAGES if path.stem.endswith(name)), "")
    assert config.training.stage == stage
    if stage:
        assert config.training.builds
        assert config.training.rates


def test_true_size_is_the_default_and_the_stages_share_it() -> None:
    base = load_config(MODELS / "mldm_v15.yaml")
    fast = dataclasses.replace(Config().sampling, sampler="dpmpp_2m", steps=6, spacing="fitted")
    assert base == dataclasses.replace(Config(), sampling=fast)
    shapes = identity(base, "architecture")
    for stage in STAGES:
        assert identity(load_config(MODELS / f"mldm_v15_{stage}.yaml"), "architecture") == shapes


FAMILIES = [path.stem for path in SHIPPED if not load_config(path).training.stage]
SMALL = [family for family in FAMILIES if family != "mldm_v15"]
# All in which a smaller family may differ from the true size: sizes, learning rates, batches, epochs and warm-up. What
# training and sampling need otherwise is the same, so that what is shown on phantoms is what a user runs.
MAY_DIFFER = {
    *("data.image_size", "unet.model_channels", "unet.channel_mult", "unet.num_res_blocks", "unet.attention_levels"),
    *("unet.num_heads", "unet.context_dim", "unet.semantic_dim"),
    *("autoencoder.channels", "autoencoder.channel_mult", "autoencoder.num_res_blocks"),
    *("text_encoder.width", "text_encoder.layers", "text_encoder.heads"),
    *("biomedclip.path", "biomedclip.grid", "biomedclip.token_dim", "biomedclip.text_dim"),
    *("msc.width", "msc.layers", "msc.heads"),
    *("training.rates", "training.batch_size", "training.max_epochs", "training.warmup_steps"),
    "sampling.batch_size",
}
TOO_LARGE = {("stage2_2", "training.ema_decay")}  # a reason stands in mldm_v15_stage2_2.yaml


def values(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = dataclasses.is_dataclass(value)
        found |= values(value, f"{prefix}{item.name}.") if nested else {prefix + item.name: value}
    return found


@pytest.mark.parametrize("stage", ["", *STAGES])
@pytest.mark.parametrize("family", SMALL)
def test_families_differ_in_sizes_rates_batches_and_lengths_only(family: str, stage: str) -> None:
    end = f"_{stage}.yaml" if stage else ".yaml"
    real, small = (values(load_config(MODELS / f"{name}{end}")) for name in ("mldm_v15", family))
    different = {key for key in real if real[key] != small[key]}
    assert different <= MAY_DIFFER | {key for where, key in TOO_LARGE if where == stage}
    assert real["training.rates"].keys() == small["training.rates"].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_a_family(family: str) -> None:
    """Not those of a family whose name begins with this one's."""
    found = stage_configs(MODELS / f"{family}.yaml")
    assert set(found) == set(STAGES)
    for stage, config in found.items():
        assert config == load_config(MODELS / f"{family}_{stage}.yaml")


def test_stages_are_not_those_of_a_longer_name(tmp_path: Path) -> None:
    for name, text in (("a", "{}"), ("a_stage1", "base: a.yaml\ntraining: {stage: stage1, builds: [msc]}")):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "a_b.yaml").write_text("base: a.yaml\ntraining: {batch_size: 3}")
    for stage in STAGES[:2]:
        text = f"base: a_b.yaml\ntraining: {{stage: {stage}, builds: [msc]}}"
        (tmp_path / f"a_b_{stage}.yaml").write_text(text)
    assert {name: found.training.batch_size for name, found in stage_configs(tmp_path / "a.yaml").items()} == {
        "stage1": Config().training.batch_size
    }
    assert set(stage_configs(tmp_path / "a_b.yaml")) == set(STAGES[:2])


SCOPES = {"architecture", "features", "images", "weights", "rounding"}
# Fingerprints of folders, caches and results that exist. A key that is added changes those it decides, and the ones who
# change one here say to whom that work is lost.
KNOWN = {
    ("mldm_v15_unet_only", "weights rounding"): "98b218a6122bee868c5bafa7a06c98cccddec6378de8e6100f90762791f9afc7",
    ("mldm_v15_unet_only", "images"): "cbd0e5198fa0b67d078c0ed3f21238940370967808057165497b8a11283e8621",
    ("mldm_v15_unet_only", "architecture"): "6c38d0421d4cc6850217a51380f6ae4e6e6831a62e0c1b11a6580aa4541a40b6",
    ("phantom_stage2_2", "weights rounding"): "32064437f5fac58f614effc8fe6144502ae87e197d72aeefce8ec099b1d142d6",
    ("phantom_stage2_2", "images"): "cbe806a7bbf646a677c83d1b2a796eacbdb0e04c3ca877ec9530d8dbf1114a1f",
    ("phantom_stage2_2", "architecture"): "f0a4f47aed522e130d712c403dc7ea3b48c14b2858063bacf8c05ad4ef1a3610",
}


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        nested = dataclasses.is_dataclass(value)
        yield from leaves(value, f"{prefix}{item.name}.") if nested else [(prefix + item.name, item)]


@pytest.mark.parametrize("config", [Config(), ClassifierConfig()])
def test_every_field_says_what_it_decides(config: Any) -> None:
    silent = [name for name, item in leaves(config) if not SCOPES.issuperset(item.metadata.get("decides", {"?"}))]
    assert not silent


@pytest.mark.parametrize(("name", "scopes"), KNOWN)
def test_work_of_earlier_versions_is_recognised(name: str, scopes: str) -> None:
    overrides = ["sampling.spacing=polynomial"] if scopes == "images" else []  # the default of before 2026-11-29
    config = load_config(MODELS / f"{name}.yaml", overrides)
    assert fingerprint(identity(config, *scopes.split())) == KNOWN[name, scopes]


def test_a_key_at_the_value_of_old_is_no_part_of_the_identity_and_comes_back_as_an_override() -> None:
    """The runs from before data.min_crop and sampling.spacing: crops as large as the model, leading steps."""
    new = ("min_crop", "min_crop_unit", "mm_per_pixel")
    old = load_config(MODELS / "phantom.yaml", ["sampling.spacing=leading"])
    stored = identity(old, "images")
    assert not {*new} & {*stored["data"]}
    assert "spacing" not in stored["sampling"]
    now = load_config(MODELS / "phantom.yaml", ["data.min_crop=32"])
    assert identity(now, "images")["data"]["min_crop"] == 32
    assert identity(now, "images")["sampling"]["spacing"] == "fitted"
    assert load_config(MODELS / "mldm_v15.yaml", stored_overrides(Config, stored)).data == old.data
    again = load_config(MODELS / "phantom.yaml", ["sampling.spacing=trailing", *stored_overrides(Config, stored)])
    assert again == old


@pytest.mark.parametrize("fit", ["pad", "resize"])
def test_where_nothing_is_cropped_the_lower_bound_of_a_crop_is_no_part_of_the_identity(fit: str) -> None:
    """Runs with data.fit=pad from before there was data.min_crop are recognised."""
    config = load_config(MODELS / "mldm_v15.yaml", [f"data.fit={fit}"])
    assert "min_crop" not in identity(config, "images")["data"]
    assert stored_overrides(Config, identity(config, "images")).count("data.min_crop=64.0") == 1


def test_cached_features_of_earlier_versions_are_recognised_and_stretched_classifiers_are_not() -> None:
    features = fingerprint(identity(Config().data, "features"))
    assert features == "a1fb6428d25568d2a7b5f02ccddc414479c629a0e68c679e11c0f7fd9d244591"
    classifier = fingerprint(identity(ClassifierConfig(), "weights"))
    assert classifier == "10b5e9e8842ca72acc70cf9eee3ee65cacda569dc805f6c565dd0707e3bfc7ad"  # with the key `crop`


def test_a_checkpoint_from_before_min_crop_has_crops_of_the_models_own_size() -> None:
    old = dataclasses.asdict(load_config(MODELS / "mldm_v15_stage1.yaml", ["data.image_size=256"]))
    for key in ("min_crop", "min_crop_unit", "mm_per_pixel"):
        del old["data"][key]
    assert config_from_dict(old, "old.ckpt").data.min_crop == 256
    old["data"]["fit"] = "pad"  # where nothing is cropped
    assert config_from_dict(old, "old.ckpt").data.min_crop == Config().data.min_crop


def test_published_epochs_batch_and_rates() -> None:
    full = load_config(MODELS / "mldm_v15_stage2_2.yaml").training
    assert (full.max_epochs, full.batch_size) == (20, 16)
    assert full.rates == {"msc": 1e-4, "attn3": 1e-4, "unet": 1e-5}
    assert load_config(MODELS / "mldm_v15_stage2_1.yaml").training.condition_dropout == 0


def test_overrides_come_last_and_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training: {batch_size: 3, max_epochs: 4}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntraining: {max_epochs: 5}\n")
    config = load_config(tmp_path / "top.yaml", ["training.accumulate=2", "training.rates.msc=1e-3"])
    training = config.training
    assert (training.batch_size, training.max_epochs, training.accumulate) == (3, 5, 2)
    assert training.rates == {"msc": 1e-3}


def test_a_stage_freezes_what_its_base_trains_with_a_rate_of_zero(tmp_path: Path) -> None:
    frozen = "rates: {attn3: 0, unet: 0.0}"
    (tmp_path / "top.yaml").write_text(
        f"base: {MODELS}/mldm_v15_stage2_2.yaml\ntraining: {{stage: stage2_1, condition_dropout: 0, {frozen}}}\n"
    )
    assert load_config(tmp_path / "top.yaml") == load_config(MODELS / "mldm_v15_stage2_1.yaml")


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(MODELS / "mldm_v15_stage2_2.yaml", ["data.image_size=256"])
    (tmp_path / "resolved.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_configuration_of_a_checkpoint_is_checked_too() -> None:
    with pytest.raises(UsageError, match=r"old\.ckpt: unknown key msc\.depth"):
        config_from_dict({"msc": {"depth": 3}}, "old.ckpt")


REFUSED = {
    "unknown key, nearest named": ("training: {bach_size: 4}", r"training\.bach_size; did you mean training\.batch_si"),
    "unknown section": ("optimiser: {lr: 1}", r"unknown key optimiser; known here: data, unet"),
    "class by name": ("unet: {target: os.system, params: {command: id}}", r"unknown key unet\.target"),
    "tag that builds an object": ("unet: !!python/object/apply:os.system [id]", r"not readable as YAML"),
    "wrong type": ("training: {batch_size: many}", r"training\.batch_size: .*many"),
    "fraction for a whole number": ("training: {max_epochs: 1.5}", r"training\.max_epochs"),
    "no value": ("data: {image_size: }", r"data\.image_size"),
    "value for a section": ("unet: 3", r"unet: expected keys with values, found 3"),
    "list at the top": ("- 1\n- 2", r"expected keys with values, found \[1, 2\]"),
    "not YAML": ("training: {batch_size: 4", r"not readable as YAML"),
    "interpolation": (
        "biomedclip: {path: '${oc.env:HOME}'}",
        r"biomedclip\.path: expected plain text \(interpolations",
    ),
    "interpolation in a list": ("training: {builds: ['${data.fit}']}", r"training\.builds: expected one of unet"),
    "interpolation in a dictionary": (
        "training: {rates: {msc: '${oc.env:HOME}'}}",
        r"training\.rates\.msc: expected a number",
    ),
    "choice: fit": ("data: {fit: stretch}", r"data\.fit: expected one of crop, pad, resize"),
    "choice: feather unit": ("data: {feather_unit: inch}", r'data\.feather_unit: .* found "inch"'),
    "choice: objective": ("training: {objective: gan}", r'training\.objective: .* found "gan"'),
    "choice: inside": ("training: {inside: none}", r"training\.inside"),
    "choice: schedule": ("training: {schedule: step}", r'training\.schedule: .* found "step"'),
    "choice: part": ("training: {builds: [vae]}", r'training\.builds: .* found "vae"'),
    "choice: group": ("training: {rates: {text: 1.0e-4}}", r'training\.rates: .* found "text"'),
    "negative rate": ("training: {rates: {msc: -1}}", r"training\.rates\.msc: expected a number of at least 0"),
    "batch of zero": ("training: {batch_size: 0}", r"training\.batch_size: expected a number of at least 1"),
    "too many steps": ("sampling: {steps: 2000}", r"sampling\.steps: .* found 2000"),
    "rescale above one": (
        "sampling: {guidance_rescale: 1.5}",
        r"sampling\.guidance_rescale: expected a number from 0 to 1",
    ),
    "drop-out of one": ("training: {condition_dropout: 1.0}", r"training\.condition_dropout"),
    "three shares that are lost": (
        "training: {condition_dropout: 0.4, coins: separate}",
        r"training\.condition_dropout: expected at most 1/3 with training\.coins=separate, found 0\.4",
    ),
    "loss of an MSC that is frozen": (
        "training: {stage: s, rates: {unet: 1.0e-5}, msc_weight: 0.1}",
        r"training\.msc_weight: expected 0 in a stage that does not train an MSC .*found 0\.1",
    ),
    "loss of an MSC that is not read": (
        "training: {stage: s, rates: {msc: 1.0e-5}, inside: 'true', msc_weight: 0.1}",
        r"training\.msc_weight: expected 0",
    ),
    "alignment in a stage without a U-Net": (
        "training: {stage: s, rates: {msc: 1.0e-4}, objective: msc, alignment_weight: 0.5}",
        r"training\.alignment_weight: expected 0 in a stage that trains no part of the U-Net .*found 0\.5",
    ),
    "alignment of a U-Net that is frozen": (
        "training: {stage: s, rates: {msc: 1.0e-4, unet: 0}, alignment_weight: 0.5}",
        r"training\.alignment_weight: expected 0",
    ),
    "whole image where nothing is cut off": (
        "{biomedclip: {view: image}, data: {fit: pad}}",
        r"biomedclip\.view: expected crop with data\.fit=pad, which cuts nothing off, found \"image\"",
    ),
    "thumbnail where nothing is cut off": (
        "{unet: {thumbnail: true}, data: {fit: resize}}",
        r"unet\.thumbnail: expected false with data\.fit=resize, which cuts nothing off, found true",
    ),
    "tokens of an MSC where a table is read": (
        "{unet: {third_attention: table}, training: {stage: s, rates: {unet: 1.0e-5}}}",
        r"training\.inside: expected true with unet\.third_attention=table, .*found \"msc\"",
    ),
    "table that is shared out": (
        "{unet: {third_attention: table}, training: {strategy: fsdp}}",
        r"training\.strategy: expected auto with unet\.third_attention=table",
    ),
    "size that does not divide": ("data: {image_size: 500}", r"data\.image_size: expected a multiple of 64"),
    "context that cuts the lesion": ("data: {context: 0.5}", r"data\.context: expected a number of at least 1"),
    "negative crop": ("data: {min_crop: -1}", r"data\.min_crop: expected a number of at least 0"),
    "choice: crop unit": ("data: {min_crop_unit: cm}", r"data\.min_crop_unit: expected one of pixels, mm"),
    "negative scale": ("data: {mm_per_pixel: -0.5}", r"data\.mm_per_pixel: expected a number of at least 0"),
    "scale without a crop": (
        "data: {mm_per_pixel: 0.5, fit: pad}",
        r"data\.mm_per_pixel: expected 0 with data\.fit=pad, found 0\.5",
    ),
    "size of zero": ("data: {image_size: 0}", r"data\.image_size: .* found 0"),
    "4-channel U-Net": ("unet: {in_channels: 4}", r"unet\.in_channels: expected 9"),
    "text width": ("unet: {context_dim: 1024}", r"unet\.context_dim: expected text_encoder\.width"),
    "semantic width": ("unet: {semantic_dim: 512}", r"unet\.semantic_dim: .* found 512"),
    "odd grid": ("biomedclip: {grid: 7}", r"biomedclip\.grid: expected an even number"),
    "base that is no name": ("base: 3", r"base"),
    "key that stands twice": ("training: {seed: 1, seed: 2}", r"the key seed stands twice"),
    "truth for a number": (
        "training: {batch_size: true}",
        r"batch_size: expected a whole number, found true",
    ),
    "no number": ("training: {weight_decay: .nan}", r"training\.weight_decay: expected a number"),
    "missing base": ("base: nowhere.yaml", r"nowhere\.yaml: this configuration does not exist"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        load_config(path)
    assert ".yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loop_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UsageError, match="leads back to itself"):
        load_config(tmp_path / "a.yaml")


def test_missing_file_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: this configuration does not exist"):
        load_config("nowhere.yaml")


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(UsageError, match="not readable as YAML"):
        load_config(tmp_path / "image.yaml")


@pytest.mark.parametrize("override", ["training.batch_size", "--training.batch_size=4"])
def test_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(UsageError, match="an override looks like"):
        load_config(MODELS / "mldm_v15.yaml", [override])


def test_what_is_wrong_is_looked_for_where_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training: {seed: x}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntraining: {max_epochs: 5}\n")
    with pytest.raises(UsageError, match=r"base\.yaml: training\.seed: expected a whole number"):
        load_config(tmp_path / "top.yaml")
    with pytest.raises(UsageError, match=r"^override training\.rates\.msc=-1: training\.rates\.msc: expected a number"):
        load_config(tmp_path / "top.yaml", ["training.seed=1", "training.rates.msc=-1"])


def test_texts_and_numbers_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text("training: {weight_decay: 1e-3, rates: {msc: 1}}\n")
    config = load_config(tmp_path / "top.yaml", ["biomedclip.path=2024", "training.inside=true", "training.stage=a: b"])
    assert (config.training.weight_decay, config.training.rates["msc"]) == (0.001, 1.0)
    assert (config.biomedclip.path, config.training.inside, config.training.stage) == ("2024", "true", "a: b")


def test_unknown_override_names_the_nearest_key() -> None:
    with pytest.raises(UsageError, match=r"sampling\.step; did you mean sampling\.steps\?"):
        load_config(MODELS / "mldm_v15.yaml", ["sampling.step=20"])
