"""Retrieval in two stages: the best candidates by ITC are reranked by ITM (Li et al. 2021, section 6).

Items beyond the candidates keep their places behind them. A tie counts against the model, as everywhere.

A candidate scores scale <query, candidate> + matching logit; or the logit alone, as in ALBEF. Matching learned to tell
pairs from negatives drawn by the contrast, q ∝ exp(scale <query, candidate>), so its logit estimates log p / q, and the
sum log p up to a constant: noise-contrastive estimation with noise q (Gutmann & Hyvärinen 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import EvaluationConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed.collect import collect_rows, collect_tokens, my_batches, on_main
from modstruct.errors import RunError
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Result, Value
from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import GROUPS, declared
from modstruct.evaluation.retrieval.metrics import ranked_queries, recall_metrics
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.models.protocol import Matcher

LARGEST_ON_DEVICE_BYTES = 8 << 30
"""Tokens of a gallery beyond this are kept in the host's memory."""
ABOUT = (
    "For each query the matching head, which sees image and caption together, ranks the best candidates by contrast "
    "again. R@K is the share of the queries with a right item among the first K then; others stay behind them."
)


@torch.no_grad()
def reranked_retrieval(
    model: Matcher, images: Iterator[Tensor], tokenizer: Tokenizer, embedded: EmbeddedSet, config: EvaluationConfig
) -> Result:
    """Recall at K both ways after matching has reranked each query's candidates; every process calls it.

    config: `rerank` candidates of each query, by what they are reranked (see above), K, and how many images, texts or
    pairs make a forward pass. images: this process's batches of the n images (see collect.my_batches), uint8
    (b, 3, H, W) on the device, in the order of embedded's distinct images. Values have the names of retrieval's. Raises
    RunError, on every process, where `images` yields another number.
    """
    backbone, batch, device = model.backbone, config.batch, distributed.device()
    image, text, pairs = embedded.distinct_rows("image"), embedded.rows("text"), embedded.distinct_pairs
    grey = torch.zeros((1, 3, backbone.image_size, backbone.image_size), dtype=torch.uint8, device=device)
    image_tokens = _gathered(backbone.encode_image, images, grey, len(image), batch, "encoding images")
    if len(image_tokens) != len(image):  # images are read a second time; one that is lost would shift those after it
        counts = f"{len(image_tokens):,} instead of {len(image):,} could be read a second time"
        raise RunError(f"images changed while they were measured: {counts}; measure again")
    ids = tokenizer(embedded.captions).to(device)
    mine = (ids[n * batch : (n + 1) * batch] for n in my_batches(math.ceil(len(ids) / batch)))
    text_tokens = _gathered(backbone.encode_text, mine, ids[:1], len(ids), batch, "encoding captions")
    mask = backbone.mask(ids)

    def score(texts: Tensor, images: Tensor) -> Tensor:
        """Of each pair (b,), how much better it matches than not."""
        rows, seen = text_tokens[texts.to(text_tokens.device)], image_tokens[images.to(image_tokens.device)]
        logits = model.match(rows.to(device), mask[texts], seen.to(device))
        return logits[:, 1] - logits[:, 0]

    # A forward pass gathers the scale under ZeRO-3.
    scale = float(model({"text": ids[:1]})["logit_scale"]) if config.rerank_by == "both" else 0.0
    found = {
        "text_to_image": _direction(text, image, pairs[:, ::-1], score, scale, config),
        "image_to_text": _direction(image, text, pairs, lambda i, t: score(t, i), scale, config),
    }
    return Result(
        "reranked",
        embedded.name,
        {f"{direction}/{name}": value for direction, of in found.items() for name, value in of.items()},
        "Image-text retrieval after matching",
        ABOUT,
        {direction: f"{GROUPS[direction]}, matched" for direction in found},
        tuple(f"{direction}/recall_at_1" for direction in found),
        settings={"candidates": config.rerank, "by": config.rerank_by},
    )


def _direction(
    queries: np.ndarray,
    gallery: np.ndarray,
    pairs: np.ndarray,
    score: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    config: EvaluationConfig,
) -> dict[str, Value]:
    found, device = on_main(lambda: nearest(queries, gallery, config.rerank)), distributed.device()  # (q, k)
    k = found.shape[1]
    at_once = max(1, config.batch // k)  # queries
    batches = math.ceil(len(found) / at_once)
    rows = torch.from_numpy(found).to(device)
    numbers = torch.arange(len(found), device=device)
    mine = (numbers[n * at_once : (n + 1) * at_once] for n in my_batches(batches))

    def scores_of(some: Tensor) -> Tensor:
        return score(some.repeat_interleave(k), rows[some].flatten()).view(len(some), k)

    scores = collect_rows(scores_of, mine, numbers[:1], batches, at_once, "reranking")

    def measure() -> dict[str, Value]:
        both = scores + scale * np.einsum("qd,qkd->qk", queries, gallery[found])
        first = ranked_queries(*pairs_ahead(queries, gallery, pairs), len(gallery))
        before = np.zeros(len(queries), dtype=np.int64)
        before[first.query] = first.rank - 1
        after = ahead_after(found, both, pairs, before)[first.query]
        recalls = recall_metrics(after + 1, first.positives, len(gallery), config.recall_at)
        return {name: declared(name, metric, len(first.query)) for name, metric in recalls.items()}

    return on_main(measure)


def ahead_after(candidates: np.ndarray, scores: np.ndarray, pairs: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Non-positive items ahead of each query's best positive once its candidates are ranked by their scores, (q,).

    candidates, scores: (q, k). pairs: (p, 2), (query row, gallery row). ahead: (q,), before; where no candidate is a
    positive, all k candidates stay ahead.
    """
    items = int(max(candidates.max(), pairs[:, 1].max())) + 1
    positive = np.isin(np.arange(len(candidates))[:, None] * items + candidates, pairs[:, 0] * items + pairs[:, 1])
    best = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
    after = ((scores >= best) & ~positive).sum(axis=1)
    return np.where(positive.any(axis=1), after, np.maximum(ahead, candidates.shape[1]))


def _gathered(
    encode: Callable[[Tensor], Tensor], inputs: Iterator[Tensor], filler: Tensor, rows: int, batch: int, title: str
) -> Tensor:
    """Tokens of all rows on every process, in half precision on a GPU."""

    def tokens(some: Tensor) -> Tensor:
        return encode(some).to(torch.bfloat16 if filler.is_cuda else torch.float32)

    store = filler.device if tokens(filler).nbytes * rows <= LARGEST_ON_DEVICE_BYTES else torch.device("cpu")
    return collect_tokens(tokens, inputs, filler, math.ceil(rows / batch), batch, store, title)
