"""Several runs side by side: which is best by a metric, and which are not shown to be worse.

In each row the best run is compared with every other one: where outcomes per row of the set were kept, by a paired test
of their difference (random sign flips), with p values corrected for the number of runs in the row (Holm 1979) but not
for the number of rows on the page; else by whether the 95 % intervals overlap, a coarser test, since runs whose
intervals overlap a little may still differ; else not at all. A run is marked if it is the best or not shown to be worse
than the best; if no run is shown to be worse, nothing is marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from modstruct.evaluation.statistics import paired_difference
from modstruct.reporting.loading import Evaluation, Metric, Result
from modstruct.reporting.vocabulary import (
    TASKS,
    Task,
    direction,
    is_share,
    label,
    task_of,
)

ALPHA = 0.05
SAME_VALUE = 1e-6
"""Largest difference of a metric and the mean of its outcomes, of which one may be float32."""


@dataclass(frozen=True)
class Lead:
    """How far the best run is ahead of another, positive for better; low and high: 95 % interval."""

    difference: float
    low: float
    high: float
    p: float
    """Corrected for the number of runs in the row."""


@dataclass(frozen=True)
class Outcomes:
    """What a metric is the mean of. values: (rows,). rows: identities of the rows, where kept. groups: (rows,)."""

    values: np.ndarray
    rows: tuple[np.ndarray | None, ...]
    groups: np.ndarray | None


@dataclass(frozen=True)
class Cell:
    """A metric of one run in one row."""

    metric: Metric
    marked: bool = False
    best: bool = False
    lead: Lead | None = None
    """Of the best run over this one, where a paired test was made."""


@dataclass(frozen=True)
class Row:
    """One metric of all runs. cells: one a run, None where it was not measured. test: "paired", "intervals" or None."""

    set: str
    metric: str
    names: tuple[str, ...]
    share: bool
    better: int
    chance: float | None
    cells: tuple[Cell | None, ...]
    test: str | None

    @property
    def measured(self) -> dict[int, Cell]:
        """The cells that there are, by the number of the run."""
        return {i: cell for i, cell in enumerate(self.cells) if cell}

    @property
    def marked(self) -> list[int]:
        return [i for i, cell in self.measured.items() if cell.marked]

    @property
    def best(self) -> int | None:
        """The run with the best value, None if no direction is better or only one was measured."""
        return next((i for i, cell in self.measured.items() if cell.best), None)


@dataclass(frozen=True)
class Group:
    """Rows of one set whose names begin with `names`. note: what a reader must know before comparing."""

    set: str
    names: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str | None

    @property
    def title(self) -> str:
        return " · ".join(part for part in (self.set, label(self.names)) if part)

    def label(self, row: Row) -> str:
        """A row's name within the group."""
        return label(row.names[len(self.names) :])


@dataclass(frozen=True)
class Section:
    """Everything measured of one kind (retrieval, …), for all sets and runs."""

    metric: str
    task: Task
    groups: tuple[Group, ...]

    @property
    def rows(self) -> Iterator[Row]:
        for group in self.groups:
            yield from group.rows


def compare(runs: Sequence[Evaluation]) -> list[Section]:
    """Every result of every run as sections, the known ones first; rows in the order in which runs name them."""
    metrics = list(dict.fromkeys(metric for run in runs for _, metric in run.results))
    known = [metric for metric in TASKS if metric in metrics]
    others = sorted(set(metrics) - set(known))
    return [Section(metric, task_of(metric), tuple(_groups(runs, metric))) for metric in known + others]


def _groups(runs: Sequence[Evaluation], metric: str) -> Iterator[Group]:
    sets = sorted({set_name for run in runs for set_name, m in run.results if m == metric})
    for set_name in sets:
        results = [run.results.get((set_name, metric)) for run in runs]
        note = _different_data(runs, results)
        names = dict.fromkeys(names for result in results if result for names in result.metrics)
        grouped: dict[tuple[str, ...], list[Row]] = {}
        for path in names:
            grouped.setdefault(path[:-1], []).append(compare_metric(results, path, comparable=note is None))
        alone = [rows[0] for rows in grouped.values() if len(rows) == 1]
        if alone:
            yield Group(set_name, (), tuple(alone), note)
        for start, rows in grouped.items():
            if len(rows) > 1:
                yield Group(set_name, start, tuple(rows), note)


def _different_data(runs: Sequence[Evaluation], results: Sequence[Result | None]) -> str | None:
    """A warning if the runs' results come from sets of different content."""
    measured = [(run.name, result) for run, result in zip(runs, results, strict=True) if result]
    fingerprints = {result.source_fingerprint for _, result in measured}
    if len(measured) < 2 or len(fingerprints) == 1:
        return None
    of_runs = ", ".join(f"{name}: {_short(result.source_fingerprint)}" for name, result in measured)
    return f"Not the same data: the runs were measured on sets of different content ({of_runs}), so none is marked."


def _short(fingerprint: str | None) -> str:
    return "no fingerprint" if fingerprint is None else fingerprint[:12]


def compare_metric(results: Sequence[Result | None], names: tuple[str, ...], comparable: bool = True) -> Row:
    """One metric of all runs as a row. results: one a run, all of one kind and set, None where there is none.

    comparable: False leaves all unmarked, for results on different data.
    """
    found = {i: result for i, result in enumerate(results) if result and names in result.metrics}
    values = {i: result.metrics[names] for i, result in found.items()}
    first = next(iter(found.values()))
    better = direction(first.metric, names)
    share = is_share(first.metric, names, [value.value for value in values.values()])
    chance = next((value.chance for value in values.values() if value.chance is not None), None)

    best: int | None = None
    leads: dict[int, Lead] = {}
    worse: set[int] = set()
    test: str | None = None
    if better and comparable and len(values) > 1:
        best = max(values, key=lambda i: better * values[i].value)
        rivals = [i for i in values if i != best]
        outcomes = {i: kept for i, result in found.items() if (kept := _outcomes(result, names))}
        if len(outcomes) == len(found) and all(_same_rows(outcomes[best], outcomes[i]) for i in rivals):
            test, leads = "paired", _leads(outcomes, best, rivals, better)
            worse = {i for i in rivals if leads[i].p < ALPHA}
        elif all(value.low is not None and value.high is not None for value in values.values()):
            test, worse = "intervals", {i for i in rivals if _apart(values[best], values[i])}
    cells = (
        Cell(
            values[i],
            marked=bool(worse) and i not in worse,
            best=best is not None and values[i].value == values[best].value,
            lead=leads.get(i),
        )
        if i in values
        else None
        for i in range(len(results))
    )
    return Row(first.set, first.metric, names, share, better, chance, tuple(cells), test)


def _outcomes(result: Result, names: tuple[str, ...]) -> Outcomes | None:
    """A metric's outcomes, or None if there are none whose mean it is."""
    kept = result.outcomes.get("/".join(names))
    if kept is None or kept.ndim != 1 or not len(kept) or kept.dtype.kind not in "biuf":
        return None
    values = kept.astype(np.float64)
    if not abs(float(values.mean()) - result.metrics[names].value) <= SAME_VALUE:
        return None
    beside = ["/".join((*names[:-1], "{}"))] if len(names) > 1 else []
    found = {
        kind: next(
            (result.outcomes[key] for start in [*beside, "{}"] if (key := start.format(kind)) in result.outcomes), None
        )
        for kind in ("query", "row", "group")
    }
    return Outcomes(values, tuple(found[kind] for kind in ("query", "row")), found["group"])


def _same_rows(a: Outcomes, b: Outcomes) -> bool:
    """Whether two runs' outcomes are of the same rows, as far as is known."""
    if a.values.shape != b.values.shape:
        return False
    mine, others = (*a.rows, a.groups), (*b.rows, b.groups)
    return all(x is None or y is None or np.array_equal(x, y) for x, y in zip(mine, others, strict=True))


def _leads(outcomes: dict[int, Outcomes], best: int, rivals: list[int], better: int) -> dict[int, Lead]:
    first = outcomes[best]
    tested = [
        paired_difference(better * first.values, better * outcomes[i].values, groups=first.groups) for i in rivals
    ]
    corrected = holm([found.p for found in tested])
    return {
        i: Lead(found.difference, found.low, found.high, p)
        for i, found, p in zip(rivals, tested, corrected, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down procedure (1979), in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def _apart(a: Metric, b: Metric) -> bool:
    """Whether two intervals, which both are there, do not overlap."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high
