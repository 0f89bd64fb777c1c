"""Results of versions that wrote no schema, as results of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modstruct.evaluation.result import Result, refuse_file


def converted(content: dict[str, Any], path: Path) -> Result:
    """A METRIC.json without "schema", its labels, units and directions by today's metrics of that name."""
    refuse_file(path, "older results are not read yet")
