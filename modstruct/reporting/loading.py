"""Evaluation folders as a report reads them: one model each, checked before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import MODEL_FILE
from modstruct.files import unique_keys

METRIC_NUMBERS = ("value", "chance", "low", "high")
RENAMED = {"linear_probe_sgd": "linear_probe_adamw"}
"""Results of older versions, by their present names."""


@dataclass(frozen=True)
class Metric:
    """One number with what was measured beside it; low and high are its 95 % interval."""

    value: float
    chance: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Result:
    """One METRIC.json: what one kind of measurement found of a model on a set. metric: its name, such as retrieval."""

    path: Path
    set: str
    metric: str
    metrics: dict[tuple[str, ...], Metric]
    """By the names on the way to the number, such as ("image_to_text", "recall_at_1")."""
    curves: dict[str, list[float]]
    settings: dict[str, Any]
    rows: dict[str, int]
    source_fingerprint: str | None
    seconds: float | None
    command: list[str]
    written: datetime

    @cached_property
    def outcomes(self) -> dict[str, np.ndarray]:
        """Outcomes per row, (rows,) each, by the metric's names joined with "/"; empty if none were kept."""
        path = self.path.with_suffix(".npz")
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError) as error:
            _refuse(path, str(error))
        except Exception as error:  # a damaged archive: zipfile and zlib raise their own errors
            _refuse(path, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder: a model and everything measured of it."""

    folder: Path
    name: str
    model: dict[str, Any]
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    """By (set, metric)."""

    def embedded_set(self, name: str) -> EmbeddedSet | None:
        """The embedded set of that name, or None if the folder has no finished one."""
        folder = self.folder / "embeddings" / name
        return EmbeddedSet.open(folder) if (folder / "manifest.json").is_file() else None

    def examples_folder(self, set_name: str) -> Path:
        return self.folder / "results" / set_name / "examples"


def load_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """Read several evaluation folders, in the order given.

    Models of equal names get their folders appended. Raises FileNotFoundError or ValueError naming the file that is
    missing or broken, and the remedy.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if not paths:
        raise ValueError("report: no evaluation folder is named; give at least one")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path}: named twice; name each evaluation folder once")
        seen.add(path.resolve())
    loaded = [load_evaluation(path) for path in paths]
    names = [evaluation.name for evaluation in loaded]
    return [
        Evaluation(e.folder, f"{e.name} ({e.folder})" if names.count(e.name) > 1 else e.name, e.model, e.results)
        for e in loaded
    ]


def load_evaluation(folder: Path) -> Evaluation:
    """Read model.json and every results/SET/METRIC.json of one evaluation folder."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {folder} is no evaluation folder: embed a set first")
    model = read_json(path)
    if not isinstance(model.get("name"), str) or not model["name"]:
        _refuse(path, f'"name" = {model.get("name")!r}: the model\'s name must be a text')
    commands = model.setdefault("commands", [])
    if not isinstance(commands, list) or not all(isinstance(words, list) for words in commands):
        _refuse(path, '"commands" must be a list of commands, each a list of words')
    results = [_result(file) for file in sorted(folder.glob("results/*/*.json"))]
    if not results:
        raise FileNotFoundError(f"{folder / 'results'}: there are no results; measure a set first")
    results.sort(key=lambda result: result.path.stem not in RENAMED)  # a result of the present version counts
    return Evaluation(folder, model["name"], model, {(r.set, r.metric): r for r in results})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file if it is none."""
    try:
        content = json.loads(
            path.read_bytes(),
            parse_constant=lambda name: _refuse(path, f"it holds {name}"),
            object_pairs_hook=unique_keys,
        )
    except (OSError, ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        _refuse(path, str(error))
    if not isinstance(content, dict):
        _refuse(path, f"it holds a {type(content).__name__} instead of an object")
    return content


def _result(path: Path) -> Result:
    content = read_json(path)
    metrics = content.get("figures")
    if not isinstance(metrics, dict) or not metrics:
        _refuse(path, '"figures" is missing or empty')
    curves = content.get("curves") or {}
    if not isinstance(curves, dict):
        _refuse(path, '"curves" must be an object of lists of numbers')
    for name, values in curves.items():
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            _refuse(path, f'"curves" has {name!r}, which is no list of finite numbers')
    seconds, command, fingerprint = (content.get(key) for key in ("seconds", "command", "source_fingerprint"))
    return Result(
        path=path,
        set=path.parent.name,
        metric=RENAMED.get(path.stem, path.stem),
        metrics=dict(_leaves(metrics, (), path)),
        curves=curves,
        settings=content.get("settings") or {},
        rows=content.get("rows") or {},
        source_fingerprint=None if fingerprint is None else str(fingerprint),
        seconds=seconds if _is_number(seconds) else None,
        command=[str(word) for word in command] if isinstance(command, list) else [],
        written=datetime.fromtimestamp(path.stat().st_mtime, UTC),
    )


def _leaves(node: dict, names: tuple[str, ...], path: Path) -> Iterator[tuple[tuple[str, ...], Metric]]:
    for name, inner in node.items():
        here = (*names, name)
        if not isinstance(inner, dict):
            _refuse(path, f'the metric {"/".join(here)} is {inner!r}: it must be {{"value": …}}')
        if "value" not in inner:
            yield from _leaves(inner, here, path)
            continue
        numbers = {key: inner[key] for key in METRIC_NUMBERS if inner.get(key) is not None}
        bad = next((key for key, number in numbers.items() if not _is_number(number)), None)
        if bad is not None or "value" not in numbers:
            key = bad or "value"
            _refuse(path, f"the metric {'/'.join(here)} has {key} = {inner[key]!r}: it must be a finite number")
        rows = inner.get("rows")
        yield here, Metric(**numbers, rows=int(rows) if rows is not None and _is_number(rows) else None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(path: Path, what: str) -> NoReturn:
    raise ValueError(f"{path}: {what}; the file is damaged or of another version: measure this set again")
