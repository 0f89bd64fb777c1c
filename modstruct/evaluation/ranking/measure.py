"""Retrieval both ways, of embeddings that may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from modstruct.evaluation.ranking.exact import CPU, pairs_ahead
from modstruct.evaluation.ranking.figures import ranking_figures
from modstruct.evaluation.ranking.index import ApproximateIndex, IndexConfig, index_recall, listed_pairs_ahead
from modstruct.evaluation.ranking.rows import check_dimensions, check_recall_at, check_rows, checked_pairs

EXACT = IndexConfig()


def measure_retrieval(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int] = (1, 5, 10),
    index: IndexConfig = EXACT,
    device: torch.device = CPU,
    progress: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """All retrieval figures of texts by images and of images by texts.

    image: (n, D), text: (m, D), float16 or float32, in memory or memory-mapped, scored by inner product. pairs:
    (p, 2), (image row, text row); an image may have several texts and a text several images. index: how galleries
    are searched. device: where exact ranks are counted.
    Returns {"text_to_image": {…}, "image_to_text": {…}} with the figures of `ranking_figures`; of an approximate
    index also "index_text_to_image" and "index_image_to_text", its recall against exact search on some queries.
    Raises ValueError for embeddings that are empty, not finite or of different dimensions, pairs that name no row,
    and K < 1. The recall of `exact` is that of `retrieval.retrieval`.
    """
    check_recall_at(recall_at)
    for name, rows in (("image", image), ("text", text)):
        check_rows(name, rows)
    check_dimensions("image", image, "text", text)
    pairs = checked_pairs(pairs, len(image), len(text), ("images", "texts"))
    figures = {}
    for name, queries, gallery, positives in (
        ("text_to_image", text, image, pairs[:, ::-1]),
        ("image_to_text", image, text, pairs),
    ):
        if index.kind == "exact":
            positives, ahead = pairs_ahead(queries, gallery, positives, device, progress)
        else:
            made = ApproximateIndex(gallery, index, progress)
            positives, ahead = listed_pairs_ahead(queries, made, positives, max(recall_at), progress)
            figures[f"index_{name}"] = index_recall(queries, made, recall_at)
        figures[name] = ranking_figures(positives, ahead, len(gallery), recall_at)
    return figures
