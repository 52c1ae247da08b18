"""One evaluation from end to end: real against synthetic lesions, copies, all files of its output folder."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config import BiomedClipConfig, DataConfig
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import Contents, fingerprint, fingerprint_all
from ldm.core.run_folder import RunFolder
from ldm.core.schema import identity
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import FEWEST_PATIENTS, check_unseen, drawn_by, groups_of_samples, real_ones
from ldm.data.folders import parent_image
from ldm.data.preparation import described_identity
from ldm.data.samples import Reject, Sample
from ldm.evaluation.copies import CopyCheck, check_copies, quarantine_copies
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
from ldm.networks.opening import encoder_record, open_encoder
from ldm.reviews.choice import review_settings, sentence, without_rejected

log = logging.getLogger("evaluate")

EXTRACTOR = "BiomedCLIP, CLS token after the trunk's final norm, of the model's crop around the lesion"


@dataclass(frozen=True)
class Sources:
    """What is compared: dataset folders or annotation files, and what others say of the synthetic images.

    ``train``: what the generator learned from, ``real`` where it is None. ``predictions``: what a judge says of the
    synthetic images, see ``judged_types``. ``review``: files whose rejected images are left out, see ``apply_review``.
    """

    real: Path
    synthetic: Path
    train: Path | None = None
    predictions: Path | None = None
    review: Sequence[Path] = ()

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


class Inputs(NamedTuple):
    """What is read of the sources before anything is measured."""

    samples: dict[str, list[Sample]]  # of each source, without images that a review rejects
    rejects: list[Reject]
    judged: tuple[list[str], list[str], list[str]] | None  # see ``judged_types``
    review: dict[str, Any]  # the record of ``apply_review``; empty without one

    def settings(self, encoder: ImageTextEncoder, data: DataConfig, content: Contents) -> dict[str, Any]:
        """All that decides the numbers; ``content`` reads the files."""
        found: dict[str, Any] = {
            name: fingerprint_all(described_identity(sample, content) for sample in each)
            for name, each in self.samples.items()
        }
        found["parents"] = _parents(self.samples["synthetic"], content)
        found |= {**encoder_record(encoder), "data": identity(data, "features")}
        if self.judged:
            found["predictions"] = fingerprint(self.judged)
        return found | review_settings(self.review)


def evaluate(
    sources: Sources,
    output_dir: Path,
    data: DataConfig,
    biomedclip: BiomedClipConfig,
    quarantine: bool,
    overwrite: bool,
) -> bool:
    """Measure and write everything; whether there are neither copies nor samples that cannot be read.

    ``quarantine`` moves the copies out of the synthetic folder. The output folder is changed only when all is measured.
    Raises UsageError for sources and output folders that cannot be meant, MedSoftError for too few lesions.
    """
    sources.check()
    if quarantine and not sources.synthetic.is_dir():
        raise UsageError(f"--quarantine: {sources.synthetic} is a file; copies are moved out of a results folder")
    folder, content = RunFolder(output_dir, "evaluation.json", own=OWN_FILES, shared=True), Contents()
    with folder.lock():
        inputs = _read_inputs(sources, content)
        encoder = open_encoder(biomedclip)
        record = folder.open(inputs.settings(encoder, data, content), overwrite, anew=overwrite)
        if record and record["complete"] and not (quarantine and record["copies"]["count"]):
            log.info("%s: already complete", output_dir)
            return not (record["copies"]["count"] or record["rejected"])
        lesions = _read_lesions(sources, inputs, data, encoder, output_dir)
        copies = check_copies(lesions["synthetic"], lesions["train"], lesions["real"] if sources.held_out else None)
        measured = _measure(sources, inputs, lesions, copies, encoder)
        content.check(content.known)
        folder.claim()
        write_files(output_dir, measured, copies, lesions, inputs.rejects)
        folder.finish(**measured)
        if quarantine:
            quarantine_copies(copies.copies, sources.synthetic)
    _log_summary(output_dir, measured, inputs.rejects)
    return not (copies.copies or inputs.rejects)


def _read_inputs(sources: Sources, content: Contents) -> Inputs:
    samples, rejects = _read_samples(sources)
    if sources.held_out:
        behind = groups_of_samples("SYNTHETIC", samples["synthetic"])
        check_unseen(f"REAL {sources.real}", samples["real"], behind, sources.synthetic)
    synthetic, review = without_rejected(sources.review, samples["synthetic"], content)
    judged = judged_types(sources.predictions, synthetic) if sources.predictions else None
    return Inputs(samples | {"synthetic": synthetic}, rejects, judged, review)


def _read_samples(sources: Sources) -> tuple[dict[str, list[Sample]], list[Reject]]:
    """The samples of each source, diseased or not, and what cannot be read; one that stands for two is read once."""
    paths = sources.by_name()
    read = {path: load_samples(path) for path in dict.fromkeys(paths.values())}
    rejects = [reject for _, more in read.values() for reject in more]
    samples = {name: read[path][0] for name, path in paths.items()}
    if silent := sum(not sample.synthetic for sample in samples["synthetic"]):
        text = "warning: SYNTH %s: %d of %d samples do not say that they are synthetic: are they real ones?"
        log.warning(text, sources.synthetic, silent, len(samples["synthetic"]))
    return samples | {"real": real_ones(f"REAL {sources.real}", samples["real"])}, rejects


def _parents(results: list[Sample], content: Contents) -> str:
    """A digest of the images that the results were made from; some may be put back between two evaluations."""
    found = set()
    for result in results:
        with suppress(MedSoftError):  # not there, or another one
            found.add(content(parent_image(result, content)))
    return fingerprint(sorted(filter(None, found)))


def _read_lesions(
    sources: Sources, inputs: Inputs, data: DataConfig, encoder: ImageTextEncoder, folder: Path
) -> dict[str, list[Lesion]]:
    """The lesions of each source, on the disk of ``folder``; what cannot be read joins the rejects of ``inputs``.

    Raises MedSoftError unless every source has enough diseased samples for a covariance, the training one for a match.
    """
    lesions: dict[str, list[Lesion]] = {}
    for name in ("real", "synthetic", *(["train"] if sources.held_out else [])):
        lesions[name], more = read_lesions(inputs.samples[name], data, encoder, folder, name)
        inputs.rejects.extend([reject for reject in more if reject not in inputs.rejects])
    lesions.setdefault("train", lesions["real"])
    for name, least in (("real", 2), ("synthetic", 2), ("train", 1)):
        if len(lesions[name]) < least:
            wanted = f"expected at least {counted(least, 'diseased sample')} with a mask, found {len(lesions[name])}"
            raise MedSoftError(f"{sources.by_name()[name]}: {wanted}")
    return lesions


def _measure(
    sources: Sources, inputs: Inputs, lesions: Mapping[str, list[Lesion]], copies: CopyCheck, encoder: ImageTextEncoder
) -> dict[str, Any]:
    """All that evaluation.json says."""
    real, synthetic = lesions["real"], lesions["synthetic"]
    extractor = {"fingerprint": encoder.fingerprint, "dimensions": encoder.token_dim}
    reviewed = [sentence(inputs.review)] if inputs.review else []
    return {
        "pictures": {name: len(each) for name, each in lesions.items()},
        "extractor": {"name": EXTRACTOR, "folder": str(encoder.folder), **extractor},
        "warnings": [*reviewed, *_sample_warnings(lesions, encoder.token_dim), *copies.warnings()],
        "distances": set_distances(real, synthetic),
        "parents": parent_likeness(synthetic),
        "text": {"real": text_agreement(encoder, real), "synthetic": text_agreement(encoder, synthetic)},
        "lesions": distributions(real, synthetic),
        **({"asked_drawn": asked_drawn(*inputs.judged)} if inputs.judged else {}),
        "copies": copy_numbers(copies),
        "rejected": len(inputs.rejects),
        **({"review": inputs.review} if inputs.review else {}),
        "sources": {name: str(path) for name, path in sources.by_name().items()},
        "drawn_by": drawn_by(inputs.samples["synthetic"]),
    }


def _sample_warnings(lesions: Mapping[str, list[Lesion]], dimensions: int) -> list[str]:
    """What the choice of samples does to the numbers, ``dimensions`` of features behind them."""
    warnings = small_sample_warnings(len(lesions["real"]), len(lesions["synthetic"]), dimensions)
    patients = {name: {lesion.sample.patient_id for lesion in each} for name, each in lesions.items()}
    if lesions["train"] is not lesions["real"] and (shared := patients["train"] & patients["real"]):
        said = counted(len(shared), "patient of REAL is", "patients of REAL are")
        warnings.append(f"{said} also in the training set: it is no yardstick for what was not seen.")
    for name in ("real", "synthetic"):
        if (count := len(patients[name])) < FEWEST_PATIENTS:
            why = f"an interval from fewer than {FEWEST_PATIENTS} is meaningless"
            warnings.append(
                f"The {name} lesions are of {counted(count, 'patient')}: no number of theirs has an interval, {why}."
            )
    return warnings


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
