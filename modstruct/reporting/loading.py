"""Evaluation folders as a report reads them: one model each, checked before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.set_files import MODEL_FILE
from modstruct.evaluation.result import Result, read_json, refuse_file


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder: a model and everything measured of it; or several that differ only in their seed."""

    folder: Path
    name: str
    """What tables call it: its model's name without what the names of all have in common."""
    model: dict[str, Any]
    """model.json: name, fingerprint, checkpoint or open_clip, recipe, commands."""
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    """By (set, metric)."""
    seeds: tuple[Evaluation, ...] = ()
    """The runs that `results` are the means of; empty for a run alone."""

    @property
    def published(self) -> bool:
        """Whether others published it: shown beside ours, compared with none."""
        return "published" in self.model

    def embedded_set(self, name: str) -> EmbeddedSet | None:
        """The embedded set of that name, or None if the folder has no finished one."""
        folder = self.folder / "embeddings" / name
        return EmbeddedSet.open(folder) if (folder / "manifest.json").is_file() else None


def load_evaluations(folders: Sequence[str | Path]) -> list[Evaluation]:
    """Read several evaluation folders, in the order given, with short names.

    Raises FileNotFoundError or ValueError naming the file that is missing or broken, and the remedy.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if not paths:
        raise ValueError("report: no evaluation folder is named; give at least one")
    for i, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:i]]:
            raise ValueError(f"{path}: named twice; name each evaluation folder once")
    loaded = [load_evaluation(path) for path in paths]
    names = [run.name for run in loaded]
    if len(set(names)) < len(names):
        names = [f"{run.name}/{run.folder}" for run in loaded]
    return [replace(run, name=name) for run, name in zip(loaded, short_names(names), strict=True)]


def load_evaluation(folder: Path) -> Evaluation:
    """Read model.json and every results/SET/METRIC.json of one evaluation folder."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {folder} is no evaluation folder: embed a set first")
    model = {"commands": []} | read_json(path)
    if not isinstance(model.get("name"), str) or not model["name"]:
        refuse_file(path, f'"name" = {model.get("name")!r}: the model\'s name must be a text')
    # Backwards: where an older version's linear_probe_sgd lies beside linear_probe_adamw, the latter counts.
    found = {file: Result.load(file) for file in sorted(folder.glob("results/*/*.json"), reverse=True)}
    if not found:
        raise FileNotFoundError(f"{folder / 'results'}: there are no results; measure a set first")
    results = {(file.parent.name, result.metric): result for file, result in found.items()}
    return Evaluation(folder, model["name"], model, results)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the words at their beginnings and ends that all have in common; each keeps a word of its own."""
    without_step = [re.sub(r"/step-\d+$", "", name) for name in names]
    names = without_step if len(set(without_step)) == len(names) else names
    parts = [re.findall(r"step-\d+|[^/_@ -]+|[/_@ -]", name) for name in names]
    start, end = (
        len(list(takewhile(lambda words: len(set(words)) == 1, zip(*of, strict=False))))
        for of in (parts, [part[::-1] for part in parts])
    )
    # Words that are in all names are kept where a name would be nothing without them, as of clip and clip_sep.
    while min(len(part) for part in parts) <= start + end and start + end:
        start, end = (start - 1, end) if start else (0, end - 1)
    cut = ["".join(part[start : len(part) - end]).strip("/_@ -") for part in parts]
    return cut if all(cut) and len(names) > 1 else list(names)
