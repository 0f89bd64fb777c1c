"""Retrieval at any size: exact ranks by counting, or FAISS's approximate lists, and the figures made of them."""

from modstruct.evaluation.retrieval.exact import counting_device, items_ahead, pairs_ahead
from modstruct.evaluation.retrieval.index import IndexConfig
from modstruct.evaluation.retrieval.measure import measure_recall, measure_retrieval
from modstruct.evaluation.retrieval.metrics import ranked_queries, ranking_metrics, recall_metrics
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.retrieved import write_retrieved_examples
from modstruct.evaluation.retrieval.set_retrieval import RetrievalConfig, measure_set_retrieval

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
    "ranking_metrics",
    "recall_metrics",
    "write_retrieved_examples",
]
