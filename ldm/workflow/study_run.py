"""Running a study: its worlds and groups in order, what has changed in between refused, a report after every group."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypedDict

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id, fingerprint
from ldm.core.paths import ROOT
from ldm.core.run_folder import RunFolder
from ldm.core.schema import Values
from ldm.workflow.plan_run import hang_up_with_terminal, run_steps, show_steps
from ldm.workflow.plans import Plan, PlanRecord, PlanStep, commit, growing_folder
from ldm.workflow.study_design import (
    CellStep,
    Design,
    Group,
    JudgeStep,
    World,
    added_path,
    load_design,
    once_for,
    plan_groups,
    settings_of,
    words_of,
)
from ldm.workflow.study_hypotheses import outcomes
from ldm.workflow.study_jobs import run_side_by_side
from ldm.workflow.study_keys import Arm, check_hypothesis
from ldm.workflow.study_results import DrawingKey, Drawings, Key, Study, Treatment, read_cell, read_drawing
from ldm.workflow.study_rows import ELSEWHERE, read_rows, what_rows_say, with_rows_from_elsewhere


def run_study(
    path: Path, worlds: Sequence[str] | None, jobs: int, collect: bool, overwrite: bool, list_only: bool
) -> int:
    """Run what is to do, report after every group; the code of the step that failed, 3 if one rejected inputs.

    Of ``worlds`` only, if given: other processes may run others at the same time, as this one lets ``jobs`` of them do.
    Where other machines have computed all of them there is the report alone. ``collect`` reports what is finished in
    all worlds and runs nothing, ``list_only`` shows the steps; ``overwrite`` lets a step replace what others have left.
    """
    hang_up_with_terminal()
    design = load_design(path)
    other_studies(design)  # refused before anything runs
    groups = list(plan_groups(design))
    check_worlds(groups, worlds)
    once = once_plan(design)
    if list_only:
        return list_study(design, [group for group in groups if not worlds or group.world.name in worlds])
    if collect:
        return report(design, groups)
    chosen = chosen_worlds(design, groups, worlds)
    if not chosen:
        return report(design, groups)
    if jobs > 1 and len(chosen) > 1:
        return run_side_by_side(path, design.keys.output_dir, chosen, jobs, overwrite)
    mine = [group for group in groups if group.world.name in chosen]
    run = partial(run_steps, again=shlex.join(["python", "tool/study.py", str(path)]), overwrite=overwrite)
    with ExitStack() as locks:
        for world in dict.fromkeys(group.world for group in mine):
            locks.enter_context(world_folder(design, world).lock())
        with whole_study(design):
            code = run(PlanRecord(once), [step.name for step in design.steps])
            if not code:
                check_judge_exists(design)
        for group in mine:
            code = code or run_group(design, groups, group, run)
    return code or say_rejects(design, once, mine)


def once_plan(design: Design) -> Plan:
    """What is made once for all worlds."""
    return Plan("study", design.keys.output_dir, design.steps)


def list_study(design: Design, groups: Sequence[Group]) -> int:
    """Print every step and whether it is done."""
    once = PlanRecord(once_plan(design))
    anew = show_steps(once)
    for group in groups:
        record = PlanRecord(group.plan)
        show_steps(record, older_in(design, once, record, group, anew))
    return cli.DONE


def older_in(
    design: Design, once: PlanRecord, record: PlanRecord, group: Group, anew: Sequence[PlanStep] = ()
) -> set[PlanStep]:
    """``older_steps`` behind all cells and judgements of a group."""
    read: list[CellStep | JudgeStep] = [*group.cells, *group.judged]
    return {step for each in read for step in older_steps(design, once, record, each, anew)}


def older_steps(
    design: Design, once: PlanRecord, record: PlanRecord, each: CellStep | JudgeStep, anew: Sequence[PlanStep] = ()
) -> list[PlanStep]:
    """Of the steps behind a cell or a judgement, those older than something made ``once`` that they begin with.

    And those that began with what other settings made, or what is to be made ``anew``. Not the judge's own: of its
    weights the content is compared.
    """
    commands = {step: step.run for step in each.before}
    if isinstance(each, CellStep):
        commands[each.step] = words_of(each)

    def older(step: PlanStep, first: PlanStep) -> bool:
        if first in anew or first.name not in once.entries:
            return first in anew
        known = once.known(first)
        return not known or known["finished"] > record.entries[step.name]["finished"]

    made = [step for step in commands if step.name in record.entries]
    return [step for step in made if any(older(step, first) for first in once_for(design, commands[step]))]


def check_worlds(groups: Sequence[Group], worlds: Sequence[str] | None) -> None:
    """UsageError for a name that is none of the study's worlds."""
    known = dict.fromkeys(group.world.name for group in groups)
    for name in worlds or ():
        if name not in known:
            raise UsageError(f"--worlds {name}: no such world in this study; it has {', '.join(known)}")


def chosen_worlds(design: Design, groups: Sequence[Group], worlds: Sequence[str] | None) -> list[str]:
    """The worlds to run: these, or all of which no other machine's rows are there; UsageError for one that has some."""
    folder = ROOT / design.keys.output_dir
    brought = {each.world for found in read_rows(read_study(design, groups)[0], folder) for each in found}
    known = dict.fromkeys(group.world.name for group in groups)
    for name in worlds or ():
        if name in brought:
            raise UsageError(f"--worlds {name}: another machine's rows of it are in {folder / ELSEWHERE}; remove them")
    if brought and not worlds:
        print(f"not run here, as rows of them are in {folder / ELSEWHERE}: {', '.join(sorted(brought))}", flush=True)
    return [name for name in known if (name in worlds if worlds else name not in brought)]


def check_judge_exists(design: Design) -> None:
    """UsageError unless the judge, which the study's steps should have made, is there."""
    judge = design.keys.judge
    if judge and design.keys.read_by_judge and not (ROOT / judge.weights).exists():
        cure = "name a saved classifier, or a step that makes it"
        raise UsageError(f"judge.weights: {judge.weights} does not exist; {cure}")


def say_rejects(design: Design, once: Plan, groups: Sequence[Group]) -> int:
    """Name the plans of which a step rejected inputs, and the lists of images that arms could not add; 3, or 0."""
    rejecting = []
    for record in map(PlanRecord, (once, *(group.plan for group in groups))):
        if any(record.known(step).get("exit_code") == cli.SOME_REJECTED for step in record.plan.steps):
            rejecting.append(record.plan.name)
    lists = [rejects_of(design, group.world, arm) for group in groups for arm in adding(group)]
    rejecting += [str(path) for path in lists if path.exists()]
    if rejecting:
        print(f"some inputs were rejected in: {', '.join(rejecting)} (listed beside their outputs)")
    return cli.SOME_REJECTED if rejecting else cli.DONE


def whole_study(design: Design) -> AbstractContextManager[None]:
    """For what is the whole study's, not a world's: one process at a time, and the others wait."""
    folder = ROOT / design.keys.output_dir
    return growing_folder(folder, "stages.json", "steps", folder / "study.lock").lock(wait=True)


def world_folder(design: Design, world: World) -> RunFolder:
    """The folder of a world, which one process at a time fills; world.json says what its cells are made from."""
    path = ROOT / design.folder(world.name)
    return growing_folder(path, "world.json", "cells", path.with_name(f"{world.name}.lock"))


def run_group(design: Design, groups: list[Group], group: Group, run: Callable[[PlanRecord, list[str]], int]) -> int:
    """Data first, then what is made from them in here, generator and cells, report; 0, or the failed step's code.

    What is older than something made once that it begins with runs again, and all after it.
    """
    print(f"--- {group.plan.name}", flush=True)
    record, once = PlanRecord(group.plan), PlanRecord(once_plan(design))
    if older := older_in(design, once, record, group):
        record.begin(min(older, key=group.plan.steps.index))
    names, made = [step.name for step in group.plan.steps], len(group.world.steps)
    if code := run(record, names[:made]):
        return code
    check_unchanged(design, group.world, adding(group))
    for arm in adding(group):
        add_real(design, group.world, arm)
    code = run(record, names[made:])
    if not code:
        with whole_study(design):
            report(design, groups)
    return code


def check_unchanged(design: Design, world: World, added: list[Arm]) -> None:
    """UsageError unless the world's annotations, and the real images that arms add, are those its cells were made from.

    Of a file the content is compared, of a dataset folder the names and sizes of its files.
    """
    sources = {name: getattr(world, name) for name in ("train", "val", "test")}
    for name, source in sources.items():
        if not (ROOT / source).exists():
            raise UsageError(f"world {world.name}: {source} does not exist; give its {name} annotations")
    for arm in added:
        sources[f"arms.{arm.name}.add"] = str(arm.add)
        if not (ROOT / str(arm.add)).exists():
            raise UsageError(f"arms.{arm.name}.add: {arm.add} does not exist; name a dataset folder or annotation JSON")
    folder = world_folder(design, world)
    known = folder.open({name: source_id(ROOT / source) for name, source in sources.items()}) or {}
    folder.claim(**known)


def source_id(path: Path) -> str | None:
    """Changes with a file's content, or with the names and sizes of the files in a folder."""
    if not path.is_dir():
        return content_id(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint([[file.relative_to(path).as_posix(), file.stat().st_size] for file in files])


def adding(group: Group) -> list[Arm]:
    """The arms of the group that add real images."""
    return list(dict.fromkeys(cell.arm for cell in group.cells if cell.arm.add))


def rejects_of(design: Design, world: World, arm: Arm) -> Path:
    """The list of the images that an arm should add and that cannot be read."""
    return (ROOT / added_path(design, world, arm)).with_suffix(".rejects.json")


def add_real(design: Design, world: World, arm: Arm) -> None:
    """Write the training annotations of the world with those of ``arm.add`` behind them, if they are not there yet.

    What of ``arm.add`` cannot be read is listed beside them, in ``<name>.rejects.json``.
    """
    from ldm.data.annotations import load_samples, write_annotations, write_rejects

    path = ROOT / added_path(design, world, arm)
    if path.exists():
        return
    (own, _), (more, rejects) = load_samples(ROOT / world.train), load_samples(ROOT / str(arm.add))
    write_rejects(rejects_of(design, world, arm), rejects)
    write_annotations(path, [*own, *more])


def report(design: Design, groups: list[Group]) -> int:
    """Write the report of all that is finished with these settings; MedSoftError if nothing is."""
    from ldm.workflow.study_report import timing, write_study_report

    study, outdated = read_study(design, groups)
    judged, parts = study.drawings, []
    if study.planned:
        parts.append(f"{len(study.cells)} of {len(study.planned)} cells are finished")
    if judged.planned:
        parts.append(f"{len(judged.judged)} of {len(judged.planned)} generators' drawings are judged")
    if outdated:
        parts.append(f"left out, as other settings or an older generator made them: {outdated}")
    if judged.by_another_judge:
        cure = "delete judged.json beside their pictures, then run the study again"
        parts.append(f"left out, as another judge has read them: {judged.by_another_judge} ({cure})")
    cells, drawings = read_rows(study, ROOT / design.keys.output_dir)
    if cells or drawings:
        parts.append(what_rows_say(study, cells, drawings, commit()))
    state = "; ".join(parts)
    if not study.cells and not judged.judged:
        raise MedSoftError(f"{design.keys.output_dir}: {state}; run the study first")
    seconds = [cell.seconds for cell in study.cells if cell.seconds is not None]
    notes = [f"{state}. Reported at commit {commit()}.", f"Time: {timing(seconds, generator_seconds(groups))}"]
    tested = outcomes(design.keys.hypotheses, study, other_studies(design))
    folder, tested_by = ROOT / design.keys.output_dir, design.keys.tested_by
    write_study_report(folder, design.keys.name, study, notes, tested, tested_by)
    print(f"{design.folder('study.md')}: {state}", flush=True)
    return cli.DONE


def read_study(design: Design, groups: Sequence[Group]) -> tuple[Study, int]:
    """The finished cells and judged drawings of these settings, and how many others or older generators made.

    With those of other machines, see ``read_rows``.
    """
    drawings, settings, older = read_drawings(design, groups)
    cells, planned, outdated, once = [], [], 0, PlanRecord(once_plan(design))
    for group in groups:
        record = PlanRecord(group.plan)
        for each in group.cells:
            treatment, generated = Treatment(each.arm.name, each.ratio), each.made.seed if each.made else None
            planned.append((each.world.name, treatment, generated, each.seed))
            settings[planned[-1]] = settings_of(design, each)
            if record.outdated(each.step, each.before) or older_steps(design, once, record, each):
                outdated += 1
                continue
            found = read_cell(ROOT / each.folder, each.world.name, treatment, each.seed)
            if found is not None:
                found = replace(found, generator_seed=generated, seconds=record.known(each.step).get("seconds"))
                cells.append(replace(found, **origin(record, each.step, settings[found.key])))
    study = Study(cells, design.keys.compare, frozenset(planned), drawings, settings)
    return with_rows_from_elsewhere(study, ROOT / design.keys.output_dir), outdated + older


class Origin(TypedDict):
    """Where, by which code and with which settings a step was run; empty where the record does not say it."""

    machine: str
    commit: str
    settings: str


def origin(record: PlanRecord, step: PlanStep, settings: str) -> Origin:
    """What the record says of a step; ``settings``: those of the study."""
    known = record.known(step)
    machine, made_by = known.get("machine", ""), known.get("commit", "")
    return {"machine": machine, "commit": made_by, "settings": settings if known else ""}


def read_drawings(design: Design, groups: Sequence[Group]) -> tuple[Drawings, dict[Key | DrawingKey, str], int]:
    """What this judge says of drawings, the settings of all that are planned, and how many judgements are of other
    settings or older generators."""
    drawings, planned, outdated, others, once = [], [], 0, 0, PlanRecord(once_plan(design))
    settings: dict[Key | DrawingKey, str] = {}
    judge = content_id(ROOT / design.keys.judge.weights) if design.keys.judge else None
    for group in groups:
        record = PlanRecord(group.plan)
        for each in group.judged:
            made = each.world.name, each.made.name, each.made.seed
            planned.append(made)
            settings[made] = settings_of(design, each)
            if record.outdated(each.step, each.before) or older_steps(design, once, record, each):
                outdated += 1
                continue
            found = read_drawing(ROOT / each.file, *made, judge)
            others += found is None and (ROOT / each.file).exists()
            if found is not None:
                drawings.append(replace(found, **origin(record, each.step, settings[made])))
    return Drawings(drawings, frozenset(planned), others), settings, outdated


def other_studies(design: Design) -> dict[str, Study]:
    """What is finished of the studies that hypotheses name; UsageError for one that is faulty or lacks an arm.

    So for the study that should test this one's worlds, and does not.
    """
    check_tested_by(design)
    found = {}
    for name, hypothesis in design.keys.hypotheses.items():
        if hypothesis.study is None:
            continue
        other = load_design(ROOT / hypothesis.study)
        check_hypothesis(f"hypotheses.{name}", replace(hypothesis, study=None), other.keys, Values(hypothesis.study))
        if hypothesis.study not in found:
            found[hypothesis.study] = read_study(other, list(plan_groups(other)))[0]
    return found


def check_tested_by(design: Design) -> None:
    """UsageError unless the study that ``tested_by`` names has a hypothesis about this one."""
    path = design.keys.tested_by
    if path is None:
        return
    named = [each.study for each in load_design(ROOT / path).keys.hypotheses.values() if each.study]
    if design.keys.output_dir not in [load_design(ROOT / study).keys.output_dir for study in named]:
        raise UsageError(f"tested_by: expected a study with a hypothesis about this one (study: ...), found {path}")


def generator_seconds(groups: list[Group]) -> dict[str, float]:
    """Seconds spent on each finished generator, by world/generator: conversion, stages, inference."""
    found = {}
    for group in groups:
        record = PlanRecord(group.plan)
        made = group.drawing
        if made and all(record.done(step) for step in made):
            found[group.plan.name] = sum(record.known(step)["seconds"] for step in made)
    return found
