"""Running plans: each step in a process of its own, its outcome kept, signals passed on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.paths import ROOT, shipped
from ldm.workflow.plans import DONE_CODES, Plan, PlanRecord, PlanStep, load_plan

# What every step's environment gets, unless it is set already. glibc gives blocks of this size back to the kernel after
# every operation and fetches them again for the next one: keeping them makes training on a CPU measurably faster.
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def run_plan(path: Path, start: str | None, only: Sequence[str], overwrite: bool, list_only: bool) -> int:
    """Run what is to do of the plan; the exit code of the step that failed, 3 if a step rejected inputs, else 0.

    Of steps that are done, ``start`` and all after it, or those in ``only``, run again; ``overwrite`` lets a step
    replace what other settings have left. With ``list_only`` the steps are shown and nothing runs.
    Raises UsageError for a faulty plan, a step that it does not have, or ``start`` together with ``only``.
    """
    hang_up_with_terminal()
    plan = load_plan(path)
    if start and only:
        raise UsageError("--from and --only exclude each other; give one of them")
    names = [step.name for step in plan.steps]
    for name in [*([start] if start else []), *only]:
        if name not in names:
            raise UsageError(f"{name}: no such step in plan {plan.name}; it has {', '.join(names)}")
    forced = names[names.index(start) :] if start else only
    if list_only:
        show_steps(PlanRecord(plan))
        return cli.DONE
    again = shlex.join(["python", "tool/run_stages.py", str(path)])
    with PlanRecord(plan).folder.lock():
        record = PlanRecord(plan)
        return run_steps(record, forced or names, again, forced, overwrite) or _summarise(record)


def show_steps(record: PlanRecord, older: Collection[PlanStep] = ()) -> list[PlanStep]:
    """Print every step of a plan and whether it is done; those that a run would run are returned.

    A step that runs makes all after it run, and so does one of ``older``: what of them was done is outdated.
    """
    again: list[PlanStep] = []
    for number, step in enumerate(record.plan.steps, 1):
        done = record.done(step)
        if again or step in older or not done:
            again.append(step)
        state = "to do" if not done else "outdated" if step in again else "done"
        print(f"{record.plan.name} {count(record.plan, number)} {step.name} ({state}): {step.run}")
    return again


def _summarise(record: PlanRecord) -> int:
    """Print a table of all steps; 3 if any of them rejected inputs."""
    print(f"\n{'step':<20} {'seconds':>9}  result")
    total, rejected = 0.0, []
    for step in record.plan.steps:
        seconds, result = record.known(step).get("seconds", 0.0), "done" if record.done(step) else "to do"
        total += seconds
        if record.done(step) and record.known(step)["exit_code"] == cli.SOME_REJECTED:
            result = "done, some inputs rejected"
            rejected.append(step.name)
        print(f"{step.name:<20} {seconds:>9.1f}  {result}")
    print(f"{'total':<20} {total:>9.1f}  {total / 60:.1f} minutes", flush=True)
    if rejected:
        print(f"some inputs were rejected in: {', '.join(rejected)} (listed beside their outputs)", flush=True)
    return cli.SOME_REJECTED if rejected else cli.DONE


def hang_up_with_terminal() -> None:
    """End as after SIGTERM when the terminal closes: the running step must not be left alone."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # Windows has none
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))


def run_steps(
    record: PlanRecord, chosen: Collection[str], again: str, forced: Collection[str] = (), overwrite: bool = False
) -> int:
    """Run the chosen steps of a plan that are not done, and the forced ones; 0, or the code of the one that failed.

    ``again`` is the command that goes on, for the message of a failure; ``overwrite`` is passed to the steps.
    """
    plan = record.plan
    for number, step in enumerate(plan.steps, 1):
        if step.name not in chosen:
            continue
        if step.name not in forced and record.done(step):
            print(f"{count(plan, number)} {step.name} ... already done", flush=True)
            continue
        code = run_step(record, step, number, overwrite)
        if code not in DONE_CODES:
            replace = "; with --overwrite it replaces the work of other settings"
            print(
                f"error: step {step.name} failed ({_outcome(code)}): {step.run}\n"
                f"The steps before it are kept; put right what it says above and go on with: {again}"
                f"{replace if code == cli.USAGE and not overwrite else ''}",
                file=sys.stderr,
            )
            return code
    return cli.DONE


def run_step(record: PlanRecord, step: PlanStep, number: int, overwrite: bool) -> int:
    """Run one step, keep its outcome and return its exit code (128 + n when signal n ended it).

    With ``overwrite`` a step that refuses is run again with ``--overwrite``: the step itself knows what is its own work
    and what is that of other settings. Raises MedSoftError if the program cannot be started, or if it succeeded without
    making what it should.
    """
    words = shlex.split(step.run)
    if words[0] == "python":
        words[0] = sys.executable
        words[1:2] = [word if (ROOT / word).exists() else str(shipped(word)) for word in words[1:2]]
    print(f"{count(record.plan, number)} {step.name}: {step.run}", flush=True)
    record.begin(step)
    start, code = time.perf_counter(), cli.FAILED
    try:
        code = _run_child(words, step)
        if overwrite and code == cli.USAGE:
            print(f"{count(record.plan, number)} {step.name}: once more, with --overwrite", flush=True)
            code = _run_child([*words, "--overwrite"], step)
    except (KeyboardInterrupt, cli.Terminated) as stop:
        code = cli.TERMINATED if isinstance(stop, cli.Terminated) else cli.INTERRUPTED
        raise
    finally:
        seconds = time.perf_counter() - start
        record.add(step, seconds, code)
    if code in DONE_CODES:
        if step.missing:
            raise MedSoftError(f"step {step.name}: ended with {code}, but did not make {', '.join(step.missing)}")
        rejected = " (some inputs were rejected)" if code == cli.SOME_REJECTED else ""
        print(f"{count(record.plan, number)} {step.name} ... done in {seconds:.0f} s{rejected}", flush=True)
    return code


def _run_child(words: list[str], step: PlanStep) -> int:
    # A process group of its own: Ctrl-C reaches the child once, from here, and its own children with it.
    try:
        child = subprocess.Popen(words, cwd=ROOT, env={**CHILD_ENVIRONMENT, **os.environ}, process_group=0)
    except OSError as error:
        raise MedSoftError(f"step {step.name}: {words[0]} cannot be started ({error.strerror or error})") from error
    try:
        code = child.wait()
    except (KeyboardInterrupt, cli.Terminated) as stop:
        stop_all([child], stop)
        raise
    return code if code >= 0 else 128 - code


def stop_all(processes: Sequence[subprocess.Popen], stop: BaseException) -> None:
    """Pass on what ends this process and wait, so that each can finish what it must; a second one kills them."""
    try:
        _send_all(processes, signal.SIGTERM if isinstance(stop, cli.Terminated) else signal.SIGINT)
    except (KeyboardInterrupt, cli.Terminated):
        _send_all(processes, signal.SIGKILL)


def _send_all(processes: Sequence[subprocess.Popen], signum: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it ended by itself in the meantime
            os.killpg(process.pid, signum)
    for process in processes:
        process.wait()


def count(plan: Plan, number: int) -> str:
    """The number of a step among all, for what is printed."""
    return f"[{number}/{len(plan.steps)}]"


def _outcome(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    name = signal.strsignal(code - 128) or f"signal {code - 128}"
    return f"exit code {code}: {name}" + ("; often too little memory" if code == 128 + signal.SIGKILL else "")
