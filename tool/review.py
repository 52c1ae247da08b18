"""Review drawn images in the browser: accept, reject with a reason, flag; and how far two reviewers agree.

    python tool/review.py results --reviewer ANN
    python tool/review.py results --agreement

RESULTS is a folder of dataset_infer.py or an annotation file of such results. Each verdict is a row of review.csv,
written at once: stop and go on whenever you like. `classifier.py --review FILE` and `tool/evaluate.py --review FILE`
leave rejected images out. Every reviewer gets an order of their own. The page needs the extra `edit`, --agreement
does not: it writes FILE_agreement.json and .html. Exit code 3: some samples could not be read.
"""

import argparse
from pathlib import Path

from ldm.core import cli
from ldm.workbench.options import ReviewOptions, require_extra


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    made.add_argument("results", metavar="RESULTS", type=Path, help="drawn images")
    cli.add_flags(made, ReviewOptions)
    return made


def main(args: argparse.Namespace) -> int:
    options = cli.options(ReviewOptions, args)
    options.validate()
    if options.agreement:
        from ldm.reviews.report import write_agreement

        clean = write_agreement(options.results, options.files)
        return cli.DONE if clean else cli.SOME_REJECTED
    require_extra()
    from ldm.workbench.review import review

    review(options, debug=args.debug)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main, at_once=True)
