"""Draw lesions over a dataset folder; only the soft-masked region may change.

    python dataset_infer.py --ckpt stage2_2/last.ckpt --output_dir results --config ./models/mldm_v15.yaml

Without --data it draws on the healthy samples of openimages_format_train.json, with prompts drawn from its diseased
ones. The output is a dataset folder again: one sample folder <sample_id>__v<k> per picture. The same command again
finishes what is missing; --replay makes one picture again from its meta.json.
"""

import argparse
import functools
import logging
import os
import shlex
import sys
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError

log = logging.getLogger("dataset_infer")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--ckpt", type=Path, help="a final checkpoint, such as stage2_2/last.ckpt")
    parser.add_argument("--config", type=Path, help="model YAML")
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder to write")
    what = parser.add_argument_group("what to draw on (default: healthy samples of --train_json)")
    what.add_argument("--data", type=Path, help="dataset folder or annotation JSON")
    what.add_argument(
        "--choose",
        metavar="WHICH",
        help="all, healthy, diseased, or a text file with one sample_id per line (default: the healthy ones, or the "
        "diseased ones where there are none)",
    )
    what.add_argument("--like", type=Path, metavar="RESULTS", help="the same pictures and masks as in these results")
    what.add_argument("--replay", type=Path, metavar="META.json", help="the picture this meta.json belongs to, again")
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
    how.add_argument("--sampler", help="ddim or dpmpp_2m (default: sampling.sampler)")
    how.add_argument("--steps", type=int, help="sampling steps (default: sampling.steps)")
    how.add_argument("--guidance_scale", type=float, help="1 = no guidance (default: sampling.guidance_scale)")
    how.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="shares of the steps between which guidance acts (default: sampling.guidance_interval)",
    )
    how.add_argument("--precision", help="32-true or bf16-true (default: sampling.precision)")
    how.add_argument(
        "--exact", action="store_true", help="one picture at a time and one thread: equal files on every run"
    )
    how.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    how.add_argument("--devices", type=int, default=1, help="processes on this node (default: %(default)s)")
    how.add_argument("--num_nodes", type=int, default=1, help="nodes, each with --devices (default: %(default)s)")
    how.add_argument("--overwrite", action="store_true", help="replace the results of another run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse contradictions between flags, and paths that are not there."""
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt: expected a sentence, found nothing")
    if args.image and not (args.mask and args.prompt):
        raise UsageError("--image needs --mask and --prompt as well")
    if args.mask and not args.image:
        raise UsageError("--mask belongs to --image; a dataset's masks are in its sample folders")
    if sum(bool(given) for given in (args.data, args.like, args.image, args.replay)) > 1:
        raise UsageError("--data, --like, --image and --replay exclude each other")
    if args.replay:
        fixed = ("choose", "limit", "variants", "prompt", "seed", "batch_size", "sampler", "steps", "guidance_scale")
        fixed += ("guidance_interval", "precision", "exact", "devices", "num_nodes", "overrides")
        defaults = build_parser().parse_args(["--output_dir", "x"])
        for flag in fixed:
            if getattr(args, flag) != getattr(defaults, flag):
                raise UsageError(f"--replay makes the same picture again; {flag} does not go with it")
    for flag in ("ckpt", "config") if not args.replay else ():
        if getattr(args, flag) is None:
            raise UsageError(f"--{flag} is needed (only --replay does without)")
    for flag in ("image", "mask", "data", "like", "replay", "ckpt"):
        path = getattr(args, flag)
        if path and not path.exists():
            raise UsageError(f"--{flag} {path}: does not exist")
        if path and path.resolve().is_relative_to(args.output_dir.resolve()):
            raise UsageError(f"--output_dir {args.output_dir}: holds the input --{flag} {path}; give another folder")
    if args.like and (args.variants > 1 or args.choose):
        raise UsageError("--like draws the same pictures again; --variants and --choose do not go with it")
    if args.variants < 1 or (args.limit is not None and args.limit < 1):
        raise UsageError("--variants and --limit: expected at least 1")
    if args.exact and args.batch_size not in (None, 1):
        raise UsageError("--exact draws one picture at a time; --batch_size does not go with it")
    if args.devices < 1 or args.num_nodes < 1:
        raise UsageError("--devices and --num_nodes: expected at least 1")


def biomedclip_path(given: Path | None) -> Path | None:
    """An absolute folder, so that a replay from elsewhere finds it; a hub id stays as it is."""
    if given is None or str(given).startswith("hf-hub:"):
        return given
    return given.resolve()


def resolve(args: argparse.Namespace):
    """The configuration and the overrides behind it: YAML, then flags, then dotted overrides.

    With --replay everything comes from the picture's meta.json; --ckpt, --config and --biomedclip say where these files
    are by now.
    """
    from ldm.config import load_config

    check_flags(args)
    flags = {
        "sampling.batch_size": args.batch_size,
        "sampling.sampler": args.sampler,
        "sampling.steps": args.steps,
        "sampling.guidance_scale": args.guidance_scale,
        "sampling.guidance_interval": args.guidance_interval,
        "sampling.precision": args.precision,
        "biomedclip.path": biomedclip_path(args.biomedclip),
    }
    overrides = [f"{key}={value}" for key, value in flags.items() if value is not None] + args.overrides
    if args.exact:
        overrides.append("sampling.batch_size=1")
    if args.replay:
        from ldm.inference.tasks import read_record

        record = read_record(args.replay)
        args.ckpt = args.ckpt or Path(record["checkpoint"])
        args.config = args.config or Path(record["config"])
        args.exact = record["exact"]
        overrides = [*record["overrides"], "sampling.batch_size=1", *overrides]
    return load_config(args.config, overrides), overrides


def check_replay(args: argparse.Namespace, config, digest: str) -> None:
    """MedSoftError unless checkpoint and settings are those the picture was drawn with."""
    from ldm.core import schema
    from ldm.core.errors import MedSoftError
    from ldm.core.files import fingerprint
    from ldm.inference.tasks import read_record

    record = read_record(args.replay)
    if digest != record["checkpoint_sha256"]:
        raise MedSoftError(
            f"{args.ckpt}: is not the checkpoint {args.replay} was drawn with; give that one with --ckpt"
        )
    if fingerprint(schema.identity(config, "images")) != record["config_sha256"]:
        raise MedSoftError(
            f"{args.config}: no longer says what {args.replay} was drawn with; give that YAML with --config"
        )


def identity(config, tasks, digest: str, exact: bool) -> str:
    """Fingerprint of everything that decides the pictures; each file is read once, however many share it."""
    from ldm.core import schema
    from ldm.core.files import content_id, fingerprint
    from ldm.data.preparation import sample_identity

    content = functools.cache(content_id)
    plan = [
        (sample_identity(task.sample, content), task.variant, task.prompt, task.seed, task.fixed_mask)
        + ((sample_identity(task.source, content),) if task.source and not task.fixed_mask else ())
        for task in tasks
    ]
    return fingerprint([digest, schema.identity(config, "images"), exact, plan])


def main(args: argparse.Namespace) -> int:
    config, overrides = resolve(args)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        logging.disable(logging.INFO)  # one process speaks for all
    from ldm.checkpoints.files import detect_format
    from ldm.core.files import sha256_file
    from ldm.inference.run import InferenceRun, Provenance
    from ldm.inference.tasks import plan_tasks

    detect_format(args.ckpt)
    digest = sha256_file(args.ckpt)
    if args.replay:
        check_replay(args, config, digest)
    tasks, rejects = plan_tasks(args)
    for image in {task.sample.image for task in tasks}:
        if image.resolve().is_relative_to(args.output_dir.resolve()):
            raise UsageError(f"--output_dir {args.output_dir}: holds {image}, which is to be drawn on; give another")
    command = " ".join(shlex.quote(part) for part in ["python", *sys.argv])
    origin = Provenance(args.ckpt.resolve(), digest, args.config.resolve(), overrides, args.exact, command)
    session = InferenceRun(args.output_dir, identity(config, tasks, digest, args.exact), origin, config)
    with session.alone():
        return draw(args, session, tasks, rejects)


def draw(args: argparse.Namespace, session, tasks, rejects) -> int:
    """Draw what is missing, on as many processes as were asked for; the exit code."""
    before = session.begin(args.overwrite)
    if before and before.get("complete") and session.finished(tasks) == before["pictures"]:
        log.info("%s: already complete (%d pictures)", args.output_dir, before["pictures"])
        return cli.SOME_REJECTED if before["rejected"] else cli.DONE
    import torch

    from ldm.core.distributed import start_processes
    from ldm.inference.inpainter import load_inpainter

    session.processes = start_processes(args.device, args.devices, args.num_nodes)
    session.processes.barrier()
    if args.exact:
        torch.set_num_threads(1)
    return session.draw(tasks, rejects, lambda: load_inpainter(args.ckpt, session.config, session.processes.device))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(build_parser(), main)
