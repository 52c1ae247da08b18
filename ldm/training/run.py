"""A training run from its options to its exit code: data, features, networks, loop."""

import dataclasses
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint
from ldm.config import Architecture, Config, SamplingConfig, TrainingConfig, as_yaml, config_from_dict
from ldm.core import cli
from ldm.core.devices import free_memory, is_first_on_node, is_first_process, out_of_memory, resolve_precision
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import fingerprint, free_bytes, remove_partials, sha256_file, write_text
from ldm.core.run_folder import RunFolder, differences
from ldm.core.schema import identity
from ldm.data.annotations import write_rejects
from ldm.features.build import FeatureBuilder, cache_size
from ldm.features.names import Item
from ldm.features.store import FeatureStore
from ldm.networks.model import MedSoftModel, skeleton
from ldm.networks.opening import open_model
from ldm.training.dataset import StageData, TrainingInputs, loader, read_training_inputs
from ldm.training.estimates import GIB, stage_disk, stage_memory
from ldm.training.groups import training_groups
from ldm.training.loop import Training
from ldm.training.previews import Previews
from ldm.training.records import Records
from ldm.training.saving import LAST, Checkpoints, best_files
from ldm.training.stage import STEP_PARTS, Stage

log = logging.getLogger("ver_train")

REJECTS = "rejects.json"


@dataclass(frozen=True)
class TrainingOptions:
    """What a training run is told beside its configuration; the flags of ver_train.py."""

    ckpt: Path
    save_path: Path
    train_json: Path
    val_json: Path
    cache_dir: Path | None
    devices: str
    num_nodes: int
    overwrite: bool
    dry_run: bool


def run_stage(options: TrainingOptions, config: Config) -> int:
    """Train the stage that ``config`` describes; the exit code."""
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)  # one voice is enough
    log.info("%s", as_yaml(config))
    inputs = read_training_inputs({"train": options.train_json, "val": options.val_json}, config)
    source = read_checkpoint(options.ckpt)
    if options.dry_run:
        return dry_run(options, config, inputs, source)
    folder = RunFolder(options.save_path, LAST, what="checkpoints", shared=True, flag="--save_path")
    with folder.lock(first=is_first_process()):
        return _run(options, config, inputs, source)


# What makes two runs the same, and what is done where they are not.


@dataclass(frozen=True)
class RunIdentity:
    """All that decides what a run trains; ``inputs``: identities of its samples, digest of its first weights."""

    config: Config
    inputs: list[Any]

    def difference(self, metadata: dict[str, Any], source: Path) -> str:
        """What makes the run that ``metadata`` (of the checkpoint ``source``) tells of another one; "" if nothing does.

        What only changes the rounding of the results may differ. Older versions stored one hash of their own
        configuration and the inputs.
        """
        if "config" not in metadata:
            return "it does not say which"
        try:
            theirs = config_from_dict(metadata["config"], str(source))
        except UsageError as error:
            return error.cause(source)
        changed = differences(identity(theirs, "weights"), identity(self.config, "weights"))
        if changed:
            return ", ".join(changed)
        if "inputs" in metadata:
            same = metadata["inputs"] == fingerprint(self.inputs)
        else:
            same = metadata.get("run") == fingerprint([identity(theirs, "weights", "rounding"), *self.inputs])
        return "" if same else "other data or another --ckpt"


def previous_run(options: TrainingOptions, run: RunIdentity) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh start; refuses a folder that holds another run."""
    last = options.save_path / LAST
    if options.ckpt.resolve() in [path.resolve() for path in (last, *best_files(options.save_path))]:
        raise UsageError(f"--ckpt {options.ckpt}: lies in --save_path and would be replaced; give another --save_path")
    if not last.exists():
        if not options.overwrite:
            _refuse_to_lose_best(options.save_path, run)
        return None
    try:
        found = read_checkpoint(last)
    except MedSoftError as error:
        if options.overwrite:
            return None
        kept = best_files(options.save_path)
        start = f"--ckpt {kept[0]} and another --save_path start from the best kept weights, " if kept else ""
        raise MedSoftError(f"{error}; {start}--overwrite starts this run again") from error
    other = run.difference(found.metadata, last)
    if not other:
        return found
    if not options.overwrite:
        raise UsageError(
            f"{last}: belongs to another run ({other}); give another --save_path, or --overwrite to start again there"
        )
    return None


def _refuse_to_lose_best(folder: Path, run: RunIdentity) -> None:
    """UsageError for best weights without a ``last.ckpt``, unless this run was killed in its first epoch."""
    for path in best_files(folder):
        metadata = read_checkpoint(path).metadata
        if metadata.get("epoch") or run.difference(metadata, path):
            raise UsageError(
                f"{path}: best weights of a run whose last.ckpt is gone; --ckpt {path} and another --save_path start "
                "from them, --overwrite deletes them and starts again"
            )


# What a run will take, said before it begins.


def log_groups(net: MedSoftModel, training: TrainingConfig, source: Checkpoint) -> None:
    """What is trained, in a few lines; and a note where the published README trains something else than it says."""
    for name, members in training_groups(net, training).items():
        count = sum(parameter.numel() for parameter in members.values())
        shown = (name, len(members), count / 1e6, training.rates[name])
        log.info("trains %s: %d tensors, %.2f M parameters, learning rate %g", *shown)
    if training.stage == "stage2_1" and source.metadata.get("stage") == "stage2_1":
        log.info(
            "note: stage2_1 trains the MSC only, also for this checkpoint that it has trained before; "
            "the YAML that trains the full model is the one ending in _stage2_2.yaml"
        )


def check_disk(folder: Path, architecture: Architecture, training: TrainingConfig, items: Sequence[Item]) -> None:
    """Log what the run will write; MedSoftError where not even two checkpoints fit."""
    disk = stage_disk(architecture, training, cache_size(architecture, training.builds, items))
    free, old = free_bytes(folder), folder / LAST
    log.info(
        "disk: at most %s (last.ckpt %s, twice while it is replaced; best epochs %s; features %s); %s free",
        *map(size, (disk.total, disk.last, disk.best, disk.features, free)),
    )
    needed = 2 * disk.last - (old.stat().st_size if old.exists() else 0)
    if free < needed:
        raise MedSoftError(
            f"{folder}: {size(free)} are free, but saving takes {size(needed)} (the new checkpoint "
            "beside the old one); make room, or give a --save_path on another disk"
        )


def memory_cures(training: TrainingConfig, half: bool, begun: bool) -> str:
    """What makes a training step smaller. A run that has ``begun`` keeps its batches: other ones are another run."""
    cures = [
        *(["a smaller --batch_size with training.accumulate"] if training.batch_size > 1 and not begun else []),
        *([] if training.activation_checkpointing else ["training.activation_checkpointing=true"]),
        *([] if half else ["--precision bf16-mixed"]),
    ]
    return f"{' or '.join(cures) or 'a device with more memory'} helps"


def log_memory(architecture: Architecture, training: TrainingConfig, fabric: Fabric, half: bool, begun: bool) -> None:
    """Log what a training step needs, and warn where it will not fit."""
    device = fabric.device
    memory = stage_memory(architecture, training, training.batch_size // fabric.world_size, half, device.type)
    free = free_memory(device)
    parts = [f"{name} {size(getattr(memory, name))}" for name in memory.__dataclass_fields__ if getattr(memory, name)]
    log.info("memory on %s: about %s (%s); %s free", device.type, size(memory.total), ", ".join(parts), size(free))
    if memory.total > free:
        log.warning("warning: that is more than is free; %s", memory_cures(training, half, begun))


def size(count: int) -> str:
    """Bytes for reading: 1.5 GiB, 12.3 MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def dry_run(options: TrainingOptions, config: Config, inputs: TrainingInputs, source: Checkpoint) -> int:
    """Everything that can be said without training, including whether the checkpoint fits."""
    fabric, precision = make_fabric(options, config.training)
    net, _ = open_model(config, source, config.training.builds)
    log_groups(net, config.training, source)
    log_memory(net.architecture, config.training, fabric, precision == "bf16-mixed", begun=False)
    check_disk(options.save_path, net.architecture, config.training, inputs.all_items)
    return cli.DONE


# Training.


def make_fabric(options: TrainingOptions, training: TrainingConfig) -> tuple[Fabric, str]:
    """Lightning's Fabric for the flags, and the precision in which a step runs on its device.

    Raises UsageError for devices that are not there, or that cannot share the batch.
    """
    flags = f"--devices {options.devices} --num_nodes {options.num_nodes}"
    try:
        fabric = Fabric(accelerator="auto", devices=options.devices, num_nodes=options.num_nodes)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{flags}: {str(error).strip().splitlines()[0]}") from error
    if training.batch_size % fabric.world_size:
        raise UsageError(
            f"training.batch_size is {training.batch_size}, the batch over all devices; {fabric.world_size} devices "
            "cannot share it equally"
        )
    precision = resolve_precision(training.precision)
    if precision == "16-mixed" and fabric.device.type == "cpu":
        log.warning("warning: 16-mixed is for GPUs; the CPU trains in bf16-mixed")
        precision = "bf16-mixed"
    return fabric, precision


def _run(options: TrainingOptions, config: Config, inputs: TrainingInputs, source: Checkpoint) -> int:
    training, folder = config.training, options.save_path
    run = RunIdentity(config, [inputs.identities, sha256_file(options.ckpt)])
    previous = previous_run(options, run)
    if previous and previous.metadata.get("complete"):
        log.info("%s: already complete (%d steps)", folder, previous.metadata["step"])
        return cli.SOME_REJECTED if (folder / REJECTS).exists() else cli.DONE
    fabric, precision = make_fabric(options, training)
    half = precision == "bf16-mixed"
    previews = config.sampling if training.pictures > 0 and "unet" in training.builds else None

    torch.manual_seed(training.seed)
    net, clip = open_model(config, source, training.builds)
    theirs = source.metadata
    metadata = {
        "config": dataclasses.asdict(config),
        "stage": training.stage,
        "inputs": fingerprint(run.inputs),
        "biomedclip": clip.fingerprint,
        "origin": {"file": options.ckpt.name, "stage": theirs.get("stage"), "from": theirs.get("origin")},
    }
    log_groups(net, training, source)
    check_disk(folder, net.architecture, training, inputs.all_items)
    log_memory(net.architecture, training, fabric, half, begun=previous is not None)
    net.to(fabric.device)
    cache = options.cache_dir or folder.parent / "feature_cache"
    builder = FeatureBuilder(cache, config.data, net, clip.to(fabric.device), inputs.digests)
    inputs.leave_out(builder.build(inputs.all_items, thorough=is_first_on_node()), training.max_rejected)
    features = builder.store
    del builder, clip  # the encoders' memory is free: what the store needs is on the disk
    net.drop([part for part in net.parts if part not in STEP_PARTS and not (part == "autoencoder" and previews)])
    wanted = skeleton(net.architecture, training.builds)
    frozen = {key: value for key, value in source.state.items() if key in wanted}
    stage = Stage(training, net, frozen, features.empty_text(), half)
    if is_first_process():
        _prepare_folder(folder, config, inputs, previous)
    fabric.launch()
    checkpoints = Checkpoints(folder, stage, metadata, fabric, precision, previous)
    loop = _training(checkpoints, precision, inputs, features, previews)
    if code := _guarded(loop):
        return code
    log.info("%s: %d steps, complete", checkpoints.path, checkpoints.progress.step)
    # The launcher kills the first process when one that it started does not end with 0.
    return cli.SOME_REJECTED if inputs.rejects and fabric.is_global_zero else cli.DONE


def _prepare_folder(folder: Path, config: Config, inputs: TrainingInputs, previous: Checkpoint | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    write_text(folder / "config.yaml", as_yaml(config))
    write_rejects(folder / REJECTS, inputs.rejects)
    if previous is None:  # what another run has left must not be taken for this one's
        for old in (folder / LAST, *best_files(folder)):
            old.unlink(missing_ok=True)
    else:
        log.info("resuming after step %d", previous.metadata["step"])


def _training(
    checkpoints: Checkpoints,
    precision: str,
    inputs: TrainingInputs,
    features: FeatureStore,
    previews: SamplingConfig | None,
) -> Training:
    folder, stage, fabric = checkpoints.folder, checkpoints.stage, checkpoints.fabric
    world, rank, training = fabric.world_size, fabric.global_rank, stage.training_config
    sets = {name: StageData(items, features, training, name == "val") for name, items in inputs.items.items()}
    start = checkpoints.progress.batches * training.batch_size // world
    train_loader = loader(sets["train"], training, True, rank, world, start)
    loaders = (train_loader, loader(sets["val"], training, False, rank, world))
    records = Records(folder, training.stage, fabric.is_global_zero)
    drawn = Previews(folder, stage, previews, sets["val"], records) if previews and fabric.is_global_zero else None
    return Training(stage, fabric, precision, loaders, checkpoints, records, drawn)


def _guarded(loop: Training) -> int:
    """Run the loop; the exit code. Other processes of the run end with this one."""
    # The launcher kills the first process when one that it started does not end well.
    first = loop.fabric.is_global_zero
    try:
        loop.run()
    except cli.Terminated:
        return cli.TERMINATED if first else cli.DONE
    except BaseException as error:
        for process in getattr(loop.fabric.strategy.launcher, "procs", []):
            process.send_signal(signal.SIGKILL)  # they would wait for this one for half an hour
        if isinstance(error, KeyboardInterrupt) or loop.requests.interrupted:  # it may have failed to reach another one
            if not first:
                return cli.DONE
            raise KeyboardInterrupt from error
        if out_of_memory(error):
            cures = memory_cures(loop.config, loop.precision == "bf16-mixed", loop.checkpoints.path.exists())
            reason, step = (str(error) or type(error).__name__).splitlines()[0], loop.progress.step + 1
            raise MedSoftError(f"out of memory in step {step} ({reason}); {cures}") from error
        if isinstance(error, MedSoftError) and "\nOriginal Traceback" in str(error):  # from a data-loader process
            raise MedSoftError(str(error).strip().rsplit("\n", 1)[-1].split(": ", 1)[-1]) from error
        raise
    return cli.DONE
