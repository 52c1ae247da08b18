"""DICOM series and volumes become a dataset folder (see ``tool/import_volumes.py``).

What lies below the output names nobody. Who is who lies in ``OUTPUT_DIR.private`` beside it:

    key             of the pseudonyms
    mapping.json    series and instances by their digests, for ``tool/export_dicom.py``
    cases.csv       which files a case id stands for
    left_out.csv    what was left out, with its paths
    cases/          a record of each finished case, by which an interrupted run goes on
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError, first_line, warn_of_first
from ldm.core.files import content_id, fingerprint, read_json, read_text
from ldm.core.paths import confined
from ldm.core.run_folder import RunFolder
from ldm.core.tables import counted, write_csv
from ldm.core.threads import in_processes
from ldm.data.annotations import write_rejects
from ldm.data.samples import Reject, Sample, shown
from ldm.exchange.cases import Case, Problem, Wanted, find_cases
from ldm.exchange.pairing import inside, pair
from ldm.exchange.privacy import PrivateFolder, Pseudonyms, read_key
from ldm.exchange.targets import check_asked
from ldm.exchange.writing import CutOptions, LeftOutPart, OutputError, Written, texts_of, texts_of_files, write_case
from ldm.reports.overlays import write_overlays
from ldm.volumes.intensity import window_asked
from ldm.volumes.labels import scheme

log = logging.getLogger(__name__)

OVERLAYS = "import_overlays.html"
MOST_WORKERS = 4  # each holds a whole volume
SMALL = 50_000_000  # bytes: less is imported before other processes have started
SAME = "is the same image as another one"
CASE = 12  # letters of a case id
SHOWN = 10


@dataclass(frozen=True)
class ImportOptions:
    """What is imported and how: the flags of the command, under their names."""

    labels: Path | None
    lesions: Path | None
    table: Path | None
    preset: str | None
    map: Path | None
    series: str | None
    modality: str | None
    plane: str
    target: Sequence[str]
    slices: str
    limit: int | None
    window: Sequence[str] | None
    mm_per_pixel: float | None
    year: bool
    key: Path | None

    def cutting(self) -> CutOptions:
        """What is made of each volume; UsageError for values that cannot be."""
        slices = int(self.slices) if self.slices.isdecimal() else self.slices
        check_asked(slices, self.target)
        window = window_asked(self.window)
        return CutOptions(self.plane, tuple(self.target), slices, window, self.mm_per_pixel, self.modality, self.year)


def import_volumes(source: Path, output_dir: Path, options: ImportOptions, overwrite: bool = False) -> int:
    """Write the samples of SOURCE into ``output_dir``; returns the exit code.

    The same command again finishes what is missing, and takes in what has come to SOURCE or changed there. Raises
    UsageError for flags that contradict each other and for a folder of other settings (unless ``overwrite``), and
    MedSoftError if nothing can be imported.
    """
    options.cutting()
    if not source.exists():
        raise UsageError(f"{source}: does not exist; expected a folder, an image or a table (CSV)")
    if source.is_dir() and _within(output_dir, source):
        raise UsageError(f"--output_dir {output_dir}: lies inside {source} or holds it; give another folder")
    folder = RunFolder(
        output_dir,
        "import.json",
        what="imported samples",
        own=("rejects.json", "left_out.csv", OVERLAYS, f"{Path(OVERLAYS).stem}_files"),
        samples="meta.json",
    )
    private = PrivateFolder(Path(f"{os.path.abspath(output_dir)}.private"))
    with folder.lock():
        log.info("looking for images in %s", source)
        cases, problems = _gathered(source, options)
        private.create()
        run = _Run(source, folder, private, read_key(options.key or private.path / "key"), options)
        record = folder.open(run.settings(), overwrite)
        if not folder.same_run:
            private.clear("cases")
        folder.claim()
        records = run.all(cases)
        return run.finish(records, problems, complete=bool(record and record["complete"]))


def _within(output: Path, source: Path) -> bool:
    above, below = source.resolve(), output.resolve()
    return below.is_relative_to(above) or above.is_relative_to(below)


def _gathered(source: Path, options: ImportOptions) -> tuple[list[Case], list[Problem]]:
    """The cases to import, and what of the source is none. MedSoftError without any case."""
    partners = frozenset(inside(options.labels, source) | inside(options.lesions, source))
    wanted = Wanted(options.series, options.modality, partners)
    cases, problems = find_cases(source, wanted)
    cases, more = pair(cases, options.labels, options.lesions, options.table) if cases else ([], [])
    problems += more
    known: dict[str, Case] = {}
    for case in cases:
        if (twin := known.setdefault(case.key, case)) is not case:
            problems.append(Problem(case.image, case.names[0], f"is the same image as {twin.names[0]}", public=SAME))
    if not known:
        first = next((each for each in problems if each.rejected), problems[0] if problems else None)
        reason = f"; the first of {len(problems)}: {first.path}: {first.reason}" if first else ""
        raise MedSoftError(f"{source}: holds no image that can be imported{reason}")
    return [*known.values()], problems


class _Run:
    """One import into one folder."""

    def __init__(
        self,
        source: Path,
        folder: RunFolder,
        private: PrivateFolder,
        key: bytes,
        options: ImportOptions,
    ) -> None:
        self.source, self.folder, self.private, self.options = source, folder, private, options
        self.pseudonyms = Pseudonyms(key)
        self.cutting, self.scheme = options.cutting(), scheme(options.preset, options.map)
        self.made = 0  # cases that have changed with this command

    def settings(self) -> dict[str, Any]:
        """What decides the output, without a path: those are digests."""
        given = asdict(self.options)
        places = {"source": self.source} | {name: given.pop(name) for name in ("labels", "lesions", "table")}
        digest = self.pseudonyms.digest
        given |= {name: digest("path", os.path.abspath(path)) if path else None for name, path in places.items()}
        given["series"] = given["series"] and digest("series", given["series"])
        return given | {"map": content_id(self.options.map), "key": digest("key", "")}

    def case_id(self, case: Case) -> str:
        """The public name of a case: a keyed digest of what it is read from."""
        return f"case_{self.pseudonyms.digest('case', case.key, CASE)}"

    def all(self, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """The record of every case by its id, in the order of the cases; those that are missing are made now."""
        stored = self.private.read_all("cases")
        gone = {*stored} - {self.case_id(case) for case in cases}
        for case_id in gone:
            self._forget(case_id, stored[case_id])
        self.made = len(gone)
        patients: dict[str, list[Case]] = {}
        for case in cases:
            patients.setdefault(case.patient, []).append(case)
        found: dict[str, dict[str, Any]] = {}
        with tqdm(total=len(patients), desc="importing", unit=" patients", disable=None) as bar:
            for records, made in self._side_by_side(patients.values(), stored):
                found |= records
                self.made += made
                bar.update()
        return {case_id: found[case_id] for case_id in map(self.case_id, cases)}

    def _side_by_side(
        self, patients: Collection[Sequence[Case]], stored: Mapping[str, dict[str, Any]]
    ) -> Iterator[tuple[dict[str, dict[str, Any]], int]]:
        """``patient`` for each of them, in processes of their own where there is much to read: decoders of JPEG 2000
        let no other thread run."""
        given = [[stored.get(self.case_id(case)) for case in own] for own in patients]
        size = sum(os.path.getsize(path) for own in patients for case in own for path in case.files)
        workers = min(MOST_WORKERS, os.cpu_count() or 1, len(patients))
        if workers == 1 or size < SMALL or all(record for records in given for record in records):
            yield from map(self.patient, patients, given)
            return
        yield from in_processes(self.patient, patients, given, workers=workers, what="import")

    def patient(
        self, cases: Sequence[Case], stored: Sequence[dict[str, Any] | None]
    ) -> tuple[dict[str, dict[str, Any]], int]:
        """The records of one patient's cases by their ids, and how many of them were made now.

        They follow each other, since they share the limit.
        """
        records, made, left = {}, 0, self.options.limit
        for case, known in zip(cases, stored, strict=True):
            record = self._record(case, known, left)
            made += record != known
            left = None if left is None else left - len(record["samples"])
            records[self.case_id(case)] = record
        return records, made

    def _record(self, case: Case, stored: dict[str, Any] | None, left: int | None) -> dict[str, Any]:
        """The stored record if it is of the same files and whole, else the one of the case imported now.

        An image that was rejected is tried again: a disk may have been away, a decoder may have come.
        """
        case_id = self.case_id(case)
        files = [[str(file), *_state(file)] for path in case.files for file in _files(path)]
        content = fingerprint([files, case.patient, case.rows, left])
        tried_again = stored and any(part["what"] == "image" and part["rejected"] for part in stored["left_out"])
        if stored and not tried_again and stored["content"] == content and all(map(self._whole, stored["samples"])):
            return stored
        if stored:
            self._forget(case_id, stored)
        try:
            if left == 0:
                most = counted(self.options.limit or 0, "sample")
                reason = f"the patient's other images have given the {most} of --limit"
                made = Written((), (LeftOutPart("image", reason, reason, False),), {}, {})
            else:
                made = write_case(case, self.folder.path, self.source, self.pseudonyms, self.scheme, self.cutting, left)
        except OutputError:
            raise
        except Exception as error:  # decoders raise many kinds of error on hostile files
            kind = "" if isinstance(error, MedSoftError) else f"{type(error).__name__}: "
            reason = kind + first_line(error)
            hidden = texts_of(case, self.source).hidden(reason)
            made = Written((), (LeftOutPart("image", reason, hidden, True),), {}, {})
        about = {"content": content, "name": case.names[0], "path": os.path.abspath(case.image)}
        who = {"patient_id": case.patient, "patient": self.pseudonyms.patient(case.patient)}
        record = json.loads(json.dumps(about | who | vars(made), default=vars))
        self.private.write(f"cases/{case_id}.json", record)
        return record

    def _whole(self, sample_id: str) -> bool:
        return self.folder.has(sample_id, "image.png", "prompt.txt", "meta.json")

    def _forget(self, case_id: str, stored: Mapping[str, Any]) -> None:
        """Remove the samples of a case that has gone, or whose files have changed."""
        for sample_id in stored["samples"]:
            shutil.rmtree(confined(self.folder.path, sample_id), ignore_errors=True)
        (self.private.path / "cases" / f"{case_id}.json").unlink(missing_ok=True)

    def finish(self, records: Mapping[str, Mapping[str, Any]], problems: Sequence[Problem], complete: bool) -> int:
        """Write the mapping, the tables and the sheets, then the record; returns the exit code."""
        left_out = [
            {"case": case_id, "path": record["path"], **part}
            for case_id, record in records.items()
            for part in record["left_out"]
        ]
        left_out += [self._problem(problem) for problem in problems]
        rejected = [row for row in left_out if row["rejected"]]
        self._write_private(records, left_out)
        path = self.folder.path
        rows = [row | {"reason": row["public"], "rejected": "yes" if row["rejected"] else "no"} for row in left_out]
        columns = ("case", "what", "reason", "rejected")
        write_csv(path / "left_out.csv", [{key: row[key] for key in columns} for row in rows], columns)
        rejects = [Reject(f"{row['case']}/{row['what']}", Path(row["case"]), row["public"]) for row in rejected]
        write_rejects(path / "rejects.json", rejects)
        samples = [_sample(path, sample_id) for record in records.values() for sample_id in record["samples"]]
        if samples or len(rejected) > 1:
            warn_of_first(log, (f"rejected: {_line(row)}" for row in rejected), path / "left_out.csv", SHOWN)
        if not samples:
            first = f"; the first of {len(left_out)}: {_line(left_out[0])}" if left_out else ""
            raise MedSoftError(f"{self.source}: nothing was imported{first}")
        if self.made or not (path / OVERLAYS).exists():
            write_overlays(path / OVERLAYS, samples)
        self.folder.finish(samples=len(samples), left_out=len(left_out), rejected=len(rejected))
        self._summary(samples, left_out, complete)
        return cli.SOME_REJECTED if rejected else cli.DONE

    def _problem(self, problem: Problem) -> dict[str, Any]:
        """A row for what of the source is no case."""
        texts = texts_of_files([problem.path], self.source, others={problem.name})
        return {
            "case": f"file_{self.pseudonyms.digest('case', os.path.abspath(problem.path), CASE)}",
            "path": os.path.abspath(problem.path),
            "what": "file",
            "reason": problem.reason,
            "public": problem.public or texts.hidden(problem.reason),
            "rejected": problem.rejected,
        }

    def _write_private(self, records: Mapping[str, Mapping[str, Any]], left_out: Sequence[Mapping[str, Any]]) -> None:
        mapping = {
            kind: {digest: value for record in records.values() for digest, value in record[kind].items()}
            for kind in ("series", "instances")
        }
        self.private.write("mapping.json", mapping)
        columns = ("case", "path", "patient_id", "patient", "samples")
        rows = [{"case": name, **record, "samples": len(record["samples"])} for name, record in records.items()]
        self.private.write_table("cases.csv", [{key: row[key] for key in columns} for row in rows], columns)
        columns = ("case", "path", "what", "reason", "rejected")
        self.private.write_table("left_out.csv", [{key: row[key] for key in columns} for row in left_out], columns)

    def _summary(self, samples: Sequence[Sample], left_out: Sequence[Mapping[str, Any]], complete: bool) -> None:
        patients = len({sample.patient_id for sample in samples})
        diseased = sum(not sample.healthy for sample in samples)
        text = f"{counted(len(samples), 'sample')} of {counted(patients, 'patient')}, {diseased} with a lesion"
        path = self.folder.path
        if complete and not self.made:
            log.info("%s: already complete (%s)", path, text)
        else:
            log.info("%s: %s; look at %s before you use them", path, text, path / OVERLAYS)
        if left_out:
            kinds = Counter(row["rejected"] for row in left_out)
            message = "left out: %d rejected, %d for other reasons; see %s (with paths: %s)"
            log.info(message, kinds[True], kinds[False], path / "left_out.csv", self.private.path / "left_out.csv")


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _files(path: Path) -> Iterator[Path]:
    """The file, or the files of a folder of masks."""
    yield from sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def _line(row: Mapping[str, Any]) -> str:
    """A row for the console, which may name the files."""
    reason = row["reason"]
    where = "" if row["path"] in reason else f"{row['path']}: "
    return shown(f"{where}{'' if row['what'] in ('file', 'image') else row['what'] + ': '}{reason}")


def _sample(root: Path, sample_id: str) -> Sample:
    """A written sample, as the sheets show it."""
    folder = root / sample_id
    meta = read_json(folder / "meta.json")
    files = (folder / "mask.png", folder / "anatomy.png")
    mask, anatomy = (file if file.exists() else None for file in files)
    return Sample(
        sample_id,
        image=folder / "image.png",
        prompt=read_text(folder / "prompt.txt").strip(),
        box=(0.0, 0.0, 0.0, 0.0),
        patient_id=meta["patient_id"],
        level=meta.get("level"),
        lesion_type=meta.get("lesion_type"),
        meta=meta,
        mask=mask,
        anatomy=anatomy,
    )
