"""Results of one pass over a source: as a JSON file, as a table for the terminal, and as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from modstruct.errors import printable
from modstruct.evaluation.result import SCHEMA, Result, Value
from modstruct.files import write_json

ROWS = {"image": "images", "text": "captions", "labelled": "labelled images", "train": "training images"}
"""What is counted, as tables call it."""


def save_results(results: Iterable[Result], path: str | Path) -> None:
    """Write {"schema": …, "results": {metric: Result}} as JSON; the file is either complete or what it was before."""
    content = {"schema": SCHEMA, "results": {result.metric: result.to_json() for result in results}}
    write_json(Path(path).expanduser(), content)


def scalars(results: Iterable[Result]) -> dict[str, float]:
    """Every value, such as "retrieval/text_to_image/recall_at_1", and its chance, "…_at_1_chance"."""
    found = {}
    for result in results:
        for name, value in result.values.items():
            found[f"{result.metric}/{name}"] = value.value
            if value.chance is not None:
                found[f"{result.metric}/{name}_chance"] = value.chance
    return found


def table(results: Sequence[Result]) -> str:
    """Shares in percent beside chance, with 95 % intervals; other values; what was counted, and what was left out."""
    shares = [("task", "metric", "value %", "95 % interval", "chance %", "times chance")]
    others = [("structure", "value")]
    for result in results:
        for group, values in result.grouped.items():
            for name, value in values.items():
                label = value.label or name.replace("_", " ")
                if value.unit == "share":
                    shares.append((result.groups.get(group) or result.title, label, *_percent(value)))
                else:
                    others.append((label, f"{value.value:.4f}"))
    tables = [_aligned(rows, text_columns) for rows, text_columns in ((shares, 2), (others, 1)) if len(rows) > 1]
    counts = {ROWS.get(name, name): number for result in results for name, number in result.rows.items()}
    left_out = {cause: n for result in results for cause, n in result.settings.get("left_out", {}).items()}
    notes = [
        ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items() if "queries" not in name)
    ]
    if left_out:
        notes.append(printable("left out: " + ", ".join(f"{n:,} {cause}" for cause, n in left_out.items())))
    if seconds := sum(result.seconds or 0.0 for result in results):
        notes.append(f"{seconds:.1f} s")
    return "\n\n".join([*tables, "\n".join(notes)])


def _percent(value: Value) -> tuple[str, str, str, str]:
    interval = chance = times = ""
    if value.low is not None and value.high is not None:
        interval = f"{100 * value.low:.2f} to {100 * value.high:.2f}"
    if value.chance is not None:
        chance, times = f"{100 * value.chance:.2f}", f"{value.value / value.chance:.1f}" if value.chance else ""
    return f"{100 * value.value:.2f}", interval, chance, times


def _aligned(rows: Sequence[tuple[str, ...]], text_columns: int) -> str:
    """Rows under a ruled head, without empty columns: text columns to the left, numbers to the right."""
    rows = [tuple(" ".join(printable(cell).replace("→", "->").split()) for cell in row) for row in rows]
    columns = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in columns}
    lines = [
        "  ".join(row[c].ljust(widths[c]) if c < text_columns else row[c].rjust(widths[c]) for c in columns).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths.values()), *lines[1:]])
