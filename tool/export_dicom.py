"""Results of dataset_infer.py as new DICOM images with segmentations, or as NIfTI, for those who imported their data.

    python tool/export_dicom.py results --private dataset.private --output_dir exported
    python tool/export_dicom.py results --private dataset.private --output_dir exported_nifti --format nifti

A result on the grid of a stored frame becomes a copy of it in which stored values differ inside the soft mask alone; a
reformatted or resampled slice becomes an image with a geometry of its own. All are marked as synthetic and belong to a
patient SYN-... of their own. The same command again finishes what is missing.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.reviews.options import REVIEW_HELP

FORMATS = ("dicom", "nifti")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder that dataset_infer.py wrote")
    parser.add_argument("--private", type=Path, required=True, help="the import's private folder, OUTPUT_DIR.private")
    parser.add_argument("--key", type=Path, help="the import's key, if it had one elsewhere")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--format", choices=FORMATS, default="dicom", help="what to write")
    parser.add_argument(
        "--same_study",
        action="store_true",
        help="write under the real patient, into the real study: never for a clinical archive",
    )
    parser.add_argument("--link_source", action="store_true", help="let the images name the real ones they come from")
    parser.add_argument("--review", action="append", default=[], type=Path, metavar="FILE", help=REVIEW_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace what another export has written")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.volumes.volume import require_extra

    require_extra()
    from ldm.exchange.export import ExportOptions, export

    return export(cli.options(ExportOptions, args))


if __name__ == "__main__":
    cli.run(build_parser(), main)
