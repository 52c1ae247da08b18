"""Draw lesions for other programs: a small REST endpoint, for this machine alone unless --host says otherwise.

    python tool/serve.py --ckpt stage2_2/last.ckpt
    curl -F image=@spine.png -F mask=@mask.png -F "prompt=osteolytic lesion" -o drawn.png http://127.0.0.1:8000/draw

/openapi.json describes it; GET /info/ and POST /infer/MODEL are as MONAI Label has them. Needs the extra `edit`.
"""

import argparse
import logging

from ldm.core import cli
from ldm.workbench.options import ServeOptions, require_extra


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    cli.add_flags(made, ServeOptions)
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return made


def main(args: argparse.Namespace) -> None:
    options = cli.options(ServeOptions, args)
    options.validate()
    require_extra()
    logging.getLogger(__name__).info("loading; the address follows in some seconds")
    from ldm.workbench.serving import serve_lesions

    serve_lesions(options, debug=args.debug)


if __name__ == "__main__":
    cli.run(build_parser(), main, at_once=True)
