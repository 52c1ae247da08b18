"""What `medsoft edit` uses where nothing names it: the final checkpoint, the training annotations, what to open."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.config import Config, load_config
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.paths import shipped
from ldm.workbench.options import EditOptions
from ldm.workbench.sources import training_annotations

log = logging.getLogger(__name__)

PARENTS = 4  # folders above PATH that are looked through
ALONE = ("sampling.batch_size=1", "sampling.compile=false")  # as --exact draws, and --replay again
DRAWS = {
    "unet",
    "autoencoder",
    "text",
    "biomedclip",
    "msc",
}  # parts of a checkpoint that draws; a table needs no MSC


class Found(NamedTuple):
    """A checkpoint with its YAML and what overrides that, the training annotations, and what to open first.

    The last two may be missing.
    """

    ckpt: Path
    yaml: Path
    config: Config
    overrides: list[str]
    train_json: Path | None
    path: Path | None


def find(options: EditOptions) -> Found:
    """What the flags name, and beside PATH or in the current folder what they do not.

    UsageError, with what to do, where there is no checkpoint that draws, or none of it that the YAML fits.
    """
    places = list(dict.fromkeys(_places(options.path)))
    ckpt = options.ckpt or _checkpoint(places)
    if ckpt is None:
        raise UsageError(
            f"no checkpoint that draws was found in {', '.join(map(str, places))} or the folders in them: give --ckpt, "
            "such as stage2_2/last.ckpt; `make demo` trains one on phantoms"
        )
    yaml = shipped(options.config) if options.config else ckpt.with_name("config.yaml")
    if not yaml.is_file():
        raise UsageError(f"{yaml}: does not exist; give --config, the YAML of {ckpt}, such as models/mldm_v15.yaml")
    overrides = [*options.overrides, *ALONE]
    config = load_config(yaml, overrides)
    if config.sampling.init == "paste":
        raise UsageError("sampling.init=paste pastes the lesion that a prompt was written about; here there is none")
    beside = [*places, ckpt.resolve().parent.parent]
    listed = (training_annotations(place) for place in beside)
    train_json = options.train_json or next((file for file in listed if file), None)
    path = options.path or next((place for place in beside if training_annotations(place)), None)
    return Found(ckpt, yaml, config, overrides, train_json, path)


def _places(path: Path | None) -> Iterator[Path]:
    """The folders to look through: PATH and those above it, then the current one."""
    if path is not None:
        if path.is_dir():
            yield path
        yield from list(path.resolve().parents)[:PARENTS]
    yield Path.cwd()


def _checkpoint(places: Sequence[Path]) -> Path | None:
    """The best checkpoint of the first place that has one: of those that draw, the one of which most was trained, and
    of these the newest. In the current folder also two levels down, where `make demo` leaves it."""
    for place in places:
        patterns = ["last.ckpt", "*/last.ckpt", *(["*/*/last.ckpt"] if place == Path.cwd() else [])]
        for pattern in patterns:
            found = {ckpt: trained for ckpt in place.glob(pattern) if (trained := _trained(ckpt))}
            if found:
                return max(found, key=lambda ckpt: (found[ckpt], ckpt.stat().st_mtime))
    return None


def _trained(ckpt: Path) -> int:
    """How many groups of weights the run of a checkpoint trained, by its config.yaml; 0 for one that does not draw."""
    yaml = ckpt.with_name("config.yaml")
    try:
        if not yaml.is_file():
            return 0
        config = load_config(yaml)
    except MedSoftError as error:
        log.warning("warning: %s is passed over: %s", ckpt, error)
        return 0
    needed = DRAWS - {"msc"} if config.unet.third_attention == "table" else DRAWS
    return len(config.training.rates) if needed <= {*config.training.builds} else 0
