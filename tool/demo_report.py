"""Put the demo's numbers and images together: summary.json, report.html and sheet.png.

    python tool/demo_report.py --output_dir demo_output
    python tool/demo_report.py --output_dir large_output --plan configs/large.yaml

Only reads what the plan's steps have left in the folder; nothing is computed by a network here. Numbers that miss their
bar are reported, not hidden, and are no error.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="the demo's output folder")
    text = "the plan whose steps were run there"
    made.add_argument("--plan", type=Path, default=Path("configs/demo.yaml"), help=text)
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.phantom.demo_report import report_demo

    report_demo(args.output_dir, args.plan)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
