"""The design of a study: its YAML, checked, and the steps that its worlds, generators and cells come from. No torch."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.core.errors import UsageError
from ldm.core.files import read_text
from ldm.core.paths import shipped
from ldm.workflow.plans import Plan, PlanStep, check_keys, parse_steps

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
    steps: tuple[PlanStep, ...] = ()


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
    steps: tuple[PlanStep, ...] = ()

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
    step: PlanStep


@dataclass(frozen=True)
class Group:
    """The arms of a world that use the same generator (or none), as one plan: data, generator, cells."""

    plan: Plan
    world: World
    cells: tuple[CellStep, ...]


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


def added_path(design: Design, world: World, arm: Arm) -> str:
    """The JSON of the pictures that an arm adds to the training set."""
    return design.folder(world.name, f"train_{arm.name}.json")


def generator_steps(design: Design, world: World, name: str) -> tuple[PlanStep, ...]:
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
    name = f"{label(arm, ratio)}_seed{seed}"
    folder = design.folder(world.name, "cells", name)
    drawn = [design.folder(world.name, "generators", arm.generator, "pictures")] if arm.generator else []
    values = {
        "train_json": added_path(design, world, arm) if arm.add else world.train,
        "val_json": world.val,
        "test_json": world.test,
        "output_dir": folder,
        "seed": seed,
        "synthetic": drawn,  # always said, so that the classifier's JSON cannot add pictures to an arm
        "use_synthetic": arm.use or "mix",
        "ratio": ratio,
    }
    given = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *design.set, *arm.set]
    words = ["classifier.py", design.classifier, *(word for each in given for word in ("--set", each))]
    return CellStep(world, arm, ratio, seed, folder, command(name, words, f"{folder}/metrics.json"))


def label(arm: Arm, ratio: float | None) -> str:
    """Names the arm's cells at this ratio."""
    return arm.name if ratio is None else f"{arm.name}_{ratio:g}"


def command(name: str, words: list[str], makes: str) -> PlanStep:
    """A step that runs ``python`` with these words and leaves ``makes``."""
    return PlanStep(name, shlex.join(["python", *words]), (makes,))


# ------------------------------------------------------------------------------------------------------- the YAML


def load_design(path: Path) -> Design:
    """Read a study, looked up in the working directory, then among the shipped ones; UsageError for any fault in it."""
    found = shipped(path)
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
    labels = [label(arm, ratio) for arm in arms for ratio in arm.ratios]
    for each in labels:
        if labels.count(each) > 1:
            raise UsageError(f"{where}arms: two arms have cells of the name {each}; rename one of them")
    command_words(values.get("draw", ""), f"{where}draw: ")
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


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> Any:
    """The YAML's keys over those of its ``base:``; ``above``: the files that are based on it."""
    import yaml

    try:
        values = yaml.safe_load(read_text(path, "study"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or "base" not in values:
        return values
    base = values.pop("base")
    above = (*above, path.resolve())
    if not isinstance(base, str) or (path.parent / base).resolve() in above:
        raise UsageError(f"{path}: base: expected another study's YAML, found {base!r}")
    below = read_layers(path.parent / base, above)
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
    """The generator ``name`` of a study YAML; UsageError that says where it is wrong."""
    check_keys(item, {"stages": list, "set": list}, f"{where}generators.{plain(name, where)}: ", ("set",))
    here = f"{where}generators.{name}.stages: "
    stages = words(item["stages"], here)
    if "merge" in stages and (stages.index("merge") != 2 or stages.count("merge") > 1):
        raise UsageError(f"{here}merge joins the two stages before it; expected it once, as the third")
    stems = [Path(command_words(stage, here)[0]).stem for stage in stages]
    if len(set(stems)) < len(stems):
        raise UsageError(f"{here}two stages have the same YAML name ({', '.join(stems)}); names must differ")
    return Generator(stages, words(item.get("set", []), f"{where}generators.{name}.set: "))


def parse_arm(name: str, item: Any, generators: dict[str, Any], where: str) -> Arm:
    """The arm ``name`` of a study YAML; UsageError that says where it is wrong."""
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
    baseline, control, main = (arms[names.index(item[key])] for key in ("baseline", "control", "main"))
    if baseline.use is not None:
        raise UsageError(f"{here}.baseline: expected an arm without ratios, found {baseline.name}")
    if main.use is None:
        raise UsageError(f"{here}.main: expected an arm with ratios, found {main.name}")
    if item["ratio"] is not None and item["ratio"] not in main.ratios:
        raise UsageError(f"{here}.ratio: expected a ratio of {main.name} or null, found {item['ratio']!r}")
    needed = main.ratios if item["ratio"] is None else (float(item["ratio"]),)
    if not set(needed) <= set(control.ratios):
        asked = ", ".join(f"{ratio:g}" for ratio in needed)
        raise UsageError(
            f"{here}.control: expected an arm with the ratios {asked} of {main.name}, found {control.name}"
        )
    return {**item, "ratio": None if item["ratio"] is None else float(item["ratio"])}


def command_words(text: str, where: str) -> list[str]:
    """The words of a part of a command; UsageError if a quote is left open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{where}not understood as part of a command ({error}): {text}") from error


def words(items: list[Any], where: str) -> tuple[str, ...]:
    """The items, which must be texts that are not blank."""
    for item in items:
        if not isinstance(item, str) or not item.strip():
            raise UsageError(f"{where}expected texts, found {item!r}")
    return tuple(items)


def whole_numbers(items: list[Any], where: str, different: bool = True) -> list[int]:
    """The items, which must be whole numbers of at least 0 and, unless told otherwise, ``different``."""
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
