"""Retrieval of an embedded set: figures with intervals, curves, and what happened to each query."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from modstruct.distributed.collect import on_main
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.exact import counting_device
from modstruct.evaluation.retrieval.index import IndexConfig, require_searchable
from modstruct.evaluation.retrieval.measure import rankings
from modstruct.evaluation.retrieval.metrics import RankedQueries, ranking_metrics
from modstruct.evaluation.statistics import bootstrap_mean, bootstrap_statistic


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
    """Retrieval both ways of a set's shared embeddings; every process calls this, and each gets the whole.

    embedded: with texts and pairs, its folder readable by every process. device: where exact ranks are counted, by
    default counting_device(). Exact ranks are counted by all processes, the queries divided among them, with the same
    result on any number; an approximate index is built and searched by the main process, on all GPUs of its host.
    Returns the result (metric, set, figures, curves, settings, rows, source_fingerprint, seconds, command) and
    outcomes:
      figures   text_to_image, image_to_text: those of `ranking_metrics`, each with its 95 % interval "low" and "high"
                where there are two independent queries; of an approximate index index_text_to_image and
                index_image_to_text too, its recall against exact search
      curves    k, and text_to_image/recall, image_to_text/recall at each of them
      outcomes  of each direction's queries that have a positive, under DIRECTION/…: recall_at_K (0 or 1),
                mean_reciprocal_rank and map_at_r (whose means over the queries are the figures of these names), rank
                (from 1 on), query (row of the set) and group
    Queries of one group are no independent evidence and are resampled together: the captions of one image, a caption
    of several images with the first of them. Each image is a group of its own.
    Raises ValueError where the set has no texts or pairs, or this machine cannot have the index.
    """
    started = time.monotonic()
    require_searchable(config.index)
    image, text, pairs = embedded.rows("image"), embedded.rows("text"), np.asarray(embedded.pairs)
    require(len(pairs) > 0, "pairs", str(embedded.folder), "this set has none: embed one whose images have captions")
    sizes = {"image": len(image), "text": len(text), "pairs": len(pairs)}
    most = min(len(image), len(text))
    curve_at = sorted(k for k in set(config.curve_at) if k <= most)
    device = counting_device() if device is None else device
    figures: dict[str, Any] = {}
    curves: dict[str, list[float]] = {"k": [float(k) for k in curve_at]}
    outcomes: dict[str, np.ndarray] = {}
    asked_at = sorted({*config.recall_at, *curve_at})
    for name, ranked, told in rankings(image, text, pairs, asked_at, config.index, device, progress, shared=True):
        group = _first_image(pairs, ranked.query) if name == "text_to_image" else ranked.query
        found = _outcomes(ranked, config.recall_at) | {"query": ranked.query, "group": group}
        figures[name] = on_main(lambda ranked=ranked, found=found: _with_intervals(ranked, found, config))
        if told is not None:
            figures[f"index_{name}"] = told
        curves[f"{name}/recall"] = [float(np.mean(ranked.rank <= k)) for k in curve_at]
        outcomes |= {f"{name}/{outcome}": values for outcome, values in found.items()}
        sizes[f"{name}_queries"] = len(ranked.query)
    result = {
        "metric": "retrieval",
        "set": embedded.name,
        "figures": figures,
        "curves": curves,
        "settings": asdict(config) | {"device": device.type, "ties": "against the model"},
        "rows": sizes,
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
    figures = ranking_metrics(ranked, config.recall_at)
    _, sizes = np.unique(outcomes["group"], return_counts=True)
    groups = outcomes["group"] if len(sizes) < len(ranked.query) else None
    if len(sizes) < 2:
        return figures
    settings = {"samples": config.resamples, "seed": config.seed, "groups": groups}
    for name, figure in figures.items():
        if name == "median_rank":
            low, high = bootstrap_statistic(np.median, ranked.rank, **settings)
        else:
            low, high = bootstrap_mean(outcomes[name], **settings)
        figure |= {"low": low, "high": high}
    return figures


def _first_image(pairs: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(q,): the lowest image row that each text row is paired with. texts: (q,), ascending, each in a pair."""
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    return pairs[np.searchsorted(pairs[:, 1], texts), 0]
