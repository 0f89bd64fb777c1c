"""FAISS's approximate indexes of a gallery, the ranks that their lists give, and their recall against exact search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from modstruct.errors import refuse, require, require_counts
from modstruct.evaluation.retrieval.exact import PairsAhead
from modstruct.evaluation.retrieval.nearest import (
    LARGEST_GPU_LIST,
    ShardedIndex,
    chosen_blocks,
    nearest,
    say_gpu_failed,
    usable_gpus,
)
from modstruct.evaluation.retrieval.rows import (
    Storage,
    as_float32,
    check_dimensions,
    check_rows,
    checked_pairs,
    distinct_rows,
)

Kind = Literal["exact", "ivf", "hnsw", "cagra"]
LARGEST_CAGRA_LIST = 512
"""Candidates that a CAGRA search keeps."""
TRAINING_ROWS_PER_LIST = 64
"""Of the clustering of an inverted file; FAISS wants 39 to 256."""
TRAINING_BLOCK = 1 << 16


@dataclass(frozen=True)
class IndexConfig:
    """How a gallery is searched."""

    kind: Kind = "exact"
    """exact: all ranks by counting. ivf: inverted file. hnsw: graph, on the CPU. cagra: graph, on GPUs, where faiss is
    built with cuVS. All but the first are approximate."""
    storage: Storage = "float32"
    """Of the rows in an approximate index; exact search reads the array as it is."""
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
    """Queries on which an approximate index is measured against exact search."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(Kind)), ("storage", get_args(Storage))):
            require(
                getattr(self, name) in allowed, f"index.{name}", getattr(self, name), f"one of {', '.join(allowed)}"
            )
        counts = ("probes", "neighbours", "construction_width", "search_width", "sample")
        require_counts("index", self, counts if self.lists is None else (*counts, "lists"))


def _faiss() -> Any:
    """FAISS; its type stubs lack CAGRA, which only some of its builds have, and take enum values for objects."""
    import faiss

    return faiss


def require_searchable(config: IndexConfig) -> None:
    """Refuse, by name, an index that this machine cannot build."""
    if config.kind != "cagra":
        return
    faiss = _faiss()
    if not hasattr(faiss, "GpuIndexCagra"):
        refuse(
            "index.kind",
            "cagra",
            f"faiss {faiss.__version__} here is built without cuVS, which has CAGRA: install faiss-gpu-cuvs instead "
            "(`conda install -c pytorch -c nvidia -c rapidsai -c conda-forge libnvjitlink faiss-gpu-cuvs`), or take "
            "ivf or hnsw",
        )
    require(bool(usable_gpus()), "index.kind", "cagra", "needs a GPU that faiss has kernels for; take ivf or hnsw")


class AnnIndex:
    """A FAISS index of the distinct rows of a gallery, by inner product.

    gallery: (g, D), float16 or float32, may be memory-mapped; it is read in blocks, but for CAGRA, which takes a GPU's
    part at once. Memory: the index's own. An inverted file and CAGRA are divided among the GPUs that FAISS can use; an
    inverted file that does not fit their memory is searched on the CPU. No GPU has run this yet.
    """

    def __init__(self, gallery: np.ndarray, config: IndexConfig, progress: bool = False):
        require_searchable(config)
        check_rows("gallery", gallery)
        self.gallery, self.config, self._progress = gallery, config, progress
        self.first, self.row_of_item, self.occurrences = distinct_rows(gallery)
        self._kept: list[Any] = []  # an index holds no reference of its own to what it is made with
        self._index = {"ivf": self._inverted_file, "hnsw": self._hnsw, "cagra": self._cagra}[config.kind]()

    @property
    def distinct(self) -> np.ndarray | None:
        """The rows of the gallery that the index holds, None for all."""
        return None if len(self.first) == len(self.gallery) else self.first

    @property
    def longest_list(self) -> int:
        """Most results per query that are requested, however many positives a query has."""
        return LARGEST_CAGRA_LIST if self.config.kind == "cagra" else LARGEST_GPU_LIST

    def search(self, queries: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, D) float32 -> scores (b, length), descending, and distinct rows (b, length), -1 where none is found."""
        if self.config.kind == "hnsw":
            self._index.hnsw.efSearch = max(self.config.search_width, length)
        return self._index.search(queries, length)

    def _hnsw(self) -> Any:
        faiss = _faiss()
        dimension, m, metric = self.gallery.shape[1], self.config.neighbours, faiss.METRIC_INNER_PRODUCT
        if self.config.storage == "float16":
            index = faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_fp16, m, metric)
            index.train(self._sample(1))
        else:
            index = faiss.IndexHNSWFlat(dimension, m, metric)
        index.hnsw.efConstruction = self.config.construction_width
        return self._filled(index)

    def _inverted_file(self) -> Any:
        faiss = _faiss()
        dimension, rows, metric = self.gallery.shape[1], len(self.first), faiss.METRIC_INNER_PRODUCT
        gpus = usable_gpus()
        lists = min(self.config.lists or int(4 * rows**0.5), max(1, rows // 39))
        quantizer = faiss.IndexFlatIP(dimension)
        if self.config.storage == "float16":
            sixteen_bits = faiss.ScalarQuantizer.QT_fp16
            index = faiss.IndexIVFScalarQuantizer(quantizer, dimension, lists, sixteen_bits, metric, False)
        else:
            index = faiss.IndexIVFFlat(quantizer, dimension, lists, metric)
        self._kept.append(quantizer)
        index.nprobe = min(self.config.probes, lists, LARGEST_GPU_LIST if gpus else lists)
        index.train(self._sample(TRAINING_ROWS_PER_LIST * lists))
        if gpus:
            try:
                return ShardedIndex(rows, gpus, lambda gpu, part: self._filled(self._on_gpu(index, gpu), part))
            except RuntimeError as error:
                say_gpu_failed(error)
        return self._filled(index)

    def _on_gpu(self, trained: Any, gpu: int) -> Any:
        """A copy of a trained index that holds no rows yet."""
        faiss = _faiss()
        resources = faiss.StandardGpuResources()
        self._kept.append(resources)
        return faiss.index_cpu_to_gpu(resources, gpu, trained)

    def _cagra(self) -> Any:
        return ShardedIndex(len(self.first), usable_gpus(), self._cagra_part)

    def _cagra_part(self, gpu: int, part: range) -> Any:
        faiss = _faiss()
        resources, config = faiss.StandardGpuResources(), faiss.GpuIndexCagraConfig()
        self._kept.append(resources)
        config.device = gpu
        config.graph_degree = min(self.config.neighbours, len(part) - 1)
        config.intermediate_graph_degree = min(max(self.config.construction_width, config.graph_degree), len(part) - 1)
        index = faiss.GpuIndexCagra(resources, self.gallery.shape[1], faiss.METRIC_INNER_PRODUCT, config)
        kind = faiss.Float16 if self.config.storage == "float16" else faiss.Float32
        ((_, rows),) = chosen_blocks(self.gallery, self.distinct, len(part), part)
        index.train(rows.astype(self.config.storage), numeric_type=kind)
        return _CagraPart(index, kind, self.config.search_width)

    def _filled(self, index: Any, part: range | None = None) -> Any:
        for _, block in self._blocks(part):
            index.add(block)
        return index

    def _blocks(self, part: range | None) -> Iterator[tuple[int, np.ndarray]]:
        rows = len(self.first) if part is None else len(part)
        with tqdm(
            total=rows, desc=f"building {self.config.kind}", unit="row", disable=not self._progress, leave=False
        ) as bar:
            for start, block in chosen_blocks(self.gallery, self.distinct, TRAINING_BLOCK, part):
                yield start, block
                bar.update(len(block))

    def _sample(self, count: int) -> np.ndarray:
        random = np.random.default_rng(self.config.seed)
        chosen = np.sort(random.choice(len(self.first), min(count, len(self.first)), replace=False))
        return as_float32(self.gallery[self.first[chosen]]).numpy()


class _CagraPart:
    """One GPU's CAGRA graph, searched with the width and number type that it was built with."""

    def __init__(self, index: Any, kind: Any, search_width: int):
        self._index, self._kind, self._search_width = index, kind, search_width

    def search(self, queries: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        width = _faiss().SearchParametersCagra()
        width.itopk_size = min(max(self._search_width, length), LARGEST_CAGRA_LIST)
        return self._index.search(queries, length, params=width, numeric_type=self._kind)


RESULTS_AT_ONCE = 1 << 20
"""Scores of one search."""


def ann_pairs_ahead(
    queries: np.ndarray, index: AnnIndex, pairs: np.ndarray, longest_k: int, progress: bool = False
) -> PairsAhead:
    """`exact.pairs_ahead` by the lists of an approximate index.

    For each query the best longest_k + R distinct rows are listed, R being the most positives of one query, at most
    index.longest_list. An item that the index did not list counts as the last, behind every item that is no positive.
    """
    check_rows("query", queries)
    check_dimensions("query", queries, "gallery", index.gallery)
    pairs = checked_pairs(pairs, len(queries), len(index.gallery))
    rows = len(index.first)
    keys, positive_items = np.unique(pairs[:, 0] * rows + index.row_of_item[pairs[:, 1]], return_counts=True)
    distinct, query_of_pair = np.unique(pairs[:, 0], return_inverse=True)
    positives = np.bincount(query_of_pair.reshape(-1))
    key_ahead = (len(index.gallery) - positives)[np.searchsorted(distinct, keys // rows)]
    key_tied = np.zeros_like(key_ahead)
    length = min(longest_k + int(positives.max()), rows, index.longest_list)
    step = max(1, RESULTS_AT_ONCE // length)
    for start in tqdm(range(0, len(distinct), step), desc="searching", disable=not progress, leave=False):
        chunk = distinct[start : start + step]
        scores, found = index.search(as_float32(queries[chunk]).numpy(), length)
        found_keys = chunk[:, None] * rows + found
        place = np.minimum(np.searchsorted(keys, found_keys), len(keys) - 1)
        positive = (keys[place] == found_keys) & (found >= 0)
        others = np.where(found >= 0, index.occurrences[found] - np.where(positive, positive_items[place], 0), 0)
        ahead, tied = _ahead_in_list(scores, others)
        key_ahead[place[positive]], key_tied[place[positive]] = ahead[positive], tied[positive]
    pair = np.searchsorted(keys, pairs[:, 0] * rows + index.row_of_item[pairs[:, 1]])
    return pairs, key_ahead[pair], key_tied[pair]


def _ahead_in_list(scores: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place, how many others score at least as high, and as high.

    scores: (b, k), descending; others: (b, k), counts.
    """
    ahead = others.cumsum(axis=1)
    above, goes_on = ahead - others, scores[:, :-1] == scores[:, 1:]
    above[:, 1:][goes_on] = 0  # not the first of its tie
    ahead[:, :-1][goes_on] = np.iinfo(np.int64).max  # not the last
    ahead = np.minimum.accumulate(ahead[:, ::-1], axis=1)[:, ::-1]
    return ahead, ahead - np.maximum.accumulate(above, axis=1)


def ann_recall(queries: np.ndarray, index: AnnIndex, recall_at: Sequence[int]) -> dict[str, dict[str, float]]:
    """Recall of the index against exact search, on a sample of queries.

    Returns {"recall_at_K": {"value": …, "queries": …}}: the mean share of the exact first K distinct rows among the K
    that the index lists. A listed row that scores as high as the exact K-th counts.
    """
    random = np.random.default_rng(index.config.seed)
    count = min(index.config.sample, len(queries))
    sample = as_float32(queries[np.sort(random.choice(len(queries), count, replace=False))])
    recall = {}
    longest = min(max(recall_at), len(index.first), index.longest_list)
    _, found = index.search(sample.numpy(), longest)
    right = nearest(sample.numpy(), index.gallery, longest, index.distinct, gpus=usable_gpus())
    found_scores, right_scores = (_float64_scores(sample, index, rows) for rows in (found, right))
    for k in recall_at:
        k_here = min(k, longest)
        enough = right_scores[:, k_here - 1 : k_here]
        good = (found_scores[:, :k_here] >= enough - 1e-12 * np.abs(enough)).sum(axis=1)
        recall[f"recall_at_{k}"] = {"value": float(np.mean(good / k_here)), "queries": count}
    return recall


def _float64_scores(sample: torch.Tensor, index: AnnIndex, rows: np.ndarray) -> np.ndarray:
    """Scores of listed rows, (s, k), -inf where the list has none."""
    scores = np.empty(rows.shape)
    for j, (query, listed) in enumerate(zip(sample.double(), rows, strict=True)):
        items = as_float32(index.gallery[index.first[np.maximum(listed, 0)]]).double()
        scores[j] = (items * query).sum(1).numpy()
    return np.where(rows >= 0, scores, -np.inf)
