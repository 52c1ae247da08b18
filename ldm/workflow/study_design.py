"""The design of a study: its YAML, checked, and the steps that its worlds, generators and cells come from. No torch."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ldm.core.schema import Command, Rule, Text, Values, Whole, build, read_yaml
from ldm.workflow.plans import Plan, PlanStep, checked_steps

TEST_WORLDS = 10_000  # the test patients of phantom world n are those of phantom seed n + 10000

FolderName = Annotated[
    str, Rule(lambda name: name.replace("_", "").replace("-", "").isalnum(), "a name of letters, digits, - and _")
]
Seeds = Annotated[list[Whole], Rule(lambda seeds: 0 < len(seeds) == len(set(seeds)), "different whole numbers")]
Shares = Annotated[list[int | float], Rule(lambda shares: len(shares) == 3, "three shares")]
Ratio = Annotated[float, Rule(lambda ratio: ratio > 0, "a number above 0")]
Ratios = Annotated[tuple[Ratio, ...], Rule(lambda each: 0 < len(each) == len(set(each)), "ratios, each once")]
Use = Literal["mix", "pretrain", "duplicate_real"]


@dataclass(frozen=True)
class World:
    """One set of patients: its annotation files or folders and, for phantoms, the steps that make them."""

    name: str
    train: str
    val: str
    test: str
    steps: tuple[PlanStep, ...] = ()


@dataclass(frozen=True)
class Generator:
    """One way of training: stages in order (YAML and overrides, or ``merge``), and overrides for all of them."""

    stages: tuple[Command, ...]
    set: tuple[Text, ...] = ()


@dataclass(frozen=True)
class ArmKeys:
    """What the YAML says of an arm; ``add``: a dataset of real images that joins the training set."""

    use: Use | None = None
    generator: str | None = None
    ratios: Ratios | None = None
    set: tuple[Text, ...] = ()
    add: Text | None = None


@dataclass(frozen=True)
class Arm(ArmKeys):
    """One way of training the classifier, on real images alone (ratio None) or with synthetic ones."""

    name: str = ""

    @property
    def all_ratios(self) -> tuple[float | None, ...]:
        """Its ratios, or None alone."""
        return self.ratios or (None,)


@dataclass(frozen=True)
class WorldFiles:
    """The annotations of a world that is not made of phantoms."""

    train_json: Text
    val_json: Text
    test_json: Text


@dataclass(frozen=True)
class Phantoms:
    """How many patients a phantom world has, and which shares of them train, validate and test."""

    healthy: Whole
    diseased: Whole
    test_healthy: Whole
    test_diseased: Whole
    fractions: Shares


@dataclass(frozen=True)
class Compared:
    """``main`` at ``ratio`` minus ``control`` is the claim, ``baseline`` has nothing added.

    Ratio None: the one that does best on validation.
    """

    baseline: str
    control: str
    main: str
    ratio: float | None


@dataclass(frozen=True)
class StudyKeys:
    """What the YAML says of a study. Paths start at the repository root."""

    name: Text
    output_dir: Text
    worlds: Seeds | dict[FolderName, WorldFiles]
    seeds: Seeds
    classifier: Text
    arms: dict[FolderName, ArmKeys]
    compare: Compared
    generators: dict[FolderName, Generator] = field(default_factory=dict)
    phantoms: Phantoms | None = None
    checkpoint: Text | None = None
    model: Text | None = None
    draw: Command | None = None
    set: tuple[Text, ...] = ()
    steps: tuple[PlanStep, ...] = ()


@dataclass(frozen=True)
class Design:
    """A study, checked; ``keys`` as they stand in its YAML."""

    keys: StudyKeys
    worlds: tuple[World, ...]
    arms: tuple[Arm, ...]
    steps: tuple[PlanStep, ...] = ()

    def folder(self, *parts: str) -> str:
        """A path below the output folder, as it stands in commands."""
        return "/".join([self.keys.output_dir, *parts])


@dataclass(frozen=True)
class CellStep:
    """One cell and the step that runs it."""

    world: World
    arm: Arm
    ratio: float | None
    seed: int
    folder: str
    step: PlanStep


@dataclass(frozen=True)
class Group:
    """The arms of a world that use the same generator (or none), as one plan: data, generator, cells."""

    plan: Plan
    world: World
    cells: tuple[CellStep, ...]


def plan_groups(design: Design) -> Iterator[Group]:
    """Groups in the order of their first arm, each for all worlds before the next."""
    used = dict.fromkeys(arm.generator for arm in design.arms)
    for generator in used:
        arms = [arm for arm in design.arms if arm.generator == generator]
        for world in design.worlds:
            name, *home = (f"{world.name}/{generator}", "generators", generator) if generator else (world.name,)
            cells = tuple(
                plan_cell(design, world, arm, ratio, seed)
                for seed in design.keys.seeds  # another seed comes last: then nothing before it runs again
                for arm in arms
                for ratio in arm.all_ratios
            )
            made = generator_steps(design, world, generator) if generator else ()
            steps = (*world.steps, *made, *(cell.step for cell in cells))
            yield Group(Plan(name, design.folder(world.name, *home), steps), world, cells)


def added_path(design: Design, world: World, arm: Arm) -> str:
    """The JSON of the images that an arm adds to the training set."""
    return design.folder(world.name, f"train_{arm.name}.json")


def generator_steps(design: Design, world: World, name: str) -> tuple[PlanStep, ...]:
    """Convert, train the stages in order, inpaint. What stands before ``merge`` starts from the converted checkpoint,
    what stands behind it from the checkpoint before it."""
    generator, home = design.keys.generators[name], design.folder(world.name, "generators", name)
    start = f"{home}/converted.ckpt"
    convert = ["tool/model_convert.py", "--input_path", str(design.keys.checkpoint), "--output_path", start]
    model = ["--config", str(design.keys.model), *generator.set]
    steps = [command("convert", [*convert, *model], start)]
    trained: list[str] = []
    for position, stage in enumerate(generator.stages):
        if stage == "merge":
            start = f"{home}/merged.ckpt"
            merge = ["tool/tool_merge_for_stage2.py", "--stage1_path", trained[0], "--input_path", trained[1]]
            steps.append(command("merge", [*merge, "--output_path", start, *model], start))
            continue
        config, *overrides = shlex.split(stage)
        stem = Path(config).stem
        train = ["ver_train.py", "--ckpt", start, "--config", config, "--save_path", f"{home}/{stem}"]
        train += ["--train_json", world.train, "--val_json", world.val]
        train += ["--cache_dir", design.folder(world.name, "feature_cache"), *overrides, *generator.set]
        trained.append(f"{home}/{stem}/last.ckpt")
        steps.append(command(stem, train, trained[-1]))
        start = start if "merge" in generator.stages[position:] else trained[-1]
    words = ["dataset_infer.py", "--ckpt", start, "--config", str(design.keys.model)]
    words += ["--output_dir", f"{home}/pictures"]
    words += ["--train_json", world.train, *shlex.split(design.keys.draw or ""), *generator.set]
    return (*steps, command("draw", words, f"{home}/pictures/inference.json"))


def plan_cell(design: Design, world: World, arm: Arm, ratio: float | None, seed: int) -> CellStep:
    """One classifier; its folder names arm, ratio and seed."""
    name = f"{label(arm, ratio)}_seed{seed}"
    folder = design.folder(world.name, "cells", name)
    synthetic = [design.folder(world.name, "generators", arm.generator, "pictures")] if arm.generator else []
    values = {
        "train_json": added_path(design, world, arm) if arm.add else world.train,
        "val_json": world.val,
        "test_json": world.test,
        "output_dir": folder,
        "seed": seed,
        "synthetic": synthetic,  # always said, so that the classifier's JSON cannot add images to an arm
        "use_synthetic": arm.use or "mix",
        "ratio": ratio,
    }
    given = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *design.keys.set, *arm.set]
    words = ["classifier.py", design.keys.classifier, *(word for each in given for word in ("--set", each))]
    return CellStep(world, arm, ratio, seed, folder, command(name, words, f"{folder}/metrics.json"))


def label(arm: Arm, ratio: float | None) -> str:
    """What names the cells of an arm at this ratio."""
    return arm.name if ratio is None else f"{arm.name}_{ratio:g}"


def command(name: str, words: list[str], makes: str) -> PlanStep:
    """A step that runs ``python`` with these words and leaves ``makes``."""
    return PlanStep(name, shlex.join(["python", *words]), (makes,))


def load_design(path: Path) -> Design:
    """Read a study, looked up in the working directory, then among the shipped ones; UsageError for any error in it."""
    values = read_yaml(path, "study", deep=False)
    output_dir = values.content.get("output_dir")
    if isinstance(output_dir, str):
        values.content = in_folder(values.content, output_dir)
    keys = build(StudyKeys, values)
    arms = tuple(Arm(**vars(each), name=name) for name, each in keys.arms.items())
    for arm in arms:
        check_arm(arm, keys, values)
    labels = [label(arm, ratio) for arm in arms for ratio in arm.all_ratios]
    twice = [each for each in labels if labels.count(each) > 1]
    if twice:
        raise values.error("arms", "arms whose cells have different names", twice[0])
    for name, generator in keys.generators.items():
        check_generator(name, generator, keys, values)
    check_compared(keys.compare, arms, values)
    steps = checked_steps(keys.steps, values) if keys.steps else ()
    return Design(keys, make_worlds(keys, values), arms, steps)


def in_folder(value: Any, output_dir: str) -> Any:
    """``value`` with {output_dir} replaced in all its texts."""
    if isinstance(value, dict):
        return {key: in_folder(each, output_dir) for key, each in value.items()}
    if isinstance(value, list):
        return [in_folder(each, output_dir) for each in value]
    return value.replace("{output_dir}", output_dir) if isinstance(value, str) else value


def make_worlds(keys: StudyKeys, values: Values) -> tuple[World, ...]:
    """Phantom worlds from a list of seeds, or others from annotation files by name."""
    if isinstance(keys.worlds, dict):
        if not keys.worlds:
            raise values.error("worlds", "phantom seeds, or names with annotation files", {})
        return tuple(World(name, *vars(files).values()) for name, files in keys.worlds.items())
    if max(keys.worlds) >= TEST_WORLDS:
        raise values.error("worlds", f"seeds below {TEST_WORLDS}; others are test worlds", max(keys.worlds))
    if keys.phantoms is None:
        raise values.error("phantoms", "how many patients a phantom world has", None)
    return tuple(phantom_world(seed, keys.phantoms, keys.output_dir) for seed in keys.worlds)


def phantom_world(seed: int, counts: Phantoms, output_dir: str) -> World:
    """Patients to train and validate on, split by patient, and many others to test on."""
    name, home = f"world_{seed}", f"{output_dir}/world_{seed}"
    make = ["tool/make_phantoms.py", "--output_dir"]
    own = [f"{home}/phantoms", "--seed", seed, "--healthy", counts.healthy, "--diseased", counts.diseased]
    test = [f"{home}/test", "--seed", seed + TEST_WORLDS, "--healthy", counts.test_healthy]
    test += ["--diseased", counts.test_diseased]
    split = ["ver_openImagesDatasets.py", "--root_dir", f"{home}/phantoms", "--output_file", f"{home}/annotations.json"]
    split += ["--fractions", *map(str, counts.fractions)]
    steps = (
        command("phantoms", [*make, *map(str, own)], f"{home}/phantoms/phantoms.json"),
        command("prepare", split, f"{home}/annotations_train.json"),
        command("test", [*make, *map(str, test)], f"{home}/test/phantoms.json"),
    )
    return World(name, f"{home}/annotations_train.json", f"{home}/annotations_val.json", f"{home}/test", steps)


def check_generator(name: str, generator: Generator, keys: StudyKeys, values: Values) -> None:
    """UsageError unless the stages can follow each other, and checkpoint and model say what they start from."""
    for key in ("checkpoint", "model"):
        if getattr(keys, key) is None:
            raise values.error(key, f"a path, since the generator {name} needs it", None)
    stages, here = generator.stages, f"generators.{name}.stages"
    if "merge" in stages and (stages.index("merge") != 2 or stages.count("merge") > 1):
        raise values.error(here, "merge once, as the third, since it joins the two stages before it", stages)
    stems = [Path(shlex.split(stage)[0]).stem for stage in stages]
    if len(set(stems)) < len(stems):
        raise values.error(here, "YAMLs of different names", stems)


def check_arm(arm: Arm, keys: StudyKeys, values: Values) -> None:
    """UsageError unless use, generator and ratios of the arm agree with each other."""
    here = f"arms.{arm.name}"
    if arm.generator is not None and arm.generator not in keys.generators:
        raise values.error(f"{here}.generator", f"one of {', '.join(keys.generators)}", arm.generator)
    if (arm.generator is not None) != (arm.use in ("mix", "pretrain")):
        raise values.error(here, "use: mix or pretrain together with a generator", vars(arm))
    if (arm.ratios is None) != (arm.use is None):
        raise values.error(here, "ratios together with use", vars(arm))


def check_compared(compare: Compared, arms: tuple[Arm, ...], values: Values) -> None:
    """UsageError unless the arms exist, and main and control have the ratios to compare."""
    by_name = {arm.name: arm for arm in arms}
    for key in ("baseline", "control", "main"):
        if getattr(compare, key) not in by_name:
            raise values.error(f"compare.{key}", f"one of the arms {', '.join(by_name)}", getattr(compare, key))
    baseline, control, main = by_name[compare.baseline], by_name[compare.control], by_name[compare.main]
    if baseline.use is not None:
        raise values.error("compare.baseline", "an arm without ratios", baseline.name)
    if main.ratios is None:
        raise values.error("compare.main", "an arm with ratios", main.name)
    if compare.ratio is not None and compare.ratio not in main.ratios:
        raise values.error("compare.ratio", f"a ratio of {main.name} or null", compare.ratio)
    needed = main.ratios if compare.ratio is None else (compare.ratio,)
    if not set(needed) <= set(control.all_ratios):
        asked = ", ".join(f"{ratio:g}" for ratio in needed)
        raise values.error("compare.control", f"an arm with the ratios {asked} of {main.name}", control.name)
