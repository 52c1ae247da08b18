"""A reader study as one static folder, and the key to it beside that folder.

``for_readers/index.html`` with ``for_readers/pictures/`` opens from disk or from any web server and asks no other host
for anything. Names are random, files are written in their order, and nothing in the folder says what is drawn.
``key.json`` does: it stays with whoever runs the study.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.core.errors import MedSoftError
from ldm.core.files import Contents, atomic_folder, fingerprint, named_seed, write_json, write_text
from ldm.core.run_folder import RunFolder
from ldm.core.tables import counted
from ldm.data.annotations import write_rejects
from ldm.data.checks import separations
from ldm.data.samples import META_TEXTS, Sample
from ldm.readers.cases import (
    Candidates,
    Pair,
    choose_shown,
    matched_keys,
    read_candidates,
    seen_in_training,
    strata_counts,
    value_of,
)
from ldm.readers.options import MakeOptions
from ldm.readers.pictures import as_script, crop_of
from ldm.readers.sizes import half_width, what_it_needs
from ldm.reports.html import write_page
from ldm.reviews.choice import review_settings, sentence

log = logging.getLogger("reader_study")

REPEATS = 0.1  # of the items are shown a second time
FEW = 20  # pairs; fewer say next to nothing
USUAL_WIDTH = 0.1  # what the notes speak of where no half width is asked for
FOLDER, KEY = "for_readers", "key.json"
REAL, DRAWN = "real", "drawn"


@dataclass(frozen=True)
class Study:
    """What a study shows, and what is known of it."""

    name: str
    design: str
    keys: list[str]  # by which the pairs are matched
    pairs: list[Pair]
    side: int  # of every picture, in native pixels
    deep: bool  # 16 bits instead of 8
    pictures: dict[str, tuple[str, Sample]]  # by their random names: real or drawn, and of what
    items: dict[str, dict[str, Any]]  # by their random names, see ``_layout``
    notes: list[str]

    @property
    def counts(self) -> dict[str, Any]:
        """What both the key and the folder's record say of its pictures."""
        strata, bits = strata_counts(self.pairs, self.keys), 16 if self.deep else 8
        return {"pairs": len(self.pairs), "strata": strata, "side": self.side, "bits": bits}


def make_study(options: MakeOptions) -> bool:
    """Write the study; whether every sample could be read. Raises MedSoftError or UsageError, before it writes."""
    folder = RunFolder(options.output_dir, "make.json", what="a study", own=(FOLDER, KEY, "rejects.json"))
    with folder.lock():
        content = Contents()
        made = read_candidates(options.paths, options.real, options.review or [], content)
        record = folder.open(_settings(made, options, content), options.overwrite, anew=options.overwrite)
        if record and record["complete"]:
            log.info("%s: already complete", options.output_dir)
            return not record["rejected"]
        study = _study(made, options, content)
        folder.claim()
        _write_folder(options.output_dir / FOLDER, study, content)
        write_json(options.output_dir / KEY, _key(study, made))
        write_rejects(options.output_dir / "rejects.json", made.rejects)
        numbers = {"left_out": len(made.left_out), "rejected": len(made.rejects)}
        folder.finish(study=study.name, **study.counts, notes=study.notes, **numbers)
    _log_summary(options, study, made)
    return not made.rejects


def _settings(made: Candidates, options: MakeOptions, content: Contents) -> dict[str, Any]:
    """All that decides the study."""
    sides = (REAL, made.real), (DRAWN, made.drawn)
    files = {name: fingerprint([_identity(sample, content) for sample in samples]) for name, samples in sides}
    flags = ("design", "cases", "match", "crop", "readers", "half_width", "seed")
    return files | {name: getattr(options, name) for name in flags} | review_settings(made.review)


def _study(made: Candidates, options: MakeOptions, content: Contents) -> Study:
    """What of the candidates is shown, and how; MedSoftError where that is too little."""
    keys = matched_keys(made, options.match or [])
    pairs, side = choose_shown(made, keys, options.cases, options.seed, options.crop)
    _check_number(options, len(pairs))
    notes = doubts(made, pairs, keys, options)
    deep = all(made.looks[sample.image].deep for pair in pairs for sample in pair)
    pictures, items = _layout(pairs, keys, options.design, options.seed)
    name = fingerprint([items, [_identity(sample, content) for pair in pairs for sample in pair], side])[:12]
    return Study(name, options.design, keys, pairs, side, deep, pictures, items, notes)


def _identity(sample: Sample, content: Contents) -> list[Any]:
    """All of a sample that decides what is shown and what the key says."""
    texts = [getattr(sample, name) for name in META_TEXTS]
    return [sample.sample_id, sample.prompt, texts, sample.meta, content(sample.image), content(sample.mask)]


def _check_number(options: MakeOptions, pairs: int) -> None:
    """MedSoftError where there are too few pairs for what is asked."""
    if options.cases and pairs < options.cases:
        raise MedSoftError(
            f"--cases {options.cases}: only {pairs} real and {counted(pairs, 'drawn sample')} can be matched; draw "
            f"more, give more --real samples, match fewer keys, or ask for --cases {pairs}"
        )
    expected, readers = half_width(options.readers, pairs, options.design), counted(options.readers, "reader")
    if options.half_width and expected > options.half_width:
        needs = what_it_needs(options.half_width, options.readers, pairs, options.design)
        raise MedSoftError(
            f"--half_width {options.half_width:g}: {readers} and {counted(pairs, 'drawn picture')} beside as many "
            f"real ones are expected to give plus or minus {expected:.2f}; {needs}"
        )


def doubts(made: Candidates, pairs: Sequence[Pair], keys: Sequence[str], options: MakeOptions) -> list[str]:
    """What whoever reads the study's numbers should know of its pictures, in sentences."""
    samples = [sample for pair in pairs for sample in pair]
    looks = [made.looks[sample.image] for sample in samples]
    first = [place % 2 == 0 for place in range(len(samples))]
    notes = [sentence(made.review)] if made.review else []
    if len(pairs) < FEW:
        notes.append(f"{counted(len(pairs), 'picture')} of each kind: so few give every number a wide interval.")
    expected, readers = half_width(options.readers, len(pairs), options.design), counted(options.readers, "reader")
    needs = what_it_needs(options.half_width or USUAL_WIDTH, options.readers, len(pairs), options.design)
    notes.append(f"With {readers} the interval is expected to be plus or minus {expected:.2f}; {needs}.")
    for each in separations(samples, [look.attributes for look in looks], first, (REAL, DRAWN)):
        if each.suspicious:
            notes.append(
                f"{each.attribute} alone tells drawn from real pictures (AUC {each.auc:.2f}; {each.values}): readers "
                f"may see that and not the lesion. Give --match {each.attribute} if meta.json has it, or other samples."
            )
    shown = Counter(sample.patient_id for sample in samples)
    if again := sum(count > 1 for count in shown.values()):
        patients = counted(again, "patient is", "patients are")
        notes.append(f"{patients} shown more than once; pictures of one are resampled together.")
    if unnamed := sum(sample.patient_id in (sample.sample_id, sample.parent_id) for sample in samples):
        notes.append(
            f"{counted(unnamed, 'sample names', 'samples name')} no patient of their own: each counts as one patient."
        )
    lossy = [sum(look.lossy for look in looks[place::2]) for place in (0, 1)]
    if any(lossy):
        images = f"{lossy[0]} real and {counted(lossy[1], 'drawn image')}"
        notes.append(f"JPEG: {images}, with blocks inside real lesions and none inside drawn ones.")
    if len({look.deep for look in looks}) > 1:
        notes.append("Some images have 8 bits and others 16: all are shown with 8.")
    if met := seen_in_training(pairs):
        notes.append(
            f"{met} of {len(pairs)} real pictures are of patients that the generator learned from: a copied lesion "
            "would be shown beside its source (copies.json of tool/evaluate.py lists copies)."
        )
    return notes


def _layout(
    pairs: Sequence[Pair], keys: Sequence[str], design: str, seed: int
) -> tuple[dict[str, tuple[str, Sample]], dict[str, dict[str, Any]]]:
    """Every picture and every item under a random name.

    Pictures: name -> (real or drawn, sample). Items: name -> its pictures from left to right, what it is matched by,
    ``repeat_of`` (another item's name, or None). A tenth of the items is shown again; a repeated pair changes sides.
    """
    rng = np.random.default_rng(named_seed(seed, "names of a reader study", *(pair[1].sample_id for pair in pairs)))
    pictures: dict[str, tuple[str, Sample]] = {}
    items: dict[str, dict[str, Any]] = {}

    def add(shown: Sequence[tuple[str, Sample]], repeat_of: str | None = None) -> None:
        """One more item, its pictures under names of their own."""
        names = [rng.bytes(6).hex() for _ in shown]
        pictures.update(zip(names, shown, strict=True))
        name = names[0] if design == "single" else rng.bytes(6).hex()
        stratum = {key: value_of(shown[0][1], key) for key in keys}
        items[name] = {"pictures": names, "matched": stratum, "repeat_of": repeat_of}

    if design == "single":
        for real, drawn in pairs:
            add([(REAL, real)])
            add([(DRAWN, drawn)])
    else:
        left = rng.permutation(len(pairs)) % 2 == 0
        for (real, drawn), swapped in zip(pairs, left, strict=True):
            both = [(REAL, real), (DRAWN, drawn)]
            add(both[::-1] if swapped else both)
    repeated = list(items)
    count = max(1, round(REPEATS * len(repeated)))
    if design == "single":  # as many real as drawn ones, or one more
        kinds = [[name for name in repeated if pictures[name][0] == kind] for kind in (REAL, DRAWN)]
        shuffled = [list(rng.permutation(names)) for names in kinds]
        chosen = [name for both in zip(*shuffled, strict=True) for name in both][:count]
    else:
        chosen = list(rng.permutation(repeated))[:count]
    for name in map(str, chosen):
        add([pictures[each] for each in items[name]["pictures"]][::-1], name)
    return pictures, items


def _key(study: Study, made: Candidates) -> dict[str, Any]:
    """What tells the pictures apart, for whoever runs the study."""
    key = {"study": study.name, "design": study.design, "matched": study.keys, **study.counts, "notes": study.notes}
    if made.review:
        key["review"] = made.review
    pictures = {name: _about(kind, sample) for name, (kind, sample) in study.pictures.items()}
    left_out = [{"sample_id": each.sample.sample_id, "why": each.why} for each in made.left_out]
    return key | {"pictures": pictures, "items": study.items, "left_out": left_out}


def _about(kind: str, sample: Sample) -> dict[str, Any]:
    """What the key says of a picture."""
    known = {"kind": kind, "sample_id": sample.sample_id, "image": str(sample.image), "patient_id": sample.patient_id}
    return known | {name: getattr(sample, name) for name in ("parent_id", "lesion_type", "severity", "level")}


def _write_folder(folder: Path, study: Study, content: Contents) -> None:
    """The folder for readers, whole or not at all. Everything in it is in the order of its random names.

    FileError if a sample is another one by now than the one that ``content`` knows.
    """
    repeats = {name for name, item in study.items.items() if item["repeat_of"]}
    sources = {item["repeat_of"] for item in study.items.values()} - {None}
    told = {
        "study": study.name,
        "design": study.design,
        "side": study.side,
        "levels": 65536 if study.deep else 256,
        "items": {name: study.items[name]["pictures"] for name in sorted(study.items)},
        # An item that comes again stands in the first half, its repeat in the last third; which is whose is not told.
        "early": sorted(sources),
        "late": sorted(repeats),
    }
    with atomic_folder(folder) as partial:
        for name, (_, sample) in sorted(study.pictures.items()):
            script = as_script(name, crop_of(sample, study.side, study.deep))
            write_text(partial / "pictures" / f"{name}.js", script)
        write_page(partial / "index.html", "reader_study", study=told)
        content.check(content.known)


def _log_summary(options: MakeOptions, study: Study, made: Candidates) -> None:
    for note in study.notes:
        log.warning("note: %s", note)
    for why, count in Counter(each.why for each in made.left_out).items():
        log.info("left out, %s: %s", counted(count, "sample"), why)
    if made.rejects:
        log.warning(
            "%s cannot be used, listed in %s", counted(len(made.rejects), "sample"), options.output_dir / "rejects.json"
        )
    pairs, items = len(study.pairs), counted(len(study.items), "item")
    log.info("%d drawn and %s; a reader sees %s", pairs, counted(pairs, "real picture"), items)
    log.info("give readers %s (they open index.html)", options.output_dir / FOLDER)
    log.info("keep %s: it says which pictures are drawn", options.output_dir / KEY)
