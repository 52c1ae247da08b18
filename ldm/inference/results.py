"""Results on the disk: sample folders whose meta.json says how each was made."""

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.core.errors import MedSoftError
from ldm.core.files import Contents, fingerprint, read_json, write_json
from ldm.data.checks import TRAINED_ON, groups_of, trained_on
from ldm.data.folders import write_sample
from ldm.data.images import with_alpha
from ldm.data.preparation import PreparedSample
from ldm.data.samples import HEALTHY, Reject
from ldm.diffusion.noise import NOISE
from ldm.inference.gallery import write_gallery, write_thumbnail
from ldm.inference.shares import Summary
from ldm.inference.tasks import RESULT_KEYS, Task, donor_digest
from ldm.reports.comparison import ResultImage

TAG = "synthetic picture drawn by MedSoft-Diffusion; not a patient's image; not for clinical use"
REJECTED = "rejected_"  # and the criterion: how many drawings that has rejected
TOKEN = re.compile(r"(--tok\w*[= ])\S+")  # of a command line, a secret that no record may hold
REFUSED = "refused"  # the folder in which a run keeps, task by task, which seeds were not accepted, and why
FILES = ("image.png", "mask.png", "soft_mask.png", "prompt.txt", "meta.json")


@dataclass(frozen=True)
class NotAccepted(Reject):
    """A task of which no drawing was accepted; ``tries``: of each that was judged the criteria that it did not meet."""

    tries: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Result:
    """One result before it is written: its task, its ``pixels`` beside the original's, its files and its meta.json.

    ``files``: as ``write_sample`` takes them, ``prompt.txt`` and ``meta.json`` aside.
    """

    task: Task
    image: ResultImage
    files: Mapping[str, np.ndarray | Path | bytes]
    metadata: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write its sample folder into ``folder``, whole or not at all."""
        tags = {"Comment": TAG, "Description": self.task.prompt}
        write_sample(folder / self.task.name, self.files, self.task.prompt, self.metadata, tags)


def write_refused(home: Path, name: str, tries: Sequence[Mapping[str, Any]]) -> None:
    """Keep what was not accepted of a task, {"seed", "reasons"} each, in the folder of all results."""
    write_json(home / REFUSED / f"{name}.json", tries)


def read_refused(home: Path, name: str) -> list[dict[str, Any]]:
    """What ``write_refused`` has written; MedSoftError where something else lies there."""
    path = home / REFUSED / f"{name}.json"
    if not path.exists():
        return []
    found = read_json(path)
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and {"seed", "reasons"} <= {*each} for each in found
    ):
        raise MedSoftError(f"{path}: expected a list of drawings that were not accepted; delete it to draw them again")
    return found


def provenance_of(
    checkpoint: Checkpoint, yaml: Path, settings: Mapping[str, Any], overrides: Sequence[str], exact: bool
) -> dict[str, Any]:
    """What meta.json of every result of a checkpoint says about how it was made, where sampling begins with noise.

    checkpoint: what is drawn with, as it was read; settings: the configuration's ``identity`` of images; overrides:
    with ``yaml`` they give that configuration. MedSoftError if the checkpoint's file is another one by now.
    """
    learned_from = groups_of(checkpoint.metadata, checkpoint.path)
    return {
        "checkpoint": str(checkpoint.path.resolve()),
        "checkpoint_sha256": checkpoint.sha256(),
        "config": str(yaml.resolve()),
        "overrides": list(overrides),
        "config_sha256": fingerprint(settings),
        "exact": exact,
        "noise": NOISE,
        "command": TOKEN.sub(r"\1...", shlex.join(["python", *sys.argv])),
        TRAINED_ON: learned_from,
    }


def is_whole(folder: Path) -> bool:
    """Whether the sample folder of a result is there with all its files."""
    return all((folder / name).is_file() for name in FILES)


def result_of(
    home: Path, task: Task, prepared: PreparedSample, pixels: np.ndarray, provenance: dict[str, Any], content: Contents
) -> Result:
    """What is written of one result.

    home: the folder of all results, from which its paths are seen; pixels: the composited image, like
    ``prepared.original``; provenance: what its meta.json says about how it was made, enough for --replay to make it
    again; content: the digests of the files that it was made from. MedSoftError if one of them is another one by now.
    """
    for sample in task.inputs:
        content.check(sample.files)
    image = ResultImage(prepared.original, pixels, prepared.soft, prepared.intensity_range)
    files: dict[str, np.ndarray | Path | bytes] = {
        "image.png": with_alpha(pixels, task.sample.image, prepared.soft > 0),
        "mask.png": prepared.hard.astype(np.uint8) * 255,
        "soft_mask.png": np.rint(prepared.soft * 255).astype(np.uint8),
    }
    anatomy = task.sample.anatomy
    if anatomy is not None and anatomy.is_file():  # where the vertebrae are has not changed
        files[f"anatomy{anatomy.suffix}"] = anatomy
    metadata = result_metadata(task, prepared, image.changed_outside, provenance, content)
    paths = [key for key in ("parent_image", "checkpoint", "config") if key in metadata]
    metadata |= {key: _portable(Path(metadata[key]), home / task.name, home) for key in paths}
    return Result(task, image, files, metadata)


class FolderResults:
    """Results as sample folders in ``path``. Those of a run are one part: each is finished by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def parts(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        """The tasks whose results are finished together."""
        return [tasks]

    def missing(self, number: int, part: Sequence[Task]) -> list[int]:
        """The numbers of the tasks of part ``number`` whose results are not there."""
        return [k for k, task in enumerate(part) if not is_whole(self.path / task.name)]

    def write(self, result: Result) -> None:
        """Write one result and its thumbnail."""
        result.write(self.path)
        with suppress(MedSoftError):  # then the report makes it, or says why it cannot
            write_thumbnail(self.path, result.task.name, result.image)

    def close(self, number: int, part: Sequence[Task], rejects: Sequence[Reject]) -> None:
        """Finish part ``number``, all of whose results but the rejects' are written."""

    def count(self, tasks: Sequence[Task]) -> int:
        """How many of ``tasks`` have their result."""
        return sum(is_whole(self.path / task.name) for task in tasks)

    def summary(self, tasks: Sequence[Task], rejects: Sequence[Reject]) -> Summary:
        """What is there of ``tasks``; ``rejects``: what this command has found."""
        return summary_of([self.path / task.name for task in tasks if is_whole(self.path / task.name)], rejects)

    def write_report(self) -> Path:
        """Write the report of all results in the folder; returns its first page."""
        return write_gallery(self.path)


def summary_of(folders: Sequence[Path], rejects: Sequence[Reject]) -> Summary:
    """What the meta.json of the results in these sample folders say together, beside the ``rejects``."""
    records = [read_json(folder / "meta.json") for folder in folders]
    return Summary(
        pictures=len(records),
        changed_outside_pixels=sum(record["changed_outside_pixels"] for record in records),
        rejects=list(dict.fromkeys(rejects)),
        masks=count_masks(records),
        clipped_pixels=sum(record.get("clipped_pixels", 0) for record in records),
        check=count_checks(records, rejects),
    )


def count_masks(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How often the masks of results come from where, by their meta.json, the reasons why they were not carried over
    apart: {"carry": 96, "blob": 1, "blob (the image marks no vertebra)": 3}."""
    reasons = ((record.get("mask_from"), record.get("mask_fallback")) for record in records)
    return dict(Counter(f"{origin} ({why})" if why else origin for origin, why in reasons if origin))


def count_checks(records: Sequence[Mapping[str, Any]], rejects: Sequence[Reject]) -> dict[str, int]:
    """How many images were drawn, accepted, and accepted at once, and how many each criterion has rejected.

    By the meta.json of results and by the rejects; empty where nobody has judged.
    """
    tries = [
        [tuple(each["reasons"]) for each in record["check"]["rejected"]] for record in records if record.get("check")
    ]
    never = [each.tries for each in rejects if isinstance(each, NotAccepted)]
    if not tries and not never:
        return {}
    causes = Counter(f"{REJECTED}{name}" for each in (*tries, *never) for names in each for name in names)
    drawn = len(tries) + sum(map(len, (*tries, *never)))
    return {"drawn": drawn, "accepted": len(tries), "at_once": sum(not each for each in tries), **causes}


def result_metadata(
    task: Task, prepared: PreparedSample, changed: int, provenance: dict[str, Any], content: Contents
) -> dict[str, Any]:
    """The meta.json of a result of which ``changed`` pixels outside the soft mask differ from the parent's."""
    source, parent = task.source, task.sample
    # Behind a result is also what made its parent, if that is synthetic itself.
    behind = trained_on("", (), provenance[TRAINED_ON], parent.meta.get(TRAINED_ON, []))
    if task.record is not None:
        paths = {"parent_image": str(parent.image), **{key: provenance[key] for key in ("checkpoint", "config")}}
        return {**task.record, **paths, "changed_outside_pixels": changed, TRAINED_ON: behind}
    diseased_source = source if source is not None and task.prompt.strip().lower() != HEALTHY else None
    metadata = {
        "sample_id": task.name,
        "parent_id": parent.sample_id,
        "patient_id": parent.patient_id,
        "lesion_type": diseased_source.lesion_type if diseased_source else None,
        "severity": diseased_source.severity if diseased_source else None,
        "level": parent.level,
        "synthetic": True,
        "seed": task.seed,
        "variant": task.variant,
        "prompt": task.prompt,
        "prompt_match": task.match,
        "prompt_from": diseased_source.sample_id if diseased_source and diseased_source is not parent else None,
        "mask_from": task.mask and task.mask.origin,
        "mask_source": task.mask and task.mask.source,
        "mask_fallback": task.mask and task.mask.fallback,
        "pasted_from": task.donor and task.donor.sample_id,
        "pasted_sha256": task.donor and donor_digest(task.donor, content),
        "pasted_by": task.donor and task.pasted_by,
        "clipped_pixels": task.clipped_pixels or None,
        "spacing_mm": parent.meta.get("spacing_mm"),
        "window": list(prepared.intensity_range) if prepared.original.dtype == np.uint16 else None,
        "parent_image": str(parent.image),
        "parent_sha256": content(parent.image),
        "changed_outside_pixels": changed,
        **provenance,
        TRAINED_ON: behind,
    }
    known = {key: value for key, value in metadata.items() if value is not None or key in ("lesion_type", "severity")}
    return known | {key: value for key, value in parent.meta.items() if key not in RESULT_KEYS}


def _portable(path: Path, result: Path, output_dir: Path) -> str:
    """``path`` as seen from the result, if both lie below the folder that holds ``output_dir`` and can move with it."""
    real = path.parent.resolve() / path.name
    if not real.is_relative_to(output_dir.resolve().parent):
        return str(path)
    return Path(os.path.relpath(real, result.resolve())).as_posix()
