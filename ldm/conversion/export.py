"""A checkpoint as a diffusers folder, for programs that know Stable Diffusion but not this method."""

import logging
from pathlib import Path

from ldm.checkpoints.checkpoint import NAMES, parameter_table, read_checkpoint, summary
from ldm.checkpoints.files import verify
from ldm.checkpoints.fitting import parts_of
from ldm.conversion.diffusers_folder import OURS, write_folder
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_folder, check_target, read_json
from ldm.networks.model import skeleton

log = logging.getLogger(__name__)


def export_folder(ckpt: Path, output_dir: Path, overwrite: bool) -> None:
    """Write the whole folder, or nothing; a folder that is the export of the same file is left as it is.

    Raises MedSoftError for a checkpoint that is damaged, incomplete or says no configuration, UsageError for a folder
    that holds anything but an export that may be replaced.
    """
    checkpoint = read_checkpoint(ckpt)
    config, parts = checkpoint.config, checkpoint.parts()
    if config is None:
        raise MedSoftError(f"{ckpt}: does not say which configuration it has; convert it with tool/model_convert.py")
    missing = [NAMES[part] for part in ("unet", "autoencoder", "text") if part not in parts]
    if missing:
        raise MedSoftError(f"{ckpt}: holds no {', '.join(missing)}; a pipeline needs them. Merge it first")
    size = sum(row["bytes"] for row in summary(checkpoint.state).values())
    known = exported_from(output_dir)
    check_target(output_dir, size if overwrite or not known else 0, ckpt)
    digest = checkpoint.sha256()
    if known and not overwrite:
        if known != digest:
            raise UsageError(
                f"{output_dir}: holds the export of another file; give another path, or --overwrite to replace it"
            )
        log.info("%s: already complete", output_dir)
        return
    log.info("checked: %s, %s", ckpt, verify(ckpt))
    architecture = config.architecture
    state = parts_of(checkpoint, parts, architecture, skeleton(architecture, parts))
    origin = {"file": ckpt.name, "sha256": digest}
    ours = {"about": checkpoint.metadata, "parts": parts, "exported_from": origin}
    with atomic_folder(output_dir.absolute()) as partial:
        write_folder(partial, state, ours, architecture)
        checkpoint.file.check()
    for line in parameter_table(state):
        log.info("%s", line)
    log.info("written: %s", output_dir)


def exported_from(folder: Path) -> str | None:
    """SHA-256 of the checkpoint that ``folder`` is the export of; None where there is no folder.

    UsageError if it is something else: ``--overwrite`` replaces only what this command has written.
    """
    if not folder.exists():
        return None
    try:
        return read_json(folder / OURS / "config.json")["exported_from"]["sha256"]
    except (MedSoftError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: already exists and was not exported by this command; give another path") from error
