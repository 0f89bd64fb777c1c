"""What training and a quick evaluation measure of a source: retrieval, zero-shot classification, structure."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from modstruct.config import EvaluationConfig
from modstruct.config.training import EmbeddingConfig
from modstruct.data.classification.class_files import load_classes
from modstruct.data.run_data import EvaluationData
from modstruct.data.shards.evaluation_samples import EvaluationSamples, evaluation_loader
from modstruct.distributed import device, is_main
from modstruct.distributed.collect import my_batches, on_main
from modstruct.evaluation.classification import zero_shot
from modstruct.evaluation.embeddings.embed import embed
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.model import EmbeddingModel, Encode
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.result import Result
from modstruct.evaluation.retrieval import measure as retrieval
from modstruct.evaluation.retrieval.reranking import reranked_retrieval
from modstruct.evaluation.structure import measure as structure
from modstruct.models.protocol import Matcher, TrainableModel

log = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    encode: Encode,
    samples: EvaluationSamples,
    data: EvaluationData,
    config: EvaluationConfig,
    field_name: str = "data.eval",
    inspect: Callable[[EmbeddedSet], None] | None = None,
    model: TrainableModel | None = None,
) -> dict[str, Result]:
    """Measure a source with all processes; every process calls this and gets the same results.

    encode: the engine in evaluation mode, called equally often on every process. data: its views, tokenizer and class
    file are used; no class file, no zero-shot classification. field_name: the recipe's field of the source, for
    messages. inspect: called with the embedded source on the main process, to draw examples for instance. model: its
    matching, if it has any, reranks the best evaluation.rerank candidates, if that is above 0.
    Returns, by metric: retrieval (recall alone, at 1 and evaluation.recall_at), reranked (the same after matching; only
    where `model` matches), zero_shot (only where an image has a label) and structure (alignment, uniformities, gap).
    settings["left_out"]: samples left out, by cause. Values are the same on any number of processes, as long as encode
    gives a batch the same rows on each of them.
    """
    started = time.monotonic()
    classes = None if data.zero_shot is None else load_classes(data.zero_shot)
    name, limits = field_name.rpartition(".")[2], samples.config
    settings = EmbeddingConfig(
        dtype="float32", batch=config.batch, workers=limits.workers, max_bad_share=limits.max_bad_share
    )
    embedder = EmbeddingModel(encode=encode, views=data.views, tokenize=data.tokenizer)
    source = embed(embedder, EmbeddingSource.of_samples(name, samples, classes, field_name), settings)
    config = replace(config, recall_at=sorted({1, *config.recall_at}))
    reranked: dict[str, Result] = {}
    if model is not None and model.matcher is not None and config.rerank:
        reranked["reranked"] = _reranked(model.matcher, source, samples, data, config)

    def measure() -> dict[str, Result]:
        if inspect is not None:
            inspect(source)
        counted = retrieval.measure(source, retrieval.RetrievalConfig("recall", tuple(config.recall_at), curve_at=()))
        settings = {**counted.settings, "left_out": source.manifest["skipped"]}
        results = {"retrieval": replace(counted, settings=settings)} | reranked
        if source.labels is not None and (source.labels >= 0).any():
            found = zero_shot.measure(source, zero_shot.ZeroShotConfig(tuple(config.top_k), "basic"))
            (values,) = found.grouped.values()
            results["zero_shot"] = replace(found, values=values, groups={})
        results["structure"] = structure.measure(source, structure.StructureConfig(metrics="basic"))
        results["retrieval"] = replace(results["retrieval"], seconds=time.monotonic() - started)
        return {metric: replace(result, outcomes={}) for metric, result in results.items()}

    if source.labels is not None and not (source.labels >= 0).any() and is_main():
        log.warning("%s: zero-shot is left out, since no image has a label of the class file", field_name)
    return on_main(measure)


def _reranked(
    model: Matcher, source: EmbeddedSet, samples: EvaluationSamples, data: EvaluationData, config: EvaluationConfig
) -> Result:
    """Recall after matching; the source's images are read once more, for their tokens."""
    batch, count = config.batch, len(source.indices) - len(source.copies)
    mine = my_batches(math.ceil(count / batch))
    numbers = source.indices[mine.start * batch : min(mine.stop * batch, count)].tolist()
    images = (found.image.to(device()) for found in evaluation_loader(samples, data.views, batch, numbers))
    return reranked_retrieval(model, images, data.tokenizer, source, config)
