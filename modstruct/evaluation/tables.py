"""Metrics as a JSON file, as a table for the terminal, and as flat scalars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from modstruct.errors import printable
from modstruct.files import atomic_write

RETRIEVAL_NAMES = {"text_to_image": "text -> image", "image_to_text": "image -> text"}


def save_metrics(metrics: dict, path: str | Path) -> None:
    """Write the metrics as JSON; the file is either complete or what it was before."""
    with atomic_write(Path(path).expanduser()) as file:
        file.write((json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())


def flatten(metrics: dict) -> dict[str, float]:
    """Nested metrics -> scalars for TensorBoard, such as "retrieval/text_to_image/recall_at_1" and "…_at_1_chance"."""
    flat = {}
    for name, value in metrics.items():
        if not isinstance(value, dict):
            flat[name] = float(value)
        elif "value" in value:
            flat[name] = value["value"]
            if "chance" in value:
                flat[f"{name}_chance"] = value["chance"]
        else:
            flat |= {f"{name}/{inner}": metric for inner, metric in flatten(value).items()}
    return flat


def validation_recall_at_1(metrics: dict) -> float:
    """Mean of both directions' recall at 1, from 0 to 1: the metric by which the best checkpoint is chosen."""
    directions = metrics["retrieval"].values()
    return sum(direction["recall_at_1"]["value"] for direction in directions) / len(directions)


def table(metrics: dict) -> str:
    """Metrics as plain text: every metric beside chance; then the structure, the sizes, and what was left out."""
    rows = [("task", "metric", "value %", "chance %", "times chance")]
    for stage, suffix in (("retrieval", ""), ("reranked", ", matched")):
        for direction, name in RETRIEVAL_NAMES.items():
            for metric, found in metrics.get(stage, {}).get(direction, {}).items():
                rows.append((f"{name}{suffix}", metric.replace("recall_at_", "R@"), *_percent(found)))
    for metric, found in metrics.get("zero_shot", {}).items():
        rows.append(("zero-shot", metric.replace("top_", "top-").replace("_", " "), *_percent(found)))

    structure = [("structure", "value")]
    structure += [(name.replace("_", " "), f"{value:.4f}") for name, value in metrics["structure"].items()]
    sizes = ", ".join(f"{number:,.0f} {name.replace('_', ' ')}" for name, number in metrics["sizes"].items())
    notes = [sizes.replace("images with", "samples with") if "samples" in metrics["sizes"] else sizes]
    if "classes" in metrics["sizes"] and "zero_shot" not in metrics:
        notes.append("zero-shot: left out, since no image has a label of the class file")
    if metrics["skipped"]:
        notes.append(
            printable("left out: " + ", ".join(f"{n:,.0f} {cause}" for cause, n in metrics["skipped"].items()))
        )
    notes.append(f"{metrics['seconds']['total']:.1f} s")
    return "\n\n".join([_aligned(rows, text_columns=2), _aligned(structure, text_columns=1), "\n".join(notes)])


def task_table(task: str, metrics: dict) -> str:
    """Metrics of a downstream task as plain text, each beside its prior where it has one; then the sizes."""
    rows = [("task", "metric", "value %", "prior %")]
    for metric, found in metrics.items():
        if isinstance(found, dict) and "value" in found:
            prior = f"{100 * found['chance']:.2f}" if "chance" in found else ""
            rows.append((task, metric.replace("_", " "), f"{100 * found['value']:.2f}", prior))
    notes = ", ".join(f"{number:,.0f} {name.replace('_', ' ')}" for name, number in metrics["sizes"].items())
    return f"{_aligned(rows, text_columns=2)}\n\n{notes}"


def _percent(metric: dict[str, float]) -> tuple[str, str, str]:
    value, chance = metric["value"], metric["chance"]
    return f"{100 * value:.2f}", f"{100 * chance:.2f}", f"{value / chance:.1f}"


def _aligned(rows: Sequence[tuple[str, ...]], text_columns: int) -> str:
    """Rows under a ruled head: text columns to the left, numbers to the right."""
    rows = [tuple(" ".join(printable(cell).split()) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
