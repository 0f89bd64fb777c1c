"""One gallery of images and texts: NDCG by its definition and scikit-learn, ties, chance, and what is relevant."""

from __future__ import annotations

import numpy as np
import pytest
from ranking_cases import grid_rows
from sklearn.metrics import ndcg_score

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval import mixed
from modstruct.evaluation.retrieval.measure import RetrievalConfig, measure
from modstruct.evaluation.retrieval.mixed import kinds_of_classes, kinds_of_pairs, search_mixed

ALL = 10**6


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clouds(gap, count=70):
    """Images with a caption each, gap apart along an axis of its own."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((count, 9))
    image, text = rows + 0, rows + 0.3 * random.standard_normal(rows.shape)
    image[:, 8], text[:, 8] = gap, -gap
    return unit(image), unit(text), np.repeat(np.arange(count)[:, None], 2, axis=1)


@pytest.mark.parametrize("of", ["pairs", "classes"])
def test_ndcg_is_scikit_learns(of, monkeypatch):
    monkeypatch.setattr(mixed, "QUERIES_AT_ONCE", 13)
    image, text, pairs = grid_rows(40, 6, 0), grid_rows(90, 6, 1), np.stack([np.arange(90) % 40, np.arange(90)], axis=1)
    classes = np.random.default_rng(2).integers(-1, 4, 40)
    kinds = kinds_of_pairs(pairs, 40, 90) if of == "pairs" else kinds_of_classes(pairs, classes, 90)
    found = search_mixed(image, text, kinds, ALL)
    items = np.concatenate([image, text])
    scores = items @ items.T
    for query, relevant, ndcg, own in zip(found.query, found.relevant, found.ndcg, found.own, strict=True):
        others = np.delete(np.arange(130), query)
        right = (kinds[others] == kinds[query]) & (kinds[query] >= 0)
        assert relevant == right.sum()
        assert ndcg == pytest.approx(ndcg_score([right], [scores[query, others]], k=10), abs=1e-12)
        first = others[np.argsort(-scores[query, others], kind="stable")[:10]]
        assert own == pytest.approx(np.mean((first < 40) == (query < 40)))
    assert len(found.query) == (130 if of == "pairs" else sum(kinds >= 0))


def test_of_one_caption_an_image_it_is_one_over_the_logarithm_of_the_place_and_a_gap_lowers_it():
    image, text, pairs = clouds(0)
    found = search_mixed(image, text, kinds_of_pairs(pairs, 70, 70), ALL)
    scores = np.concatenate([image, text]) @ text[5]
    place = np.sum(np.delete(scores, [5, 75]) >= scores[5]) + 1
    assert found.ndcg[75] == pytest.approx(1 / np.log2(1 + place) if place <= 10 else 0)
    wide = search_mixed(*clouds(9)[:2], kinds_of_pairs(pairs, 70, 70), ALL)
    assert found.ndcg.mean() > 0.5 > wide.ndcg.mean() == 0
    assert wide.own.mean() == 1
    assert found.own.mean() < 0.6


@pytest.mark.parametrize("count", [4, 50])
def test_a_tie_counts_against_the_model(count):
    """Of collapsed embeddings the relevant item comes last, within a list of all items and beyond one."""
    same = np.repeat(np.eye(3, dtype=np.float32)[[0]], count, axis=0)
    pairs = np.repeat(np.arange(count)[:, None], 2, axis=1)
    found = search_mixed(same, same, kinds_of_pairs(pairs, count, count), ALL)
    assert found.ndcg == pytest.approx(np.full(2 * count, 1 / np.log2(8) if count == 4 else 0))


def test_chance_is_the_mean_of_random_rankings_and_queries_can_be_fewer():
    random = np.random.default_rng(0)
    image, text = unit(random.standard_normal((800, 64))), unit(random.standard_normal((800, 64)))
    kinds = random.integers(0, 3, 1600)
    found = search_mixed(image, text, kinds, ALL)
    assert found.chance == pytest.approx(1 / 3, abs=0.01)
    assert found.ndcg.mean() == pytest.approx(found.chance, abs=0.03)
    fewer = search_mixed(image, text, kinds, 100)
    assert len(fewer.query) == 100
    assert np.array_equal(fewer.ndcg, found.ndcg[fewer.query])


def test_relevant_is_what_pairs_connect_or_what_is_of_a_class():
    pairs = np.array([[0, 0], [0, 1], [1, 1], [3, 2]])  # text 1 is a caption of images 0 and 1; image 2 has none
    assert kinds_of_pairs(pairs, 4, 4).tolist() == [0, 0, 1, 2, 0, 0, 2, 3]
    assert kinds_of_classes(pairs, np.array([5, 6, 6, -1]), 4).tolist() == [5, 6, 6, -1, 5, 5, -1, -1]


def test_a_set_has_values_by_pair_and_by_class_with_outcomes_and_intervals():
    image, text, pairs = clouds(1)
    classes = {
        "labels": np.arange(70) % 4,
        "class_names": list("abcd"),
        "metadata": [{"half": n % 2} for n in range(70)],
    }
    made = EmbeddedSet("made", {}, {"image": image, "text": text}, pairs=pairs, **classes)
    result = measure(made, RetrievalConfig(resamples=100))
    for group in ("mixed", "mixed_classes"):
        value, own = result.values[f"{group}/ndcg_at_10"], result.values[f"{group}/own_modality"]
        assert value.value == pytest.approx(result.outcomes[f"{group}/ndcg_at_10"].mean())
        assert value.low < value.value < value.high
        assert (value.unit, value.higher_is_better, own.higher_is_better) == ("share", True, None)
        assert result.outcomes[f"{group}/group"].tolist() == [*range(70), *range(70)]
        assert result.rows[f"{group}_queries"] == 140
    discount = 1 / np.log2(np.arange(2, 12))
    assert result.values["mixed/ndcg_at_10"].chance == pytest.approx(discount.sum() / 139)
    halves = measure(made, RetrievalConfig(resamples=100, label="half"))
    assert halves.values["mixed_classes/ndcg_at_10"].chance == pytest.approx(69 / 139)
    assert "mixed/ndcg_at_10" not in measure(made, RetrievalConfig(resamples=100, mixed_queries=0)).values
    assert "mixed/ndcg_at_10" not in measure(made, RetrievalConfig("recall")).values
