"""Run the steps of a plan in order, each one only if it is not done yet.

    python tool/run_stages.py configs/demo.yaml

A plan is a YAML file:

    name: demo
    output_dir: demo_output        # stages.json, the record of what is done, lies here
    steps:
      - name: phantoms
        run: python tool/make_phantoms.py --output_dir demo_output/phantoms --seed 7
        makes: [demo_output/phantoms/phantoms.json]

Every step runs from the repository root, and every path in a plan is relative to it, wherever the runner is called
from. Of an installed package without a checkout, that root is the working directory. Commands are split into words as
a shell would, but no shell runs them; ``python`` is the interpreter that runs this script.

A step is done when it ended with 0 or 3, everything it makes exists, no step before it has run since, and neither its
command nor a file of models/ or configs/ that the command names (a YAML with its ``base:`` files) has changed. So a
step that runs makes all after it run: they find out themselves whether anything is left to do. A step that refuses
(exit code 2) since its folder holds the work of other settings stops the plan; with --overwrite it is run once more
with its own --overwrite. The seconds of a step
are all that was spent on it with these settings; an "already complete" adds its moment to the real time.
"""

import argparse
import shlex
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import UsageError
from ldm.core.files import read_text
from ldm.core.paths import shipped
from ldm.workflow.plans import (
    Plan,
    PlanRecord,
    check_keys,
    count,
    hang_up_with_terminal,
    load_record,
    parse_steps,
    run_steps,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(
        "Run the steps of a plan in order from the repository root, skipping what is done; stop at the first failure. "
        "Started again, it goes on. A step that runs makes all after it run."
    )
    made.add_argument("plan", metavar="PLAN.yaml", type=Path, help="the plan, for instance configs/demo.yaml")
    made.add_argument("--from", dest="start", metavar="STEP", help="run this step and all after it, done or not")
    made.add_argument("--only", nargs="+", metavar="STEP", help="run these steps only, done or not")
    made.add_argument(
        "--overwrite", action="store_true", help="let a step replace what other settings have left, where it refuses to"
    )
    made.add_argument("--list", action="store_true", help="show the steps and whether they are done; run nothing")
    return made


def main(args: argparse.Namespace) -> int:
    """Run what is to do; the exit code of the step that failed, 3 if a step rejected inputs, else 0."""
    hang_up_with_terminal()
    plan = load_plan(args.plan)
    if args.start and args.only:
        raise UsageError("--from and --only exclude each other; give one of them")
    forced = _forced(plan, args.start, args.only)
    record = load_record(plan)
    if args.list:
        for number, step in enumerate(plan.steps, 1):
            print(f"{count(plan, number)} {step.name} ({'done' if record.done(step) else 'to do'}): {step.run}")
        return cli.DONE
    chosen = args.only or [step.name for step in plan.steps]
    if args.start:
        chosen = sorted(forced, key=chosen.index)
    again = shlex.join(["python", "tool/run_stages.py", str(args.plan)])
    return run_steps(record, chosen, again, forced, args.overwrite) or _summarise(record)


def _forced(plan: Plan, start: str | None, only: list[str] | None) -> set[str]:
    """Names of the steps that run although they are done; UsageError for a name that is not in the plan."""
    names = [step.name for step in plan.steps]
    for name in [*([start] if start else []), *(only or [])]:
        if name not in names:
            raise UsageError(f"{name}: no such step in plan {plan.name}; it has {', '.join(names)}")
    return set(names[names.index(start) :]) if start else set(only or [])


def load_plan(path: Path) -> Plan:
    """Read a plan, looked up in the working directory, then among the shipped ones; UsageError for any fault in it."""
    import yaml

    found = shipped(path)
    try:
        values = yaml.safe_load(read_text(found, "plan"))
    except yaml.YAMLError as error:
        raise UsageError(f"{found}: not readable as YAML ({' '.join(str(error).split())})") from error
    check_keys(values, {"name": str, "output_dir": str, "steps": list}, f"{found}: ")
    return Plan(values["name"], values["output_dir"], parse_steps(values["steps"], f"{found}: "))


def _summarise(record: PlanRecord) -> int:
    """Print a table of all steps; 3 if any of them rejected inputs."""
    print(f"\n{'step':<20} {'seconds':>9}  result")
    total, rejected = 0.0, []
    for step in record.plan.steps:
        entry = record.known(step)
        total += entry.get("seconds", 0.0)
        result = "done" if record.done(step) else "to do"
        if record.done(step) and entry["exit_code"] == cli.SOME_REJECTED:
            result = "done, some inputs rejected"
            rejected.append(step.name)
        print(f"{step.name:<20} {entry.get('seconds', 0.0):>9.1f}  {result}")
    print(f"{'total':<20} {total:>9.1f}  {total / 60:.1f} minutes", flush=True)
    if rejected:
        print(f"some inputs were rejected in: {', '.join(rejected)} (listed beside their outputs)", flush=True)
    return cli.SOME_REJECTED if rejected else cli.DONE


if __name__ == "__main__":
    cli.run(build_parser(), main)
