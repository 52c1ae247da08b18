"""Which synthetic images to keep, by BiomedCLIP's margin: how much nearer the lesion is to its own type than to others.

Only the results themselves and the frozen encoder are looked at: no classifier, no validation or test image has a part
in the choice.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import BiomedClipConfig, DataConfig
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import Contents, fingerprint_all
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity
from ldm.core.tables import write_csv
from ldm.data.annotations import load_samples, write_annotations, write_rejects
from ldm.data.checks import check_synthetic
from ldm.data.preparation import described_identity
from ldm.data.samples import HEALTHY, Sample
from ldm.evaluation.lesions import Lesion, lesion_rows, read_lesions
from ldm.evaluation.metrics import text_embeddings
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.opening import encoder_record, open_encoder
from ldm.reviews.choice import review_settings, without_rejected

log = logging.getLogger("choose")

OWN_FILES = ("scores.csv", "kept.json", "rejects.json")


def choose_results(
    results: Path,
    output_dir: Path,
    data: DataConfig,
    biomedclip: BiomedClipConfig,
    best: int | None = None,
    least: float | None = None,
    review: Sequence[Path] = (),
    overwrite: bool = False,
) -> bool:
    """Score the diseased results of a folder, write scores.csv and kept.json; whether all of them could be read.

    Kept are, of the variants of each parent, the ``best`` with the highest margins (None: all), and of these the ones
    whose margin is at least ``least`` (None: all). kept.json is an annotation file. ``review``: files whose rejected
    images are left out first, see ``apply_review``. Raises UsageError where neither limit is given, MedSoftError for
    real samples among the results and where nothing can be scored.
    """
    if best is None and least is None:
        raise UsageError("expected --best N, --least MARGIN or both: without a limit every image would be kept")
    folder, content = RunFolder(output_dir, "choice.json", own=OWN_FILES, shared=True), Contents()
    with folder.lock():
        samples, rejects = load_samples(results)
        check_synthetic(results, samples)
        samples, reviewed = without_rejected(review, samples, content)
        encoder = open_encoder(biomedclip)
        settings = {
            "results": fingerprint_all(described_identity(sample, content) for sample in samples),
            **encoder_record(encoder),
            "data": identity(data, "features"),
            "best": best,
            **review_settings(reviewed),
            "least": least,
        }
        record = folder.open(settings, overwrite, anew=overwrite)
        if record and record["complete"]:
            log.info("%s: already complete", output_dir)
            return not record["rejected"]
        asked = [sample for sample in samples if not sample.healthy and kind_of(sample)]
        lesions, more = read_lesions(asked, data, encoder, output_dir, "results")
        content.check(content.known)
        rejects += more
        rows = judged(results, lesions, encoder, best, least)
        chosen = [lesion.sample for lesion, row in zip(lesions, rows, strict=True) if row["kept"]]
        folder.claim()
        write_csv(output_dir / "scores.csv", rows)
        write_rejects(output_dir / "rejects.json", rejects)
        write_annotations(output_dir / "kept.json", chosen)
        counts = {"scored": len(lesions), "kept": len(chosen), "without_type": len(samples) - len(asked)}
        folder.finish(**counts, **({"review": reviewed} if reviewed else {}), rejected=len(rejects))
    log.info("%d of %d kept: %s", len(chosen), len(lesions), output_dir / "kept.json")
    return not rejects


def kind_of(sample: Sample) -> str:
    """The lesion type in lower case; "" where it is not known."""
    return (sample.lesion_type or "").strip().lower()


def judged(
    results: Path, lesions: Sequence[Lesion], encoder: ImageTextEncoder, best: int | None, least: float | None
) -> list[dict]:
    """The rows of ``score``, each with whether its result is ``kept``; MedSoftError where none is."""
    if not lesions:
        raise MedSoftError(f"{results}: no diseased sample with a lesion_type and a mask that can be read")
    rows = score(lesions, encoder)
    margins = [row["margin"] for row in rows]
    kept = keep(margins, [str(row["parent_id"]) for row in rows], best, least)
    if not kept.any():
        raise MedSoftError(f"{results}: no margin is at least {least:g} (the highest: {max(margins):.3f})")
    return [row | {"kept": bool(each)} for row, each in zip(rows, kept, strict=True)]


def score(lesions: Sequence[Lesion], encoder: ImageTextEncoder) -> list[dict]:
    """A row for each result: cosine of its crop with the prompts of its own type (``own``), with those of the nearest
    other type (``other``, None where there is no other) and with ``healthy``; ``margin``: own minus the higher of both.

    A type is the mean direction of all prompts with which results of this type were made.
    """
    kinds = sorted({kind_of(lesion.sample) for lesion in lesions})
    directions = [type_direction([each for each in lesions if kind_of(each.sample) == kind], encoder) for kind in kinds]
    vectors = torch.stack([*directions, text_embeddings(encoder, [HEALTHY])[0]])
    cosines = (lesion_rows(lesions, "embedding") @ vectors.T).numpy()
    rows = []
    for lesion, found in zip(lesions, cosines, strict=True):
        place = kinds.index(kind_of(lesion.sample))
        own, healthy = float(found[place]), float(found[-1])
        others = [float(value) for number, value in enumerate(found[:-1]) if number != place]
        sample = lesion.sample
        who = {"sample_id": sample.sample_id, "parent_id": sample.parent_id or sample.sample_id}
        asked = {"lesion_type": sample.lesion_type, "prompt": sample.prompt}
        margin = own - max([*others, healthy])
        cosine = {"own": own, "other": max(others, default=None), "healthy": healthy, "margin": margin}
        rows.append({**who, **asked, **cosine})
    return rows


def type_direction(lesions: Sequence[Lesion], encoder: ImageTextEncoder) -> Tensor:
    """The mean direction of the distinct prompts of these results, of length 1: float64 (E,)."""
    prompts = sorted({lesion.sample.prompt for lesion in lesions})
    return F.normalize(text_embeddings(encoder, prompts).mean(dim=0), dim=0)


def keep(margins: Sequence[float], parents: Sequence[str], best: int | None, least: float | None) -> np.ndarray:
    """Which results (N,) are kept, from their margins and parents; of equal margins the earlier one is better."""
    kept = np.ones(len(margins), bool) if least is None else np.array(margins) >= least
    if best is not None:
        taken: dict[str, int] = {}
        for place in np.argsort(-np.array(margins), kind="stable"):
            taken[parents[place]] = taken.get(parents[place], 0) + 1
            kept[place] &= taken[parents[place]] <= best
    return kept
