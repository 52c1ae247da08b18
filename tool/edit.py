"""Draw lesions in the browser: open an image, paint a mask, write a sentence, accept or reject.

    python tool/edit.py demo_output

PATH is an image, a sample folder, a DICOM or NIfTI file or folder, an annotation file, a dataset folder or the output
folder of a plan. Without it: what the current folder holds. What is accepted becomes a sample folder in
OUTPUT_DIR/accepted, which every command reads; OUTPUT_DIR/drafts keeps all drawings. Needs the extra `edit`.
"""

import argparse
import logging
from pathlib import Path

from ldm.core import cli
from ldm.workbench.options import EditOptions, require_extra


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("path", metavar="PATH", nargs="?", type=Path, help="what to open")
    cli.add_flags(made, EditOptions)
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return made


def main(args: argparse.Namespace) -> None:
    if args.path is not None and "=" in args.path.name and not args.path.exists():
        args.path, args.overrides = None, [str(args.path), *args.overrides]
    options = cli.options(EditOptions, args)
    options.validate()
    require_extra()
    logging.getLogger(__name__).info("loading; the address follows in some seconds")
    from ldm.workbench.editing import edit

    edit(options, debug=args.debug)


if __name__ == "__main__":
    cli.run(build_parser(), main, at_once=True)
