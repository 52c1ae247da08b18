"""The CLAIM checklist of 2024 (Tejani et al., Radiology: Artificial Intelligence 6(4), e240300), filled from records.

Numbers are the published ones; the items' names are short ones of our own. The article has the authoritative text.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ldm.core.tables import counted, markdown_table
from ldm.sharing.facts import Facts, Partition

AUTHORS = "to be written by the authors"
PACKAGES = ("torch", "pytorch-lightning", "transformers", "open_clip_torch", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Item:
    """``where``: which file of a run or of this repository answers it; ``answer``: what the records of a run say of it;
    ``fixed``: what holds for every checkpoint, whatever its records."""

    number: int
    name: str
    where: str
    answer: Callable[[Facts], str] | None = None
    fixed: str = ""


def _parts(facts: Facts) -> str:
    sizes = ", ".join(f"{part} {row['parameters'] / 1e6:.2f} M" for part, row in facts.parts.items())
    size = facts.config.data.image_size
    return f"parameters: {sizes}; images of {size} x {size} pixels"


def _preparation(facts: Facts) -> str:
    data = facts.config.data
    crop = f"context {data.context}, min_crop {data.min_crop} {data.min_crop_unit}"
    return f"fit {data.fit}, {crop}, feather {data.feather} {data.feather_unit}"


def _training(facts: Facts) -> str:
    t = facts.config.training
    return (
        f"stage {t.stage or 'none'}, batch {t.batch_size}, {t.max_epochs} epochs, AdamW, rates {t.rates}, weight decay "
        f"{t.weight_decay}, schedule {t.schedule}, seed {t.seed}; {facts.checkpoint.metadata.get('step')} steps taken"
    )


def _software(facts: Facts) -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"where this card was written: Python {platform.python_version()}, {', '.join(found)}"


def _origin(facts: Facts) -> str:
    origin = facts.checkpoint.metadata.get("origin")
    return "the files it was made from are in README.md, Model" if origin else ""


def _partitions(facts: Facts) -> str:
    return "; ".join(f"{each.name} {_size(each)}" for each in facts.partitions.values())


def _size(partition: Partition) -> str:
    return f"{counted(partition.samples, 'sample')} of {counted(partition.patients, 'patient')}"


def _disjoint(facts: Facts) -> str:
    held_out = " and ".join(name for name in facts.partitions if name != "train")
    if not held_out or not facts.trained_on:
        return ""
    return f"by patient: none of {held_out} is among those that the checkpoint was trained on (checked)"


def _test_size(facts: Facts) -> str:
    test = facts.partitions.get("test")
    return f"{_size(test)}; how the number was chosen is {AUTHORS}" if test else ""


def _classes(facts: Facts) -> str:
    return "; ".join(
        f"{p.name}: {', '.join(f'{count} {name}' for name, count in sorted(p.counts['class'].items()))}"
        for p in facts.partitions.values()
    )


def _excluded(facts: Facts) -> str:
    return "; ".join(f"{p.name}: {p.samples} read, {p.rejected} could not be" for p in facts.partitions.values())


def _metrics(facts: Facts) -> str:
    names = [name for record in facts.records for name, *_ in record.numbers()]
    first = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{counted(len(names), 'number')}, {first} (README.md, Numbers)" if names else ""


def _intervals(facts: Facts) -> str:
    rows = [low for record in facts.records for _, _, low, _ in record.numbers()]
    with_interval = sum(low is not None for low in rows)
    return f"{with_interval} of {len(rows)} numbers have a 95 % bootstrap interval (README.md, Numbers)" if rows else ""


def _confusion(facts: Facts) -> str:
    matrices = [record.content["confusion"] for record in facts.records if "confusion" in record.content]
    return "confusion matrices: " + "; ".join(map(str, matrices)) if matrices else ""


def _caveats(facts: Facts) -> str:
    count = sum(len(record.caveats()) for record in facts.records)
    return f"{counted(count, 'warning')} of the evaluations, and the standing ones (README.md, Numbers and Limits)"


ITEMS = (
    Item(1, "title: AI, and which kind", "", fixed="a diffusion model: deep learning, generative"),
    Item(2, "structured abstract", ""),
    Item(3, "background, intended use", "`README.md`"),
    Item(4, "aims and hypotheses", "the study's YAML: `hypotheses`"),
    Item(5, "prospective or retrospective", ""),
    Item(6, "goal of the study", "the study's YAML"),
    Item(7, "data sources", "`site` and `scanner` in `meta.json`, `DATA.md`"),
    Item(8, "who is in and who is not", "`rejects.json` of every command"),
    Item(9, "preprocessing", "`config.yaml`: `data`", _preparation),
    Item(10, "selection of subsets", "annotation files of the split"),
    Item(11, "de-identification", "`docs/hospital.md`; the doctor's warnings of personal keys"),
    Item(12, "missing data", "`rejects.json`", _excluded),
    Item(13, "how the images were acquired", "`meta.json` of the samples"),
    Item(14, "reference standard: definition", ""),
    Item(15, "reference standard: why this one", ""),
    Item(16, "annotators and their training", ""),
    Item(17, "how the test set was annotated", ""),
    Item(18, "agreement of annotators", ""),
    Item(19, "how data were assigned to partitions", "annotation files; the seed of the split", _partitions),
    Item(20, "level at which partitions are disjoint", "`trained_on` of the checkpoint", _disjoint),
    Item(21, "intended size of the test set", "`DATA.md`", _test_size),
    Item(22, "architecture", "`config.yaml`, `docs/method.md`", _parts),
    Item(23, "software and versions", "`requirements.lock`", _software),
    Item(24, "initial weights", "`origin` of the checkpoint", _origin),
    Item(25, "training, augmentation, hyperparameters", "`config.yaml`, `steps.csv`", _training),
    Item(26, "how the final model was chosen", "`training.best_by`, `metrics.csv`"),
    Item(27, "ensembles", "", fixed="none in this checkpoint"),
    Item(28, "measures of performance", "`evaluation.json`, `metrics.json`", _metrics),
    Item(29, "uncertainty and significance", "`evaluation.json`, `metrics.json`, the study's report", _intervals),
    Item(30, "robustness", "the study's worlds, arms and seeds"),
    Item(31, "explanations", "`tool/measure_paths.py`"),
    Item(32, "internal testing", "`evaluation.json`, `metrics.json`"),
    Item(33, "external testing", ""),
    Item(34, "registration of a trial", ""),
    Item(35, "numbers included and excluded", "`rejects.json`, `DATA.md`", _excluded),
    Item(36, "demographic and clinical features", "`meta.json` of the samples", _classes),
    Item(37, "results by partition and subgroup", "`groups` in `metrics.json`, the study's report", _metrics),
    Item(38, "accuracy with intervals", "`metrics.json`", _intervals),
    Item(39, "failures", "`report.html` of the classifier, `copies.json`", _confusion),
    Item(40, "limits", "`warnings` and `notes` of the evaluations", _caveats),
    Item(41, "implications for practice", "", fixed="not for clinical use"),
    Item(42, "full protocol", "the plan's and the study's YAML"),
    Item(43, "availability of code, model, data", "the card's licence"),
    Item(44, "funding", ""),
)


def where_table() -> str:
    """The items and where each is answered, as docs/claim.md shows them."""
    return markdown_table(("", "item", "answered by"), ((i.number, i.name, i.where or AUTHORS) for i in ITEMS))


def claim_text(facts: Facts) -> str:
    """CLAIM.md: the items with what the records of this checkpoint answer."""
    rows = [_row(item, facts) for item in ITEMS]
    fixed = [str(item.number) for item in ITEMS if item.fixed]
    filled = sum(answer != AUTHORS for _, _, answer, _ in rows) - len(fixed)
    head = (
        "# CLAIM 2024\n\nThe items of the Checklist for Artificial Intelligence in Medical Imaging (Tejani et al., "
        "2024, doi 10.1148/ryai.240300) in short names of our own; the article has the full text. "
        f"{filled} of {len(ITEMS)} have something from run records beside them; whether that is a whole answer, the "
        f"authors decide. Items {', '.join(fixed)} have the same text for every checkpoint. The others are "
        f"{AUTHORS}.\n\n"
    )
    return head + markdown_table(("", "item", "from the records of this checkpoint", "see also"), rows) + "\n"


def _row(item: Item, facts: Facts) -> tuple[int, str, str, str]:
    answer = item.answer(facts) if item.answer else item.fixed
    return item.number, item.name, answer or AUTHORS, item.where
