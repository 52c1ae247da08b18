"""Drawing over a dataset: which pictures, with which sentence; each result a whole sample folder or nothing."""

import argparse
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ldm import cli
from ldm.annotations import HEALTHY, Reject, Sample, load_samples, write_rejects
from ldm.config import Config
from ldm.errors import MedSoftError, UsageError
from ldm.files import PARTIAL_PREFIX, fingerprint, named_seed, read_json, sync_folder, write_json, write_text
from ldm.images import read_image, write_png
from ldm.masks import read_mask

if TYPE_CHECKING:
    from ldm.dataset import Picture
    from ldm.inpainting import Inpainter

log = logging.getLogger(__name__)

TAG = "synthetic picture drawn by MedSoft-Diffusion; not a patient's image; not for clinical use"


@dataclass(frozen=True)
class Task:
    """One picture to draw: the sample to draw on, the variant, the sentence and the sample it came from.

    ``fixed_mask``: draw in the sample's own mask and soft mask although it may be healthy (--like, --image).
    """

    sample: Sample
    variant: int
    prompt: str
    seed: int
    source: Sample | None = None
    fixed_mask: bool = False

    @property
    def name(self) -> str:
        """The picture's folder."""
        return f"{self.sample.sample_id}__v{self.variant}"


def plan_tasks(args: argparse.Namespace) -> tuple[list[Task], list[Reject]]:
    """What to draw, from the command line; and what cannot be drawn on. Says in one line what it chose."""
    if args.image:
        sample = Sample(
            args.image.stem, args.image.resolve(), args.mask.resolve(), args.prompt, (0,) * 4, args.image.stem
        )
        return [Task(sample, k, args.prompt, args.seed, fixed_mask=True) for k in range(args.variants)], []
    if args.like:
        return _like(args)
    samples, rejects = load_samples(args.data or args.train_json)
    chosen, words = _choose(samples, args.choose)
    sources: list[Sample] = []
    if args.prompt is None and any(sample.healthy for sample in chosen):
        pool = samples if args.data is None else _prompt_samples(args.train_json)
        sources = sorted((s for s in pool if not s.healthy), key=lambda s: s.sample_id)
        if not sources:
            raise MedSoftError(
                f"{args.train_json}: has no diseased sample to take prompts from; give --prompt, or --train_json"
            )
    from ldm.dataset import drawable

    tasks = []
    for sample in chosen[: args.limit]:
        reason = drawable(sample)
        if reason:
            rejects.append(Reject(sample.sample_id, str(sample.image), reason))
            continue
        for k in range(args.variants):
            source = sample
            if sample.healthy and sources:
                source = sources[named_seed("prompt", args.seed, sample.sample_id, k) % len(sources)]
            prompt, source = (source.prompt, source) if args.prompt is None else (args.prompt, None)
            tasks.append(Task(sample, k, prompt, args.seed, source))
    if args.prompt is not None:
        prompts = f"the prompt {args.prompt!r}"
    elif sources:
        prompts = f"prompts drawn from {len(sources)} diseased samples of {args.train_json}"
    else:
        prompts = "their own prompts"
    log.info(
        "drawing on %d %s samples of %s, with %s",
        len({t.sample.sample_id for t in tasks}),
        words,
        args.data or args.train_json,
        prompts,
    )
    if not tasks:
        raise MedSoftError(f"{args.data or args.train_json}: no sample can be drawn on ({len(rejects)} rejected)")
    return tasks, rejects


def _prompt_samples(path: Path) -> list[Sample]:
    if not path.exists():
        raise UsageError(
            f"{path}: does not exist; healthy samples need prompts: give --prompt TEXT, or annotations with diseased "
            "samples with --train_json"
        )
    return load_samples(path)[0]


def _choose(samples: list[Sample], wanted: str | None) -> tuple[list[Sample], str]:
    healthy = [sample for sample in samples if sample.healthy]
    sick = [sample for sample in samples if not sample.healthy]
    if wanted is None:
        wanted = "healthy" if healthy else "diseased"
    return {"all": (samples, "chosen"), "healthy": (healthy, "healthy"), "diseased": (sick, "diseased")}[wanted]


def _like(args: argparse.Namespace) -> tuple[list[Task], list[Reject]]:
    """The parents and masks of earlier results, with their prompts or another one, under the same names and noise."""
    results, rejects = load_samples(args.like)
    tasks = []
    for result in results[: args.limit]:
        parent = result.meta.get("parent_image")
        if parent is None or result.parent_id is None or not {"seed", "variant"} <= result.meta.keys():
            raise MedSoftError(
                f"{result.sample_id} in {args.like}: its meta.json does not say how it was drawn; expected "
                "results of this command"
            )
        meta = {key: result.meta[key] for key in ("window", "spacing_mm") if key in result.meta}
        sample = dataclasses.replace(result, sample_id=result.parent_id, image=Path(parent), parent_id=None, meta=meta)
        same = args.prompt is None
        tasks.append(
            Task(
                sample,
                int(result.meta["variant"]),
                result.prompt if same else args.prompt,
                int(result.meta["seed"]),
                result if same else None,
                fixed_mask=True,
            )
        )
    log.info(
        "drawing %d pictures again in the masks of %s, with %s",
        len(tasks),
        args.like,
        "their own prompts" if args.prompt is None else f"the prompt {args.prompt!r}",
    )
    if not tasks:
        raise MedSoftError(f"{args.like}: holds no results")
    return tasks, rejects


class InferenceRun:
    """Writes the sample folders of one run into ``folder``; finished ones are kept and not drawn again."""

    def __init__(self, folder: Path, run: str, checkpoint: str, config: Config, command: str) -> None:
        self.folder, self.run, self.checkpoint, self.config = folder, run, checkpoint, config
        self.command = command
        self.config_digest = fingerprint(dataclasses.asdict(config))
        self.fresh = True  # nothing in the folder is this run's

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
            self.fresh = False
        for orphan in list(self.folder.rglob(PARTIAL_PREFIX + "*")):
            shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink(missing_ok=True)  # it may lie in another one

    def finished(self, tasks: Sequence[Task]) -> int:
        """How many of the pictures are there, whole."""
        return sum(self._finished(task) for task in tasks)

    def _record(self, **values: Any) -> None:
        write_json(self.folder / "inference.json", {"run": self.run, "command": self.command, **values})

    def draw(self, tasks: Sequence[Task], rejects: list[Reject], load: Callable[[], "Inpainter"]) -> int:
        """Draw what is missing; returns the exit code. ``load`` is called only if there is something to draw.

        A model that cannot be loaded leaves the folder as it was.
        """
        start = time.monotonic()
        missing = [task for task in tasks if self.fresh or not self._finished(task)]
        if len(missing) < len(tasks):
            log.info("%d of %d pictures are there already", len(tasks) - len(missing), len(tasks))
        inpainter = load() if missing else None
        self._claim()
        if inpainter:
            size = self.config.sampling.batch_size
            with tqdm(total=len(missing), desc="drawing", unit="picture", mininterval=1) as bar:
                for first in range(0, len(missing), size):
                    rejects += self._batch(missing[first : first + size], inpainter)
                    bar.update(len(missing[first : first + size]))
        rejects = list(dict.fromkeys(rejects))  # a sample may have several variants
        reject_file = self.folder / "rejects.json"
        if rejects:
            write_rejects(reject_file, rejects)
            for reject in rejects[:5]:
                log.warning("not drawn: %s", reject)
            log.warning("%d samples were not drawn; all of them are in %s", len(rejects), reject_file)
        else:
            reject_file.unlink(missing_ok=True)
        pictures = self.finished(tasks)
        if not pictures:
            raise MedSoftError(
                f"{self.folder}: no picture could be drawn; first: {rejects[0]}; all are in {reject_file}"
            )
        changed = sum(
            read_json(self.folder / t.name / "meta.json")["changed_outside_pixels"] for t in tasks if self._finished(t)
        )
        self._record(
            complete=True,
            pictures=pictures,
            rejected=len(rejects),
            changed_outside_pixels=changed,
            seconds=round(time.monotonic() - start, 1),
            checkpoint_sha256=self.checkpoint,
        )
        log.info("%s: %d pictures, %d pixels changed outside the soft masks", self.folder, pictures, changed)
        return cli.SOME_REJECTED if rejects else cli.DONE

    def _finished(self, task: Task) -> bool:
        return (self.folder / task.name / "meta.json").is_file()

    def _batch(self, tasks: Sequence[Task], inpainter: "Inpainter") -> list[Reject]:
        from ldm.inpainting import Job

        ready, rejects = [], []
        for task in tasks:
            try:
                ready.append((task, self._picture(task)))
            except MedSoftError as error:
                rejects.append(Reject(task.sample.sample_id, str(task.sample.image), str(error)))
        if not ready:
            return rejects
        jobs = [Job(task.seed, task.sample.sample_id, task.variant, task.prompt) for task, _ in ready]
        results = inpainter.draw([picture for _, picture in ready], jobs)
        for (task, picture), result in zip(ready, results, strict=True):
            if result.fault:
                reason = (
                    f"variant {task.variant}: values that are not numbers (NaN or infinity) appeared {result.fault}; "
                    "nothing was written"
                )
                rejects.append(Reject(task.sample.sample_id, str(task.sample.image), reason))
            else:
                self._write(task, picture, result.pixels)
        return rejects

    def _picture(self, task: Task) -> "Picture":
        from ldm.dataset import fit_picture, prepare

        if not task.fixed_mask:
            return prepare(task.sample, self.config.data, task.seed, task.variant)
        original = read_image(task.sample.image)
        mask = read_mask(task.sample.mask, original.shape)
        if mask.empty:
            raise MedSoftError(f"{task.sample.mask}: the mask is empty; mark the region to draw in white")
        sample = dataclasses.replace(task.sample, prompt="lesion")  # its own mask and soft mask are meant
        return fit_picture(sample, original, mask, self.config.data)

    def _write(self, task: Task, picture: "Picture", result: np.ndarray) -> None:
        """One sample folder, assembled under a temporary name and renamed."""
        final = self.folder / task.name
        partial = final.parent / f"{PARTIAL_PREFIX}{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        outside = picture.soft == 0
        changed = int(
            (result != picture.original)[outside].any(axis=-1).sum()
            if result.ndim == 3
            else (result != picture.original)[outside].sum()
        )
        try:
            partial.mkdir(parents=True)
            write_png(partial / "image.png", result, {"Comment": TAG, "Description": task.prompt})
            write_png(partial / "mask.png", picture.hard.astype(np.uint8) * 255)
            write_png(partial / "soft_mask.png", np.rint(picture.soft * 255).astype(np.uint8))
            write_text(partial / "prompt.txt", task.prompt + "\n")
            write_json(partial / "meta.json", self._meta(task, picture, changed))
            if final.exists():
                shutil.rmtree(final)  # without its meta.json: left by something else
            os.replace(partial, final)
            sync_folder(final.parent)
        except OSError as error:
            raise MedSoftError(
                f"{final}: could not be written ({error.strerror or error}); free some space or choose another "
                "--output_dir, then run the same command again"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _meta(self, task: Task, picture: "Picture", changed: int) -> dict[str, Any]:
        source, parent = task.source, task.sample
        sick = source is not None and task.prompt.strip().lower() != HEALTHY
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
            "window": list(picture.levels) if picture.original.dtype == np.uint16 else None,
            "parent_image": str(parent.image),
            "changed_outside_pixels": changed,
            "checkpoint_sha256": self.checkpoint,
            "config_sha256": self.config_digest,
            "command": self.command,
        }
        return {key: value for key, value in meta.items() if value is not None or key in ("lesion_type", "severity")}
