"""A reader study: can people tell drawn lesions from real ones? Its folder for them, and its analysis.

    python tool/reader_study.py make results --real openimages_format_test.json --output_dir reader_study
    python tool/reader_study.py analyse reader_study answers --output_dir reader_study/analysis

`make` writes OUTPUT_DIR/for_readers, a folder that opens from disk (index.html) and loads nothing from anywhere else,
and OUTPUT_DIR/key.json, which stays with you. Each reader sends one file of answers back; `analyse` takes the study's
folder, then these files or folders of them, and writes report.html, analysis.json, readers.csv and answers.csv. Exit
code 3: some samples or answers could not be used; rejects.json lists them.
"""

import argparse
import dataclasses
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError
from ldm.readers.options import AnalyseOptions, MakeOptions

TASKS: dict[str, type[MakeOptions | AnalyseOptions]] = {"make": MakeOptions, "analyse": AnalyseOptions}


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("task", choices=TASKS, help="make a study, or analyse its answers")
    made.add_argument(
        "paths", metavar="PATH", nargs="+", type=Path, help="make: RESULTS ...; analyse: STUDY ANSWERS ..."
    )
    cli.add_flags(made, MakeOptions)
    made.add_argument("--unfinished", action="store_true", help="analyse: also use readers who did not finish")
    return made


def main(args: argparse.Namespace) -> int:
    own = {field.name for field in dataclasses.fields(TASKS[args.task])}
    others = (field for kind in TASKS.values() for field in dataclasses.fields(kind) if field.name not in own)
    for field in others:
        if getattr(args, field.name) != field.default:
            raise UsageError(f"--{field.name}: is no flag of {args.task}")
    if args.task == "make":
        if not args.real:
            raise UsageError("make: expected --real, the real samples to show beside the drawn ones")
        from ldm.readers.making import make_study

        clean = make_study(cli.options(MakeOptions, args))
    else:
        from ldm.readers.analysis import analyse_study

        clean = analyse_study(cli.options(AnalyseOptions, args))
    return cli.DONE if clean else cli.SOME_REJECTED


if __name__ == "__main__":
    cli.run(build_parser(), main)
