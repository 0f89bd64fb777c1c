"""What stands out: the figures that stand for each task, and in words which runs are shown to be ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modstruct.reporting.comparison import Row, Section
from modstruct.reporting.loading import Evaluation
from modstruct.reporting.vocabulary import Task, humanised, label, lowered, shown

SHOWN_FINDINGS = 8


@dataclass(frozen=True)
class Headline:
    """A row of the summary, and what it is called there."""

    task: Task
    row: Row

    @property
    def figure(self) -> str:
        return label(self.row.names)

    @property
    def name(self) -> str:
        """In a sentence."""
        first, *others = [part for part in (self.task.short, *map(humanised, self.row.names)) if part]
        return f"{', '.join([first, *map(lowered, others)])} on {self.row.set}"


def headlines(sections: Sequence[Section]) -> list[Headline]:
    """Of each task in which one direction is better and each set the figures that stand for it, or else the first."""
    found = []
    for section in sections:
        for set_name in dict.fromkeys(group.set for group in section.groups):
            rows = [row for row in section.rows if row.set == set_name and row.better]
            wanted = [row for name in section.task.headlines for row in rows if "/".join(row.names) == name]
            found += [Headline(section.task, row) for row in wanted or rows[:1]]
    return found


def findings(chosen: Sequence[Headline], runs: Sequence[Evaluation]) -> list[str]:
    """Sentences on the headline figures: first those in which a run is shown to be ahead, then one on the others."""
    sentences = [sentence for headline in chosen if (sentence := _finding(headline, runs))]
    hidden = len(sentences) - SHOWN_FINDINGS
    if hidden > 1:
        sentences = [*sentences[:SHOWN_FINDINGS], f"{hidden} further figures in which a run is ahead: see the table."]
    undecided = [f"{h.name}" for h in chosen if h.row.test and not _marked(h.row)]
    if undecided:
        sentences.append(f"No run is shown to be ahead of another on {_listed(undecided)}.")
    untested = [f"{h.name}" for h in chosen if len(_measured(h.row)) > 1 and not h.row.test]
    if untested:
        sentences.append(f"Not tested, for want of intervals or of the same data: {_listed(untested)}.")
    return sentences


def _finding(headline: Headline, runs: Sequence[Evaluation]) -> str | None:
    row = headline.row
    measured = _measured(row)
    unit = "\u00a0%" if row.share else ""
    if len(measured) == 1:
        i = measured[0]
        value = row.cells[i].figure.value
        beside = "" if row.chance is None else f" (chance {shown(row.chance, row.share)}{unit})"
        return f"{headline.name}: {runs[i].name} reaches {shown(value, row.share)}{unit}{beside}."
    ahead = _marked(row)
    if not ahead:
        return None
    behind = [i for i in measured if i not in ahead]
    others = _listed([runs[i].name for i in behind])
    value = f"{shown(row.cells[row.best].figure.value, row.share)}{unit}"
    if len(ahead) > 1:
        names = _listed([runs[i].name for i in sorted(ahead, key=lambda i: i != row.best)])
        return f"{headline.name}: {names} (up to {value}) are not told apart, and ahead of {others}."
    nearest = max(behind, key=lambda i: row.better * row.cells[i].figure.value)
    start = f"{headline.name}: {runs[row.best].name} reaches {value}"
    lead = row.cells[nearest].lead
    if lead is None:
        return f"{start}, ahead of {others} by intervals that do not overlap."
    difference, low, high = (shown(number, row.share) for number in (lead.difference, lead.low, lead.high))
    points = "\u00a0points" if row.share else ""
    next_best = ", the next best" if len(behind) > 1 else ""
    return f"{start}, {difference}{points} [{low},\u00a0{high}] ahead of {runs[nearest].name}{next_best}."


def _measured(row: Row) -> list[int]:
    return [i for i, cell in enumerate(row.cells) if cell]


def _marked(row: Row) -> list[int]:
    return [i for i, cell in enumerate(row.cells) if cell and cell.marked]


def _listed(names: Sequence[str]) -> str:
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


def notes(sections: Sequence[Section], runs: Sequence[Evaluation]) -> Iterator[str]:
    """What a reader must know before comparing: other data, leaks, and results that only some runs have."""
    for section in sections:
        if section.metric == "leakage":
            yield from _leaks(section, runs)
        said = dict.fromkeys((group.set, group.note) for group in section.groups if group.note)
        for set_name, note in said:
            yield f"{section.task.title}, {set_name}. {note}"
        for set_name in dict.fromkeys(group.set for group in section.groups):
            lacking = [run.name for run in runs if (set_name, section.metric) not in run.results]
            if lacking:
                yield f"{section.task.title} on {set_name} was not measured for {_listed(lacking)}."


def _leaks(section: Section, runs: Sequence[Evaluation]) -> Iterator[str]:
    """Of each set the largest share that was found in what a run was trained on."""
    for set_name in dict.fromkeys(group.set for group in section.groups):
        rows = [row for row in section.rows if row.set == set_name and row.share]
        by_share: dict[str, list[str]] = {}
        for i, run in enumerate(runs):
            found = max((row.cells[i].figure.value for row in rows if row.cells[i]), default=0)
            if found > 0:
                by_share.setdefault(shown(found, True), []).append(run.name)
        for share, names in by_share.items():
            trained = f"{_listed(names)} {'was' if len(names) == 1 else 'were'} trained on"
            yield f"Leakage: {share}\u00a0% of {set_name} also occur in what {trained}."
