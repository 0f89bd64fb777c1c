"""Several runs side by side: which is best by a metric, and which are not shown to be worse.

In each row the best run is compared with every other one: where outcomes per row of the set were kept, by a paired test
of their difference (random sign flips), with p values corrected for the number of runs in the row (Holm 1979) but not
for the number of rows on the page; else by whether the 95 % intervals overlap, a coarser test; else not at all. A run
is marked if it is the best or not shown to be worse than the best; if no run is shown to be worse, nothing is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modstruct.config.recipe_files import leaves
from modstruct.evaluation.result import Result, Value
from modstruct.evaluation.statistics import Difference, holm, paired_difference
from modstruct.reporting.loading import Evaluation

ALPHA = 0.05
SAME_VALUE = 1e-6
"""Largest difference of a metric and the mean of its outcomes, of which one may be float32."""
ROWS = ("query", "row", "group")
"""Outcomes that are identities of rows; the last, which rows count as one."""
ORDER = (
    *("retrieval", "zero_shot", "linear_probe", "linear_probe_adamw", "few_shot"),
    *("structure", "information", "private_factors"),
)
"""Of the sections; others follow by name."""


@dataclass(frozen=True)
class Cell:
    """A metric of one run. lead: how far the best run is ahead, positive for better, its p value corrected."""

    value: Value
    marked: bool
    best: bool
    lead: Difference | None


@dataclass(frozen=True)
class Row:
    """One metric of all runs. like: one of its values, for label, unit and direction. cells: by number of the run.
    test: "paired", "intervals" or None. headline: whether a summary shows it."""

    set: str
    metric: str
    name: str
    like: Value
    cells: dict[int, Cell]
    test: str | None
    headline: bool

    @property
    def label(self) -> str:
        return self.like.label or self.name.rpartition("/")[2]

    @property
    def marked(self) -> list[int]:
        return [i for i, cell in self.cells.items() if cell.marked]


@dataclass(frozen=True)
class Group:
    """Rows of one set that belong together. note: what a reader must know before comparing."""

    set: str
    title: str
    rows: tuple[Row, ...]
    note: str | None


@dataclass(frozen=True)
class Section:
    """Everything measured of one kind (retrieval, …). results: by set and number of the run."""

    metric: str
    title: str
    about: str
    groups: tuple[Group, ...]
    results: dict[str, dict[int, Result]]

    @property
    def rows(self) -> Iterator[Row]:
        for group in self.groups:
            yield from group.rows

    @property
    def definitions(self) -> dict[str, list[str]]:
        """By what it says, each definition and the labels that it is of."""
        first: dict[str, str] = {}
        for row in self.rows:
            if row.like.about:
                first.setdefault(row.label, row.like.about)
        return {about: [label for label, of in first.items() if of == about] for about in first.values()}


def compare(runs: Sequence[Evaluation]) -> list[Section]:
    """Every result of every run as sections, by ORDER; rows in the order in which the results name them.

    Published results stand beside ours: their data are not known to be the same, so they are not compared.
    """
    metrics = {metric for run in runs for _, metric in run.results}
    return [_section(metric, runs) for metric in sorted(metrics, key=lambda m: ((*ORDER, m).index(m), m))]


def _section(metric: str, runs: Sequence[Evaluation]) -> Section:
    results: dict[str, dict[int, Result]] = {}
    for set_name in sorted({set_name for run in runs for set_name, of in run.results if of == metric}):
        key = (set_name, metric)
        results[set_name] = {i: run.results[key] for i, run in enumerate(runs) if key in run.results}
    groups = []
    for set_name, of_set in results.items():
        ours = {i: result for i, result in of_set.items() if not runs[i].published}
        note = None
        if len({result.fingerprint for result in ours.values()}) > 1:
            prints = (f"{runs[i].name}: {(of.fingerprint or 'no fingerprint')[:12]}" for i, of in ours.items())
            note = f"Not the same data: measured on sets of different content ({', '.join(prints)}), so none is marked."
        rows: dict[str, list[Row]] = {}
        for name in dict.fromkeys(name for result in of_set.values() for name in result.values):
            row = _row(name, set_name, of_set, set() if note else ours.keys())
            rows.setdefault(name.rpartition("/")[0], []).append(row)
        titles = {name: title for result in of_set.values() for name, title in result.groups.items()}
        for name, members in rows.items():
            title = " · ".join(part for part in (set_name, titles.get(name, name)) if part)
            groups.append(Group(set_name, title, tuple(members), note))
    found = [result for of_set in results.values() for result in of_set.values()]
    title, about = (next(filter(None, (getattr(of, text) for of in found)), "") for text in ("title", "about"))
    return Section(metric, title or metric, about, tuple(groups), results)


def _row(name: str, set_name: str, of_set: dict[int, Result], comparable: AbstractSet[int]) -> Row:
    results = {i: result for i, result in of_set.items() if name in result.values}
    values = {i: result.values[name] for i, result in results.items()}
    like = next((value for value in values.values() if value.about), next(iter(values.values())))
    compared = {i: value for i, value in values.items() if i in comparable}
    top, test, worse = None, None, set[int]()
    leads: dict[int, Difference] = {}
    if like.higher_is_better is not None and len(compared) > 1:
        sign = 1 if like.higher_is_better else -1
        best = max(compared, key=lambda i: sign * compared[i].value)
        top, rivals = compared[best], [i for i in compared if i != best]
        if paired := paired_outcomes([results[i] for i in compared], name):
            test, outcomes = "paired", dict(zip(compared, paired[0], strict=True))
            found = [paired_difference(sign * outcomes[best], sign * outcomes[i], groups=paired[1]) for i in rivals]
            corrected = holm([difference.p for difference in found])
            leads = {i: replace(lead, p=p) for i, lead, p in zip(rivals, found, corrected, strict=True)}
            worse = {i for i in rivals if leads[i].p < ALPHA}
        elif all(value.low is not None and value.high is not None for value in compared.values()):
            test = "intervals"
            worse = {i for i in rivals if top.low > compared[i].high or compared[i].low > top.high}  # type: ignore[operator]
    cells = {}
    for i, value in values.items():
        marked = bool(worse) and i in compared and i not in worse
        cells[i] = Cell(value, marked, top is not None and i in compared and value.value == top.value, leads.get(i))
    headline = any(name in result.headlines for result in results.values())
    return Row(set_name, next(iter(results.values())).metric, name, like, cells, test, headline)


def paired_outcomes(results: Sequence[Result], name: str) -> tuple[list[np.ndarray], np.ndarray | None] | None:
    """Outcomes (n,) of each result, float64, whose mean the value is, and the groups of their rows, (n,) or None.

    None unless all results have them, of the same rows as far as is known.
    """
    kept = [np.asarray(result.outcomes[name], np.float64) for result in results if name in result.outcomes]
    if len(kept) < len(results) or len({array.shape for array in kept}) > 1:
        return None
    values = [result.values[name].value for result in results]
    if not all(abs(of.mean() - value) <= SAME_VALUE for of, value in zip(kept, values, strict=True)):
        return None
    groups = []
    for kind in ROWS:
        own, common = f"{name.rpartition('/')[0]}/{kind}", kind
        groups = [of for result in results if (of := result.outcomes.get(own, result.outcomes.get(common))) is not None]
        if not all(np.array_equal(groups[0], others) for others in groups):
            return None
    return kept, groups[0] if groups else None


def group_seeds(runs: Sequence[Evaluation]) -> list[Evaluation]:
    """The runs, with those that differ in nothing but train.seed and output made one, at the place of the first.

    Values and curves become means over the seeds, deviations and bands the standard deviation (n - 1) over them;
    outcomes become means row by row, so that a paired test compares the means. There are no intervals, which over rows
    would leave out the seeds. Runs of one recipe and seed, such as two checkpoints of a run, stay apart.
    """
    families: dict[Any, dict[Any, list[Evaluation]]] = {}
    for run in runs:
        recipe, seed = _without_seed(run)
        families.setdefault(recipe, {}).setdefault(seed, []).append(run)
    grouped = []
    for of_seeds in families.values():
        members = [run for found in of_seeds.values() for run in found]
        grouped += [_merged(members)] if 1 < len(of_seeds) == len(members) else members
    return sorted(grouped, key=lambda run: runs.index((run.seeds or (run,))[0]))


def _without_seed(run: Evaluation) -> tuple[Any, Any]:
    """What runs of several seeds have in common, and the seed."""
    recipe = run.recipe
    try:
        seed = recipe["train"].pop("seed")
    except (TypeError, KeyError, AttributeError):
        return run.folder, None
    return repr([recipe | {"output": None}, re.findall(r"step-\d+$", run.model["name"])]), seed


def differing_fields(runs: Sequence[Evaluation]) -> dict[str, list[str]]:
    """By its dotted name each field that not all recipes share, and its values in each run, of seeds together.

    Left out are output, and fields that a recipe of an older version lacks. A run without a recipe has "".
    """
    recipes = [[leaves(recipe) for one in run.seeds or (run,) if (recipe := one.recipe)] for run in runs]
    known = [fields for of in recipes for fields in of]
    differing = {}
    for name in known[0] if known else ():
        if name != "output" and all(name in fields for fields in known):
            values = [", ".join(sorted({json.dumps(fields[name], default=str) for fields in of})) for of in recipes]
            if len({value for value in values if value}) > 1:
                differing[name] = values
    return differing


def _merged(family: Sequence[Evaluation]) -> Evaluation:
    keys = dict.fromkeys(key for run in family for key in run.results)
    results = {key: _mean([run.results[key] for run in family if key in run.results]) for key in keys}
    first = family[0]
    name = re.sub(rf"[-_/@ .]+(seed|s)?[-_=]?{_without_seed(first)[1]}(?=/|$)", "", first.name)
    return replace(first, name=name or first.name, results=results, seeds=tuple(family))


def _mean(results: Sequence[Result]) -> Result:
    """One result of several seeds, with what all of them have."""
    first, values, curves = results[0], {}, {}
    outcomes = {name: of for name, of in first.outcomes.items() if name.rpartition("/")[2] in ROWS}
    if len(results) == 1:
        return first
    for name in [name for name in first.values if all(name in result.values for result in results)]:
        each = [result.values[name].value for result in results]
        deviation = float(np.std(each, ddof=1))
        values[name] = replace(first.values[name], value=float(np.mean(each)), deviation=deviation, low=None, high=None)
        if paired := paired_outcomes(results, name):
            outcomes[name] = np.mean(paired[0], axis=0)
    for name, like in first.curves.items():
        found = [result.curves[name] for result in results if name in result.curves]
        # A search may try other values of x with each seed: the mean is over those of all.
        x = [value for value in like.x if len(found) == len(results) and all(value in curve.x for curve in found)]
        if x:
            y = np.array([[curve.y[curve.x.index(value)] for value in x] for curve in found])
            mean, spread = y.mean(0), y.std(0, ddof=1)
            lines = {"y": mean.tolist(), "low": (mean - spread).tolist(), "high": (mean + spread).tolist()}
            chance = like.chance and [like.chance[like.x.index(value)] for value in x]
            curves[name] = replace(like, x=x, chance=chance, chosen=None, **lines)
    fingerprint = first.fingerprint if len({result.fingerprint for result in results}) == 1 else "several"
    return replace(first, values=values, curves=curves, outcomes=outcomes, fingerprint=fingerprint)
