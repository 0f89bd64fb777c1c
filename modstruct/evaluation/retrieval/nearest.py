"""FAISS's indexes of a gallery, exact and approximate: lists of the nearest items, and ranks from them.

No GPU has run this yet: it is written after FAISS's documentation, and its tests use fakes instead of GPU indexes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from modstruct import distributed
from modstruct.errors import require, require_counts
from modstruct.evaluation.retrieval.exact import PairsAhead, pairs_ahead
from modstruct.evaluation.retrieval.rows import (
    Storage,
    as_float32,
    block_rows,
    check_dimensions,
    check_rows,
    checked_pairs,
    distinct_rows,
)

Engine = Literal["exact", "faiss_flat", "ivf", "hnsw", "cagra"]
Lists = tuple[np.ndarray, np.ndarray]
"""Scores, descending, and rows of each query's list, (b, k) each; row -1 where an index found fewer."""
GALLERY_BYTES = 256 << 20
"""Of float32 gallery rows that the CPU searches at once."""
RESULTS_AT_ONCE = 1 << 20
"""Scores of one search for ranks: bounds the memory, not the result."""
LARGEST_GPU_LIST, LARGEST_CAGRA_LIST = 2048, 512
"""Results per query that FAISS can select on a GPU; the first also of clusters looked at."""
TRAINING_ROWS_PER_LIST = 64
"""Of the clustering of an inverted file; FAISS wants 39 to 256."""
CAPABILITIES = ((7, 0), (10, 0))
"""Compute capabilities that FAISS's builds have kernels for: from the first to below the second."""
NO_CUVS = (
    "FAISS here is built without cuVS, which has CAGRA: install faiss-gpu-cuvs instead (`conda install -c pytorch "
    "-c nvidia -c rapidsai -c conda-forge libnvjitlink faiss-gpu-cuvs`), or take ivf or hnsw"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexConfig:
    """A FAISS index; an engine reads what it has."""

    storage: Storage = "float32"
    """Of the rows in it, but for faiss_flat on the CPU."""
    lists: int | None = None
    """ivf: number of clusters; None: 4 times the root of the gallery's size."""
    probes: int = 32
    """ivf: clusters looked at per query."""
    neighbours: int = 32
    """hnsw, cagra: edges of a node."""
    construction_width: int = 100
    """hnsw, cagra: candidates kept while the graph is built."""
    search_width: int = 128
    """hnsw, cagra: candidates kept in a search; at least the length of the requested list."""
    sample: int = 1000
    """Queries on which approximate lists are compared with exact ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.storage in get_args(Storage), "index.storage", self.storage, "one of float32, float16")
        counts = ("probes", "neighbours", "construction_width", "search_width", "sample")
        require_counts("index", self, counts if self.lists is None else (*counts, "lists"))


def load_faiss() -> Any:
    """FAISS, when it is needed; its type stubs lack CAGRA, which only some of its builds have."""
    import faiss

    return faiss


def require_searchable(engine: Engine) -> None:
    """Refuse, by name, an engine that is unknown or that this machine does not have."""
    require(engine in get_args(Engine), "retrieval.engine", engine, f"one of {', '.join(get_args(Engine))}")
    if engine == "cagra":
        require(hasattr(load_faiss(), "GpuIndexCagra"), "retrieval.engine", engine, NO_CUVS)
        here = len(usable_gpus()) > 0
        require(here, "retrieval.engine", engine, "needs a GPU that FAISS has kernels for; take ivf or hnsw")


def usable_gpus() -> list[int]:
    """Numbers of the GPUs that torch and FAISS see and FAISS has kernels for; none where the run is on the CPU.

    On a GPU that its build has no kernels for, FAISS ends the process instead of raising an error.
    """
    if not distributed.on_gpu():
        return []
    lowest, beyond = CAPABILITIES
    seen = range(min(load_faiss().get_num_gpus(), torch.cuda.device_count()))
    return [gpu for gpu in seen if lowest <= torch.cuda.get_device_capability(gpu) < beyond]


def own_gpu() -> list[int]:
    """This process's GPU where FAISS can use it: with several processes each has its own."""
    return [gpu for gpu in usable_gpus() if gpu == torch.cuda.current_device()]


class FaissIndex:
    """Rows of a gallery in one of FAISS's indexes, by inner product; of a tie the order is FAISS's.

    gallery: (g, D), float16 or float32, finite, may be memory-mapped. chosen: (c,), the rows that it holds; results are
    places among them. gpus: faiss_flat and ivf are divided among them, and searched on the CPU where there is none or
    their memory is too small; cagra takes the first. faiss_flat on the CPU reads the gallery in blocks at each search.
    """

    def __init__(
        self, gallery: np.ndarray, chosen: np.ndarray, engine: Engine, config: IndexConfig, gpus: Sequence[int]
    ):
        self.gallery, self.chosen, self.engine, self.config, self.gpus = gallery, chosen, engine, config, gpus
        self.longest_list = LARGEST_CAGRA_LIST if engine == "cagra" else LARGEST_GPU_LIST
        self._faiss = load_faiss()
        self._index = self._cagra() if engine == "cagra" else self._made()

    def search(self, queries: np.ndarray, length: int) -> Lists:
        """(q, D) float32 -> the best `length` of each query, at most the number of rows."""
        if self.engine == "faiss_flat":
            on_gpus = None
            if self._index is not None and length <= LARGEST_GPU_LIST:
                on_gpus = self._or_none(lambda: self._index.search(queries, length))
            return on_gpus or self._search_blocks(queries, length)
        more: dict[str, Any] = {}
        if self.engine == "hnsw":
            self._index.hnsw.efSearch = max(self.config.search_width, length)
        elif self.engine == "cagra":
            more = {"params": self._faiss.SearchParametersCagra(), "numeric_type": self._numeric_type()}
            more["params"].itopk_size = min(max(self.config.search_width, length), LARGEST_CAGRA_LIST)
        return self._index.search(queries, length, **more)

    def _search_blocks(self, queries: np.ndarray, length: int) -> Lists:
        heap = self._faiss.ResultHeap(len(queries), length, keep_max=True)
        metric = self._faiss.METRIC_INNER_PRODUCT
        for start, block in self._blocks(max(1, GALLERY_BYTES // (4 * self.gallery.shape[1]))):
            scores, rows = self._faiss.knn(queries, block, min(length, len(block)), metric=metric)
            heap.add_result(scores, rows + start)
        heap.finalize()
        return heap.D, heap.I

    def _made(self) -> Any:
        config, rows = self.config, len(self.chosen)
        coding = "SQfp16" if config.storage == "float16" else "Flat"
        lists = min(config.lists or int(4 * rows**0.5), max(1, rows // 39))
        kinds = {"faiss_flat": "Flat", "ivf": f"IVF{lists},{coding}", "hnsw": f"HNSW{config.neighbours},{coding}"}
        index = self._faiss.index_factory(self.gallery.shape[1], kinds[self.engine], self._faiss.METRIC_INNER_PRODUCT)
        if self.engine == "faiss_flat":
            return self._or_none(lambda: self._divided(self._filled(index))) if self.gpus else None
        if self.engine == "hnsw":
            index.hnsw.efConstruction = config.construction_width
            index.train(self._sample(1))
            return self._filled(index)
        index.by_residual, index.cp.spherical = False, False
        index.nprobe = min(config.probes, lists, LARGEST_GPU_LIST if self.gpus else lists)
        index.train(self._sample(TRAINING_ROWS_PER_LIST * lists))
        divided = self._or_none(lambda: self._filled(self._divided(index))) if self.gpus else None
        return divided or self._filled(index)

    def _cagra(self) -> Any:
        settings, most = self._faiss.GpuIndexCagraConfig(), len(self.chosen) - 1
        settings.device = self.gpus[0]
        settings.graph_degree = min(self.config.neighbours, most)
        settings.intermediate_graph_degree = min(max(self.config.construction_width, settings.graph_degree), most)
        self._resources = self._faiss.StandardGpuResources()  # to which the index holds no reference
        shape = self.gallery.shape[1], self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.GpuIndexCagra(self._resources, *shape, settings)
        index.train(self._rows(slice(None)).astype(self.config.storage), numeric_type=self._numeric_type())
        return index

    def _numeric_type(self) -> Any:
        return getattr(self._faiss, self.config.storage.capitalize())

    def _divided(self, index: Any) -> Any:
        options = self._faiss.GpuMultipleClonerOptions()
        options.shard, options.useFloat16 = True, self.config.storage == "float16"
        return self._faiss.index_cpu_to_gpus_list(index, co=options, gpus=list(self.gpus))

    def _filled(self, index: Any) -> Any:
        rows, at_once = len(self.chosen), block_rows(self.gallery.shape[1])
        hidden = not distributed.is_main()
        for _, block in tqdm(self._blocks(at_once), "indexing", -(-rows // at_once), disable=hidden, leave=False):
            index.add(block)
        return index

    def _rows(self, places: slice | np.ndarray) -> np.ndarray:
        return as_float32(self.gallery[self.chosen[places]]).numpy()

    def _blocks(self, at_once: int) -> Iterator[tuple[int, np.ndarray]]:
        return ((at, self._rows(slice(at, at + at_once))) for at in range(0, len(self.chosen), at_once))

    def _sample(self, count: int) -> np.ndarray:
        rows, random = len(self.chosen), np.random.default_rng(self.config.seed)
        return self._rows(np.sort(random.choice(rows, min(count, rows), replace=False)))

    def _or_none(self, work: Callable[[], Any]) -> Any:
        """What work gives; None, with a warning, where a GPU fails, mostly for lack of memory."""
        try:
            return work()
        except RuntimeError as error:
            log.warning("FAISS cannot use the GPU, searching on the CPU instead: %s", error)
            self._index = None
            return None


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """The k gallery items that score highest for each query, best first, (q, min(k, g)) int64.

    queries: (q, D), gallery: (g, D), float16 or float32, searched exactly by FAISS, on this process's own GPU where it
    can use that. chosen: (c,), the rows of the gallery that are searched; results are places among them.
    """
    check_rows("query", queries)
    check_rows("gallery", gallery)
    check_dimensions("query", queries, "gallery", gallery)
    chosen = np.arange(len(gallery)) if chosen is None else chosen
    index = FaissIndex(gallery, chosen, "faiss_flat", IndexConfig(), own_gpu())
    return index.search(as_float32(queries).numpy(), min(k, len(chosen)))[1]


class RankedByLists:
    """The distinct rows of a gallery in a FAISS index: equal rows are one row of it, and so always tie."""

    def __init__(self, gallery: np.ndarray, engine: Engine, config: IndexConfig, gpus: Sequence[int]):
        self.gallery = gallery
        self.first, self.row_of_item, self.occurrences = distinct_rows(gallery)
        self.index = FaissIndex(gallery, self.first, engine, config, gpus)

    def pairs_ahead(self, queries: np.ndarray, pairs: np.ndarray, longest_k: int) -> PairsAhead:
        """`exact.pairs_ahead` by lists; a tie counts against the model here too.

        For each query the best longest_k + R distinct rows are listed, R being the most positives of one query, at most
        index.longest_list. An item that is not listed counts as the last; but with faiss_flat a query whose positives
        its list does not hold, or only in the tie that it ends in, is counted instead, so that its rank is exact.
        FAISS's float32 products may differ from those that are counted in the last bit, and then a rank may too.
        """
        pairs, rows = checked_pairs(pairs, len(queries), len(self.gallery)), len(self.first)
        key_of_pair = pairs[:, 0] * rows + self.row_of_item[pairs[:, 1]]
        keys, positive_items = np.unique(key_of_pair, return_counts=True)
        distinct, query, positives = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
        key_ahead = (len(self.gallery) - positives)[np.searchsorted(distinct, keys // rows)]
        key_tied, told = np.zeros_like(key_ahead), np.zeros(len(distinct), dtype=bool)
        length = min(longest_k + int(positives.max()), rows, self.index.longest_list)
        step = max(1, RESULTS_AT_ONCE // length)
        for start in tqdm(range(0, len(distinct), step), "searching", disable=not distributed.is_main(), leave=False):
            chunk = distinct[start : start + step]
            scores, found = self.index.search(as_float32(queries[chunk]).numpy(), length)
            found_keys = chunk[:, None] * rows + found
            place = np.minimum(np.searchsorted(keys, found_keys), len(keys) - 1)
            positive = (keys[place] == found_keys) & (found >= 0)
            others = np.where(found >= 0, self.occurrences[found] - np.where(positive, positive_items[place], 0), 0)
            ahead, tied = _ahead_in_list(scores, others)
            key_ahead[place[positive]], key_tied[place[positive]] = ahead[positive], tied[positive]
            at_end = (positive & (scores == scores[:, -1:])).any(axis=1)
            told[start : start + step] = (length == rows) | (positive.any(axis=1) & ~at_end)
        place = np.searchsorted(keys, key_of_pair)
        ahead, tied, rest = key_ahead[place], key_tied[place], ~told[query]
        if self.index.engine == "faiss_flat" and rest.any():
            _, ahead[rest], tied[rest] = pairs_ahead(queries, self.gallery, pairs[rest])
        return pairs, ahead, tied

    def recall(self, queries: np.ndarray, recall_at: Sequence[int]) -> dict[str, dict[str, float]]:
        """{"recall_at_K": {"value": …, "queries": …}}, on a sample of queries: the mean share of the exact first K
        distinct rows among the K that are listed. A listed row that scores as high as the exact K-th counts."""
        index, random = self.index, np.random.default_rng(self.index.config.seed)
        count = min(index.config.sample, len(queries))
        sample = as_float32(queries[np.sort(random.choice(len(queries), count, replace=False))]).numpy()
        longest = min(max(recall_at), len(self.first), index.longest_list)
        exact = FaissIndex(self.gallery, self.first, "faiss_flat", IndexConfig(), index.gpus)

        def float64_scores(lists: Lists) -> np.ndarray:
            rows = zip(self.first[lists[1]], sample, strict=True)
            scores = [self.gallery[listed].astype(np.float64) @ query for listed, query in rows]
            return np.where(lists[1] >= 0, scores, -np.inf)

        found, right = (float64_scores(of.search(sample, longest)) for of in (index, exact))
        recall = {}
        for k in recall_at:
            enough = right[:, min(k, longest) - 1, None]
            good = found[:, : min(k, longest)] >= enough - 1e-12 * np.abs(enough)
            recall[f"recall_at_{k}"] = {"value": float(good.mean()), "queries": count}
        return recall


def _ahead_in_list(scores: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place, how many others score at least as high, and as high. scores, descending, others: (b, k)."""
    fresh = np.column_stack([np.ones(len(scores), dtype=bool), scores[:, 1:] != scores[:, :-1]])
    run = fresh.cumsum().reshape(scores.shape) - 1  # places of one score
    above = (others.cumsum(axis=1) - others)[fresh][run]
    tied = np.add.reduceat(others.reshape(-1), np.flatnonzero(fresh))[run]
    return above + tied, tied
