"""What files an embedded set consists of (see embedded_set.py), and what its manifest must say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from modstruct.config import refuse

FORMAT = 1
MANIFEST = "manifest.json"
IMAGE_ARRAYS = ("image", "image_features", "image_independent", "image_augmented")
TEXT_ARRAYS = ("text", "text_features", "text_independent")
FEATURE_ARRAYS = frozenset({"image_features", "text_features"})
TABLES = ("pairs", "indices", "labels", "class_prompts")
LISTS = {"keys": "image", "metadata": "image", "captions": "text"}
"""Files of one JSON value a line, and whose rows they follow."""
CLASSES_FILE = "classes.json"


def check_manifest(manifest: dict, path: Path) -> None:
    """Refuse a manifest that `write_embedded_set` cannot have written."""

    def shapes(of: str, known: Sequence[str]) -> bool:
        found = manifest.get(of)
        return isinstance(found, dict) and all(
            name in known and isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
            for name, shape in found.items()
        )

    rows = manifest.get("rows")
    sound = (
        isinstance(manifest.get("name"), str)
        and isinstance(manifest.get("model"), dict)
        and isinstance(manifest.get("source"), (dict, type(None)))
        and isinstance(rows, dict)
        and all(type(rows.get(modality)) is int for modality in ("image", "text"))
        and shapes("arrays", (*IMAGE_ARRAYS, *TEXT_ARRAYS))
        and shapes("tables", TABLES)
        and "image" in manifest["arrays"]
    )
    if not sound:
        damaged(path, "name, model, rows, arrays or tables are missing or of another kind")


def damaged(path: Path, cause: str) -> NoReturn:
    """Refuse a file of a set that cannot be what its writer wrote."""
    refuse(
        "embedded set", str(path), f"is damaged ({' '.join(cause.split())[:200]}): embed the set anew with --overwrite"
    )
