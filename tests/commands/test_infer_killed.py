"""dataset_infer.py killed with SIGKILL and started again: in the end the files of a run that nobody disturbed."""

import json
import random
import signal
import time
from pathlib import Path

import children
import pytest
from test_infer_scale import command, files_of
from tiny import TRAIN, infer, whole

PATIENCE = 300  # seconds for a start and a few pictures, on a machine that does other things too


def start(final: Path, world: Path, folder: Path, variants: int) -> children.Child:
    given = ["--train_json", world / TRAIN, "--variants", variants, "--exact"]
    folder.mkdir(exist_ok=True)
    return children.start(*command(final, Path("out"), *given), folder=folder)


def complete(folder: Path) -> int:
    return sum((path / "meta.json").exists() for path in folder.glob("[!.]*__v*"))


def killed_run(final: Path, world: Path, folder: Path, variants: int, kills: int, seed: int = 0) -> None:
    """Run, kill at ``kills`` random moments of the drawing, start again each time; then let it finish."""
    rng = random.Random(seed)
    total = 5 * variants
    for _ in range(kills):
        before = complete(folder / "out")
        until = min(before + rng.randint(1, max(1, total // (kills + 1))), total - 1)
        run = start(final, world, folder, variants)
        deadline = time.monotonic() + PATIENCE
        while complete(folder / "out") < until and run.process.exitcode is None:
            if time.monotonic() > deadline:
                run.process.kill()
                pytest.fail(f"{complete(folder / 'out')} of {until} pictures after {PATIENCE} s")
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        run.process.kill()
        assert run.wait(60).returncode == -signal.SIGKILL
        for leftover in (folder / "out").glob("[!.]*__v*"):  # what is there under its own name is whole
            assert {file.name for file in leftover.iterdir()} >= {"image.png", "meta.json", "soft_mask.png"}
    assert start(final, world, folder, variants).wait(1200).returncode == 0


@pytest.mark.parametrize(("variants", "kills"), [(2, 1), pytest.param(40, 10, marks=pytest.mark.slow)])
def test_killed_and_restarted_gives_the_files_of_the_unbroken_run(
    final: Path, world: Path, tmp_path: Path, variants: int, kills: int
) -> None:
    killed_run(final, world, tmp_path / "killed", variants, kills)
    given = ["--train_json", world / TRAIN, "--variants", variants, "--exact"]
    assert infer(final, tmp_path / "unbroken", *given) == 0
    broken, unbroken = files_of(tmp_path / "killed" / "out"), files_of(tmp_path / "unbroken")
    assert len(unbroken) == 5 * 6 * variants
    whole(tmp_path / "killed" / "out")
    assert set(broken) == set(unbroken)
    for file, content in broken.items():
        if file.endswith("meta.json"):  # the words of the command are those of another call
            first, second = (json.loads(text) | {"command": None} for text in (content, unbroken[file]))
            assert first | {"overrides": None} == second | {"overrides": None}, file
        else:
            assert content == unbroken[file], file
