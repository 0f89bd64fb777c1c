"""What a metric found of a set. A result declares itself: labels, units, directions and chance stand beside its values.

On the disk a result is SET/METRIC.json, with the outcomes of single rows in METRIC.npz beside it:

    {"schema": 3, "metric": "zero_shot", "set": "cifar10", "title": "Zero-shot classification", "about": "…",
     "values": {"ensemble/top_1": {"value": 0.41, "low": 0.40, "high": 0.42, "unit": "share", "label": "top-1",
                                   "higher_is_better": true, "chance": 0.1, "rows": 10000}, …},
     "curves": {"…": {"x": […], "y": […], …}}, "groups": {"ensemble": "Ensemble of templates"},
     "headlines": ["ensemble/top_1"], "settings": {…}, "rows": {"image": 10000}, "fingerprint": "…",
     "seconds": 1.5, "command": […], "embeddings": "…"}

Fields at their default are left out. Nothing that reads a result draws conclusions from names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from modstruct.evaluation.older_results import converted
from modstruct.evaluation.statistics import bootstrap_mean
from modstruct.files import atomic_write, unique_keys

SCHEMA = 3
"""Of the files; 2 and older have no "schema" and are read by `older_results`."""
Unit = Literal["share", "nats", "rank", "number"]
"""A share is from 0 to 1 and shown in percent; a rank counts from 1."""


@dataclass(frozen=True)
class Value:
    """One number with all that is needed to print, compare and judge it."""

    value: float
    label: str = ""
    """What tables call it within its group; "" stands for its name."""
    unit: Unit = "number"
    higher_is_better: bool | None = None
    """None where no direction is better."""
    chance: float | None = None
    """What a random ranking or guess would reach."""
    low: float | None = None
    """With `high` its 95 % interval over the set's rows."""
    high: float | None = None
    deviation: float | None = None
    """Standard deviation over draws (of shots, of seeds), where it is their mean."""
    rows: int | None = None
    """Rows that count in it."""
    about: str = ""
    """One sentence that defines it, where the label does not."""


@dataclass(frozen=True)
class Curve:
    """y over x, lists of one length."""

    x: list[float]
    y: list[float]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    unit: Unit = "number"
    """Of y."""
    low: list[float] | None = None
    """With `high` the 95 % band of y."""
    high: list[float] | None = None
    chance: list[float] | None = None
    """Of y at each x."""
    logarithmic: bool = False
    """Whether x is spaced by factors."""
    chosen: float | None = None
    """The x that was taken, such as a probe's penalty."""
    plot: str = ""
    """Curves of one result with one name share a plot; "" is a plot of its own."""


@dataclass(frozen=True)
class Result:
    """What one metric found of one set."""

    metric: str
    """Its name, such as retrieval."""
    set: str
    values: Mapping[str, Value]
    """By name; groups are set off by "/", as in "text_to_image/recall_at_1"."""
    title: str = ""
    about: str = ""
    """What was measured, in a sentence or two."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """What tables call the groups of values, by the part of their names before the last "/"."""
    headlines: tuple[str, ...] = ()
    """Names of the values that a summary shows."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    """How many there are of what: image, text, pairs, train, …"""
    fingerprint: str | None = None
    """Of the set's source: results of unlike ones cannot be compared."""
    seconds: float | None = None
    command: tuple[str, ...] = ()
    embeddings: str | None = None
    """Identity of the embeddings that were measured."""
    outcomes: Mapping[str, np.ndarray] = field(default_factory=dict)
    """(n,) for each value that is a mean over rows, by the value's name: runs are compared row by row. Beside them, by
    GROUP/row or row the identity of the rows, and by GROUP/group or group which rows are resampled together."""

    @cached_property
    def grouped(self) -> dict[str, dict[str, Value]]:
        """The values by group and, within it, by the last part of their names; "" is the group of the others."""
        found: dict[str, dict[str, Value]] = {}
        for name, value in self.values.items():
            group, _, last = name.rpartition("/")
            found.setdefault(group, {})[last] = value
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it but the outcomes, in plain JSON kinds."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "outcomes"}
        plain["values"] = {name: _without_defaults(value) for name, value in self.values.items()}
        plain["curves"] = {name: _without_defaults(curve) for name, curve in self.curves.items()}
        return {"schema": SCHEMA} | {name: value for name, value in plain.items() if value not in (None, (), {}, "")}

    def save(self, path: Path) -> None:
        """Write METRIC.json, and METRIC.npz before it, so that a result always has its own outcomes beside it.

        Raises ValueError for a number that is not finite.
        """
        try:
            content = (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode()
        except ValueError as error:
            raise ValueError(f"{self.metric} of {self.set}: {error}: a value is not finite") from error
        path.unlink(missing_ok=True)
        if self.outcomes:
            with atomic_write(path.with_suffix(".npz")) as file:
                np.savez_compressed(file, **self.outcomes)  # type: ignore[arg-type]  # taken for allow_pickle
        with atomic_write(path) as file:
            file.write(content)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read METRIC.json of this or an earlier version, and its outcomes if there are any.

        Raises ValueError naming the file, what is wrong and the remedy.
        """
        content = read_json(path)
        if content.get("schema", SCHEMA) != SCHEMA:
            refuse_file(path, f'"schema" is {content["schema"]!r}, and this version reads {SCHEMA} and older')
        if "schema" not in content:
            try:
                content = converted(content, path.parent.name, path.stem)
            except (ValueError, TypeError, AttributeError) as error:
                refuse_file(path, str(error))
        return replace(from_json(content, path), outcomes=read_outcomes(path.with_suffix(".npz")))


def share(value: float, **more: Any) -> Value:
    """A share of rows, of which more is better: a recall or an accuracy."""
    declared: dict[str, Any] = {"unit": "share", "higher_is_better": True} | more
    return Value(float(value), **declared)


def mean_share(outcomes: np.ndarray, groups: np.ndarray | None = None, **more: Any) -> Value:
    """The mean of outcomes (n,) from 0 to 1 with its 95 % interval, where there are two independent rows.

    groups: (n,), rows that `bootstrap_mean` resamples together.
    """
    bounds = {}
    if len(outcomes if groups is None else np.unique(groups)) > 1:
        low, high = bootstrap_mean(outcomes, groups=groups)
        bounds = {"low": max(0.0, low), "high": min(1.0, high)}
    return share(np.mean(outcomes), rows=len(outcomes), **bounds | more)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file if it is none, or holds a number that is none."""
    try:
        content = json.loads(
            path.read_bytes(),
            parse_constant=lambda name: refuse_file(path, f"it holds {name}"),
            object_pairs_hook=unique_keys,
        )
    except (OSError, ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        refuse_file(path, str(error))
    if not isinstance(content, dict):
        refuse_file(path, f"it holds a {type(content).__name__} instead of an object")
    return content


def read_outcomes(path: Path) -> dict[str, np.ndarray]:
    """The arrays of METRIC.npz; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged archive: zipfile and zlib raise errors of their own
        refuse_file(path, f"{type(error).__name__}: {error}")


def refuse_file(path: Path, what: str) -> NoReturn:
    """Refuse a file of results."""
    raise ValueError(f"{path}: {what}; the file is damaged or of another version: measure this set again")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _without_defaults(made: Value | Curve) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(made)}
    return {name: v for name, v in asdict(made).items() if defaults[name] is MISSING or v != defaults[name]}


NUMBERS = ("value", "chance", "low", "high", "deviation", "chosen")
LISTS = ("x", "y", "low", "high", "chance")
TEXTS = ("label", "about", "title", "x_label", "y_label", "plot", "metric", "set", "fingerprint", "embeddings")


def from_json(content: dict[str, Any], path: Path) -> Result:
    """A result from what `Result.to_json` makes; ValueError naming the file and field that is not as it writes it."""
    content = {name: value for name, value in content.items() if name != "schema"}
    for name in ("values", "curves", "groups", "settings", "rows"):
        if not isinstance(content.get(name, {}), dict):
            refuse_file(path, f'"{name}" must be an object')
    if not content.get("values"):
        refuse_file(path, '"values" is missing or empty')
    for kind, name in ((Value, "values"), (Curve, "curves")):
        content[name] = {key: _made(kind, found, f"{name}/{key}", path) for key, found in content.get(name, {}).items()}
    for name in ("headlines", "command"):
        words = content.get(name, [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            refuse_file(path, f'"{name}" must be a list of texts')
        content[name] = tuple(words)
    return _made(Result, content, "the result", path)


def _made(kind: type, found: Any, name: str, path: Path) -> Any:
    """A dataclass of this kind from plain JSON, checked."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    if not isinstance(found, dict) or not found.keys() <= known.keys():
        refuse_file(path, f"{name} is {_short(found)}: it must be an object of {', '.join(known)}")
    if missing := [key for key, needed in known.items() if needed and key not in found]:
        refuse_file(path, f'{name} has no "{missing[0]}"')
    curve = kind is Curve
    for key, value in found.items():
        sound = True
        if key in TEXTS:
            sound = isinstance(value, str)
        elif curve and key in LISTS:
            sound = isinstance(value, list) and len(value) == len(found["x"]) and all(map(is_number, value))
        elif key in NUMBERS:
            sound = value is None or is_number(value)
        elif key == "unit":
            sound = value in get_args(Unit)
        if not sound:
            refuse_file(path, f"{name} has {key} = {_short(value)}, which is not as this version writes it")
    return kind(**found)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
