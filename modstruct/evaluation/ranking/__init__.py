"""Retrieval at any size: exact ranks by counting, or FAISS's approximate lists, and the figures made of them."""

from modstruct.evaluation.ranking.exact import pairs_ahead
from modstruct.evaluation.ranking.figures import ranking_figures
from modstruct.evaluation.ranking.index import IndexConfig
from modstruct.evaluation.ranking.measure import measure_retrieval

__all__ = ["IndexConfig", "measure_retrieval", "pairs_ahead", "ranking_figures"]
