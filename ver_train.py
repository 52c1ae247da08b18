"""Train one stage of MedSoft-Diffusion: the YAML decides which.

    python ver_train.py --ckpt ckpt_for_stage1.ckpt --config ./models/mldm_v15_stage1.yaml --save_path stage1

The same command again resumes from SAVE_PATH/last.ckpt, or says that the stage is complete. --ckpt only gives the
first weights. Any key of the YAML can be set at the end of the command: training.mask_weight=4 training.warmup_steps=50
"""

import argparse
import logging
import os
import signal
from pathlib import Path

from ldm import cli
from ldm.errors import MedSoftError, UsageError

log = logging.getLogger("ver_train")

REJECTS = "rejects.json"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint that gives the first weights")
    parser.add_argument("--config", type=Path, required=True, help="stage YAML in models/")
    parser.add_argument("--save_path", type=Path, required=True, help="folder for last.ckpt, config.yaml, metrics.csv")
    parser.add_argument(
        "--train_json",
        type=Path,
        default=Path("openimages_format_train.json"),
        help="annotations to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--val_json",
        type=Path,
        default=Path("openimages_format_val.json"),
        help="annotations to validate on (default: %(default)s)",
    )
    parser.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder (default: biomedclip.path of the YAML)")
    parser.add_argument(
        "--cache_dir", type=Path, help="folder of cached features (default: feature_cache beside SAVE_PATH)"
    )
    parser.add_argument("--devices", default="auto", help="number of devices, or auto (default: %(default)s)")
    parser.add_argument("--num_nodes", type=int, default=1, help="number of machines (default: %(default)s)")
    parser.add_argument("--precision", help="auto, 32-true, bf16-mixed, ... (default: training.precision)")
    parser.add_argument("--batch_size", type=int, help="global batch (default: training.batch_size)")
    parser.add_argument("--max_epochs", type=int, help="epochs (default: training.max_epochs)")
    parser.add_argument("--seed", type=int, help="seed (default: training.seed)")
    parser.add_argument("--overwrite", action="store_true", help="start again where another run was saved")
    parser.add_argument(
        "--dry_run", action="store_true", help="show configuration, data and parameter groups, then stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def resolve(args: argparse.Namespace):
    """The configuration of this run: YAML, then flags, then dotted overrides."""
    from ldm.config import load_config

    flags = {
        "training.precision": args.precision,
        "training.batch_size": args.batch_size,
        "training.max_epochs": args.max_epochs,
        "training.seed": args.seed,
        "biomedclip.path": args.biomedclip,
    }
    overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
    config = load_config(args.config, [*overrides, *args.overrides])
    if not config.training.stage:
        raise UsageError(f"{args.config}: names no stage; use one of the YAMLs built on it, such as *_stage1.yaml")
    return config


def read_items(args: argparse.Namespace, config) -> tuple[dict[str, list], list]:
    """Training and validation items, and the samples whose files are gone; what cannot be used is counted and said."""
    from ldm.annotations import load_samples
    from ldm.dataset import training_items

    found, rejects = {}, []
    for split, path in (("train", args.train_json), ("val", args.val_json)):
        samples, missing = load_samples(path)
        items, undrawable = training_items(samples, config.data)
        if not items:
            raise MedSoftError(f"{path}: no sample can be used for training ({len(samples)} read, all without a mask)")
        used = {item.sample.sample_id: item.sample for item in items}.values()
        sick = sum(not sample.healthy for sample in used)
        log.info(
            "%s: %d diseased and %d healthy samples of %d patients (%s)",
            split,
            sick,
            len(used) - sick,
            len({sample.patient_id for sample in used}),
            path,
        )
        for reject in [*missing, *undrawable][:5]:
            log.warning("skipped %s", reject)
        if len(missing) + len(undrawable) > 5:
            log.warning("... %d more skipped", len(missing) + len(undrawable) - 5)
        found[split] = items
        rejects += missing
    shared = {i.sample.patient_id for i in found["train"]} & {i.sample.patient_id for i in found["val"]}
    if shared:
        raise MedSoftError(f"{args.val_json}: patient {min(shared)} is also in {args.train_json}; split by patient")
    return found, rejects


def announce(config, source, groups) -> None:
    """What is trained, in a few lines; and a word where the published README trains something else than it says."""
    training = config.training
    for name, members in groups.items():
        count = sum(parameter.numel() for parameter in members.values())
        log.info(
            "trains %s: %d tensors, %.2f M parameters, learning rate %g",
            name,
            len(members),
            count / 1e6,
            training.rates[name],
        )
    if training.stage == "stage2_1" and source.about.get("stage") == "stage2_1":
        log.info(
            "note: stage2_1 trains the MSC only, also for this checkpoint that it has trained before; "
            "the YAML that trains the full model is the one ending in _stage2_2.yaml"
        )


def previous_run(args: argparse.Namespace, run: str):
    """The checkpoint to resume from, or None for a fresh start; refuses a folder that holds another run."""
    from ldm.checkpoint import read_checkpoint

    last = args.save_path / "last.ckpt"
    if last.resolve() == args.ckpt.resolve():
        raise UsageError(f"--ckpt {args.ckpt}: lies in --save_path and would be overwritten; give another --save_path")
    if not last.exists():
        return None
    try:
        found = read_checkpoint(last)
    except MedSoftError:
        if args.overwrite:
            return None
        raise
    if found.about.get("run") == run:
        return found
    if not args.overwrite:
        raise UsageError(
            f"{last}: belongs to a run with other data, settings or --ckpt; give another --save_path, "
            "or --overwrite to start again there"
        )
    return None


def identity(args: argparse.Namespace, config, items) -> str:
    """Fingerprint of everything that decides the weights: settings, data and the first weights."""
    import dataclasses

    from ldm.dataset import sample_identity
    from ldm.files import fingerprint, sha256_file

    settings = dataclasses.asdict(config)
    for section, key in (("training", "workers"), ("training", "save_every_minutes"), ("biomedclip", "path")):
        settings[section].pop(key)
    settings.pop("sampling")
    used = {(split, item.sample.sample_id): item.sample for split, members in items.items() for item in members}
    data = [(split, sample_identity(sample)) for (split, _), sample in used.items()]
    return fingerprint([settings, data, sha256_file(args.ckpt)])


def main(args: argparse.Namespace) -> int:
    config = resolve(args)
    items, rejects = read_items(args, config)
    import dataclasses

    from ldm.checkpoint import check_preparation, load_parts, read_checkpoint

    source = read_checkpoint(args.ckpt)
    check_preparation(source, config)
    run = identity(args, config, items)
    previous = None if args.dry_run else previous_run(args, run)
    if previous and previous.about.get("complete"):
        log.info("%s: already complete (%d steps)", args.save_path, previous.about["step"])
        return cli.SOME_REJECTED if (args.save_path / REJECTS).exists() else cli.DONE

    import torch

    from ldm.encoders import BiomedClip
    from ldm.model import MedSoftModel
    from ldm.training import Stage

    torch.manual_seed(config.training.seed)
    clip = BiomedClip(config.biomedclip.path)
    clip.check(config.biomedclip)
    clip.check_same(previous or source)
    net = MedSoftModel(config, config.training.builds)
    load_parts(net, previous or source, net.parts, config)
    about = {
        "config": dataclasses.asdict(config),
        "stage": config.training.stage,
        "run": run,
        "biomedclip": clip.fingerprint,
        "origin": {"file": args.ckpt.name, "stage": source.about.get("stage"), "from": source.about.get("origin")},
    }
    empty = None
    if "text" in net.parts:
        with torch.no_grad():
            empty = net.cond_stage_model([""])
    stage = Stage(config, net, about, empty)
    announce(config, source, stage.groups)
    if args.dry_run:
        from omegaconf import OmegaConf

        log.info("%s", OmegaConf.to_yaml(OmegaConf.structured(config)))
        return cli.DONE
    data, rejects = cached_data(args, config, net, clip, items, rejects)
    return fit(args, config, stage, data, rejects, previous)


def cached_data(args: argparse.Namespace, config, net, clip, items, rejects) -> tuple[dict, list]:
    """Features of all items, computed once; the data sets on them; and every sample that was skipped."""
    import torch

    from ldm.dataset import StageData
    from ldm.feature_cache import FeatureCache
    from ldm.training import prompt_features

    local = f":{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device("cuda" + local if torch.cuda.is_available() else "cpu")
    net.to(device)
    clip.to(device)
    cache = FeatureCache(args.cache_dir or args.save_path.parent / "feature_cache", config, net, clip)
    damaged = list(dict.fromkeys(cache.build([*items["train"], *items["val"]])))  # a healthy sample has several items
    for reject in damaged:
        log.warning("skipped %s", reject)
    gone = {str(reject.file) for reject in damaged}
    items = {split: [i for i in members if str(i.sample.image) not in gone] for split, members in items.items()}
    if not items["train"] or not items["val"]:
        raise MedSoftError("nothing left to train or validate on; every sample was skipped (see above)")
    prompts = prompt_features({i.sample.prompt for members in items.values() for i in members}, net, clip)
    data = {name: StageData(members, cache, prompts, config.training, name == "val") for name, members in items.items()}
    return data, list(dict.fromkeys([*rejects, *damaged]))


def fit(args: argparse.Namespace, config, stage, data, rejects, previous) -> int:
    """Lightning: loaders, checkpoints, resuming, and the exit code."""
    import pytorch_lightning as pl

    from ldm.annotations import write_rejects
    from ldm.config import save_config
    from ldm.devices import resolve_precision
    from ldm.training import AtomicCheckpointIO, KeepWork, Progress, loader, quiet_lightning, resume_position

    quiet_lightning()
    args.save_path.mkdir(parents=True, exist_ok=True)
    save_config(config, args.save_path / "config.yaml")
    write_rejects(args.save_path / REJECTS, rejects)
    training = config.training
    keep = KeepWork(args.save_path, training.save_every_minutes)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=resolve_precision(training.precision),
        max_epochs=training.max_epochs,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.clip_norm or None,
        callbacks=[keep, Progress()],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=args.save_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    world, rank = trainer.world_size, trainer.global_rank
    epoch, batches = resume_position(previous.rest) if previous else (0, 0)
    if previous:
        log.info("resuming at epoch %d, batch %d", epoch, batches)
    train_loader = loader(data["train"], config, True, rank, world, batches * max(1, training.batch_size // world))
    train_loader.sampler.set_epoch(epoch)
    val_loader = loader(data["val"], config, False, rank, world)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning takes it over and stops between two batches
    try:
        trainer.fit(stage, train_loader, val_loader, ckpt_path=keep.path if previous else None)
    except SystemExit:
        return cli.TERMINATED if trainer.received_sigterm else cli.INTERRUPTED
    stage.about["complete"] = True
    keep.save(trainer)
    log.info("%s: %d steps, complete", keep.path, trainer.global_step)
    return cli.SOME_REJECTED if rejects else cli.DONE


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(build_parser(), main)
