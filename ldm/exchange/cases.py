"""The images of a source, one case each: DICOM series, volumes in files, an nnU-Net folder, the rows of a table.

What is paired with them (labels, lesions, sentences) is found by ``ldm.exchange.pairing``.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.paths import walk
from ldm.core.tables import read_table
from ldm.data.samples import text_of
from ldm.exchange.privacy import is_anyones
from ldm.volumes.dicom import Series, find_series, named
from ldm.volumes.dicom_frames import PROJECTIONS
from ldm.volumes.segmentations import SUFFIXES

log = logging.getLogger(__name__)

Row = Mapping[str, str]
IMAGE, PARTNERS = ("image", "series"), ("labels", "lesion")  # columns of a table; others are not read
TEXTS, FACTS = ("prompt", "lesion_type", "severity", "level"), ("patient", "site", "scanner", "modality", "region")
COLUMNS = (*IMAGE, *PARTNERS, *TEXTS, *FACTS)
ALIASES = {"patient_id": "patient", "label": "labels", "lesions": "lesion", "sentence": "prompt"}
ROWS_DIFFER = "its rows in the table contradict each other"
MODALITIES = ("CT", "MR", "PT", "NM", "US", *PROJECTIONS)  # of volumes in files
NNUNET_FOLDERS = ("imagesTr", "imagesTs")
NNUNET = re.compile(r"(.+)_(\d{4})")  # CASE_0000: the number is a channel's
_BIDS = re.compile(r"(sub-[A-Za-z0-9]+)(?:_|$)")


@dataclass(frozen=True, eq=False)
class Case:
    """One image with all that belongs to it. PRIVATE: names and paths may say who the patient is.

    ``image``: the file, or the folder that a series lies in. ``patient``: who it is, as the archive or the table says.
    ``names``: those by which labels, lesions and rows may call it, the first one in messages. ``rows``: of a table, or
    of a text file. ``lesions``: files, each with the rows that name it (none: all rows of the case).
    """

    image: Path
    patient: str
    names: tuple[str, ...]
    series: Series | None = None
    labels: Path | None = None
    lesions: tuple[tuple[Path, tuple[Row, ...]], ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from any other image: the series, with its file if that stands alone, or the path."""
        if self.series is None:
            return str(self.image.resolve())
        return self.series.uid if len(self.series.files) > 1 else f"{self.series.uid} {self.series.files[0].resolve()}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file and folder that it is read from."""
        image = self.series.files if self.series else (self.image,)
        return (*image, *filter(None, [self.labels]), *(path for path, _ in self.lesions))

    @property
    def folder(self) -> Path:
        """The folder that the image lies in."""
        return self.image if self.series else self.image.parent

    def value(self, column: str) -> str | None:
        """What its rows say under a column, if they agree; MedSoftError if they do not."""
        found = {text for row in self.rows if (text := text_of(row.get(column) or ""))}
        if len(found) > 1:
            raise MedSoftError(f"{self.names[0]}: its rows differ in {column} ({', '.join(sorted(found))}); give one")
        return next(iter(found), None)


@dataclass(frozen=True)
class Problem:
    """A part of the source that does not become samples; ``rejected``: something is wrong with it.

    PRIVATE but for ``public``, the reason where the other one names more than ``path``.
    """

    path: Path
    name: str
    reason: str
    rejected: bool = True
    public: str | None = None


@dataclass(frozen=True)
class Wanted:
    """Which images of a source are taken: ``series`` by UID, number or a part of the description, ``modality``.

    ``leave_out``: files and folders of labels and lesions inside the source, and names of such files.
    """

    series: str | None = None
    modality: str | None = None
    leave_out: frozenset[Path] = field(default_factory=frozenset)


def find_cases(source: Path, wanted: Wanted) -> tuple[list[Case], list[Problem]]:
    """The images of SOURCE in the order of their names, and what of it is none.

    UsageError if it does not exist, and for ``wanted`` that nothing of it can be.
    """
    if not source.exists():
        raise UsageError(f"{source}: does not exist; expected a folder, an image or a table (CSV)")
    if source.suffix.lower() == ".csv":
        return _cases_of_table(source, wanted)
    cases, problems = _cases_of_file(source, wanted) if source.is_file() else _cases_of_folder(source, wanted)
    if wanted.modality not in (None, *MODALITIES) and any(case.series is None for case in cases):
        raise UsageError(f"--modality {wanted.modality}: of a volume in a file, expected {', '.join(MODALITIES)}")
    return cases, problems


def _cases_of_folder(source: Path, wanted: Wanted) -> tuple[list[Case], list[Problem]]:
    if source.name in NNUNET_FOLDERS:
        return _cases_of_nnunet(source)
    inner, tests = (source / name for name in NNUNET_FOLDERS)
    if inner.is_dir():
        cases, problems = _cases_of_nnunet(inner)
        if tests.is_dir():
            log.warning("%s: is not imported with imagesTr; import it as a SOURCE of its own", tests)
            reason = "is nnU-Net's test set, which is not imported with imagesTr"
            problems.append(Problem(tests, tests.name, reason, rejected=False))
        return cases, problems
    volumes, other = _walk(source, wanted.leave_out)
    cases, problems = _cases_of_volumes(source, volumes), []
    if other:
        more, problems = _cases_of_dicom(source, wanted, alone=not cases)
        left_out = {path.resolve() for path in wanted.leave_out}
        problems = [
            each
            for each in problems
            if not _below(each.path.resolve(), left_out) and not (cases and each.path == source)
        ]
        cases += [case for case in more if not _below(case.files[0].resolve(), left_out)]
    if cases and any(case.series is None for case in cases) and wanted.series:
        raise UsageError("--series chooses among DICOM series; SOURCE holds volumes in files")
    return cases, problems


def _below(path: Path, places: set[Path]) -> bool:
    return path in places or any(parent in places for parent in path.parents)


def _walk(source: Path, leave_out: frozenset[Path]) -> tuple[list[Path], bool]:
    """Volumes in files below the source, sorted, and whether there are other files."""
    left_out = {path.resolve() for path in leave_out}
    volumes, other = [], False
    for place, files in walk(source, left_out):
        for name in files:
            path = place / name
            if name[0] == "." or path.resolve() in left_out:
                continue
            if is_volume(path):
                volumes.append(path)
            else:
                other = True
    return volumes, other


def is_volume(path: Path) -> bool:
    """Whether a file is a volume by its name: NIfTI, NRRD, MHA."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The name of a file without the suffixes of volumes."""
    name = path.name.lower()
    suffix = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default=path.suffix)
    return path.name[: len(path.name) - len(suffix)] if suffix else path.name


def _cases_of_file(source: Path, wanted: Wanted) -> tuple[list[Case], list[Problem]]:
    if is_volume(source):
        name = stem(source)
        return [Case(source, f"{source.parent.name}/{name}" if is_anyones(name) else name, (name,))], []
    return _cases_of_dicom(source, wanted)


def _cases_of_nnunet(folder: Path) -> tuple[list[Case], list[Problem]]:
    """CASE_0000 of each case: nnU-Net's other channels show the same place otherwise, and are left out."""
    cases, problems = [], []
    for path in sorted(path for path in folder.iterdir() if is_volume(path) and path.name[0] != "."):
        found = NNUNET.fullmatch(stem(path))
        if found is None:
            problems.append(Problem(path, path.name, "expected a name such as case_0000.nii.gz in an nnU-Net folder"))
        elif found[2] != "0000":
            reason = f"is channel {int(found[2])} of its case; the first one is imported"
            problems.append(Problem(path, path.name, reason, rejected=False))
        else:
            cases.append(Case(path, found[1], (found[1],)))
    return cases, problems


def _cases_of_volumes(source: Path, volumes: Sequence[Path]) -> list[Case]:
    """One case for each file. Whose image it is, its name says: BIDS's sub-X, the name of a folder with one image or
    with names that other folders have too (case_1/ct.nii.gz), else its own."""
    in_folder = Counter(path.parent for path in volumes)
    same_name = Counter(stem(path) for path in volumes)
    cases = []
    for path in volumes:
        name, parent = stem(path), path.parent.relative_to(source).as_posix()
        channel = NNUNET.fullmatch(name)
        name = channel[1] if channel and channel[2] == "0000" else name
        parent = source.name if parent == "." and is_anyones(name) else parent
        by_folder = parent != "." and (in_folder[path.parent] == 1 or same_name[stem(path)] > 1)
        subject = _BIDS.match(path.name)
        patient = subject[1] if subject else parent if by_folder else name
        names = [path.relative_to(source).as_posix()] + ([parent, path.parent.name] if by_folder else []) + [name]
        cases.append(Case(path, patient, tuple(dict.fromkeys(names))))
    return cases


def _cases_of_dicom(source: Path, wanted: Wanted, alone: bool = True) -> tuple[list[Case], list[Problem]]:
    """One case for each series that is an image and wanted; ``alone``: SOURCE holds no volumes in files."""
    try:
        found, rejects = find_series(source)
    except FileError as error:
        return [], [Problem(error.path, str(error.path), error.reason)]
    problems = [Problem(reject.path, str(reject.path), reject.reason) for reject in rejects]
    cases = []
    images = [series for series in found if series.kind == "image"]
    modalities = sorted({series.modality for series in images})
    if alone and wanted.modality and modalities and wanted.modality not in modalities:
        raise UsageError(f"--modality {wanted.modality}: no series has it; there are {', '.join(modalities)}")
    called = images if wanted.series is None else named(images, wanted.series)
    for series in sorted(found, key=lambda each: (str(each.folder), each.number or 0, each.uid, each.files)):
        if reason := _not_wanted(series, wanted, called):
            problems.append(Problem(series.folder, series.name, reason, rejected=False))
            continue
        inside = [each.name for each in (series.folder, *series.folder.parents) if source in each.parents]
        keys = [series.name, series.uid, *inside, *filter(None, [series.patient_id])]
        keys += [file.stem for file in series.files if len(series.files) == 1] + [series.folder.name]
        patient = series.patient_id or f"study {series.study_uid or series.uid}"
        cases.append(Case(series.folder, patient, tuple(dict.fromkeys(keys)), series))
    return cases, problems


def _not_wanted(series: Series, wanted: Wanted, called: Sequence[Series]) -> str | None:
    """Why a series is not imported; None if it is."""
    if series.kind != "image":
        return f"is a {series.kind}, no image to import"
    if wanted.modality and series.modality != wanted.modality:
        return f"is {series.modality}, not --modality {wanted.modality}"
    return None if series in called else "is not the --series"


# ------------------------------------------------------------------------------------------------------------- tables


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table with the columns of COLUMNS, and their line as ``line``; others are named once, and not read."""
    rows = []
    unknown: set[str] = set()
    for line, row in enumerate(read_table(path, [], "table"), 2):
        known: dict[str, str] = {"line": str(line)}
        for column, text in row.items():
            name = str(column).strip().casefold()
            name = ALIASES.get(name, name)
            if name in COLUMNS:
                known[name] = (text or "").strip() if isinstance(text, str | None) else ""
            else:
                unknown.add(str(column))
        rows.append(known)
    if "image" not in rows[0]:
        raise MedSoftError(f"{path}: expected a column image (of {', '.join(COLUMNS)}), found {', '.join(unknown)}")
    if unknown:
        log.info("%s: columns that are not read: %s", path, ", ".join(sorted(unknown)))
    return rows


def _cases_of_table(table: Path, wanted: Wanted) -> tuple[list[Case], list[Problem]]:
    """One case for each image that the rows name; the rows of one image belong together."""
    groups: dict[tuple[Path, str], list[dict[str, str]]] = {}
    for row in read_rows(table):
        groups.setdefault(((table.parent / row["image"]).resolve(), row.get("series", "")), []).append(row)
    cases: list[Case] = []
    problems: list[Problem] = []
    for (_, series), rows in groups.items():
        where, image = f"line {rows[0]['line']}", rows[0]["image"]
        try:
            case, wrong = _case_of_rows(table, image, replace(wanted, series=series or wanted.series))
            cases.append(with_row_files(replace(case, rows=tuple(rows)), table.parent))
            problems += wrong
        except FileError as error:
            problems.append(Problem(error.path, f"{table.name}, {where}", error.reason))
        except MedSoftError as error:
            problems.append(Problem(table.parent / image, f"{table.name}, {where}", str(error), public=ROWS_DIFFER))
    return cases, problems


def _case_of_rows(table: Path, image: str, wanted: Wanted) -> tuple[Case, list[Problem]]:
    """The case that the column image names; FileError unless there is exactly one."""
    if not image:
        raise FileError(table, "its column image is empty")
    path = table.parent / image
    if not path.exists():
        raise FileError(path, "does not exist; paths in a table begin at the table's folder")
    try:
        cases, problems = find_cases(path, wanted)
    except UsageError as error:  # the next row's image may be of that modality
        raise FileError(path, str(error)) from error
    if len(cases) != 1:
        if not cases and problems:
            raise FileError(problems[0].path, problems[0].reason)
        numbers = ", ".join(str(case.series.number) for case in cases if case.series)
        choose = f" (series {numbers}); a column series chooses one" if numbers else ""
        raise FileError(path, f"expected one image, found {len(cases)}{choose}")
    return cases[0], [problem for problem in problems if problem.rejected]


def with_row_files(case: Case, folder: Path) -> Case:
    """The case with the labels and lesions that its rows name, relative to ``folder``, and its patient.

    FileError for a file that is missing, which rejects the whole case: without that lesion its vertebra would count as
    healthy. MedSoftError for rows that contradict each other.
    """
    label = case.value("labels")
    named = sorted({row["lesion"] for row in case.rows if row.get("lesion")})
    lesions = [(folder / name, tuple(row for row in case.rows if row.get("lesion") == name)) for name in named]
    for path in (*([folder / label] if label else []), *(path for path, _ in lesions)):
        if not path.exists():
            raise FileError(path, "a row of the table names it, but it does not exist")
    return replace(
        case,
        patient=case.value("patient") or case.patient,
        labels=folder / label if label else case.labels,
        lesions=(*case.lesions, *lesions),
    )
