"""Lists on a command line: `--x a b` and `--x '[a, b]'` are the same, whichever of the two a parser takes."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml

from modstruct.files import RepeatedKey, parse_yaml


def list_words(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """A command line whose lists are written as the parser takes them.

    Raises ValueError for a value in brackets in which a key stands twice.
    """
    actions = {option: action for action in parser._actions for option in action.option_strings}
    waiting, made = list(arguments), []
    while waiting:
        option = waiting.pop(0)
        made.append(option)
        end = next((place for place, word in enumerate(waiting) if word.startswith("--")), len(waiting))
        given = waiting[:end]
        if not given or option not in actions:
            continue
        if given[0][:1] + given[0][-1:] in ("[]", "{}"):  # no pattern such as {a,b}.tar
            _require_unique_keys(option, given[0])
        words = _of_words(given) if actions[option].nargs in ("+", "*") else _of_list(actions[option], given)
        if words is not None:
            taken, written = words
            made += written
            del waiting[:taken]
    return made


def _of_words(given: list[str]) -> tuple[int, list[str]] | None:
    """Of an option that takes words, those of a list in brackets; with the number of words that they replace."""
    if not (given[0].startswith("[") and given[0].endswith("]")) or Path(given[0]).exists():
        return None
    try:
        words = yaml.BaseLoader(given[0]).get_single_data()  # all scalars as text
    except yaml.YAMLError:  # a pattern of files
        return None
    return (1, words) if all(isinstance(word, str) for word in words) else None


def _of_list(action: argparse.Action, given: list[str]) -> tuple[int, list[str]] | None:
    """Of an option that takes a list in brackets, the list of several words, or of one that is no value by itself."""
    kind = getattr(action, "_typehint", None)
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    lists = [one for one in kinds if typing.get_origin(one) in (list, tuple)]
    if not lists or given[0][:1] in ("[", "{") or given[0] == "null":
        return None
    numbers = typing.get_args(lists[0])[0] in (int, float)
    if numbers:  # what is none may be an argument of its own
        given = list(itertools.takewhile(re.compile(r"[-+.\deE_]+").fullmatch, given))
    if not given or (str in kinds and len(given) == 1):
        return None
    written = given if numbers else [json.dumps(word, ensure_ascii=False) for word in given]
    return len(given), [f"[{', '.join(written)}]"]


def _require_unique_keys(option: str, value: str) -> None:
    try:
        parse_yaml(value.encode("utf-8", "surrogateescape"))
    except RepeatedKey as error:
        raise ValueError(f"{option}: {error}") from None
    except ValueError:  # text, or what the parser has a word for
        pass
