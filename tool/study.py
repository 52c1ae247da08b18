"""Measure whether synthetic images help a classifier, against fair controls: worlds x arms x ratios x seeds.

    python tool/study.py configs/study_phantom.yaml

A world is one set of patients (a phantom seed, or annotation files of yours), a generator one way of training and
drawing, an arm one way of training the classifier, a cell one classifier. Every cell runs once; started again, the
study goes on. Into the YAML's output_dir: results.csv (a row a cell), study.md and study.html (means, paired
differences, what they support), dose_response.png. All paths are relative to the repository root.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from run_stages import ROOT, Plan, Record, Step, check_keys, hang_up_with_terminal, load_record, parse_steps, run_steps

from ldm import cli
from ldm.errors import MedSoftError, UsageError
from ldm.files import content_id, read_json, read_text, write_json
from ldm.locks import exclusive

TEST_WORLDS = 10_000  # the test patients of phantom world n are those of phantom seed n + 10000
USES = ("mix", "pretrain", "duplicate_real")
PHANTOM_COUNTS = ("healthy", "diseased", "test_healthy", "test_diseased")


@dataclass(frozen=True)
class World:
    """One set of patients: its annotation files or folders and, for phantoms, the steps that make them."""

    name: str
    train: str
    val: str
    test: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Generator:
    """One way of training: stages in order (YAML and overrides, or ``merge``), and overrides for all of them."""

    stages: tuple[str, ...]
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One way of training the classifier; ``add``: a dataset of real images that joins the training set."""

    name: str
    use: str | None = None
    generator: str | None = None
    ratios: tuple[float | None, ...] = (None,)
    set: tuple[str, ...] = ()
    add: str | None = None


@dataclass(frozen=True)
class Design:
    """A study's YAML, checked."""

    name: str
    output_dir: str
    worlds: tuple[World, ...]
    seeds: tuple[int, ...]
    generators: dict[str, Generator]
    arms: tuple[Arm, ...]
    classifier: str
    set: tuple[str, ...]
    compare: dict[str, Any]
    checkpoint: str = ""
    model: str = ""
    draw: str = ""
    steps: tuple[Step, ...] = ()

    def folder(self, *parts: str) -> str:
        """A path below the output folder, as it stands in commands."""
        return "/".join([self.output_dir, *parts])


@dataclass(frozen=True)
class CellStep:
    """One cell and the step that runs it."""

    world: World
    arm: Arm
    ratio: float | None
    seed: int
    folder: str
    step: Step


@dataclass(frozen=True)
class Group:
    """The arms of a world that use the same generator (or none), as one plan: data, generator, cells."""

    plan: Plan
    world: World
    cells: tuple[CellStep, ...]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study, e.g. configs/study_phantom.yaml")
    made.add_argument("--collect", action="store_true", help="run nothing; report the cells that are finished")
    made.add_argument(
        "--overwrite", action="store_true", help="let a step replace what other settings have left, where it refuses to"
    )
    made.add_argument("--list", action="store_true", help="run nothing; show the steps and whether they are done")
    return made


def main(args: argparse.Namespace) -> int:
    """Run what is to do, report after every group; the code of the step that failed, 3 if one rejected inputs."""
    hang_up_with_terminal()
    design = load_design(args.study)
    groups = list(plan_groups(design))
    once = Plan("study", design.output_dir, design.steps)
    if args.list:
        return show([once, *(group.plan for group in groups)])
    if args.collect:
        return report(design, groups)
    again = shlex.join(["python", "tool/study.py", str(args.study)])
    run = partial(run_steps, again=again, overwrite=args.overwrite)
    with exclusive(ROOT / design.folder("study.lock"), f"{design.output_dir}: this study is running already"):
        code = run(load_record(once), step_names(design.steps))
        for group in groups:
            code = code or run_group(design, groups, group, run)
    if code:
        return code
    rejecting = [g.plan.name for g in groups if cli.SOME_REJECTED in exit_codes(load_record(g.plan))]
    if rejecting:
        print(f"some inputs were rejected in: {', '.join(rejecting)} (listed beside their outputs)")
    return cli.SOME_REJECTED if rejecting else cli.DONE


def run_group(design: Design, groups: list[Group], group: Group, run: Callable[[Record, list[str]], int]) -> int:
    """Data first, then what is made from them in here, generator and cells, report; 0, or the failed step's code."""
    print(f"--- {group.plan.name}", flush=True)
    record = load_record(group.plan)
    code = run(record, step_names(group.world.steps))
    if code:
        return code
    check_unchanged(design, group.world)
    for arm in dict.fromkeys(cell.arm for cell in group.cells if cell.arm.add):
        add_real(design, group.world, arm)
    code = run(record, step_names(group.plan.steps[len(group.world.steps) :]))
    if not code:
        report(design, groups)
    return code


def step_names(steps: tuple[Step, ...]) -> list[str]:
    return [step.name for step in steps]


def exit_codes(record: Record) -> list[int | None]:
    return [record.known(step).get("exit_code") for step in record.plan.steps]


def show(plans: list[Plan]) -> int:
    """Print every step and whether it is done."""
    for plan in plans:
        record = load_record(plan)
        for step in plan.steps:
            print(f"{plan.name}: {step.name} ({'done' if record.done(step) else 'to do'}): {step.run}")
    return cli.DONE


def check_unchanged(design: Design, world: World) -> None:
    """UsageError unless the world's annotation files are there, and those its finished cells were made from."""
    path = ROOT / design.folder(world.name, "world.json")
    for name in ("train", "val", "test"):
        if not (ROOT / getattr(world, name)).exists():
            raise UsageError(f"world {world.name}: {getattr(world, name)} does not exist; give its {name} annotations")
    found = {name: content_id(ROOT / getattr(world, name)) for name in ("train", "val", "test")}
    known = read_json(path, "record of a world") if path.exists() else found
    for name, digest in found.items():
        if known.get(name) != digest:
            raise UsageError(
                f"{getattr(world, name)}: has changed since world {world.name} was begun; delete "
                f"{design.folder(world.name)}, or give the study another output_dir"
            )
    if not path.exists():
        write_json(path, found)


def added_path(design: Design, world: World, arm: Arm) -> str:
    return design.folder(world.name, f"train_{arm.name}.json")


def add_real(design: Design, world: World, arm: Arm) -> None:
    """Write the training annotations of the world with those of ``arm.add`` behind them, if they are not there yet."""
    from ldm.annotations import load_samples, write_annotations

    path = ROOT / added_path(design, world, arm)
    if path.exists():
        return
    if not (ROOT / arm.add).exists():
        raise UsageError(f"arms.{arm.name}.add: {arm.add} does not exist; name a dataset folder or annotation JSON")
    samples = [sample for source in (world.train, arm.add) for sample in load_samples(ROOT / source)[0]]
    write_annotations(path, samples)


# ------------------------------------------------------------------------------------------------------- plans


def plan_groups(design: Design) -> Iterator[Group]:
    """Groups in the order of their first arm, each for all worlds before the next."""
    used = dict.fromkeys(arm.generator for arm in design.arms)
    for generator in used:
        arms = [arm for arm in design.arms if arm.generator == generator]
        for world in design.worlds:
            name, *home = (f"{world.name}/{generator}", "generators", generator) if generator else (world.name,)
            cells = tuple(
                plan_cell(design, world, arm, ratio, seed)
                for seed in design.seeds  # another seed comes last: then nothing before it runs again
                for arm in arms
                for ratio in arm.ratios
            )
            made = generator_steps(design, world, generator) if generator else ()
            steps = (*world.steps, *made, *(cell.step for cell in cells))
            yield Group(Plan(name, design.folder(world.name, *home), steps), world, cells)


def generator_steps(design: Design, world: World, name: str) -> tuple[Step, ...]:
    """Convert, train the stages in order, draw. What stands before ``merge`` starts from the converted checkpoint,
    what stands behind it from the checkpoint before it."""
    generator, home = design.generators[name], design.folder(world.name, "generators", name)
    start = f"{home}/converted.ckpt"
    convert = ["tool/model_convert.py", "--input_path", design.checkpoint, "--output_path", start]
    steps = [command("convert", [*convert, "--config", design.model, *generator.set], start)]
    trained: list[str] = []
    for position, stage in enumerate(generator.stages):
        if stage == "merge":
            start = f"{home}/merged.ckpt"
            merge = ["tool/tool_merge_for_stage2.py", "--stage1_path", trained[0], "--input_path", trained[1]]
            steps.append(
                command("merge", [*merge, "--output_path", start, "--config", design.model, *generator.set], start)
            )
            continue
        config, *overrides = shlex.split(stage)
        stem = Path(config).stem
        train = ["ver_train.py", "--ckpt", start, "--config", config, "--save_path", f"{home}/{stem}"]
        train += ["--train_json", world.train, "--val_json", world.val]
        train += ["--cache_dir", design.folder(world.name, "feature_cache"), *overrides, *generator.set]
        trained.append(f"{home}/{stem}/last.ckpt")
        steps.append(command(stem, train, trained[-1]))
        start = start if "merge" in generator.stages[position:] else trained[-1]
    draw = ["dataset_infer.py", "--ckpt", start, "--config", design.model, "--output_dir", f"{home}/pictures"]
    draw += ["--train_json", world.train, *shlex.split(design.draw), *generator.set]
    return (*steps, command("draw", draw, f"{home}/pictures/inference.json"))


def plan_cell(design: Design, world: World, arm: Arm, ratio: float | None, seed: int) -> CellStep:
    """One classifier; its folder names arm, ratio and seed."""
    label = arm.name if ratio is None else f"{arm.name}_{ratio:g}"
    folder = design.folder(world.name, "cells", f"{label}_seed{seed}")
    values = {
        "train_json": added_path(design, world, arm) if arm.add else world.train,
        "val_json": world.val,
        "test_json": world.test,
        "output_dir": folder,
        "seed": seed,
    }
    if arm.use:
        values |= {"use_synthetic": arm.use, "ratio": ratio}
    if arm.generator:
        values["synthetic"] = [design.folder(world.name, "generators", arm.generator, "pictures")]
    given = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *design.set, *arm.set]
    words = ["classifier.py", design.classifier, *(word for each in given for word in ("--set", each))]
    return CellStep(world, arm, ratio, seed, folder, command(f"{label}_seed{seed}", words, f"{folder}/metrics.json"))


def command(name: str, words: list[str], makes: str) -> Step:
    return Step(name, shlex.join(["python", *words]), (makes,))


# ------------------------------------------------------------------------------------------------------- report


def report(design: Design, groups: list[Group]) -> int:
    """Write the report of all finished cells; MedSoftError if there is none."""
    from ldm.study import Comparison, Study, Treatment, read_cell, write_report

    cells, seconds = [], {}
    for group in groups:
        record = load_record(group.plan)
        for each in group.cells:
            found = read_cell(ROOT / each.folder, each.world.name, Treatment(each.arm.name, each.ratio), each.seed)
            if found is not None:
                cells.append(found)
                seconds[found.key] = record.known(each.step).get("seconds")
    planned = sum(len(group.cells) for group in groups)
    if not cells:
        raise MedSoftError(f"{design.output_dir}: none of the {planned} cells is finished; run the study first")
    study = Study(cells, Comparison(**design.compare))
    write_report(ROOT / design.output_dir, design.name, study, seconds, planned, generator_seconds(groups), commit())
    print(f"{design.folder('study.md')}: {len(cells)} of {planned} cells", flush=True)
    return cli.DONE


def commit() -> str:
    """The commit the study is run from, and whether files differ from it; "unknown" without git."""
    calls = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changed = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True).stdout for c in calls)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with local changes" if changed.strip() else "")


def generator_seconds(groups: list[Group]) -> dict[str, float]:
    """Seconds spent on each finished generator, by world/generator: conversion, stages, drawing."""
    found = {}
    for group in groups:
        record = load_record(group.plan)
        made = group.plan.steps[len(group.world.steps) : len(group.plan.steps) - len(group.cells)]
        if made and all(record.done(step) for step in made):
            found[group.plan.name] = sum(record.known(step)["seconds"] for step in made)
    return found


# ------------------------------------------------------------------------------------------------------- the YAML


def load_design(path: Path) -> Design:
    """Read a study, looked up in the working directory, then in the repository; UsageError for any fault in it."""
    found = path if path.is_file() or path.is_absolute() else ROOT / path
    values, where = read_layers(found), f"{found}: "
    texts = dict.fromkeys(("name", "output_dir", "classifier", "checkpoint", "model", "draw"), str)
    lists = dict.fromkeys(("seeds", "set", "steps"), list)
    sections = dict.fromkeys(("arms", "compare", "generators", "phantoms"), dict)
    optional = ("checkpoint", "model", "draw", "set", "steps", "generators", "phantoms")
    worlds = values.pop("worlds", None) if isinstance(values, dict) else None
    check_keys(values, texts | lists | sections, where, optional)
    values = {"set": [], "steps": [], "generators": {}, "phantoms": {}} | values
    values = place(values, values["output_dir"])
    for name in values["generators"]:
        for key in ("checkpoint", "model"):
            if key not in values:
                raise UsageError(f"{where}{key}: expected a path, since the generator {name} needs it; found none")
    arms = tuple(parse_arm(name, item, values["generators"], where) for name, item in values["arms"].items())
    return Design(
        **{key: values[key] for key in texts if key in values},
        worlds=parse_worlds(worlds, values["phantoms"], values["output_dir"], where),
        seeds=tuple(whole_numbers(values["seeds"], f"{where}seeds: ")),
        generators={name: parse_generator(name, item, where) for name, item in values["generators"].items()},
        arms=arms,
        set=words(values["set"], f"{where}set: "),
        compare=parse_compare(values["compare"], arms, where),
        steps=parse_steps(values["steps"], where) if values["steps"] else (),
    )


def read_layers(path: Path) -> Any:
    """The YAML's keys over those of its ``base:``."""
    import yaml

    try:
        values = yaml.safe_load(read_text(path, "study"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str) or (path.parent / base).resolve() == path.resolve():
        raise UsageError(f"{path}: base: expected another study's YAML, found {base!r}")
    below = read_layers(path.parent / base)
    return {**below, **values} if isinstance(below, dict) else below


def place(value: Any, output_dir: str) -> Any:
    """``value`` with {output_dir} replaced in all its texts."""
    if isinstance(value, dict):
        return {key: place(each, output_dir) for key, each in value.items()}
    if isinstance(value, list):
        return [place(each, output_dir) for each in value]
    return value.replace("{output_dir}", output_dir) if isinstance(value, str) else value


def parse_worlds(worlds: Any, phantoms: dict[str, Any], output_dir: str, where: str) -> tuple[World, ...]:
    """Phantom worlds from a list of seeds, or others from annotation files by name."""
    if isinstance(worlds, dict) and worlds:
        keys = ("train_json", "val_json", "test_json")
        for name, files in worlds.items():
            check_keys(files, dict.fromkeys(keys, str), f"{where}worlds.{name}: ")
        return tuple(World(plain(name, f"{where}worlds"), *map(files.get, keys)) for name, files in worlds.items())
    if not isinstance(worlds, list) or not worlds:
        raise UsageError(f"{where}worlds: expected phantom seeds, or names with annotation files; found {worlds!r}")
    seeds = whole_numbers(worlds, f"{where}worlds: ")
    if max(seeds) >= TEST_WORLDS:
        raise UsageError(
            f"{where}worlds: expected seeds below {TEST_WORLDS}, found {max(seeds)}; others are test worlds"
        )
    wanted = {*PHANTOM_COUNTS, "fractions"}
    if set(phantoms) != wanted:
        raise UsageError(f"{where}phantoms: expected the keys {', '.join(sorted(wanted))}, found {phantoms!r}")
    if not isinstance(phantoms["fractions"], list) or len(phantoms["fractions"]) != 3:
        raise UsageError(f"{where}phantoms.fractions: expected three shares, found {phantoms['fractions']!r}")
    whole_numbers([phantoms[key] for key in PHANTOM_COUNTS], f"{where}phantoms: ", different=False)
    return tuple(phantom_world(seed, phantoms, output_dir) for seed in seeds)


def phantom_world(seed: int, counts: dict[str, Any], output_dir: str) -> World:
    """Patients to train and validate on, split by patient, and many others to test on."""
    name, home = f"world_{seed}", f"{output_dir}/world_{seed}"
    make = ["tool/make_phantoms.py", "--output_dir"]
    own = [f"{home}/phantoms", "--seed", seed, "--healthy", counts["healthy"], "--diseased", counts["diseased"]]
    test = [f"{home}/test", "--seed", seed + TEST_WORLDS, "--healthy", counts["test_healthy"]]
    split = ["ver_openImagesDatasets.py", "--root_dir", f"{home}/phantoms", "--output_file", f"{home}/annotations.json"]
    split += ["--fractions", *counts["fractions"]]
    steps = (
        command("phantoms", [*make, *map(str, own)], f"{home}/phantoms/phantoms.json"),
        command("prepare", [str(word) for word in split], f"{home}/annotations_train.json"),
        command(
            "test", [*make, *map(str, test), "--diseased", str(counts["test_diseased"])], f"{home}/test/phantoms.json"
        ),
    )
    return World(name, f"{home}/annotations_train.json", f"{home}/annotations_val.json", f"{home}/test", steps)


def parse_generator(name: str, item: Any, where: str) -> Generator:
    check_keys(item, {"stages": list, "set": list}, f"{where}generators.{plain(name, where)}: ", ("set",))
    here = f"{where}generators.{name}.stages: "
    stages = words(item["stages"], here)
    if "merge" in stages and (stages.index("merge") != 2 or stages.count("merge") > 1):
        raise UsageError(f"{here}merge joins the two stages before it; expected it once, as the third")
    stems = [Path(stage.split()[0]).stem for stage in stages]
    if len(set(stems)) < len(stems):
        raise UsageError(f"{here}two stages have the same YAML name ({', '.join(stems)}); names must differ")
    return Generator(stages, words(item.get("set", []), f"{where}generators.{name}.set: "))


def parse_arm(name: str, item: Any, generators: dict[str, Any], where: str) -> Arm:
    here = f"{where}arms.{plain(name, where)}: "
    kinds = {"use": str, "generator": str, "ratios": list, "set": list, "add": str}
    check_keys(item, kinds, here, tuple(kinds))
    use, generator, ratios = item.get("use"), item.get("generator"), item.get("ratios")
    if use is not None and use not in USES:
        raise UsageError(f"{here}use: expected one of {', '.join(USES)}, found {use!r}")
    if generator is not None and generator not in generators:
        raise UsageError(f"{here}generator: expected one of {', '.join(generators)}, found {generator!r}")
    if (generator is not None) != (use in ("mix", "pretrain")):
        raise UsageError(f"{here}expected use: mix or pretrain together with a generator; found {item!r}")
    if (ratios is None) != (use is None):
        raise UsageError(f"{here}expected ratios together with use; found {item!r}")
    for ratio in ratios or ():
        if type(ratio) not in (int, float) or not ratio > 0:
            raise UsageError(f"{here}ratios: expected numbers above 0, found {ratio!r}")
    if ratios == [] or len(set(ratios or ())) < len(ratios or ()):
        raise UsageError(f"{here}ratios: expected at least one, each once; found {ratios!r}")
    given = tuple(float(ratio) for ratio in ratios) if ratios else (None,)
    return Arm(name, use, generator, given, words(item.get("set", []), f"{here}set: "), item.get("add"))


def parse_compare(item: dict[str, Any], arms: tuple[Arm, ...], where: str) -> dict[str, Any]:
    """Names of the arms to compare, and the ratio or None."""
    here, names = f"{where}compare", [arm.name for arm in arms]
    if set(item) != {"baseline", "control", "main", "ratio"}:
        raise UsageError(f"{here}: expected the keys baseline, control, main, ratio; found {item!r}")
    for key in ("baseline", "control", "main"):
        if item[key] not in names:
            raise UsageError(f"{here}.{key}: expected one of the arms {', '.join(names)}, found {item[key]!r}")
    main = arms[names.index(item["main"])]
    if item["ratio"] is not None and item["ratio"] not in main.ratios:
        raise UsageError(f"{here}.ratio: expected a ratio of {main.name} or null, found {item['ratio']!r}")
    return {**item, "ratio": None if item["ratio"] is None else float(item["ratio"])}


def words(items: list[Any], where: str) -> tuple[str, ...]:
    for item in items:
        if not isinstance(item, str) or not item.strip():
            raise UsageError(f"{where}expected texts, found {item!r}")
    return tuple(items)


def whole_numbers(items: list[Any], where: str, different: bool = True) -> list[int]:
    if not items or not all(type(item) is int and item >= 0 for item in items):
        raise UsageError(f"{where}expected whole numbers of at least 0, found {items!r}")
    if different and len(set(items)) < len(items):
        raise UsageError(f"{where}expected different numbers, found {items!r}")
    return items


def plain(name: Any, where: str) -> str:
    """A name that can be a folder's."""
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise UsageError(f"{where}: expected names of letters, digits, - and _, found {name!r}")
    return name


if __name__ == "__main__":
    cli.run(build_parser(), main)
