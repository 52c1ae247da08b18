"""One evaluation from end to end: real against synthetic lesions, copies, all files of its output folder."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ldm.config import BiomedClipConfig, DataConfig
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id, fingerprint
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import FEWEST_PATIENTS, check_unseen, drawn_by, groups_of_samples, real_ones
from ldm.data.folders import parent_image
from ldm.data.preparation import described_identity
from ldm.data.samples import Reject, Sample
from ldm.evaluation.copies import check_copies, quarantine_copies
from ldm.evaluation.information import asked_drawn, information_text, judged_types
from ldm.evaluation.lesions import (
    Lesion,
    distributions,
    parent_likeness,
    read_lesions,
    set_distances,
    small_sample_warnings,
    text_agreement,
)
from ldm.evaluation.report import OWN_FILES, copy_numbers, estimate_text, write_files
from ldm.networks.encoder import ImageTextEncoder
from ldm.networks.opening import open_encoder
from ldm.reviews.choice import apply_review, sentence

log = logging.getLogger("evaluate")

EXTRACTOR = "BiomedCLIP, CLS token after the trunk's final norm, of the model's crop around the lesion"


@dataclass(frozen=True)
class Sources:
    """Dataset folders or annotation files; ``train``: what the generator learned from, ``real`` where it is None."""

    real: Path
    synthetic: Path
    train: Path | None = None

    @property
    def held_out(self) -> bool:
        """Whether the real samples are other ones than the generator's training samples."""
        return self.train is not None and self.train.resolve() != self.real.resolve()

    def by_name(self) -> dict[str, Path]:
        """The paths as evaluation.json names them."""
        train = self.train if self.train and self.held_out else self.real
        return {"real": self.real, "synthetic": self.synthetic, "train": train}

    def check(self) -> None:
        """UsageError for paths that are not there, and for a source that is compared with itself."""
        for path in self.by_name().values():
            if not path.exists():
                raise UsageError(f"{path}: does not exist; expected a dataset folder or an annotation file")
        if self.real.resolve() == self.synthetic.resolve():
            same = "REAL and SYNTH are the same; expected real samples and results of dataset_infer.py"
            raise UsageError(f"{self.real}: {same}")


def evaluate(
    sources: Sources,
    output_dir: Path,
    data: DataConfig,
    biomedclip: BiomedClipConfig,
    quarantine: bool = False,
    overwrite: bool = False,
    predictions: Path | None = None,
    review: Sequence[Path] = (),
) -> bool:
    """Measure and write everything; whether there are neither copies nor samples that cannot be read.

    ``predictions``: what a judge says of the synthetic images, see ``judged_types``. ``review``: files whose rejected
    images are left out of them, see ``apply_review``. ``quarantine`` moves the copies out of the synthetic folder. The
    output folder is changed only when all is measured.
    Raises UsageError for sources and output folders that cannot be meant, MedSoftError for too few lesions.
    """
    sources.check()
    if quarantine and not sources.synthetic.is_dir():
        raise UsageError(f"--quarantine: {sources.synthetic} is a file; copies are moved out of a results folder")
    folder = RunFolder(output_dir, "evaluation.json", own=OWN_FILES, shared=True)
    with folder.lock():
        samples, rejects = _read_sources(sources)
        if sources.held_out:
            behind = groups_of_samples("SYNTHETIC", samples["synthetic"])
            check_unseen(f"REAL {sources.real}", samples["real"], behind, sources.synthetic)
        choice = apply_review(review, samples["synthetic"]) if review else None
        if choice:
            samples["synthetic"] = [samples["synthetic"][place] for place in choice.kept(samples["synthetic"])]
        judged = judged_types(predictions, samples["synthetic"]) if predictions else None
        encoder = open_encoder(biomedclip)
        settings = {name: fingerprint([described_identity(s) for s in each]) for name, each in samples.items()}
        settings["parents"] = _parents(samples["synthetic"])
        settings |= {"biomedclip": encoder.fingerprint, "data": identity(data, "features")}
        settings |= {"predictions": fingerprint(judged)} if judged else {}
        settings |= {"review_sha256": [each["sha256"] for each in choice.record["files"]]} if choice else {}
        record = folder.open(settings, overwrite, anew=overwrite)
        if record and record["complete"] and not (quarantine and record["copies"]["count"]):
            log.info("%s: already complete", output_dir)
            return not (record["copies"]["count"] or record["rejected"])
        lesions = _read_lesions(sources, samples, data, encoder, rejects)
        measured = _measure(encoder, lesions)
        measured |= {"asked_drawn": asked_drawn(*judged)} if judged else {}
        copies = check_copies(lesions["synthetic"], lesions["train"], lesions["real"] if sources.held_out else None)
        measured |= {"copies": copy_numbers(copies), "rejected": len(rejects)}
        measured["warnings"] += copies.warnings()
        if choice:
            measured |= {"review": choice.record, "warnings": [sentence(choice.record), *measured["warnings"]]}
        measured["sources"] = {name: str(path) for name, path in sources.by_name().items()}
        measured["drawn_by"] = drawn_by(samples["synthetic"])
        folder.claim()
        write_files(output_dir, measured, copies, lesions, rejects)
        folder.finish(**measured)
        if quarantine:
            quarantine_copies(copies.copies, sources.synthetic)
    _log_summary(output_dir, measured, rejects)
    return not (copies.copies or rejects)


def _read_sources(sources: Sources) -> tuple[dict[str, list[Sample]], list[Reject]]:
    """The samples of each source, diseased or not, and what cannot be read; one that stands for two is read once."""
    paths = sources.by_name()
    read = {path: load_samples(path) for path in dict.fromkeys(paths.values())}
    rejects = [reject for _, more in read.values() for reject in more]
    samples = {name: read[path][0] for name, path in paths.items()}
    if silent := sum(not sample.synthetic for sample in samples["synthetic"]):
        text = "warning: SYNTH %s: %d of %d samples do not say that they are synthetic: are they real ones?"
        log.warning(text, sources.synthetic, silent, len(samples["synthetic"]))
    return samples | {"real": real_ones(f"REAL {sources.real}", samples["real"])}, rejects


def _parents(results: list[Sample]) -> str:
    """A digest of the images that the results were made from; some may be put back between two evaluations."""
    content, found = cache(content_id), set()
    for result in results:
        with suppress(MedSoftError):  # not there, or another one
            found.add(content(parent_image(result, content)))
    return fingerprint(sorted(filter(None, found)))


def _read_lesions(
    sources: Sources,
    samples: Mapping[str, list[Sample]],
    data: DataConfig,
    encoder: ImageTextEncoder,
    rejects: list[Reject],
) -> dict[str, list[Lesion]]:
    """The lesions of each source; what cannot be read joins ``rejects``.

    Raises MedSoftError unless every source has enough diseased samples for a covariance, the training one for a match.
    """
    lesions: dict[str, list[Lesion]] = {}
    for name in ("real", "synthetic", *(["train"] if sources.held_out else [])):
        lesions[name], more = read_lesions(samples[name], data, encoder, name)
        rejects += [reject for reject in more if reject not in rejects]
    lesions.setdefault("train", lesions["real"])
    for name, least in (("real", 2), ("synthetic", 2), ("train", 1)):
        if len(lesions[name]) < least:
            wanted = f"expected at least {counted(least, 'diseased sample')} with a mask, found {len(lesions[name])}"
            raise MedSoftError(f"{sources.by_name()[name]}: {wanted}")
    return lesions


def _measure(encoder: ImageTextEncoder, lesions: Mapping[str, list[Lesion]]) -> dict[str, Any]:
    """Everything but copies."""
    real, synthetic, dimensions = lesions["real"], lesions["synthetic"], encoder.token_dim
    extractor = {"fingerprint": encoder.fingerprint, "dimensions": dimensions}
    warnings = small_sample_warnings(len(real), len(synthetic), dimensions)
    trained, measured = ({each.sample.patient_id for each in lesions[name]} for name in ("train", "real"))
    if lesions["train"] is not real and (shared := trained & measured):
        said = counted(len(shared), "patient of REAL is", "patients of REAL are")
        warnings.append(f"{said} also in the training set: it is no yardstick for what was not seen.")
    for name in ("real", "synthetic"):
        if (count := len({each.sample.patient_id for each in lesions[name]})) < FEWEST_PATIENTS:
            why = f"an interval from fewer than {FEWEST_PATIENTS} is meaningless"
            warnings.append(
                f"The {name} lesions are of {counted(count, 'patient')}: no number of theirs has an interval, {why}."
            )
    return {
        "pictures": {name: len(each) for name, each in lesions.items()},
        "extractor": {"name": EXTRACTOR, "folder": str(encoder.folder), **extractor},
        "warnings": warnings,
        "distances": set_distances(real, synthetic),
        "parents": parent_likeness(synthetic),
        "text": {"real": text_agreement(encoder, real), "synthetic": text_agreement(encoder, synthetic)},
        "lesions": distributions(real, synthetic),
    }


def _log_summary(folder: Path, measured: Mapping[str, Any], rejects: list[Reject]) -> None:
    """The most important numbers on the screen."""
    for name, each in measured["distances"].items():
        log.info("%s: %s", name, estimate_text(each))
    if "asked_drawn" in measured:
        log.info("the asked lesion type in the drawn one: %s", information_text(measured["asked_drawn"]))
    for text in measured["warnings"]:
        log.warning("warning: %s", text)
    count = measured["copies"]["count"]
    text = f"{count} of {measured['pictures']['synthetic']} synthetic lesions are copies of training lesions"
    log.log(logging.WARNING if count else logging.INFO, "%s (%s)", text, folder / "copies.json")
    if rejects:
        log.warning("%s could not be read, listed in %s", counted(len(rejects), "sample"), folder / "rejects.json")
    log.info("%s", folder / "report.html")
