"""Measure the speed of this machine, ours beside diffusers', in one run.

    python tool/bench.py inference                                   # phantom size, seconds
    python tool/bench.py inference --config models/mldm_v15.yaml     # true size, random weights, minutes, about 8 GB
    python tool/bench.py inference --sizes 1,8 --precision bf16-true --compile   # whole images
    python tool/bench.py training --config models/phantom.yaml       # the four stages: cache, freezing, precision
    python tool/bench.py batches --config models/mldm_v15.yaml       # a GPU: steps of 1, 2, 4 ... items until full
    python tool/bench.py memory --config models/mldm_v15.yaml --batch_size 1   # docs/memory.md; about 20 GB
    python tool/bench.py data --samples 20000    # preparation, doctor and reading of tiny samples, docs/scale.md
    python tool/bench.py import      # 1,000 slices of DICOM series into sample folders, about two minutes

Both sides have the same weights, input, precision and threads, and take turns; the ratio is theirs / ours, so above 1
ours is faster. Times are medians. The last lines of `inference` compare whole images by adding up the calls that each
makes: 50 guided steps of DDIM on both sides, and our fast setting with their 50; with `--steps 50` they are measured.
"""

import argparse
import importlib
from pathlib import Path

from ldm.core import cli
from ldm.core.files import write_json

# Each measurement is the `main(options)` of its module in ldm/bench.
MEASUREMENTS = {name: name for name in ("inference", "training", "batches", "memory")}
MEASUREMENTS |= {"import": "importing", "data": "dataset"}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("what", choices=MEASUREMENTS, help="what to measure")
    parser.add_argument("--config", type=Path, default=Path("models/phantom.yaml"), help="model YAML")
    parser.add_argument("--batch_size", type=cli.COUNT, default=2, help="images per call")
    parser.add_argument("--repeats", type=cli.COUNT, default=10, help="measured calls, after the warm-up")
    inference = parser.add_argument_group("inference")
    inference.add_argument("--precision", default="32-true", choices=["32-true", "bf16-true"], help="of both sides")
    inference.add_argument("--steps", type=cli.WHOLE, default=10, help="of whole images; 0 measures single calls only")
    inference.add_argument("--compile", action="store_true", help="with --sizes: measure compiled networks too")
    batches = parser.add_argument_group("inference and batches")
    what = "batch sizes, such as 1,8,32: whole images in each (default for batches: 1, 2, 4 ... until memory is full)"
    batches.add_argument("--sizes", help=what)
    parser.add_argument_group("data").add_argument("--samples", type=cli.COUNT, default=20000, help="of the data set")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.bench.common import BenchOptions

    numbers = importlib.import_module(f"ldm.bench.{MEASUREMENTS[args.what]}").main(cli.options(BenchOptions, args))
    if args.output:
        write_json(args.output, numbers)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
