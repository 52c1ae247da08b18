"""Measure training and drawing on this machine's GPU, run the tests that need one, and write docs/gpu.md.

    python tool/gpu.py                                           # true size, random weights; `make gpu`
    python tool/gpu.py --device cpu --config models/phantom.yaml --document page.md    # the same steps, small

Each step runs in a process of its own and leaves gpu_output/STEP.json; no step begins after --minutes. The same command
goes on with what is missing or failed. Results of another device, commit or version of torch are measured again.
"""

import argparse
import os
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("models/mldm_v15.yaml"), help="model YAML")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="what is measured")
    parser.add_argument("--minutes", type=cli.AMOUNT, default=9.0, help="time for all steps")
    parser.add_argument("--output_dir", type=Path, default=Path("gpu_output"), help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=Path("docs/gpu.md"), help="page whose tables are written")
    parser.add_argument("--repeats", type=cli.COUNT, default=9, help="measured steps, after the warm-up")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="steps to take (default: all)")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # one step, in this process
    return parser


def main(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from ldm.bench import gpu

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no GPU is there (torch.cuda.is_available() is False); --device cpu takes the same steps here")
    return cli.SOME_REJECTED if gpu.main(cli.options(gpu.GpuOptions, args)) else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
