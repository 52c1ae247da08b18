"""What the records of runs say of a model: its checkpoint, its data sets, its evaluations.

Nothing here names a patient, a sample or a folder of this machine: counts, settings and digests leave it.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints.checkpoint import Checkpoint, read_checkpoint, summary
from ldm.config import Config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import read_json, sha256_file, unchanged
from ldm.data.annotations import load_samples
from ldm.data.checks import check_unseen, groups_of, salted_digest
from ldm.data.masks import spacing_of
from ldm.data.samples import Sample

RECORDS = ("evaluation.json", "metrics.json")  # of tool/evaluate.py and of classifier.py


@dataclass(frozen=True)
class Partition:
    """One data set in counts. ``behind``: how many of its patients the checkpoint says it was trained on."""

    name: str
    samples: int
    patients: int
    rejected: int
    synthetic: int
    prompts: int
    behind: int
    counts: Mapping[str, Mapping[str, int]]  # by class, lesion type, severity and level
    spacing: tuple[float, float, float] | None  # mm a pixel (mean of rows and columns): least, median, most


@dataclass(frozen=True)
class Record:
    """A file of RECORDS: its kind, its SHA-256 and what it holds."""

    kind: str
    sha256: str
    content: Mapping[str, Any]

    def numbers(self) -> Iterator[tuple[str, float | None, float | None, float | None]]:
        """Name, value and the two ends of the interval of every number that could have an interval."""
        held_out = self.content["test"] if self.kind == "metrics.json" else self.content
        yield from _numbers("", held_out)

    def drawn_by(self) -> dict[str | None, int] | None:
        """How many synthetic images which checkpoint drew, by its SHA-256, None for none; None where nobody says it."""
        if "drawn_by" not in self.content:
            return None
        counts: Counter = Counter()
        for each in self.content["drawn_by"]:
            counts[each["checkpoint_sha256"]] += each["samples"]
        return dict(counts)

    def caveats(self) -> list[str]:
        """What the command that wrote the file warned of."""
        return list(self.content.get("notes" if self.kind == "metrics.json" else "warnings", []))


@dataclass(frozen=True)
class Facts:
    """All that a card is made of. ``trained_on``: steps and number of patients of each set that is behind it."""

    checkpoint: Checkpoint
    config: Config
    sha256: str
    parts: Mapping[str, Mapping[str, Any]]
    trained_on: Sequence[tuple[str, int]]
    partitions: Mapping[str, Partition]
    records: Sequence[Record]


def gather(ckpt: Path, data: Mapping[str, Path], results: Sequence[Path]) -> Facts:
    """The facts of a checkpoint; ``data``: data sets by partition, ``results``: folders or files of RECORDS.

    Raises MedSoftError for a checkpoint that says nothing of itself, for a training set none of whose patients is
    behind it, and for a test set with a patient that is; UsageError for results without a record.
    """
    checkpoint = read_checkpoint(ckpt)
    config = checkpoint.config
    if config is None or not checkpoint.metadata.get("stage"):
        raise MedSoftError(f"{ckpt}: says nothing of itself; expected a checkpoint of a command of this repository")
    groups = groups_of(checkpoint.metadata, ckpt)
    partitions = {}
    for name, path in data.items():
        samples, rejects = load_samples(path)
        if name != "train":
            check_unseen(f"--{name} {path}", samples, groups, ckpt)
        partitions[name] = _partition(name, samples, len(rejects), groups)
        if name == "train" and groups and not partitions[name].behind:
            raise MedSoftError(f"--train {path}: none of its patients is among those that {ckpt} was trained on")
    behind = [(" and ".join(filter(None, group["steps"])) or "not said", len(group["patients"])) for group in groups]
    records = [record for path in results for record in _records(path)]
    return Facts(checkpoint, config, checkpoint.sha256(), summary(checkpoint.state), behind, partitions, records)


def _partition(name: str, samples: Sequence[Sample], rejected: int, groups: Sequence[Mapping[str, Any]]) -> Partition:
    patients = {sample.patient_id for sample in samples}
    known = [(group["salt"], {*group["patients"]}) for group in groups]
    behind = {patient for salt, digests in known for patient in patients if salted_digest(salt, patient) in digests}
    diseased = [sample for sample in samples if not sample.healthy]
    given = [sample.meta["spacing_mm"] for sample in samples if sample.meta.get("spacing_mm") is not None]
    spacings = sorted(statistics.mean(spacing_of(each)) for each in given)
    return Partition(
        name,
        samples=len(samples),
        patients=len(patients),
        rejected=rejected,
        synthetic=sum(sample.synthetic for sample in samples),
        prompts=len({sample.prompt for sample in samples}),
        behind=len(behind),
        counts={
            "class": Counter("healthy" if sample.healthy else "diseased" for sample in samples),
            "lesion type": Counter(sample.lesion_type or "not said" for sample in diseased),
            "severity": Counter(sample.severity or "not said" for sample in diseased),
            "level": Counter(sample.level or "not said" for sample in samples),
        },
        spacing=(spacings[0], statistics.median(spacings), spacings[-1]) if spacings else None,
    )


def _records(path: Path) -> list[Record]:
    files = [path] if path.is_file() else [path / name for name in RECORDS if (path / name).is_file()]
    if not files or any(file.name not in RECORDS for file in files):
        raise UsageError(f"--results {path}: expected {' or '.join(RECORDS)}, or a folder that holds one of them")
    found = []
    for file in files:
        with unchanged(file):  # somebody may be evaluating at this moment
            content, digest = read_json(file), sha256_file(file)
        if not isinstance(content, dict) or (file.name == "metrics.json" and not isinstance(content.get("test"), dict)):
            raise MedSoftError(f"{file}: holds no numbers of a test; was it written by evaluate.py or classifier.py?")
        found.append(Record(file.name, digest, content))
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float | None, float | None, float | None]]:
    """The numbers below ``value`` that are written as {"value", "low", "high"}, with their keys joined by spaces."""
    if not isinstance(value, Mapping):
        return
    if {"value", "low", "high"} <= value.keys():
        yield name, value["value"], value["low"], value["high"]
        return
    for key, inner in value.items():
        yield from _numbers(f"{name} {key}".strip().replace("_", " "), inner)
