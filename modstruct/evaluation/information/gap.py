"""Figures of one label from the held-out losses of its rows: information, its gap, both sides of Theorem 3.1."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from modstruct.evaluation.information.scenes import ExactInformation
from modstruct.evaluation.statistics import bootstrap_mean, mean_interval

Figure = dict[str, float]


def label_surprise(labels: np.ndarray, classes: int) -> np.ndarray:
    """-log of the share of each row's label, (n,): its mean over rows is H(Y) of these rows, in nats."""
    return -np.log(np.bincount(labels, minlength=classes) / len(labels))[labels]


def information_metrics(
    surprise: np.ndarray,
    losses: Mapping[str, np.ndarray],
    groups: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    exact: ExactInformation | None = None,
) -> dict[str, dict]:
    """Figures {"value", "low", "high", "rows"} in nats.

    surprise: (n,) of `label_surprise`. losses: held-out, (n,) each, "text", "image", "joint" and, where there are
    shared embeddings, "shared". groups: (n,), rows that are drawn together. Returns
      entropy                   H(Y) of these rows
      text, image, joint        H(Y) less the loss: estimates from below of I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y)
      shared                    the same of both shared embeddings, I(Z_T, Z_V; Y)
      gap                       |text - image|, the estimate of Delta_p
      excess                    loss of "shared" less loss of "joint": the left side of Theorem 3.1
    and, where the exact values are given, "exact" with entropy, text, image, joint, gap and aligned_excess (the least
    left side that exactly aligned features reach), and "bias", the estimate less the exact value.
    Intervals: over rows, the probes being what they are; they know nothing of what better probes would find.
    """
    drawn = {"samples": samples, "level": level, "seed": seed, "groups": groups}

    def mean(rows: np.ndarray) -> Figure:
        low, high = bootstrap_mean(rows, **drawn)
        return {"value": float(rows.mean()), "low": low, "high": high, "rows": len(rows)}

    figures: dict[str, dict] = {"entropy": mean(surprise)}
    figures |= {name: mean(surprise - loss) for name, loss in losses.items()}
    both = np.column_stack([losses["image"], losses["text"]])
    low, high = mean_interval(both, gap_of_losses, **drawn)
    figures["gap"] = {"value": float(gap_of_losses(both.mean(0)[None])[0]), "low": low, "high": high, "rows": len(both)}
    if "shared" in losses:
        figures["excess"] = mean(losses["shared"] - losses["joint"])
    if exact is not None:
        names = ("entropy", "text", "image", "joint", "gap")
        known = {name: float(getattr(exact, name)) for name in names}
        figures["exact"] = {name: {"value": value} for name, value in known.items()}
        figures["exact"]["aligned_excess"] = {"value": float(exact.aligned_excess)}
        figures["bias"] = {name: {"value": figures[name]["value"] - value} for name, value in known.items()}
    return figures


def gap_of_losses(means: np.ndarray) -> np.ndarray:
    """|loss of one - loss of the other|, (s, 2) -> (s,): H(Y) is the same in both and cancels."""
    return np.abs(means[:, 0] - means[:, 1])
