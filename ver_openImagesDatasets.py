"""Check a dataset folder and write its annotation file and its split by patient."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

if TYPE_CHECKING:
    from ldm.data.samples import Reject, Sample

log = logging.getLogger(__name__)
SHOWN_REJECTS = 20


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "Check every sample folder below ROOT_DIR (image.png, mask.png, prompt.txt; optional anatomy.png, "
        "soft_mask.png, meta.json) and write the annotation file with its _train, _val and _test split. Samples that "
        "cannot be used are listed in the _rejects file (exit code 3). When the folder has grown, run it again: the "
        "files are replaced."
    )
    parser.add_argument("--root_dir", type=Path, required=True, help="dataset folder, searched recursively")
    parser.add_argument("--output_file", type=Path, default="openimages_format.json", help="annotation file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        default=(0.7, 0.1, 0.2),
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the patients",
    )
    parser.add_argument(
        "--strict", action="store_true", help="one unusable sample is an error: exit 1, nothing written"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    """Scan, split, write; returns the exit code."""
    from ldm.data.annotations import scan_folder, split_by_patient, write_annotations, write_rejects

    paths = output_paths(args.output_file)
    split_by_patient([], args.seed, args.fractions)  # wrong fractions show before minutes of reading
    samples, rejects = scan_folder(args.root_dir, progress=True)
    _report_rejects(rejects)
    if not samples:
        raise MedSoftError(f"{args.root_dir}: none of its {len(rejects)} samples can be used; nothing was written")
    if rejects and args.strict:
        raise MedSoftError(
            f"{args.root_dir}: {len(rejects)} samples cannot be used and --strict was given; nothing written"
        )
    split = split_by_patient(samples, args.seed, args.fractions)
    for name, group in {**split, "all": samples}.items():
        write_annotations(paths[name], group)
    write_rejects(paths["rejects"], rejects)
    _summarise({**split, "all": samples}, rejects, paths)
    return cli.SOME_REJECTED if rejects else cli.DONE


def output_paths(output_file: Path) -> dict[str, Path]:
    """The files beside ``output_file``: all, train, val, test, rejects; different ones whatever its suffix is."""
    if output_file.is_dir() or not output_file.name:
        raise UsageError(f"--output_file {output_file}: expected the name of a file to write, found a folder")
    base = output_file.stem if output_file.suffix.lower() == ".json" else output_file.name
    parts = {name: output_file.with_name(f"{base}_{name}.json") for name in ("train", "val", "test", "rejects")}
    return {"all": output_file, **parts}


def _report_rejects(rejects: "Sequence[Reject]") -> None:
    for reject in rejects[:SHOWN_REJECTS]:
        log.warning("rejected: %s", reject)
    if len(rejects) > SHOWN_REJECTS:
        log.warning("... and %d more", len(rejects) - SHOWN_REJECTS)


def _summarise(groups: "dict[str, list[Sample]]", rejects: "Sequence[Reject]", paths: dict[str, Path]) -> None:
    from ldm.core.files import content_id
    from ldm.data.checks import annotation_rows, leaks, warn_of_similar_prompts
    from ldm.data.samples import shown

    log.info("%-6s %8s %8s %9s %9s  %s", "", "samples", "healthy", "diseased", "patients", "file")
    for name, group in groups.items():
        healthy, patients = sum(sample.healthy for sample in group), len({sample.patient_id for sample in group})
        counts = (len(group), healthy, len(group) - healthy, patients)
        log.info("%-6s %8d %8d %9d %9d  %s", name, *counts, shown(paths[name]))
    samples = groups["all"]
    if all(sample.patient_id == sample.sample_id for sample in samples):
        log.info("no meta.json names a patient_id: each sample counts as a patient of its own in the split")
    nowhere = sum(s.healthy and s.anatomy is None and not any(s.box) for s in samples)
    if nowhere:
        log.info(
            "%d healthy samples have neither a mask nor anatomy.png: for the classifier only, not drawn on", nowhere
        )
    for name in ("train", "val", "test"):
        if not groups[name]:
            log.warning("%s is empty: too few patients (%d)", shown(paths[name]), len({s.patient_id for s in samples}))
    warn_of_similar_prompts(samples)
    pictures = {sample.sample_id: content_id(sample.image) for sample in samples}
    for leak in leaks(
        row for name in ("train", "val", "test") for row in annotation_rows(name, groups[name], pictures)
    ):
        log.warning("warning: %s", leak)
    if rejects:
        log.warning("%d samples rejected, listed in %s", len(rejects), shown(paths["rejects"]))


if __name__ == "__main__":
    cli.run(build_parser(), main)
