"""From answers to numbers: one analysis of a reader study, with all files of its output folder."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.core.errors import MedSoftError, UsageError, warn_of_first
from ldm.core.files import fingerprint, sha256_file
from ldm.core.run_folder import RunFolder
from ldm.core.tables import counted, write_csv
from ldm.data.annotations import write_rejects
from ldm.readers.agreement import (
    agreement_bounds,
    answer_counts,
    fleiss_kappa,
    intra_kappa,
    pairwise_kappas,
    repeated_answers,
)
from ldm.readers.answers import (
    CALLED_DRAWN,
    Key,
    Reader,
    Readings,
    answer_files,
    answer_rows,
    read_key,
    read_readers,
    readings_of,
)
from ldm.readers.cases import UNKNOWN
from ldm.readers.numbers import case_draws, measure, reader_values, shares_of_steps
from ldm.readers.options import AnalyseOptions
from ldm.readers.report import OWN_FILES, interval_of, paragraph, reader_rows, write_report
from ldm.readers.sizes import half_width, what_it_needs

log = logging.getLogger("reader_study")

EXPERIENCE = {"under 5 years": (0, 5), "5 to 10 years": (5, 10.01), "over 10 years": (10.01, 99)}
HASTE = 1.0  # seconds; a median below is no reading
AGREEMENT_RESAMPLES = 500


def analyse_study(options: AnalyseOptions) -> bool:
    """Analyse a study; whether every file of answers could be used. Raises MedSoftError or UsageError."""
    if len(options.paths) < 2:
        raise UsageError("analyse: expected the study's folder, then files of answers or folders of them")
    key = read_key(options.paths[0])
    folder = RunFolder(options.output_dir, "analysis.json", what="an analysis", own=OWN_FILES, shared=True)
    with folder.lock():
        files = answer_files(options.paths[1:])
        settings = {
            "study": key.study,
            "key": fingerprint([key.design, key.pictures, key.items, key.notes]),  # somebody may have corrected it
            "answers": fingerprint(sorted(map(sha256_file, files))),
            "unfinished": options.unfinished,
        }
        record = folder.open(settings, options.overwrite, anew=options.overwrite)
        if record and record["complete"]:
            log.info("%s: already complete", options.output_dir)
            return not record["rejected"]
        readers, rejects, notes = read_readers(key, files, options.unfinished)
        warn_of_first(log, (f"refused: {reject}" for reject in rejects))
        if not readers:
            first = f"; the first: {rejects[0]}" if rejects else f"; {notes[0]}"
            raise MedSoftError(
                f"{options.paths[0]}: none of {counted(len(files), 'file')} of answers can be used{first}"
            )
        measured = measure_all(key, readers)
        measured["notes"] = [*notes, *doubts(key, readers, measured)]
        measured["notes"] += [f"Said when the study was made: {note}" for note in key.notes]
        measured["paragraph"] = paragraph(key, measured)
        folder.claim()
        write_csv(options.output_dir / "answers.csv", answer_rows(key, readers))
        write_csv(options.output_dir / "readers.csv", reader_rows(readers, measured))
        write_rejects(options.output_dir / "rejects.json", rejects)
        write_report(options.output_dir, key, readers, measured)
        folder.finish(**measured, rejected=len(rejects))
    for note in measured["notes"]:
        log.info("note: %s", note)
    log.info("%s", measured["paragraph"])
    log.info("%s", options.output_dir / "report.html")
    return not rejects


def measure_all(key: Key, readers: Sequence[Reader]) -> dict[str, Any]:
    """Everything that analysis.json says; each number as ``ldm.readers.numbers.measure`` gives it."""
    readings = readings_of(key, readers)
    numbers = measure(readings)
    main = "accuracy" if key.pairs else "auc"
    found = {
        "readers": [reader.code for reader in readers],
        "items": len(readings.items),
        "drawn": len(readings.items) if key.pairs else int(readings.drawn.sum()),
        "patients": len(set(readings.patients)),
        "main": main,
        "numbers": numbers,
        "agreement": _agreement(key, readers, readings),
        "seconds": _seconds(readings),
        "halves": _halves(readers, readings),
        "by_type": _by_matched(key, readings, "lesion_type", main),
        "by_severity": _by_matched(key, readings, "severity", main),
        "by_experience": _by_experience(readings, main),
    }
    return found if key.pairs else found | {"steps": shares_of_steps(readings)}


def _agreement(key: Key, readers: Sequence[Reader], readings: Readings) -> dict[str, Any]:
    kappas = pairwise_kappas(readings)
    known = [value for value in kappas.values() if value is not None]
    bounds = agreement_bounds(readings, case_draws(readings, 0, AGREEMENT_RESAMPLES))
    found: dict[str, Any] = {
        name: {"value": fleiss_kappa(answer_counts(readings, calls)), "interval": bounds[name]}
        for name, calls in (("fleiss_calls", True), ("fleiss_steps", False))
    }
    if key.pairs:
        del found["fleiss_steps"]
    named = {f"{readers[a].code} {readers[b].code}": value for (a, b), value in kappas.items()}
    intra = {reader.code: intra_kappa(key, [reader]) for reader in readers}
    repeats = sum(len(repeated_answers(key, reader)[0]) for reader in readers)
    found |= {"weighted_mean": float(np.mean(known)) if known else None, "weighted": named}
    return found | {"intra": intra_kappa(key, readers), "intra_by_reader": intra, "repeats_answered": repeats}


def _seconds(readings: Readings) -> dict[str, float | None]:
    """Median seconds an item: of all answers, of right and of wrong ones, and of each reader by code."""
    called = readings.answers >= (1 if readings.pairs else CALLED_DRAWN)
    right = called == readings.drawn
    known = ~np.isnan(readings.answers)
    found = {
        "median": _median(readings.seconds[known]),
        "right": _median(readings.seconds[known & right]),
        "wrong": _median(readings.seconds[known & ~right]),
    }
    return found | {
        reader.code: _median(row[~np.isnan(row)])
        for reader, row in zip(readings.readers, readings.seconds, strict=True)
    }


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if values.size else None


def _halves(readers: Sequence[Reader], readings: Readings) -> list[float | None]:
    """Mean accuracy in the first and in the second half of each reader's order: whether they learned on the way."""
    found = []
    for half in (0, 1):
        shares = []
        for row, reader in enumerate(readers):
            cut = len(reader.order) // 2
            shown = set(reader.order[:cut] if half == 0 else reader.order[cut:])
            weights = np.array([[float(item in shown) for item in readings.items]])
            shares.append(reader_values(readings.only(readers=[row]), weights)["accuracy"][0, 0])
        found.append(None if np.isnan(shares).all() else float(np.nanmean(shares)))
    return found


def _by_matched(key: Key, readings: Readings, name: str, main: str) -> dict[str, Any]:
    """The main number and the accuracy for the items of each value of a matched key; empty where it is not known."""
    values = np.array([key.items[item]["matched"].get(name, UNKNOWN) for item in readings.items])
    known = sorted(set(values) - {UNKNOWN})
    chosen = tuple(dict.fromkeys((main, "accuracy")))
    return {
        value: {"items": int((values == value).sum()), **measure(readings.only(values == value), 0, chosen)}
        for value in known
    }


def _by_experience(readings: Readings, main: str) -> dict[str, Any]:
    """The main number of the readers of each group of years; intervals over readers where there are several."""
    found = {}
    for name, (low, high) in EXPERIENCE.items():
        inside = [k for k, reader in enumerate(readings.readers) if low <= reader.years < high]
        if inside:
            found[name] = {"readers": len(inside), **measure(readings.only(readers=inside), 0, (main,))}
    return found


def doubts(key: Key, readers: Sequence[Reader], measured: Mapping[str, Any]) -> list[str]:
    """What is doubtful about the answers, in sentences."""
    notes, entry = [], measured["numbers"][measured["main"]]
    for reader, own in zip(readers, entry["readers"], strict=True):
        if own["value"] is None and entry["value"] is not None:
            notes.append(f"Reader {reader.code} rated pictures of one kind alone: the mean AUC is that of the others.")
        seconds = measured["seconds"][reader.code]
        if seconds is not None and seconds < HASTE:
            notes.append(f"Reader {reader.code} spent {seconds:.1f} s an item in the median: that is no reading.")
        if len(set(reader.answers.values())) == 1:
            notes.append(f"Reader {reader.code} gave one answer to everything.")
    count, cases = len(readers), measured["drawn"]
    if entry["low"] is None:
        notes.append(
            "The interval over readers and cases is left out: it needs two readers and ten patients of a kind."
        )
    elif count < 3:
        notes.append(
            f"{counted(count, 'reader is', 'readers are')} too few to speak of others: an interval over readers is "
            "little more than a guess."
        )
    if (wide := interval_of(entry)) and (wide[1] - wide[0]) / 2 > 0.1:
        needs = what_it_needs(0.1, count, cases, key.design)
        expected = half_width(count, cases, key.design)
        notes.append(f"The interval is wide (plus or minus {expected:.2f} was to be expected): {needs}.")
    first, second = measured["halves"]
    if first is not None and second is not None and second - first > 0.1:
        notes.append(
            f"Readers learned on the way: their accuracy is {first:.2f} in the first half, {second:.2f} in the second."
        )
    return notes
