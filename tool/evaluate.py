"""Compare synthetic lesions with real ones, and look for copies of training images.

    python tool/evaluate.py dataset results --config ./models/mldm_v15.yaml --output_dir evaluation

REAL and SYNTH are dataset folders or annotation files; their diseased samples are compared, each as the model's crop
around its lesion. Into OUTPUT_DIR: evaluation.json, report.html, closest_pairs.png, lesions.png, neighbours.csv (the
nearest training lesion of every synthetic one), copies.json, rejects.json. Exit code 3: there are copies or rejects.
"""

import argparse
from pathlib import Path

from ldm.config import load_config
from ldm.core import cli
from ldm.reviews.options import REVIEW_HELP


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("real", metavar="REAL", type=Path, help="real samples, best ones the generator has not seen")
    made.add_argument("synthetic", metavar="SYNTH", type=Path, help="results of dataset_infer.py")
    made.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    default = Path("models/mldm_v15.yaml")
    made.add_argument("--config", type=Path, default=default, help="model YAML: how crops are made, which BiomedCLIP")
    made.add_argument("--train_json", type=Path, help="what the generator learned from, for copies (default: REAL)")
    text = "predictions_NAME.csv of a classifier (task type) about SYNTH: how much of the asked type was drawn, in bits"
    made.add_argument("--predictions", type=Path, help=text)
    made.add_argument("--review", action="append", default=[], type=Path, metavar="FILE", help=REVIEW_HELP)
    made.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    made.add_argument(
        "--quarantine", action="store_true", help="move copies from SYNTH into SYNTH_quarantine beside it"
    )
    made.add_argument("--overwrite", action="store_true", help="replace the evaluation of other samples")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return made


def main(args: argparse.Namespace) -> int:
    given = [f"biomedclip.path={args.biomedclip}"] if args.biomedclip else []
    config = load_config(args.config, [*given, *args.overrides])
    from ldm.evaluation.run import Sources, evaluate

    sources = Sources(args.real, args.synthetic, args.train_json, args.predictions, args.review)
    clean = evaluate(sources, args.output_dir, config.data, config.biomedclip, args.quarantine, args.overwrite)
    return cli.DONE if clean else cli.SOME_REJECTED


if __name__ == "__main__":
    cli.run(build_parser(), main)
