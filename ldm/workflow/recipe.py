"""A recipe for a dataset folder: plan, classifier configurations and study, with numbers that fit the data. No torch.

What ``tool/init.py`` writes. Everything in it is meant to be read and changed.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ldm.config import load_config
from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_folder, read_json, write_json, write_text
from ldm.core.paths import shipped
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import Row, check_disjoint
from ldm.data.samples import Sample
from ldm.data.splits import SPLITS

SHARES = (0.7, 0.1, 0.2)  # of the patients to train, validate and test on, as ver_openImagesDatasets.py splits
TESTED = (0.8, 0.2, 0.0)  # the same where a test set of its own is given
RATIO = 3  # images added per real diseased one
PASSES, BATCH, LOOKS = 60, 32, 20  # of the classifier: passes over its images, images a step, validations
WORLDS = 3  # of the study: splits
STAGES = ("stage1", "unet_only", "stage2_1", "stage2_2")
FEW = 10  # diseased patients to validate on, below which a number says little
HUB = "hf-hub:"  # what is downloaded by itself
TRIAL = "--model models/phantom.yaml --ckpt models/phantom_base/sd-phantom-inpainting.ckpt"  # needs no download


@dataclass(frozen=True)
class Facts:
    """What a recipe is made for: absolute paths, and what the data are like."""

    data: Path
    test: Path | None
    folder: Path
    model: str
    ckpt: str
    biomedclip: str
    side: int
    healthy: int
    drawable: int  # healthy ones whose vertebra is known
    diseased: int
    framed: int  # diseased ones whose vertebra is known, so that their mask can be carried to another
    patients: int
    nameless: int  # images without a patient_id
    kinds: dict[str, int]

    @property
    def work(self) -> Path:
        """The folder of all that the recipe's commands make."""
        return self.folder / "work"

    def stage(self, name: str) -> str:
        """The YAML of a stage of the model."""
        return f"{self.model.removesuffix('.yaml')}_{name}.yaml"

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of the patients, in training, validation and test."""
        return TESTED if self.test else SHARES

    def prepare(self, output: Path) -> list[Any]:
        """The words that split the patients."""
        more = ["--fractions", *(format(share, "g") for share in TESTED)] if self.test else []
        return ["ver_openImagesDatasets.py", "--root_dir", self.data, "--output_file", output, *more]

    def parts(self, annotations: Path) -> dict[str, str]:
        """What to train, validate and test on, after such a split."""
        files = {part: str(annotations.with_name(f"{annotations.stem}_{part}.json")) for part in SPLITS}
        return files | ({"test": str(self.test)} if self.test else {})

    @property
    def missing(self) -> list[str]:
        """What the plan needs and finds nowhere yet."""
        files = {"--ckpt": self.ckpt, "biomedclip.path of the model YAML": self.biomedclip}
        return [
            f"{path} ({what})"
            for what, path in files.items()
            if not path.startswith(HUB) and not shipped(path).exists()
        ]

    @property
    def added(self) -> int:
        """Images to make: so many that every real diseased training image has RATIO of them."""
        return math.ceil(RATIO * self.shares[0] * self.diseased)

    @property
    def drawing(self) -> list[str]:
        """The words that make as many: a healthy image is taken several times where there are too few."""
        variants = math.ceil(self.added / max(1, math.floor(self.shares[0] * self.drawable)))
        more = ["--variants", str(variants)] if variants > 1 else []
        return ["--limit", str(math.ceil(self.added / variants)), *more]

    @property
    def steps(self) -> int:
        """Of the classifier, the same in every arm."""
        return PASSES * math.ceil((self.shares[0] * (self.healthy + self.diseased) + self.added) / BATCH)

    @property
    def said(self) -> str:
        """The data in one line."""
        named = self.kinds | {"not named": self.diseased - sum(self.kinds.values())}
        kinds = ", ".join(f"{kind}: {count}" for kind, count in named.items() if count)
        kinds = kinds if self.kinds else "not named in meta.json"
        diseased, patients = counted(self.diseased, "diseased image"), counted(self.patients, "patient")
        return f"{self.healthy} healthy and {diseased} of {patients}; lesions: {kinds}"


def write_recipe(data: Path, folder: Path, model: Path, ckpt: Path, test: Path | None) -> int:
    """Write README.md, plan.yaml, study.yaml and three classifier JSONs into a new ``folder``.

    Returns 0, or 3 if some samples cannot be used. UsageError if the folder is there already or the model has no stage
    YAMLs, MedSoftError without healthy or without diseased samples, in the data or in ``test``, where no healthy one
    can be drawn on, and where data and test share a patient.
    """
    if folder.exists():
        raise UsageError(f"{folder}: is there already; give another --output_dir, or delete it")
    config = load_config(shipped(model), [])
    missing = [name for name in STAGES if not shipped(f"{str(model).removesuffix('.yaml')}_{name}.yaml").exists()]
    if missing:
        raise UsageError(f"--model {model}: expected the YAMLs of its stages beside it, found none for {missing[0]}")
    samples, rejects = load_samples(data)
    if test is not None:
        check_test(test, data, samples)
    start = str(ckpt.resolve()) if ckpt.exists() else str(ckpt)
    chosen = {"model": str(model), "ckpt": start, "biomedclip": config.biomedclip.path, "side": config.data.image_size}
    tested = test and test.resolve()
    facts = look_at(samples, data.resolve(), test=tested, folder=folder.resolve(), **chosen)
    with atomic_folder(folder) as partial:
        write_text(partial / "plan.yaml", plan_text(facts))
        write_text(partial / "study.yaml", study_text(facts))
        for name, values in classifiers(facts).items():
            write_json(partial / f"classifier_{name}.json", values)
        write_text(partial / "README.md", readme(facts, len(rejects)))
    print(f"{folder}: {facts.said}. Read README.md there; then: python tool/run_stages.py {folder / 'plan.yaml'}")
    for path in facts.missing:
        print(f"not there yet, and needed: {path}. Put it there, or try the recipe without downloads: {TRIAL}")
    return cli.SOME_REJECTED if rejects else cli.DONE


def look_at(samples: Sequence[Sample], data: Path, **chosen: Any) -> Facts:
    """``chosen``, and what the samples are like; MedSoftError if nothing can be learned or drawn on."""
    check_classes(data, samples, "draw on")
    diseased = [sample for sample in samples if not sample.healthy]
    drawable = sum(sample.healthy and (sample.anatomy is not None or any(sample.box)) for sample in samples)
    if not drawable:
        raise MedSoftError(
            f"{data}: no healthy sample has an anatomy.png, or a mask.png of its vertebra, so nothing says where a "
            "lesion may be drawn; add one of them"
        )
    kinds = Counter(sample.lesion_type for sample in diseased if sample.lesion_type)
    return Facts(
        data=data,
        healthy=len(samples) - len(diseased),
        drawable=drawable,
        diseased=len(diseased),
        framed=sum(sample.anatomy is not None for sample in diseased),
        patients=len({sample.patient_id for sample in samples}),
        nameless=sum(sample.patient_id == sample.sample_id for sample in samples),
        kinds=dict(kinds.most_common()),
        **chosen,
    )


def check_classes(data: Path, samples: Sequence[Sample], healthy_for: str) -> None:
    """MedSoftError unless there are diseased and healthy samples."""
    for well, what, why in ((False, "diseased", "learn from"), (True, "healthy", healthy_for)):
        if all(sample.healthy != well for sample in samples):
            raise MedSoftError(f"{data}: expected healthy and diseased samples, found no {what} one to {why}")


def check_test(test: Path, data: Path, samples: Sequence[Sample]) -> None:
    """MedSoftError if the test set lacks a class, or has a patient of ``samples``: the classifiers would refuse it."""
    tested, _ = load_samples(test)
    check_classes(test, tested, "tell them from")
    nameless = {sample.sample_id for sample in samples if sample.patient_id == sample.sample_id}
    for sample in tested:
        if sample.patient_id == sample.sample_id and sample.sample_id in nameless:
            raise MedSoftError(
                f"{test}: {sample.sample_id} has no patient_id, and neither has the sample of that name in {data}, so "
                "nothing says whether they are of one patient; name the patients in meta.json"
            )
    groups = ((str(data), samples), (str(test), tested))
    check_disjoint(Row(name, each.sample_id, each.patient_id, None) for name, group in groups for each in group)


def command(*words: Any) -> str:
    """A command as a text of YAML."""
    return json.dumps(shlex.join(map(str, words)), ensure_ascii=False)


def step(name: str, makes: Path, *words: Any) -> str:
    """A step of a plan."""
    return f"  - name: {name}\n    run: {command('python', *words)}\n    makes: [{json.dumps(str(makes))}]"


def plan_text(facts: Facts) -> str:
    """Preparation, the four stages, drawing, evaluation and three classifiers."""
    work, start = facts.work, facts.work / "converted.ckpt"
    annotations = work / "annotations.json"
    train, val, test = facts.parts(annotations).values()
    made = {"stage1": start, "unet_only": start, "stage2_1": work / "merged.ckpt"}
    made["stage2_2"] = work / "stage2_1" / "last.ckpt"
    model = ["--config", facts.model]

    def train_stage(name: str) -> str:
        words = ["ver_train.py", "--ckpt", made[name], "--config", facts.stage(name), "--save_path", work / name]
        return step(name, work / name / "last.ckpt", *words, "--train_json", train, "--val_json", val)

    merge = ["tool/tool_merge_for_stage2.py", "--stage1_path", work / "stage1" / "last.ckpt"]
    merge += ["--input_path", work / "unet_only" / "last.ckpt", "--output_path", work / "merged.ckpt", *model]
    draw = ["dataset_infer.py", "--ckpt", work / "stage2_2" / "last.ckpt", *model, "--train_json", train]
    draw += ["--output_dir", work / "results", "--seed", 0, *facts.drawing]
    judge = ["tool/evaluate.py", test, work / "results", "--train_json", train, *model]
    steps = [
        step("prepare", Path(train), *facts.prepare(annotations)),
        step("convert", start, "tool/model_convert.py", "--input_path", facts.ckpt, "--output_path", start, *model),
        *map(train_stage, STAGES[:2]),
        step("merge", work / "merged.ckpt", *merge),
        *map(train_stage, STAGES[2:]),
        step("draw", work / "results" / "inference.json", *draw),
        step("evaluate", work / "evaluation", *judge, "--output_dir", work / "evaluation"),
    ]
    for name in classifiers(facts):
        output = work / f"classifier_{name}"
        steps.append(step(f"classifier_{name}", output / "metrics.json", "classifier.py", _json(facts, name)))
    head = (
        f"# {facts.said}.\n# Every step runs once; started again, it goes on: python tool/run_stages.py THIS_FILE\n"
        f"name: {json.dumps(facts.data.name)}\noutput_dir: {json.dumps(str(work))}\nsteps:"
    )
    return "\n".join([head, *steps]) + "\n"


def _json(facts: Facts, name: str) -> Path:
    return facts.folder / f"classifier_{name}.json"


def classifiers(facts: Facts) -> dict[str, dict[str, Any]]:
    """The classifier with real images, with repeated ones, and with drawn ones instead, all else equal."""
    small = facts.side <= 64
    values = read_json(shipped("configs/classifier/phantom.json"), "classifier configuration")
    values |= {"img_size": 64 if small else 224, "Batch_Size": BATCH, "EPOCHS": LOOKS, "steps": facts.steps}
    values |= {"dataset": facts.data.name, "lr": 1e-3 if small else 3e-4}
    values |= {f"{part}_json": path for part, path in facts.parts(facts.work / "annotations.json").items()}
    arms: dict[str, dict[str, Any]] = {
        "real": {},
        "duplicated": {"use_synthetic": "duplicate_real", "ratio": float(RATIO)},
        "augmented": {"synthetic": [str(facts.work / "results")], "ratio": float(RATIO)},
    }
    return {name: values | arm | {"output_dir": str(facts.work / f"classifier_{name}")} for name, arm in arms.items()}


STUDY = Template(
    """\
# Do drawn lesions help here, and more than lesions that are pasted? Every key: docs/evaluation.md.
#   python tool/study.py THIS_FILE
# $said.
# A world is one split of the same patients: the splits share $shared, so the intervals over worlds are
# narrower than those over hospitals would be. Patients of another hospital as a world of their own say more.
# Each split trains the four stages anew; one split for a first look: --worlds split_0
name: $name
output_dir: $output_dir
steps:
$splits
worlds:
$worlds
seeds: [0, 1, 2]  # of the classifiers; their mean stands for a world

checkpoint: $checkpoint
model: $model
draw: $draw
generators:
  ours:
    stages:
$stages
  hybrid: {from: ours, draw: $draw_hybrid}  # a pasted lesion, finished by the model
  paste: {run: $paste}  # no network

classifier: $classifier
set: [steps=$steps]
arms:  # a ratio is added images per real diseased one; every arm trains for the same number of steps
  real: {}
  duplicated: {use: duplicate_real, ratios: [$ratio]}
  paste: {use: mix, generator: paste, ratios: [$ratio]}
  ours: {use: mix, generator: ours, ratios: [$ratio]}
  hybrid: {use: mix, generator: hybrid, ratios: [$ratio]}
compare: {baseline: real, control: duplicated, main: ours, ratio: $ratio}
"""
)


def study_text(facts: Facts) -> str:
    """Several splits by patient; repeating, pasting, drawing and both together."""
    work, drawing = facts.work / "study", shlex.join(["--seed", "0", *facts.drawing])
    splits, worlds = [], []
    for seed in range(WORLDS):
        split = work / f"split_{seed}.json"
        train = split.with_name(f"{split.stem}_train.json")
        splits.append(step(split.stem, train, *facts.prepare(split), "--seed", seed))
        files = {f"{part}_json": path for part, path in facts.parts(split).items()}
        worlds.append(f"  {split.stem}: {json.dumps(files, ensure_ascii=False)}")
    chain = ["merge" if name == "merge" else facts.stage(name) for name in (*STAGES[:2], "merge", *STAGES[2:])]
    texts = {
        "name": facts.data.name,
        "output_dir": str(work),
        "checkpoint": facts.ckpt,
        "model": facts.model,
        "draw": drawing,
        "draw_hybrid": f"{drawing} --init paste --strength 0.5 --steps 8 --step_spacing trailing",
        "paste": f"python tool/copy_paste.py --train_json {{train_json}} --output_dir {{pictures}} {drawing}",
        "classifier": str(_json(facts, "real")),
    }
    return STUDY.substitute(
        {name: json.dumps(text) for name, text in texts.items()},
        said=facts.said,
        shared="most of them and the whole test set" if facts.test else "most of them",
        splits="\n".join(splits),
        worlds="\n".join(worlds),
        stages="\n".join(f"      - {json.dumps(stage)}" for stage in chain),
        steps=facts.steps,
        ratio=RATIO,
    )


def readme(facts: Facts, rejected: int) -> str:
    """The commands in their order, and what the numbers of the data mean for them."""
    commands = [
        ["tool/doctor.py", "--data", str(facts.data)],
        ["tool/run_stages.py", str(facts.folder / "plan.yaml")],
        ["tool/study.py", str(facts.folder / "study.yaml")],
    ]
    shell = "\n".join(shlex.join(["python", *words]) for words in commands)
    parts = [
        f"# {facts.data.name}",
        f"Written for {facts.said}. Everything here may be changed.",
        *data_notes(facts, rejected),
        f"```sh\n{shell}\n```",
        "1. The doctor says what is wrong with the samples, and writes `doctor_overlays.html`: look at it.\n"
        "2. `plan.yaml` trains the four stages, draws, compares real with drawn and trains three classifiers: on real "
        "images, on real ones repeated, on real and drawn ones. Look at `work/results/report.html`, "
        "`work/evaluation/report.html` and `work/classifier_*/report.html`.\n"
        f"3. `study.yaml` does so in {WORLDS} splits with three seeds, beside pasted lesions, and says in "
        f"`work/study/study.html` what the intervals support. It trains the four stages {WORLDS} times: about "
        f"{WORLDS} times as long as the plan.",
        f"The model is `{facts.model}`, which draws squares of {facts.side} x {facts.side} pixels.",
        f"The classifiers take {facts.steps} steps in every arm, {PASSES} passes over the largest set. If "
        "`metrics.json` says `converged: false`, raise `steps` in the three JSONs (then add `--from classifier_real "
        "--overwrite` to the plan's command) and in `study.yaml`.",
        f"{counted(facts.added, 'image is', 'images are')} made: {RATIO} for each real diseased training image.",
    ]
    return "\n\n".join(parts) + "\n"


def data_notes(facts: Facts, rejected: int) -> Iterator[str]:
    """What a person should know of the data before the commands run."""
    if rejected:
        said = counted(rejected, "sample")
        yield f"{said} could not be used; `prepare` lists them in `work/annotations_rejects.json`."
    if facts.missing:
        first = "; ".join(facts.missing)
        yield f"Not there yet, and needed first: {first}. A trial without downloads: `{TRIAL}`."
    if facts.nameless:
        yield (
            f"{facts.nameless} of these images have no `patient_id` and count as a patient each. If several are of one "
            "patient, the test is too easy: name the patient in `meta.json`."
        )
    if facts.drawable < facts.healthy:
        yield (
            f"Only {facts.drawable} of the healthy images can be drawn on: the others have no `anatomy.png` and no "
            "mask of their vertebra. The classifiers use them all the same."
        )
    if facts.framed < facts.diseased:
        yield (
            f"{facts.diseased - facts.framed} of the diseased images have no `anatomy.png`: of their lesions "
            "only the form is carried to healthy vertebrae, anywhere in them. Kinds with a place of their own, such as "
            "wedge fractures at an endplate, come out in the wrong one then, drawn or pasted."
        )
    if facts.shares[1] * facts.diseased < FEW:
        yield (
            "Few diseased images are left to validate on, so that chance chooses the epoch. Add patients, or give "
            "`prepare` other `--fractions`."
        )
    if not facts.kinds:
        yield "No `meta.json` names a lesion type: tables by kind stay empty, nothing else changes."
