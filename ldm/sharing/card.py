"""Model card, data card and CLAIM checklist of a checkpoint, from run records alone: what is unknown is said to be."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm import levels
from ldm.config import as_yaml, config_from_dict
from ldm.core.errors import UsageError
from ldm.core.files import write_json, write_text
from ldm.core.tables import counted, markdown_table
from ldm.sharing.claim import claim_text
from ldm.sharing.facts import Facts, Partition, Record, gather

log = logging.getLogger(__name__)

MODEL_CARD, DATA_CARD, CLAIM, CONFIG, RECORD = "README.md", "DATA.md", "CLAIM.md", "config.yaml", "card.json"
CARD_FILES = (MODEL_CARD, DATA_CARD, CLAIM, CONFIG, RECORD)
NOT_CLINICAL = (
    "**Not for clinical use.** This model draws lesions that nobody has. It is a research tool: no image of it may "
    "enter a patient's record, and nothing of it has been assessed as a medical device."
)
SHOWN_SETTINGS = (
    *("stage", "objective", "batch_size", "accumulate", "max_epochs", "precision", "rates", "schedule", "warmup_steps"),
    *("weight_decay", "clip_norm", "mask_weight", "condition_dropout", "ema_decay", "balance", "seed"),
)
LIMITS = (
    "A drawn lesion is no evidence of how such a lesion looks: the model repeats what it was trained on, and what it "
    "was not trained on it invents.",
    "Numbers hold for the data they were measured on. No other scanner, hospital or population is promised.",
    "Drawn images can resemble images of the training set; tool/evaluate.py looks for copies, and its result stands "
    "above if it was given.",
    "The checkpoint lets whoever knows a patient's id ask whether it is behind the weights (salted digests), unless it "
    "was shared without them.",
)
DATA_UNKNOWN = (
    "## Not known\n\nWhere, when and with which scanners the images were made, who outlined the lesions and how well "
    "two people agree, age and sex of the patients, consent and ethics: to be written by who owns the data."
)
USE = """## To use it

```sh
python dataset_infer.py --ckpt model.safetensors --config config.yaml --image IMAGE.png --mask MASK.png \\
    --prompt "..." --output_dir drawn
```

BiomedCLIP is not part of it: put the one of the digest above into `./biomedclip`. CLAIM.md is the CLAIM 2024 checklist
as far as run records can fill it."""


@dataclass(frozen=True)
class CardOptions:
    """What a card is made of; the flags of tool/card.py."""

    ckpt: Path
    output_dir: Path
    name: str
    license: str
    train: Path | None
    val: Path | None
    test: Path | None
    results: list[Path]
    overwrite: bool


def write_cards(options: CardOptions) -> None:
    """Write CARD_FILES into ``output_dir``; DATA.md only where a data set is given, so that it can be counted.

    Raises UsageError where one of them is there and may not be replaced, and what ``gather`` raises.
    """
    folder = options.output_dir
    there = [name for name in CARD_FILES if (folder / name).exists()]
    if there and not options.overwrite:
        raise UsageError(f"{folder / there[0]}: is there already, perhaps edited; give another folder, or --overwrite")
    given = {"train": options.train, "val": options.val, "test": options.test}
    facts = gather(options.ckpt, {name: path for name, path in given.items() if path}, options.results)
    texts = {
        MODEL_CARD: model_card(facts, options.name, options.license),
        CLAIM: claim_text(facts),
        CONFIG: as_yaml(config_from_dict(portable(facts.checkpoint.metadata)["config"], str(options.ckpt))),
    }
    texts |= {DATA_CARD: data_card(facts, options.name)} if facts.partitions else {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in there:
        (folder / name).unlink()
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / RECORD, {"ckpt_sha256": facts.sha256, "files": sorted(texts)})
    for name in texts:
        log.info("written: %s", folder / name)
    for record in facts.records:
        if others := (record.drawn_by() or {}).keys() - {facts.sha256}:
            text = "warning: %s is about images that %s did not draw (%s); the card says so"
            log.warning(text, record.kind, options.ckpt, ", ".join(sorted(each or "no checkpoint" for each in others)))
    for text in unknown(facts, options.license):
        log.warning("warning: not known, and the card says so: %s", text)


def portable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, with the folder of BiomedCLIP where a README expects it."""
    config = metadata["config"]
    return {**metadata, "config": {**config, "biomedclip": {**config["biomedclip"], "path": "./biomedclip"}}}


def model_card(facts: Facts, name: str, license: str) -> str:
    """README.md: front matter as the hub reads it, then the sections of a model card."""
    front = {
        "license": license or "unknown",
        "pipeline_tag": "image-to-image",
        "tags": ["medical", "inpainting", "diffusion", "vertebra", "synthetic-data", "not-for-clinical-use"],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n{NOT_CLINICAL}",
        "## Model\n\n" + "\n".join(_model(facts)),
        "## Trained on\n\n" + "\n\n".join(_trained_on(facts)),
        "## Training\n\n" + _settings(facts),
        "## Numbers\n\n" + "\n\n".join(_numbers(facts)),
        "## Limits\n\n" + "\n".join(f"- {text}" for text in LIMITS),
        "## Not known\n\n" + ("\n".join(f"- {text}" for text in unknown(facts, license)) or "Nothing of the above."),
        f"## Licence\n\n{license or 'Not said. Without a licence nobody may use the weights.'}",
        USE,
    ]
    return "\n\n".join(sections) + "\n"


def _model(facts: Facts) -> Iterator[str]:
    metadata, config = facts.checkpoint.metadata, facts.config
    complete = metadata.get("complete")
    yield "Text-guided inpainting of vertebral lesions with soft masks (MedSoft-Diffusion): Stable Diffusion 1.5's"
    yield "layout with a third, soft-mask-gated attention over tokens that a Medical Semantic Controller predicts."
    yield ""
    rows = [
        ("left by", metadata["stage"]),
        ("optimizer steps", metadata.get("step", "not said")),
        ("the run had ended", "not said" if complete is None else "yes" if complete else "no"),
        ("image size", f"{config.data.image_size} x {config.data.image_size} pixels"),
        *((f"parameters, {part}", f"{row['parameters'] / 1e6:.2f} million") for part, row in facts.parts.items()),
        ("BiomedCLIP (SHA-256)", metadata.get("biomedclip") or "not said"),
        ("checkpoint before it was shared (SHA-256)", facts.sha256),
        *_origin(metadata.get("origin")),
    ]
    yield markdown_table(("", ""), rows)


def _origin(origin: Any, level: int = 0) -> Iterator[tuple[str, str]]:
    """The chain of files that a checkpoint was made from, the nearest first."""
    if not isinstance(origin, Mapping) or level > 8:
        yield "made from", "not said"
        return
    if "file" not in origin:  # a merge of two
        for source in origin.values():
            yield from _origin(source, level + 1)
        return
    about = [str(origin[key]) for key in ("sha256", "stage", "layout") if origin.get(key)]
    yield "made from", f"{origin['file']} ({', '.join(about) or 'nothing said of it'})"
    if origin.get("from"):
        yield from _origin(origin["from"], level + 1)


def _trained_on(facts: Facts) -> Iterator[str]:
    for steps, count in facts.trained_on:
        yield f"{steps}: {counted(count, 'patient')} (the checkpoint's own record)."
    if not facts.trained_on:
        yield "The checkpoint does not say which patients are behind it."
    if "train" in facts.partitions:
        train = facts.partitions["train"]
        known = f"{train.behind} of {train.patients} patients are among them"
        yield f"Of the training set that was given, {known}. {DATA_CARD} counts it."
        yield _counts({"train": train})
    else:
        yield "Counts by class are not known: no training set was given to the card."


def _counts(partitions: Mapping[str, Partition]) -> str:
    rows, spine = [], {name: place for place, name in enumerate(levels.NAMES)}
    for what in ("class", "lesion type", "severity", "level"):
        found = {value for each in partitions.values() for value in each.counts[what]}
        values = sorted(found, key=lambda value: (spine.get(value, len(spine)), value))  # vertebrae from the head down
        for value in values:
            rows.append((what, value, *(each.counts[what].get(value, 0) for each in partitions.values())))
    return markdown_table(("", "", *partitions), rows)


def _settings(facts: Facts) -> str:
    training = asdict(facts.config.training)
    rows = [(f"`{name}`", json.dumps(training[name])) for name in SHOWN_SETTINGS]
    table = markdown_table(("key of `training`", "value"), rows)
    return f"Of the last stage; all settings are in {CONFIG}.\n\n{table}"


def _numbers(facts: Facts) -> Iterator[str]:
    if not facts.records:
        yield "None: no evaluation was given to the card."
    for record in facts.records:
        what = "A classifier's test" if record.kind == "metrics.json" else "Drawn against real lesions"
        yield f"{what} (`{record.kind}`, SHA-256 {record.sha256[:16]}...). {_drawn_by(record, facts.sha256)}"
        if record.kind == "metrics.json":
            yield _classifier(record.content)
        rows = [(name, _shown(value), _shown(low, high)) for name, value, low, high in record.numbers()]
        table = markdown_table(("number", "value", "95 % interval"), rows)
        yield table if rows else "It holds no number with an interval."
        if "copies" in record.content:
            yield f"Copies of training images found among the drawn ones: {record.content['copies']['count']}."
        if caveats := record.caveats():
            yield "\n".join(f"- {text}" for text in caveats)


def _drawn_by(record: Record, ckpt: str) -> str:
    """Which checkpoint drew the images that a record is about, as it says; ``ckpt``: the SHA-256 of the card's."""
    counts = record.drawn_by()
    if counts is None:
        return "It does not say which checkpoint drew its images; who wrote this card vouches that it was this one."
    if not counts:
        return "No synthetic image had a part in it."
    others = sum(counts.values()) - counts.get(ckpt, 0)
    if not others:
        return f"All of its {counts[ckpt]} synthetic images were drawn by this checkpoint."
    return f"**{others} of its {sum(counts.values())} synthetic images were not drawn by this checkpoint.**"


def _classifier(metrics: Mapping[str, Any]) -> str:
    """On how many images of which kind a classifier was trained and tested."""
    keys = ("n_train_healthy", "n_train_diseased", "n_synthetic_used", "n_test", "n_test_patients")
    healthy, diseased, synthetic, tested, patients = (metrics.get(key, "an unknown number of") for key in keys)
    return (
        f"Trained on {healthy} healthy and {diseased} diseased real images and {synthetic} synthetic ones; tested on "
        f"{counted(tested, 'image')} of {counted(patients, 'patient')}."
    )


def _shown(*values: float | None) -> str:
    return "none" if None in values else " to ".join(f"{value:.4g}" for value in values)


def unknown(facts: Facts, license: str) -> list[str]:
    """What a reader of a card would ask, and the records do not answer."""
    metadata = facts.checkpoint.metadata
    kinds = {record.kind for record in facts.records}
    asked = {
        "under which licence the weights may be used (--license)": license,
        "which patients are behind the weights": facts.trained_on,
        "how many samples of which class it was trained on (--train)": "train" in facts.partitions,
        "how its lesions compare with real ones (--results of tool/evaluate.py)": "evaluation.json" in kinds,
        "whether they help a classifier (--results of classifier.py)": "metrics.json" in kinds,
        "whether its training had ended": metadata.get("complete") is not None,
        "from which file it was made": metadata.get("origin"),
    }
    never = "age, sex and origin of the patients, scanners and dates, consent and ethics: no record of a run holds them"
    return [*(question for question, answer in asked.items() if not answer), never]


def data_card(facts: Facts, name: str) -> str:
    """DATA.md: the data sets in counts, without a name of a patient or a sample."""
    partitions = facts.partitions
    rows = [
        ("samples", *(each.samples for each in partitions.values())),
        ("patients", *(each.patients for each in partitions.values())),
        ("samples that could not be read", *(each.rejected for each in partitions.values())),
        ("synthetic samples", *(each.synthetic for each in partitions.values())),
        ("distinct prompts", *(each.prompts for each in partitions.values())),
        ("patients behind the weights", *(each.behind for each in partitions.values())),
        ("mm a pixel: least, median, most", *(_spacing(each) for each in partitions.values())),
    ]
    return (
        "\n\n".join(
            [
                f"# Data of {name}",
                "Counted from the annotation files or folders that were given. The images are not part of this card.",
                markdown_table(("", *partitions), rows),
                "## By class, lesion type, severity and level",
                _counts(partitions),
                DATA_UNKNOWN,
            ]
        )
        + "\n"
    )


def _spacing(partition: Partition) -> str:
    return "not known" if partition.spacing is None else ", ".join(f"{value:.3g}" for value in partition.spacing)
