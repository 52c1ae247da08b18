"""The design of a study: its YAML, checked, and the steps that its worlds, generators and cells come from. No torch."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.core.files import fingerprint
from ldm.core.schema import Values, build, read_yaml
from ldm.workflow.plans import Plan, PlanStep, checked_steps
from ldm.workflow.study_keys import Arm, Phantoms, StudyKeys, check_keys

TEST_WORLDS = 10_000  # the test patients of phantom world n are those of phantom seed n + 10000


@dataclass(frozen=True)
class World:
    """One set of patients: its annotation files or folders and, for phantoms, the steps that make them."""

    name: str
    train: str
    val: str
    test: str
    steps: tuple[PlanStep, ...] = ()


@dataclass(frozen=True)
class Made:
    """A generator with one of the study's generator seeds; None where its words name none."""

    name: str
    seed: int | None = None

    def __str__(self) -> str:
        return self.name if self.seed is None else f"{self.name}_g{self.seed}"


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

    def home(self, world: World, made: Made) -> str:
        """The folder of a generator in a world; its images lie in ``pictures`` there."""
        return self.folder(world.name, "generators", str(made))

    def images(self, world: World, made: Made) -> str:
        """What a generator gives to classifiers and judge: the folder of its images, or the file of the chosen ones."""
        chosen = self.keys.generators[made.name].choose is not None
        return f"{self.home(world, made)}/{'chosen/kept.json' if chosen else 'pictures'}"

    def root(self, name: str) -> str:
        """The generator whose stages are trained for this one: itself, unless it draws with another's checkpoint."""
        return self.keys.generators[name].from_ or name

    def draw(self, name: str) -> str:
        """The words that a generator draws with."""
        return self.keys.generators[name].draw or self.keys.draw or ""

    def all_made(self, name: str | None) -> tuple[Made | None, ...]:
        """A generator with each generator seed, or once where none is named; None of an arm without a generator."""
        if name is None:
            return (None,)
        generator, seeds = self.keys.generators[name], self.keys.generator_seeds
        root = self.keys.generators[self.root(name)]
        words = [generator.run] if generator.run else [*(root.stages or ()), self.draw(name)]
        named = any("{seed}" in each for each in words)
        return tuple(Made(name, seed) for seed in seeds) if seeds and named else (Made(name),)

    def trained(self, made: Made) -> Made:
        """What a generator's stages are trained as: several may draw with the same checkpoint."""
        if self.keys.generators[made.name].run is not None:
            return made
        root = self.root(made.name)
        named = any("{seed}" in stage for stage in self.keys.generators[root].stages or ())
        return Made(root, made.seed if named else None)


@dataclass(frozen=True)
class CellStep:
    """One cell, the step that runs it, and what must not be newer than it."""

    world: World
    arm: Arm
    ratio: float | None
    seed: int
    folder: str
    step: PlanStep
    made: Made | None = None
    before: tuple[PlanStep, ...] = ()


@dataclass(frozen=True)
class JudgeStep:
    """The step in which the judge reads what a generator has drawn, the file it leaves, and what must not be newer."""

    world: World
    made: Made
    file: str
    step: PlanStep
    before: tuple[PlanStep, ...] = ()


@dataclass
class Inside:
    """What comes from the same stages: arms with their generators, and the generators whose drawings are judged."""

    arms: dict[tuple[Arm, Made | None], None] = field(default_factory=dict)
    judged: dict[Made, None] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The generators of a world that have the same stages (or none), as one plan: data, generators, cells, judge."""

    plan: Plan
    world: World
    cells: tuple[CellStep, ...]
    judged: tuple[JudgeStep, ...] = ()

    @property
    def drawing(self) -> tuple[PlanStep, ...]:
        """The steps that make the generators."""
        return self.plan.steps[len(self.world.steps) : len(self.plan.steps) - len(self.cells) - len(self.judged)]


def settings_of(design: Design, each: CellStep | JudgeStep) -> str:
    """Changes with all commands behind a cell or a judgement and with the repository's files that they name.

    It does not with the place of the output folder, which another machine may have elsewhere.
    """
    begun = once_for(design, *(step.run for step in each.before), words_of(each))
    steps, home = (*begun, *each.before, each.step), f"{design.keys.output_dir}/"
    words = [[word.replace(home, "") for word in step.settings[0]] for step in steps]
    return fingerprint([words, added_by(each).replace(home, ""), [step.settings[1] for step in steps]])[:16]


def once_for(design: Design, *commands: str) -> tuple[PlanStep, ...]:
    """Of the steps that run once, those that ``commands`` begin with: they name what it makes, or another one does."""
    said = " ".join(commands)
    found: tuple[PlanStep, ...] = ()
    for step in reversed(design.steps):
        folders = {str(Path(path).parent) for path in step.makes} - {design.keys.output_dir}
        if any(re.search(rf"{re.escape(path)}(?![\w.-])", said) for path in (*step.makes, *folders)):
            found, said = (step, *found), f"{step.run} {said}"
    return found


def words_of(each: CellStep | JudgeStep) -> str:
    """The command of a cell or a judgement, and the real images that the arm of a cell adds, which it does not name."""
    return f"{each.step.run} {added_by(each)}"


def added_by(each: CellStep | JudgeStep) -> str:
    """The real images that the arm of a cell adds."""
    return str(each.arm.add or "") if isinstance(each, CellStep) else ""


def plan_groups(design: Design) -> Iterator[Group]:
    """Groups in the order of their first arm, each for all worlds before the next."""
    used: dict[Made | None, Inside] = {}
    for arm in design.arms:
        for made in design.all_made(arm.generator):
            used.setdefault(design.trained(made) if made else None, Inside()).arms[arm, made] = None
    for name in design.keys.read_by_judge:
        for made in design.all_made(name):
            if made is not None:
                used.setdefault(design.trained(made), Inside()).judged[made] = None
    for root, inside in used.items():
        for world in design.worlds:
            yield plan_group(design, world, root, inside)


def plan_group(design: Design, world: World, root: Made | None, inside: Inside) -> Group:
    """The world's data, the generators that come from ``root``, the cells of these arms and what the judge reads.

    The judge comes last: it takes seconds, and what it is not needed for need not wait or run again.
    """
    steps: dict[str, PlanStep] = {step.name: step for step in world.steps}
    needs: dict[Made | None, tuple[PlanStep, ...]] = {None: world.steps}
    for made in dict.fromkeys([*(made for _, made in inside.arms), *inside.judged]):
        if made is not None:
            assert root is not None  # a generator lies in its own group
            own = generator_steps(design, world, root, made)
            needs[made] = (*world.steps, *own)
            steps |= {step.name: step for step in own}
    cells = tuple(
        plan_cell(design, world, arm, ratio, seed, made, needs[made])
        for seed in design.keys.seeds  # another seed comes last: then nothing before it runs again
        for arm, made in inside.arms
        for ratio in arm.all_ratios
    )
    judged = tuple(plan_judge(design, world, root, made, needs[made]) for made in inside.judged)
    name, *home = (f"{world.name}/{root}", "generators", str(root)) if root else (world.name,)
    all_steps = (*steps.values(), *(cell.step for cell in cells), *(each.step for each in judged))
    return Group(Plan(name, design.folder(world.name, *home), all_steps), world, cells, judged)


def plan_judge(design: Design, world: World, root: Made | None, made: Made, before: tuple[PlanStep, ...]) -> JudgeStep:
    """The judge reads what ``made`` has drawn, beside the real lesions that it has learned from."""
    assert design.keys.judge is not None  # nothing is judged without
    home = design.home(world, made)
    words = [
        "tool/judge_results.py",
        design.images(world, made),
        "--judge",
        design.keys.judge.weights,
        "--real",
        world.train,
    ]
    file = f"{home}/judged.json"
    name = "judge" if made == root else f"judge_{made}"
    return JudgeStep(world, made, file, command(name, [*words, "--output", file], file), before)


def added_path(design: Design, world: World, arm: Arm) -> str:
    """The JSON of the images that an arm adds to the training set."""
    return design.folder(world.name, f"train_{arm.name}.json")


def generator_steps(design: Design, world: World, root: Made, made: Made) -> tuple[PlanStep, ...]:
    """What trains ``root``, if it has stages, and lets ``made``, which is it or draws with its checkpoint, draw and
    choose."""
    generator, pictures = design.keys.generators[made.name], f"{design.home(world, made)}/pictures"
    given = {"train_json": world.train, "val_json": world.val, "pictures": pictures}
    name = "draw" if made == root else f"draw_{made}"
    if generator.run is not None:
        words = filled(generator.run, made.seed, given)
        return (PlanStep(name, shlex.join(words), (pictures,)), *choice_steps(design, world, root, made, ()))
    base = design.keys.generators[root.name]
    steps, start = stage_steps(design, world, root)
    overrides = base.set if made.name == root.name else (*base.set, *generator.set)
    words = ["dataset_infer.py", "--ckpt", start, "--config", str(design.keys.model), "--output_dir", pictures]
    draw = filled(design.draw(made.name), made.seed, given)
    words += [*([] if "--train_json" in draw else ["--train_json", world.train]), *draw, *overrides]
    chosen = choice_steps(design, world, root, made, overrides)
    return (*steps, command(name, words, f"{pictures}/inference.json"), *chosen)


def choice_steps(
    design: Design, world: World, root: Made, made: Made, overrides: Sequence[str]
) -> tuple[PlanStep, ...]:
    """What chooses among the images that ``made`` has drawn, if the study says so."""
    choose, home = design.keys.generators[made.name].choose, design.home(world, made)
    if choose is None:
        return ()
    words = ["tool/choose_results.py", f"{home}/pictures", "--output_dir", f"{home}/chosen", "--config"]
    words += [str(design.keys.model), *shlex.split(choose), *overrides]
    return (command("choose" if made == root else f"choose_{made}", words, design.images(world, made)),)


def stage_steps(design: Design, world: World, made: Made) -> tuple[list[PlanStep], str]:
    """Convert, then train the stages in order; the steps and the checkpoint they end with.

    What stands before ``merge`` starts from the converted checkpoint, what stands behind it from the one before it.
    """
    generator, home = design.keys.generators[made.name], design.home(world, made)
    start, stages = f"{home}/converted.ckpt", generator.stages or ()
    convert = ["tool/model_convert.py", "--input_path", str(design.keys.checkpoint), "--output_path", start]
    model = ["--config", str(design.keys.model), *generator.set]
    steps = [command("convert", [*convert, *model], start)]
    trained: list[str] = []
    for position, stage in enumerate(stages):
        if stage == "merge":
            start = f"{home}/merged.ckpt"
            merge = ["tool/tool_merge_for_stage2.py", "--stage1_path", trained[0], "--input_path", trained[1]]
            steps.append(command("merge", [*merge, "--output_path", start, *model], start))
            continue
        config, *overrides = shlex.split(seeded(stage, made.seed))
        stem = Path(config).stem
        train = ["ver_train.py", "--ckpt", start, "--config", config, "--save_path", f"{home}/{stem}"]
        train += ["--train_json", world.train, "--val_json", world.val]
        train += ["--cache_dir", design.folder(world.name, "feature_cache"), *overrides, *generator.set]
        trained.append(f"{home}/{stem}/last.ckpt")
        steps.append(command(stem, train, trained[-1]))
        start = start if "merge" in stages[position:] else trained[-1]
    return steps, start


def seeded(words: str, seed: int | None) -> str:
    """The words with {seed} replaced by the generator's seed; 0 in a study without generator seeds."""
    return words.replace("{seed}", str(seed or 0))


def filled(text: str, seed: int | None, given: Mapping[str, str]) -> list[str]:
    """The words of a text, with {seed} and the names of ``given`` in braces replaced."""
    words = [seeded(word, seed) for word in shlex.split(text)]
    for place, value in given.items():
        words = [word.replace(f"{{{place}}}", value) for word in words]
    return words


def plan_cell(
    design: Design,
    world: World,
    arm: Arm,
    ratio: float | None,
    seed: int,
    made: Made | None,
    before: tuple[PlanStep, ...],
) -> CellStep:
    """One classifier; its folder names arm, ratio, the generator's seed and its own."""
    name = label(arm, ratio) + (f"_g{made.seed}" if made and made.seed is not None else "") + f"_seed{seed}"
    folder = design.folder(world.name, "cells", name)
    synthetic = [design.images(world, made)] if made else []
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
    step = command(name, words, f"{folder}/metrics.json")
    return CellStep(world, arm, ratio, seed, folder, step, made, before)


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
    labels = [label(arm, ratio) for arm in arms for ratio in arm.all_ratios]
    twice = [each for each in labels if labels.count(each) > 1]
    if twice:
        raise values.error("arms", "arms whose cells have different names", twice[0])
    check_keys(keys, {arm.name: arm for arm in arms}, values)
    steps = (*keys.steps, *(keys.judge.steps if keys.judge and keys.read_by_judge else ()))
    steps = checked_steps(steps, values) if steps else ()
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
    kind = ["--world", counts.world] if counts.world else []
    make = ["tool/make_phantoms.py", "--output_dir"]
    own = [f"{home}/phantoms", "--seed", seed, "--healthy", counts.healthy, "--diseased", counts.diseased]
    own += [*kind, *shlex.split(counts.flags or "")]
    test = [f"{home}/test", "--seed", seed + TEST_WORLDS, "--healthy", counts.test_healthy]
    test += ["--diseased", counts.test_diseased, *kind, *shlex.split(counts.test_flags or "")]
    split = ["ver_openImagesDatasets.py", "--root_dir", f"{home}/phantoms", "--output_file", f"{home}/annotations.json"]
    split += ["--fractions", *map(str, counts.fractions)]
    steps = (
        command("phantoms", [*make, *map(str, own)], f"{home}/phantoms/phantoms.json"),
        command("prepare", split, f"{home}/annotations_train.json"),
        command("test", [*make, *map(str, test)], f"{home}/test/phantoms.json"),
    )
    return World(name, f"{home}/annotations_train.json", f"{home}/annotations_val.json", f"{home}/test", steps)
