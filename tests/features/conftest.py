"""Networks that make features, and a cache for them."""

from pathlib import Path
from typing import Any

import pytest
from feature_cache import FeatureCache
from tiny import CLIP, MODELS

from ldm.config import load_config
from ldm.networks.biomedclip import BiomedClip
from ldm.networks.model import MedSoftModel


@pytest.fixture(scope="module")
def networks(converted: Path) -> tuple[Any, MedSoftModel, BiomedClip]:
    from ldm.checkpoints.checkpoint import read_checkpoint
    from ldm.checkpoints.fitting import load_parts

    config = load_config(MODELS / "phantom.yaml")
    model = MedSoftModel(config.architecture, ["autoencoder"]).eval()
    load_parts(model, read_checkpoint(converted), ["autoencoder"], config.architecture)
    return config, model, BiomedClip(CLIP)


@pytest.fixture
def cache(tmp_path: Path, networks: tuple) -> FeatureCache:
    return FeatureCache(tmp_path / "features", *networks)
