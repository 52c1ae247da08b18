"""What an image becomes for the model: the crop around a lesion, enlarged or reduced, and what the lesion fills of it.

    python tool/crop_table.py                                         # usual sizes of images and lesions
    python tool/crop_table.py data.context=3                          # with other settings
    python tool/crop_table.py --data openimages_format_train.json     # of your own samples: quantiles of each column

Nothing is trained or written, but --output. Exit code 3: some samples of --data cannot be cropped; they are named.
"""

import argparse
import logging
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import warn_of_first
from ldm.core.files import write_text

log = logging.getLogger("crop_table")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("models/mldm_v15.yaml"), help="YAML with the data settings")
    parser.add_argument("--data", type=Path, help="dataset folder or annotation file to look at instead")
    most = "samples of --data to look at, evenly spread over the file"
    parser.add_argument("--limit", type=cli.COUNT, default=1000, help=most)
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.bench.crops import Grids, data_table, geometry_table
    from ldm.config import load_config

    config = load_config(args.config, args.overrides)
    grids = Grids(config.biomedclip.grid, config.architecture.latent_size)
    if args.data:
        table, rejects = data_table(args.data, config.data, grids, args.limit)
    else:
        table, rejects = geometry_table(config.data, grids), []
    warn_of_first(log, (f"cannot be cropped: {reject}" for reject in rejects))
    if args.output:
        write_text(args.output, f"{table}\n")
    else:
        print(table)
    return cli.SOME_REJECTED if rejects else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
