"""What keeps people's names out of a data set: pseudonyms by keyed hash, texts that identify, the private folder.

Whoever has the key can compute a patient's pseudonym again; without it a pseudonym says nothing. The key and the
mapping back to the images lie in ``OUTPUT_DIR.private``, never below ``OUTPUT_DIR``.
"""

import hashlib
import hmac
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError
from ldm.core.files import atomic_file, json_text, read_json, read_text
from ldm.core.tables import csv_lines
from ldm.data.checks import looks_personal
from ldm.volumes.dicom_files import readable

PATIENT, DIGEST = 12, 24  # letters; each is worth 4 bits
HIDDEN = "[...]"
FEWEST = 3  # letters of a name that is looked for in other texts; one in another script may have a single one
_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")  # letters only: no digest looks like a date
_UID = re.compile(r"(?<![\d.])[0-2](?:\.\d+){4,}(?![\d.])")
_DIGITS = re.compile(r"(?<!\d)\d{8,}(?!\d)")  # dates, times, accession numbers
# Folders and files are called so in any data set.
_ANYONES = re.compile(
    r"(images?|labels?|lesions?|masks?|seg(mentations?)?|ct|mri?|dicoms?|data|series|study|volumes?|patients?|scans?|"
    r"train(ing)?|test|val|raw|nifti|(images|labels)T[rs])[_ ]?\d{0,2}",
    re.IGNORECASE,
)
# Attributes that say who somebody is or where, beside those that hold a person's name by their type (PN).
_PARTICLES = ("von", "van", "vom", "zum", "zur", "der", "den", "dem", "del", "dos", "las", "los", "bin", "ibn", "the")
# fmt: off
_IDENTIFYING = (
    "PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "PatientAddress", "PatientTelephoneNumbers",
    "MedicalRecordLocator", "InsurancePlanIdentification", "InstitutionName", "InstitutionAddress",
    "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber", "RequestingService", "AdmissionID",
)
_DESCRIBING = (
    "StudyDescription", "SeriesDescription", "PatientComments", "ImageComments", "AdditionalPatientHistory",
    "RequestedProcedureDescription", "PerformedProcedureStepDescription", "ProtocolName",
    "SegmentLabel", "SegmentDescription", "ROIName", "ROIDescription",
)
# fmt: on


class Pseudonyms:
    """Names for patients, series and images that follow from the key and from them alone."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def patient(self, identity: str) -> str:
        """The pseudonym of the patient whom the archive or the table calls ``identity``."""
        return f"p_{self.digest('patient', identity, PATIENT)}"

    def digest(self, kind: str, text: str, length: int = DIGEST) -> str:
        """HMAC-SHA256 of a text, as ``length`` letters from a to p."""
        made = hmac.new(self._key, f"{kind}\x1f{text}".encode("utf-8", "surrogateescape"), hashlib.sha256)
        return made.hexdigest().translate(_LETTERS)[:length]


class IdentifyingTexts:
    """The names, numbers, dates and paths of one case, looked for in what shall be written.

    ``who``: they say who the patient is, and refuse a text that holds one; ``others``, such as paths and descriptions,
    are only hidden where they stand in a message.
    """

    def __init__(self, who: Iterable[str] = (), others: Iterable[str] = ()) -> None:
        self.who = {text.strip() for text in who}
        self.others = {text.strip() for text in others}
        self._who = _pattern(text for text in self.who if _is_long(text))
        self._all = _pattern(self.who | {text for text in self.others if not is_anyones(text)})

    def and_others(self, others: Iterable[str]) -> "IdentifyingTexts":
        """The same with more texts to hide."""
        return IdentifyingTexts(self.who, {*self.others, *others})

    def found_in(self, text: str) -> str | None:
        """What of the patient the text holds, in words that do not repeat it; None if nothing.

        Two words with capitals are not taken for a person: Ewing Sarcoma, Siemens Healthineers.
        """
        if self._who and self._who.search(text):
            return "a name or a number from the image's header or the table"
        return "a date" if looks_personal(text) == "a date" else None

    def hidden(self, text: str) -> str:
        """The text with ``[...]`` for everything of the patient, paths, UIDs, dates and long numbers."""
        for pattern in (self._all, _UID, _DIGITS):
            text = pattern.sub(HIDDEN, text) if pattern else text
        return " ".join(HIDDEN if looks_personal(word) == "a date" else word for word in text.split(" "))


def is_anyones(name: str) -> bool:
    """Whether files and folders of any data set are called so: image, labels, ct."""
    return _ANYONES.fullmatch(name) is not None


def _is_long(text: str, fewest: int = FEWEST) -> bool:
    """Whether a text has the letters that it takes to be looked for in others."""
    return len(text) >= fewest if text.isascii() else any(map(str.isalnum, text))


def _pattern(texts: Iterable[str]) -> re.Pattern | None:
    """One pattern for all the texts, longer ones first, in any case: words end at signs, letters also at digits.

    Those of scripts without capitals end anywhere: many of them put no space between words.
    """
    words = sorted({text for text in texts if _is_long(text, 2)}, key=lambda text: (-len(text), text))
    found = []
    for word in words:
        if not word.isascii() and word.lower() == word.upper():
            found.append(re.escape(word))
            continue
        inside = r"[^\W\d_]" if word.isalpha() else r"[^\W_]"
        found.append(rf"(?<!{inside}){re.escape(word)}(?!{inside})")
    return re.compile("|".join(found), re.IGNORECASE) if found else None


def identifying(dataset: Any) -> tuple[set[str], set[str]]:
    """(who, others) of a pydicom data set, for ``IdentifyingTexts``; sequences and private elements included."""
    who: set[str] = set()
    others: set[str] = set()
    for element in _elements(dataset):
        values = element.value if element.VM > 1 else [element.value]
        texts = [str(value).strip() for value in values if value is not None and not isinstance(value, bytes)]
        if element.VR == "PN":
            names = [name for text in texts for name in re.split(r"[\^=,\s]+", text)]
            who |= {name for name in names if _is_long(name) and name.casefold() not in _PARTICLES}
            others |= {text.replace("^", " ") for text in texts} | set(texts)
        elif element.keyword in _IDENTIFYING or element.VR in ("DA", "DT"):
            who |= {text for text in texts if _is_long(text, FEWEST + 1)}
        elif element.keyword in _DESCRIBING or element.tag.is_private:
            others |= {text for text in texts if len(text) > FEWEST}
    return who, others


def _elements(dataset: Any) -> Iterator[Any]:
    """Those of a data set and of its sequences."""
    for element in readable(dataset):
        yield element
        for item in element.value if element.VR == "SQ" else ():
            yield from _elements(item)


def path_texts(paths: Iterable[Path], above: Path) -> set[str]:
    """What of these paths may identify somebody: themselves, and the names on the way to them from ``above`` on."""
    found: set[str] = set()
    for path in paths:
        found |= {str(path), str(path.absolute()), str(path.resolve())}
        inside = path.relative_to(above) if path.is_relative_to(above) else Path(path.name)
        found |= {inside.as_posix(), str(above)}
        found |= {text for name in (*inside.parts, above.name) for text in (name, name.partition(".")[0])}
    return found


class PrivateFolder:
    """``OUTPUT_DIR.private``: only its owner may read what lies in it (0700, files 0600)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder, or take back the rights that others have to it. MedSoftError where that is not possible."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.name == "posix" and self.path.stat().st_mode & 0o077:
                self.path.chmod(0o700)
        except OSError as error:
            reason = error.strerror or error
            raise MedSoftError(
                f"{self.path}: the private folder cannot be made or closed to others ({reason}); give an --output_dir "
                "on a disk where only you can read what you write"
            ) from error

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file there; of a name with a folder, the folder too."""
        _write(self.path / name, json_text(value))

    def read_all(self, name: str) -> dict[str, Any]:
        """The JSON files of a folder there by their names without suffix; damaged ones are as good as none."""
        found = {}
        for file in sorted((self.path / name).glob("*.json")):
            with suppress(MedSoftError):
                found[file.stem] = read_json(file)
        return found

    def clear(self, name: str) -> None:
        """Delete a folder there."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Write a CSV file there, as ``ldm.core.tables.write_csv`` does."""
        _write(self.path / name, csv_lines([dict(zip(columns, columns, strict=True)), *rows], columns))


def _write(path: Path, text: str) -> None:
    with atomic_file(path, mode=0o600) as handle:
        handle.write(text.encode("utf-8", "backslashreplace"))


def read_key(path: Path) -> bytes:
    """The key in a file, 64 hexadecimal digits; made at random where there is no such file, for its owner's eyes only.

    Raises MedSoftError for a file that holds no key.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="ascii", opener=partial(os.open, mode=0o600)) as handle:
            handle.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise MedSoftError(f"{path}: the key could not be written ({error.strerror or error})") from error
    text = read_text(path, "key").strip()
    if not re.fullmatch("[0-9a-f]{64}", text):
        found = f"{len(text)} characters" if text else "an empty file"
        raise MedSoftError(f"{path}: expected a key of 64 hexadecimal digits, found {found}")
    return bytes.fromhex(text)
