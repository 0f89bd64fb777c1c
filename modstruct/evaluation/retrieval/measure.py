"""Retrieval both ways, of arrays that may be larger than memory and of embedded sets.

Of a set: metrics with intervals, curves, and the outcome of each query.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from modstruct import distributed
from modstruct.distributed.collect import on_main
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.ann_index import (
    AnnIndex,
    IndexConfig,
    ann_pairs_ahead,
    ann_recall,
    require_searchable,
)
from modstruct.evaluation.retrieval.exact import (
    CPU,
    PairsAhead,
    counting_device,
    pairs_ahead,
    shared_pairs_ahead,
)
from modstruct.evaluation.retrieval.metrics import RankedQueries, ranked_queries, ranking_metrics, recall_metrics
from modstruct.evaluation.retrieval.rows import check_dimensions, check_recall_at, check_rows, checked_pairs
from modstruct.evaluation.statistics import bootstrap_mean, bootstrap_statistic

log = logging.getLogger(__name__)

EXACT = IndexConfig()
DIRECTIONS = ("text_to_image", "image_to_text")
Metrics = dict[str, dict[str, float]]


def measure_retrieval(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int] = (1, 5, 10),
    index: IndexConfig = EXACT,
    device: torch.device = CPU,
    progress: bool = False,
) -> dict[str, Metrics]:
    """All retrieval metrics of both directions.

    image: (n, D), text: (m, D), float16 or float32, in memory or memory-mapped, scored by inner product. pairs:
    (p, 2), (image row, text row); an image may have several texts and a text several images. index: how galleries
    are searched. device: where exact ranks are counted; see `exact.counting_device`.
    Returns {"text_to_image": {…}, "image_to_text": {…}} with the metrics of `ranking_metrics`; of an approximate
    index also "index_text_to_image" and "index_image_to_text", its recall against exact search on some queries.
    A query is a hit at K if one of its positives is among the first K. Queries without a positive are left out, but
    stay in the gallery of the other direction. A K above the size of the gallery counts as the whole gallery.
    Raises ValueError for embeddings that are empty, not finite or of different dimensions, pairs that name no row,
    and K < 1.
    """
    metrics = {}
    for name, ranked, recall in rankings(image, text, pairs, recall_at, index, device, progress):
        metrics[name] = ranking_metrics(ranked, recall_at)
        if recall is not None:
            metrics[f"index_{name}"] = recall
    return metrics


def measure_recall(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int],
    device: torch.device = CPU,
    name: str = "retrieval",
) -> dict[str, Metrics]:
    """The recall of `measure_retrieval` alone, exact: {"text_to_image": {"recall_at_1": …, …}, "image_to_text": …}.

    name: of what is measured, for the log.
    """
    found = {}
    for direction, ranked, _ in rankings(image, text, pairs, recall_at, device=device):
        say_ties(name, direction, ranked)
        found[direction] = recall_metrics(ranked.rank, ranked.positives, ranked.gallery_size, recall_at)
    return found


TIES_BY_CHANCE = 1e-6
"""Of a query with each item, at most: scores of unit rows lie 2^-25 apart or so, where they are 1/4 and more."""
_said_ties: set[tuple[str, str]] = set()


def say_ties(name: str, direction: str, ranked: RankedQueries) -> None:
    """Log, once for each name and direction, how many queries have an item that no score tells from their positive.

    Unless they are so few that rounding explains them.
    """
    tied = int(np.count_nonzero(ranked.tied))
    if tied > TIES_BY_CHANCE * ranked.gallery_size * len(ranked.tied) and (name, direction) not in _said_ties:
        _said_ties.add((name, direction))
        log.warning(
            "%s, %s: the best positive of %d of %d queries ties exactly with an item that is no positive, and a tie "
            "counts against the model: images of the same pixels in other bytes, captions of the same tokens, or "
            "collapsed embeddings",
            name,
            direction.replace("_", " "),
            tied,
            len(ranked.tied),
        )


def rankings(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int],
    index: IndexConfig = EXACT,
    device: torch.device = CPU,
    progress: bool = False,
    shared: bool = False,
) -> Iterator[tuple[str, RankedQueries, Metrics | None]]:
    """Yields (direction, its ranks, recall of the approximate index or None), one direction after the other.

    Arguments as in `measure_retrieval`. shared: all processes call this and divide the queries among them, each with
    all arrays; every process gets the whole result. An approximate index is searched by the main process, on all GPUs
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
        recall = None
        if index.kind == "exact":
            count = shared_pairs_ahead if shared else pairs_ahead
            counted = count(queries, gallery, positives, device, progress)
        else:
            search = partial(_searched, queries, gallery, positives, recall_at, index, progress)
            counted, recall = on_main(search) if shared else search()
        yield name, ranked_queries(*counted, len(gallery)), recall


def _searched(
    queries: np.ndarray,
    gallery: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int],
    index: IndexConfig,
    progress: bool,
) -> tuple[PairsAhead, Metrics]:
    made = AnnIndex(gallery, index, progress)
    return ann_pairs_ahead(queries, made, pairs, max(recall_at), progress), ann_recall(queries, made, recall_at)


@dataclass(frozen=True)
class RetrievalConfig:
    """How retrieval of an embedded set is measured."""

    recall_at: tuple[int, ...] = (1, 5, 10)
    """K of the recall that gets an interval, and an outcome for each query."""
    curve_at: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """K of the curves of recall; those above the size of the gallery are left out, of either direction."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """How galleries are searched."""
    resamples: int = 1000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("recall_at", "curve_at"):
            for k in getattr(self, name):
                require(k >= 1, f"retrieval.{name}", k, "at least 1")
        require(len(self.recall_at) > 0, "retrieval.recall_at", self.recall_at, "give at least one K")
        require(self.resamples >= 100, "retrieval.resamples", self.resamples, "at least 100")


DEFAULT = RetrievalConfig()


def measure_set_retrieval(
    embedded: EmbeddedSet,
    config: RetrievalConfig = DEFAULT,
    device: torch.device | None = None,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Retrieval both ways of a set's shared embeddings; every process calls this and gets the whole result.

    embedded: with texts and pairs, its folder readable by every process; copies of images are left out, and their
    captions are those of the image. device: where exact ranks are counted, by default counting_device(). Exact ranks
    are counted by all processes, the queries divided among them, with the same result on any number; an approximate
    index is built and searched by the main process, on all GPUs of its host.
    Returns the result (metric, set, figures, curves, settings, rows, ties, source_fingerprint, seconds, command) and
    outcomes:
      figures   text_to_image, image_to_text: metrics of `ranking_metrics`, each with its 95 % interval "low" and "high"
                where there are two independent queries; of an approximate index index_text_to_image and
                index_image_to_text too, its recall against exact search
      ties      of each direction, the queries whose best positive ties exactly with an item that is no positive
      curves    k, and text_to_image/recall, image_to_text/recall at each of them
      outcomes  of each direction's queries that have a positive, under DIRECTION/…: recall_at_K (0 or 1),
                mean_reciprocal_rank and map_at_r (whose means over the queries are the metrics of these names), rank
                (from 1 on), query (row of the set) and group
    Queries of one group are no independent evidence and are resampled together: the captions of one image, a caption
    of several images with the first of them. Each image is a group of its own.
    Raises ValueError where the set has no texts or pairs, or this machine cannot have the index.
    """
    started = time.monotonic()
    require_searchable(config.index)
    image, text, pairs = embedded.distinct_rows("image"), embedded.rows("text"), np.asarray(embedded.distinct_pairs)
    require(len(pairs) > 0, "pairs", str(embedded.folder), "this set has none: embed one whose images have captions")
    merged = {"samples": len(image) + len(embedded.copies)} if len(embedded.copies) else {}
    sizes = merged | {"image": len(image), "text": len(text), "pairs": len(pairs)}
    most = min(len(image), len(text))
    curve_at = sorted(k for k in set(config.curve_at) if k <= most)
    device = counting_device() if device is None else device
    metrics: dict[str, Any] = {}
    curves: dict[str, list[float]] = {"k": [float(k) for k in curve_at]}
    outcomes: dict[str, np.ndarray] = {}
    ties: dict[str, int] = {}
    recall_at = sorted({*config.recall_at, *curve_at})
    for name, ranked, recall in rankings(image, text, pairs, recall_at, config.index, device, progress, shared=True):
        group = _first_image(pairs, ranked.query) if name == "text_to_image" else ranked.query
        found = _outcomes(ranked, config.recall_at) | {"query": ranked.query, "group": group}
        metrics[name] = on_main(partial(_with_intervals, ranked, found, config))
        if recall is not None:
            metrics[f"index_{name}"] = recall
        curves[f"{name}/recall"] = [float(np.mean(ranked.rank <= k)) for k in curve_at]
        outcomes |= {f"{name}/{outcome}": values for outcome, values in found.items()}
        sizes[f"{name}_queries"] = len(ranked.query)
        ties[name] = int(np.count_nonzero(ranked.tied))
        if distributed.is_main():
            unmerged = "" if embedded.merged else " (embedded by an earlier version, which merged no equal images)"
            say_ties(f"set {embedded.name}{unmerged}", name, ranked)
    result = {
        "metric": "retrieval",
        "set": embedded.name,
        "figures": metrics,
        "curves": curves,
        "settings": asdict(config) | {"device": device.type, "ties": "against the model"},
        "rows": sizes,
        "ties": ties,
        "source_fingerprint": embedded.source.get("fingerprint"),
        "seconds": time.monotonic() - started,
        "command": list(sys.argv),
    }
    return result, outcomes


def _outcomes(ranked: RankedQueries, recall_at: tuple[int, ...]) -> dict[str, np.ndarray]:
    hits = {f"recall_at_{k}": (ranked.rank <= k).astype(np.uint8) for k in recall_at}
    return hits | {
        "mean_reciprocal_rank": 1 / ranked.rank,
        "map_at_r": ranked.average_precision_at_r,
        "rank": ranked.rank,
    }


def _with_intervals(
    ranked: RankedQueries, outcomes: dict[str, np.ndarray], config: RetrievalConfig
) -> dict[str, dict[str, float]]:
    metrics = ranking_metrics(ranked, config.recall_at)
    _, sizes = np.unique(outcomes["group"], return_counts=True)
    groups = outcomes["group"] if len(sizes) < len(ranked.query) else None
    if len(sizes) < 2:
        return metrics
    for name, metric in metrics.items():
        if name == "median_rank":
            low, high = bootstrap_statistic(
                np.median, ranked.rank, samples=config.resamples, seed=config.seed, groups=groups
            )
        else:
            low, high = bootstrap_mean(outcomes[name], samples=config.resamples, seed=config.seed, groups=groups)
        metric |= {"low": low, "high": high}
    return metrics


def _first_image(pairs: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(q,): the lowest image row that each text row is paired with. texts: (q,), ascending, each in a pair."""
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    return pairs[np.searchsorted(pairs[:, 1], texts), 0]
