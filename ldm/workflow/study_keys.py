"""The keys of a study's YAML, with their limits, and the rules by which they agree with each other. No torch."""

import re
import shlex
from collections.abc import Mapping
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
Pair = Annotated[tuple[Text, ...], Rule(lambda arms: len(set(arms)) == len(arms) == 2, "two different arms")]
Margin = Annotated[float, Rule(lambda margin: 0 < margin < 1, "a number between 0 and 1")]

PLACES = ("train_json", "val_json", "pictures", "seed")  # what stands in braces in the words of a `run:`
PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Generator:
    """One way of making synthetic images: stages in order and what draws with them, one command, or other words for
    drawing with the checkpoint of another generator."""

    stages: tuple[Command, ...] | None = None  # each a YAML and overrides, or `merge`
    run: Command | None = None
    from_: Text | None = None
    draw: Command | None = None  # words of dataset_infer.py, in place of the study's
    set: tuple[Text, ...] = ()  # overrides for all stages and the drawing


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
class Hypothesis:
    """A difference of two arms that is tested: two-sided against 0, or for lying within +-``equivalence``.

    ``study``: the YAML of another study, whose cells it is about.
    """

    minus: Pair
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
    arms: dict[FolderName, ArmKeys]
    compare: Compared
    generators: dict[FolderName, Generator] = field(default_factory=dict)
    generator_seeds: Seeds | None = None
    phantoms: Phantoms | None = None
    checkpoint: Text | None = None
    model: Text | None = None
    draw: Command | None = None
    set: tuple[Text, ...] = ()
    steps: tuple[PlanStep, ...] = ()
    hypotheses: dict[FolderName, Hypothesis] = field(default_factory=dict)


def check_keys(keys: StudyKeys, arms: Mapping[str, Arm], values: Values) -> None:
    """UsageError unless arms, generators, comparison and hypotheses agree with each other."""
    for arm in arms.values():
        check_arm(arm, keys, values)
    for name, generator in keys.generators.items():
        check_generator(name, generator, keys, values)
    check_compared(keys.compare, arms, values)
    for name, hypothesis in keys.hypotheses.items():
        check_hypothesis(f"hypotheses.{name}.minus", hypothesis, keys.compare.ratio, arms, values)


def check_generator(name: str, generator: Generator, keys: StudyKeys, values: Values) -> None:
    """UsageError unless it has one way of being made, whose words fit together and have what they start from."""
    here, ways = f"generators.{name}", {"stages": generator.stages, "run": generator.run, "from": generator.from_}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        raise values.error(here, "one of stages, run and from", given)
    if generator.run is not None:
        if generator.draw is not None or generator.set:
            key = "set" if generator.draw is None else "draw"
            raise values.error(f"{here}.{key}", "nothing beside run, whose words say all", getattr(generator, key))
        wrong = [place for place in PLACE.findall(generator.run) if place not in PLACES]
        if wrong or "{pictures}" not in generator.run:
            expected = f"{{pictures}}, the folder to write, and no other braces than {', '.join(PLACES)}"
            raise values.error(f"{here}.run", expected, generator.run)
        return
    if generator.from_ is not None:
        source = keys.generators.get(generator.from_)
        if source is None or source.stages is None:
            trained = [each for each, other in keys.generators.items() if other.stages is not None]
            raise values.error(f"{here}.from", f"a generator with stages ({', '.join(trained)})", generator.from_)
    for key in ("checkpoint", "model"):
        if getattr(keys, key) is None:
            raise values.error(key, f"a path, since the generator {name} needs it", None)
    stages = generator.stages or ()
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
    for key in ("baseline", "control", "main", "oracle"):
        name = getattr(compare, key)
        if name not in arms and not (key == "oracle" and name is None):
            raise values.error(f"compare.{key}", f"one of the arms {', '.join(arms)}", name)
    baseline, main = arms[compare.baseline], arms[compare.main]
    if baseline.use is not None:
        raise values.error("compare.baseline", "an arm without ratios", baseline.name)
    if main.ratios is None:
        raise values.error("compare.main", "an arm with ratios", main.name)
    if compare.ratio is not None and compare.ratio not in main.ratios:
        raise values.error("compare.ratio", f"a ratio of {main.name} or null", compare.ratio)
    needed = main.ratios if compare.ratio is None else (compare.ratio,)
    if not set(needed) <= set(arms[compare.control].all_ratios):
        asked = ", ".join(f"{ratio:g}" for ratio in needed)
        raise values.error("compare.control", f"an arm with the ratios {asked} of {main.name}", compare.control)
    if compare.oracle is not None and not set(needed) & set(arms[compare.oracle].all_ratios):
        raise values.error("compare.oracle", f"an arm with a ratio of {main.name}", compare.oracle)


def check_hypothesis(
    key: str, hypothesis: Hypothesis, ratio: float | None, arms: Mapping[str, Arm], values: Values
) -> None:
    """UsageError unless the arms exist and have the ratio at which they are compared; those of another study are
    checked when it is read."""
    for name in hypothesis.minus if hypothesis.study is None else ():
        if name not in arms:
            raise values.error(key, f"two of the arms {', '.join(arms)}", list(hypothesis.minus))
        if arms[name].ratios is not None and ratio is not None and ratio not in arms[name].all_ratios:
            raise values.error(key, f"arms with the ratio {ratio:g} of compare, or without ratios", name)
