"""Plans: commands run in order, each one only if it is not done yet. What a step and a plan are: tool/run_stages.py."""

import os
import shlex
import subprocess
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ldm.core import cli
from ldm.core.errors import MedSoftError
from ldm.core.files import fingerprint, sha256_file
from ldm.core.paths import INSTALLED, ROOT, SHIPPED
from ldm.core.run_folder import RunFolder
from ldm.core.schema import Command, Text, Values, build, read_yaml
from ldm.core.threads import processor

DONE_CODES = (cli.DONE, cli.SOME_REJECTED)


@dataclass(frozen=True)
class PlanStep:
    """One command of a plan and the files or folders (relative to the repository root) it leaves."""

    name: Text
    run: Command
    makes: tuple[Text, ...] = ()

    @cached_property  # what it was before the step ran, even if a file is edited meanwhile
    def fingerprint(self) -> str:
        """Changes with the command and with the repository's files that it names, and with nothing else."""
        return fingerprint(self.settings)

    @cached_property
    def settings(self) -> tuple[list[str], dict[str, str]]:
        """The words of the command, and the SHA-256 of the repository's files that it names."""
        words = shlex.split(self.run)
        return words, _named_files(words)

    @property
    def missing(self) -> list[str]:
        """What of ``makes`` does not exist."""
        return [path for path in self.makes if not (ROOT / path).exists()]


def _named_files(words: list[str]) -> dict[str, str]:
    """SHA-256 of the files of models/ and configs/ that a command names, and of those a YAML is based on.

    A file is named by its path in the tree that holds it: the plan's, or else the one that came with the package.
    """
    roots = list(dict.fromkeys((ROOT, SHIPPED)))
    folders = {os.path.realpath(root / name): name for root in roots for name in ("models", "configs")}
    values = [word.rpartition("=")[2] for word in words]
    starts = [start for root in roots for start in (root, root / "configs" / "classifier")]
    waiting = [os.path.realpath(start / value) for start in starts for value in values]
    found: dict[str, str] = {}
    for path in waiting:
        folder = next((folder for folder in folders if path.startswith(folder + os.sep)), None)
        if folder is None or not os.path.isfile(path):
            continue
        name = os.path.join(folders[folder], os.path.relpath(path, folder))
        if name in found:
            continue
        found[name] = sha256_file(path)
        if path.endswith((".yaml", ".yml")):
            with suppress(MedSoftError):  # a faulty one is for its reader to refuse
                waiting += _base_of(path, found[name])
    return found


@lru_cache
def _base_of(path: str, digest: str) -> list[str]:
    """The file that this YAML, of this SHA-256, is based on, if any: the steps of a study name the same few."""
    return [os.path.realpath(file) for file in read_yaml(Path(path), "configuration").files[-2:-1]]


def machine() -> str:
    """The processor and, unless CUDA_VISIBLE_DEVICES hides them, the graphics cards: sums differ between kinds."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = {line.partition(":")[2].strip() for card in cards for line in card.read_text().splitlines()[:1]}
    return ", ".join([processor(), *(sorted(models) if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else ())])


def commit() -> str:
    """The commit the code is run from, and whether files differ from it; "unknown" without git or a checkout."""
    if INSTALLED:  # whose repository the working directory may lie in, nobody knows
        return "unknown"
    calls = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        head, changed = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True).stdout for c in calls)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with local changes" if changed.strip() else "")


@dataclass(frozen=True)
class Plan:
    """Steps in order, and the folder (relative to the repository root) of their record."""

    name: Text
    output_dir: Text
    steps: tuple[PlanStep, ...]


def growing_folder(path: Path, record: str, what: str, lock_file: Path) -> RunFolder:
    """A folder that plans or a study fill step by step, beside files of others; nothing but deleting it begins anew."""
    kind: dict[str, Any] = {"shared": True, "keys": None, "flag": "output_dir", "overwrite_flag": ""}
    return RunFolder(path, record, what=what, lock_file=lock_file, **kind)


class PlanRecord:
    """What ``output_dir/stages.json`` knows about the plan's steps, by name.

    MedSoftError if it cannot be understood, UsageError if it is another plan's.
    """

    def __init__(self, plan: Plan) -> None:
        path = ROOT / plan.output_dir
        self.plan, self.folder = plan, growing_folder(path, "stages.json", "steps", path / "stages.lock")
        self.entries: dict[str, dict[str, Any]] = {}
        stored = self.folder.open({"plan": plan.name})
        try:
            for entry in [] if stored is None else stored["steps"]:
                self.entries[entry["name"]] = entry
        except (TypeError, KeyError) as error:
            message = f"{self.folder.record}: not a record of finished steps; delete it to run all steps again"
            raise MedSoftError(message) from error

    def known(self, step: PlanStep) -> dict[str, Any]:
        """The step's entry if its command and settings are still the same, else an empty one."""
        entry = self.entries.get(step.name, {})
        return entry if entry.get("fingerprint") == step.fingerprint else {}

    def done(self, step: PlanStep) -> bool:
        """Whether the step ended well with its present command and settings, and its outputs are there."""
        return self.known(step).get("exit_code") in DONE_CODES and not step.missing

    def outdated(self, step: PlanStep, before: Collection[PlanStep]) -> bool:
        """Whether what the step left is not the plan's: made with other settings, or older than one of ``before``."""
        if step.name not in self.entries:
            return False
        known = {each: self.entries[each.name] for each in (*before, step) if each.name in self.entries}
        if any(entry["fingerprint"] != each.fingerprint for each, entry in known.items()):
            return True
        return any(entry["finished"] > known[step]["finished"] for entry in known.values())

    def begin(self, step: PlanStep) -> None:
        """Before a step runs: it and all after it are no longer done, whatever happens to this process."""
        for later in self.plan.steps[self.plan.steps.index(step) :]:
            if later.name in self.entries:
                self.entries[later.name]["exit_code"] = None
        self.folder.claim(steps=self._known_entries())

    def add(self, step: PlanStep, seconds: float, exit_code: int) -> None:
        """Keep the outcome of a run; its time adds to what was already spent on this step with these settings."""
        self.entries[step.name] = {
            "name": step.name,
            "command": step.run,
            "fingerprint": step.fingerprint,
            "seconds": round(self.known(step).get("seconds", 0.0) + seconds, 2),
            "exit_code": exit_code,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "commit": commit(),
        }
        self.folder.write_record(steps=self._known_entries())

    def _known_entries(self) -> list[dict[str, Any]]:
        return [self.entries[step.name] for step in self.plan.steps if step.name in self.entries]


def load_plan(path: Path) -> Plan:
    """Read a plan, looked up in the working directory, then among the shipped ones; UsageError for any error in it."""
    values = read_yaml(path, "plan")
    plan = build(Plan, values)
    return replace(plan, steps=checked_steps(plan.steps, values))


def checked_steps(steps: tuple[PlanStep, ...], values: Values) -> tuple[PlanStep, ...]:
    """The steps with tidy commands; UsageError if there is none, or two have the same name."""
    names = [step.name for step in steps]
    if not names or len(set(names)) < len(names):
        raise values.error("steps", "at least one step, each with a name of its own", names)
    return tuple(replace(step, run=step.run.strip()) for step in steps)
