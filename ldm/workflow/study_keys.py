"""The keys of a study's YAML, with their limits, and the rules by which they agree with each other. No torch."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from ldm.core.schema import Command, Rule, Text, Values, Whole
from ldm.workflow.plans import PlanStep

FolderName = Annotated[
    str, Rule(lambda name: name.replace("_", "").replace("-", "").isalnum(), "a name of letters, digits, - and _")
]
Seeds = Annotated[list[Whole], Rule(lambda seeds: 0 < len(seeds) == len(set(seeds)), "different whole numbers")]
Shares = Annotated[list[int | float], Rule(lambda shares: len(shares) == 3, "three shares")]
Ratio = Annotated[float, Rule(lambda ratio: ratio > 0, "a number above 0")]
Ratios = Annotated[tuple[Ratio, ...], Rule(lambda each: 0 < len(each) == len(set(each)), "ratios, each once")]
Use = Literal["mix", "pretrain", "duplicate_real"]
Pair = Annotated[
    tuple[Text, ...], Rule(lambda names: len(set(names)) == len(names) == 2, "two different arms or generators")
]
Names = Annotated[list[Text], Rule(lambda names: 0 < len(names) == len(set(names)), "different names")]
Margin = Annotated[float, Rule(lambda margin: 0 < margin < 1, "a number between 0 and 1")]

# What ldm.evaluation.drawings measures of a generator's drawings.
DRAWING_ENDPOINTS = ("detection", "agreement", "asked_drawn", "seam", "seam_error", "changed_outside")
PLACES = ("train_json", "val_json", "pictures", "seed")  # what stands in braces in the words of a `run:`
DRAW_PLACES = ("train_json", "val_json", "seed")  # and in those of a `draw:`
PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Generator:
    """One way of making synthetic images: stages in order and what draws with them, one command, or other words for
    drawing with the checkpoint of another generator; and perhaps which of them are kept."""

    stages: tuple[Command, ...] | None = None  # each a YAML and overrides, or `merge`
    run: Command | None = None
    from_: Text | None = None
    draw: Command | None = None  # words of dataset_infer.py, in place of the study's; its --train_json is the world's
    set: tuple[Text, ...] = ()  # overrides for all stages and the drawing
    choose: Command | None = None  # words of choose_results.py, such as `--best 1`: only what it keeps is used


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
    """How many patients a phantom world has, which shares of them train, validate and test, and what kind it is.

    ``world`` is make_phantoms.py's ``--world`` for all of its patients; ``flags`` are further words of that command
    for the patients to train and validate on, ``test_flags`` for those to test on.
    """

    healthy: Whole
    diseased: Whole
    test_healthy: Whole
    test_diseased: Whole
    fractions: Shares
    world: Text | None = None
    flags: Command | None = None
    test_flags: Command | None = None


@dataclass(frozen=True)
class Compared:
    """``main`` at ``ratio`` minus ``control`` is the claim, ``baseline`` has nothing added.

    Ratio None: the one that does best on validation. ``oracle`` minus ``control`` is the most that can be gained.
    ``endpoint``: the number of ``test`` in the classifiers' metrics.json that everything is about.
    """

    baseline: str
    control: str
    main: str
    ratio: float | None
    oracle: str | None = None
    endpoint: Text = "auc"


@dataclass(frozen=True)
class Judge:
    """A classifier of lesion types that reads what generators draw: its saved ``weights``, and the steps that make
    them, which run once, before everything."""

    weights: Text
    steps: tuple[PlanStep, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A difference of two arms that is tested: two-sided against 0, or for lying within +-``equivalence``.

    ``of`` drawings: of two generators, by what the judge says of their drawings, without a classifier that learns from
    them. ``study``: the YAML of another study, whose cells or drawings it is about.
    """

    minus: Pair
    of: Literal["cells", "drawings"] = "cells"
    endpoint: Text | None = None  # the study's
    equivalence: Margin | None = None
    study: Text | None = None


@dataclass(frozen=True)
class StudyKeys:
    """What the YAML says of a study. Paths start at the repository root."""

    name: Text
    output_dir: Text
    worlds: Seeds | dict[FolderName, WorldFiles]
    seeds: Seeds
    classifier: Text
    arms: dict[FolderName, ArmKeys]  # {} for a study of the drawings alone
    compare: Compared | None = None
    generators: dict[FolderName, Generator] = field(default_factory=dict)
    generator_seeds: Seeds | None = None
    phantoms: Phantoms | None = None
    checkpoint: Text | None = None
    model: Text | None = None
    draw: Command | None = None
    set: tuple[Text, ...] = ()
    steps: tuple[PlanStep, ...] = ()
    judge: Judge | None = None
    judged: Names | None = None  # generators whose drawings the judge reads; by default those of the arms
    hypotheses: dict[FolderName, Hypothesis] = field(default_factory=dict)
    tested_by: Text | None = None  # the YAML of the study whose hypotheses are about these worlds

    @property
    def read_by_judge(self) -> tuple[str, ...]:
        """The generators whose drawings are judged."""
        if self.judge is None:
            return ()
        return tuple(self.judged or dict.fromkeys(arm.generator for arm in self.arms.values() if arm.generator))


def check_keys(keys: StudyKeys, arms: Mapping[str, Arm], values: Values) -> None:
    """UsageError unless arms, generators, comparison and hypotheses agree with each other."""
    for arm in arms.values():
        check_arm(arm, keys, values)
    for name, generator in keys.generators.items():
        check_generator(name, generator, keys, values)
    check_judge(keys, values)
    if keys.compare is not None:
        check_compared(keys.compare, arms, values)
    elif arms:
        raise values.error("compare", "which arms are compared", None)
    for name, hypothesis in keys.hypotheses.items():
        check_hypothesis(f"hypotheses.{name}", hypothesis, keys, values)


def check_judge(keys: StudyKeys, values: Values) -> None:
    """UsageError unless ``judged`` names generators and there is a judge, and a study without arms judges something."""
    for name in keys.judged or ():
        if name not in keys.generators:
            raise values.error("judged", f"some of the generators {', '.join(keys.generators)}", name)
    if keys.judged and keys.judge is None:
        raise values.error("judge", "a classifier for the drawings that `judged` names", None)
    if not keys.arms and not keys.read_by_judge:
        raise values.error("arms", "arms, or a judge and the generators that it reads (judged)", {})


def check_generator(name: str, generator: Generator, keys: StudyKeys, values: Values) -> None:
    """UsageError unless it has one way of being made, whose words fit together and have what they start from."""
    here, ways = f"generators.{name}", {"stages": generator.stages, "run": generator.run, "from": generator.from_}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        raise values.error(here, "one of stages, run and from", given)
    if generator.choose is not None and keys.model is None:
        raise values.error("model", f"a path, since the generator {name} needs it", None)
    if generator.run is not None:
        check_run(here, generator, generator.run, values)
    else:
        check_drawing(here, name, generator, keys, values)
        check_stages(here, generator.stages or (), values)


def check_run(here: str, generator: Generator, run: str, values: Values) -> None:
    """UsageError unless the command ``run`` says where to write, and says all."""
    for key in ("draw", "set"):
        if getattr(generator, key):
            raise values.error(f"{here}.{key}", "nothing beside run, whose words say all", getattr(generator, key))
    if "pictures" not in PLACE.findall(run) or not set(PLACE.findall(run)) <= set(PLACES):
        expected = f"{{pictures}}, the folder to write, and no other braces than {', '.join(PLACES)}"
        raise values.error(f"{here}.run", expected, run)


def check_drawing(here: str, name: str, generator: Generator, keys: StudyKeys, values: Values) -> None:
    """UsageError unless its words for drawing can be filled, and there is what it draws with."""
    draw = generator.draw or keys.draw or ""
    if not set(PLACE.findall(draw)) <= set(DRAW_PLACES):
        key = f"{here}.draw" if generator.draw else "draw"
        raise values.error(key, f"no other braces than {', '.join(DRAW_PLACES)}", draw)
    if generator.from_ is not None:
        source = keys.generators.get(generator.from_)
        if source is None or source.stages is None:
            trained = [each for each, other in keys.generators.items() if other.stages is not None]
            raise values.error(f"{here}.from", f"a generator with stages ({', '.join(trained)})", generator.from_)
    for key in ("checkpoint", "model"):
        if getattr(keys, key) is None:
            raise values.error(key, f"a path, since the generator {name} needs it", None)


def check_stages(here: str, stages: Sequence[str], values: Values) -> None:
    """UsageError unless they merge where there are two to merge, and write into folders of their own."""
    if "merge" in stages and (stages.index("merge") != 2 or stages.count("merge") > 1):
        raise values.error(
            f"{here}.stages", "merge once, as the third, since it joins the two stages before it", stages
        )
    stems = [Path(shlex.split(stage)[0]).stem for stage in stages]
    if len(set(stems)) < len(stems):
        raise values.error(f"{here}.stages", "YAMLs of different names", stems)


def check_arm(arm: Arm, keys: StudyKeys, values: Values) -> None:
    """UsageError unless use, generator and ratios of the arm agree with each other."""
    here = f"arms.{arm.name}"
    if arm.generator is not None and arm.generator not in keys.generators:
        raise values.error(f"{here}.generator", f"one of {', '.join(keys.generators)}", arm.generator)
    if (arm.generator is not None) != (arm.use in ("mix", "pretrain")):
        raise values.error(here, "use: mix or pretrain together with a generator", vars(arm))
    if (arm.ratios is None) != (arm.use is None):
        raise values.error(here, "ratios together with use", vars(arm))


def check_compared(compare: Compared, arms: Mapping[str, Arm], values: Values) -> None:
    """UsageError unless the arms exist, and main, control and oracle have the ratios to compare."""

    def arm(key: str, name: str) -> Arm:
        if name not in arms:
            raise values.error(f"compare.{key}", f"one of the arms {', '.join(arms)}", name)
        return arms[name]

    baseline, control, main = (arm(key, getattr(compare, key)) for key in ("baseline", "control", "main"))
    oracle = None if compare.oracle is None else arm("oracle", compare.oracle)
    if baseline.use is not None:
        raise values.error("compare.baseline", "an arm without ratios", baseline.name)
    if main.ratios is None:
        raise values.error("compare.main", "an arm with ratios", main.name)
    if compare.ratio is not None and compare.ratio not in main.ratios:
        raise values.error("compare.ratio", f"a ratio of {main.name} or null", compare.ratio)
    compared = main.ratios if compare.ratio is None else (compare.ratio,)
    if not set(compared) <= set(control.all_ratios):
        asked = ", ".join(f"{ratio:g}" for ratio in compared)
        raise values.error("compare.control", f"an arm with the ratios {asked} of {main.name}", control.name)
    if oracle is not None and not set(compared) & set(oracle.all_ratios):
        raise values.error("compare.oracle", f"an arm with a ratio of {main.name}", oracle.name)


def check_hypothesis(here: str, hypothesis: Hypothesis, keys: StudyKeys, values: Values) -> None:
    """UsageError unless its arms, or generators, exist and have what is compared; those of another study are checked
    when it is read."""
    drawn, endpoint, key = hypothesis.of == "drawings", hypothesis.endpoint, f"{here}.minus"
    if drawn and endpoint not in DRAWING_ENDPOINTS:
        raise values.error(f"{here}.endpoint", f"one of {', '.join(DRAWING_ENDPOINTS)}, of drawings", endpoint)
    if hypothesis.study is not None:
        return
    known, what = (keys.read_by_judge, "judged generators") if drawn else (tuple(keys.arms), "arms")
    for name in hypothesis.minus:
        if name not in known:
            raise values.error(key, f"two of the {what} {', '.join(known)}", list(hypothesis.minus))
        ratio = keys.compare.ratio if keys.compare and not drawn else None
        if ratio is not None and keys.arms[name].ratios is not None and ratio not in (keys.arms[name].ratios or ()):
            raise values.error(key, f"arms with the ratio {ratio:g} of compare, or without ratios", name)
