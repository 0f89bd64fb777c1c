"""Zero-shot classification: pictures sorted by the embeddings of class names in templates (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from modstruct.evaluation.ranking import items_ahead
from modstruct.yaml_files import read_yaml


@dataclass(frozen=True)
class ZeroShotClasses:
    """A class file: the field of a sample's metadata that holds its label, templates, and the name of each label."""

    label: str
    templates: tuple[str, ...]
    classes: dict[str, str]

    @property
    def prompts(self) -> list[str]:
        """Every name in every template, class by class: (classes x templates)."""
        return [template.replace("{}", name) for name in self.classes.values() for template in self.templates]

    def rows_of(self, metadata: Iterable[dict]) -> np.ndarray:
        """Class row of each sample, (n,) int64; -1 where its metadata has no label, or null.

        Raises ValueError for a label that is not among the classes.
        """
        row = {label: number for number, label in enumerate(self.classes)}
        values = [fields.get(self.label) for fields in metadata]
        unknown = next((v for v in values if v is not None and str(v) not in row), None)
        if unknown is not None:
            raise ValueError(
                f"the label {self.label} = {unknown!r} of a sample is not among the classes {_some(self.classes)}: "
                "add it to `classes` of the zero-shot file, or make it null in the sample's json"
            )
        return np.array([-1 if v is None else row[str(v)] for v in values], dtype=np.int64)


def load_classes(path: str | Path) -> ZeroShotClasses:
    """Read and check a zero-shot class file: YAML with `label`, `templates` and `classes`.

    Raises FileNotFoundError or ValueError, naming the file, the key and what would be right.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.zero_shot = {str(path)!r}: there is no such file; give a YAML file, or null")
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a YAML file in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: write the three keys label, templates and classes at the top level")
    unknown = sorted(str(key) for key in content.keys() - {"label", "templates", "classes"})
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; the keys are label, templates and classes")

    label, templates, classes = (content.get(key) for key in ("label", "templates", "classes"))
    if not isinstance(label, str) or not label:
        _refuse(path, "label", label, "the name of a field of each sample's json, as text")
    if not isinstance(templates, list) or not templates:
        _refuse(path, "templates", templates, 'a list of at least one text, such as "a picture of a {}"')
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            _refuse(path, "templates", template, "a text with exactly one {}, where the name of the class goes")
    if not isinstance(classes, dict) or len(classes) < 2:
        _refuse(path, "classes", classes, "a mapping of at least two labels to readable names")
    for value, name in classes.items():
        if not isinstance(name, str) or not name.strip():
            _refuse(path, f"classes.{value}", name, "a readable name, as text (in quotes if YAML reads it otherwise)")
    # Labels are compared as text, so that 3 in YAML and "3" in a sample's json are the same class.
    named = {str(value): name for value, name in classes.items()}
    if len(named) < len(classes):
        _refuse(path, "classes", list(classes), "labels that differ as text")
    return ZeroShotClasses(label, tuple(templates), named)


def class_embeddings(prompts: np.ndarray, templates: int) -> np.ndarray:
    """(classes x templates, D) prompt embeddings, class by class -> (classes, D), unit norm.

    The normalised mean over templates of the normalised embeddings (CLIP's prompt ensemble).
    """
    prompts = prompts.astype(np.float64).reshape(-1, templates, prompts.shape[1])
    return _unit(_unit(prompts).mean(axis=1)).astype(np.float32)


def zero_shot(
    image: np.ndarray, classes: np.ndarray, truth: np.ndarray, top_k: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Top-k accuracy of pictures among the classes, and top-1 accuracy averaged over classes, each beside chance.

    image: (n, D), classes: (c, D), float32. truth: (n,), the class row of each picture.
    Returns {"top_1": {"value": …, "chance": …}, …, "mean_per_class": {…}}, shares from 0 to 1. A k above the number of
    classes is left out; classes without a picture do not enter the average; a tie counts against the model.
    """
    truth = np.asarray(truth, dtype=np.int64)
    kept = [k for k in top_k if k <= len(classes)]
    pairs = np.stack([np.arange(len(truth)), truth], axis=1)
    ahead = items_ahead(image, classes, pairs)
    figures = {f"top_{k}": {"value": float(np.mean(ahead < k)), "chance": k / len(classes)} for k in kept}
    per_class = [np.mean(ahead[truth == c] < 1) for c in np.unique(truth)]
    return figures | {"mean_per_class": {"value": float(np.mean(per_class)), "chance": 1 / len(classes)}}


def _unit(rows: np.ndarray) -> np.ndarray:
    # A mean of opposite embeddings can be zero: it stays zero, as no direction is better than another.
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _some(classes: dict[str, str], shown: int = 10) -> str:
    labels = list(classes)
    return ", ".join(labels[:shown]) + (f", … ({len(labels)} in all)" if len(labels) > shown else "")


def _refuse(path: Path, key: str, value: object, remedy: str) -> NoReturn:
    raise ValueError(f"{path}: {key} = {value!r}: give {remedy}")
