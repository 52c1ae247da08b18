"""Configurations as dataclasses: fields say their type, limits and what they decide; files fill them, checked.

A field's type is its check: ``Literal`` for choices, ``Annotated[int, within(1)]`` for limits. ``build`` makes a
dataclass from the values of files and overrides, and ``identity`` collects the fields that decide a scope, so that one
place knows what makes two runs the same. Stages, classifiers, plans and studies all come through here. No torch.
"""

import copy
import dataclasses
import difflib
import json
import math
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml

from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import read_text
from ldm.core.paths import shipped

T = TypeVar("T")
UNIONS = (Union, types.UnionType)


def setting(default: Any, decides: frozenset[str], before: Any = None) -> Any:
    """A configuration field: its default, and the scopes that change when its value does.

    ``before``: of a key that was added later, the value that all runs had before it existed, or a function that gives
    it for the section's other values. With this value the key is no part of the identity, so that those runs are still
    recognised.
    """
    metadata = {"decides": decides} | ({} if before is None else {"before": before})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def identity(config: Any, *scopes: str) -> dict[str, Any]:
    """The fields of ``config`` that decide one of ``scopes``, by name; ``config`` is a dataclass of ``setting`` fields.

    Nested dataclasses become nested dictionaries; those in which nothing decides the scopes are left out. The hash of
    a scope is ``ldm.core.files.fingerprint`` of it.
    """
    found = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            if section := identity(value, *scopes):
                found[item.name] = section
        elif item.metadata["decides"].intersection(scopes) and value not in _before(item, config):
            found[item.name] = value
    return found


def stored_overrides(kind: Any, stored: Mapping[str, Any]) -> list[str]:
    """The ``identity`` that an earlier run has stored, as overrides; ``kind`` is a dataclass of sections."""
    found = []
    for section in dataclasses.fields(kind):
        values, about = stored.get(section.name), section.type
        if not isinstance(values, dict) or not _is_section(about):
            continue
        for item in dataclasses.fields(cast(Any, about)):
            given = [values[item.name]] if item.name in values else _before(item, types.SimpleNamespace(**values))
            found += [f"{section.name}.{item.name}={json.dumps(value)}" for value in given]
    return found


def restore_before(section: Any, given: Mapping[str, Any]) -> None:
    """Give those keys of ``section`` that ``given``, stored by an earlier run, lacks the value that all runs had then.

    Keys of old, which have no such value, stay as they are.
    """
    for item in dataclasses.fields(section):
        if item.name not in given:
            for value in _before(item, section):
                setattr(section, item.name, value)


def _before(item: dataclasses.Field, section: Any) -> list[Any]:
    """The value that all runs had before there was this key, in a list that is empty for the keys of old."""
    if "before" not in item.metadata:
        return []
    value = item.metadata["before"]
    return [value(section) if callable(value) else value]


@dataclass(frozen=True)
class Rule:
    """A limit, to stand in ``Annotated``: a test of the value, and what is expected in words."""

    holds: Callable[[Any], object]  # its truth counts
    expected: str


def within(low: float, high: float | None = None) -> Rule:
    """A number of at least ``low`` and, unless it is None, at most ``high``."""
    if high is None:
        return Rule(lambda value: value >= low, f"a number of at least {low}")
    return Rule(lambda value: low <= value <= high, f"a number from {low} to {high}")


Count = Annotated[int, within(1)]
Whole = Annotated[int, within(0)]
Amount = Annotated[float, within(0)]
Share = Annotated[float, within(0, 1)]
Seed = Annotated[int, Rule(lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")]
Text = Annotated[str, Rule(lambda value: bool(value.strip()), "text that is not blank")]


def is_command(text: str) -> bool:
    """Whether a text can be split into words as a shell would, into one at least."""
    try:
        return bool(shlex.split(text))
    except ValueError:  # a quote that is not closed
        return False


Command = Annotated[str, Rule(is_command, "words of a command, their quotes closed")]


@dataclass
class Values:
    """Plain values by key, and the file or override that each key (with dots) comes from, for the messages."""

    source: str
    content: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)  # all that were read, those of `base:` too

    def add(self, content: dict[str, Any], source: str, deep: bool = True) -> None:
        """Lay ``content`` over what is there; ``deep``: sections are joined key by key, not replaced."""
        self.content = self._joined(self.content, content, source, "", deep)

    def _joined(self, below: Any, above: Any, source: str, key: str, deep: bool) -> Any:
        if not isinstance(below, dict) or not isinstance(above, dict):
            self.sources = {name: each for name, each in self.sources.items() if not name.startswith(f"{key}.")}
            self.sources[key] = source
            return above
        inside = {name: f"{key}.{name}" if key else str(name) for name in above}
        lower = below if deep or not key else {}
        return {**lower, **{n: self._joined(lower.get(n), v, source, inside[n], deep) for n, v in above.items()}}

    def error(self, key: str, expected: str, found: Any) -> UsageError:
        """What to raise for a value that is not as expected."""
        return UsageError(f"{self.where(key)}{key}{': ' if key else ''}expected {expected}, found {_shown(found)}")

    def where(self, key: str) -> str:
        """The file or override that gave ``key``, as the beginning of a message."""
        while key and key not in self.sources:
            key = key.rpartition(".")[0]
        return f"{self.sources.get(key, self.source)}: "


def read_yaml(path: Path, what: str, hint: str = "", deep: bool = True, above: tuple[Path, ...] = ()) -> Values:
    """The keys of a YAML file over those of its ``base:`` files; ``above``: the files that are based on it.

    Raises UsageError for a missing file (``hint`` says where others lie), a syntax error, a key that stands twice, a
    file without keys, or a loop of bases.
    """
    path = shipped(path)
    if not path.exists():
        raise UsageError(f"{path}: this {what} does not exist{hint}")
    try:
        content = yaml.load(read_text(path, what), _UniqueKeys)
    except (yaml.YAMLError, MedSoftError) as error:
        raise UsageError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys with values, found {_shown(content)}")
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: base: expected the name of another YAML file, found {_shown(base)}")
    above = (*above, path.resolve())
    if base and (path.parent / base).resolve() in above:
        raise UsageError(f"{path}: its `base:` leads back to itself")
    found = read_yaml(path.parent / base, what, hint, deep, above) if base else Values("")
    found.source = str(path)
    found.files.append(path)
    found.add(content, str(path), deep)
    return found


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def add_overrides(
    values: Values,
    kind: type,
    texts: Sequence[str],
    flag: str,
    example: str,
    spelled: Mapping[str, str] | None = None,
) -> None:
    """Lay texts such as ``training.batch_size=4`` over ``values``, from which a ``kind`` will be built.

    What follows the ``=`` is read as YAML; where text is wanted, a number or such is taken as it was written.
    ``spelled``: what to call some of them in messages, else ``flag`` and the text.
    """
    for text in texts:
        name, equals, given = text.partition("=")
        if not equals or text.startswith("-"):
            raise UsageError(f"{flag} {text}: not understood; an override looks like {example}")
        wanted: Any = kind
        for part in name.split("."):
            fields = {item.name: item.type for item in dataclasses.fields(wanted)} if _is_section(wanted) else {}
            wanted = fields.get(part)
        try:
            value = yaml.load(given, _UniqueKeys)
        except yaml.YAMLError:
            value = given
        is_text = any(each is str or isinstance(each, str) for each in (wanted, *get_args(wanted)))
        if is_text and not isinstance(value, (str, list, types.NoneType)):
            value = given
        for part in reversed(name.split(".")):
            value = {part: value}
        values.add(value, (spelled or {}).get(text) or f"{flag} {text}")


def build(kind: type[T], values: Values) -> T:
    """A ``kind`` (a dataclass) from plain values; UsageError names source, key, what was expected and found."""
    return _convert(kind, values.content, "", values)


def _convert(kind: Any, value: Any, key: str, values: Values) -> Any:
    """``value`` as the type ``kind`` wants it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        plain, *rules = inner
        value = _convert(plain, value, key, values)
        for rule in rules:
            if not rule.holds(value):
                raise values.error(key, rule.expected, value)
        return value
    if origin in UNIONS:
        return _convert_union(kind, value, key, values)
    if _is_section(kind) and isinstance(value, dict):
        return _section(kind, value, key, values)
    if origin is dict and isinstance(value, dict):
        names = {name: _convert(inner[0], name, key, values) for name in value}
        return {names[name]: _convert(inner[1], each, f"{key}.{name}", values) for name, each in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        places = [f"{key}.{n}" if isinstance(each, dict) else key for n, each in enumerate(value, 1)]
        return origin(_convert(inner[0], each, place, values) for each, place in zip(value, places, strict=True))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            value = float(value)  # YAML takes 1e-4, without a point, for text
    if kind is float and type(value) is float and math.isfinite(value):
        return value
    if kind is str and isinstance(value, str) and "${" in value:
        raise values.error(key, "plain text (interpolations, ${...}, are not supported)", value)
    if kind in (int, bool, str, types.NoneType) and type(value) is kind:  # exactly: true is not a number here
        return value
    if origin is Literal and value in inner and isinstance(value, type(inner[0])):
        return value
    raise values.error(key, _described(kind), value)


def _convert_union(kind: Any, value: Any, key: str, values: Values) -> Any:
    """By the only alternative there is besides null, or of the value's shape; else by the first that takes it."""
    kinds = [each for each in get_args(kind) if each is not types.NoneType]
    if value is None and len(kinds) < len(get_args(kind)):
        return None
    plain = [get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds]
    alike = [each for each, bare in zip(kinds, plain, strict=True) if get_origin(bare) is type(value)]
    if len(kinds) == 1 or len(alike) == 1:
        return _convert((alike or kinds)[0], value, key, values)
    for each in kinds:
        with suppress(UsageError):
            return _convert(each, value, key, values)
    raise values.error(key, _described(kind), value)


def _section(kind: Any, given: dict[str, Any], key: str, values: Values) -> Any:
    """The dataclass ``kind`` from the values of one section; its field ``from_`` is the key ``from``, a Python word."""
    known = {item.name.rstrip("_"): item for item in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name in given:
        if name not in known:
            lower = {each.lower(): each for each in known}
            near = difflib.get_close_matches(str(name).lower(), lower, n=1)
            hint = f"did you mean {prefix}{lower[near[0]]}?" if near else f"known here: {', '.join(known)}"
            raise UsageError(f"{values.where(f'{prefix}{name}')}unknown key {prefix}{name}; {hint}")
    for name, item in known.items():
        if name not in given and item.default is item.default_factory is dataclasses.MISSING:
            raise UsageError(f"{values.where(key)}{prefix}{name}: expected {_described(item.type)}, found nothing")
    return kind(
        **{known[name].name: _convert(known[name].type, each, prefix + name, values) for name, each in given.items()}
    )


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _described(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[1].expected
    if origin in UNIONS:
        return " or ".join(_described(part) for part in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin in (list, tuple):
        return f"a list of {_described(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names.get(kind, "keys with values")


def _shown(value: Any) -> str:
    """A value in a message, as JSON writes it."""
    return json.dumps(value, ensure_ascii=False, default=str)
