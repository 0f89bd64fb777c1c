"""Zero-shot classification of images by the embeddings of class names in templates (Radford et al. 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modstruct import distributed
from modstruct.data.classification.prompts import PAPER_TEMPLATE
from modstruct.distributed.collect import share_out
from modstruct.errors import require
from modstruct.evaluation.classification.accuracy import accuracies, classes_ahead, in_top, with_interval
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Result, Value, share
from modstruct.evaluation.retrieval.rows import as_float32, block_rows, check_dimensions, check_rows, distinct_rows

SCORES_AT_ONCE = 1 << 24
"""Scores of one block of images: 64 MB of them."""
PROMPT_BYTES = 64 << 20
"""Of float64 prompts averaged at once."""
GROUPS = {"first": "First template", "ensemble": "Ensemble of templates"}


@dataclass(frozen=True)
class ZeroShotConfig:
    """What is counted."""

    top_k: tuple[int, ...] = (1, 3, 5)
    """A K above the number of classes is left out."""

    def __post_init__(self) -> None:
        require(all(k >= 1 for k in self.top_k), "zero_shot.top_k", self.top_k, "whole numbers of at least 1")


DEFAULT = ZeroShotConfig()


def measure(embedded: EmbeddedSet, config: ZeroShotConfig = DEFAULT) -> Result:
    """Top-k accuracy, accuracy averaged over classes and accuracy of each class, beside chance and with intervals.

    embedded: a set with labels and class prompts; images without label (-1) are left out. Values are grouped by
    `first`, the first template alone, and `ensemble`, the mean over templates, where there are several: over all of
    them, or over all but the first where that is the paper's own, so that CLIP's ensembles stay as published.
    Outcomes of each labelled image: row (of the set), label, group (the image, where some are copies, which intervals
    take together), and by templates `…/classes_ahead` and `…/top_K`. Ties count as in `images_ahead`. Raises ValueError
    if the set has no labels, no prompts or no labelled image.
    """
    labels, prompts, names = embedded.labels, embedded.class_prompts, embedded.class_names
    if labels is None or prompts is None:
        raise ValueError(f"{embedded.name}: the set has no classes; embed a set of labelled images")
    rows = np.flatnonzero(labels >= 0)
    require(len(rows) > 0, "labels", embedded.name, f"none of the {len(labels)} images has a label")
    truth, copies = np.asarray(labels[rows], dtype=np.int64), embedded.groups(rows)
    top_k = [k for k in config.top_k if k <= len(names)]
    values: dict[str, Value] = {}
    outcomes = {"row": rows, "label": truth} | ({} if copies is None else {"group": copies})
    templates = template_groups(embedded.templates)
    for group, chosen in templates.items():
        classes = class_embeddings(prompts[:, chosen])
        ahead = images_ahead(embedded.rows("image"), classes, truth, names, rows)
        found = accuracies(ahead, truth, len(names), top_k, copies) | _each_class(ahead < 1, truth, names, copies)
        values |= {f"{group}/{name}": value for name, value in found.items()}
        found_outcomes = {"classes_ahead": ahead.astype(np.int32)} | in_top(ahead, top_k)
        outcomes |= {f"{group}/{name}": outcome for name, outcome in found_outcomes.items()}
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


def template_groups(templates: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the templates in each group: `first`, and `ensemble` where there is more than one."""
    behind = list(range(1 if templates[0] == PAPER_TEMPLATE else 0, len(templates)))
    return {"first": [0]} | ({"ensemble": behind} if len(templates) > 1 else {})


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """(classes, templates, D) prompt embeddings -> (classes, D), unit norm, float32.

    The normalised mean over templates of the normalised embeddings (CLIP's prompt ensemble).
    """
    step = max(1, PROMPT_BYTES // (8 * prompts.shape[1] * prompts.shape[2]))
    parts = [prompts[first : first + step].astype(np.float64) for first in range(0, len(prompts), step)]
    return np.concatenate([_unit(_unit(part).mean(axis=1)).astype(np.float32) for part in parts])


def images_ahead(
    image: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Number of classes that score at least as high as each image's own, (n,) int64: below k means right in the top k.

    image: (N, D), float16 or float32, in memory or memory-mapped, read in blocks. classes: (c, D). truth: (n,), the
    class row of each image. names: of the classes. rows: (n,), the images' rows in `image`, ascending; None for all.
    A tie counts against the model, except between classes of one name, which no model can tell apart: the first of them
    goes ahead, as in an argmax. Scores are float32 products; equal rows have equal scores. Collective.
    """
    check_rows("class", classes)
    check_dimensions("image", image, "class", classes)
    rows = np.arange(len(image)) if rows is None else rows
    if len(rows) != len(truth) or not len(truth) or truth.min() < 0 or truth.max() >= len(classes):
        raise ValueError(f"truth: give one of 0 … {len(classes) - 1} for each of {len(rows)} images, at least one")
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
    if names is None:
        return ahead
    seen: Counter[tuple[int, str]] = Counter()
    later = np.zeros(len(classes), dtype=np.int64)  # classes of one name and embedding tie, and the later rank behind
    for c in reversed(range(len(classes))):
        later[c] = seen[place[c], names[c]]
        seen[place[c], names[c]] += 1
    return ahead - later[truth]


def _each_class(
    right: np.ndarray, truth: np.ndarray, names: Sequence[str], copies: np.ndarray | None
) -> dict[str, Value]:
    """Accuracy of each class that has an image, with the interval over its images."""
    order = np.argsort(truth, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(truth[order])) + 1)
    times = Counter(names)

    def one_class(rows: np.ndarray) -> tuple[str, Value]:
        number, groups = int(truth[rows[0]]), None if copies is None else copies[rows]
        label = names[number] if times[names[number]] == 1 else f"{names[number]} ({number})"
        value = share(right[rows].mean(), label=label, chance=1 / len(names), rows=len(rows))
        return f"per_class/{label.replace('/', '|')}", with_interval(value, right[rows], groups)

    return dict(share_out(members, one_class))


def _unit(rows: np.ndarray) -> np.ndarray:
    # A mean of opposite embeddings can be zero, and stays zero: no direction is better than another.
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
