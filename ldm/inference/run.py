"""Drawing over a dataset: each result a whole sample folder or nothing; shared by processes, continued after a stop."""

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ldm.config import Config
from ldm.core import cli
from ldm.core.devices import is_first_process, out_of_memory
from ldm.core.distributed import Processes
from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import PARTIAL_PREFIX, atomic_folder, content_id, fingerprint, read_json, write_json, write_text
from ldm.core.locks import exclusive
from ldm.core.schema import identity
from ldm.data.annotations import write_rejects
from ldm.data.images import read_image, with_alpha
from ldm.data.masks import read_mask
from ldm.data.png import write_png
from ldm.data.samples import HEALTHY, Reject
from ldm.inference.tasks import Task

if TYPE_CHECKING:
    from ldm.data.preparation import PreparedSample
    from ldm.inference.inpainter import InpaintedImage, Inpainter

log = logging.getLogger(__name__)

TAG = "synthetic picture drawn by MedSoft-Diffusion; not a patient's image; not for clinical use"
FILES = ("image.png", "mask.png", "soft_mask.png", "prompt.txt", "meta.json")
MOSTLY = 0.6  # more of the image marked than this is probably a mask of the wrong polarity
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} pictures [{elapsed}, {remaining} left, {rate_noinv_fmt}]"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a picture's meta.json says about how it was made: enough for --replay to make it again."""

    checkpoint: Path
    checkpoint_sha256: str
    config: Path
    overrides: list[str]
    exact: bool
    command: str


class InferenceRun:
    """Writes the sample folders of one run into ``folder``; finished ones are kept and not drawn again."""

    def __init__(
        self, folder: Path, run: str, origin: Provenance, config: Config, processes: Processes | None = None
    ) -> None:
        self.folder, self.run, self.origin, self.config = folder, run, origin, config
        self.processes = processes or Processes()
        self.fresh = True  # nothing in the folder is this run's
        self._parents: dict[Path, str | None] = {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands out of the folder for the block; the first process does it for all of its run."""
        _check_writable(self.folder)
        folder = self.folder.resolve()
        busy = f"{self.folder}: another run is drawing into this folder at this moment; give another --output_dir"
        with exclusive(folder.with_name(f".{folder.name}.lock"), busy) if is_first_process() else nullcontext():
            yield

    def begin(self, overwrite: bool) -> dict[str, Any] | None:
        """Returns the record of this same run if the folder holds one. Changes nothing: ``draw`` does.

        Another run's pictures are kept safe (UsageError) unless ``overwrite``, which lets ``draw`` replace them; its
        record alone, left by a run that failed before its first picture, is in nobody's way.
        """
        record = self.folder / "inference.json"
        before = read_json(record, "record of these results") if record.exists() else None
        found = [] if not self.folder.exists() else list(self.folder.iterdir())
        if before is None and any(not item.name.startswith(PARTIAL_PREFIX) for item in found):
            raise UsageError(
                f"{self.folder}: is not empty and holds no results of this command; give another --output_dir"
            )
        self.fresh = before is None or before.get("run") != self.run
        if before is not None and self.fresh and self._pictures() and not overwrite:
            raise UsageError(
                f"{self.folder}: holds the results of another run (other checkpoint, data or settings); give "
                "another --output_dir, or --overwrite to replace them"
            )
        return None if self.fresh else before

    def _pictures(self) -> list[Path]:
        """The sample folders that this command, in any run, has written here."""
        return [meta.parent for meta in self.folder.rglob("*__v*/meta.json")]

    def _claim(self) -> None:
        """Make the folder this run's: another run's pictures go, what the command did not write stays."""
        if self.fresh:
            for picture in self._pictures():
                shutil.rmtree(picture)
            self._record(complete=False)
        for orphan in list(self.folder.rglob(PARTIAL_PREFIX + "*")):
            shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink(missing_ok=True)  # it may lie in another one

    def finished(self, tasks: Sequence[Task]) -> int:
        """How many of the pictures are there, whole."""
        return sum(self._finished(task) for task in tasks)

    def _finished(self, task: Task) -> bool:
        folder = self.folder / task.name
        return all((folder / name).is_file() for name in FILES)

    def _record(self, **values: Any) -> None:
        write_json(self.folder / "inference.json", {"run": self.run, "command": self.origin.command, **values})

    # ------------------------------------------------------------------------------------------------ drawing

    def draw(self, tasks: Sequence[Task], rejects: list[Reject], load: Callable[[], "Inpainter"]) -> int:
        """Draw what is missing; returns the exit code. ``load`` is called only if there is something to draw.

        A model that cannot be loaded leaves the folder as it was. Every process calls this with the same ``tasks``;
        each draws its share, and the first one keeps the record.
        """
        start = time.monotonic()
        first = self.processes.rank == 0
        absent = [k for k, task in enumerate(tasks) if self.fresh or not self._finished(task)] if first else []
        absent = self.processes.share(absent)
        if len(absent) < len(tasks):
            log.info("%d of %d pictures are there already", len(tasks) - len(absent), len(tasks))
        with self._memory():
            inpainter = load() if absent else None
        self.processes.barrier()  # all models are loaded: now the folder may change
        if first:
            self._claim()
        self.processes.barrier()
        self.fresh = False
        mine = [tasks[k] for k in absent[self.processes.rank :: self.processes.size]]
        own, fault = [], None
        try:
            with self._memory():
                own = self._draw_all(mine, inpainter) if inpainter else []
        except MedSoftError as error:
            fault = error
        found = self.processes.gather((own, fault))
        code = cli.DONE
        try:
            if first:  # it speaks for all of them
                for _, fault in found:
                    if fault is not None:
                        raise fault
                rejects = [*rejects, *(reject for own, _ in found for reject in own)]
                code = self._finish(tasks, list(dict.fromkeys(rejects)), start)
        finally:
            code = self.processes.share(code)
        return code

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """MedSoftError with the cure where the block runs out of memory."""
        sampling = self.config.sampling
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            cures = [
                *(["a smaller --batch_size"] if sampling.batch_size > 1 else []),
                *(["--precision bf16-true"] if sampling.precision == "32-true" else []),
            ]
            raise MedSoftError(
                f"out of memory with batches of {sampling.batch_size} in {sampling.precision} ({reason}); "
                f"{' or '.join(cures) or 'a smaller model'} needs less; finished pictures are kept"
            ) from error

    def _draw_all(self, tasks: Sequence[Task], inpainter: "Inpainter") -> list[Reject]:
        """Draw batch by batch; the next one is read and the last one written while the model works."""
        size = self.config.sampling.batch_size
        batches = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        rejects: list[Reject] = []
        share = f" (process 1 of {self.processes.size})" if self.processes.size > 1 else ""
        quiet = self.processes.rank > 0
        with (
            ThreadPoolExecutor(4) as pool,
            tqdm(total=len(tasks), desc=f"drawing{share}", mininterval=1, bar_format=BAR, disable=quiet) as bar,
        ):
            written: list[Future] = []
            for batch, ready in _ahead(pool, self._picture, batches):
                sound = [
                    (t, picture) for t, picture in zip(batch, ready, strict=True) if not isinstance(picture, Reject)
                ]
                rejects += [picture for picture in ready if isinstance(picture, Reject)]
                drawn = self._draw_batch(sound, inpainter) if sound else []
                for future in written:
                    future.result()
                written = []
                for (task, picture), result in zip(sound, drawn, strict=True):
                    if result.fault:
                        reason = (
                            f"variant {task.variant}: values that are not numbers (NaN or infinity) appeared "
                            f"{result.fault}; nothing was written"
                        )
                        rejects.append(Reject(task.sample.sample_id, task.sample.image, reason))
                    else:
                        written.append(pool.submit(self._write, task, picture, result.pixels))
                bar.update(len(batch))
            for future in written:
                future.result()
        return rejects

    def _draw_batch(
        self, ready: Sequence[tuple[Task, "PreparedSample"]], inpainter: "Inpainter"
    ) -> list["InpaintedImage"]:
        from ldm.inference.inpainter import Job

        jobs = [Job(task.seed, task.sample.sample_id, task.variant, task.prompt) for task, _ in ready]
        return inpainter.draw([picture for _, picture in ready], jobs)

    def _picture(self, task: Task) -> "PreparedSample | Reject":
        """What the networks see of one sample, or why it cannot be drawn on."""
        try:
            diameter = self._diameter(task)
        except FileError as error:
            reason = f"{error.reason}; {task.name} is not drawn, as prompt and lesion size come from this sample"
            return Reject(task.source.sample_id, error.path, reason)
        try:
            picture = self._fitted(task, diameter)
        except MedSoftError as error:
            return Reject(task.sample.sample_id, task.sample.image, str(error))
        marked = float(picture.hard.mean())
        if marked > MOSTLY:
            log.warning(
                "warning: %s: %.0f %% of the image is marked; white (1) is the lesion, the part to be drawn: if the "
                "lesion is black in this mask, invert it",
                task.sample.mask or task.sample.sample_id,
                100 * marked,
            )
        return picture

    def _diameter(self, task: Task) -> float | None:
        """The relative size of the lesion that a healthy sample's sentence was written about, None for any."""
        from ldm.data.preparation import lesion_diameter

        given = task.source is not None and task.sample.healthy and not task.fixed_mask
        return lesion_diameter(task.source) if given else None

    def _fitted(self, task: Task, diameter: float | None) -> "PreparedSample":
        from ldm.data.preparation import fit_sample, prepare

        if not task.fixed_mask:
            return prepare(task.sample, self.config.data, task.seed, task.variant, diameter=diameter)
        original = read_image(task.sample.image)
        mask = read_mask(task.sample.mask, original.shape, soft=task.sample.mask == task.sample.soft_mask)
        if mask.empty:
            raise MedSoftError(f"{task.sample.mask}: the mask is empty; mark the region to draw in white")
        sample = dataclasses.replace(task.sample, prompt="lesion")  # its own mask and soft mask are meant
        return fit_sample(sample, original, mask, self.config.data)

    # ------------------------------------------------------------------------------------------------ writing

    def _write(self, task: Task, picture: "PreparedSample", result: np.ndarray) -> None:
        """One sample folder, assembled under a temporary name and renamed."""
        differs = (result != picture.original).reshape(*picture.soft.shape, -1).any(axis=-1)
        changed = int(np.count_nonzero(differs & (picture.soft == 0)))
        with atomic_folder(self.folder / task.name) as partial:  # one without all its files was left by something else
            whole = with_alpha(result, task.sample.image, picture.soft > 0)
            write_png(partial / "image.png", whole, {"Comment": TAG, "Description": task.prompt})
            write_png(partial / "mask.png", picture.hard.astype(np.uint8) * 255)
            write_png(partial / "soft_mask.png", np.rint(picture.soft * 255).astype(np.uint8))
            write_text(partial / "prompt.txt", task.prompt + "\n")
            write_json(partial / "meta.json", self._meta(task, picture, changed))

    def _meta(self, task: Task, picture: "PreparedSample", changed: int) -> dict[str, Any]:
        if task.record is not None:
            return {**task.record, "changed_outside_pixels": changed}
        source, parent, origin = task.source, task.sample, self.origin
        sick = source is not None and task.prompt.strip().lower() != HEALTHY
        if parent.image not in self._parents:
            self._parents[parent.image] = content_id(parent.image)
        meta = {
            "sample_id": task.name,
            "parent_id": parent.sample_id,
            "patient_id": parent.patient_id,
            "lesion_type": source.lesion_type if sick else None,
            "severity": source.severity if sick else None,
            "level": parent.level,
            "synthetic": True,
            "seed": task.seed,
            "variant": task.variant,
            "prompt_from": source.sample_id if sick and source is not parent else None,
            "spacing_mm": parent.meta.get("spacing_mm"),
            "window": list(picture.intensity_range) if picture.original.dtype == np.uint16 else None,
            "parent_image": str(parent.image),
            "parent_sha256": self._parents[parent.image],
            "changed_outside_pixels": changed,
            "checkpoint": str(origin.checkpoint),
            "checkpoint_sha256": origin.checkpoint_sha256,
            "config": str(origin.config),
            "overrides": origin.overrides,
            "config_sha256": fingerprint(identity(self.config, "images")),
            "exact": origin.exact,
            "command": origin.command,
        }
        return {key: value for key, value in meta.items() if value is not None or key in ("lesion_type", "severity")}

    def _finish(self, tasks: Sequence[Task], rejects: list[Reject], start: float) -> int:
        """Write the list of rejects, the record and the report; returns the exit code."""
        from ldm.inference.gallery import write_gallery

        reject_file = self.folder / "rejects.json"
        write_rejects(reject_file, rejects)
        for reject in rejects[:5]:
            log.warning("not drawn: %s", reject)
        if rejects:
            log.warning("%d samples were not drawn; all of them are in %s", len(rejects), reject_file)
        done = [task for task in tasks if self._finished(task)]
        if not done:
            raise MedSoftError(
                f"{self.folder}: no picture could be drawn; first: {rejects[0]}; all are in {reject_file}"
            )
        changed = sum(read_json(self.folder / task.name / "meta.json")["changed_outside_pixels"] for task in done)
        self._record(
            complete=True,
            pictures=len(done),
            rejected=len(rejects),
            changed_outside_pixels=changed,
            seconds=round(time.monotonic() - start, 1),
            checkpoint_sha256=self.origin.checkpoint_sha256,
        )
        log.info("%s: %d pictures, %d pixels changed outside the soft masks", self.folder, len(done), changed)
        try:
            log.info("%s shows them", write_gallery(self.folder))
        except MedSoftError as error:  # the pictures are there all the same
            log.warning("warning: no report: %s", error)
        return cli.SOME_REJECTED if rejects else cli.DONE


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[Task], Any], batches: Sequence[Sequence[Task]]
) -> Iterator[tuple[Sequence[Task], list[Any]]]:
    """Each batch with what ``prepare`` made of it; the next batch is prepared while the caller works on this one."""
    coming = [pool.submit(prepare, task) for task in batches[0]] if batches else []
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        current, coming = coming, [pool.submit(prepare, task) for task in after]
        yield batch, [future.result() for future in current]


def _check_writable(folder: Path) -> None:
    """UsageError unless ``folder`` is, or can become, a folder in which files may be written."""
    above = folder.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "may not be written to" if above.is_dir() else "is no folder"
        raise UsageError(f"--output_dir {folder}: {above} {reason}; give another folder")
