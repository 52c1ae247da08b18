"""Score synthetic images by BiomedCLIP and keep the best ones, without a look at validation or test images.

    python dataset_infer.py ... --variants 4 --output_dir results
    python tool/choose_results.py results --best 1 --config ./models/mldm_v15.yaml --output_dir chosen

The margin of an image is the cosine of the model's crop around its lesion with the prompts of its own lesion type,
minus the highest one with another type or with `healthy`. Into OUTPUT_DIR: scores.csv, kept.json (an annotation file:
give it to classifier.py in `synthetic`), rejects.json. Exit code 3: there are rejects.
"""

import argparse
from pathlib import Path

from ldm.config import load_config
from ldm.core import cli
from ldm.reviews.options import REVIEW_HELP


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("results", metavar="RESULTS", type=Path, help="results of dataset_infer.py or tool/copy_paste.py")
    made.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    made.add_argument("--best", type=cli.COUNT, metavar="N", help="keep the N best variants of each parent image")
    margin = cli.Number(float, -2, 2)
    made.add_argument("--least", type=margin, metavar="MARGIN", help="keep those of at least this margin, such as 0")
    made.add_argument("--review", action="append", default=[], type=Path, metavar="FILE", help=REVIEW_HELP)
    default = Path("models/mldm_v15.yaml")
    made.add_argument("--config", type=Path, default=default, help="model YAML: how crops are made, which BiomedCLIP")
    made.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    made.add_argument("--overwrite", action="store_true", help="replace the choice from other results or limits")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return made


def main(args: argparse.Namespace) -> int:
    given = [f"biomedclip.path={args.biomedclip}"] if args.biomedclip else []
    config = load_config(args.config, [*given, *args.overrides])
    from ldm.evaluation.choice import choose_results

    how = {name: getattr(args, name) for name in ("best", "least", "review", "overwrite")}
    clean = choose_results(args.results, args.output_dir, config.data, config.biomedclip, **how)
    return cli.DONE if clean else cli.SOME_REJECTED


if __name__ == "__main__":
    cli.run(build_parser(), main)
