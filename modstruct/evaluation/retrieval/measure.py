"""Retrieval both ways, of embeddings that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from modstruct.distributed.collect import on_main
from modstruct.evaluation.retrieval.exact import CPU, pairs_ahead
from modstruct.evaluation.retrieval.index import ApproximateIndex, IndexConfig
from modstruct.evaluation.retrieval.listed import index_recall, listed_pairs_ahead
from modstruct.evaluation.retrieval.metrics import RankedQueries, ranked_queries, ranking_metrics, recall_metrics
from modstruct.evaluation.retrieval.processes import shared_pairs_ahead
from modstruct.evaluation.retrieval.rows import check_dimensions, check_recall_at, check_rows, checked_pairs

EXACT = IndexConfig()
DIRECTIONS = ("text_to_image", "image_to_text")
Figures = dict[str, dict[str, float]]


def measure_retrieval(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int] = (1, 5, 10),
    index: IndexConfig = EXACT,
    device: torch.device = CPU,
    progress: bool = False,
) -> dict[str, Figures]:
    """All retrieval figures of texts by images and of images by texts.

    image: (n, D), text: (m, D), float16 or float32, in memory or memory-mapped, scored by inner product. pairs:
    (p, 2), (image row, text row); an image may have several texts and a text several images. index: how galleries
    are searched. device: where exact ranks are counted; see `exact.counting_device`.
    Returns {"text_to_image": {…}, "image_to_text": {…}} with the figures of `ranking_metrics`; of an approximate
    index also "index_text_to_image" and "index_image_to_text", its recall against exact search on some queries.
    A query is a hit at K if one of its positives is among the first K. Queries without a positive are left out, but
    stay in the gallery of the other direction. A K above the size of the gallery counts as the whole gallery.
    Raises ValueError for embeddings that are empty, not finite or of different dimensions, pairs that name no row,
    and K < 1.
    """
    figures = {}
    for name, ranked, told in rankings(image, text, pairs, recall_at, index, device, progress):
        figures[name] = ranking_metrics(ranked, recall_at)
        if told is not None:
            figures[f"index_{name}"] = told
    return figures


def measure_recall(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, recall_at: Sequence[int], device: torch.device = CPU
) -> dict[str, Figures]:
    """The recall of `measure_retrieval` alone, exact: {"text_to_image": {"recall_at_1": …, …}, "image_to_text": …}."""
    return {
        name: recall_metrics(ranked.rank, ranked.positives, ranked.gallery_size, recall_at)
        for name, ranked, _ in rankings(image, text, pairs, recall_at, device=device)
    }


def rankings(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int],
    index: IndexConfig = EXACT,
    device: torch.device = CPU,
    progress: bool = False,
    shared: bool = False,
) -> Iterator[tuple[str, RankedQueries, Figures | None]]:
    """Yields (direction, its ranks, recall of the approximate index or None), one direction after the other.

    Arguments as in `measure_retrieval`. shared: all processes call this and divide the queries among them, each with
    all arrays at hand; every process gets the whole. An approximate index is searched by the main process, on all GPUs
    of its host, while the others wait.
    """
    check_recall_at(recall_at)
    for name, rows in (("image", image), ("text", text)):
        check_rows(name, rows)
    check_dimensions("image", image, "text", text)
    pairs = checked_pairs(pairs, len(image), len(text), ("images", "texts"))
    for name, queries, gallery, positives in zip(
        DIRECTIONS, (text, image), (image, text), (pairs[:, ::-1], pairs), strict=True
    ):
        told = None
        if index.kind == "exact":
            count = shared_pairs_ahead if shared else pairs_ahead
            positives, ahead = count(queries, gallery, positives, device, progress)
        else:
            search = partial(_searched, queries, gallery, positives, recall_at, index, progress)
            positives, ahead, told = on_main(search) if shared else search()
        yield name, ranked_queries(positives, ahead, len(gallery)), told


def _searched(
    queries: np.ndarray,
    gallery: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int],
    index: IndexConfig,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, Figures]:
    made = ApproximateIndex(gallery, index, progress)
    return *listed_pairs_ahead(queries, made, pairs, max(recall_at), progress), index_recall(queries, made, recall_at)
