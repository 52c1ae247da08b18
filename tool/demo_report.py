"""Put the demo's numbers and images together: summary.json, report.html and sheet.png.

    python tool/demo_report.py --output_dir demo_output

Only reads what the steps of configs/demo.yaml have left in the folder; nothing is computed by a network here. Numbers
that miss their bar are reported, not hidden, and are no error.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="the demo's output folder")
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.phantom.demo_report import report_demo

    report_demo(args.output_dir)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
