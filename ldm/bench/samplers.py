"""Whether a faster way of sampling is as good: the same images with several settings, and with very many steps."""

import logging
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.classifier.run import predict
from ldm.config import DataConfig, SamplingConfig, load_config
from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import unchanged, write_json
from ldm.core.tables import counted, write_csv
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.checks import real_ones
from ldm.data.masks import read_mask
from ldm.data.preparation import prepare
from ldm.data.samples import Sample
from ldm.diffusion.guidance import guided_steps
from ldm.evaluation.metrics import crop_features, frechet_distance
from ldm.inference.options import InferenceOptions
from ldm.inference.run import run
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.opening import open_encoder
from ldm.reports.comparison import read_result
from ldm.workflow.study_results import interval

log = logging.getLogger("compare_samplers")

# With the sign of better. The distance has a value for each image, the others for each seed.
MEASURES = {"distance": -1, "frechet_distance": -1, "lesion_detection_rate": 1, "prompt_agreement": 1}
DDIM = "sampler=ddim eta=0 spacing=leading guidance_interval=[0,1]"
SETTINGS = (f"ddim50 {DDIM} steps=50", "default")  # the paper's, and the configuration's own
MANY = "many_steps"  # the run to which distances are measured


@dataclass(frozen=True)
class Setting:
    """One way of sampling: a name, which its folders get, and overrides of the section ``sampling``."""

    name: str
    overrides: tuple[str, ...]


def parsed(text: str) -> Setting:
    """``NAME KEY=VALUE ...``, the keys those of the section ``sampling``; UsageError where it is something else."""
    try:
        name, *keys = shlex.split(text)
    except ValueError:  # nothing, or a quote that is not closed
        name, keys = "", []
    if not re.fullmatch(r"\w[\w.-]*", name) or not all("=" in key for key in keys):
        raise UsageError(f'--setting {text!r}: expected a name and keys, such as "fast steps=10 spacing=trailing"')
    return Setting(name, tuple(f"sampling.{key}" for key in keys))


def half_calls(sampling: SamplingConfig) -> int:
    """How often the U-Net sees one image: a step with guidance counts two, with the prompt and without it."""
    guided = guided_steps(sampling.steps, sampling.guidance_interval) if sampling.guidance_scale != 1 else ()
    return sampling.steps + len(guided)


def compare_samplers(options: InferenceOptions, judge: Path, seeds: int, settings: Sequence[str], many: int) -> bool:
    """Inpaint with all settings, measure and write comparison.json; whether every image could be inpainted.

    ``options``: what all runs have in common; their folders lie in its ``output_dir``, which keeps what it holds of the
    same comparison. ``judge``: classifier.safetensors; ``settings``: texts that ``parsed`` reads, the first is what the
    others are compared with; ``many``: steps of DDIM of the run to which distances are measured. Raises UsageError or
    MedSoftError for what cannot be compared, and for a checkpoint or judge that is replaced meanwhile.
    """
    ckpt, model, data = options.ckpt, options.config, options.data
    if ckpt is None or model is None or data is None:
        raise UsageError("expected a checkpoint (--ckpt), a model YAML (--config) and samples (--data)")
    for file in (ckpt, judge):
        if not file.is_file():
            raise UsageError(f"{file}: does not exist, or is no file")
    chosen = chosen_settings(settings, many)
    words = {each.name: (*options.overrides, *each.overrides) for each in chosen}
    configs = {name: load_config(model, own) for name, own in words.items()}
    config = load_config(model, options.overrides)
    real = _real_lesions(data)
    prompts = options.output_dir / "prompts.json"
    write_annotations(prompts, real)
    encoder, size = open_encoder(config.biomedclip), config.sampling.batch_size
    of_real = features(real, encoder, config.data, size)
    calls = {name: half_calls(each.sampling) for name, each in configs.items() if name != MANY}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    images: list[dict[str, Any]] = []
    complete = True
    with unchanged(ckpt), unchanged(judge):  # each of them is opened again for every folder
        on_real = judged(judge, prompts, real)
        for seed in range(seeds):
            folders = {name: options.output_dir / f"{name}_seed{seed}" for name in words}
            for name, folder in folders.items():
                own = replace(options, output_dir=folder, train_json=prompts, seed=seed, overrides=words[name])
                complete &= run(own) != cli.SOME_REJECTED
            drawn = common_samples(folders)
            truth = drawn.pop(MANY)
            apart = {name: distances(samples, truth) for name, samples in drawn.items()}
            for sample in truth:
                of_sample = {name: found[sample.sample_id] for name, found in apart.items()}
                images.append({"seed": seed, "sample_id": sample.sample_id, **of_sample})
            for name, samples in drawn.items():
                distance = frechet_distance(of_real, features(samples, encoder, config.data, size))
                runs[name].append({"frechet_distance": distance, **judged(judge, folders[name], samples)})
                log.info("%s, seed %d: %s", name, seed, {key: round(value, 4) for key, value in runs[name][-1].items()})
    measured = {
        "settings": {each.name: list(each.overrides) for each in chosen} | {"overrides": list(options.overrides)},
        "half_calls": calls,
        "pictures": len(images),
        "real": {"pictures": len(real), **on_real},
        "seeds": runs,
        "measures": differences(runs, images),
    }
    write_csv(options.output_dir / "distances.csv", images)
    write_json(options.output_dir / "comparison.json", measured)
    report(measured)
    if not complete:
        log.warning("not every image could be inpainted; rejects.json in the folders says why")
    return complete


def _real_lesions(data: Path) -> list[Sample]:
    """The real diseased samples of ``data`` whose lesion a judge may see: all but the subtle ones."""
    samples = real_ones(data, load_samples(data)[0])
    real = [sample for sample in samples if not sample.healthy and sample.severity != "subtle"]
    if len(real) < 2:
        raise MedSoftError(
            f"{data}: {counted(len(real), 'diseased sample')}, the subtle ones left out; expected at least 2"
        )
    return real


def chosen_settings(texts: Sequence[str], many: int) -> list[Setting]:
    """The settings to compare and, as the last one, the run to which distances are measured."""
    chosen = [parsed(text) for text in (*(texts or SETTINGS), f"{MANY} {DDIM} steps={many}")]
    names = [each.name for each in chosen]
    if len(names) < 3 or len(set(names)) < len(names) or "overrides" in names:
        what = f"at least two, of different names that are neither {MANY} nor overrides"
        raise UsageError(f"--setting: expected {what}, found {', '.join(names[:-1])}")
    return chosen


def report(measured: dict[str, Any]) -> None:
    """Log one line for each setting and measure of a comparison.json."""
    for name, rows in measured["measures"].items():
        for measure, row in rows.items():
            shown = f"{row['value']:.4f}"
            if "difference" in row:
                shown += f", {row['difference']:+.4f} (95 % {row['low']:+.4f} to {row['high']:+.4f}): {row['verdict']}"
            log.info("%-12s %3d half-calls, %-22s %s", name, measured["half_calls"][name], measure, shown)


def common_samples(folders: Mapping[str, Path]) -> dict[str, list[Sample]]:
    """The samples of each folder by its name, those left out that any of them lacks."""
    found = {name: load_samples(folder)[0] for name, folder in folders.items()}
    common = set.intersection(*({sample.sample_id for sample in samples} for samples in found.values()))
    if len(common) < 2:
        fewest = folders[min(found, key=lambda name: len(found[name]))]
        raise MedSoftError(
            f"{fewest}: {counted(len(common), 'image')} in common with the others; expected at least 2; inpaint more"
        )
    return {name: [sample for sample in samples if sample.sample_id in common] for name, samples in found.items()}


def distances(samples: Sequence[Sample], truth: Sequence[Sample]) -> dict[str, float]:
    """By sample_id: root mean square difference to the same image of ``truth``, inside the mask, in grey levels."""
    others, found = {sample.sample_id: sample for sample in truth}, {}
    for sample in samples:
        one, other = (read_result(each) for each in (sample, others[sample.sample_id]))
        assert sample.mask is not None  # a result has one
        inside = read_mask(sample.mask, one.soft.shape).hard
        change = 255 * (one.shown()[1] - other.shown()[1])[inside]
        found[sample.sample_id] = float(np.sqrt(np.mean(np.square(change))))
    return found


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


def differences(
    runs: dict[str, list[dict[str, float]]], images: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """By setting and measure its mean; of all but the first also what it has more than that, with its 95 % interval.

    ``runs``: values of each seed; ``images``: rows of distances.csv. The interval is Student's t of paired differences,
    over images for the distance, else over seeds (other seeds on the same images). ``verdict``: better or worse where
    it does not hold 0, else that no difference is shown, which is not that there is none.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    values = {
        setting: {"distance": [row[setting] for row in images]}
        | {measure: [row[measure] for row in rows] for measure in MEASURES if measure != "distance"}
        for setting, rows in runs.items()
    }
    first = next(iter(runs))
    for setting, of_measures in values.items():
        found[setting] = {measure: {"value": statistics.mean(each)} for measure, each in of_measures.items()}
        for measure, each in of_measures.items() if setting != first else ():
            paired = interval([new - old for old, new in zip(values[first][measure], each, strict=True)])
            direction = MEASURES[measure] * {"higher": 1, "lower": -1}.get(paired.verdict, 0)
            verdict = {1: "better", -1: "worse", 0: "no difference shown"}[direction]
            bounds = {"difference": paired.mean, "low": paired.low, "high": paired.high}
            found[setting][measure] |= {**bounds, "verdict": verdict}
    return found
