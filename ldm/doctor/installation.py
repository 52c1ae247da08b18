"""Whether the installed packages fit each other and have no known faults. No torch but in ``check_torchvision``."""

import re
from collections.abc import Iterator
from importlib import metadata

from ldm.doctor.samples import Finding

FLOORS = {
    "torch": ("2.10", "a fault in safe loading"),
    "pytorch-lightning": ("2.6.6", "a security hole in loading checkpoints"),
}


def check_installation() -> Iterator[Finding]:
    """Packages that are missing, releases with known faults, torch and torchvision of different builds."""
    versions: dict[str, str] = {}
    for package in ("torch", "torchvision", "pytorch-lightning", "open_clip_torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("error", package, "is not installed: python -m pip install -r requirements.txt")
    yield from check_versions(versions)


def check_versions(versions: dict[str, str]) -> Iterator[Finding]:
    """Findings about the installed ``versions`` (package -> version, such as 2.14.1+cu130)."""
    for package, (floor, why) in FLOORS.items():
        if package in versions and _release(versions[package]) < _release(floor):
            yield Finding("error", package, f"{versions[package]}: releases before {floor} have {why}; update")
    ours, vision = versions.get("torch", ""), versions.get("torchvision", "")
    if len({text.partition("+")[2] for text in (ours, vision) if "+" in text}) > 1:
        yield Finding("error", "torchvision", f"built for {vision}, torch for {ours}; install both together")


def _release(version: str) -> list[int]:
    """The numbers at the beginning of a version: [2, 14, 1] of 2.14.1+cu130."""
    found = re.match(r"[\d.]*", version)
    return [int(number) for number in (found[0] if found else "").split(".") if number]


def check_torchvision() -> Iterator[Finding]:
    """Whether torchvision finds its operators in the installed torch. Loading both takes seconds and 600 MB."""
    try:
        import torchvision.ops  # here: where it is broken, that is a finding

        torchvision.ops.nms  # noqa: B018 (missing where the builds do not fit)
    except Exception as error:  # whatever a broken installation raises
        yield Finding("error", "torchvision", f"cannot be used with this torch ({error}); install both in one command")
