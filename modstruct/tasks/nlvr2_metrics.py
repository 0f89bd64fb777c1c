"""Accuracy and consistency on NLVR2, as lil-lab/nlvr's metrics.py computes them (Suhr et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modstruct.data.downstream.nlvr2 import Nlvr2Statement


def sentence_of(identifier: str) -> str:
    """What the statements of one sentence share: `dev-850-3-1` about pair 3 -> `dev-850--1`."""
    split, group, _, sentence = identifier.rsplit("-", 3)
    return f"{split}-{group}--{sentence}"


def nlvr2_metrics(predictions: Mapping[str, bool], statements: Sequence[Nlvr2Statement]) -> dict[str, float]:
    """Shares from 0 to 1: of the statements judged rightly, and of the sentences judged rightly for all their pairs.

    predictions: by identifier. Returns {"accuracy": …, "consistency": …}. Raises ValueError for a statement without
    prediction or label, and for no statement at all.
    """
    if not statements:
        raise ValueError("statements: there are none to measure")
    right = 0
    consistent: dict[str, bool] = {}
    for statement in statements:
        if statement.identifier not in predictions:
            raise ValueError(f"predictions: there is none for the statement {statement.identifier}")
        if statement.label is None:
            raise ValueError(
                f"statement {statement.identifier} has no label: the hidden test set cannot be measured here"
            )
        hit = bool(predictions[statement.identifier]) == statement.label
        right += hit
        sentence = sentence_of(statement.identifier)
        consistent[sentence] = consistent.get(sentence, True) and hit
    return {"accuracy": right / len(statements), "consistency": sum(consistent.values()) / len(consistent)}
