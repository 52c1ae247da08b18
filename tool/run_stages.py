"""Run the steps of a plan in order, each one only if it is not done yet; stop at the first failure.

    python tool/run_stages.py configs/demo.yaml

A plan is a YAML file:

    name: demo
    output_dir: demo_output        # stages.json, the record of what is done, lies here
    steps:
      - name: phantoms
        run: python tool/make_phantoms.py --output_dir demo_output/phantoms --seed 7
        makes: [demo_output/phantoms/phantoms.json]

Every step runs from the repository root, and every path in a plan is relative to it, wherever the runner is called
from. Of an installed package without a checkout, that root is the working directory. Commands are split into words as
a shell would, but no shell runs them; ``python`` is the interpreter that runs this script.

A step is done when it ended with 0 or 3, everything it makes exists, no step before it has run since, and neither its
command nor a file of models/ or configs/ that the command names (a YAML with its ``base:`` files) has changed. So a
step that runs makes all after it run: they find out themselves whether anything is left to do; until then --list calls
them outdated. A step that refuses (exit code 2) since its folder holds the work of other settings stops the plan; with
--overwrite it is run once more with its own --overwrite. The seconds of a step are all that was spent on it with these
settings; an "already complete" adds its moment to the real time.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.workflow.plan_run import run_plan


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("plan", metavar="PLAN.yaml", type=Path, help="the plan, for instance configs/demo.yaml")
    made.add_argument("--from", dest="start", metavar="STEP", help="run this step and all after it, done or not")
    made.add_argument("--only", nargs="+", metavar="STEP", help="run these steps only, done or not")
    made.add_argument("--overwrite", action="store_true", help="let a step that refuses replace what others have left")
    made.add_argument("--list", action="store_true", help="show the steps: done, to do or outdated; run nothing")
    return made


def main(args: argparse.Namespace) -> int:
    return run_plan(args.plan, args.start, args.only or (), args.overwrite, args.list)


if __name__ == "__main__":
    cli.run(build_parser(), main)
