"""What to inpaint and with which prompt: from a dataset, from earlier results, or one result again."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.files import Contents, fingerprint, fingerprint_all, named_seed, read_json, read_text
from ldm.core.paths import confined
from ldm.core.schema import Rule
from ldm.core.tables import counted
from ldm.core.threads import thread_pool
from ldm.data.annotations import load_samples
from ldm.data.checks import TRAINED_ON
from ldm.data.folders import is_marked, parent_image, read_meta, read_sample
from ldm.data.preparation import described_identity
from ldm.data.regions import inpainting_obstacle
from ldm.data.samples import META_TEXTS, Reject, Sample, is_number, probably_healthy, wrong_value
from ldm.diffusion.noise import NOISE
from ldm.inference.options import MASKS, InferenceOptions
from ldm.inference.prompts import (
    Match,
    MatchedPrompt,
    PromptPool,
    check_keys,
    contradiction,
    image_facts,
    levels_named,
    matched,
    warn_of_unmatched,
)
from ldm.inference.shares import Share, at_most, check_apart
from ldm.inference.single import single_sample

log = logging.getLogger(__name__)

CLASSES = ("all", "healthy", "diseased")
MOST_NAME = 239  # bytes of a result's folder: file systems take 255, and other names are made from it
MOST_PATH = 3900  # bytes of a path; systems take 4095, and a temporary folder's name is longer than the result's


def _is_map(value: Any) -> bool:
    """Whether it is the 2x3 matrix of an affine map that can be inverted."""
    rows = isinstance(value, list) and len(value) == 2 and all(isinstance(row, list) and len(row) == 3 for row in value)
    if not rows or not all(is_number(each) for row in value for each in row):
        return False
    (a, b, _), (c, d, _) = value
    return abs(a * d - b * c) > 1e-9


_TEXT = Rule(lambda value: isinstance(value, str) and bool(value), "text")
_WHOLE = Rule(lambda value: type(value) is int and value >= 0, "a whole number of at least 0")
RECORD_RULES = {"parent_image": _TEXT, "parent_id": _TEXT, "seed": _WHOLE, "variant": _WHOLE}  # to make a result again
# What a result may say of its mask and of the lesion that was pasted.
PASTE_RULES = dict.fromkeys(("mask_source", "mask_fallback", "pasted_from", "pasted_sha256"), _TEXT)
PASTE_RULES |= {
    "mask_from": Rule(lambda value: value in MASKS, f"one of {', '.join(MASKS)}"),
    "pasted_by": Rule(_is_map, "2 rows of 3 numbers, a map of the plane that can be inverted"),
}
REPLAY_RULES = RECORD_RULES | {
    **dict.fromkeys(("parent_sha256", "checkpoint", "checkpoint_sha256", "config", "config_sha256"), _TEXT),
    "overrides": Rule(lambda value: isinstance(value, list) and all(map(_TEXT.holds, value)), "a list of KEY=VALUE"),
    "exact": Rule(lambda value: isinstance(value, bool), "true or false"),
}
# What meta.json of a result says beside the keys of its parent's, of which those of the same name are replaced.
RESULT_KEYS = {*META_TEXTS, *REPLAY_RULES, "sample_id", "prompt", "prompt_match", "prompt_from", "synthetic", "window"}
RESULT_KEYS |= {"spacing_mm", "changed_outside_pixels", "command", "noise", TRAINED_ON}
RESULT_KEYS |= {"mask_from", "mask_source", "mask_fallback", "pasted_from", "pasted_sha256", "pasted_by"}
RESULT_KEYS |= {"init", "strength", "method", "clipped_pixels", "check"}


class MaskOrigin(NamedTuple):
    """Where a mask comes from: carry (the lesion of the sample ``source``), blob (lesion-shaped) or own.

    ``fallback``: why it is not carried over by the two vertebrae although it was to be: of a carry, why only the
    lesion's form is.
    """

    origin: str
    source: str | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Task:
    """One result to make: the sample to inpaint, the variant, the prompt and the sample that the prompt came from.

    ``source`` also decides a healthy sample's mask: its lesion's is carried over, or gives the size. ``match``: how the
    prompt was made to agree with the image, for the record. ``fixed_mask``: inpaint the sample's own mask and soft mask
    although it may be healthy (--like, --image, --replay, a healthy sample with a ``soft_mask.png``). ``record``: the
    meta.json to write again (--replay). ``mask``: where its mask comes from, as far as that is known. ``donor``: the
    sample whose lesion is pasted, where one is to be; ``pasted_by``: 2x3, the map by which an earlier result did that;
    ``clipped_pixels``: how many pasted pixels lay beyond the levels of the image's file. ``folder``: another name.
    """

    sample: Sample
    variant: int
    prompt: str
    seed: int
    source: Sample | None = None
    match: str | None = None
    fixed_mask: bool = False
    record: dict[str, Any] | None = None
    mask: MaskOrigin | None = None
    donor: Sample | None = None
    pasted_by: Sequence[Sequence[float]] | None = None
    clipped_pixels: int = 0
    folder: str | None = None

    @property
    def name(self) -> str:
        """The result's folder."""
        return self.folder or f"{self.sample.sample_id}__v{self.variant}"

    @property
    def about(self) -> Sample:
        """What a message names: with --like and --replay the result that is made again, else the sample."""
        source = self.source  # prompts come from real samples
        return source if source and source.synthetic else self.sample

    @property
    def inputs(self) -> list[Sample]:
        """The samples whose files decide the result."""
        source = [] if self.source is None or self.fixed_mask else [self.source]
        donor = [] if self.donor is None or self.donor in source else [self.donor]
        return [self.sample, *source, *donor]


class Plan(NamedTuple):
    """The tasks of one share of a run, or of all of it, and the samples that cannot be inpainted.

    ``whole``: a digest of all that decides what the tasks of every share are, file contents aside: that is what the
    shares of a run have in common. Only taken where there are several. ``masks``: of MASKS, what healthy samples of
    any share get; "blob" where no lesion could be carried, as in all runs of before. ``givers``: the patients whose
    lesions may be pasted, in any share.
    """

    tasks: list[Task]
    rejects: list[Reject]
    whole: str = ""
    masks: str = "blob"
    givers: frozenset[str] = frozenset()


def plan_tasks(
    options: InferenceOptions, content: Contents, record: dict[str, Any] | None = None, paste: bool = False
) -> Plan:
    """What to inpaint, and the samples that cannot be inpainted. Says in one line what it chose.

    ``content`` gives a file's SHA-256, or None for a file that cannot be read; ``record``: what ``--replay`` names;
    ``paste``: each result gets a lesion that is pasted.
    """
    share = options.share or Share()
    if options.image:
        sample = single_sample(options)
        variants = share.of(range(options.variants))
        own = MaskOrigin("own")
        tasks = [Task(sample, k, sample.prompt, options.seed, fixed_mask=True, mask=own) for k in variants]
        plan = Plan(tasks, [], fingerprint(described_identity(sample, content)))
    elif options.replay and record:
        plan = Plan([task_from_metadata(options.replay, record, content)], [])
    elif options.like:
        plan = tasks_from_results(options, options.like, content)
    else:
        plan = _dataset(options)
    if paste:
        plan = _with_donors(plan, options, content)
    tasks, unnamed = _nameable(plan.tasks, options.output_dir)
    rejects = [*plan.rejects, *unnamed]
    if not tasks and share.alone:
        raise MedSoftError(f"no sample can be inpainted ({len(rejects)} rejected; first: {rejects[0]})")
    _warn_of_contradictions(tasks)
    if options.prompt and probably_healthy(options.prompt):
        text = "warning: --prompt reads as healthy, but counts as a lesion's; write `healthy` for no lesion: %r"
        log.warning(text, options.prompt)
    return plan._replace(tasks=tasks, rejects=rejects)


def _with_donors(plan: Plan, options: InferenceOptions, content: Contents) -> Plan:
    """The plan with the lesions to paste: those of the prompts' samples.

    Of earlier results it is the one that was pasted, or whose mask or prompt they have, sought in ``--train_json``.
    """
    tasks, rejects = [], list(plan.rejects)
    pool = {s.sample_id: s for s in _prompt_samples(options.train_json)} if options.like or options.replay else {}
    for task in plan.tasks:
        given = task.source
        if given is not None and pool:
            about = given.meta
            wanted = next((about[key] for key in ("pasted_from", "mask_source", "prompt_from") if about.get(key)), None)
            source = pool.get(wanted) if wanted else None
            stored = about.get("pasted_sha256")
            if source is None or (stored and stored != donor_digest(source, content)):
                what = "is not" if source is None else "is another one than"
                reason = f"the lesion to paste, of {wanted}, {what} in {options.train_json}; give --train_json"
                rejects.append(Reject(task.sample.sample_id, given.image.with_name("meta.json"), reason))
                continue
            tasks.append(dataclasses.replace(task, donor=source, pasted_by=about.get("pasted_by")))
        elif given is None or given is task.sample:
            reason = "has no lesion to paste: only healthy images with the prompt of a diseased sample get one"
            rejects.append(Reject(task.sample.sample_id, task.sample.image, reason))
        else:
            tasks.append(dataclasses.replace(task, donor=given))
    of_pool = {sample.patient_id for sample in pool.values() if not sample.healthy and not sample.synthetic}
    return plan._replace(tasks=tasks, rejects=rejects, givers=plan.givers | of_pool)


def donor_digest(donor: Sample, content: Callable[[Path | None], str | None]) -> str:
    """A digest of the files of a sample whose lesion is pasted; ``content`` gives that of one."""
    return fingerprint([content(file) for file in donor.files])


def _shared(
    share: Share,
    samples: Sequence[Sample],
    variants: int,
    sources: Sequence[Sample],
    name_of: Callable[[Sample, int], str],
) -> tuple[Sequence[tuple[Sample, int]], str]:
    """The (sample, variant) pairs of one share, in the order of their names, and the digest of ``Plan.whole``.

    ``name_of`` gives a result's name. MedSoftError for two results, perhaps of two shares, one of which would be
    written over the other or into its folder.
    """
    pairs = sorted(((s, k) for s in samples for k in range(variants)), key=lambda pair: (pair[0].sample_id, pair[1]))
    named = [(sample, name_of(sample, variant)) for sample, variant in pairs]
    check_apart((PurePosixPath(name), name, sample.image) for sample, name in named)
    ordered = [*sorted(samples, key=lambda each: each.sample_id), None, *sources]
    texts = (sample and described_identity(sample, lambda path: path.name if path else None) for sample in ordered)
    return share.of(pairs), fingerprint_all(texts)


def _nameable(tasks: Sequence[Task], output_dir: Path) -> tuple[list[Task], list[Reject]]:
    """The tasks whose result can have its name, and rejects for names that are too long or lead out of the folder.

    MedSoftError as ``check_apart``.
    """
    found: list[tuple[Path, Task]] = []
    rejects: dict[str, Reject] = {}
    for task in tasks:
        try:
            if reason := too_long(output_dir / task.name):
                raise MedSoftError(reason)
            found.append((confined(output_dir, task.name).resolve(), task))
        except MedSoftError as error:
            rejects[task.sample.sample_id] = Reject(task.sample.sample_id, task.about.image.parent, str(error))
    check_apart((path, task.name, task.about.image) for path, task in found)
    return [task for _, task in found], list(rejects.values())


def _warn_of_contradictions(tasks: Sequence[Task]) -> None:
    """One warning for prompts that name otherwise than the image's meta.json, one for those nobody can judge."""
    facts = [image_facts(task.sample) for task in tasks]
    pairs = [(task, contradiction(task.prompt, about)) for task, about in zip(tasks, facts, strict=True)]
    wrong = [f"{task.name}: {text}" for task, text in pairs if text]
    if wrong:
        text = "warning: %d of %d prompts contradict meta.json (%s); --match replace makes a prompt agree"
        log.warning(text, len(wrong), len(tasks), wrong[0])
    both = zip(tasks, facts, strict=True)
    unknown = [task.name for task, about in both if not about.level and levels_named(task.prompt)]
    if unknown:
        named = counted(len(unknown), "prompt names", "prompts name")
        text = "a vertebra, but the image's meta.json has no level to compare it with; first:"
        log.warning("warning: %s %s %s", named, text, unknown[0])


def too_long(folder: Path) -> str | None:
    """Why no result can be written into ``folder``: a part of its path, or all of it, is longer than file systems take.

    None if it can.
    """
    longest = max(folder.parts, key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > MOST_NAME:
        return f"its result's folder would be called {longest[:40]}..., longer than {MOST_NAME} bytes; shorten its name"
    if len(os.fsencode(folder.absolute())) > MOST_PATH:
        return f"its result's path would be longer than {MOST_PATH} bytes; shorten it, or give another --output_dir"
    return None


def _dataset(options: InferenceOptions) -> Plan:
    data, share = options.data or options.train_json, options.share or Share()
    samples, rejects = load_samples(data)
    chosen, adjective = choose(samples, options.choose)
    if not chosen:
        raise MedSoftError(f"{data}: no sample was chosen; synthetic ones only if --choose lists them in a file")
    sources, match = _sources(options, samples, chosen), Match.read(options.match)
    if match.keys:
        healthy = [sample for sample in chosen if sample.healthy]
        check_keys(match, (options.data or options.train_json, healthy), (options.train_json, sources))
    chosen, whole = at_most(options.limit, chosen, lambda sample: _obstacle(sample) is None), ""
    pairs: Sequence[tuple[Sample, int]] = [(sample, k) for sample in chosen for k in range(options.variants)]
    if not share.alone:
        pairs, whole = _shared(share, chosen, options.variants, sources, lambda sample, k: f"{sample.sample_id}__v{k}")
        rejects = rejects if share.number == 1 else []  # what no share can inpaint is the first one's to report
    tasks, more = _tasks_of(pairs, options, PromptPool(sources, match) if sources else None)
    warn_of_unmatched(match, [(task.sample, task.source) for task in tasks if task.sample.healthy])
    said = "their own prompts" if options.prompt is None else f"the prompt {options.prompt!r}"
    if sources:  # of which there are none with a prompt for all
        said = f"prompts of {counted(len(sources), 'diseased sample')} of {options.train_json}"
    images = counted(len({task.sample.sample_id for task in tasks}), f"{adjective} sample")
    log.info("inpainting %s of %s, with %s", images, data, said)
    carried = options.masks != "blob" and bool(sources) and any(s.healthy and not _is_marked_healthy(s) for s in chosen)
    givers = frozenset(sample.patient_id for sample in sources)
    return Plan(tasks, [*rejects, *more], whole, options.masks if carried else "blob", givers)


def _sources(options: InferenceOptions, samples: Sequence[Sample], chosen: Sequence[Sample]) -> list[Sample]:
    """The samples whose prompts the healthy ones of ``chosen`` may get, by name; none where they need no prompt."""
    if options.prompt is not None or not any(sample.healthy for sample in chosen):
        return []
    pool = samples if options.data is None else _prompt_samples(options.train_json)
    sources = sorted((s for s in pool if not s.healthy and not s.synthetic), key=lambda s: s.sample_id)
    if not sources:
        raise MedSoftError(
            f"{options.train_json}: has no diseased sample to take prompts from; give --prompt, or --train_json"
        )
    return sources


def _is_marked_healthy(sample: Sample) -> bool:
    """Whether someone says where the lesion of a healthy sample goes."""
    return sample.healthy and sample.soft_mask is not None


def _obstacle(sample: Sample) -> str | None:
    return None if _is_marked_healthy(sample) else inpainting_obstacle(sample)


def _tasks_of(
    pairs: Sequence[tuple[Sample, int]], options: InferenceOptions, pool: PromptPool | None
) -> tuple[list[Task], list[Reject]]:
    """The tasks of (sample, variant) pairs, and the samples that have none; ``pool``: the prompts for healthy ones."""
    variants: dict[str, list[int]] = {}
    for sample, k in pairs:
        variants.setdefault(sample.sample_id, []).append(k)
    own = list({sample.sample_id: sample for sample, _ in pairs}.values())
    with thread_pool() as threads:
        obstacles = list(threads.map(_obstacle, own))
    tasks: list[Task] = []
    rejects: list[Reject] = []
    for sample, obstacle in zip(own, obstacles, strict=True):
        try:
            if obstacle:
                raise FileError(sample.image, obstacle)
            tasks += _tasks_of_sample(sample, variants[sample.sample_id], options, pool)
        except FileError as error:
            rejects.append(Reject(sample.sample_id, error.path, error.reason))
    return tasks, rejects


def _tasks_of_sample(
    sample: Sample, variants: Sequence[int], options: InferenceOptions, pool: PromptPool | None
) -> list[Task]:
    """FileError where its mask is to be its own and it has none, or where no prompt agrees with it."""
    marked, tasks = _is_marked_healthy(sample), []
    if sample.healthy and not marked and options.masks == "own":
        raise FileError(sample.image, "healthy, without a soft_mask.png, which --masks own takes")
    if marked:
        sample = dataclasses.replace(sample, mask=sample.soft_mask)
    for k in variants:
        if sample.healthy and pool:
            given = pool.choose(sample, named_seed("prompt", options.seed, sample.sample_id, k))
        elif options.prompt and Match.read(options.match).how == "replace":
            given = matched(options.prompt, sample)
        else:
            given = MatchedPrompt(options.prompt or sample.prompt, None if options.prompt else sample, None)
        if given is None:
            raise FileError(sample.image.with_name("meta.json"), _disagreement(sample, options.prompt))
        own = MaskOrigin("own") if marked or not sample.healthy else None
        tasks.append(Task(sample, k, given.prompt, options.seed, given.source, given.how, marked, mask=own))
    return tasks


def _disagreement(sample: Sample, prompt: str | None) -> str:
    """Why no prompt, or not this one, can be made to agree with the image, and what to do."""
    facts = image_facts(sample)
    if prompt:
        why = contradiction(prompt, facts)
        return f"--prompt cannot be made to agree with its meta.json: {why}; leave that out of it, or give --match none"
    known = ", ".join(f"{key} {value}" for key, value in facts._asdict().items() if value)
    return f"no prompt can be made to agree with its meta.json ({known}); give --prompt, or --match none"


def _prompt_samples(path: Path) -> list[Sample]:
    if not path.exists():
        raise UsageError(
            f"{path}: does not exist; healthy samples need prompts: give --prompt TEXT, or annotations with diseased "
            "samples with --train_json"
        )
    return load_samples(path)[0]


def choose(samples: list[Sample], wanted: str | None) -> tuple[Sequence[Sample], str]:
    """The real samples of a class, or those that a text file lists by sample_id; and an adjective for them."""
    if wanted is not None and wanted not in CLASSES:
        return _listed(samples, Path(wanted)), "listed"
    synthetic = [sample for sample in samples if sample.synthetic]
    if synthetic:
        said = counted(len(synthetic), "synthetic sample is", "synthetic samples are")
        text = "warning: %s left out, the first: %s; a file that lists them (--choose) takes them"
        log.warning(text, said, synthetic[0].sample_id)
        samples = [sample for sample in samples if not sample.synthetic]
    if wanted == "all":
        return samples, "chosen"
    wanted = wanted or ("healthy" if any(sample.healthy for sample in samples) else "diseased")
    return [sample for sample in samples if sample.healthy == (wanted == "healthy")], wanted


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


def tasks_from_results(options: InferenceOptions, folder: Path, content: Contents) -> Plan:
    """The parents and masks of earlier results, with their prompts or another one, under the same names and noise."""
    results, rejects = load_samples(folder)
    results, whole, share = results[: options.limit], "", options.share or Share()
    if not share.alone:
        pairs, whole = _shared(share, results, 1, [], lambda s, _: f"{s.parent_id}__v{s.meta.get('variant')}")
        results = [result for result, _ in pairs]
        rejects = rejects if share.number == 1 else []
    tasks: list[Task] = []
    for result in results:
        try:
            tasks.append(_task_of(result, content))
        except FileError as error:
            rejects.append(Reject(result.sample_id, error.path, error.reason))
    if options.prompt:
        tasks = [dataclasses.replace(task, prompt=options.prompt, source=None, match=None) for task in tasks]
    if other := sum(result.meta.get("noise", 1) != NOISE for result in results):
        log.warning("warning: %s: the noise of %s is another version's", folder, counted(other, "result"))
    prompts = f"the prompt {options.prompt!r}" if options.prompt else "their own prompts"
    log.info("inpainting %s again in the masks of %s, with %s", counted(len(tasks), "image"), folder, prompts)
    return Plan(tasks, rejects, whole)


def _task_of(result: Sample, content: Contents) -> Task:
    """The task that makes an earlier result again.

    FileError if its meta.json does not say how it was made, or its parent's image is not there or another one.
    """
    folder = result.image.parent
    record: dict[str, Any] = {**result.meta, "parent_id": result.parent_id}
    wrong = wrong_value(record, RECORD_RULES | PASTE_RULES, [*RECORD_RULES])
    if wrong:
        raise FileError(folder / "meta.json", f"{wrong[0]}: {wrong[1]}; expected the meta.json of a result")
    image = parent_image(result, content)
    own = RESULT_KEYS - {"window", "spacing_mm"}
    meta = {key: value for key, value in result.meta.items() if key not in own}
    if is_marked(image):  # a result was made from a result
        meta[TRAINED_ON] = read_meta(image.with_name("meta.json")).get(TRAINED_ON, [])
    sample = dataclasses.replace(result, sample_id=record["parent_id"], image=image, parent_id=None, meta=meta)
    match, origin = record.get("prompt_match"), record.get("mask_from")  # older results have no origin
    mask = MaskOrigin(origin, record.get("mask_source"), record.get("mask_fallback")) if origin else None
    return Task(sample, record["variant"], result.prompt, record["seed"], result, match, fixed_mask=True, mask=mask)


def read_record(path: Path) -> dict[str, Any]:
    """The meta.json of a result, with all that --replay needs; MedSoftError naming what is missing."""
    record = read_json(path, "meta.json of a result")
    if isinstance(record, dict) and "method" in record and "checkpoint" not in record:
        how = f"was made without a checkpoint, by the method {record['method']}"
        raise MedSoftError(f"{path}: {how}; to make it again, repeat its command")
    missing = [key for key in REPLAY_RULES if not isinstance(record, dict) or key not in record]
    if missing:
        raise MedSoftError(f"{path}: has no {', '.join(missing)}; expected the meta.json of a result")
    wrong = wrong_value(record, REPLAY_RULES | PASTE_RULES, [*REPLAY_RULES])
    if wrong:
        raise MedSoftError(f"{path}: {wrong[0]}: {wrong[1]}; expected the meta.json of a result")
    return record


def task_from_metadata(path: Path, record: dict[str, Any], content: Contents) -> Task:
    """The task that makes the result of this meta.json again; MedSoftError unless its parent's image is unchanged."""
    task = _task_of(read_sample(path.parent.name, path.parent), content)
    log.info("inpainting %s again", path.parent)
    return dataclasses.replace(task, record=record)
