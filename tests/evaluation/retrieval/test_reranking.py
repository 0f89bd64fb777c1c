from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import items_ahead
from tiny_fusion import fusion_model, fusion_recipe
from tiny_models import CAPTIONS, random_images, word_tokenizer

from modstruct.config import EvaluationConfig
from modstruct.errors import RunError
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.metrics import recall_metrics
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.reranking import ahead_after, reranked_retrieval


def plain_ahead(candidates: list[int], scores: list[float], positives: set[int], before: int) -> int:
    """Items ahead of the best positive: candidates by their scores, ties against it; everything else behind them."""
    best = [score for item, score in zip(candidates, scores, strict=True) if item in positives]
    if not best:
        return max(before, len(candidates))
    return sum(s >= max(best) and item not in positives for item, s in zip(candidates, scores, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 5))
def test_candidates_are_ranked_by_their_scores_and_a_tie_counts_against(seed, gallery, queries):
    random = np.random.default_rng(seed)
    k = random.integers(1, gallery + 1)
    candidates = np.stack([random.permutation(gallery)[:k] for _ in range(queries)])
    scores = random.integers(0, 3, (queries, k)).astype(np.float32)
    positive = random.random((queries, gallery)) < 0.4
    positive[:, 0] = True
    before = random.integers(0, gallery, queries)
    found = ahead_after(candidates, scores, np.argwhere(positive), before)
    expected = [
        plain_ahead(candidates[q].tolist(), scores[q].tolist(), set(np.flatnonzero(positive[q])), before[q])
        for q in range(queries)
    ]
    assert found.tolist() == expected


def matched(model, seen: torch.Tensor, caption: str) -> float:
    """How much better one pair matches than not, alone in its batch."""
    ids = word_tokenizer()([caption])
    backbone = model.backbone
    logits = model.match(backbone.encode_text(ids), backbone.mask(ids), backbone.encode_image(seen[None]))
    return float(logits[0, 1] - logits[0, 0])


@pytest.mark.parametrize("by", ["both", "matching"])
@pytest.mark.parametrize("candidates", [1, 2, 9])
@torch.no_grad()
def test_both_stages_are_as_a_plain_program_has_them(candidates, by):
    model = fusion_model(fusion_recipe()).eval()
    images, captions = random_images(16, 5, 3), list(CAPTIONS[:4])
    image = model({"image": images})["image"].numpy()
    text = model({"text": word_tokenizer()(captions)})["text"].numpy()
    pairs = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [4, 0]])
    embedded = EmbeddedSet("images", {}, {"image": image, "text": text}, pairs=pairs, captions=captions)
    settings = EvaluationConfig(batch=2, recall_at=[1, 2], rerank=candidates, rerank_by=by)
    batches = iter(images.split(2))
    found = reranked_retrieval(model, batches, word_tokenizer(), embedded, settings)
    scores = np.array([[matched(model, seen, caption) for caption in captions] for seen in images])
    if by == "both":
        scores += float(model.logit_scale.exp()) * image @ text.T
    for name, similarity, table, wanted, queries, gallery in (
        ("image_to_text", image @ text.T, scores, pairs, image, text),
        ("text_to_image", text @ image.T, scores.T, pairs[:, ::-1], text, image),
    ):
        ahead = []
        before = items_ahead(queries, gallery, wanted)
        for query in range(len(queries)):
            first = np.argsort(-similarity[query])[:candidates].tolist()
            assert nearest(queries, gallery, candidates)[query].tolist() == first
            positives = set(wanted[wanted[:, 0] == query, 1].tolist())
            ahead.append(plain_ahead(first, table[query, first].tolist(), positives, int(before[query])))
        positives = np.bincount(wanted[:, 0])
        expected = recall_metrics(np.array(ahead) + 1, positives, len(gallery), [1, 2])
        values = {recall: {"value": v.value, "chance": v.chance} for recall, v in found.grouped[name].items()}
        assert values == expected


def test_all_candidates_and_a_perfect_matching_find_everything():
    positives = np.stack([np.arange(6), np.arange(6)], axis=1)
    candidates = np.tile(np.arange(6), (6, 1))
    assert ahead_after(candidates, np.eye(6), positives, np.full(6, 5)).tolist() == [0] * 6


@torch.no_grad()
def test_an_image_that_is_lost_between_the_stages_ends_the_measurement():
    model, captions = fusion_model(fusion_recipe()).eval(), list(CAPTIONS[:4])
    image, text = np.eye(5, 8, dtype=np.float32), np.eye(4, 8, dtype=np.float32)
    found = iter([random_images(16, 2, 3), random_images(16, 2, 4)])
    embedded = EmbeddedSet("images", {}, {"image": image, "text": text}, pairs=[[0, 0]], captions=captions)
    with pytest.raises(RunError, match="4 instead of 5"):
        reranked_retrieval(model, found, word_tokenizer(), embedded, EvaluationConfig(batch=2, rerank=2))
