"""Lesions inpainted over a dataset: each result a whole sample folder or nothing; shared by processes, continued after
a stop."""

import dataclasses
import functools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import Config, SamplingConfig, load_config
from ldm.core import cli
from ldm.core.devices import is_first_process, out_of_memory
from ldm.core.distributed import Processes, check_tasks, start_processes
from ldm.core.errors import MedSoftError, UsageError, first_line
from ldm.core.files import content_id, fingerprint, read_json, sha256_file
from ldm.core.paths import shipped
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity, stored_overrides
from ldm.data.annotations import write_rejects
from ldm.data.checks import TRAINED_ON, groups_of
from ldm.data.preparation import PreparedSample, described_identity, lesion_diameter, sample_identity
from ldm.data.samples import Reject
from ldm.diffusion.noise import NOISE
from ldm.inference.gallery import write_gallery
from ldm.inference.inpainter import InpaintedImage, Inpainter, Job, load_inpainter
from ldm.inference.options import InferenceOptions
from ldm.inference.results import FILES, write_result
from ldm.inference.tasks import Task, plan_tasks, prepare_task, read_record

log = logging.getLogger(__name__)

RECORD = "inference.json"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}, {remaining} left, {rate_noinv_fmt}]"
Content = Callable[[Path | None], str | None]  # a file's SHA-256


def run(options: InferenceOptions) -> int:
    """Inpaint what is missing in ``options.output_dir``; the exit code.

    Raises UsageError or MedSoftError, with the folder as it was, for options, a checkpoint or data that cannot be used.
    """
    options.check()
    check_tasks(options.devices, options.num_nodes)
    record = read_record(options.replay) if options.replay else None
    options, config, overrides = resolve(options, record)
    assert options.ckpt  # the options were checked
    assert options.config
    if not is_first_process():
        logging.disable(logging.INFO)  # one process speaks for all
    metadata = read_checkpoint(options.ckpt).metadata
    settings = identity(config, "images")
    digest = sha256_file(options.ckpt)
    provenance = {
        "checkpoint": str(options.ckpt.resolve()),
        "checkpoint_sha256": digest,
        "config": str(shipped(options.config).resolve()),
        "overrides": overrides,
        "config_sha256": fingerprint(settings),
        "exact": options.exact,
        "noise": NOISE,
        "command": shlex.join(["python", *sys.argv]),
        TRAINED_ON: groups_of(metadata, options.ckpt),
    }
    if record:
        _check_replay(options, record, provenance)
    content: Content = functools.cache(content_id)  # each file is read once, however many results share it
    tasks, rejects = plan_tasks(options, content, record)
    for image in {task.sample.image for task in tasks}:
        if image.resolve().is_relative_to(options.output_dir.resolve()):
            raise UsageError(
                f"--output_dir {options.output_dir}: holds {image}, which is to be inpainted; give another"
            )
    own = ("rejects.json", "report.html", "report_files")
    results = RunFolder(options.output_dir, RECORD, own=own, samples="*__v*/meta.json")
    with results.lock(first=is_first_process()):
        plan = [_identity(task, content) for task in tasks]
        flags = {name: getattr(options, name) for name in ("exact", "seed", "prompt", "match", "variants")}
        known = {"ckpt": digest, **flags, "images": fingerprint(plan)}  # what differs is named in this order
        before = results.open({**known, **settings, "noise": NOISE}, options.overwrite)
        there = sum(results.has(task.name, *FILES) for task in tasks)
        known_rejects = len(set(rejects)) <= (before or {}).get("rejected", 0)  # else the record is written anew
        if before and before.get("complete") and there == before["pictures"] and known_rejects:
            log.info("%s: already complete (%d images)", results.path, before["pictures"])
            return cli.SOME_REJECTED if before["rejected"] else cli.DONE
        processes = start_processes(options.device, options.devices, options.num_nodes)
        processes.barrier()
        if options.exact:
            torch.set_num_threads(1)
        return InferenceRun(results, tasks, rejects, config, provenance, content, processes).inpaint(options.ckpt)


def resolve(options: InferenceOptions, record: dict[str, Any] | None) -> tuple[InferenceOptions, Config, list[str]]:
    """The options with checkpoint and configuration file, the configuration, and the overrides behind it.

    The configuration is the YAML, then flags, then dotted overrides. With --replay everything comes from ``record``,
    the result's meta.json, and from the record of its run, if it still lies in that folder; --ckpt, --config and
    --biomedclip say where these files are by now.
    """
    overrides = options.as_overrides()
    if record and options.replay:
        folder = options.replay.resolve().parent  # from which relative paths are seen
        options = dataclasses.replace(
            options,
            ckpt=options.ckpt or folder / record["checkpoint"],
            config=options.config or folder / record["config"],
            exact=record["exact"],
        )
        same_image = ["sampling.batch_size=1", "sampling.compile=false"]
        overrides = [*_stored_settings(folder), *record["overrides"], *same_image, *overrides]
    assert options.config  # the options were checked
    return options, load_config(options.config, overrides), overrides


def _stored_settings(result: Path) -> list[str]:
    """The settings of the run whose folder holds ``result``, as overrides: the YAML may have other defaults by now.

    A key that the run's record does not know has the value that every run had before there was this key. Nothing for a
    result that was copied without its run's record.
    """
    folder = next((each for each in result.parents if (each / RECORD).is_file()), None)
    stored = (RunFolder(folder, RECORD).read_record() if folder else None) or {}
    return stored_overrides(Config, stored.get("settings") or {})


def _check_replay(options: InferenceOptions, record: dict[str, Any], provenance: dict[str, Any]) -> None:
    """MedSoftError unless checkpoint and settings are those the result was made with."""
    if record.get("noise", 1) != NOISE:
        raise MedSoftError(f"{options.replay}: was made with the noise of another version, which alone makes it again")
    for flag, key in (("ckpt", "checkpoint_sha256"), ("config", "config_sha256")):
        if provenance[key] != record[key]:
            path = getattr(options, flag)
            raise MedSoftError(f"{path}: is not, or no longer, what {options.replay} was made with; see --{flag}")


def _identity(task: Task, content: Content) -> tuple:
    own = (described_identity(task.sample, content), task.variant, task.prompt, task.seed, task.fixed_mask)
    if task.source is None:
        return own
    source = () if task.fixed_mask else (sample_identity(task.source, content),)
    return (*own, *source, task.source.lesion_type, task.source.severity)


@dataclasses.dataclass(frozen=True)
class InferenceRun:
    """The processes of one run at work on its tasks; results that are there already stay as they are."""

    results: RunFolder
    tasks: Sequence[Task]
    rejects: Sequence[Reject]  # samples that gave no task
    config: Config
    provenance: dict[str, Any]  # see ``write_result``
    content: Content
    processes: Processes

    def inpaint(self, ckpt: Path) -> int:
        """Inpaint what is missing; returns the exit code. The model is loaded only if something is missing.

        A model that cannot be loaded leaves the folder as it was. Each process does its share, and the first one keeps
        the record.
        """
        start = time.monotonic()
        # The numbers of the tasks whose results are not there, as the first process sees the folder.
        there = {task.name for task in self.tasks if self.results.same_run and self.results.has(task.name, *FILES)}
        missing = self.processes.share([k for k, task in enumerate(self.tasks) if task.name not in there])
        if len(missing) < len(self.tasks):
            log.info("%d of %d images are there already", len(self.tasks) - len(missing), len(self.tasks))
        with advice_on_memory(self.config.sampling):
            inpainter = load_inpainter(ckpt, self.config, self.processes.device) if missing else None
        self.processes.barrier()  # all models are loaded: now the folder may change
        if self.processes.rank == 0:
            self.results.claim(command=self.provenance["command"])
        self.processes.barrier()
        mine = [self.tasks[k] for k in missing[self.processes.rank :: self.processes.size]]
        rejects: list[Reject] = []
        error: MedSoftError | None = None
        try:
            with advice_on_memory(self.config.sampling):
                rejects = self._inpaint_all(mine, inpainter) if inpainter else []
        except MedSoftError as caught:
            error = caught
        outcomes = self.processes.gather((rejects, error))
        code = cli.DONE
        try:
            if self.processes.rank == 0:  # it speaks for all of them
                code = self._finish(outcomes, start)
        finally:
            code = self.processes.share(code)
        return code

    def _inpaint_all(self, tasks: Sequence[Task], inpainter: Inpainter) -> list[Reject]:
        """Inpaint batch by batch; the next one is read and the last one written while the model works."""
        size = self.config.sampling.batch_size
        batches = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        rejects: list[Reject] = []
        label = f"inpainting (process 1 of {self.processes.size})" if self.processes.size > 1 else "inpainting"
        sources = {task.source.image: task.source for task in tasks if task.source}
        diameter = functools.cache(lambda image: lesion_diameter(sources[image]))  # many results share a source
        with (
            ThreadPoolExecutor(4) as pool,
            tqdm(total=len(tasks), desc=label, mininterval=1, bar_format=BAR, disable=self.processes.rank > 0) as bar,
        ):
            before: tuple[list[Reject], list[Future]] = ([], [])  # of the last batch: its rejects, and what is written
            for batch, prepared in _ahead(pool, lambda task: prepare_task(task, self.config.data, diameter), batches):
                pairs = list(zip(batch, prepared, strict=True))
                sound = [(task, sample) for task, sample in pairs if isinstance(sample, PreparedSample)]
                jobs = [Job(task.seed, task.sample.sample_id, task.variant, task.prompt) for task, _ in sound]
                begun = inpainter.begin([sample for _, sample in sound], jobs) if sound else []
                rejects += _collected(*before)
                writing = [pool.submit(self._write, *one, finish) for one, finish in zip(sound, begun, strict=True)]
                before = [sample for _, sample in pairs if isinstance(sample, Reject)], writing
                bar.update(len(batch))
            rejects += _collected(*before)
        return rejects

    def _write(self, task: Task, sample: PreparedSample, finish: Callable[[], InpaintedImage]) -> Reject | None:
        """Write the result that ``finish`` makes, or say why there is none. Runs in another thread."""
        result = finish()
        if result.pixels is None:
            return _not_finite(task, result.error)
        about = self.provenance, self.content(task.sample.image)
        write_result(self.results.path, task, sample, result.pixels, *about)
        return None

    def _finish(self, outcomes: Sequence[tuple[list[Reject], MedSoftError | None]], start: float) -> int:
        """Write the list of rejects, the record and the report; returns the exit code, or raises a process's error."""
        for _, error in outcomes:
            if error is not None:
                raise error
        folder = self.results.path
        rejects = list(dict.fromkeys([*self.rejects, *(reject for own, _ in outcomes for reject in own)]))
        reject_file = folder / "rejects.json"
        write_rejects(reject_file, rejects)
        for reject in rejects[:5]:
            log.warning("not inpainted: %s", reject)
        if rejects:
            log.warning("%d samples were not inpainted; all of them are in %s", len(rejects), reject_file)
        done = [task for task in self.tasks if self.results.has(task.name, *FILES)]
        if not done:
            raise MedSoftError(f"{folder}: no image could be inpainted; first: {rejects[0]}; all are in {reject_file}")
        changed = sum(read_json(folder / task.name / "meta.json")["changed_outside_pixels"] for task in done)
        self.results.finish(
            command=self.provenance["command"],
            pictures=len(done),
            rejected=len(rejects),
            changed_outside_pixels=changed,
            seconds=round(time.monotonic() - start, 1),
            checkpoint_sha256=self.provenance["checkpoint_sha256"],
        )
        log.info("%s: %d images, %d pixels changed outside the soft masks", folder, len(done), changed)
        try:
            log.info("%s shows them", write_gallery(folder))
        except MedSoftError as error:  # the results are there all the same
            log.warning("warning: no report: %s", error)
        return cli.SOME_REJECTED if rejects else cli.DONE


def _not_finite(task: Task, error: str | None) -> Reject:
    reason = (
        f"variant {task.variant}: values that are not numbers (NaN or infinity) appeared {error}; nothing was written"
    )
    return Reject(task.sample.sample_id, task.sample.image, reason)


@contextmanager
def advice_on_memory(sampling: SamplingConfig) -> Iterator[None]:
    """MedSoftError that names flags which need less memory, where the block runs out of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        cures = [
            *(["a smaller --batch_size"] if sampling.batch_size > 1 else []),
            *(["--precision bf16-true"] if sampling.precision == "32-true" else []),
        ]
        raise MedSoftError(
            f"out of memory with batches of {sampling.batch_size} in {sampling.precision} ({first_line(error)}); "
            f"{' or '.join(cures) or 'a smaller model'} needs less; finished images are kept"
        ) from error


def _collected(rejects: list[Reject], written: Sequence[Future]) -> list[Reject]:
    """``rejects`` and those of the results being ``written``, once all of these are on the disk."""
    return [*rejects, *(reject for future in written if (reject := future.result()))]


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[Task], Any], batches: Sequence[Sequence[Task]]
) -> Iterator[tuple[Sequence[Task], list[Any]]]:
    """Each batch with what ``prepare`` made of it; the next batch is prepared while the caller works on this one."""
    coming = [pool.submit(prepare, task) for task in batches[0]] if batches else []
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        current, coming = coming, [pool.submit(prepare, task) for task in after]
        yield batch, [future.result() for future in current]
