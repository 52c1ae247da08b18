"""Import DICOM series, NIfTI, NRRD or MHA volumes, with their labels and lesions, as a dataset folder.

    python tool/import_volumes.py scans --labels segmentations --preset totalsegmentator --window bone --output_dir data
    python tool/import_volumes.py cases.csv --preset spider --target L3 L4 --slices all --output_dir data

SOURCE is a folder of DICOM series at any depth, one DICOM file, a volume, a folder of volumes or of nnU-Net, or a CSV
table with the columns image, labels, lesion, series, prompt, lesion_type, severity, level, patient, site, scanner,
modality, region (image alone is needed; paths begin at the table's folder). Each vertebra of the labels becomes a
sample: image.png with the values of the file in 16 bits, anatomy.png, mask.png of its lesion, prompt.txt, meta.json.
A vertebra without a lesion is healthy; a lesion needs a sentence, from the table or the DICOM segmentation.

Nothing below OUTPUT_DIR names a patient, a path or a date: patients have pseudonyms, rejects.json and left_out.csv call
files by case ids. OUTPUT_DIR.private, which only you can read, holds the key of the pseudonyms, the way back for
export_dicom.py, and cases.csv, which says which file a case id is. Keep it, and keep it away from the dataset. What is
burned into pixels is not seen. Look at OUTPUT_DIR/import_overlays.html: vertebrae in their colours, head up.

The same command again goes on where it was stopped and takes in what is new. Exit code 3: some images were rejected.
"""

import argparse
from pathlib import Path

from ldm.core import cli

PRESETS = ("totalsegmentator", "verse", "spider", "totalspineseg")
SCALE = cli.Number(float, 0.01, 100)  # mm
PLANES = ("sagittal", "coronal", "axial")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, image or table (CSV)")
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder to write")
    what = parser.add_argument_group("what belongs to the images")
    text = (
        "a file, a folder with one for each image (named after it, or DICOM SEG and RTSTRUCT), or a name beside images"
    )
    what.add_argument("--labels", type=Path, help=f"label maps of the spine: {text}")
    what.add_argument("--lesions", type=Path, help="lesion masks, in the same ways; an image without one is healthy")
    what.add_argument("--table", type=Path, help="CSV as above for a SOURCE that is none, or a folder with CASE.txt")
    what.add_argument("--preset", choices=PRESETS, help="what the numbers of the labels mean")
    what.add_argument("--map", type=Path, help="JSON or CSV that says it: number (or segment) and L3, disc, canal, ...")
    what.add_argument("--series", help="of DICOM: the series to take, by number, UID or a part of the description")
    what.add_argument("--modality", type=str.upper, help="CT or MR: of volumes; of DICOM, only such series")
    cut = parser.add_argument_group("what is cut from them")
    cut.add_argument("--plane", choices=PLANES, default="sagittal", help="of the slices")
    cut.add_argument("--target", nargs="+", default=[], metavar="LEVEL", help="vertebrae such as L3 (default: all)")
    text = "of each vertebra: middle (of a lesion: where it is largest), lesion, all, or a number"
    cut.add_argument("--slices", default="middle", help=text)
    cut.add_argument("--limit", type=cli.COUNT, help="the most samples of a patient")
    text = "bone, soft_tissue, file (its first), body, or LOW HIGH in HU (default: bone for CT, else file, else body)"
    cut.add_argument("--window", nargs="+", metavar="RULE", help=text)
    cut.add_argument("--mm_per_pixel", type=SCALE, help="one scale for all (default: square pixels of the image's own)")
    who = parser.add_argument_group("privacy")
    who.add_argument("--year", action="store_true", help="keep the year of the image in meta.json")
    who.add_argument(
        "--key", type=Path, help="key file of an earlier import: the same patients get the same pseudonyms"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was imported with other settings")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.volumes.volume import require_extra

    require_extra()
    from ldm.exchange.importing import ImportOptions, import_volumes

    return import_volumes(args.source, args.output_dir, cli.options(ImportOptions, args), args.overwrite)


if __name__ == "__main__":
    cli.run(build_parser(), main)
