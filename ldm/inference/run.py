"""Lesions inpainted over a dataset: each result whole or not there; shared by processes and by commands, continued
after a stop."""

import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import Config, DataConfig, SamplingConfig, load_config
from ldm.core import cli
from ldm.core.devices import is_first_process, out_of_memory
from ldm.core.distributed import Processes, check_tasks, start_processes
from ldm.core.errors import MedSoftError, UsageError, first_line, warn_of_first
from ldm.core.files import Contents, fingerprint_all, read_json, write_json
from ldm.core.paths import shipped
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity, stored_overrides
from ldm.core.tables import counted
from ldm.data.annotations import write_rejects
from ldm.data.checks import TRAINED_ON, trained_on
from ldm.data.images import to_unit
from ldm.data.preparation import PreparedSample, described_identity, sample_identity
from ldm.data.samples import Reject
from ldm.diffusion.noise import NOISE
from ldm.inference.drawing import BatchMaker, Check, Checks, Drawing
from ldm.inference.gallery import CHECK
from ldm.inference.inpainter import InpaintedImage, Inpainter, Job, load_inpainter
from ldm.inference.options import InferenceOptions, PasteOptions
from ldm.inference.preparing import Preparation
from ldm.inference.prompts import Match
from ldm.inference.results import REFUSED, REJECTED, FolderResults, provenance_of
from ldm.inference.shares import RECORDS, Share, SharedRun, Summary
from ldm.inference.tars import INDEXES, TARS, UNPACKED, TarResults
from ldm.inference.tasks import Plan, Task, plan_tasks, read_record

log = logging.getLogger(__name__)

RECORD = "inference.json"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}, {remaining} left, {rate_noinv_fmt}]"
OWN = ("rejects.json", CHECK, REFUSED, "report.html", "report_files", RECORDS, UNPACKED, *INDEXES, *TARS)  # of any run
KNOWN = ("command", "checkpoint_sha256", "method")  # of a result's record also the run's


def run(options: InferenceOptions, checks: Checks | None = None) -> int:
    """Inpaint what is missing in ``options.output_dir``, of which ``checks`` keep what they accept; the exit code.

    Raises UsageError or MedSoftError, with the folder as it was, for options, a checkpoint or data that cannot be used.
    """
    options.validate()
    check_tasks(options.devices, options.num_nodes)
    record = read_record(options.replay) if options.replay else None
    options, config, overrides = resolve(options, record)
    assert options.ckpt  # the options were checked
    assert options.config
    if not is_first_process():
        logging.disable(logging.INFO)  # one process speaks for all
    settings = identity(config, "images")
    opened = [read_checkpoint(options.ckpt)]  # given away when it is loaded: its tensors may lie in memory
    provenance = provenance_of(opened[0], shipped(options.config), settings, overrides, options.exact)
    digest, learned_from = provenance["checkpoint_sha256"], provenance[TRAINED_ON]
    if config.sampling.init != "noise":
        provenance |= {"init": config.sampling.init, "strength": config.sampling.strength}
    if record:
        _check_replay(options, record, provenance)
    content = Contents()  # each file is read once, however many results share it
    plan = plan_tasks(options, content, record, config.sampling.init == "paste")
    if config.sampling.init == "paste":
        provenance[TRAINED_ON] = trained_on("paste", plan.givers, provenance[TRAINED_ON])
    if options.like:
        _warn_of_other_sampling(plan.tasks, config.sampling)
    known = {"ckpt": digest}  # what differs is named in this order
    known |= {name: getattr(options, name) for name in ("exact", "seed", "prompt")}
    known |= {"match": str(Match.read(options.match)), "variants": options.variants}

    def load(device: str) -> Inpainter:
        return load_inpainter(opened.pop(), config, device)

    method = Method(config, provenance, known | settings, load)
    if checks:
        lesions, left_out = checks.training_lesions(learned_from, options.ckpt)
        method.settings["check"] = checks.settings(lesions)
        start = partial(checks.start, lesions, left_out, data=config.data)
        method = dataclasses.replace(method, tries=checks.tries, check=lambda drawer: start(encoder=drawer.encoder))
    return make_images(options, method, plan, content)


@dataclasses.dataclass(frozen=True)
class Method:
    """How the images of a run are made.

    config: of its ``data`` and ``sampling``; provenance: see ``result_of``; settings: what decides the images beside
    the samples, by name; load: makes, on a device, what makes the images; paste: see ``Preparation``; check: makes,
    of what ``load`` has made, a judge of its images, which are then drawn up to ``tries`` times.
    """

    config: Config
    provenance: dict[str, Any]
    settings: dict[str, Any]
    load: Callable[[str], BatchMaker]
    paste: str = "paste"
    check: Callable[[Any], Check] | None = None
    tries: int = 1


def make_images(options: InferenceOptions, method: Method, plan: Plan, content: Contents) -> int:
    """Make what is missing of ``plan`` in ``options.output_dir``; the exit code.

    Of the options it reads where results go and how the work is divided; what to make is in ``plan``.
    """
    for image in {task.sample.image for task in plan.tasks}:
        if image.resolve().is_relative_to(options.output_dir.resolve()):
            raise UsageError(
                f"--output_dir {options.output_dir}: holds {image}, which is to be inpainted; give another"
            )
    share, path = options.share or Share(), options.output_dir
    folder = SharedRun(RunFolder(path, RECORD, own=OWN, samples="*__v*/meta.json"), share)
    results = TarResults(path, share) if options.format == "tar" else FolderResults(path)
    with folder.lock(first=is_first_process()):
        content.read(file for task in plan.tasks for each in task.inputs for file in each.files)
        images = fingerprint_all(_identity(task, content) for task in plan.tasks)
        known = {"images": images} if share.alone else {"shares": share.count, "plan": plan.whole}
        known |= {"format": options.format} if options.format != "folder" else {}
        known |= {"masks": plan.masks} if plan.masks != "blob" else {}
        before = folder.open({**method.settings, **known, "noise": NOISE}, images, options.overwrite)
        started = InferenceRun(folder, results, plan, method, content)
        if before and started.is_complete(before):
            return started.finish_complete(before)
        processes = start_processes(options.device, options.devices, options.num_nodes)
        processes.barrier()
        if options.exact:
            torch.set_num_threads(1)
        return started.inpaint(processes)


class Paster:
    """In the place of an ``Inpainter``: the image is the one with the pasted lesion."""

    def begin(self, samples: Sequence[PreparedSample], jobs: Sequence[Job]) -> list[Callable[[], InpaintedImage]]:
        """See ``Inpainter.begin``."""
        return [partial(_pasted, sample) for sample in samples]


def _pasted(sample: PreparedSample) -> InpaintedImage:
    assert sample.pasted is not None  # every task of the plan has a donor
    return InpaintedImage(sample.pasted, to_unit(sample.pasted, sample.intensity_range))


def copy_paste(options: PasteOptions) -> int:
    """Paste what is missing in ``options.output_dir``; the exit code.

    Masks have the soft border of the shipped configurations. The results carry digests of the patients whose lesions
    may be pasted, as those of a generator that was trained on them do.
    """
    inference, content = options.as_inference(), Contents()
    plan = plan_tasks(inference, content, paste=True)
    provenance = {
        "method": options.method,
        "noise": NOISE,
        "command": shlex.join(["python", *sys.argv]),
        TRAINED_ON: trained_on("copy_paste", plan.givers),
    }
    settings = {name: getattr(options, name) for name in ("method", "seed", "variants")}
    settings |= {"match": str(Match.read(options.match))}
    config = Config(data=DataConfig(image_size=64))  # nobody looks at the model's square
    method = Method(config, provenance, settings, lambda device: Paster(), options.method)
    return make_images(inference, method, plan, content)


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
    return options, load_config(options.config, overrides, options.spelled()), overrides


def _stored_settings(result: Path) -> list[str]:
    """The settings of the run whose folder holds ``result``, as overrides: the YAML may have other defaults by now.

    A key that the run's record does not know has the value that every run had before there was this key. Nothing for a
    result that was copied without its run's record.
    """
    folder = _run_folder(result)
    stored = (RunFolder(folder, RECORD).read_record() if folder else None) or {}
    return stored_overrides(Config, stored.get("settings") or {})


def _run_folder(result: Path) -> Path | None:
    """The folder with the record of the run that made ``result``, if it is still there."""
    return next((each for each in result.parents if (each / RECORD).is_file()), None)


def _warn_of_other_sampling(tasks: Sequence[Task], sampling: SamplingConfig) -> None:
    """--like: one warning line for each earlier run that sampled otherwise than ``sampling`` says.

    Nothing is known of results that were copied without their run's record.
    """
    now = stored_overrides(Config, {"sampling": dataclasses.asdict(sampling)})
    places = {task.sample.mask.parent.parent: task.sample.mask.parent for task in tasks if task.sample.mask}
    for folder in sorted({run for result in places.values() if (run := _run_folder(result))}):
        stored = (RunFolder(folder, RECORD).read_record() or {}).get("settings") or {}
        then = stored_overrides(Config, {"sampling": stored.get("sampling")})
        others = [each.replace('"', "") for each in then if each not in now]
        if others:
            text = "warning: %s: was sampled with other settings than now; to sample as then, give %s"
            log.warning(text, folder, shlex.join(others))


def _check_replay(options: InferenceOptions, record: dict[str, Any], provenance: dict[str, Any]) -> None:
    """MedSoftError unless checkpoint and settings are those the result was made with."""
    if record.get("noise", 1) != NOISE:
        raise MedSoftError(f"{options.replay}: was made with the noise of another version, which alone makes it again")
    for flag, key in (("ckpt", "checkpoint_sha256"), ("config", "config_sha256")):
        if provenance[key] != record[key]:
            path = getattr(options, flag)
            raise MedSoftError(f"{path}: is not, or no longer, what {options.replay} was made with; see --{flag}")


def _identity(task: Task, content: Contents) -> tuple:
    own: tuple = (described_identity(task.sample, content), task.variant, task.prompt, task.seed, task.fixed_mask)
    if task.fixed_mask and task.donor is not None:
        own = (*own, sample_identity(task.donor, content), task.pasted_by)
    if task.source is None:
        return own
    source = () if task.fixed_mask else (sample_identity(task.source, content),)
    return (*own, *source, task.source.lesion_type, task.source.severity)


@dataclasses.dataclass(frozen=True)
class InferenceRun:
    """One command's share of a run; results that are there already stay as they are."""

    folder: SharedRun
    results: FolderResults | TarResults
    plan: Plan
    method: Method
    content: Contents

    def is_complete(self, before: dict[str, Any]) -> bool:
        """Whether all is there that the record ``before`` says is done, with no reject that it does not know."""
        if not before.get("complete") or len(set(self.plan.rejects)) > before["rejected"]:
            return False
        return before["pictures"] == self.results.count(self.plan.tasks)

    def finish_complete(self, before: dict[str, Any]) -> int:
        """The exit code where all images are there; the last share may have been killed before it published them."""
        log.info("%s: already complete (%s)", self.folder, counted(before["pictures"], "image"))
        if self.folder.is_shared:
            return self._finish(Summary.from_json(before))
        return cli.SOME_REJECTED if before["rejected"] else cli.DONE

    def inpaint(self, processes: Processes) -> int:
        """Inpaint what is missing; returns the exit code. The model is loaded only if something is missing.

        A model that cannot be loaded leaves the folder as it was. Each process does its part, and the first one keeps
        the record.
        """
        start = time.monotonic()
        parts = self.results.parts(self.plan.tasks)
        # The numbers of the tasks of each part whose results are not there, as the first process sees the folder.
        there = self.folder.same_run
        missing = [self.results.missing(k, part) if there else [*range(len(part))] for k, part in enumerate(parts)]
        missing = processes.share(missing)
        total, left = len(self.plan.tasks), sum(map(len, missing))
        if left < total:
            log.info("already there: %d of %s", total - left, counted(total, "image"))
        with advice_on_memory(self.method.config.sampling):
            drawing = self._drawing(processes.device) if left else None
        processes.barrier()  # all models are loaded: now the folder may change
        if processes.rank == 0:
            self.folder.claim(self.method.provenance["command"])
            if drawing and drawing.check:
                write_json(self.results.path / CHECK, drawing.check.thresholds)
        processes.barrier()
        rejects, error = self._inpaint_parts(parts, missing, drawing, processes)
        code = cli.DONE
        try:
            if processes.rank == 0:  # it speaks for all of them
                if error:
                    raise error
                summary = self.results.summary(self.plan.tasks, [*self.plan.rejects, *rejects])
                summary.seconds = round(time.monotonic() - start, 1)
                if not self.method.check:  # what is replayed, or parents, may have been judged in another run
                    summary.check = {}
                code = self._finish(summary)
        finally:
            code = processes.share(code)
        return code

    def _drawing(self, device: str) -> Drawing:
        """The model, with all that it needs to draw tasks and to write their results."""
        method, config = self.method, self.method.config
        inpainter = method.load(device)
        check = method.check(inpainter) if method.check else None
        prepare = Preparation(config.data, self.plan.masks, method.paste)
        written = self.results, method.provenance, self.content
        return Drawing(inpainter, prepare, *written, config.sampling.batch_size, check, method.tries)

    def _inpaint_parts(
        self,
        parts: Sequence[Sequence[Task]],
        missing: Sequence[Sequence[int]],
        drawing: Drawing | None,
        processes: Processes,
    ) -> tuple[list[Reject], MedSoftError | None]:
        """One part after the other, each by all processes; the first one closes it. The rejects, and the first error.

        An error of one process stops all of them.
        """
        rejects: list[Reject] = []
        label = f"inpainting (process 1 of {processes.size})" if processes.size > 1 else "inpainting"
        own = [numbers[processes.rank :: processes.size] for numbers in missing]
        total = sum(map(len, own))
        with tqdm(total=total, desc=label, mininterval=1, bar_format=BAR, disable=processes.rank > 0) as bar:
            for number, part in enumerate(parts):
                tasks = [part[k] for k in own[number]]
                outcomes = processes.gather(self._drawn(drawing, tasks, bar.update) if drawing else ([], None))
                error = next((each for _, each in outcomes if each), None)
                found = [reject for each, _ in outcomes for reject in each]
                if processes.rank == 0 and not error:
                    error = self._closed(number, part, found)
                error = processes.share(error)
                rejects += found
                if error:
                    return rejects, error
        return rejects, None

    def _drawn(
        self, drawing: Drawing, tasks: Sequence[Task], done: Callable[[int], object]
    ) -> tuple[list[Reject], MedSoftError | None]:
        """The rejects of ``tasks``, or the error that ended their drawing."""
        try:
            with advice_on_memory(self.method.config.sampling):
                return drawing(tasks, done), None
        except MedSoftError as error:
            return [], error

    def _closed(self, number: int, part: Sequence[Task], rejects: list[Reject]) -> MedSoftError | None:
        """The error that kept part ``number`` from being closed, if any."""
        try:
            self.results.close(number, part, rejects)
        except MedSoftError as error:
            return error
        return None

    def _finish(self, summary: Summary) -> int:
        """Record what was made and, if all of the run is there, publish it; returns the exit code."""
        warn_of_first(log, (f"not inpainted: {reject}" for reject in summary.rejects), shown=5)
        with self.folder.finished(summary) as whole:
            if whole:
                self._publish(whole)
        return cli.SOME_REJECTED if (whole or summary).rejects else cli.DONE

    def _publish(self, whole: Summary) -> None:
        """Write the list of rejects, the report and, last, the record of the whole run.

        MedSoftError if it has no image at all.
        """
        path, count = self.results.path, len(whole.rejects)
        reject_file = path / "rejects.json"
        write_rejects(reject_file, whole.rejects)
        if count:
            said = counted(count, "sample was", "samples were")
            log.warning("%s not inpainted; see %s", said, reject_file)
        if not whole.pictures:
            first = whole.rejects[0]
            raise MedSoftError(f"{path}: no image could be inpainted; first: {first}; all are in {reject_file}")
        made, changed = counted(whole.pictures, "image"), counted(whole.changed_outside_pixels, "pixel")
        log.info("%s: %s, %s changed outside the soft masks", path, made, changed)
        if whole.clipped_pixels:
            said = counted(whole.clipped_pixels, "pixel of pasted lesions was", "pixels of pasted lesions were")
            log.warning("warning: %s cut off, beyond the levels of the image's file", said)
        if whole.check:
            self._publish_check(whole.check)
        if whole.masks:
            log.info("their masks: %s", ", ".join(f"{count} {name}" for name, count in sorted(whole.masks.items())))
        try:
            log.info("%s shows them", self.results.write_report())
        except MedSoftError as error:  # the results are there all the same
            log.warning("warning: no report: %s", error)
        about = self.method.provenance
        self.folder.publish(whole, **{key: about[key] for key in KNOWN if key in about})

    def _publish_check(self, counts: Mapping[str, int]) -> None:
        """Add to check.json how often what was drawn and rejected, and say it."""
        path = self.results.path / CHECK
        write_json(path, read_json(path) | {"counts": counts})
        causes = {name.removeprefix(REJECTED): n for name, n in sorted(counts.items()) if name.startswith(REJECTED)}
        drawn, images = counted(counts["drawn"], "drawing"), counted(counts["accepted"], "image")
        named = ", ".join(f"{name} {n}" for name, n in causes.items()) or "nothing"
        log.info("checked: %s for %s, %d accepted at once; rejected for %s", drawn, images, counts["at_once"], named)


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
