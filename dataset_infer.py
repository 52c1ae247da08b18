"""Draw lesions over a dataset folder; only the soft-masked region may change.

    python dataset_infer.py --ckpt stage2_2/last.ckpt --output_dir results --config ./models/mldm_v15.yaml

Without --data it draws on the healthy samples of openimages_format_train.json, with prompts drawn from its diseased
ones. The output is a dataset folder again: one sample folder <sample_id>__v<k> per picture. The same command again
finishes what is missing.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from ldm import cli
from ldm.errors import UsageError

log = logging.getLogger("dataset_infer")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ckpt", type=Path, required=True, help="a final checkpoint, such as stage2_2/last.ckpt")
    parser.add_argument("--config", type=Path, required=True, help="model YAML")
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder to write")
    what = parser.add_argument_group("what to draw on (default: healthy samples of --train_json)")
    what.add_argument("--data", type=Path, help="dataset folder or annotation JSON")
    what.add_argument(
        "--choose",
        choices=["all", "healthy", "diseased"],
        help="which samples of it (default: the healthy ones, or the diseased ones where there are none)",
    )
    what.add_argument("--like", type=Path, metavar="RESULTS", help="the same pictures and masks as in these results")
    what.add_argument("--image", type=Path, help="one picture, with --mask and --prompt")
    what.add_argument("--mask", type=Path, help="its lesion mask")
    what.add_argument("--limit", type=int, help="at most so many samples")
    what.add_argument("--variants", type=int, default=1, help="pictures per sample (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--prompt", help="one sentence for all (default: the sample's own, or drawn from --train_json)")
    how.add_argument(
        "--train_json",
        type=Path,
        default=Path("openimages_format_train.json"),
        help="whose diseased samples give the prompts for healthy ones (default: %(default)s)",
    )
    how.add_argument("--seed", type=int, default=0, help="seed of masks, prompts and noise (default: %(default)s)")
    how.add_argument("--batch_size", type=int, help="pictures at a time (default: sampling.batch_size)")
    how.add_argument("--steps", type=int, help="sampling steps (default: sampling.steps)")
    how.add_argument("--guidance_scale", type=float, help="1 = no guidance (default: sampling.guidance_scale)")
    how.add_argument(
        "--exact", action="store_true", help="one picture at a time and one thread: equal files on every run"
    )
    how.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder (default: biomedclip.path of the YAML)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    how.add_argument("--overwrite", action="store_true", help="replace the results of another run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def resolve(args: argparse.Namespace):
    """The configuration: YAML, then flags, then dotted overrides; contradictions between flags are refused."""
    from ldm.config import load_config

    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt: expected a sentence, found nothing")
    if args.image and not (args.mask and args.prompt):
        raise UsageError("--image needs --mask and --prompt as well")
    if args.mask and not args.image:
        raise UsageError("--mask belongs to --image; a dataset's masks are in its sample folders")
    if sum(bool(given) for given in (args.data, args.like, args.image)) > 1:
        raise UsageError("--data, --like and --image exclude each other")
    for flag in ("image", "mask", "data", "like", "ckpt"):
        path = getattr(args, flag)
        if path and not path.exists():
            raise UsageError(f"--{flag} {path}: does not exist")
        if path and path.resolve().is_relative_to(args.output_dir.resolve()):
            raise UsageError(f"--output_dir {args.output_dir}: holds the input --{flag} {path}; give another folder")
    if args.like and (args.variants > 1 or args.choose):
        raise UsageError("--like draws the same pictures again; --variants and --choose do not go with it")
    if args.variants < 1 or (args.limit is not None and args.limit < 1):
        raise UsageError("--variants and --limit: expected at least 1")
    flags = {
        "sampling.batch_size": 1 if args.exact else args.batch_size,
        "sampling.steps": args.steps,
        "sampling.guidance_scale": args.guidance_scale,
        "biomedclip.path": args.biomedclip,
    }
    overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return load_config(args.config, [*overrides, *args.overrides])


def identity(config, tasks, digest: str) -> str:
    """Fingerprint of everything that decides the pictures."""
    import dataclasses

    from ldm.dataset import sample_identity
    from ldm.files import fingerprint

    settings = dataclasses.asdict(config)
    settings["sampling"].pop("batch_size")
    settings["biomedclip"].pop("path")
    settings.pop("training")
    plan = [(sample_identity(task.sample), task.variant, task.prompt, task.seed, task.fixed_mask) for task in tasks]
    return fingerprint([digest, settings, plan])


def load_inpainter(args: argparse.Namespace, config):
    """The model with all its parts, ready to draw."""
    import torch

    from ldm.checkpoint import PREFIXES, check_preparation, load_parts, read_checkpoint
    from ldm.encoders import BiomedClip
    from ldm.inpainting import Inpainter
    from ldm.model import MedSoftModel

    if args.exact:
        torch.set_num_threads(1)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    clip = BiomedClip(config.biomedclip.path)
    clip.check(config.biomedclip)
    checkpoint = read_checkpoint(args.ckpt)
    clip.check_same(checkpoint)
    check_preparation(checkpoint, config)
    net = MedSoftModel(config)
    load_parts(net, checkpoint, list(PREFIXES), config)
    return Inpainter(net, clip, config, device)


def main(args: argparse.Namespace) -> int:
    config = resolve(args)
    from ldm.checkpoint import sniff
    from ldm.files import sha256_file
    from ldm.inference import InferenceRun, plan_tasks

    tasks, rejects = plan_tasks(args)
    for image in {task.sample.image for task in tasks}:
        if image.resolve().is_relative_to(args.output_dir.resolve()):
            raise UsageError(f"--output_dir {args.output_dir}: holds {image}, which is to be drawn on; give another")
    sniff(args.ckpt)
    digest = sha256_file(args.ckpt)
    command = " ".join(shlex.quote(part) for part in ["python", *sys.argv])
    session = InferenceRun(args.output_dir, identity(config, tasks, digest), digest, config, command)
    before = session.begin(args.overwrite)
    if before and before.get("complete") and session.finished(tasks) == before["pictures"]:
        log.info("%s: already complete (%d pictures)", args.output_dir, before["pictures"])
        return cli.SOME_REJECTED if before["rejected"] else cli.DONE
    return session.draw(tasks, rejects, lambda: load_inpainter(args, config))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(build_parser(), main)
