"""Zero-shot classification of images by the embeddings of class names in templates (Radford et al. 2021)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modstruct.data.classification.prompts import PAPER_TEMPLATE
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.rows import check_dimensions, check_rows, distinct_rows, row_blocks
from modstruct.evaluation.statistics import bootstrap_mean

SCORES_AT_ONCE = 1 << 24
"""Scores of one block of images: 64 MB of them."""
PROMPT_BYTES = 64 << 20
"""Of float64 prompts averaged at once."""
TOP_K = (1, 3, 5)
CPU = torch.device("cpu")


def measure_zero_shot(
    embedded: EmbeddedSet, top_k: Sequence[int] = TOP_K, device: torch.device = CPU
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Top-k accuracy, accuracy averaged over classes and accuracy of each class, beside chance and with intervals.

    embedded: a set with labels and class prompts; images without label (-1) are left out. Metrics are grouped by
    `first`, the first template alone, and `ensemble`, the mean over templates, where there are several: over all of
    them, or over all but the first where that is the paper's own, so that CLIP's ensembles stay as published. device:
    where scores are computed. Memory: a block of images and its scores.
    Returns the content of METRIC.json but for "command", and outcomes of each labelled image: row (of the set), label,
    group (the image, where some are copies, which intervals take together), and by templates `…/classes_ahead` and
    `…/top_K`. Ties count as in `classes_ahead`. Raises ValueError if the set has no labels, no prompts or no labelled
    image, and for a K below 1.
    """
    started = time.monotonic()
    image, prompts, labels = embedded.rows("image"), embedded.class_prompts, embedded.labels
    if labels is None or prompts is None:
        raise ValueError(f"{embedded.folder}: the set has no classes; embed a set of labelled images")
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise ValueError(f"{embedded.folder}: none of the {len(labels)} images has a label")
    bad = next((k for k in top_k if k < 1), None)
    if bad is not None:
        raise ValueError(f"top_k = {bad}: give whole numbers of at least 1")
    truth, names = np.asarray(labels[rows]), embedded.class_names
    metrics: dict[str, Any] = {}
    outcomes = {"row": rows, "label": truth}
    copies = embedded.groups(rows)
    if copies is not None:
        outcomes["group"] = copies
    groups = template_groups(embedded.templates)
    for group, chosen in groups.items():
        classes = class_embeddings(prompts[:, chosen].reshape(-1, prompts.shape[2]), len(chosen))
        ahead = classes_ahead(image, classes, truth, rows, same_names(names), device)
        metrics[group] = _metrics(ahead, truth, names, top_k, copies)
        outcomes[f"{group}/classes_ahead"] = ahead.astype(np.int32)
        outcomes |= {f"{group}/top_{k}": ahead < k for k in top_k if k <= len(names)}
    result = {
        "metric": "zero_shot",
        "set": embedded.name,
        "figures": metrics,
        "curves": {},
        "settings": {
            "top_k": list(top_k),
            "templates": {group: [embedded.templates[t] for t in chosen] for group, chosen in groups.items()},
            "classes_of_one_name": sorted(name for name, times in Counter(names).items() if times > 1),
        },
        "rows": {"image": len(labels), "labelled": len(rows), "classes": len(names)},
        "source_fingerprint": embedded.source.get("fingerprint"),
        "seconds": time.monotonic() - started,
    }
    return result, outcomes


def template_groups(templates: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the templates in each group: `first`, and `ensemble` where there is more than one."""
    behind = list(range(1 if templates[0] == PAPER_TEMPLATE else 0, len(templates)))
    return {"first": [0]} | ({"ensemble": behind} if len(templates) > 1 else {})


def class_embeddings(prompts: np.ndarray, templates: int) -> np.ndarray:
    """(classes x templates, D) prompt embeddings, class by class -> (classes, D), unit norm.

    The normalised mean over templates of the normalised embeddings (CLIP's prompt ensemble).
    """
    prompts = prompts.reshape(-1, templates, prompts.shape[1])
    step = max(1, PROMPT_BYTES // (8 * templates * prompts.shape[2]))
    parts = [prompts[first : first + step].astype(np.float64) for first in range(0, len(prompts), step)]
    return np.concatenate([_unit(_unit(part).mean(axis=1)).astype(np.float32) for part in parts])


def zero_shot(
    image: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray,
    top_k: Sequence[int],
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Top-k accuracy of images among the classes, and top-1 accuracy averaged over classes, each beside chance.

    image: (n, D), classes: (c, D), float32. truth: (n,), the class row of each image. names: of the classes, where
    some may be equal.
    Returns {"top_1": {"value": …, "chance": …}, …, "mean_per_class": {…}}, shares from 0 to 1. A k above the number of
    classes is left out; classes without an image do not enter the average; a tie counts against the model, except
    between classes of one name.
    """
    truth = np.asarray(truth, dtype=np.int64)
    ahead = classes_ahead(image, classes, truth, same=None if names is None else same_names(names))
    metrics = {
        f"top_{k}": {"value": float(np.mean(ahead < k)), "chance": k / len(classes)} for k in top_k if k <= len(classes)
    }
    return metrics | {
        "mean_per_class": {"value": float(np.mean(_by_class(ahead < 1, truth)[1])), "chance": 1 / len(classes)}
    }


def classes_ahead(
    image: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray,
    rows: np.ndarray | None = None,
    same: np.ndarray | None = None,
    device: torch.device = CPU,
) -> np.ndarray:
    """Number of classes that score at least as high as each image's own, (n,) int64: below k means right in the top k.

    image: (N, D), float16 or float32, in memory or memory-mapped, read in blocks. classes: (c, D). truth: (n,), the
    class row of each image. rows: (n,), the images' rows in `image`, ascending; None for all. same: (c,), equal for
    classes of one name. A tie counts against the model, except between classes of one name, which no model can tell
    apart: the first of them goes ahead, as in an argmax. Scores are float32 products; equal rows have equal scores.
    """
    check_rows("class", classes)
    check_dimensions("image", image, "class", classes)
    rows = np.arange(len(image)) if rows is None else rows
    if len(rows) != len(truth) or not len(truth) or truth.min() < 0 or truth.max() >= len(classes):
        raise ValueError(f"truth: give one of 0 … {len(classes) - 1} for each of {len(rows)} images, at least one")
    # Equal rows can get scores that differ in the last bit by their place in a matrix product, so each is scored once.
    first, place, occurrences = distinct_rows(classes)
    distinct = next(row_blocks(classes[first], len(first)))[1].to(device).T
    weights = torch.from_numpy(occurrences).to(device)
    own = torch.from_numpy(place[truth]).to(device)
    ahead = np.empty(len(rows), dtype=np.int64)
    at_once = max(1, SCORES_AT_ONCE // len(first))
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        images = image[rows[part]]
        check_rows("image", images)
        for offset, block in row_blocks(images):
            one = slice(start + offset, start + offset + len(block))
            scores = block.to(device) @ distinct  # (b, distinct classes)
            high = scores >= scores.gather(1, own[one, None])
            ahead[one] = ((high * weights).sum(1) - 1).cpu().numpy()
    return ahead if same is None else ahead - _later_of_one_name(place, same)[truth]


def same_names(names: Sequence[str]) -> np.ndarray:
    """(c,), equal for classes of one name."""
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int64)


def _later_of_one_name(place: np.ndarray, same: np.ndarray) -> np.ndarray:
    """(c,), for each class the number of later ones with its name and embedding, which tie with it and rank behind."""
    kinds = np.unique(np.stack([place, same], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    later = np.zeros(len(same), dtype=np.int64)
    seen: Counter[int] = Counter()
    for c in range(len(same) - 1, -1, -1):
        later[c] = seen[kinds[c]]
        seen[kinds[c]] += 1
    return later


def _metrics(
    ahead: np.ndarray, truth: np.ndarray, names: Sequence[str], top_k: Sequence[int], copies: np.ndarray | None
) -> dict[str, Any]:
    count = len(names)
    metrics: dict[str, Any] = {f"top_{k}": _accuracy(ahead < k, k / count, copies) for k in top_k if k <= count}
    there, accuracy, images = _by_class(ahead < 1, truth)
    times = Counter(names)
    labels = [names[c] if times[names[c]] == 1 else f"{names[c]} ({c})" for c in there]
    metrics["mean_per_class"] = {"value": float(accuracy.mean()), "chance": 1 / count, "rows": len(there)}
    metrics["mean_per_class"] |= _mean_per_class_interval(ahead < 1, truth, copies)
    metrics["per_class"] = {
        label: {"value": float(value), "chance": 1 / count, "rows": int(rows)}
        for label, value, rows in zip(labels, accuracy, images, strict=True)
    }
    return metrics


def _accuracy(right: np.ndarray, chance: float, copies: np.ndarray | None) -> dict[str, float]:
    low, high = bootstrap_mean(right, groups=copies)
    return {"value": float(right.mean()), "chance": chance, "low": low, "high": high, "rows": len(right)}


def _mean_per_class_interval(
    right: np.ndarray, truth: np.ndarray, copies: np.ndarray | None = None
) -> dict[str, float]:
    """Interval over resampled images, each weighted so that every class counts alike.

    The linear part of the mean of the classes' means is resampled, value + w (right - accuracy of the class). A class
    of one image says nothing of how its images vary: if there is one, images are taken to vary alike in all classes.
    """
    there, accuracy, images = _by_class(right, truth)
    value = float(accuracy.mean())
    weight = len(right) / (len(there) * images[np.searchsorted(there, truth)])
    one_each, single = images.max() == 1, images.min() == 1
    centre = value if single else accuracy[np.searchsorted(there, truth)]
    alike = right.all() or not right.any() or one_each
    low, high = bootstrap_mean(right if alike else value + weight * (right - centre), groups=copies)
    return {"low": max(0.0, low), "high": min(1.0, high)}


def _by_class(right: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes that have an image, ascending, and the accuracy and number of images of each."""
    there, place, images = np.unique(truth, return_inverse=True, return_counts=True)
    return there, np.bincount(place.reshape(-1), weights=right) / images, images


def _unit(rows: np.ndarray) -> np.ndarray:
    # A mean of opposite embeddings can be zero, and stays zero: no direction is better than another.
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
