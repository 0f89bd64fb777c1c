"""Class files: the field of a sample's metadata that holds its label, the names of the labels, and prompt templates.

The user's own sets (user_sets) have the same keys, and others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modstruct.errors import refuse
from modstruct.files import RepeatedKey, read_yaml

KEYS = ("label", "templates", "classes")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroShotClasses:
    """What a class file says, checked. classes: readable name by label, which is text; file: what messages call it."""

    label: str
    templates: tuple[str, ...]
    classes: dict[str, str]
    file: str = "the class file"

    @property
    def remedy(self) -> str:
        """For a label that is not among the classes."""
        return f"add it to `classes` of {self.file}, or make it null in KEY.json"

    def label_of(self, fields: dict) -> str | None:
        """The label of a sample as the classes have it, if they do; None where it has no label, or null."""
        value = fields.get(self.label)
        if isinstance(value, bool) and str(value) not in self.classes:
            return str(value).lower()  # as YAML and JSON write it
        return None if value is None else str(value)

    def rows_of(self, metadata: Iterable[dict]) -> np.ndarray:
        """Class row of each sample by its metadata, (n,) int64; -1 where that has no label, or null.

        Raises ValueError for a label that is not among the classes.
        """
        row_of: dict[str | None, int] = {None: -1} | {label: row for row, label in enumerate(self.classes)}
        labels = [self.label_of(fields) for fields in metadata]
        if unknown := [label for label in labels if label not in row_of]:
            told = f"the label {self.label} = {unknown[0]!r} of a sample is not among the classes"
            raise ValueError(f"{told} {some_of(self.classes)}: {self.remedy}")
        return np.array([row_of[label] for label in labels], dtype=np.int64)


def load_classes(path: str | Path) -> ZeroShotClasses:
    """Read and check a class file. Raises FileNotFoundError or ValueError, naming file, key and what would be right."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.zero_shot = {str(path)!r}: there is no such file; give a YAML file, or null")
    content = read_keys(path, KEYS)
    label, templates, classes = (content.get(key) for key in KEYS)
    if not isinstance(label, str) or not label:
        refuse(f"{path}: label", label, "give the name of a field of each sample's json, as text")
    return ZeroShotClasses(label, check_templates(path, templates), check_classes(path, classes), str(path))


def read_keys(path: Path, keys: Sequence[str], old_names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A YAML file that may have these keys at its top level; ValueError names it. old_names: keys by former names."""
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
    try:
        content = read_yaml(path)
    except ValueError as error:
        about = "" if isinstance(error, RepeatedKey) else "not a YAML file in UTF-8: "
        raise ValueError(f"{path}: {about}{error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: write the keys {listed} at the top level")
    for old, key in (old_names or {}).items():
        if old in content and key not in content:
            log.warning("%s: the key %r is now called %r; the old name is still read", path, old, key)
            content[key] = content.pop(old)
    if unknown := sorted(str(key) for key in content.keys() - set(keys)):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; the keys are {listed}")
    return content


def check_templates(path: Path, templates: Any) -> tuple[str, ...]:
    if not isinstance(templates, list) or not templates:
        refuse(f"{path}: templates", templates, 'give a list of at least one text, such as "an image of a {}"')
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            refuse(f"{path}: templates", template, "give a text with exactly one {}, where the name of the class goes")
    return tuple(templates)


def check_classes(path: Path, classes: Any) -> dict[str, str]:
    """Name of each label, as text: 3 in YAML and "3" in a sample's json are one label."""
    if not isinstance(classes, dict) or len(classes) < 2:
        refuse(f"{path}: classes", classes, "give a mapping of at least two labels to readable names")
    for label, name in classes.items():
        if not isinstance(name, str) or not name.strip():
            remedy = "give a readable name, as text (in quotes, where YAML takes a word for something else: no, 2024)"
            refuse(f"{path}: classes.{label}", name, remedy)
    return {str(label): name for label, name in classes.items()}


def some_of(texts: Iterable[str], shown: int = 10) -> str:
    """The first texts, and how many there are."""
    labels = list(texts)
    return ", ".join(labels[:shown]) + (f", … ({len(labels)} in all)" if len(labels) > shown else "")
