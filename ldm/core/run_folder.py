"""The life of an output folder: one process at a time, one run, its own files only, its record written last.

How a command uses it::

    results = RunFolder(
        args.output_dir,
        "inference.json",                          # the record: whose results these are, and whether they are complete
        what="results",                            # how messages call what the folder holds
        own=("rejects.json", "report.html"),       # patterns of the files that every run writes or may write
        samples="*__v*/meta.json",                 # a file at any depth that marks a folder as one written by a run
    )
    with results.lock():                           # refused in one line (exit 2) while another process is writing
        record = results.open(settings, args.overwrite)  # reads only; UsageError naming the settings that differ
        if record and record["complete"]:
            ...                                    # "already complete"
        results.claim()                            # now the folder changes: another run's files and partials go
        ...                                        # skip the items for which results.has(name, *files) is true
        results.finish(images=12)                  # the record, atomically, as the last file

``settings`` is a mapping that can be written as JSON and holds all that decides the output, under names that the user
knows (``sampling.steps``), with digests for what is large (``"data": fingerprint(...), "ckpt": sha256_file(...)``).
The record stores it, so that the next run can say what differs. ``legacy`` is the fingerprint under which older
versions stored the same run; they stored no settings.

A folder of which only parts are a run's (``shared=True``: training, classifier, evaluation) may hold other files, which
stay whatever happens. Otherwise a folder that is not empty and has no record is refused.

A training's record is what its ``last.ckpt`` says about itself (``ldm.training.run.TrainingFolder``). Plans and the
worlds of a study have ``keys=None``: their settings are keys of the record itself, to which others may come.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import PARTIAL_PREFIX, fingerprint, nearest_existing, read_json, write_json
from ldm.core.locks import exclusive
from ldm.core.tables import shortened

SHOWN_DIFFERENCES = 4


class RunFolder:
    """One output folder; see the module's text for the order of the calls."""

    def __init__(
        self,
        path: str | Path,
        record: str,
        *,
        what: str = "results",
        own: Sequence[str] = (),
        samples: str = "",
        shared: bool = False,
        flag: str = "--output_dir",
        overwrite_flag: str = "--overwrite",
        keys: tuple[str, str] | None = ("run", "settings"),
        lock_file: Path | None = None,
    ) -> None:
        """``own``: glob patterns relative to the folder. ``keys``: the record's names of fingerprint and settings.

        ``overwrite_flag`` is empty where only deleting the folder lets another run begin. ``lock_file``: where several
        runs share the folder, this one's own.
        """
        self.path, self.record = Path(path), Path(path) / record
        self.what, self.own, self.samples, self.shared = what, own, samples, shared
        self.flag, self.overwrite_flag, self.keys, self.lock_file = flag, overwrite_flag, keys, lock_file
        self.settings: dict[str, Any] = {}
        self.same_run = False  # whether what the folder holds is this run's; set by open() and claim()

    @contextmanager
    def lock(self, wait: bool = False, first: bool = True, part: str = "") -> Iterator[None]:
        """Keep other processes that ask for the same folder out for the block; UsageError, or ``wait`` for them.

        UsageError also unless the path is, or can become, a folder in which files may be written. Of the processes of
        one run, only the ``first`` holds the lock. With ``part`` it is that of this part of the work alone.
        """
        above = nearest_existing(self.path.absolute())
        if not above.is_dir():
            raise UsageError(f"{self.flag} {self.path}: expected a folder, found a file ({above}); give another")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"{self.flag} {self.path}: {above} may not be written to; give another folder")
        if not first:
            yield
            return
        cure = "waiting for it to end" if wait else "wait for it to end" if part else f"give another {self.flag}"
        what = f"another command works at {part}" if part else "another run is writing here"
        with exclusive(self.lock_path(part), f"{self.path}: {what} at this moment; {cure}", wait):
            yield

    def lock_path(self, part: str = "") -> Path:
        """The lock file: ``.NAME.lock`` beside the folder, or in ``.NAME.locks`` that of a ``part`` of its work.

        So a refused run leaves no trace in the folder. Where the folder above may not be written to, it lies inside.
        """
        if self.lock_file:
            return self.lock_file
        folder = self.path.resolve()
        beside = os.access(nearest_existing(folder.parent), os.W_OK)
        stem = folder.with_name(f".{folder.name}") if beside else folder / ".run"
        return Path(f"{stem}.locks", f"{part}.lock") if part else Path(f"{stem}.lock")

    def open(
        self, settings: Mapping[str, Any], overwrite: bool = False, legacy: str | None = None, anew: bool = False
    ) -> dict[str, Any] | None:
        """The record of this same run if the folder holds one, else None. Changes no file.

        Raises UsageError if the folder holds another run's work, naming the settings that differ, unless ``overwrite``
        lets ``claim`` delete it; and always for a folder of files that no run has written. With ``anew`` even this
        same run's work is another's. A record without work, left by a run that failed early, is in nobody's way.
        """
        self.settings = json.loads(json.dumps(settings, default=str))
        self.same_run = False
        stored = self.read_record(overwrite)
        if stored is None:
            self._refuse_unknown_files()
            return None
        if self._is_same(stored, legacy):
            self.same_run = not anew
            return None if anew else stored
        if not overwrite and (self.keys is None or self._work()):
            cure = f"{self.overwrite_flag} to replace them" if self.overwrite_flag else "delete it"
            raise UsageError(
                f"{self.path}: holds {self.what} of another run ({self.difference(stored)}); give another {self.flag}, "
                f"or {cure}"
            )
        return None

    def _is_same(self, stored: Mapping[str, Any], legacy: str | None) -> bool:
        if self.keys is None:
            return not differences(stored, self.settings)
        return stored.get(self.keys[0]) in (self.run, *([legacy] if legacy else []))

    @property
    def run(self) -> str:
        """The fingerprint of the settings given to ``open``."""
        return fingerprint(self.settings)

    def difference(self, stored: Mapping[str, Any]) -> str:
        """What sets the run of this record apart from the one given to ``open``, for a message."""
        before = stored.get(self.keys[1]) or {} if self.keys else stored
        found = differences(before, self.settings)
        if self.keys:  # else the record has keys that are no settings
            gone = [key for key in before if key not in self.settings]
            found += [f"{key}: {_shown(before[key])} -> not given" for key in gone]
        if not found:
            return "its data or settings are others; the record does not say which"
        more = len(found) - SHOWN_DIFFERENCES
        return ", ".join(found[:SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")

    def read_record(self, overwrite: bool = False) -> dict[str, Any] | None:
        """The stored record, or None without one. A damaged one is a MedSoftError, with ``overwrite`` an empty one."""
        if not self.record.exists():
            return None
        try:
            stored = read_json(self.record, f"record of {self.what}")
            if not isinstance(stored, dict):
                raise MedSoftError(f"{self.record}: expected a JSON object, found {type(stored).__name__}")
        except MedSoftError as error:
            if overwrite:
                return {}
            cure = f"{self.overwrite_flag} replaces all that it stands for" if self.overwrite_flag else "delete it"
            raise MedSoftError(f"{error}; {cure}") from error
        return stored

    def write_record(self, complete: bool = False, **values: Any) -> None:
        """Write the record atomically."""
        identity = self.settings
        if self.keys:
            identity = dict(zip(self.keys, (self.run, self.settings), strict=True)) | {"complete": complete}
        write_json(self.record, identity | values)

    def _refuse_unknown_files(self) -> None:
        """UsageError for files in the way of a run that has no record here: they are not known to be a run's."""
        if self.shared:
            found = self._work()
        else:
            inside = sorted(self.path.iterdir()) if self.path.is_dir() else []
            found = [path for path in inside if not path.match(PARTIAL_PREFIX + "*") and not path.match(".*.lock*")]
        if found:
            raise UsageError(
                f"{self.path}: is not empty and holds no {self.what} of this command ({found[0].name} is there, "
                f"{self.record.name} is not); give another {self.flag}"
            )

    def _work(self) -> list[Path]:
        """What runs have written here, the record aside: files and folders of ``own``, sample folders."""
        found = [path for pattern in self.own for path in sorted(self.path.glob(pattern)) if path != self.record]
        if self.samples:
            found += sorted(mark.parent for mark in self.path.rglob(self.samples))
        return found

    def holds_work(self) -> bool:
        """Whether runs have written anything here beside the record."""
        return bool(self._work())

    def has(self, item: str, *files: str) -> bool:
        """Whether the sub-folder ``item`` is there with all these files."""
        return all((self.path / item / name).is_file() for name in files)

    def claim(self, sweep: bool = True, **values: Any) -> None:
        """Make the folder this run's: what another run has written goes, and, with ``sweep``, what killed runs left.

        The record then calls itself incomplete (with ``values``), until ``finish``. Stopped while it deletes, this
        leaves a record that is no run's, so that nobody takes the remaining files for their own.
        """
        if not self.same_run:
            if self.record.exists():  # it stands for no run at all as long as another run's files are deleted
                write_json(self.record, {"complete": False})
            for path in self._work():
                _remove(path)
        if sweep:
            self.sweep()
        self.write_record(**values)
        self.same_run = True

    def sweep(self) -> None:
        """Delete the partials that killed runs have left; nobody may be writing here."""
        search = self.path.rglob if self.samples else self.path.glob  # sample folders have partials of their own
        for orphan in list(search(PARTIAL_PREFIX + "*")):
            _remove(orphan)  # it may have lain in one that was just removed

    def finish(self, **values: Any) -> None:
        """Write the record of a complete run, as the last file."""
        self.write_record(True, **values)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise MedSoftError(f"{path}: could not be deleted ({error.strerror or error}); delete it by hand") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: stored -> given`` for every setting that differs, nested ones with dots.

    Settings of the first level that the older record does not know are left out: nobody can tell whether they differ.
    """
    old = flatten({key: before[key] for key in now if key in before})
    new = flatten({key: now[key] for key in now if key in before})
    changed = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return [f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in changed]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _shown(value: Any) -> str:
    """A setting in a message; of digests and long values only the beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return shortened(text, 9 if digest else 60)
