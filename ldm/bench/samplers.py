"""Whether a faster way of sampling is as good: the same images with 50 steps of DDIM and with the fast setting."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.bench.inference import FAST, REFERENCE
from ldm.classifier.run import predict
from ldm.config import DataConfig, load_config
from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import write_json
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.checks import real_ones
from ldm.data.preparation import prepare
from ldm.data.samples import Sample
from ldm.evaluation.metrics import crop_features, frechet_distance
from ldm.inference.options import InferenceOptions
from ldm.inference.run import run
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.opening import open_encoder
from ldm.workflow.study_results import interval

log = logging.getLogger("compare_samplers")

MEASURES = {"frechet_distance": -1, "lesion_detection_rate": 1, "prompt_agreement": 1}  # with the sign of better


def compare_samplers(options: InferenceOptions, judge: Path, seeds: int) -> bool:
    """Inpaint with both settings, measure and write comparison.json; whether every image could be inpainted.

    ``options``: what all runs have in common; their folders lie in its ``output_dir``, which keeps what it holds of the
    same comparison. ``judge``: classifier.safetensors. Raises UsageError or MedSoftError for what cannot be compared.
    """
    for file in (options.ckpt, judge):
        if not file.is_file():
            raise UsageError(f"{file}: does not exist")
    config = load_config(options.config, options.overrides)
    samples = real_ones(options.data, load_samples(options.data)[0])
    real = [sample for sample in samples if not sample.healthy and sample.severity != "subtle"]
    if len(real) < 2:
        raise MedSoftError(f"{options.data}: {len(real)} diseased samples that are not subtle; expected at least 2")
    prompts = options.output_dir / "prompts.json"
    write_annotations(prompts, real)
    encoder = open_encoder(config.biomedclip)
    of_real = features(real, encoder, config.data, config.sampling.batch_size)
    runs: dict[str, list[dict[str, float]]] = {"reference": [], "fast": []}
    codes, images = set(), 0
    for seed in range(seeds):
        folders = [options.output_dir / f"{name}_seed{seed}" for name in runs]
        for folder, setting in zip(folders, (REFERENCE, FAST), strict=True):
            codes.add(run(replace(options, output_dir=folder, train_json=prompts, seed=seed, **setting)))
        for name, folder, samples in zip(runs, folders, common_samples(folders), strict=True):
            found = features(samples, encoder, config.data, config.sampling.batch_size)
            distance = frechet_distance(of_real, found)
            runs[name].append({"frechet_distance": distance, **judged(judge, folder, samples)})
            images += len(samples)
            log.info("%s, seed %d: %s", name, seed, {key: round(value, 4) for key, value in runs[name][-1].items()})
    compared = differences(**runs)
    counts = {"pictures": images, "real": len(real)}
    measured = {
        "settings": {"reference": REFERENCE, "fast": FAST, "overrides": list(options.overrides), **counts},
        "real": judged(judge, prompts, real),
        "seeds": runs,
        "measures": compared,
    }
    write_json(options.output_dir / "comparison.json", measured)
    for name, row in compared.items():
        shown = f"{row['difference']:+.4f} (95 % {row['low']:+.4f} to {row['high']:+.4f} over {seeds} seeds)"
        means = row["reference"], row["fast"]
        log.info("%-22s DDIM %.4f, fast %.4f, difference %s: %s", name, *means, shown, row["verdict"])
    if cli.SOME_REJECTED in codes:
        log.warning("not every image could be inpainted; rejects.json in the folders says why")
    return cli.SOME_REJECTED not in codes


def common_samples(folders: Sequence[Path]) -> list[list[Sample]]:
    """The samples of each folder, those left out that any of them lacks."""
    found = [load_samples(folder)[0] for folder in folders]
    names = set.intersection(*({sample.sample_id for sample in samples} for samples in found))
    if len(names) < 2:
        what = f"{len(names)} images in common; expected at least 2; inpaint more"
        raise MedSoftError(f"{folders[0]}, {folders[1]}: {what}")
    return [[sample for sample in samples if sample.sample_id in names] for samples in found]


def features(samples: Sequence[Sample], encoder: ImageTextEncoder, data: DataConfig, batch_size: int) -> Tensor:
    """The encoder's global tokens (N, D) of the samples' crops, as the model sees them."""
    crops = torch.stack([prepare(sample, data, 0, 0).image for sample in samples])
    return torch.cat([crop_features(encoder, each) for each in crops.split(batch_size)])


def judged(judge: Path, source: Path, samples: Sequence[Sample]) -> dict[str, float]:
    """What the judge says about these diseased samples of ``source``: share called diseased, and of the right type."""
    names = {sample.sample_id for sample in samples}
    rows = [row for row in predict(judge, source)[0] if row["sample_id"] in names]
    lesions = [key for key in rows[0] if key.startswith("p_") and key != "p_healthy"]
    if lesions == ["p_diseased"]:
        raise MedSoftError(f"{judge}: knows no lesion types; expected a classifier trained with task: type")
    likeliest = [lesions[int(np.argmax([row[name] for name in lesions]))] for row in rows]
    right = [name == f"p_{row['lesion_type']}" for name, row in zip(likeliest, rows, strict=True)]
    return {
        "lesion_detection_rate": statistics.mean(row["predicted"] != "healthy" for row in rows),
        "prompt_agreement": statistics.mean(right),
    }


def differences(reference: list[dict[str, float]], fast: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each measure: means over the seeds, and fast minus reference with its 95 % interval, paired by seed.

    The interval is Student's t over seeds: other seeds on the same images. ``verdict``: better or worse where it does
    not hold 0, else that no difference is shown, which is not that there is none.
    """
    found = {}
    for name, better in MEASURES.items():
        before, after = ([run[name] for run in runs] for runs in (reference, fast))
        paired = interval([new - old for old, new in zip(before, after, strict=True)])
        direction = better * {"higher": 1, "lower": -1}.get(paired.verdict, 0)
        verdict = {1: "better", -1: "worse", 0: "no difference shown"}[direction]
        means = {"reference": statistics.mean(before), "fast": statistics.mean(after)}
        bounds = {"difference": paired.mean, "low": paired.low, "high": paired.high}
        found[name] = {**means, **bounds, "verdict": verdict}
    return found
