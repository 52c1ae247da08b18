"""The agreement of reviewers as text, JSON and a page, beside the review.csv that it is about. No torch."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.core.errors import UsageError
from ldm.core.files import Contents, write_json
from ldm.core.tables import counted, shortened
from ldm.data.annotations import load_samples
from ldm.reports.html import number, write_page
from ldm.reviews.agreement import agreement
from ldm.reviews.choice import match_reviews
from ldm.reviews.table import VERDICTS

log = logging.getLogger("review")

# What people tend to call a kappa, from its lower end on (Landis and Koch 1977).
WORDS = ((0.8, "almost perfect"), (0.6, "substantial"), (0.4, "moderate"), (0.2, "fair"), (0.0, "slight"))
SHOWN_REASONS = 8  # on the screen; the page has all
PAIR_HEAD = (
    "reviewers",
    "both judged",
    "patients",
    "kappa",
    "equal verdicts",
    "kappa, rejected or not",
    "equal, rejected or not",
)
MEASURES = ("kappa", "agreement", "kappa_rejected", "agreement_rejected")


def write_agreement(results: Path, files: Sequence[Path]) -> bool:
    """Write NAME_agreement.json and .html beside the first review file NAME.csv, and say the same on the screen.

    Returns whether every sample of ``results`` could be read. Raises MedSoftError for reviews that cannot be used and
    UsageError for a single reviewer, who agrees with nobody.
    """
    loaded, rejects = load_samples(results)
    samples = [sample for sample in loaded if not sample.healthy]
    judged = match_reviews(files, samples, Contents(), copies_too=False)
    found = agreement(judged, samples)
    if len(found["reviewers"]) < 2:
        (only,) = found["reviewers"]
        raise UsageError(
            f"{files[0]}: holds the verdicts of one reviewer ({only['reviewer']}); a second one has to review the same "
            "images: medsoft review RESULTS --reviewer ANOTHER (a file of theirs is joined by a second --review)"
        )
    found = {"review": list(judged.files), **found}
    base = files[0].with_name(f"{files[0].stem}_agreement")
    write_json(base.with_suffix(".json"), found)
    write_page(
        base.with_suffix(".html"),
        "review_agreement",
        found=found,
        pair_head=PAIR_HEAD,
        pair_rows=list(map(_pair_row, found["pairs"])),
        reviewer_rows=[
            list((row | {"median_seconds": _tenths(row["median_seconds"])}).values()) for row in found["reviewers"]
        ],
        verdict_rows=[list(row.values()) for row in found["verdicts"]],
        reason_rows=[list(row.values()) for row in found["reasons"]],
        tables={f"{p['first']} (rows) and {p['second']}": _table_rows(p) for p in found["pairs"] if p["both"]},
    )
    _say(found)
    more = len(found["reasons"]) - SHOWN_REASONS
    log.info("%s%s", base.with_suffix(".html"), f" (with {counted(more, 'more row')} of reasons)" if more > 0 else "")
    return not rejects


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """A number with its interval, if it has one."""
    if estimate is None:
        return number(None)
    value = number(estimate["value"])
    return value if estimate["low"] is None else f"{value} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def word_for(kappa: float | None) -> str:
    """What a kappa is called."""
    return "undefined" if kappa is None else next((word for least, word in WORDS if kappa >= least), "poor")


def _pair_row(pair: Mapping[str, Any]) -> list[Any]:
    who = f"{pair['first']}, {pair['second']}"
    return [who, pair["both"], pair["patients"], *(estimate_text(pair.get(name)) for name in MEASURES)]


def _tenths(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f}"


def _table_rows(pair: Mapping[str, Any]) -> list[list[Any]]:
    return [[name, *counts] for name, counts in zip(VERDICTS, pair["table"], strict=True)]


def _say(found: Mapping[str, Any]) -> None:
    for row in found["reviewers"]:
        counts = ", ".join(f"{row[verdict]} {verdict}" for verdict in VERDICTS)
        log.info("%s judged %d of %s: %s", row["reviewer"], row["judged"], counted(found["samples"], "image"), counts)
    for pair in found["pairs"]:
        who = f"{pair['first']} and {pair['second']}"
        if not pair["both"]:
            log.warning("%s have judged no image both: no agreement", who)
            continue
        log.info("%s, %s of %s:", who, counted(pair["both"], "image"), counted(pair["patients"], "patient"))
        text = "  Cohen's kappa %s, %s; equal verdicts %s"
        log.info(text, estimate_text(pair["kappa"]), word_for(pair["kappa"]["value"]), estimate_text(pair["agreement"]))
        both = estimate_text(pair["kappa_rejected"]), estimate_text(pair["agreement_rejected"])
        log.info("  rejected or not: kappa %s; equal %s", *both)
    log.info("%-24s %-12s %7s %s", "lesion type", "reviewer", "judged", " ".join(f"{v:>7}" for v in VERDICTS))
    for row in found["verdicts"]:
        counts = " ".join(f"{row[verdict]:7d}" for verdict in VERDICTS)
        log.info("%-24s %-12s %7d %s", shortened(row["lesion_type"], 24), row["reviewer"], row["judged"], counts)
    for row in found["reasons"][:SHOWN_REASONS]:
        log.info("rejected by %(reviewer)s: %(count)d %(lesion_type)s: %(reason)s", row)
