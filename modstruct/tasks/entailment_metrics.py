"""Accuracy on SNLI-VE, over all pairs and for each label."""

from __future__ import annotations

from collections.abc import Sequence

from modstruct.data.downstream.snli_ve import ENTAILMENT_LABELS, EntailmentPair


def entailment_metrics(predictions: Sequence[int], pairs: Sequence[EntailmentPair]) -> dict[str, float]:
    """Shares from 0 to 1 of the pairs given their label.

    predictions: a label number for each pair, in their order (pair ids of SNLI-VE are not unique). Returns
    {"accuracy": …, "contradiction": …, "neutral": …, "entailment": …}, the last three over the pairs of that label,
    without a label that no pair has. Raises ValueError if the numbers differ, for a pair without label, and for none.
    """
    if not pairs or len(predictions) != len(pairs):
        raise ValueError(
            f"predictions: {len(predictions):,} for {len(pairs):,} pairs; give one for each of at least one"
        )
    hits: dict[str, list[bool]] = {name: [] for name in ENTAILMENT_LABELS}
    for prediction, pair in zip(predictions, pairs, strict=True):
        if pair.label is None:
            raise ValueError(f"pair {pair.pair_id} has no label and cannot be measured")
        hits[ENTAILMENT_LABELS[pair.label]].append(int(prediction) == pair.label)
    figures = {"accuracy": sum(map(sum, hits.values())) / len(pairs)}
    return figures | {name: sum(found) / len(found) for name, found in hits.items() if found}
