"""Zero-shot classification of images by the embeddings of class names in templates (Radford et al. 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

from modstruct import distributed
from modstruct.data.classification.published import PAPER_TEMPLATE
from modstruct.distributed.collect import on_each, share_out
from modstruct.errors import require
from modstruct.evaluation.classification.accuracy import accuracies, classes_ahead, in_top, with_interval
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Result, Value, share
from modstruct.evaluation.retrieval.rows import as_float32, block_rows, check_dimensions, check_rows, distinct_rows

SCORES_AT_ONCE = 1 << 24
"""Scores of one block of images: 64 MB of them."""
GROUPS = {"first": "First template", "ensemble": "Ensemble of templates"}


@dataclass(frozen=True)
class ZeroShotConfig:
    """What is counted."""

    top_k: tuple[int, ...] = (1, 3, 5)
    """A K above the number of classes is left out."""
    metrics: Literal["all", "basic"] = "all"
    """basic: by the ensemble alone, or by the one template there is, and without the accuracy of each class."""

    def __post_init__(self) -> None:
        require(all(k >= 1 for k in self.top_k), "zero_shot.top_k", self.top_k, "whole numbers of at least 1")


DEFAULT = ZeroShotConfig()


def measure(embedded: EmbeddedSet, config: ZeroShotConfig = DEFAULT) -> Result:
    """Top-k accuracy, accuracy averaged over classes and accuracy of each class, beside chance and with intervals.

    Values are grouped by `first`, the first template alone, and `ensemble`, the mean over templates, where there are
    several: over all of them, or over all but the first where that is the paper's own, so that CLIP's ensembles stay as
    published. Outcomes of each labelled image: row, label, group (the image, where some are copies), and by templates
    `…/classes_ahead` and `…/top_K`. Raises ValueError for a set without labels or prompts.
    """
    labels, prompts, names = embedded.labels, embedded.class_prompts, embedded.class_names
    if labels is None or prompts is None:
        raise ValueError(f"{embedded.name}: the set has no classes; embed a set of labelled images")
    rows = np.flatnonzero(labels >= 0)
    require(len(rows) > 0, "labels", embedded.name, f"none of the {len(labels)} images has a label")
    truth, copies = labels[rows], embedded.groups(rows)
    top_k = [k for k in config.top_k if k <= len(names)]
    every = range(len(embedded.templates))
    ensemble = [t for t in every if t or embedded.templates[0] != PAPER_TEMPLATE]
    templates = {"first": [0]} | ({"ensemble": ensemble} if len(every) > 1 else {})
    if config.metrics == "basic":
        templates = dict([templates.popitem()])
    values: dict[str, Value] = {}
    outcomes = {"row": rows, "label": truth} | ({} if copies is None else {"group": copies})
    for group, chosen in templates.items():
        classes = on_each(partial(class_embeddings, prompts, chosen))
        ahead = images_ahead(embedded.rows("image"), rows, truth, classes, names)
        found = accuracies(ahead, truth, len(names), top_k, copies)
        if config.metrics == "all":
            found |= _each_class(ahead < 1, truth, names, copies)
        values |= {f"{group}/{name}": value for name, value in found.items()}
        outcomes[f"{group}/classes_ahead"] = ahead.astype(np.int32)
        outcomes |= {f"{group}/{name}": right for name, right in in_top(ahead, top_k).items()}
    return Result(
        "zero_shot",
        embedded.name,
        values,
        "Zero-shot classification",
        "An image goes to the class whose name lies nearest to it: the name in the first template alone, or the mean "
        "over the templates (the ensemble). A tie counts against the model.",
        {group: GROUPS[group] for group in templates}
        | {f"{group}/per_class": f"{GROUPS[group]}, each class" for group in templates},
        tuple(f"{group}/top_1" for group in templates),
        settings={
            "top_k": list(config.top_k),
            "templates": {group: [embedded.templates[t] for t in chosen] for group, chosen in templates.items()},
            "classes_of_one_name": sorted(name for name, times in Counter(names).items() if times > 1),
        },
        rows={"image": len(labels), "labelled": len(rows), "classes": len(names)},
        fingerprint=embedded.source.get("fingerprint"),
        outcomes=outcomes,
    )


def class_embeddings(prompts: np.ndarray, templates: Sequence[int]) -> np.ndarray:
    """(classes, templates, D) prompt embeddings -> (classes, D), unit norm, float32, finite.

    The normalised mean over the chosen templates of the normalised embeddings (CLIP's prompt ensemble). A mean of
    opposite embeddings is zero and stays so: no direction is better than another.
    """

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    classes = np.stack([unit(unit(row[templates].astype(np.float64)).mean(0)) for row in prompts]).astype(np.float32)
    check_rows("class", classes)
    return classes


def images_ahead(
    image: np.ndarray, rows: np.ndarray, truth: np.ndarray, classes: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Number of classes that score at least as high as each image's own, (n,) int64: below k means right in the top k.

    image: (N, D), read in blocks. rows: (n,), those to classify, ascending. truth: (n,), the class of each. classes:
    (c, D), with their names. A tie counts against the model, except between classes of one name and embedding, which no
    model can tell apart: the first of them goes ahead, as in an argmax. Scores are float32 products. Collective.
    """
    check_dimensions("image", image, "class", classes)
    # Equal rows can get scores that differ in the last bit by their place in a matrix product, so each is scored once.
    device = distributed.device()
    first, place, occurrences = distinct_rows(classes)
    distinct = as_float32(classes[first]).to(device).T
    times = torch.from_numpy(occurrences).to(device) if len(first) < len(classes) else None
    at_once = max(1, min(SCORES_AT_ONCE // len(first), block_rows(image.shape[1])))

    def block_ahead(start: int) -> np.ndarray:
        part = slice(start, start + at_once)
        images, own = image[rows[part]], torch.from_numpy(place[truth[part]]).to(device)
        check_rows("image", images)
        return classes_ahead(as_float32(images).to(device) @ distinct, own, times).cpu().numpy()

    ahead = np.concatenate(share_out(range(0, len(rows), at_once), block_ahead))
    seen: Counter[tuple[int, str]] = Counter()
    later = np.zeros(len(classes), dtype=np.int64)
    for c in reversed(range(len(classes))):
        later[c] = seen[place[c], names[c]]
        seen[place[c], names[c]] += 1
    return ahead - later[truth]


def _each_class(
    right: np.ndarray, truth: np.ndarray, names: Sequence[str], copies: np.ndarray | None
) -> dict[str, Value]:
    """Accuracy of each class that has an image, with the interval over its images."""
    times = Counter(names)

    def one_class(number: int) -> tuple[str, Value]:
        rows = np.flatnonzero(truth == number)
        label = names[number] if times[names[number]] == 1 else f"{names[number]} ({number})"
        value = share(right[rows].mean(), label=label, chance=1 / len(names), rows=len(rows))
        interval = with_interval(value, right[rows], None if copies is None else copies[rows])
        return f"per_class/{label.replace('/', '|')}", interval

    return dict(share_out(np.unique(truth).tolist(), one_class))
