"""Measure whether synthetic images help a classifier, against fair controls: worlds x arms x ratios x seeds.

    python tool/study.py configs/study_phantom.yaml

A world is one set of patients (a phantom seed, or annotation files of yours), a generator one way of training and
drawing, an arm one way of training the classifier, a cell one classifier. Every cell runs once; started again, the
study goes on. Into the YAML's output_dir: results.csv (a row a cell), drawings.csv, hypotheses.csv, study.md and
study.html (hypotheses, means, paired differences, what they support), dose_response.png. All paths are relative to the
repository root.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.workflow.study_run import run_study


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study, e.g. configs/study_phantom.yaml")
    made.add_argument("--overwrite", action="store_true", help="let a step that refuses replace what others have left")
    idle = made.add_mutually_exclusive_group()
    idle.add_argument("--collect", action="store_true", help="run nothing; report what is finished in all worlds")
    idle.add_argument("--list", action="store_true", help="run nothing; show the steps: done, to do or outdated")
    text = "run (or list) these worlds only, e.g. world_0; other processes may run others at the same time"
    made.add_argument("--worlds", nargs="+", metavar="WORLD", help=text)
    text = "worlds that run side by side and share the processors; what each says goes to OUTPUT_DIR/WORLD.log"
    made.add_argument("--jobs", type=cli.PROCESSES, default=1, metavar="N", help=text)
    return made


def main(args: argparse.Namespace) -> int:
    return run_study(args.study, args.worlds, args.jobs, args.collect, args.overwrite, args.list)


if __name__ == "__main__":
    cli.run(build_parser(), main)
