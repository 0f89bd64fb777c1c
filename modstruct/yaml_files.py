"""YAML of others (recipes, class files): plain values only, and no more of them than the file is long."""

from __future__ import annotations

from pathlib import Path

import yaml

LARGEST_FILE_BYTES = 4 << 20
# A few aliases of aliases stand for more values than any memory holds ("a billion laughs").
MOST_VALUES = 1_000_000


def read_yaml(path: Path) -> object:
    """The content of a YAML file in UTF-8. Raises ValueError that says what is wrong with it, or OSError."""
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE_BYTES + 1)
    if len(content) > LARGEST_FILE_BYTES:
        raise ValueError(f"larger than {LARGEST_FILE_BYTES >> 20} MiB")
    try:
        value = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    _require_finite(value)
    return value


def _require_finite(value: object) -> None:
    waiting, seen = [value], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if isinstance(node, (dict, list)):
            waiting += [*node, *node.values()] if isinstance(node, dict) else node
        if seen + len(waiting) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
