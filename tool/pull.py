"""Get a checkpoint that tool/push.py has shared, from a folder or the Hugging Face hub, and verify its SHA-256 sums.

python tool/pull.py --repo OWNER/NAME --output_dir pulled
python tool/pull.py --from_folder shared --output_dir pulled
"""

import argparse
from pathlib import Path

from ldm.core import cli


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__)
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--from_folder", type=Path, help="folder that tool/push.py wrote")
    source.add_argument("--repo", metavar="OWNER/NAME", help="repository of the hub")
    made.add_argument("--revision", help="commit, branch or tag of the repository (default: its newest)")
    made.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    made.add_argument("--overwrite", action="store_true", help="replace a folder that pull wrote")
    return made


def main(args: argparse.Namespace) -> int:
    from ldm.sharing.transfer import pull

    pull(args.from_folder or args.repo, args.output_dir, args.revision, args.overwrite)
    return cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
