"""The command ``medsoft``: every script of the repository under one name, each with its own flags."""

import ast
import difflib
import runpy
import sys

from ldm.core import cli
from ldm.core.paths import SHIPPED

SCRIPTS = {
    "init": "tool/init.py",
    "import": "tool/import_volumes.py",
    "prepare": "ver_openImagesDatasets.py",
    "convert": "tool/model_convert.py",
    "train": "ver_train.py",
    "merge": "tool/tool_merge_for_stage2.py",
    "draw": "dataset_infer.py",
    "edit": "tool/edit.py",
    "review": "tool/review.py",
    "serve": "tool/serve.py",
    "copy-paste": "tool/copy_paste.py",
    "classify": "classifier.py",
    "evaluate": "tool/evaluate.py",
    "choose": "tool/choose_results.py",
    "judge": "tool/judge_results.py",
    "readers": "tool/reader_study.py",
    "study": "tool/study.py",
    "figures": "tool/study_figures.py",
    "run": "tool/run_stages.py",
    "doctor": "tool/doctor.py",
    "inspect": "tool/inspect_checkpoint.py",
    "export": "tool/export_diffusers.py",
    "export-dicom": "tool/export_dicom.py",
    "card": "tool/card.py",
    "push": "tool/push.py",
    "pull": "tool/pull.py",
    "soft-masks": "tool/make_soft_masks.py",
    "seam": "tool/measure_seam.py",
    "crops": "tool/crop_table.py",
    "compare-samplers": "tool/compare_samplers.py",
    "paths": "tool/measure_paths.py",
    "bench": "tool/bench.py",
    "gpu": "tool/gpu.py",
    "sizes": "tool/model_sizes.py",
    "phantoms": "tool/make_phantoms.py",
    "phantom-base": "tool/train_phantom_base.py",
    "demo-report": "tool/demo_report.py",
}

USAGE = """usage: medsoft COMMAND ...

MedSoft-Diffusion: lesions drawn into spine images. `medsoft COMMAND --help` shows the flags of one command.
A relative path that the working directory does not have, such as models/phantom.yaml, is looked up among the files
that come with the package.

commands:"""


def main() -> None:
    """Run the script that the first argument names, as ``python SCRIPT`` would; exit code 2 lists the names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        cli.run(cli.parser(None), lambda args: print(listing(), flush=True), [])
    if name not in SCRIPTS:
        close = difflib.get_close_matches(name, SCRIPTS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"{listing()}\n\nerror: medsoft has no command {name}{hint}", file=sys.stderr)
        raise SystemExit(cli.USAGE)
    script = str(SHIPPED / SCRIPTS[name])
    cli.program = f"medsoft {name}"
    sys.argv[:2] = [script]  # a training on several devices starts its other processes from this path
    runpy.run_path(script, run_name="__main__")


def listing() -> str:
    """Every command with the first line of its script's description."""
    lines = [USAGE]
    for name, script in SCRIPTS.items():
        described = ast.get_docstring(ast.parse((SHIPPED / script).read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<17} {described.partition(chr(10))[0]}")
    return "\n".join(lines)
