"""Write a recipe for your own data: a plan, classifier configurations and a study that fit a dataset folder.

    python tool/init.py data/hospital --output_dir recipes/hospital --ckpt sd-v1-5-inpainting.ckpt

    python tool/init.py data/hospital --output_dir recipes/trial --model models/phantom.yaml \\
        --ckpt models/phantom_base/sd-phantom-inpainting.ckpt      # small networks, no download: a trial

The folder is one of samples, as ver_openImagesDatasets.py takes it. Into --output_dir, which must be new: README.md
(what to run), plan.yaml (from the samples to the classifiers), study.yaml (does it help, and more than pasting?) and
classifier_*.json. Numbers such as images to draw and steps follow from the data. Nothing is run, nothing replaced.
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("data", metavar="DIR", type=Path, help="dataset folder: sample folders at any depth")
    made.add_argument("--output_dir", type=Path, required=True, help="new folder for the recipe")
    text = "samples of other patients to test on, never trained on; without it a fifth of DIR's patients"
    made.add_argument("--test", metavar="DIR", type=Path, help=text)
    text = "model YAML; those of its stages lie beside it"
    made.add_argument("--model", type=Path, default=Path("models/mldm_v15.yaml"), help=text)
    text = "the inpainting checkpoint to begin with"
    made.add_argument("--ckpt", type=Path, default=Path("sd-v1-5-inpainting.ckpt"), help=text)
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.workflow.recipe import write_recipe

    return write_recipe(args.data, args.output_dir, args.model, args.ckpt, args.test)


if __name__ == "__main__":
    cli.run(build_parser(), main)
