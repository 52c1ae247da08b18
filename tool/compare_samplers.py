"""Is a faster way of sampling as good? Draw the same pictures with 50 steps of DDIM and with the fast setting.

    python tool/compare_samplers.py --ckpt stage2_2/last.ckpt --config models/mldm_v15.yaml --data dataset \
        --judge classifier_judge/classifier.safetensors --output_dir samplers

Draws on the healthy samples of --data, with prompts of its diseased ones that are not subtle, once for each of several
seeds and each setting: masks, prompts and noise of a seed are the same for both. Measured for each seed: the Frechet
distance of the drawn crops to the crops of those diseased samples, in BiomedCLIP's features; how often the judge (a
saved classifier that knows lesion types) calls a picture diseased; and how often the lesion type it finds is the
prompt's. The fast setting is no worse where its mean over the seeds is worse by no more than the spread (largest less
smallest) that the seeds alone make in the 50-step runs. How much faster it is: `tool/bench.py inference`. Everything is
kept in --output_dir; the same command goes on where it was. Exit code 3: pictures could not be drawn; the others are
compared.
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataset_infer
from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.config import Config
    from ldm.data.samples import Sample
    from ldm.networks.encoder import ImageTextEncoder

log = logging.getLogger("compare_samplers")

MEASURES = {  # and the sign of better
    "frechet_distance": -1,
    "lesion_detection_rate": 1,
    "prompt_agreement": 1,
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--ckpt", type=Path, required=True, help="a final checkpoint")
    parser.add_argument("--config", type=Path, required=True, help="model YAML")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or JSON, healthy and diseased samples")
    parser.add_argument("--judge", type=Path, required=True, help="classifier.safetensors of classifier.py, task type")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for pictures and comparison.json")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many healthy samples")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def draw(args: argparse.Namespace, prompts: Path, folder: Path, seed: int, setting: dict[str, Any]) -> int:
    """dataset_infer.py into ``folder``; what is there already is kept. Returns its exit code."""
    first, last = setting["guidance_interval"]
    flags = ["--ckpt", args.ckpt, "--config", args.config, "--output_dir", folder, "--data", args.data]
    flags += ["--choose", "healthy", "--train_json", prompts, "--seed", seed, "--device", args.device]
    flags += ["--sampler", setting["sampler"], "--steps", setting["steps"], "--guidance_interval", first, last]
    flags += [] if args.limit is None else ["--limit", args.limit]
    words = [str(word) for word in [*flags, *args.overrides]]
    return dataset_infer.main(dataset_infer.build_parser().parse_intermixed_args(words))


def common(folders: "list[Path]") -> "list[list[Sample]]":
    """The samples of each folder, those left out that any of them lacks."""
    from ldm.data.annotations import load_samples

    found = [load_samples(folder)[0] for folder in folders]
    names = set.intersection(*({sample.sample_id for sample in samples} for samples in found))
    if len(names) < 2:
        raise MedSoftError(
            f"{folders[0]}, {folders[1]}: {len(names)} pictures in common; expected at least 2; draw more"
        )
    return [[sample for sample in samples if sample.sample_id in names] for samples in found]


def features(samples: "list[Sample]", clip: "ImageTextEncoder", config: "Config") -> "Tensor":
    """BiomedCLIP's CLS tokens (N, D) of the samples' crops, as the model sees them."""
    import torch

    from ldm.data.preparation import prepare
    from ldm.evaluation.metrics import crop_features

    crops = torch.stack([prepare(sample, config.data, 0, 0).image for sample in samples])
    return crop_features(clip, crops.split(config.sampling.batch_size))


def judged(judge: Path, source: Path, samples: "list[Sample]") -> dict[str, float]:
    """What the judge says about these diseased samples of ``source``: share called diseased, and of the right type."""
    from ldm.classifier.run import predict

    names = {sample.sample_id for sample in samples}
    rows = [row for row in predict(judge, source)[0] if row["sample_id"] in names]
    lesions = [key for key in rows[0] if key.startswith("p_") and key != "p_healthy"]
    if lesions == ["p_diseased"]:
        raise MedSoftError(f"{judge}: knows no lesion types; expected a classifier trained with task: type")
    right = [max(lesions, key=row.get) == f"p_{row['lesion_type']}" for row in rows]
    return {
        "lesion_detection_rate": statistics.mean(row["predicted"] != "healthy" for row in rows),
        "prompt_agreement": statistics.mean(right),
    }


def verdicts(reference: list[dict[str, float]], fast: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each measure: means over the seeds, the spread of the reference's seeds, and whether fast is no worse."""
    found = {}
    for name, better in MEASURES.items():
        before, after = ([run[name] for run in runs] for runs in (reference, fast))
        means, spread = (statistics.mean(before), statistics.mean(after)), max(before) - min(before)
        worse_by = better * (means[0] - means[1])
        found[name] = {"reference": means[0], "fast": means[1], "spread": spread, "no_worse": worse_by <= spread}
    return found


def main(args: argparse.Namespace) -> int:
    from ldm.bench.inference import FAST, REFERENCE
    from ldm.config import load_config
    from ldm.core.files import write_json
    from ldm.data.annotations import load_samples, write_annotations
    from ldm.evaluation.metrics import frechet_distance
    from ldm.networks.opening import open_encoder

    if args.seeds < 2:
        raise UsageError("--seeds: expected at least 2; their spread is what the difference is compared with")
    for file in (args.ckpt, args.judge):
        if not file.is_file():
            raise UsageError(f"{file}: does not exist")
    config = load_config(args.config, args.overrides)
    real = [sample for sample in load_samples(args.data)[0] if not sample.healthy and sample.severity != "subtle"]
    if len(real) < 2:
        raise MedSoftError(f"{args.data}: {len(real)} diseased samples that are not subtle; expected at least 2")
    prompts = args.output_dir / "prompts.json"
    write_annotations(prompts, real)
    clip = open_encoder(config.biomedclip)
    of_real = features(real, clip, config)
    runs: dict[str, list[dict[str, float]]] = {"reference": [], "fast": []}
    codes, pictures = set(), 0
    for seed in range(args.seeds):
        folders = [args.output_dir / f"{name}_seed{seed}" for name in runs]
        for folder, setting in zip(folders, (REFERENCE, FAST), strict=True):
            codes.add(draw(args, prompts, folder, seed, setting))
        for name, folder, samples in zip(runs, folders, common(folders), strict=True):
            distance = frechet_distance(of_real, features(samples, clip, config))
            runs[name].append({"frechet_distance": distance, **judged(args.judge, folder, samples)})
            pictures += len(samples)
            log.info("%s, seed %d: %s", name, seed, {key: round(value, 4) for key, value in runs[name][-1].items()})
    compared = verdicts(**runs)
    about = {"reference": REFERENCE, "fast": FAST, "overrides": args.overrides, "pictures": pictures, "real": len(real)}
    of_prompts = judged(args.judge, prompts, real)
    measured = {"settings": about, "real": of_prompts, "seeds": runs, "measures": compared}
    write_json(args.output_dir / "comparison.json", measured)
    for name, row in compared.items():
        word = "no worse" if row["no_worse"] else "WORSE"
        shown = row["reference"], row["fast"], row["spread"], word
        log.info("%-22s 50 steps of DDIM %.4f, fast %.4f, spread of the seeds %.4f: %s", name, *shown)
    if cli.SOME_REJECTED in codes:
        log.warning("not every picture could be drawn; rejects.json in the folders says why")
        return cli.SOME_REJECTED
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
