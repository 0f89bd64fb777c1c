"""What is wrong with a command line or a recipe, in one line: field, value and what is allowed.

jsonargparse says it in up to ten lines and in Python's types. Where its wording is not known here, it is joined to one
line as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from functools import cache

from jsonargparse import ArgumentParser

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_UNKNOWN = (
    re.compile(r"unrecognized arguments: --([\w.-]+)"),
    re.compile(r"[Oo]ption '([\w.-]+)' is not accepted"),
    re.compile(r"Group '([\w.-]+)' does not accept option '([\w.-]+)'"),
)


def one_line(parser: ArgumentParser, error: Exception, sections: dict[str, list[str]]) -> str:
    """The message of an error that parsing raised."""
    text = str(error)
    options = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    for pattern in _UNKNOWN:
        if found := pattern.search(text):
            return _unknown(".".join(found.groups()), list(options), sections)
    name = (re.search(r'Parser key "([\w.]+)"', text) or [None, None])[1]
    if name in sections:
        return not_a_section(name, sections)
    expected = getattr(options.get(name), "_typehint", None)
    if expected is None:
        return " ".join(text.split())
    value = text.rpartition("alue: ")[2].strip()  # "Given value: …" or "Got value: …"
    given = "" if "Namespace(" in value else f" = {value}"  # a source that jsonargparse has half built
    return f"{name}{given}: give {allowed(expected)}"


def allowed(expected: object) -> str:
    """What a type of the recipe means to a reader."""
    parts = typing.get_args(expected)
    origin = typing.get_origin(expected)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(allowed(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join(allowed(part) for part in parts)}]"
    if origin is list:
        return f"a list of {allowed(parts[0])}"
    if dataclasses.is_dataclass(expected):
        return f"{{{', '.join(field.name for field in dataclasses.fields(expected))}}}"
    return _NAMES.get(expected, str(expected))


def not_a_section(name: str, sections: dict[str, list[str]]) -> str:
    """The message for a section that was given a value."""
    return f"{name}: a section, which takes no value of its own; it has {', '.join(sections[name])}"


def _unknown(name: str, options: list[str], sections: dict[str, list[str]]) -> str:
    fields = [option for option in options if option not in sections]
    parent, _, leaf = name.rpartition(".")
    if parent in sections:
        near = [f"{parent}.{field}" for field in difflib.get_close_matches(leaf, sections[parent], 1, 0.7)]
    else:
        near = difflib.get_close_matches(name, fields, 1, 0.85)
    near += [field for field in fields if field.rpartition(".")[2] == leaf]
    if near:
        return f"{name}: no such field (did you mean {near[0]}? --help lists every field)"
    if parent in sections:
        return f"{name}: no such field; {parent} has {', '.join(sections[parent])}"
    return f"{name}: no such field; --help lists every field"


def _sections(value: object, name: str = "") -> dict[str, list[str]]:
    """The names of the fields inside value and inside each section in it, by dotted name."""
    inside = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    found = {name: list(inside)} if name else {}
    for field, inner in inside.items():
        if dataclasses.is_dataclass(inner):
            found |= _sections(inner, f"{name}.{field}" if name else field)
    return found


@cache
def sections_of(recipe_type: type) -> dict[str, list[str]]:
    """The names of the fields in each section of a recipe, by the section's dotted name."""
    return _sections(recipe_type())
