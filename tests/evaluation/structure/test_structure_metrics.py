"""Each metric agrees with its definition in float64, a sampled one within its interval; extremes are geometry's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from structure_cases import structure_metrics
from torch.nn import functional as F

from modstruct.evaluation.retrieval import rows as rows_module
from modstruct.evaluation.structure import metrics
from modstruct.evaluation.structure.measure import StructureConfig
from modstruct.evaluation.structure.metrics import (
    GRID,
    bridge,
    effective_rank,
    occurrences,
    one_to_one,
    skewness,
    spectra,
)
from modstruct.losses.bridge import bridge_distances

SMALL = StructureConfig(exact_rows=300, batch=64, batches=30, hubness_batch=100, separability_pairs=200)


def unit(*shape, seed=0):
    z = np.random.default_rng(seed).standard_normal(shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def near(z, noise, seed=0):
    moved = z + noise * np.random.default_rng(seed).standard_normal(z.shape) / z.shape[1] ** 0.5
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def row_pairs(count):
    return np.repeat(np.arange(count)[:, None], 2, axis=1)


@pytest.fixture(scope="module")
def source():
    """60 images with two captions each, and all that can be given; rows from a cone, as embeddings are."""
    image = near(np.repeat(unit(1, 12), 60, axis=0), 1.5, seed=1)
    text = near(np.repeat(image, 2, axis=0), 1.0, seed=2)
    pairs = np.stack([np.arange(120) // 2, np.arange(120)], axis=1)
    augmented = near(image + text[::2], 0.3, seed=3)
    return image, text, pairs, augmented, unit(60, 12, seed=4), unit(120, 12, seed=5)


def optional(source):
    return dict(zip(("image_augmented", "image_independent", "text_independent"), source[3:], strict=True))


def plain(image, text, pairs, augmented, image_independent, text_independent):
    """The definitions, in float64."""
    v, z, a, vi, zi = (x.astype(np.float64) for x in (image, text, augmented, image_independent, text_independent))
    pv, pz, pa = v[pairs[:, 0]], z[pairs[:, 1]], a[pairs[:, 0]]
    off = ~np.eye(len(pairs), dtype=bool)
    cross = pv @ pz.T

    def uniformity(x):
        distances = np.sum((x[:, None] - x[None]) ** 2, axis=2)
        return np.log(np.exp(-2 * distances)[~np.eye(len(x), dtype=bool)].mean())

    def erank(x):
        s = np.linalg.svd(x, compute_uv=False)
        p = s[s > 0] / s.sum()
        return np.exp(-np.sum(p * np.log(p)))

    def hubs(queries, gallery):
        found = np.argsort(-(queries @ gallery.T), axis=1)[:, :10]
        return stats.skew(np.bincount(found.ravel(), minlength=len(gallery)))

    def deviation(t):
        mean = t * pv + (1 - t) * pz
        return np.mean(np.sum((pa - mean / np.linalg.norm(mean, axis=1, keepdims=True)) ** 2, axis=1))

    def apart(x):
        return ((1 - x @ x.T) / 2)[~np.eye(len(x), dtype=bool)].mean()

    best = min(np.linspace(0, 1, 10_001), key=deviation)
    paired = np.mean((1 - np.sum(pv * pz, axis=1)) / 2)
    gap = np.sort((v.mean(0) - z.mean(0)) ** 2)
    return {
        "relative_modality_gap": paired / (paired + (apart(v) + apart(z)) / 2),
        "gap_dimensions": gap.sum() ** 2 / (gap**2).sum(),
        "gap_in_three_dimensions": gap[-3:].sum() / gap.sum(),
        "alignment": np.mean(np.sum((pv - pz) ** 2, axis=1)),
        "uniformity_image": uniformity(v),
        "uniformity_text": uniformity(z),
        "modality_gap": np.linalg.norm(v.mean(0) - z.mean(0)),
        "geometry_inter": ((cross - cross.T) ** 2)[off].mean(),
        "geometry_intra": ((pv @ pv.T - pz @ pz.T) ** 2)[off].mean(),
        "effective_rank_image": erank(v - v.mean(0)),
        "effective_rank_text": erank(z - z.mean(0)),
        "effective_rank_image_uncentred": erank(v),
        "effective_rank_text_uncentred": erank(z),
        "hubness_text": hubs(v, z),
        "hubness_image": hubs(z, v),
        "bridge_best_t": best,
        "bridge_deviation": deviation(best),
        "orthogonality_image": np.mean(np.sum(v * vi, axis=1) ** 2),
        "orthogonality_text": np.mean(np.sum(z * zi, axis=1) ** 2),
        "uniformity_image_independent": uniformity(vi),
        "uniformity_text_independent": uniformity(zi),
    }


def test_metrics_agree_with_their_definitions(source, monkeypatch):
    right = plain(*source)
    found, curves = structure_metrics(*source[:3], **optional(source))
    assert set(found) == {*right, "linear_separability"}
    for name, value in right.items():
        tolerance = 1e-4 if name == "bridge_best_t" else 2e-6
        assert found[name].value == pytest.approx(value, rel=tolerance), name
        assert (found[name].low, found[name].rows) == (None, None)
    image = source[0].astype(np.float64)
    deviations = np.linalg.svd(image - image.mean(0), compute_uv=False) / len(image) ** 0.5
    np.testing.assert_allclose(curves["spectrum_image"].y, deviations, rtol=1e-6)
    gap = np.sort(np.abs(image.mean(0) - source[1].astype(np.float64).mean(0)))[::-1]
    np.testing.assert_allclose(curves["gap_by_dimension"].y, gap, rtol=1e-9)
    assert curves["bridge_deviation"].x == GRID.tolist()
    assert curves["bridge_deviation"].chosen == found["bridge_best_t"].value
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 4 * 12 * 7)  # blocks of 7 rows
    for name, again in structure_metrics(*source[:3], **optional(source))[0].items():
        # The best t is where a smooth function is flat.
        assert again.value == pytest.approx(found[name].value, rel=1e-6 if name == "bridge_best_t" else 1e-9), name


def test_the_metrics_of_training_are_the_same(source):
    image, text, pairs = source[:3]
    found, _ = structure_metrics(image, text, pairs, config=StructureConfig(metrics="basic"))
    basics = metrics.structure(*(torch.from_numpy(x) for x in (image, text, pairs)))
    assert {name: value.value for name, value in found.items()} == pytest.approx(basics, rel=1e-5)


def test_sampled_metrics_have_an_interval_around_the_exact_value(tmp_path):
    image = near(np.repeat(unit(1, 16), 3000, axis=0), 2.0, seed=1)
    text, independent = near(image, 1.0, seed=2), unit(3000, 16, seed=3)
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    given_rows = {"image_augmented": mapped, "image_independent": independent}
    sampled, _ = structure_metrics(mapped, text, config=SMALL, **given_rows)
    exact, _ = structure_metrics(image, text, config=StructureConfig(separability_pairs=200), **given_rows)
    over_pairs = {"uniformity_image", "uniformity_text", "uniformity_image_independent"}
    over_pairs |= {"geometry_inter", "geometry_intra"}
    for name, right in exact.items():
        if name in over_pairs:
            assert right.rows is None
            assert sampled[name].rows == 64 * 30
            width = sampled[name].high - sampled[name].low
            assert sampled[name].low - width <= right.value <= sampled[name].high + width  # 6 deviations
            assert 0 < width < 0.1 * abs(right.value)
        elif not name.startswith("hubness"):
            assert sampled[name] == right, name
    for name in ("hubness_image", "hubness_text"):
        assert sampled[name].low < sampled[name].value < sampled[name].high
        assert sampled[name].rows == 100


def test_extremes():
    z = unit(200, 8)
    same, _ = structure_metrics(z, z, image_augmented=z, image_independent=z)
    expected = {"alignment": 0, "modality_gap": 0, "linear_separability": 0.5, "geometry_inter": 0, "geometry_intra": 0}
    expected |= {"bridge_deviation": 0, "orthogonality_image": 1}
    for name, value in expected.items():
        assert same[name].value == pytest.approx(value, abs=1e-7), name
    opposite, _ = structure_metrics(z, -z, image_augmented=-z, image_independent=np.roll(np.eye(8), 1, 0)[[0] * 200])
    assert opposite["alignment"].value == pytest.approx(4)
    assert opposite["bridge_best_t"].value < 0.5  # anywhere nearer to the text than to the image
    assert opposite["bridge_deviation"].value == pytest.approx(0, abs=1e-9)
    assert opposite["geometry_intra"].value == pytest.approx(0, abs=1e-9)
    north = np.repeat(np.eye(4)[:1], 30, axis=0)
    apart, _ = structure_metrics(north, -north)
    assert apart["modality_gap"].value == 2
    assert apart["uniformity_image"].value == pytest.approx(0, abs=1e-6)
    assert apart["effective_rank_image"].value == 1
    assert (apart["linear_separability"].value, apart["linear_separability"].rows) == (1, 30)
    assert apart["linear_separability"].low < 1 == apart["linear_separability"].high


def test_one_pair_has_only_what_it_can_have():
    found, _ = structure_metrics(unit(1, 4), unit(1, 4, seed=1))
    missing = {"uniformity_image", "uniformity_text", "linear_separability", "geometry_inter", "geometry_intra"}
    assert not missing & set(found)
    assert found["hubness_text"].value == 0


# The bridge


@settings(max_examples=30)
@given(st.integers(0, 999))
def test_the_deviation_is_the_loss_of_the_bridge(seed):
    image, text, augmented = (unit(9, 5, seed=3 * seed + i) for i in range(3))
    best, deviations = bridge(image, text, augmented, row_pairs(9))
    for t, found in zip((*GRID, best), deviations, strict=True):
        loss = bridge_distances(*(torch.from_numpy(x).double() for x in (image, text, augmented)), t).mean()
        assert found == pytest.approx(float(loss), rel=1e-6)
    assert deviations[-1] == min(deviations)


@settings(max_examples=30)
@given(st.floats(0, 1))
def test_the_best_t_is_found_where_it_was_put(t):
    image, text = unit(50, 8), unit(50, 8, seed=1)
    mean = t * image + (1 - t) * text
    augmented = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    best, deviations = bridge(image, text, augmented.astype(np.float32), row_pairs(50))
    assert best == pytest.approx(t, abs=1e-3)
    assert deviations[-1] == min(deviations)


# The linear classifier


def newton_accuracy(image, text, config):
    """The same classifier by Newton's method in float64."""
    chosen = np.random.default_rng(config.seed).permutation(row_pairs(len(image)))[:, 0]
    fold = np.arange(len(chosen)) % 5
    right = []
    for f in range(5):
        train, test = chosen[fold != f], chosen[fold == f]
        x = np.concatenate([image[train], text[train]]).astype(np.float64)
        mean, deviation = x.mean(0), x.std(0)
        x = np.concatenate([(x - mean) / deviation, np.ones((len(x), 1))], axis=1)
        y = np.repeat([1.0, 0.0], len(train))
        decay = metrics.DECAY * np.diag([1.0] * image.shape[1] + [0.0])
        w = np.zeros(x.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-x @ w))
            hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + decay
            w -= np.linalg.solve(hessian, x.T @ (p - y) / len(x) + decay @ w)
        for rows, truth in ((image[test], True), (text[test], False)):
            logits = np.c_[(rows - mean) / deviation, np.ones(len(rows))] @ w
            right.extend((logits > 0) == truth)
    return np.mean(right)


@pytest.mark.parametrize("gap", [0.0, 0.2, 0.5])
def test_separability_is_that_of_the_classifier_by_newtons_method(gap):
    image = unit(150, 6)
    text = near(unit(150, 6, seed=1) + gap * np.eye(6)[0], 0)
    found = structure_metrics(image, text)[0]["linear_separability"]
    assert found.value == pytest.approx(newton_accuracy(image, text, StructureConfig()), abs=1e-9)
    assert found.low <= found.value <= found.high
    assert found.low <= 0.5 or gap > 0


def test_each_row_is_in_one_pair_at_most():
    pairs = np.array([[0, 0], [0, 1], [1, 1], [2, 1], [3, 4]])
    assert one_to_one(pairs).tolist() == [[0, 0], [1, 1], [3, 4]]


# Spectrum and hubs


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))
def test_spectra_are_the_singular_values(count, dimension, seed):
    rows = unit(count, dimension, seed=seed)
    z = rows.astype(np.float64)
    for found, matrix in zip(spectra(rows), (z, z - z.mean(0)), strict=True):
        right = np.linalg.svd(matrix, compute_uv=False) / count**0.5
        np.testing.assert_allclose(found, right, atol=3e-8)
        assert 1 <= effective_rank(found) <= min(count, dimension) + 1e-9


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_count_as_many_as_they_are(rank):
    assert effective_rank(np.array([0.3] * rank + [0.0] * 5)) == pytest.approx(rank)


def test_a_hub_is_seen_and_equal_captions_are_one_item():
    queries = unit(300, 20)
    gallery = np.concatenate([unit(300, 20, seed=1), np.zeros((1, 20), np.float32)])
    plain_skewness = skewness(occurrences(queries, gallery, 10))
    gallery[-1] = queries.mean(0) / np.linalg.norm(queries.mean(0))
    gallery[-1] *= 4  # longer, and so near to half of the queries
    assert skewness(occurrences(queries, gallery, 10)) > plain_skewness + 2
    twice = np.concatenate([gallery, gallery])
    np.testing.assert_array_equal(occurrences(queries, twice, 10), occurrences(queries, gallery, 10))
    assert skewness(np.array([3, 3, 3])) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.full((3, 4), np.nan, np.float32)}, "3 of 3 image embeddings are not finite"),
        ({"text": unit(3, 5)}, "image embeddings have dimension 4, text embeddings 5"),
        ({"image": 2 * unit(3, 4)}, r"image = \(3, 4\): unit norm is needed, and row 0 has norm 2"),
        ({"pairs": np.array([[0, 3]])}, "outside the 3 images and 3 texts"),
        ({"pairs": np.empty((0, 2), np.int64)}, "this set has none"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        structure_metrics(**{"image": unit(3, 4), "text": unit(3, 4, seed=1)} | arguments)


def test_uniformity_of_normalised_rows_stays_in_its_range():
    z = F.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), dim=1).numpy()
    assert structure_metrics(z, z)[0]["uniformity_image"].value == pytest.approx(-8, abs=1e-6)


def test_the_relative_gap_of_known_clouds():
    """Where pairs lie as far apart as any two of one modality it is a half; of aligned pairs 0; of two points 1."""
    rows = unit(4000, 32)
    other = unit(4000, 32, seed=1)
    assert structure_metrics(rows, other)[0]["relative_modality_gap"].value == pytest.approx(0.5, abs=0.01)
    assert structure_metrics(rows, rows)[0]["relative_modality_gap"].value == 0
    point, place = (np.repeat(np.eye(4, dtype=np.float32)[[n]], 9, axis=0) for n in (0, 1))
    apart = structure_metrics(point, place)[0]
    assert apart["relative_modality_gap"].value == 1
    assert apart["gap_dimensions"].value == 2
    together = structure_metrics(point, point)[0]
    assert together["relative_modality_gap"].value == 0
    assert "gap_dimensions" not in together  # there is no gap to be carried
