"""Draw a paper's figures from one study or several: learning curve, arms, kinds of lesions, drawings side by side.

    python tool/study_figures.py configs/study_controls.yaml configs/study_few.yaml --output_dir figures

Into --output_dir: learning_curve (test AUC by the number of real lesions, a point a study), arms_NAME (what each arm
changes against the control), both as PNG and SVG, kinds_NAME.csv (AUC by kind and severity), drawings_NAME.png (the
same healthy images after each generator, of a world that was computed here), figures.md (all together).
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("studies", metavar="STUDY.yaml", nargs="+", type=Path, help="studies of which cells are finished")
    made.add_argument("--output_dir", type=Path, required=True, help="folder of figures and tables; replaced there")
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.workflow.study_figures import write_figures

    return write_figures(args.studies, args.output_dir)


if __name__ == "__main__":
    cli.run(build_parser(), main)
