"""Retrieval metrics are those of peers, written plainly in float64; with equal scores, their worst.

The peers: CLIP_benchmark's zero-shot retrieval (batches of a dense matrix, top-k, a matrix of positives), ALBEF's and
BLIP's itm_eval (dicts of each image's texts and each text's image, ranks by argsort), open_clip's validation (one text
an image, ranks by argsort). Of a tie each takes the order that its sort happens to give, so with equal scores their
metrics change when rows are moved; ours do not, and no order of the rows gives any of theirs a lower value.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranking_cases import grid_rows

from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.metrics import ranked_queries

RECALL_AT = (1, 5, 10)


def clip_benchmark(image, text, image_of, batch=7):
    """image: (m,), the image row of each text."""
    scores = text.astype(np.float64) @ image.astype(np.float64).T
    positive = np.zeros(scores.shape, dtype=bool)
    positive[np.arange(len(text)), image_of] = True
    metrics = {}
    for way, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        for k in RECALL_AT:
            recalls = []
            for start in range(0, len(s), batch):
                part = slice(start, start + batch)
                top = torch.topk(torch.from_numpy(s[part].copy()), k, dim=1).indices.numpy()
                recalls.append(np.take_along_axis(p[part], top, axis=1).sum(1) / p[part].sum(1))
            metrics[way, f"recall_at_{k}"] = np.mean(np.concatenate(recalls) > 0)
    return metrics


def albef(image, text, image_of):
    scores = image.astype(np.float64) @ text.astype(np.float64).T
    texts_of = {i: np.flatnonzero(image_of == i).tolist() for i in range(len(image))}
    of_images = []
    for i, score in enumerate(scores):
        order = np.argsort(score)[::-1]
        of_images.append(min(np.where(order == t)[0][0] for t in texts_of[i]))
    of_texts = [np.where(np.argsort(score)[::-1] == image_of[t])[0][0] for t, score in enumerate(scores.T)]
    return {
        (way, f"recall_at_{k}"): np.mean(np.array(ranks) < k)
        for way, ranks in (("image_to_text", of_images), ("text_to_image", of_texts))
        for k in RECALL_AT
    }


def open_clip(image, text):
    """Row j of both belong together. Its mean rank is compared with that of our ranks."""
    logits = 100.0 * image.astype(np.float64) @ text.astype(np.float64).T
    metrics = {}
    for way, logit in (("image_to_text", logits), ("text_to_image", logits.T)):
        order = torch.argsort(torch.from_numpy(logit.copy()), descending=True)
        place = torch.where(order == torch.arange(len(order))[:, None])[1].numpy()
        metrics |= {(way, f"recall_at_{k}"): np.mean(place < k) for k in RECALL_AT}
        metrics[way, "mean_rank"] = place.mean() + 1
        metrics[way, "median_rank"] = np.floor(np.median(place)) + 1
    return metrics


def ours(image, text, image_of):
    pairs = np.stack([image_of, np.arange(len(text))], axis=1)
    measured = measure_retrieval(image, text, pairs, RECALL_AT)
    metrics = {(way, name): metric["value"] for way, found in measured.items() for name, metric in found.items()}
    for way, queries, gallery, positives in (
        ("image_to_text", image, text, pairs),
        ("text_to_image", text, image, pairs[:, ::-1]),
    ):
        metrics[way, "mean_rank"] = ranked_queries(*pairs_ahead(queries, gallery, positives), len(gallery)).rank.mean()
        metrics[way, "median_rank"] = np.floor(metrics[way, "median_rank"])  # open_clip's is whole
    return metrics


def peers(image, text, image_of):
    found = {"CLIP_benchmark": clip_benchmark(image, text, image_of), "ALBEF": albef(image, text, image_of)}
    if np.array_equal(image_of, np.arange(len(image))):
        found["open_clip"] = open_clip(image, text)
    return found


def pairs_of(images, captions, noise, seed):
    """Rows whose float32 scores are exact. Returns image, text, image."""
    image, image_of = grid_rows(images, 16, seed), np.repeat(np.arange(images), captions)
    moved = image[image_of] + noise * np.random.default_rng(seed + 100).standard_normal((len(image_of), 16)) / 4
    text = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return image, (np.trunc(text * 2048) / 2048).astype(np.float32), image_of


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("captions", [1, 5])
def test_metrics_are_those_of_peers_on_random_sets(captions, seed):
    image, text, image_of = pairs_of(60 if captions == 1 else 30, captions, 3.0, seed)
    scores = text.astype(np.float64) @ image.astype(np.float64).T
    for row in (*scores, *scores.T):
        assert len(np.unique(row)) == len(row)  # no tie
    found = ours(image, text, image_of)
    assert 0.05 < found["text_to_image", "recall_at_1"] < 0.95
    for name, metrics in peers(image, text, image_of).items():
        assert {metric: found[metric] for metric in metrics} == pytest.approx(metrics, abs=1e-12), name


def with_equal_scores(kind):
    image, text, image_of = pairs_of(40, 1 if kind in ("coarse", "one caption each") else 2, 2.0, 7)
    random = np.random.default_rng(8)
    if kind == "coarse":
        image, text = (np.round(rows * 2) for rows in (image, text))
    elif kind == "duplicate captions":
        text[random.permutation(80)[:30]] = text[3]
    elif kind == "duplicate images":
        image[random.permutation(40)[:15]] = image[5]
    elif kind == "collapsed":
        image[:], text[:] = image[0], text[0]
    elif kind == "one caption each":
        image[1::2], text[1::2] = image[::2], text[::2]
    return image.astype(np.float32), text.astype(np.float32), image_of


def moved(image, text, image_of, random):
    """The same set in another order of its rows; an image's captions may be apart."""
    images, texts = random.permutation(len(image)), random.permutation(len(text))
    if np.array_equal(image_of, np.arange(len(image))):  # open_clip's rows belong together
        texts = images
    return image[images], text[texts], np.argsort(images)[image_of[texts]]


@pytest.mark.parametrize("kind", ["coarse", "duplicate captions", "duplicate images", "collapsed", "one caption each"])
def test_with_equal_scores_ours_is_the_worst_of_peers_over_the_orders_of_rows(kind):
    case = with_equal_scores(kind)
    right, random = ours(*case), np.random.default_rng(9)
    lucky = False
    for _ in range(12):
        order = moved(*case, random)
        assert ours(*order) == pytest.approx(right, abs=1e-12)
        for metrics in peers(*order).values():
            for metric, value in metrics.items():
                assert value >= right[metric] - 1e-12 if "recall" in metric[1] else value <= right[metric] + 1e-12
                lucky |= abs(value - right[metric]) > 1e-6
    assert lucky  # a sort decides some tie for the model


@pytest.mark.parametrize("captions", [1, 2])
def test_the_worst_order_gives_peers_our_metrics(captions):
    """A stable sort, descending, with every tie decided against the positive: their definitions on ranks are ours."""
    image, text, image_of = with_equal_scores("coarse" if captions == 1 else "duplicate captions")
    scores = text.astype(np.float64) @ image.astype(np.float64).T
    positive = image_of[:, None] == np.arange(len(image))
    found = ours(image, text, image_of)
    for way, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        order = np.lexsort((p, -s), axis=1)
        best = np.take_along_axis(p, order, axis=1).argmax(axis=1)
        for k in RECALL_AT:
            assert found[way, f"recall_at_{k}"] == np.mean(best < k)
        assert found[way, "mean_rank"] == pytest.approx(best.mean() + 1)
