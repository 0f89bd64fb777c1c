"""Retrieval at any size: exact ranks by counting, or FAISS's approximate lists, and the figures made of them."""

from modstruct.evaluation.ranking.exact import counting_device, items_ahead, pairs_ahead
from modstruct.evaluation.ranking.figures import ranked_queries, ranking_figures, recall_figures
from modstruct.evaluation.ranking.index import IndexConfig
from modstruct.evaluation.ranking.measure import measure_recall, measure_retrieval
from modstruct.evaluation.ranking.nearest import nearest
from modstruct.evaluation.ranking.retrieved import write_retrieved_examples
from modstruct.evaluation.ranking.set_retrieval import RetrievalConfig, measure_set_retrieval

__all__ = [
    "IndexConfig",
    "RetrievalConfig",
    "counting_device",
    "items_ahead",
    "measure_recall",
    "measure_retrieval",
    "measure_set_retrieval",
    "nearest",
    "pairs_ahead",
    "ranked_queries",
    "ranking_figures",
    "recall_figures",
    "write_retrieved_examples",
]
