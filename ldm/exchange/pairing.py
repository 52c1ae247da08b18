"""Labels, lesions and sentences for the images of a source: by the segmentation's own reference, by names, by a table.

A file belongs to the image whose name it has, alone or before words that say what it is (``case_012.nii.gz``,
``case_012_seg.nii.gz``; ``case_012-2.nii.gz`` may be another case's), or in whose folder of the same name it lies; a
DICOM SEG or RTSTRUCT to the series that it refers to. Every lesion file must belong to an image, or one that is
misspelled would leave its image healthy.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ldm.core.errors import FileError, MedSoftError, UsageError
from ldm.core.paths import walk
from ldm.exchange.cases import ROWS_DIFFER, Case, Problem, Row, is_volume, read_rows, stem, with_row_files
from ldm.exchange.sentences import read_sentences
from ldm.levels import mentions
from ldm.volumes.labels import structure_named
from ldm.volumes.segmentations import references

log = logging.getLogger(__name__)

SHOWN = 3  # names in a message
# What may follow an image's name in that of a file that belongs to it: words for what it holds, numbered or not.
_WORDS = (
    r"lesions?|labels?|labelmap|seg(mentations?)?|segm|totalseg(mentator)?|masks?|msk|tumou?rs?|metastas[ie]s|mets?|"
    r"findings?|roi|gt|groundtruth|truth|annotations?|contours?|rtstruct|rtss|vert(ebrae?)?|spine|subreg|body|bodies|"
    r"lytic|blastic|sclerotic|left|right|manual|pred|image|img|ct|mri?|t1w?|t2w?|stir|text|report|prompts?|sentences?"
)
_REST = re.compile(rf"([_ ]0000)?([\W_]+({_WORDS})([\W_]?\d{{1,3}})?)*[\W_]*")
_APART = re.compile(r"[A-Z][\s-]\d")  # "T 2" names a vertebra in a sentence; P1_T_2 may be another image than P1
UNCLEAR = "a lesion file, row or text that may be its own is unclear: it is not taken for healthy"


@dataclass(frozen=True, eq=False)
class _Entry:
    """A file, or a folder of masks, that belongs to one of the images."""

    path: Path
    keys: tuple[str, ...]  # names of its own, the nearest first
    series: frozenset[str] = frozenset()


def pair(
    cases: Sequence[Case], labels: Path | None, lesions: Path | None, table: Path | None
) -> tuple[list[Case], list[Problem]]:
    """The cases with their labels, lesions and rows; those with a problem are left out of them, and named by it.

    Each of the three is a file or a folder; ``labels`` and ``lesions`` may also be a name that is looked for beside
    each image. A case without lesions counts as healthy, which is said. UsageError for a path that is nowhere.
    """
    made = [*cases]
    problems: list[Problem] = []
    if table is not None:
        made, problems = _with_table(made, table)
    wrong: set[int] = set()
    for given, flag in ((labels, "--labels"), (lesions, "--lesions")):
        if given is not None:
            found, unclear, more = _matches(made, given, flag)
            problems += more
            if flag == "--labels":
                wrong |= _with_labels(made, found, given, problems)
            else:
                problems += [_unclear(made[number]) for number in sorted(unclear - wrong)]
                wrong |= unclear
                _with_lesions(made, found, given)
    return [case for number, case in enumerate(made) if number not in wrong], problems


def _unclear(case: Case) -> Problem:
    return Problem(case.image, case.names[0], UNCLEAR, public=UNCLEAR)


def inside(given: Path | None, source: Path) -> set[Path]:
    """What of ``source`` is no image because ``--labels`` or ``--lesions`` names it."""
    if given is None:
        return set()
    if given.exists():
        return {given} if given.resolve() != source.resolve() else set()
    if not source.is_dir() or given.is_absolute():
        return set()
    return {folder / given for folder, _ in walk(source) if (folder / given).exists()}


def _with_labels(
    cases: list[Case], found: Mapping[int, Sequence[Path]], given: Path, problems: list[Problem]
) -> set[int]:
    """Add the files of ``--labels`` to the cases; returns the numbers of those that have none, or several."""
    wrong = set()
    for number, case in enumerate(cases):
        paths = found.get(number, [])
        if len(paths) > 1:
            public = f"{len(paths)} files of --labels fit it"
            reason = f"{public} ({', '.join(path.name for path in paths[:SHOWN])})"
        elif not paths and case.labels is None:
            public = "nothing in --labels fits it"
            reason = f"nothing in --labels {given} fits it; looked for a name that begins with {case.names[-1]}"
        else:
            cases[number] = replace(case, labels=case.labels or paths[0])
            continue
        wrong.add(number)
        problems.append(Problem(case.image, case.names[0], reason, public=public))
    return wrong


def _with_lesions(cases: list[Case], found: Mapping[int, Sequence[Path]], given: Path) -> None:
    """Add the files of ``--lesions`` to the cases; those that a row names already are not added again."""
    for number, case in enumerate(cases):
        known = {path.resolve() for path, _ in case.lesions}
        more = [(path, ()) for path in found.get(number, []) if path.resolve() not in known]
        cases[number] = replace(case, lesions=(*case.lesions, *more))
    healthy = [case.names[0] for case in cases if not case.lesions]
    if healthy:
        message = "%d of %d images have no file of --lesions %s and count as healthy; the first: %s"
        log.warning(message, len(healthy), len(cases), given, healthy[0])


def _matches(cases: Sequence[Case], given: Path, flag: str) -> tuple[dict[int, list[Path]], set[int], list[Problem]]:
    """Paths by the number of the case that they belong to; the cases that one of several may belong to; problems."""
    if not given.exists():
        beside = {number: case.folder / given for number, case in enumerate(cases) if (case.folder / given).exists()}
        if not beside or given.is_absolute():
            raise UsageError(f"{flag} {given}: does not exist, and there is nothing of that name beside an image")
        return {number: [path] for number, path in beside.items()}, set(), []
    if _is_one(given):
        entries = [_entry(given, ())]
        if not entries[0].series:
            if len(cases) > 1:
                names = "; ".join(case.names[0] for case in cases[:SHOWN])
                cure = "give a folder with a file for each, a table" + (", or --series" if cases[0].series else "")
                raise UsageError(f"{flag} {given}: is one file for {len(cases)} images ({names}); {cure}")
            return {0: [given]}, set(), []
    else:
        entries = sorted(_entries(given), key=lambda entry: entry.path)
    found: dict[int, list[Path]] = {}
    unclear: set[int] = set()
    problems = []
    for entry in entries:
        fitting = _fitting(entry, cases)
        if len(fitting) == 1:
            found.setdefault(fitting[0], []).append(entry.path)
        elif fitting:
            unclear |= {*fitting}
            names = "; ".join(cases[number].names[0] for number in fitting[:SHOWN])
            reason = f"{len(fitting)} images fit it ({names}); choose with --series, or give a table"
            problems.append(Problem(entry.path, entry.path.name, reason, public=f"{len(fitting)} images fit it"))
        else:
            perhaps = _perhaps(entry, cases)
            unclear |= perhaps
            reason = "belongs to no image by its name" if not entry.series else "refers to no series of the source"
            if perhaps:
                names = "; ".join(cases[number].names[0] for number in sorted(perhaps)[:SHOWN])
                reason += f", which begins as that of {names}: name it IMAGE_lesion or IMAGE_seg, or give a table"
            problems.append(Problem(entry.path, entry.path.name, reason, rejected=flag == "--lesions"))
    return found, unclear, problems


def _is_one(path: Path) -> bool:
    """Whether this is one case's: a file, or a folder of masks named after structures."""
    return path.is_file() or _is_mask_folder(path)


def _is_mask_folder(folder: Path) -> bool:
    return any(is_volume(path) and structure_named(stem(path)) for path in folder.iterdir() if path.is_file())


def _entries(top: Path) -> Iterator[_Entry]:
    """The files and folders of masks below a folder, links followed."""
    masks: set[Path] = set()
    for folder, names in walk(top):
        if masks & {*folder.parents}:
            continue
        if _is_mask_folder(folder):
            masks.add(folder)
            yield _entry(folder, _above(folder, top))
            continue
        for path in (folder / name for name in names if name[0] != "."):
            if is_volume(path) or references(path):
                yield _entry(path, _above(path, top))


def _above(path: Path, top: Path) -> tuple[str, ...]:
    """The names of the folders that a path lies in below ``top``, the nearest first."""
    return tuple(parent.name for parent in path.parents if parent.is_relative_to(top) and parent != top)


def _entry(path: Path, above: tuple[str, ...]) -> _Entry:
    keys = (path.name if path.is_dir() else stem(path), *above)
    return _Entry(path, keys, frozenset() if path.is_dir() or is_volume(path) else frozenset(references(path)))


def _fitting(entry: _Entry, cases: Sequence[Case]) -> list[int]:
    """The cases that an entry belongs to: by the series that it refers to, else by its nearest name that fits any.

    Where that fits several (``image.nii.gz``), the next names choose among them.
    """
    if entry.series:
        return [number for number, case in enumerate(cases) if case.series and case.series.uid in entry.series]
    fitting: list[int] = []
    for key in entry.keys:
        among = fitting or range(len(cases))
        lengths = {number: max((_fits(key, name) for name in cases[number].names), default=0) for number in among}
        if best := max(lengths.values(), default=0):
            fitting = [number for number, length in lengths.items() if length == best]
        if len(fitting) == 1:
            break
    return fitting


def _perhaps(entry: _Entry, cases: Sequence[Case]) -> set[int]:
    """The cases with whose names those of an entry begin that fits none: it may be theirs, or of an image elsewhere."""
    if entry.series:
        return set()
    return {
        number
        for number, case in enumerate(cases)
        if any(_rest(key, name) is not None for key in entry.keys for name in case.names)
    }


def _fits(key: str, name: str) -> int:
    """How many letters of ``key`` are ``name``: all, or its beginning before words that say what a file holds."""
    rest = _rest(key, name)
    return len(name) if rest is not None and _REST.fullmatch(_without_levels(rest)) else 0


def _without_levels(rest: str) -> str:
    """``rest`` with one of the words in the place of each vertebra that it names; ``_`` is a space there."""
    text = rest.replace("_", " ").upper()  # small letters are as good as large ones
    for mention in reversed(mentions(text)):
        if not _APART.match(text, mention.start):
            text = f"{text[: mention.start]}VERT{text[mention.end :]}"
    return text.casefold()


def _rest(key: str, name: str) -> str | None:
    """What follows ``name`` in ``key``; None where ``key`` does not begin with it, or a letter or digit follows."""
    key, name = key.casefold(), name.casefold()
    begins = name and key.startswith(name) and not key[len(name) : len(name) + 1].isalnum()
    return key[len(name) :] if begins else None


# ------------------------------------------------------------------------------------------------------ rows and texts


def _with_table(cases: Sequence[Case], table: Path) -> tuple[list[Case], list[Problem]]:
    """The cases with the rows of a CSV file, or of a folder of text files, that belong to them."""
    if not table.exists():
        raise UsageError(f"--table {table}: does not exist; expected a CSV file, or a folder of CASE.txt")
    folder = table if table.is_dir() else table.parent
    rows: dict[int, list[Row]] = {}
    unclear: set[int] = set()
    problems = []
    for path, name, keys, load in _told(table):
        fitting = _called(cases, folder, keys) if table.is_file() else _fitting(_Entry(path, keys), cases)
        try:
            if len(fitting) != 1:
                names = "; ".join(cases[number].names[0] for number in fitting[:SHOWN])
                raise FileError(
                    path, f"{len(fitting)} images fit it ({names})" if fitting else f"no image is called {keys[0]!r}"
                )
            rows.setdefault(fitting[0], []).extend(load())
        except FileError as error:
            unclear |= {*fitting} or (_perhaps(_Entry(path, keys), cases) if table.is_dir() else set())
            problems.append(Problem(path, name, error.reason, public="it belongs to no image, or holds no sentence"))
    made = []
    for number, case in enumerate(cases):
        if number in unclear:
            problems.append(_unclear(case))
            continue
        try:
            made.append(with_row_files(replace(case, rows=(*case.rows, *rows.get(number, ()))), folder))
        except FileError as error:
            problems.append(Problem(error.path, case.names[0], error.reason))
        except MedSoftError as error:
            problems.append(Problem(case.image, case.names[0], str(error), public=ROWS_DIFFER))
    return made, problems


def _told(table: Path) -> Iterator[tuple[Path, str, tuple[str, ...], Callable[[], Sequence[Row]]]]:
    """(path, how messages call it, names of the image, what gives the rows) of each row or text file."""
    if table.is_file():
        for row in read_rows(table):
            yield table, f"{table.name}, line {row['line']}", (row["image"],), partial(list, [row])
    else:
        for path in sorted(place / name for place, names in walk(table) for name in names if name.endswith(".txt")):
            yield path, path.name, (path.stem, path.parent.name), partial(read_sentences, path)


def _called(cases: Sequence[Case], folder: Path, keys: tuple[str, ...]) -> list[int]:
    """The cases that a row means by the text in its column image: a path from the table's folder, or a name."""
    path = (folder / keys[0]).resolve()
    places = [number for number, case in enumerate(cases) if path == case.image.resolve()]
    return places or [number for number, case in enumerate(cases) if keys[0] in case.names]
