"""A training run from its options to its exit code: data, features, networks, loop."""

import dataclasses
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint
from ldm.config import (
    Architecture,
    BiomedClipConfig,
    Config,
    DataConfig,
    SamplingConfig,
    TrainingConfig,
    as_yaml,
    config_from_dict,
)
from ldm.core import cli
from ldm.core.devices import is_first_process, out_of_memory, resolve_precision
from ldm.core.distributed import check_tasks, fabric_class
from ldm.core.errors import FileError, MedSoftError, UsageError, first_line
from ldm.core.files import fingerprint, remove_partials, write_text
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity
from ldm.core.tables import counted
from ldm.data.annotations import write_rejects
from ldm.data.checks import TRAINED_ON, check_unseen, groups_of, groups_of_samples, trained_on
from ldm.diffusion.noise import NOISE
from ldm.features.build import FeatureBuilder
from ldm.features.sizes import ENCODERS
from ldm.features.store import FeatureStore
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.model import MedSoftModel, skeleton
from ldm.networks.opening import check_encoder, encoder_record, identify_encoder, loaded, open_model
from ldm.training.alignment import projection_values
from ldm.training.dataset import StageData, TrainingInputs, loader, read_training_inputs
from ldm.training.estimates import check_disk, check_memory, memory_cures
from ldm.training.loop import Training
from ldm.training.previews import Previews
from ldm.training.records import Records, Trackers, check_loggers
from ldm.training.saving import LAST, Checkpoints, RunState, best_files, restarts
from ldm.training.stage import STEP_PARTS, Stage, training_groups

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger("ver_train")

T = TypeVar("T")
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

    @property
    def cache(self) -> Path:
        """Where features are kept, and what is known of the data's files."""
        return self.cache_dir or self.save_path.parent / "feature_cache"


def run_stage(options: TrainingOptions, config: Config) -> int:
    """Train the stage that ``config`` describes; the exit code."""
    check_tasks(options.devices, options.num_nodes)
    check_loggers(config.training.loggers)
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)  # one voice is enough
    log.info("%s", as_yaml(config))
    if config.sampling.init != "noise" and config.training.pictures > 0:
        log.warning("warning: sampling.init=%s is not for previews; they begin with noise", config.sampling.init)
    inputs = read_training_inputs({"train": options.train_json, "val": options.val_json}, config, options.cache)
    source = read_checkpoint(options.ckpt)
    seen = groups_of(source.metadata, source.path)
    check_unseen(f"--val_json {options.val_json}", inputs.samples("val"), seen, source.path)
    behind = groups_of_samples("--train_json", inputs.samples("train"))
    check_unseen(f"--val_json {options.val_json}", inputs.samples("val"), behind, options.train_json)
    patients = (sample.patient_id for sample in inputs.samples("train"))
    inputs.trained_on = trained_on(config.training.stage, patients, seen, behind)
    if options.dry_run:
        fabric, precision = make_fabric(options, config.training)
        check_needs(options.save_path, config.architecture, config.training, inputs, fabric, precision)
        open_encoders(config, source)
        log_groups(config.architecture, config.training, source)
        return cli.DONE
    folder = TrainingFolder(options.save_path)
    with folder.lock(first=is_first_process()):
        return _run(folder, options, config, inputs, source)


# What makes two runs the same, and what is done where they are not.


class TrainingFolder(RunFolder):
    """The folder of a run. Its record is what ``last.ckpt`` says about itself, so that the two cannot disagree."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LAST, what="checkpoints", shared=True, flag="--save_path")

    def read_record(self, overwrite: bool = False) -> dict[str, Any] | None:
        """What ``last.ckpt`` says, with the Checkpoint itself as ``checkpoint``; without it, the newest best weights.

        Those are of this same run if it was killed in its first epoch, else ``fault`` says that the file is gone.
        """
        best = best_files(self.path)
        if folders := [each for each in (self.record, *best) if each.is_dir()]:
            raise UsageError(f"{folders[0]}: is a folder, which no training writes; give another --save_path")
        file = self.record if self.record.exists() else max(best, key=lambda path: path.name, default=None)
        if file is None:
            return None
        cures = restarts(self.path)
        try:
            found = read_checkpoint(file)
        except MedSoftError as error:
            if overwrite:
                return {}
            raise MedSoftError(f"{error}; {', '.join(cures)}") from error
        metadata = found.metadata
        if file != self.record and metadata.get("epoch"):
            return {"fault": f"its {LAST} is gone; {cures[0]}"}
        if not {"inputs", "config"} <= metadata.keys():
            return {"fault": "it does not say which, as in files of older versions"}
        try:
            theirs = config_from_dict(metadata["config"], str(file))
            settings = run_settings(theirs, metadata["inputs"], metadata.get("noise", 1))
        except UsageError as error:
            return {"fault": error.cause(file)}
        checkpoint = found if file == self.record else None
        return {"run": fingerprint(settings), "settings": settings, "checkpoint": checkpoint}

    def difference(self, stored: Mapping[str, Any]) -> str:
        """What sets the run of this record apart from the one given to ``open``, for a message."""
        return stored.get("fault") or super().difference(stored)

    def _work(self) -> list[Path]:
        return [path for path in (self.record, *best_files(self.path)) if path.exists()]

    def of_use(self, overwrite: bool, checked: Callable[[], T]) -> T | None:
        """What of the file to go on from was ``checked``; None where it raised and may be overwritten: a new start."""
        try:
            return checked()
        except MedSoftError as error:
            if not overwrite:
                raise
            log.warning("warning: %s; --overwrite: the run starts again", error)
            self.same_run = False
            return None

    def claim(self, sweep: bool = True, **values: Any) -> None:
        """Make the folder this run's: another run's weights and previews go, and partials of runs that were killed.

        ``Checkpoints`` writes the record.
        """
        for path in [] if self.same_run else [*self._work(), *self.path.glob("pictures/epoch_*.png")]:
            path.unlink()
        if sweep:
            remove_partials(self.path)
        self.same_run = True


def run_settings(config: Config, inputs: str, noise: int = NOISE) -> dict[str, Any]:
    """All that decides what a run trains; what only changes the rounding does not. ``inputs``: a fingerprint."""
    return {**identity(config, "weights"), "data or --ckpt": inputs, "noise": noise}


# What a run will take, said before it begins.


def check_needs(
    folder: Path,
    architecture: Architecture,
    training: TrainingConfig,
    inputs: TrainingInputs,
    fabric: "Fabric",
    precision: str,
    begun: bool = False,
) -> None:
    """Log what training into ``folder`` takes of disk and memory, with a warning for what may not suffice.

    ``begun``: the run goes on, so that what decides its weights cannot be made smaller. MedSoftError where it could not
    even save, or where a step would not fit on the device.
    """
    half = precision == "bf16-mixed"
    for lack in (
        check_disk(folder, architecture, training, inputs.all_items),
        check_memory(architecture, training, fabric.world_size, fabric.device, half, begun),
    ):
        if lack:
            log.warning("warning: %s", lack)


def open_encoders(config: Config, source: Checkpoint) -> tuple[MedSoftModel, ImageTextEncoder]:
    """The networks that make features; raises as ``open_model`` unless all that the stage builds fits too."""
    builds = config.training.builds
    return open_model(config, source, [part for part in builds if part in ENCODERS], builds)


def log_groups(architecture: Architecture, training: TrainingConfig, source: Checkpoint) -> None:
    """What is trained, in a few lines; and a note where the published README trains something else than it says."""
    with torch.device("meta"):
        net = MedSoftModel(architecture, training.builds)
    groups = training_groups(net, training)
    for name, rate in training.rates.items():
        count = sum(parameter.numel() for parameter in groups[name].values())
        shown = (name, counted(len(groups[name]), "tensor"), count / 1e6, rate)
        log.info("trains %s: %s, %.2f M parameters, learning rate %g", *shown)
    if training.alignment_weight:
        millions = projection_values(architecture) / 1e6
        log.info("and a projection of the middle block, %.2f M parameters, that no finished checkpoint holds", millions)
    if training.stage == "stage2_1" and source.metadata.get("stage") == "stage2_1":
        log.info(
            "note: stage2_1 trains the MSC only, also for this checkpoint that it has trained before; "
            "the YAML that trains the full model is the one ending in _stage2_2.yaml"
        )


# Training.


def make_fabric(options: TrainingOptions, training: TrainingConfig) -> tuple["Fabric", str]:
    """Lightning's Fabric for the flags, and the precision in which a step runs on its device.

    Raises UsageError for devices that are not there, or that cannot share the batch.
    """
    flags = f"--devices {options.devices} --num_nodes {options.num_nodes}"
    try:
        fabric = fabric_class()(accelerator="auto", devices=options.devices, num_nodes=options.num_nodes)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{flags}: {first_line(error)}") from error
    if training.batch_size % fabric.world_size:
        raise UsageError(
            f"training.batch_size is {training.batch_size}, the batch over all devices; {fabric.world_size} devices "
            "cannot share it equally"
        )
    precision = resolve_precision(training.precision)
    if precision == "16-mixed" and fabric.device.type == "cpu":
        log.warning("warning: 16-mixed is for GPUs; the CPU trains in bf16-mixed")
        precision = "bf16-mixed"
    if training.strategy == "fsdp" and precision == "16-mixed":
        raise UsageError("training.strategy=fsdp: trains in bf16-mixed or 32-true, found training.precision=16-mixed")
    return fabric, precision


def _run(
    folder: TrainingFolder, options: TrainingOptions, config: Config, inputs: TrainingInputs, source: Checkpoint
) -> int:
    training = config.training
    if options.ckpt.resolve() in [path.resolve() for path in (folder.record, *best_files(folder.path))]:
        raise UsageError(f"--ckpt {options.ckpt}: lies in --save_path and would be replaced; give another --save_path")
    content = fingerprint([inputs.identities, source.sha256()])
    found = folder.open(run_settings(config, content), options.overwrite)
    previous = found["checkpoint"] if found else None
    if previous and previous.metadata.get("complete"):
        check = partial(_complete, previous, inputs, config.biomedclip, options.overwrite)
        previous = folder.of_use(options.overwrite, check)
        if previous:
            log.info("%s: already complete (%s)", folder.path, counted(previous.step or 0, "step"))
            return cli.SOME_REJECTED if (folder.path / REJECTS).exists() else cli.DONE
    fabric, precision = make_fabric(options, training)
    torch.manual_seed(training.seed)
    check_needs(folder.path, config.architecture, training, inputs, fabric, precision, begun=previous is not None)
    encoders = open_encoders(config, source)
    if previous:
        previous = folder.of_use(options.overwrite, partial(check_encoder, encoders[1], previous))
    log_groups(config.architecture, training, source)
    metadata = {"config": dataclasses.asdict(config), "stage": training.stage, "inputs": content}
    metadata |= _provenance(inputs, source, encoders[1])
    features = _features(options.cache, config.data, training, inputs, encoders, fabric.device)
    del encoders  # their memory is free before the networks of a step take theirs
    stage = _stage(config.architecture, training, source, features, fabric.device, precision)
    batches = len(loader(StageData(inputs.items["train"], features, training, fixed=False), training, shuffle=True))
    state = folder.of_use(options.overwrite, partial(RunState.of, previous, stage, batches)) if previous else None
    if is_first_process():
        folder.claim()
        write_text(folder.path / "config.yaml", as_yaml(config))
        write_rejects(folder.path / REJECTS, inputs.rejects)
        if state:
            log.info("resuming after step %d", state.progress.step)
    fabric.launch()
    stage.share_out(fabric.world_size)
    checkpoints = Checkpoints(folder.path, stage, metadata, fabric, precision, state, source)
    del found, previous, state  # as long as its tensors are mapped, the disk keeps the file that is replaced
    if code := _guarded(_training(checkpoints, precision, inputs, features, config.sampling)):
        return code
    log.info("%s: %s, complete", checkpoints.path, counted(checkpoints.progress.step, "step"))
    # The launcher kills the first process when one that it started does not end with 0.
    return cli.SOME_REJECTED if inputs.rejects and fabric.is_global_zero else cli.DONE


def _provenance(inputs: TrainingInputs, source: Checkpoint, encoder: ImageTextEncoder) -> dict[str, Any]:
    """What a checkpoint of the run says of what it is made from."""
    theirs = source.metadata
    return {
        **encoder_record(encoder),
        TRAINED_ON: inputs.trained_on,
        "noise": NOISE,
        "origin": {"file": source.path.name, "stage": theirs.get("stage"), "from": theirs.get("origin")},
    }


def _features(
    cache: Path,
    data: DataConfig,
    training: TrainingConfig,
    inputs: TrainingInputs,
    encoders: tuple[MedSoftModel, ImageTextEncoder],
    device: torch.device,
) -> FeatureStore:
    """The features of all items; samples that cannot be read any more leave ``inputs``."""
    inputs.known.write()
    model, encoder = encoders[0].to(device), encoders[1].to(device)
    builder = FeatureBuilder(cache, data, model, encoder, inputs.digests, training.feature_batch)
    inputs.leave_out(builder.build(inputs.all_items), training.max_rejected)
    return builder.store


def _stage(
    architecture: Architecture,
    training: TrainingConfig,
    source: Checkpoint,
    features: FeatureStore,
    device: torch.device,
    precision: str,
) -> Stage:
    """What a step runs, and for previews the autoencoder, on ``device`` with the weights of ``source``."""
    kept = [*STEP_PARTS, *(["autoencoder"] if training.previews else [])]
    net = loaded(architecture, source, [part for part in training.builds if part in kept])
    net.to(device)
    wanted = skeleton(architecture, training.builds)
    frozen = {key: value for key, value in source.state.items() if key in wanted}
    return Stage(training, net, frozen, features.empty_text(), half_frozen=precision == "bf16-mixed")


def _complete(previous: Checkpoint, inputs: TrainingInputs, encoder: BiomedClipConfig, overwrite: bool) -> Checkpoint:
    """The ``last.ckpt`` of a run that has ended; MedSoftError if the encoder is another one than it was trained with.

    With ``overwrite`` also if it knows its patients by other ids, of which it is only warned else.
    """
    check_encoder(identify_encoder(encoder), previous)
    if previous.metadata.get(TRAINED_ON, inputs.trained_on) != inputs.trained_on:
        text = "knows its patients by other ids than the data have now: later checks will not find them"
        if overwrite:
            raise FileError(previous.path, text)
        log.warning("warning: %s %s; --overwrite trains it again, under the new ones", previous.path, text)
    return previous


def _training(
    checkpoints: Checkpoints,
    precision: str,
    inputs: TrainingInputs,
    features: FeatureStore,
    sampling: SamplingConfig,
) -> Training:
    folder, stage, fabric = checkpoints.folder, checkpoints.stage, checkpoints.fabric
    world, rank, training = fabric.world_size, fabric.global_rank, stage.training_config
    sets = {name: StageData(items, features, training, name == "val") for name, items in inputs.items.items()}
    start = checkpoints.progress.batches * training.batch_size // world
    train_loader = loader(sets["train"], training, True, rank, world, start)
    loaders = (train_loader, loader(sets["val"], training, False, rank, world))
    trackers = Trackers(training.loggers, folder, checkpoints.metadata)
    records = Records(folder, training.stage, fabric.is_global_zero, trackers)
    draws = training.previews and (stage.sharded or fabric.is_global_zero)  # parts of the weights draw nothing
    shown = Previews(folder, stage, sampling, sets["val"], records) if draws else None
    return Training(stage, fabric, precision, loaders, checkpoints, records, shown)


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
            step = loop.progress.step + 1
            raise MedSoftError(f"out of memory in step {step} ({first_line(error)}); {cures}") from error
        if isinstance(error, MedSoftError) and "\nOriginal Traceback" in str(error):  # from a data-loader process
            raise MedSoftError(str(error).strip().rsplit("\n", 1)[-1].split(": ", 1)[-1]) from error
        raise
    return cli.DONE
