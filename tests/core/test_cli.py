"""ldm/core/cli.py: what every command says, and how."""

import subprocess
import sys

from tiny import ROOT

TALK = """
import logging
from ldm.core import cli
def main(args):
    import lightning_fabric
    for name in ("lightning_fabric.utilities", "open_clip", "ldm.training.run", "lightning"):
        logging.getLogger(name).info("%s informs", name)
        logging.getLogger(name).warning("%s warns", name)
cli.run(cli.parser(None), main, [])
"""


def test_packages_that_talk_of_themselves_are_quiet_until_they_warn() -> None:
    done = subprocess.run([sys.executable, "-c", TALK], capture_output=True, text=True, cwd=ROOT, check=True)
    said = done.stdout.splitlines()
    assert "ldm.training.run informs" in said
    assert [line for line in said if line.startswith(("lightning_fabric", "open_clip"))] == [
        "lightning_fabric.utilities warns",
        "open_clip warns",
    ]


def test_help_shows_defaults_and_keeps_the_lines_of_the_description() -> None:
    done = subprocess.run(
        [sys.executable, "tool/make_soft_masks.py", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    said = done.stdout
    assert "\n    python tool/make_soft_masks.py --data dataset" in said
    assert "its width (default: 0.25)" in " ".join(said.split())
    assert "(default: None)" not in said
    assert "(default: False)" not in said
