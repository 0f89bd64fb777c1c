"""Sets embedded once: by all processes, in parts that a restart goes on from, with a model of ours or of open_clip."""

from modstruct.evaluation.embeddings.checkpoint_model import checkpoint_model
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.open_clip_model import open_clip_model
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.embeddings.writer import embed_set, embed_sets

__all__ = ["EmbeddingModel", "EmbeddingSource", "checkpoint_model", "embed_set", "embed_sets", "open_clip_model"]
