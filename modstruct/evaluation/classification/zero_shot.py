"""Zero-shot classification: images sorted by the embeddings of class names in templates (Radford et al. 2021)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modstruct.data.classification.templates import PAPER_TEMPLATE
from modstruct.evaluation.retrieval.rows import check_dimensions, check_rows, distinct_rows, row_blocks

if TYPE_CHECKING:
    from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

SCORES_AT_ONCE = 1 << 24
"""Scores of one block of images: 64 MB of them."""
PROMPT_BYTES = 64 << 20
"""Of float64 prompts that are averaged at once."""
TOP_K = (1, 3, 5)
CPU = torch.device("cpu")


def measure_zero_shot(
    embedded: EmbeddedSet, top_k: Sequence[int] = TOP_K, device: torch.device = CPU
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Top-k accuracy, accuracy averaged over classes and accuracy of each class, beside chance and with intervals.

    embedded: a set with labels and class prompts; images without label (-1) are left out. The figures stand under
    `first`, by the first template alone, and `ensemble`, by the mean over the templates, where there are several: over
    all of them, or over those behind the paper's own where that is the first, so that CLIP's ensembles stay as
    published. device: where scores are formed. Memory: a block of images and its scores, whatever their number.
    Returns the metric (figures, settings, rows, source_fingerprint, seconds) and outcomes of each labelled image:
    row (of the set), label, and by templates `…/classes_ahead` and `…/top_K`. Ties count as in `classes_ahead`.
    Raises ValueError where the set has no labels, no prompts or no labelled image, and for a K below 1.
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
    figures, outcomes = {}, {"row": rows, "label": truth}
    groups = template_groups(embedded.templates)
    for group, chosen in groups.items():
        classes = class_embeddings(prompts[:, chosen].reshape(-1, prompts.shape[2]), len(chosen))
        ahead = classes_ahead(image, classes, truth, rows, same_names(names), device)
        figures[group] = _figures(ahead, truth, names, top_k)
        outcomes[f"{group}/classes_ahead"] = ahead.astype(np.int32)
        outcomes |= {f"{group}/top_{k}": ahead < k for k in top_k if k <= len(names)}
    metric = {
        "metric": "zero_shot",
        "set": embedded.name,
        "figures": figures,
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
    return metric, outcomes


def template_groups(templates: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the templates that are measured together: `first`, and `ensemble` where there is more than one."""
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
    image: np.ndarray, classes: np.ndarray, truth: np.ndarray, top_k: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Top-k accuracy of images among the classes, and top-1 accuracy averaged over classes, each beside chance.

    image: (n, D), classes: (c, D), float32. truth: (n,), the class row of each image.
    Returns {"top_1": {"value": …, "chance": …}, …, "mean_per_class": {…}}, shares from 0 to 1. A k above the number of
    classes is left out; classes without an image do not enter the average; a tie counts against the model.
    """
    truth = np.asarray(truth, dtype=np.int64)
    ahead = classes_ahead(image, classes, truth)
    figures = {
        f"top_{k}": {"value": float(np.mean(ahead < k)), "chance": k / len(classes)} for k in top_k if k <= len(classes)
    }
    return figures | {
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
    """Number of classes that score at least as high as each image's own, (n,) int64: below k is "right in the top k".

    image: (N, D), float16 or float32, in memory or memory-mapped, read in blocks. classes: (c, D). truth: (n,), the
    class row of each image. rows: (n,), the images' rows of image, ascending; None for all. A tie counts against
    the model, with one exception. same: (c,), equal for classes of one name, which no model can tell apart: of those
    the first goes ahead, as in an argmax. Scores are float32 products; equal rows have equal scores.
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
        pictures = image[rows[part]]
        check_rows("image", pictures)
        for offset, block in row_blocks(pictures):
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
    """(c,), for each class how many later ones have its name and its embedding; they tie with it, and go behind."""
    kinds = np.unique(np.stack([place, same], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    later, seen = np.zeros(len(same), dtype=np.int64), Counter()
    for c in range(len(same) - 1, -1, -1):
        later[c] = seen[kinds[c]]
        seen[kinds[c]] += 1
    return later


def _figures(ahead: np.ndarray, truth: np.ndarray, names: Sequence[str], top_k: Sequence[int]) -> dict[str, Any]:
    count = len(names)
    figures = {f"top_{k}": _figure((ahead < k), k / count) for k in top_k if k <= count}
    there, accuracy, pictures = _by_class(ahead < 1, truth)
    times = Counter(names)
    labels = [names[c] if times[names[c]] == 1 else f"{names[c]} ({c})" for c in there]
    figures["mean_per_class"] = {"value": float(accuracy.mean()), "chance": 1 / count, "rows": len(there)}
    figures["mean_per_class"] |= _mean_per_class_interval(ahead < 1, truth)
    figures["per_class"] = {
        label: {"value": float(value), "chance": 1 / count, "rows": int(rows)}
        for label, value, rows in zip(labels, accuracy, pictures, strict=True)
    }
    return figures


def _figure(right: np.ndarray, chance: float) -> dict[str, float]:
    low, high = _interval(right)
    return {"value": float(right.mean()), "chance": chance, "low": low, "high": high, "rows": len(right)}


def _interval(outcomes: np.ndarray) -> tuple[float, float]:
    from modstruct.evaluation.statistics import bootstrap_mean

    return bootstrap_mean(outcomes)


def _mean_per_class_interval(right: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Interval over images drawn with their classes, each weighted so that every class counts alike.

    What is resampled is the linear part of the mean of the classes' means, value + w (right - accuracy of the class).
    A class of one image shows nothing of how its images vary: with one, they are taken to vary as all images do.
    """
    there, accuracy, pictures = _by_class(right, truth)
    value = float(accuracy.mean())
    weight = len(right) / (len(there) * pictures[np.searchsorted(there, truth)])
    one_each, single = pictures.max() == 1, pictures.min() == 1
    centre = value if single else accuracy[np.searchsorted(there, truth)]
    alike = right.all() or not right.any() or one_each
    low, high = _interval(right if alike else value + weight * (right - centre))
    return {"low": max(0.0, low), "high": min(1.0, high)}


def _by_class(right: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes that have an image, ascending, and of each the share that is right and the number of images."""
    there, place, pictures = np.unique(truth, return_inverse=True, return_counts=True)
    return there, np.bincount(place.reshape(-1), weights=right) / pictures, pictures


def _unit(rows: np.ndarray) -> np.ndarray:
    # A mean of opposite embeddings can be zero: it stays zero, as no direction is better than another.
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
