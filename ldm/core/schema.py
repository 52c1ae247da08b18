"""Configurations as dataclasses: every field says what it decides, so one function knows what makes two runs the same.

``identity(config, scope)`` collects the fields that decide ``scope``; ``ldm.core.files.fingerprint`` of it is its hash.
"""

import copy
import dataclasses
from typing import Any


def setting(default: Any, decides: frozenset[str]) -> Any:
    """A configuration field: its default, and the scopes that change when its value does."""
    metadata = {"decides": decides}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def identity(config: Any, *scopes: str) -> dict[str, Any]:
    """The fields of ``config`` that decide one of ``scopes``, by name; ``config`` is a dataclass of ``setting`` fields.

    Nested dataclasses become nested dictionaries; those in which nothing decides the scopes are left out.
    """
    found = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            if section := identity(value, *scopes):
                found[item.name] = section
        elif item.metadata["decides"].intersection(scopes):
            found[item.name] = value
    return found
