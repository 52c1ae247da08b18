"""The flags of tool/reader_study.py. Nothing heavy is imported here."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ldm.core import cli
from ldm.reviews.options import REVIEW_HELP

DESIGNS = ("single", "pairs")


@dataclass(frozen=True)
class MakeOptions:
    """What ``make`` is given: ``paths`` are folders of results, the flags follow."""

    paths: list[Path]
    output_dir: Path = cli.flag("folder to write: for_readers/ to hand out, key.json to keep", dataclasses.MISSING)
    real: list[Path] = cli.flag(
        "real samples to show beside the drawn ones: dataset folders or annotation files", None, nargs="+", type=Path
    )
    design: str = cli.flag(
        "single: one picture and how sure one is; pairs: a real and a drawn one, which is drawn?",
        "single",
        choices=DESIGNS,
    )
    cases: int = cli.flag(
        "drawn pictures, and as many real ones (default: as many as have a patient of their own, 60 at most)",
        type=cli.COUNT,
    )
    review: list[Path] = cli.flag(REVIEW_HELP, None, action="append", type=Path, metavar="FILE")
    match: list[str] = cli.flag(
        "keys of meta.json that are matched too, such as level or scanner, beside lesion_type and severity",
        None,
        nargs="+",
    )
    crop: int = cli.flag(
        "side of all pictures in native pixels (default: three times the largest lesion, 64 at least)",
        type=cli.Number(int, 16, 8192),
    )
    readers: int = cli.flag("readers that are planned", 5, type=cli.Number(int, 1, 1000))
    half_width: float = cli.flag(
        "refuse to make a study whose 95 %% interval is expected to be wider than plus or minus this",
        type=cli.Number(float, 0.01, 0.5),
    )
    seed: int = cli.flag("of the choice, the names and the order", 0, type=cli.SEED)
    overwrite: bool = cli.flag("replace the study made from other samples or flags", False)


@dataclass(frozen=True)
class AnalyseOptions:
    """What ``analyse`` is given: ``paths`` are the study's folder, then files of answers or folders of them.

    ``unfinished``: the answers of readers who did not finish are used too.
    """

    paths: list[Path]
    output_dir: Path
    unfinished: bool = False
    overwrite: bool = False
