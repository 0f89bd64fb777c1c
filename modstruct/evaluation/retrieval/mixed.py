"""Search of one gallery that holds images and texts: NDCG@10, which a gap between the modalities lowers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modstruct.distributed.collect import share_out
from modstruct.evaluation.retrieval.nearest import FaissIndex, IndexConfig, own_gpu
from modstruct.evaluation.retrieval.rows import as_float32

AT = 10
DISCOUNT = 1 / np.log2(np.arange(2, AT + 2))
"""Of a relevant item at each place (Järvelin & Kekäläinen 2002)."""
LISTED = 2 * AT + 2
"""Items of each modality; more than AT, so that a tie across the end of a list is seen."""
LEAD = 1e-6
"""By which a relevant item must score higher than another one to count as ahead of it: float32 tells less apart."""
QUERIES_AT_ONCE = 4096


@dataclass(frozen=True)
class Found:
    """Of each query that has a relevant item, (q,). query: its item. relevant: how many it has. ndcg: from 0 to 1.
    own: share of the query's own modality in the first AT places. items: how many there are to search."""

    query: np.ndarray
    relevant: np.ndarray
    ndcg: np.ndarray
    own: np.ndarray
    items: int

    @property
    def chance(self) -> float:
        """Mean NDCG of random rankings, exact: each place holds a relevant item equally often."""
        gain = DISCOUNT[: self.items].sum() * self.relevant / self.items
        return float(np.mean(gain / _ideal(self.relevant)))


def kinds_of_pairs(pairs: np.ndarray, images: int, texts: int) -> np.ndarray:
    """(images + texts,) int64, equal for items, the images and then the texts, that pairs (p, 2) connect: an image and
    its captions, and the images that share a caption."""
    ends = pairs[:, 0], pairs[:, 1] + images
    graph = coo_array((np.ones(len(pairs)), ends), (images + texts, images + texts))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def kinds_of_classes(pairs: np.ndarray, classes: np.ndarray, texts: int) -> np.ndarray:
    """The same by class, (images,), -1 for none; a text is of the class of the first of its images."""
    known, first = np.unique(pairs[:, 1], return_index=True)
    of_texts = np.full(texts, -1)
    of_texts[known] = classes[pairs[first, 0]]
    return np.concatenate([classes, of_texts])


def search_mixed(image: np.ndarray, text: np.ndarray, kinds: np.ndarray, most: int) -> Found:
    """Queries rank all other images and texts by inner product; relevant are those of their kind. Collective.

    image: (n, D), text: (m, D), in memory or memory-mapped. kinds: (n + m,) int64, -1 for an item that is not relevant
    to any. most: queries at most, evenly spaced among those that have a relevant item. The gain of a place is 1 or 0;
    a tie counts against the model. Cost: 2 q (n + m) D operations, by FAISS, exact, in blocks of queries that are
    shared out over the processes.
    """
    relevant = np.where(kinds < 0, 0, np.bincount(kinds + 1)[kinds + 1] - 1)
    able = np.flatnonzero(relevant)
    queries = able[np.linspace(0, len(able) - 1, min(most, len(able))).round().astype(np.int64)]
    galleries = (image, 0), (text, len(image))
    indexes = [
        (FaissIndex(rows, np.arange(len(rows)), "faiss_flat", IndexConfig(), own_gpu()), first)
        for rows, first in galleries
    ]

    def search(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Discounted gain of the first AT places, and the share of the own modality in them, of each query."""
        of_image, lists, end = block < len(image), [], np.full(len(block), -np.inf)
        asked = np.concatenate([as_float32(image[block[of_image]]), as_float32(text[block[~of_image] - len(image)])])
        for index, first in indexes:
            scores, rows = index.search(asked, min(LISTED, len(index.chosen)))
            lists.append((scores.astype(np.float64), rows + first))
            if len(index.chosen) > LISTED:
                end = np.maximum(end, scores[:, -1])
        scores, items = (np.concatenate(parts, axis=1) for parts in zip(*lists, strict=True))
        right = kinds[items] == kinds[block][:, None]
        scores = np.where(items == block[:, None], -np.inf, scores - LEAD * right)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : min(AT, len(kinds) - 1)]
        scores, items, right = (np.take_along_axis(of, order, axis=1) for of in (scores, items, right))
        gain = (right & (scores > end[:, None])) @ DISCOUNT[: order.shape[1]]
        return gain, ((items < len(image)) == of_image[:, None]).mean(axis=1)

    blocks = [queries[start : start + QUERIES_AT_ONCE] for start in range(0, len(queries), QUERIES_AT_ONCE)]
    gain, own = (np.concatenate(parts) for parts in zip(*share_out(blocks, search, "mixed gallery"), strict=True))
    return Found(queries, relevant[queries], gain / _ideal(relevant[queries]), own, len(kinds) - 1)


def _ideal(relevant: np.ndarray) -> np.ndarray:
    """Discounted gain of a ranking with the relevant items first, (q,)."""
    return DISCOUNT.cumsum()[np.minimum(relevant, AT) - 1]
