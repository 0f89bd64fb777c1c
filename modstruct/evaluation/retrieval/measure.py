"""Retrieval both ways: metrics of arrays, which may be larger than memory, and the Result of an embedded set."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from modstruct import distributed
from modstruct.distributed.collect import share_out
from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, distinct_classes
from modstruct.evaluation.result import Curve, Result, Unit, Value, share
from modstruct.evaluation.retrieval import nearest
from modstruct.evaluation.retrieval.exact import PairsAhead, counting_device, pairs_ahead
from modstruct.evaluation.retrieval.metrics import Metrics, Ranked, ranked_queries, ranking_metrics
from modstruct.evaluation.retrieval.mixed import AT, Found, kinds_of_classes, kinds_of_pairs, search_mixed
from modstruct.evaluation.retrieval.rows import check_dimensions, check_rows, check_unit_rows, checked_pairs
from modstruct.evaluation.statistics import bootstrap_mean, median_interval

DIRECTIONS = ("text_to_image", "image_to_text")
GROUPS = {
    "text_to_image": "Text → image",
    "image_to_text": "Image → text",
    "index_text_to_image": "Approximate lists, text → image",
    "index_image_to_text": "Approximate lists, image → text",
    "mixed": "One gallery of images and texts, by pair",
    "mixed_classes": "One gallery of images and texts, by class",
}
ABOUT = (
    "Each caption ranks all images of the set by cosine similarity, and each image all captions; right are those that "
    "belong together. A query's rank is the place of its best right item, 1 being first; a wrong item of equal score "
    "counts as ahead of it. Chance is what a random ranking reaches."
)
MORE: dict[str, tuple[str, Unit, str]] = {
    "median_rank": ("median rank", "rank", "Half of the queries have a rank of at most this."),
    "mean_log_rank": ("mean ln rank", "number", "Mean of the natural logarithm of the rank, 0 where every rank is 1."),
    "mean_reciprocal_rank": ("MRR", "share", "Mean reciprocal rank: the mean of 1 / rank, 100 % if every rank is 1."),
    "map_at_r": (
        "mAP@R",
        "share",
        "Mean average precision at R, a query's number of right items: the precision at each right item among the "
        "first R, summed, divided by R, averaged over the queries; 100 % where all right items come first.",
    ),
}
"""Metrics beside recall: label, unit and definition. Of shares more is better, of the others less."""
MIXED = {
    "mixed": "its image, its captions, and what they are paired with",
    "mixed_classes": "all images and texts of its class, a text being of its first image's",
}
"""What is relevant to a query, image or text, by group."""
TIES_BY_CHANCE = 1e-6
"""Of a query with each item, at most: scores of unit rows lie 2^-25 apart or so, where they are 1/4 and more."""
log = logging.getLogger(__name__)
_said_ties: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class RetrievalConfig:
    """How retrieval of an embedded set is measured."""

    metrics: Literal["all", "recall"] = "all"
    """recall: without all but recall: other metrics of ranks, tied queries and the mixed gallery."""
    recall_at: tuple[int, ...] = (1, 5, 10)
    """K of the recall that gets a value, and an outcome for each query."""
    curve_at: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """K of the curves of recall; those above the size of the gallery are left out, of either direction."""
    engine: nearest.Engine = "exact"
    """exact: ranks by counting every score. faiss_flat: by FAISS's exact lists; ranks are the same but for rounding. It
    is no default on GPUs before it was seen there. Approximate lists: ivf (inverted file), hnsw (graph, on the CPU),
    cagra (graph, on a GPU, where FAISS is built with cuVS)."""
    index: nearest.IndexConfig = field(default_factory=nearest.IndexConfig)
    """Of engines other than exact."""
    mixed_queries: int = 20_000
    """Most queries of the gallery of images and texts together, evenly spaced; 0 leaves it out."""
    label: str = ""
    """Field of the metadata with the classes that are relevant in it; by default the set's classes, if it has any."""
    resamples: int = 1000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        nearest.require_searchable(self.engine)
        for name in ("recall_at", "curve_at"):
            for k in getattr(self, name):
                require(k >= 1, f"retrieval.{name}", k, "at least 1")
        require(len(self.recall_at) > 0, "retrieval.recall_at", self.recall_at, "give at least one K")
        require(self.mixed_queries >= 0, "retrieval.mixed_queries", self.mixed_queries, "at least 0")
        require(self.resamples >= 100, "retrieval.resamples", self.resamples, "at least 100")


DEFAULT = RetrievalConfig()


def measure_retrieval(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    recall_at: Sequence[int] = (1, 5, 10),
    engine: nearest.Engine = "exact",
    index: nearest.IndexConfig = DEFAULT.index,
) -> dict[str, Metrics]:
    """All retrieval metrics of both directions; like all of this file it is called by every process, or in `on_main`.

    image: (n, D), text: (m, D), float16 or float32, in memory or memory-mapped, scored by inner product. pairs:
    (p, 2), (image row, text row), several of one image or text too. engine, index: as in RetrievalConfig.
    Returns {"text_to_image": {…}, "image_to_text": {…}} with the metrics of `ranking_metrics`; of approximate lists
    also "index_text_to_image" and "index_image_to_text", their recall against exact ones on some queries. Queries
    without a positive are left out, but stay in the gallery of the other direction. Raises ValueError for embeddings
    that are empty, not finite or of unlike dimensions, pairs that name no row, K < 1, and an engine not to be had here.
    """
    check_rows("image", image)
    check_rows("text", text)
    metrics, config = {}, RetrievalConfig(recall_at=tuple(recall_at), engine=engine, index=index)
    for direction, ranked, recall in rankings(image, text, pairs, recall_at, config):
        metrics[direction] = ranking_metrics(ranked, recall_at)
        if recall is not None:
            metrics[f"index_{direction}"] = recall
    return metrics


def rankings(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, recall_at: Sequence[int], config: RetrievalConfig
) -> Iterator[tuple[str, Ranked, Metrics | None]]:
    """Yields (direction, its ranks, recall of approximate lists or None), one direction after the other.

    image, text: checked rows.

    exact and faiss_flat divide the queries among the processes, each with its own GPU: reading or copying a gallery
    is cheap beside searching it. Building another index is not: the main process builds and searches it, on all GPUs of
    its host that it can use, and the others wait.
    """
    check_dimensions("image", image, "text", text)
    pairs = checked_pairs(pairs, len(image), len(text), ("images", "texts"))
    engine, exact = config.engine, config.engine in ("exact", "faiss_flat")

    def ranked_by(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray) -> tuple[Ranked, Metrics | None]:
        shares = query_shares(pairs, distributed.world_size() if exact else 1)

        def search(some: np.ndarray) -> tuple[PairsAhead, Metrics | None]:
            if engine == "exact":
                return pairs_ahead(queries, gallery, some), None
            gpus = nearest.own_gpu() if len(shares) > 1 else nearest.usable_gpus()
            lists = nearest.RankedByLists(gallery, engine, config.index, gpus)
            return lists.pairs_ahead(queries, some, max(recall_at)), None if exact else lists.recall(queries, recall_at)

        parts, recall = zip(*share_out(shares, search), strict=True)
        found, ahead, tied = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ranked_queries(found, ahead, tied, len(gallery)), recall[0]

    yield "text_to_image", *ranked_by(text, image, pairs[:, ::-1])
    yield "image_to_text", *ranked_by(image, text, pairs)


def query_shares(pairs: np.ndarray, processes: int) -> list[np.ndarray]:
    """Pairs (p, 2) in at most so many parts, of about as many queries, ascending, dividing no query's pairs."""
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    queries, first = np.unique(pairs[:, 0], return_index=True)
    edges = np.append(first, len(pairs))[np.linspace(0, len(queries), min(processes, len(queries)) + 1).astype(int)]
    return [pairs[start:stop] for start, stop in pairwise(edges)]


def measure(embedded: EmbeddedSet, config: RetrievalConfig = DEFAULT) -> Result:
    """Retrieval both ways of a set's shared embeddings; every process calls this and gets the same.

    embedded: with texts and pairs. Copies of images are left out, and their captions are those of the image.
    Values: `ranking_metrics` of text_to_image and image_to_text, with 95 % intervals where there are two independent
    queries, and tied_queries where there are any; index_text_to_image and index_image_to_text of approximate lists;
    mixed, and with classes mixed_classes, of one gallery of images and texts (`search_mixed`).
    Outcomes: of each direction's queries that have a positive, DIRECTION/recall_at_K (0 or 1), mean_log_rank,
    mean_reciprocal_rank, map_at_r, rank (from 1 on), query (row of the set) and group; of mixed ones ndcg_at_10,
    own_modality, query (row of the images, and then of the texts) and group. Queries of one group are resampled
    together: the captions of one image, a caption of several images with the first of them.
    Raises ValueError where the set has no texts or pairs, or this machine does not have the engine, and for a label
    that is none.
    """
    image, text, pairs = embedded.distinct_rows("image"), embedded.rows("text"), embedded.distinct_pairs
    require(len(pairs) > 0, "pairs", str(embedded.folder), "this set has none: embed one whose images have captions")
    check_unit_rows("image", image)
    check_unit_rows("text", text)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    first_image = pairs[np.unique(pairs[:, 1], return_index=True)[1], 0]
    groups = {"text_to_image": first_image, "image_to_text": np.unique(pairs[:, 0])}
    sizes = {"samples": len(image) + len(embedded.copies)} if len(embedded.copies) else {}
    sizes |= {"image": len(image), "text": len(text), "pairs": len(pairs)}
    curve_at = sorted(k for k in set(config.curve_at) if k <= min(len(image), len(text)))
    recall_at = sorted({*config.recall_at, *curve_at})
    shown = [*(f"recall_at_{k}" for k in config.recall_at), *(MORE if config.metrics == "all" else ())]
    values: dict[str, Value] = {}
    curves: dict[str, Curve] = {}
    outcomes: dict[str, np.ndarray] = {}
    for direction, ranked, recall in rankings(image, text, pairs, recall_at, config):
        of_queries: dict[str, np.ndarray] = {f"recall_at_{k}": (ranked.rank <= k).astype(np.uint8) for k in recall_at}
        of_queries["mean_log_rank"] = np.log(ranked.rank)
        of_queries |= {"mean_reciprocal_rank": 1 / ranked.rank, "map_at_r": ranked.average_precision_at_r}
        beside = {"rank": ranked.rank, "query": ranked.query, "group": groups[direction]}
        kept = {name: of_queries[name] for name in shown if name in of_queries} | beside
        outcomes |= {f"{direction}/{name}": rows for name, rows in kept.items()}
        rows = sizes[f"{direction}_queries"] = len(ranked.query)
        metrics = ranking_metrics(ranked, recall_at)
        bounded = {"median_rank": ranked.rank} | of_queries
        bounded = {name: rows for name, rows in bounded.items() if name in shown or name not in MORE}
        for name, bounds in _intervals(bounded, groups[direction], config).items():
            metrics[name] |= bounds
        values |= {f"{direction}/{name}": declared(name, metrics[name], rows) for name in shown}
        if tied := int(np.count_nonzero(ranked.tied)):
            about = "Queries whose best right item scores exactly as high as a wrong one, which counts as ahead of it."
            if config.metrics == "all":
                values[f"{direction}/tied_queries"] = Value(tied, "tied queries", rows=rows, about=about)
            _say_ties(embedded, direction, ranked)
        for name, of_lists in (recall or {}).items():
            if name in shown:
                value = declared(name, {"value": of_lists["value"]}, int(of_lists["queries"]))
                values[f"index_{direction}/{name}"] = replace(value, about="")
        if curve_at:
            curves[f"{direction}/recall"] = _curve(GROUPS[direction], metrics, curve_at)
    if config.metrics == "all" and config.mixed_queries:
        kinds = {"mixed": kinds_of_pairs(pairs, len(image), len(text))}
        if (classes := distinct_classes(embedded, config.label, "retrieval.label")) is not None:
            kinds["mixed_classes"] = kinds_of_classes(pairs, classes, len(text))
        image_of = np.arange(len(image) + len(text))
        image_of[len(image) + np.unique(pairs[:, 1])] = first_image
        for name, of_items in kinds.items():
            found = search_mixed(image, text, of_items, config.mixed_queries)
            made, of_queries = _mixed(name, found, image_of[found.query], config)
            values, outcomes = values | made, outcomes | of_queries
            sizes[f"{name}_queries"] = len(found.query)
    return Result(
        "retrieval",
        embedded.name,
        values,
        title="Image-text retrieval",
        about=ABOUT,
        groups={group: GROUPS[group] for group in dict.fromkeys(name.rpartition("/")[0] for name in values)},
        headlines=tuple(f"{direction}/{shown[0]}" for direction in DIRECTIONS),
        curves=curves,
        settings=asdict(config) | {"device": counting_device().type, "ties": "against the model"},
        rows=sizes,
        fingerprint=embedded.source.get("fingerprint"),
        outcomes=outcomes,
    )


def declared(name: str, metric: dict[str, float], rows: int) -> Value:
    """A metric of `ranking_metrics`, with its interval if it has one, as tables show it."""
    k = name.removeprefix("recall_at_")
    recall = f"Recall at {k}: the share of the queries whose rank is at most {k}."
    label, unit, about = MORE.get(name, (f"R@{k}", "share", recall))
    return Value(**metric, label=label, unit=unit, higher_is_better=unit == "share", rows=rows, about=about)


def _mixed(
    group: str, found: Found, images: np.ndarray, config: RetrievalConfig
) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """Values and outcomes of a mixed gallery. images: (q,), queries of one value are resampled together."""
    gain = f"NDCG of the first {AT} of all images and texts but the query; relevant are {MIXED[group]}. A relevant item"
    own = f"Share of the query's own modality in the first {AT}: the wider the gap between the modalities, the more."
    gain = f"{gain} at place r gains 1 / log2(1 + r), and 100 % is what all of them in front would gain."
    outcomes = {"ndcg_at_10": found.ndcg, "own_modality": found.own}
    values = {
        "ndcg_at_10": share(found.ndcg.mean(), label=f"NDCG@{AT}", chance=found.chance, about=gain),
        "own_modality": Value(float(found.own.mean()), "own modality", "share", about=own),
    }
    for name, bounds in _intervals(outcomes, images, config).items():
        values[name] = replace(values[name], **bounds)
    values = {f"{group}/{name}": replace(value, rows=len(found.query)) for name, value in values.items()}
    outcomes |= {"query": found.query, "group": images}
    return values, {f"{group}/{name}": rows for name, rows in outcomes.items()}


def _intervals(
    of_queries: dict[str, np.ndarray], group: np.ndarray, config: RetrievalConfig
) -> dict[str, dict[str, Any]]:
    independent = len(np.unique(group))
    if independent < 2:
        return {}
    groups = group if independent < len(group) else None

    def interval(name: str) -> tuple[float, float]:
        of = median_interval if name == "median_rank" else bootstrap_mean
        return of(of_queries[name], config.resamples, 0.95, config.seed, groups)

    found = zip(of_queries, share_out([*of_queries], interval), strict=True)
    return {name: {"low": low, "high": high} for name, (low, high) in found}


def _curve(title: str, metrics: Metrics, curve_at: list[int]) -> Curve:
    points = [metrics[f"recall_at_{k}"] for k in curve_at]
    y: dict[str, Any] = {"y" if name == "value" else name: [point[name] for point in points] for name in points[0]}
    x = [float(k) for k in curve_at]
    return Curve(x, **y, title=title, x_label="K", y_label="recall at K", unit="share", logarithmic=True, plot="recall")


def _say_ties(embedded: EmbeddedSet, direction: str, ranked: Ranked) -> None:
    """Log, once for each set and direction, how many queries tie, unless they are so few that rounding explains it."""
    tied, queries = int(np.count_nonzero(ranked.tied)), len(ranked.tied)
    place = (embedded.name, direction)
    if distributed.is_main() and tied > TIES_BY_CHANCE * ranked.gallery_size * queries and place not in _said_ties:
        _said_ties.add(place)
        unmerged = "" if embedded.merged else " (embedded by an earlier version, which merged no equal images)"
        log.warning(
            f"set {embedded.name}{unmerged}, {direction.replace('_', ' ')}: the best positive of {tied} of {queries} "
            "queries ties exactly with an item that is no positive, and a tie counts against the model: images of the "
            "same pixels in other bytes, captions of the same tokens, or collapsed embeddings"
        )
