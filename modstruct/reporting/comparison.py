"""Several runs beside each other: which is best at a figure, and which are not shown to be worse than it.

The convention. In each row the best run is compared with every other one. Where outcomes per row of the set were kept,
by a paired test of their difference (random sign flips), with p values corrected for the number of runs in the row
(Holm 1979), though not for the number of rows on the page. Else by whether the 95 % intervals overlap, which is a
coarser test: intervals that overlap a little may still belong to runs that differ. Else there is no test. A run is
marked where it is the best or not shown to be worse than the best; where no run is shown to be worse, nothing is
marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from modstruct.evaluation.statistics import paired_difference
from modstruct.reporting.loading import Evaluation, Figure, Result
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
"""Mean of the outcomes and figure may differ by so much, as one may be float32."""


@dataclass(frozen=True)
class Lead:
    """How far the best run is ahead of another, counted so that positive is better; low and high: 95 % interval."""

    difference: float
    low: float
    high: float
    p: float
    """Corrected for the runs in the row."""


@dataclass(frozen=True)
class Outcomes:
    """What a figure is the mean of. values: (rows,). rows: numbers that tell the rows, where kept. groups: (rows,)."""

    values: np.ndarray
    rows: tuple[np.ndarray | None, ...]
    groups: np.ndarray | None


@dataclass(frozen=True)
class Cell:
    """A figure of one run in one row."""

    figure: Figure
    marked: bool = False
    best: bool = False
    lead: Lead | None = None
    """Of the best run over this one, where both were tested in pairs."""


@dataclass(frozen=True)
class Row:
    """One figure of all runs. cells: one a run, None where it was not measured. test: "paired", "intervals" or None."""

    set: str
    metric: str
    names: tuple[str, ...]
    share: bool
    better: int
    chance: float | None
    cells: tuple[Cell | None, ...]
    test: str | None

    @property
    def best(self) -> int | None:
        """The run with the best value, None where no direction is better or only one was measured."""
        return next((i for i, cell in enumerate(self.cells) if cell and cell.best), None)


@dataclass(frozen=True)
class Group:
    """Rows of one set whose names begin alike. names: that beginning. note: what a reader must know beforehand."""

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
    """All that was measured by one metric, of all sets and runs."""

    metric: str
    task: Task
    groups: tuple[Group, ...]

    @property
    def rows(self) -> Iterator[Row]:
        for group in self.groups:
            yield from group.rows


def compare(runs: Sequence[Evaluation]) -> list[Section]:
    """Every metric of every run as sections, the known metrics first; rows in the order in which runs name them."""
    metrics = list(dict.fromkeys(metric for run in runs for _, metric in run.results))
    known = [metric for metric in TASKS if metric in metrics]
    others = sorted(set(metrics) - set(known))
    return [Section(metric, task_of(metric), tuple(_groups(runs, metric))) for metric in known + others]


def _groups(runs: Sequence[Evaluation], metric: str) -> Iterator[Group]:
    sets = sorted({set_name for run in runs for set_name, m in run.results if m == metric})
    for set_name in sets:
        results = [run.results.get((set_name, metric)) for run in runs]
        note = _different_data(runs, results)
        names = dict.fromkeys(names for result in results if result for names in result.figures)
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
    """A warning where the runs' results come from sets of different content."""
    measured = [(run.name, result) for run, result in zip(runs, results, strict=True) if result]
    fingerprints = {result.source_fingerprint for _, result in measured}
    if len(measured) < 2 or len(fingerprints) == 1:
        return None
    of_runs = ", ".join(f"{name}: {_short(result.source_fingerprint)}" for name, result in measured)
    return f"Not the same data: the runs were measured on sets of different content ({of_runs}), so none is marked."


def _short(fingerprint: str | None) -> str:
    return "no fingerprint" if fingerprint is None else fingerprint[:12]


def compare_metric(results: Sequence[Result | None], names: tuple[str, ...], comparable: bool = True) -> Row:
    """One figure of all runs as a row. results: one a run, all of one metric and set, None where there is none.

    comparable: False leaves all unmarked, for results that come from different data.
    """
    first = next(result for result in results if result and names in result.figures)
    figures = [result.figures.get(names) if result else None for result in results]
    outcomes = [
        _outcomes(result, names) if result and figure else None for result, figure in zip(results, figures, strict=True)
    ]
    measured = [i for i, figure in enumerate(figures) if figure]
    better = direction(first.metric, names)
    share = is_share(first.metric, names, [figures[i].value for i in measured])
    chance = next((figures[i].chance for i in measured if figures[i].chance is not None), None)

    best, leads, worse, test = None, {}, set(), None
    if better and comparable and len(measured) > 1:
        best = max(measured, key=lambda i: better * figures[i].value)
        rivals = [i for i in measured if i != best]
        if all(_same_rows(outcomes[best], outcomes[i]) for i in rivals):
            test, leads = "paired", _leads(outcomes, best, rivals, better)
            worse = {i for i in rivals if leads[i].p < ALPHA}
        elif all(figures[i].low is not None and figures[i].high is not None for i in measured):
            test, worse = "intervals", {i for i in rivals if _apart(figures[best], figures[i])}
    cells = tuple(
        None
        if figure is None
        else Cell(
            figure,
            marked=bool(worse) and i not in worse,
            best=best is not None and figure.value == figures[best].value,
            lead=leads.get(i),
        )
        for i, figure in enumerate(figures)
    )
    return Row(first.set, first.metric, names, share, better, chance, cells, test)


def _outcomes(result: Result, names: tuple[str, ...]) -> Outcomes | None:
    """A figure's outcomes, or None where there are none whose mean it is."""
    kept = result.outcomes.get("/".join(names))
    if kept is None or kept.ndim != 1 or not len(kept) or kept.dtype.kind not in "biuf":
        return None
    values = kept.astype(np.float64)
    if not abs(float(values.mean()) - result.figures[names].value) <= SAME_VALUE:
        return None
    beside = ["/".join((*names[:-1], "{}"))] if len(names) > 1 else []
    found = {
        kind: next(
            (result.outcomes[key] for start in [*beside, "{}"] if (key := start.format(kind)) in result.outcomes), None
        )
        for kind in ("query", "row", "group")
    }
    return Outcomes(values, tuple(found[kind] for kind in ("query", "row")), found["group"])


def _same_rows(a: Outcomes | None, b: Outcomes | None) -> bool:
    """Whether two runs' outcomes are of the same rows, as far as they say."""
    if a is None or b is None or a.values.shape != b.values.shape:
        return False
    mine, others = (*a.rows, a.groups), (*b.rows, b.groups)
    return all(x is None or y is None or np.array_equal(x, y) for x, y in zip(mine, others, strict=True))


def _leads(outcomes: Sequence[Outcomes | None], best: int, rivals: list[int], better: int) -> dict[int, Lead]:
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


def _apart(a: Figure, b: Figure) -> bool:
    return a.low > b.high or b.low > a.high
