"""Results of dataset_infer.py back to where they came from: new DICOM images, or NIfTI (see ``tool/export_dicom.py``).

One folder a result, whole or not at all: the image, the lesion and the soft mask. The private mapping of the import is
the way back; nothing of it is written but to those who ask for it (``--same_study``, ``--link_source``).
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.core import cli
from ldm.core.errors import FewWarnings, FileError, MedSoftError, UsageError, first_line, warn_of_first
from ldm.core.files import Contents, atomic_folder, fingerprint, read_json, write_json
from ldm.core.paths import confined
from ldm.core.run_folder import RunFolder
from ldm.core.tables import counted, write_csv
from ldm.data.annotations import write_rejects
from ldm.data.folders import scan_folder
from ldm.data.samples import Reject, Sample
from ldm.exchange.origins import MAPPING, PrivateMapping
from ldm.exchange.privacy import Pseudonyms, read_key
from ldm.exchange.results import ExportedResult, files_of, known, write_dicom, write_nifti
from ldm.reviews.choice import review_settings, without_rejected

log = logging.getLogger(__name__)

FORMATS = {"dicom": ".dcm", "nifti": ".nii.gz"}
ABOUT = "about.json"  # in the folder of a result that was exported
FIRST_SERIES = 9001  # the numbers of new series begin here, above those that scanners give


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, where to, and what of its source is said: the flags of the command, under their names."""

    results: Path
    private: Path
    output_dir: Path
    key: Path | None = None
    format: str = "dicom"
    same_study: bool = False
    link_source: bool = False
    review: Sequence[Path] = ()
    overwrite: bool = False

    @property
    def key_file(self) -> Path:
        return self.key or self.private / "key"

    def check(self) -> None:
        """UsageError for paths that are not there or lie in each other, and for flags that contradict each other."""
        for name, path in (("RESULTS", self.results), ("--private", self.private / MAPPING), ("--key", self.key_file)):
            if not path.exists():
                raise UsageError(f"{name} {path}: does not exist; --private is the OUTPUT_DIR.private of the import")
        output = self.output_dir.resolve()
        for path in (self.results.resolve(), self.private.resolve()):
            if path.is_relative_to(output) or output.is_relative_to(path):
                raise UsageError(f"--output_dir {self.output_dir}: lies in {path} or holds it; give another folder")
        if self.format == "nifti" and (self.same_study or self.link_source):
            raise UsageError("--same_study and --link_source belong to DICOM; --format nifti has no header for them")


def export(options: ExportOptions) -> int:
    """Write what is missing in ``options.output_dir``; the exit code.

    Raises UsageError or MedSoftError, with the folder as it was, for options, a mapping or results that cannot be used.
    """
    options.check()
    mapping = PrivateMapping(options.private / MAPPING)
    pseudonyms = Pseudonyms(read_key(options.key_file))
    samples, rejects = scan_folder(options.results)
    content = Contents()
    samples, reviewed = without_rejected(options.review, samples, content)
    planned, more = plan(samples, mapping, options)
    rejects += more
    if not planned:
        raise MedSoftError(f"{options.results}: no result can be exported; first: {rejects[0]}")
    if options.same_study:
        log.warning(
            "warning: --same_study writes synthetic images under the real patient's name, into the real study; never "
            "send them to a clinical archive"
        )
    if options.link_source:
        log.warning("warning: --link_source names the real images, by which their patients can be found")
    folder = RunFolder(options.output_dir, "export.json", own=("rejects.json", "export.csv"), samples=ABOUT)
    flags = {"format": options.format, "same_study": options.same_study, "link_source": options.link_source}
    identities = [_identity(each, content) for each in planned]
    settings = {"results": fingerprint(identities), **flags, **review_settings(reviewed)}
    with folder.lock():
        before = folder.open(settings, options.overwrite) or {}
        needed = {each.name: (ABOUT, *files_of(each, FORMATS[options.format])) for each in planned}
        if before.get("complete") and all(folder.has(name, *files) for name, files in needed.items()):
            log.info("%s: already complete (%s)", folder.path, counted(before["exported"], "result"))
            return cli.SOME_REJECTED if before["rejected"] else cli.DONE
        started = before.get("started") or datetime.now().strftime("%Y%m%d %H%M%S")
        folder.claim(started=started)
        missing = [each for each in planned if not folder.has(each.name, *needed[each.name])]
        rejects += _write(folder, missing, options, pseudonyms, started, content)
        return _finish(folder, planned, rejects, started, {"review": reviewed} if reviewed else {})


def plan(
    samples: Sequence[Sample], mapping: PrivateMapping, options: ExportOptions
) -> tuple[list[ExportedResult], list[Reject]]:
    """Each result with its origin and its place in the new series, and those that cannot be exported.

    Results of one series and plane make one new series; what repeats a slice goes into a further one.
    """
    rejects: list[Reject] = []
    groups: dict[tuple, list[tuple[Sample, Any]]] = defaultdict(list)
    seen: Counter[tuple] = Counter()
    for sample in sorted(samples, key=lambda sample: sample.sample_id):
        try:
            if not sample.synthetic or sample.mask is None or sample.soft_mask is None:
                reason = "is no result of dataset_infer.py: a synthetic sample with a mask and a soft mask is expected"
                raise FileError(sample.image.parent, reason)
            origin = mapping.origin_of(sample)
            if options.format == "dicom" and origin.kind != "dicom":
                raise FileError(
                    sample.image,
                    "comes from a file without a DICOM header (NIfTI and the like), so it cannot become DICOM; "
                    "--format nifti writes it",
                )
            confined(options.output_dir, sample.sample_id)
        except FileError as error:
            rejects.append(Reject(sample.sample_id, error.path, error.reason))
            continue
        study = (origin.patient, origin.study_uid)
        place = (origin.series, origin.place[0], origin.instance is None)
        groups[*study, *place, seen[*place, origin.place[1]]].append((sample, origin))
        seen[*place, origin.place[1]] += 1
    numbers: Counter[tuple] = Counter()
    planned = []
    for key in sorted(groups, key=str):
        series_number = FIRST_SERIES + 10 * numbers[key[:2]]
        numbers[key[:2]] += 1
        ordered = sorted(groups[key], key=lambda pair: pair[1].place[1])
        planned += [
            ExportedResult(sample, origin, "/".join(map(str, key[2:])), series_number, number)
            for number, (sample, origin) in enumerate(ordered, 1)
        ]
    return planned, rejects


def _identity(result: ExportedResult, content: Contents) -> list:
    origin, files = result.origin, [content(path) for path in _files(result)]
    instance = origin.instance and (origin.instance.sop_uid, origin.instance.frame, origin.instance.turn)
    place = [origin.series, origin.affine.tolist(), origin.value_offset, origin.value_scale, instance]
    return [result.name, known(result), files, place, result.series, result.series_number, result.number]


def _files(result: ExportedResult) -> list[Path | None]:
    """What is read of a result."""
    return [result.sample.image, result.sample.mask, result.sample.soft_mask]


def _write(
    folder: RunFolder,
    results: Sequence[ExportedResult],
    options: ExportOptions,
    pseudonyms: Pseudonyms,
    started: str,
    content: Contents,
) -> list[Reject]:
    """Write the results that are missing; returns those that could not be, or are others by now than in ``content``."""
    rejects, faults = [], FewWarnings(log, "results that could not be exported")
    write: Callable[[Path, ExportedResult], dict[str, Any]] = write_nifti
    if options.format == "dicom":
        write = partial(
            write_dicom,
            pseudonyms=pseudonyms,
            run=folder.run,
            started=started,
            same_study=options.same_study,
            link_source=options.link_source,
        )
    for result in tqdm(results, "exporting", unit=" results", disable=None):
        try:
            with atomic_folder(folder.path / result.name) as unfinished:
                with _odd_header(result, faults):
                    about = write(unfinished, result)
                content.check(_files(result))
                write_json(unfinished / ABOUT, {"sample_id": result.name, **about})
        except FileError as error:
            own = error.path.is_relative_to(result.sample.image.parent)
            if not own:  # no path of a source is written below the output
                faults.warn(f"{result.name}: its source {error}")
            file, reason = (error.path, error.reason) if own else (result.sample.image, f"its source {error.reason}")
            rejects.append(Reject(result.name, file, reason))
    faults.close()
    return rejects


@contextmanager
def _odd_header(result: ExportedResult, faults: FewWarnings) -> Iterator[None]:
    """What pydicom and highdicom raise where a header holds what they do not expect rejects this result alone.

    Their words may repeat the header: only the console shows them. Any OSError (full disk) is the caller's.
    """
    try:
        yield
    except FileError:
        raise
    except (MedSoftError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        kind = type(error).__name__
        faults.warn(f"{result.name}: {kind}: {first_line(error)}")
        raise FileError(result.sample.image, f"cannot be written with its source's header ({kind})") from error


def _finish(
    folder: RunFolder, planned: Sequence[ExportedResult], rejects: Sequence[Reject], started: str, about: dict[str, Any]
) -> int:
    """Write the table, the list of rejects and the record, with what it says ``about`` a review; the exit code."""
    write_rejects(folder.path / "rejects.json", rejects)
    warn_of_first(log, (f"not exported: {reject}" for reject in rejects), shown=5)
    if rejects:
        said = counted(len(rejects), "result was", "results were")
        log.warning("%s not exported, listed in %s", said, folder.path / "rejects.json")
    rows = [read_json(folder.path / each.name / ABOUT) for each in planned if folder.has(each.name, ABOUT)]
    if not rows:
        raise MedSoftError(f"{folder.path}: no result could be exported; first: {rejects[0]}")
    write_csv(folder.path / "export.csv", rows)
    frames = sum(row["kind"] == "frame" for row in rows)
    folder.finish(started=started, exported=len(rows), rejected=len(rejects), frames=frames, **about)
    kinds = f"{frames} as frames of their sources, changed inside the soft masks alone, {len(rows) - frames} as slices"
    log.info("%s: %s (%s)", folder.path, counted(len(rows), "result"), f"{kinds} with a geometry of their own")
    return cli.SOME_REJECTED if rejects else cli.DONE
