"""Accuracy of a classification: from scores to how many classes lie ahead, and from those to values with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from modstruct.evaluation.result import Value, share
from modstruct.evaluation.statistics import bootstrap_mean, wilson


def classes_ahead(scores: Tensor, own: Tensor, times: Tensor | None = None) -> Tensor:
    """How many other classes score at least as high as each row's own, (b,) int64: below k means right in the top k.

    scores: (b, C). own: (b,), the column of each row's class. times: (C,), how many classes share a column, by default
    one. A tie counts against the model, and so does a score that is no number.
    """
    ahead = ~(scores < scores.gather(1, own[:, None]))
    return (ahead if times is None else ahead * times).sum(1) - 1


def in_top(ahead: np.ndarray, top_k: Sequence[int]) -> dict[str, np.ndarray]:
    """Whether each row is right, of the shape of ahead, by the name of the accuracy."""
    return {f"top_{k}": ahead < k for k in top_k}


def accuracies(
    ahead: np.ndarray,
    truth: np.ndarray,
    classes: int,
    top_k: Sequence[int],
    copies: np.ndarray | None = None,
    intervals: bool = True,
) -> dict[str, Value]:
    """Top-k accuracy for each k, and top-1 accuracy averaged over classes, beside chance, with 95 % intervals.

    ahead: (n,), as `classes_ahead` gives. truth: (n,), the class of each row. copies: (n,), equal for rows of one
    image. Classes without a row do not enter the average. Its interval resamples the linear part of the mean of the
    classes' means, value + w (right - accuracy of the class), w such that every class counts alike. If a class has one
    image, which says nothing of how its images vary, images are taken to vary alike in all classes. If each class has
    several and is wholly right or wholly wrong, as of a model that names one for everything, the interval is Wilson's,
    of as many images as weigh alike, K^2 / sum_c 1 / n_c of K classes of n_c images.
    """
    _, place, images = np.unique(truth, return_inverse=True, return_counts=True)
    outcomes, right = in_top(ahead, top_k), ahead < 1
    accuracy = np.bincount(place, right) / images
    values = {}
    for k, found in zip(top_k, outcomes.values(), strict=True):
        among = "scores highest" if k == 1 else f"is among the {k} that score highest"
        about = f"Share of the images whose own class {among}."
        values[f"top_{k}"] = share(found.mean(), label=f"top-{k}", chance=k / classes, rows=len(ahead), about=about)
    about = "Top-1 accuracy of each class that has an image, averaged over these classes."
    mean = share(accuracy.mean(), label="mean per class", chance=1 / classes, rows=len(images), about=about)
    values["mean_per_class"] = mean
    if not intervals:
        return values
    centre = mean.value if images.min() == 1 else accuracy[place]
    weighted = mean.value + len(right) / (len(images) * images[place]) * (right - centre)
    alike = right.all() or not right.any() or images.max() == 1
    outcomes["mean_per_class"] = right if alike else weighted
    made = {name: with_interval(value, outcomes[name], copies) for name, value in values.items()}
    pure = images.min() > 1 and (right == accuracy[place]).all()
    if made["mean_per_class"].low is not None and pure and not alike:
        of_images = np.column_stack([place, np.arange(len(right)) if copies is None else copies])
        distinct = np.bincount(np.unique(of_images, axis=0)[:, 0])
        low, high = wilson(mean.value, round(len(distinct) ** 2 / (1 / distinct).sum()))
        made["mean_per_class"] = replace(mean, low=low, high=high)
    return made


def with_interval(value: Value, outcomes: np.ndarray, copies: np.ndarray | None) -> Value:
    """The value, the mean of the outcomes (n,), with its interval within 0 and 1; without if all rows are copies of one
    image."""
    if copies is not None and len(copies) > 1 and (copies == copies[0]).all():
        return value
    low, high = bootstrap_mean(outcomes, groups=copies)
    return replace(value, low=max(0.0, low), high=min(1.0, high))
