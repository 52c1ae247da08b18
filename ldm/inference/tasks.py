"""Which pictures to draw and with which sentence: from a dataset, from earlier results, or one picture again."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import named_seed, read_json, read_text
from ldm.data.annotations import load_samples
from ldm.data.folders import read_sample
from ldm.data.samples import Reject, Sample

log = logging.getLogger(__name__)

CLASSES = ("all", "healthy", "diseased")


@dataclass(frozen=True)
class Task:
    """One picture to draw: the sample to draw on, the variant, the sentence and the sample it came from.

    ``source`` also decides the size of a healthy sample's lesion-shaped mask. ``fixed_mask``: draw in the sample's own
    mask and soft mask although it may be healthy (--like, --image, --replay, a healthy sample with a
    ``soft_mask.png``). ``record``: the meta.json to write again (--replay).
    """

    sample: Sample
    variant: int
    prompt: str
    seed: int
    source: Sample | None = None
    fixed_mask: bool = False
    record: dict[str, Any] | None = None

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
    if args.replay:
        return [task_from_metadata(args.replay)], []
    if args.like:
        return tasks_from_results(args)
    return _dataset(args)


def _dataset(args: argparse.Namespace) -> tuple[list[Task], list[Reject]]:
    from ldm.data.preparation import drawable

    data = args.data or args.train_json
    samples, rejects = load_samples(data)
    chosen, words = choose(samples, args.choose)
    sources: list[Sample] = []
    if args.prompt is None and any(sample.healthy for sample in chosen):
        pool = samples if args.data is None else _prompt_samples(args.train_json)
        sources = sorted((s for s in pool if not s.healthy), key=lambda s: s.sample_id)
        if not sources:
            raise MedSoftError(
                f"{args.train_json}: has no diseased sample to take prompts from; give --prompt, or --train_json"
            )
    tasks = []
    for sample in chosen[: args.limit]:
        marked = sample.healthy and sample.soft_mask is not None  # someone says where the lesion goes
        reason = None if marked else drawable(sample)
        if reason:
            rejects.append(Reject(sample.sample_id, sample.image, reason))
            continue
        if marked:
            sample = dataclasses.replace(sample, mask=sample.soft_mask)
        for k in range(args.variants):
            source: Sample | None = (
                sampled_prompt(sources, args.seed, sample, k) if sample.healthy and sources else sample
            )
            prompt, source = (source.prompt, source) if args.prompt is None else (args.prompt, None)
            tasks.append(Task(sample, k, prompt, args.seed, source, marked))
    if args.prompt is not None:
        prompts = f"the prompt {args.prompt!r}"
    elif sources:
        prompts = f"prompts drawn from {len(sources)} diseased samples of {args.train_json}"
    else:
        prompts = "their own prompts"
    drawn_on = len({task.sample.sample_id for task in tasks})
    log.info("drawing on %d %s samples of %s, with %s", drawn_on, words, data, prompts)
    if not tasks:
        raise MedSoftError(f"{data}: no sample can be drawn on ({len(rejects)} rejected)")
    return tasks, rejects


def sampled_prompt(sources: Sequence[Sample], seed: int, sample: Sample, variant: int) -> Sample:
    """The diseased sample whose sentence this picture gets: each as likely, so lesion types keep their frequencies."""
    return sources[named_seed("prompt", seed, sample.sample_id, variant) % len(sources)]


def _prompt_samples(path: Path) -> list[Sample]:
    if not path.exists():
        raise UsageError(
            f"{path}: does not exist; healthy samples need prompts: give --prompt TEXT, or annotations with diseased "
            "samples with --train_json"
        )
    return load_samples(path)[0]


def choose(samples: list[Sample], wanted: str | None) -> tuple[list[Sample], str]:
    """The samples of a class, or those that a text file lists by sample_id; and a word for them."""
    if wanted is not None and wanted not in CLASSES:
        return _listed(samples, Path(wanted)), "listed"
    healthy = [sample for sample in samples if sample.healthy]
    sick = [sample for sample in samples if not sample.healthy]
    if wanted is None:
        wanted = "healthy" if healthy else "diseased"
    return {"all": (samples, "chosen"), "healthy": (healthy, "healthy"), "diseased": (sick, "diseased")}[wanted]


def _listed(samples: list[Sample], path: Path) -> list[Sample]:
    if not path.is_file():
        raise UsageError(f"--choose {path}: expected {', '.join(CLASSES)} or a text file with one sample_id per line")
    known = {sample.sample_id: sample for sample in samples}
    found: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "list of samples").splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        if name not in known:
            raise MedSoftError(
                f"{path}: line {number}: no sample has the sample_id {name!r}; they look like {next(iter(known))!r}"
            )
        if name in found:
            raise MedSoftError(f"{path}: lines {found[name]} and {number} name the same sample {name!r}; keep one")
        found[name] = number
    if not found:
        raise MedSoftError(f"{path}: lists no sample; expected one sample_id per line")
    return [known[name] for name in found]


# ---------------------------------------------------------------------------------------------------- drawn before


def tasks_from_results(args: argparse.Namespace) -> tuple[list[Task], list[Reject]]:
    """The parents and masks of earlier results, with their prompts or another one, under the same names and noise."""
    results, rejects = load_samples(args.like)
    tasks = []
    for result in results[: args.limit]:
        task = _task_of(result, args.like)
        if args.prompt is not None:
            task = dataclasses.replace(task, prompt=args.prompt, source=None)
        tasks.append(task)
    log.info(
        "drawing %d pictures again in the masks of %s, with %s",
        len(tasks),
        args.like,
        "their own prompts" if args.prompt is None else f"the prompt {args.prompt!r}",
    )
    if not tasks:
        raise MedSoftError(f"{args.like}: holds no results")
    return tasks, rejects


def _task_of(result: Sample, where: Path) -> Task:
    """The task that draws an earlier result again."""
    parent = result.meta.get("parent_image")
    if parent is None or result.parent_id is None or not {"seed", "variant"} <= result.meta.keys():
        raise MedSoftError(
            f"{result.sample_id} in {where}: its meta.json does not say how it was drawn; expected "
            "results of this command"
        )
    meta = {key: result.meta[key] for key in ("window", "spacing_mm") if key in result.meta}
    sample = dataclasses.replace(result, sample_id=result.parent_id, image=Path(parent), parent_id=None, meta=meta)
    return Task(sample, int(result.meta["variant"]), result.prompt, int(result.meta["seed"]), result, fixed_mask=True)


def read_record(path: Path) -> dict[str, Any]:
    """The meta.json of a drawn picture, with all that --replay needs; MedSoftError naming what is missing."""
    record = read_json(path, "meta.json of a drawn picture")
    needed = ("parent_image", "parent_id", "parent_sha256", "seed", "variant", "checkpoint", "checkpoint_sha256")
    needed += ("config", "config_sha256", "overrides", "exact")
    missing = [key for key in needed if not isinstance(record, dict) or key not in record]
    if missing:
        raise MedSoftError(f"{path}: has no {', '.join(missing)}; expected the meta.json of a picture drawn here")
    return record


def task_from_metadata(path: Path) -> Task:
    from ldm.core.files import content_id

    record = read_record(path)
    task = _task_of(read_sample(path.parent.name, path.parent), path.parent)
    found = content_id(task.sample.image)
    if found != record["parent_sha256"]:
        state = "has changed since" if found else "is not there or cannot be read"
        raise MedSoftError(f"{task.sample.image}: the image that {path} was drawn on {state}; put it back")
    log.info("drawing %s again", path.parent)
    return dataclasses.replace(task, record=record)
