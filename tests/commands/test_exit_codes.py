"""Exit codes and messages of the checkpoint tools as a shell sees them: 1 for bad data, 2 for wrong usage."""

import subprocess
from pathlib import Path

import children
import pytest
from tiny import PHANTOM, ROOT

ENDS = ["--output_path", "out.ckpt", "--config", PHANTOM]
COMMANDS = {
    "model_convert": ["--input_path", "none.ckpt", *ENDS],
    "tool_merge_for_stage2": ["--stage1_path", "none.ckpt", "--input_path", "none.ckpt", *ENDS],
    "export_diffusers": ["--ckpt", "none.ckpt", "--output_dir", "out"],
    "inspect_checkpoint": ["none.ckpt"],
}


def run(name: str, folder: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return children.run(ROOT / "tool" / f"{name}.py", *flags, folder=folder)


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_file_is_one_line_and_exit_code_1(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, *COMMANDS[name])
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "none.ckpt: this checkpoint does not exist" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_argument_is_exit_code_2(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "the following arguments are required" in done.stderr
    assert not list(tmp_path.iterdir())
