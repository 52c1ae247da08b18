"""A training run from its arguments to its exit code: data, features, networks, Lightning."""

import argparse
import dataclasses
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint
from ldm.config import Config, TrainingConfig, as_yaml, config_from_dict, save_config
from ldm.core import cli
from ldm.core.devices import free_memory, is_first_on_node, is_first_process, out_of_memory, resolve_precision
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import fingerprint, free_bytes, sha256_file
from ldm.core.locks import exclusive
from ldm.core.run_folder import differences
from ldm.core.schema import identity
from ldm.data.annotations import load_samples, write_rejects
from ldm.data.checks import (
    annotation_rows,
    check_classes,
    check_disjoint,
    check_rejected,
    damaged_files,
    warn_of_similar_prompts,
)
from ldm.data.preparation import sample_identity
from ldm.data.samples import Reject
from ldm.networks.model import MedSoftModel
from ldm.networks.opening import open_model
from ldm.training.callbacks import AtomicCheckpointIO, KeepWork, WatchMovement, best_files
from ldm.training.dataset import Item, StageData, training_items
from ldm.training.estimates import GIB, Disk, stage_disk, stage_memory
from ldm.training.feature_cache import FeatureCache, cache_size
from ldm.training.previews import PreviewCallback
from ldm.training.records import Records
from ldm.training.stage import (
    STEP_PARTS,
    Stage,
    frozen_tensors,
    loader,
    quiet_lightning,
    resume_position,
    training_groups,
)

log = logging.getLogger("ver_train")

REJECTS = "rejects.json"
SHOWN_REJECTS = 5


def run_stage(args: argparse.Namespace, config: Config) -> int:
    """Train the stage that ``config`` describes; the exit code."""
    quiet_lightning()
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)  # one voice is enough
    log.info("%s", as_yaml(config))
    data = TrainingInputs(args, config)
    source = read_checkpoint(args.ckpt)
    if args.dry_run:
        return dry_run(args, config, data, source)
    folder = args.save_path.resolve()
    place = folder.with_name(f".{folder.name}.lock")
    busy = f"{args.save_path}: another run is training in this folder at this moment; give another --save_path"
    if is_first_process():
        with exclusive(place, busy):
            return _run(args, config, data, source)
    return _run(args, config, data, source)


class TrainingInputs:
    """Training and validation items after the fast checks, and what was left out."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.items: dict[str, list[Item]] = {}
        self.unreadable: list[Reject] = []  # counts against training.max_rejected
        self.undrawable: list[Reject] = []  # sound, but nothing says where a lesion would be
        self.total = 0
        for split, path in (("train", args.train_json), ("val", args.val_json)):
            self.items[split] = self._read(split, path, config)
        check_rejected(self.unreadable, self.total, config.training.max_rejected)
        samples = {
            split: list({i.sample.sample_id: i.sample for i in self.items[split]}.values()) for split in self.items
        }
        check_classes(str(args.train_json), samples["train"], config.training.balance)
        warn_of_similar_prompts(samples["train"])
        everyone = [(split, sample) for split, members in samples.items() for sample in members]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda pair: sample_identity(pair[1]), everyone)
            self.identities = [(split, known) for (split, _), known in zip(everyone, found, strict=True)]
        digests = {"train": {}, "val": {}}
        for split, known in self.identities:
            digests[split][known[0]] = known[-1][0]  # of the image file
        names = {"train": "training", "val": "validation"}
        check_disjoint(
            [row for split in samples for row in annotation_rows(names[split], samples[split], digests[split])]
        )

    def _read(self, split: str, path: Path, config: Config) -> list[Item]:
        samples, missing = load_samples(path)
        damaged = damaged_files(samples)
        missing += damaged
        names = {reject.sample_id for reject in damaged}
        total = len(samples) + len(missing) - len(damaged)
        samples = [sample for sample in samples if sample.sample_id not in names]
        items, undrawable = training_items(samples, config.data)
        if not items:
            raise MedSoftError(f"{path}: no sample can be used for training ({len(samples)} read, all without a mask)")
        used = {item.sample.sample_id: item.sample for item in items}.values()
        sick = sum(not sample.healthy for sample in used)
        patients = len({sample.patient_id for sample in used})
        log.info(
            "%s: %d diseased and %d healthy samples of %d patients (%s)", split, sick, len(used) - sick, patients, path
        )
        say_skipped([*missing, *undrawable])
        self.unreadable += missing
        self.undrawable += undrawable
        self.total += total
        return items

    @property
    def rejects(self) -> list[Reject]:
        """Everything that was left out, for whatever reason."""
        return [*self.unreadable, *self.undrawable]

    @property
    def all_items(self) -> list[Item]:
        """Items to train on, then those to validate on."""
        return [*self.items["train"], *self.items["val"]]

    def leave_out(self, damaged: list[Reject], allowed: float) -> None:
        """Drop the samples that turned out to be unreadable; MedSoftError if they are too many."""
        damaged = list(dict.fromkeys(damaged))  # a healthy sample has several items
        say_skipped(damaged)
        self.unreadable = list(dict.fromkeys([*self.unreadable, *damaged]))
        check_rejected(self.unreadable, self.total, allowed)
        gone = {str(reject.file) for reject in damaged}
        for split, members in self.items.items():
            self.items[split] = [item for item in members if str(item.sample.image) not in gone]
        if not all(self.items.values()):
            raise MedSoftError("nothing left to train or validate on; every sample was skipped (see above)")


def say_skipped(rejects: list[Reject]) -> None:
    """One line for each of the first ``rejects``, and how many more there are."""
    for reject in rejects[:SHOWN_REJECTS]:
        log.warning("skipped %s", reject)
    if len(rejects) > SHOWN_REJECTS:
        log.warning("... %d more skipped", len(rejects) - SHOWN_REJECTS)


def run_fingerprint(config: Config, inputs: list[Any]) -> str:
    """The hash of a run; ``inputs`` are the identities of its samples and the digest of its first weights."""
    return fingerprint([identity(config, "weights", "rounding"), *inputs])


def other_run(about: dict[str, Any], config: Config, inputs: list[Any], source: Path) -> str:
    """What makes the run that ``about`` (of the checkpoint ``source``) tells of another one; "" if it is the same.

    What only changes the rounding of its results may differ; its fingerprint is that of its own configuration.
    """
    if "config" not in about:
        return "it does not say which"
    try:
        theirs = config_from_dict(about["config"], str(source))
    except UsageError as error:
        return error.cause(source)
    changed = differences(identity(theirs, "weights"), identity(config, "weights"))
    if changed:
        return ", ".join(changed)
    return "" if about.get("run") == run_fingerprint(theirs, inputs) else "other data or another --ckpt"


def previous_run(args: argparse.Namespace, config: Config, inputs: list[Any]) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh start; refuses a folder that holds another run."""
    last = args.save_path / "last.ckpt"
    if last.resolve() == args.ckpt.resolve():
        raise UsageError(f"--ckpt {args.ckpt}: lies in --save_path and would be overwritten; give another --save_path")
    if not last.exists():
        if not args.overwrite:
            _refuse_to_lose_best(args.save_path, config, inputs)
        return None
    try:
        found = read_checkpoint(last)
    except MedSoftError as error:
        if args.overwrite:
            return None
        kept = best_files(args.save_path)
        start = f"--ckpt {kept[0]} and another --save_path start from the best kept weights, " if kept else ""
        raise MedSoftError(f"{error}; {start}--overwrite starts this run again") from error
    other = other_run(found.about, config, inputs, last)
    if not other:
        return found
    if not args.overwrite:
        raise UsageError(
            f"{last}: belongs to another run ({other}); give another --save_path, or --overwrite to start again there"
        )
    return None


def _refuse_to_lose_best(folder: Path, config: Config, inputs: list[Any]) -> None:
    """UsageError for best weights without a ``last.ckpt``, unless this run was killed in its first epoch."""
    for path in best_files(folder):
        about = read_checkpoint(path).about
        if about.get("epoch") or other_run(about, config, inputs, path):
            raise UsageError(
                f"{path}: best weights of a run whose last.ckpt is gone; --ckpt {path} and another --save_path start "
                "from them, --overwrite deletes them and starts again"
            )


# ------------------------------------------------------------------------------------------------ what it will take


def announce(net: MedSoftModel, config: Config, source: Checkpoint) -> None:
    """What is trained, in a few lines; and a word where the published README trains something else than it says."""
    for name, members in training_groups(net, config).items():
        count = sum(parameter.numel() for parameter in members.values())
        words = (name, len(members), count / 1e6, config.training.rates[name])
        log.info("trains %s: %d tensors, %.2f M parameters, learning rate %g", *words)
    if config.training.stage == "stage2_1" and source.about.get("stage") == "stage2_1":
        log.info(
            "note: stage2_1 trains the MSC only, also for this checkpoint that it has trained before; "
            "the YAML that trains the full model is the one ending in _stage2_2.yaml"
        )


def state_disk(args: argparse.Namespace, config: Config, data: TrainingInputs) -> Disk:
    """Say what the run will write; MedSoftError where not even two checkpoints fit."""
    disk = stage_disk(config, cache_size(config, data.all_items))
    free = free_bytes(args.save_path)
    log.info(
        "disk: at most %s (last.ckpt %s, twice while it is replaced; best epochs %s; features %s); %s free",
        *map(size, (disk.total, disk.last, disk.best, disk.features, free)),
    )
    if free < 2 * disk.last:
        raise MedSoftError(
            f"{args.save_path}: {size(free)} are free, but saving takes {size(2 * disk.last)} (the new checkpoint "
            "beside the old one); make room, or give a --save_path on another disk"
        )
    return disk


def memory_cures(training: TrainingConfig, half: bool, begun: bool) -> str:
    """What makes a training step smaller. A run that has ``begun`` keeps its batches: other ones are another run."""
    cures = [
        *(["a smaller --batch_size with training.accumulate"] if training.batch_size > 1 and not begun else []),
        *([] if training.activation_checkpointing else ["training.activation_checkpointing=true"]),
        *([] if half else ["--precision bf16-mixed"]),
    ]
    return f"{' or '.join(cures) or 'a device with more memory'} helps"


def state_memory(config: Config, device: torch.device, half: bool, world: int, begun: bool) -> None:
    """Say what a training step needs, and warn where it will not fit."""
    batch = config.training.batch_size // world
    memory = stage_memory(config, batch, half, device.type)
    free = free_memory(device)
    parts = [f"{name} {size(getattr(memory, name))}" for name in memory.__dataclass_fields__ if getattr(memory, name)]
    log.info("memory on %s: about %s (%s); %s free", device.type, size(memory.total), ", ".join(parts), size(free))
    if memory.total > free:
        log.warning("warning: that is more than is free; %s", memory_cures(config.training, half, begun))


def size(count: int) -> str:
    """Bytes for reading: 1.5 GiB, 12.3 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def dry_run(args: argparse.Namespace, config: Config, data: TrainingInputs, source: Checkpoint) -> int:
    """Everything that can be said without training, including whether the checkpoint fits."""
    trainer = make_trainer(args, config, [])
    net, _ = open_model(config, source, config.training.builds)
    announce(net, config, source)
    half = trainer.precision == "bf16-mixed"
    state_memory(config, trainer.strategy.root_device, half, trainer.world_size, begun=False)
    state_disk(args, config, data)
    return cli.DONE


# ------------------------------------------------------------------------------------------------ training


def _run(args: argparse.Namespace, config: Config, data: TrainingInputs, source: Checkpoint) -> int:
    inputs = [data.identities, sha256_file(args.ckpt)]
    previous = previous_run(args, config, inputs)
    if previous and previous.about.get("complete"):
        log.info("%s: already complete (%d steps)", args.save_path, previous.about["step"])
        return cli.SOME_REJECTED if (args.save_path / REJECTS).exists() else cli.DONE
    training = config.training
    records, keep = Records(args.save_path), KeepWork(args.save_path, training.save_every_minutes, training.keep_best)
    draws = training.pictures > 0 and training.objective == "diffusion"
    callbacks = [records, WatchMovement(), keep, *([PreviewCallback(args.save_path, records)] if draws else [])]
    trainer = make_trainer(args, config, callbacks)
    half, device = trainer.precision == "bf16-mixed", trainer.strategy.root_device

    torch.manual_seed(training.seed)
    net, clip = open_model(config, source, training.builds)
    about = {
        "config": dataclasses.asdict(config),
        "stage": training.stage,
        "run": run_fingerprint(config, inputs),
        "biomedclip": clip.fingerprint,
        "origin": {"file": args.ckpt.name, "stage": source.about.get("stage"), "from": source.about.get("origin")},
    }
    announce(net, config, source)
    state_disk(args, config, data)
    state_memory(config, device, half, trainer.world_size, begun=previous is not None)
    net.to(device)
    features = FeatureCache(args.cache_dir or args.save_path.parent / "feature_cache", config, net, clip.to(device))
    data.leave_out(features.build(data.all_items, thorough=is_first_on_node()), training.max_rejected)
    features.forget_networks()
    del clip
    net.drop([part for part in net.parts if part not in STEP_PARTS and not (part == "autoencoder" and draws)])
    stage = Stage(config, net, frozen_tensors(source, config), about, features.empty_text(), half)
    return _fit(args, stage, data, features, trainer, keep, previous)


def make_trainer(args: argparse.Namespace, config: Config, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer for the flags and the configuration; UsageError for devices that are not there."""
    training = config.training
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the same command goes on from last.ckpt
    try:
        trainer = pl.Trainer(
            accelerator="auto",
            devices=args.devices,
            num_nodes=args.num_nodes,
            precision=resolve_precision(training.precision),
            max_epochs=training.max_epochs,
            accumulate_grad_batches=training.accumulate,
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=args.save_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--devices {args.devices} --num_nodes {args.num_nodes}: {reason}") from error
    if training.batch_size % trainer.world_size:
        raise UsageError(
            f"training.batch_size is {training.batch_size}, the batch over all devices; {trainer.world_size} devices "
            "cannot share it equally"
        )
    return trainer


def _fit(
    args: argparse.Namespace,
    stage: Stage,
    data: TrainingInputs,
    features: FeatureCache,
    trainer: pl.Trainer,
    keep: KeepWork,
    previous: Checkpoint | None,
) -> int:
    config = stage.config
    if is_first_process():
        args.save_path.mkdir(parents=True, exist_ok=True)
        save_config(config, args.save_path / "config.yaml")
        write_rejects(args.save_path / REJECTS, data.rejects)
        if previous is None:
            for old in best_files(args.save_path):
                old.unlink()
    epoch, batches = resume_position(previous.rest) if previous else (0, 0)
    if previous:
        log.info("resuming at epoch %d, batch %d", epoch, batches)
    world, rank, training = trainer.world_size, trainer.global_rank, config.training
    sets = {name: StageData(items, features, training, name == "val") for name, items in data.items.items()}
    train_loader = loader(sets["train"], config, True, rank, world, batches * training.batch_size // world)
    train_loader.sampler.set_epoch(epoch)
    val_loader = loader(sets["val"], config, False, rank, world)
    try:
        trainer.fit(stage, train_loader, val_loader, ckpt_path=keep.path if previous else None)
    except cli.Terminated:
        # Lightning kills the first process when one that it started does not end well.
        return cli.TERMINATED if trainer.is_global_zero else cli.DONE
    except SystemExit:
        return cli.INTERRUPTED
    except BaseException as error:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # they would wait for this one for half an hour
        if out_of_memory(error):
            cures = memory_cures(training, trainer.precision == "bf16-mixed", keep.path.exists())
            reason = str(error).splitlines()[0]
            raise MedSoftError(f"out of memory in step {trainer.global_step + 1} ({reason}); {cures}") from error
        if isinstance(error, MedSoftError) and "\nOriginal Traceback" in str(error):  # from a data-loader process
            raise MedSoftError(str(error).strip().rsplit("\n", 1)[-1].split(": ", 1)[-1]) from error
        raise
    keep.finish(trainer)
    log.info("%s: %d steps, complete", keep.path, trainer.global_step)
    return cli.SOME_REJECTED if data.rejects else cli.DONE
