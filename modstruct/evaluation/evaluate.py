"""All metrics of a source: retrieval and zero-shot classification beside chance, and the structure of embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from modstruct.config import EvaluationConfig
from modstruct.config.training import EmbeddingConfig
from modstruct.data.classification.class_files import load_classes
from modstruct.data.run_data import EvaluationData
from modstruct.data.shards.evaluation_samples import EvaluationSamples, evaluation_loader
from modstruct.distributed.collect import my_batches, on_main
from modstruct.evaluation.classification.accuracy import accuracies
from modstruct.evaluation.classification.zero_shot import class_embeddings, images_ahead
from modstruct.evaluation.embeddings.embed import embed
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.embeddings.model import EmbeddingModel, Encode
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.retrieval.measure import measure_recall
from modstruct.evaluation.retrieval.reranking import Reranking, reranked_retrieval
from modstruct.evaluation.structure.basic import structure
from modstruct.models.protocol import Matcher, TrainableModel


@torch.no_grad()
def evaluate(
    encode: Encode,
    samples: EvaluationSamples,
    data: EvaluationData,
    config: EvaluationConfig,
    device: torch.device,
    field_name: str = "data.eval",
    inspect: Callable[[EmbeddedSet], None] | None = None,
    model: TrainableModel | None = None,
) -> dict[str, Any]:
    """Measure a source with all processes; every process calls this and gets the same metrics.

    encode: the engine in evaluation mode, called equally often on every process. data: its views, tokenizer and class
    file are used; no class file, no zero-shot classification. field_name: the recipe's field of the source, for
    messages. inspect: called with the embedded source on the main process, to draw examples for instance. model: its
    matching, if it has any, reranks the best evaluation.rerank candidates, if that is above 0.
    Returns nested dicts of floats:
      retrieval   text_to_image and image_to_text: recall_at_K for 1 and evaluation.recall_at: value and chance
      reranked    as retrieval, after reranking; only where `model` matches
      zero_shot   top_k and mean_per_class: value and chance; only where an image has a label
      structure   alignment, uniformity_image, uniformity_text, modality_gap
      sizes       images and texts that are distinct, pairs, samples where these are more than the images, and for
                  zero-shot, which counts samples: classes, images_with_label, images_without_label
      skipped     samples left out, by cause
      seconds     embedding, total
    Metrics are the same on any number of processes, as long as encode gives a batch the same rows on each of them.
    """
    started = time.monotonic()
    classes = None if data.zero_shot is None else load_classes(data.zero_shot)
    name, limits = field_name.rpartition(".")[2], samples.config
    settings = EmbeddingConfig(
        dtype="float32", batch=config.batch, workers=limits.workers, max_bad_share=limits.max_bad_share
    )
    embedder = EmbeddingModel(encode=encode, views=data.views, tokenize=data.tokenizer)
    source = embed(embedder, EmbeddingSource.of_samples(name, samples, classes, field_name), settings)
    copies, images = len(source.copies), len(source.indices)
    sizes = {"samples": images} if copies else {}
    sizes |= {"images": images - copies, "texts": len(source.captions), "pairs": len(source.distinct_pairs)}
    classify: Callable[[], dict[str, Any]] | None = None
    if classes is not None:
        truth = source.labels
        assert truth is not None  # the source has classes
        kept = truth >= 0
        labelled = int(np.sum(kept))
        sizes |= {
            "classes": len(classes.classes),
            "images_with_label": labelled,
            "images_without_label": len(truth) - labelled,
        }
        if labelled:

            def classify() -> dict[str, Any]:
                prompts = source.class_prompts
                assert prompts is not None  # the source has classes
                rows, names = class_embeddings(prompts), source.class_names
                ahead = images_ahead(source.rows("image")[kept], rows, truth[kept], names)
                top_k = [k for k in config.top_k if k <= len(names)]
                found = accuracies(ahead, truth[kept], len(names), top_k, intervals=False)
                return {name: {"value": value.value, "chance": value.chance} for name, value in found.items()}

    embedded = time.monotonic()
    reranked = {}
    matcher = model.matcher if model is not None and config.rerank else None
    if matcher is not None:
        reranked = _reranked(matcher, source, samples, data, config, device)

    def measure() -> dict[str, Any]:
        if inspect is not None:
            inspect(source)
        recall_at = sorted({1, *config.recall_at})
        compared = (source.distinct_rows("image"), source.rows("text"), source.distinct_pairs)
        found = measure_recall(*compared, recall_at, name=field_name)
        metrics: dict[str, Any] = {"retrieval": found}
        if reranked:
            metrics["reranked"] = reranked
        if classify is not None:
            metrics["zero_shot"] = classify()
        on_device = (torch.from_numpy(rows).to(device) for rows in compared)
        metrics["structure"] = structure(*on_device)
        metrics["sizes"] = {name: float(size) for name, size in sizes.items()}
        metrics["skipped"] = {cause: float(number) for cause, number in source.manifest["skipped"].items()}
        ended = time.monotonic()
        metrics["seconds"] = {"embedding": embedded - started, "total": ended - started}
        return metrics

    return on_main(measure)


def _reranked(
    model: Matcher,
    source: EmbeddedSet,
    samples: EvaluationSamples,
    data: EvaluationData,
    config: EvaluationConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Recall after matching; the source's images are read once more, for their tokens."""
    batch, count = config.batch, len(source.indices) - len(source.copies)
    mine = my_batches(math.ceil(count / batch))
    numbers = source.indices[mine.start * batch : min(mine.stop * batch, count)].tolist()
    images = (found.image.to(device) for found in evaluation_loader(samples, data.views, batch, numbers))
    settings = Reranking(config.rerank, config.rerank_by, sorted({1, *config.recall_at}), batch)
    return reranked_retrieval(model, images, data.tokenizer, source, settings, device)
