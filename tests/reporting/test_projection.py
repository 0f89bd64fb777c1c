"""The projection is PCA of both modalities together, the same for the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_folders import Embeddings, save_model, save_result, unit

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Value
from modstruct.reporting.loading import load_evaluations
from modstruct.reporting.plots import SHOWN_PAIRS, planes, project


def embedded(made: Embeddings) -> EmbeddedSet:
    arrays = {"image": made.image, "text": made.text}
    more = {"pairs": made.pairs, "captions": made.captions, "keys": made.keys}
    return EmbeddedSet("scenes", {"name": "m", "fingerprint": "f"}, arrays, **more)


def drawn(tmp_path, source: EmbeddedSet):
    """The plot of the set of one run."""
    save_model(tmp_path, "run")
    source.save(tmp_path / "embeddings" / "scenes")
    save_result(tmp_path, "scenes", "structure", {"a": Value(1.0)})
    return planes(load_evaluations([tmp_path]))


def test_it_agrees_with_the_singular_vectors_of_the_joint_cloud():
    made = Embeddings(100, 0.3, 0.8, 0)
    found = project(embedded(made))
    cloud = np.concatenate([made.image, made.text]).astype(np.float64)
    cloud -= cloud.mean(0)
    u, s, _ = np.linalg.svd(cloud, full_matrices=False)
    expected = u[:, :2] * s[:2]
    mine = np.concatenate(found.points)
    np.testing.assert_allclose(np.abs(mine), np.abs(expected), atol=1e-9)
    assert found.explained == pytest.approx(s[:2] ** 2 / (s**2).sum())


def test_distances_do_not_change_under_rotation_of_the_embeddings():
    made = Embeddings(60, 0.3, 0.8, 0)
    first = project(embedded(made))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    made.image, made.text = unit(made.image @ rotation), unit(made.text @ rotation)
    second = project(embedded(made))
    joins = [np.linalg.norm(one.points[0] - one.points[1], axis=1) for one in (first, second)]
    np.testing.assert_allclose(*joins, atol=1e-5)


def test_of_many_pairs_evenly_spread_ones_are_shown_always_the_same(tmp_path):
    source = embedded(Embeddings(1000, 0.3, 0.8, 0))
    first, second = project(source), project(source)
    assert first.points.shape == (2, len(first.names), 2) == (2, SHOWN_PAIRS, 2)
    assert first.total == 1000
    np.testing.assert_array_equal(first.points, second.points)
    (plot,) = drawn(tmp_path, source)
    assert plot.svg.count("<title>image of scene-") == plot.svg.count("<title>caption of scene-") == SHOWN_PAIRS
    assert plot.files["pdf"].startswith(b"%PDF")
    assert plot.files["png"].startswith(b"\x89PNG")


def test_images_without_captions_are_paired_with_their_classes(tmp_path):
    made = Embeddings(40, 0.3, 0.8, 0)
    labels = np.arange(40) % 4
    labels[:3] = -1
    prompts = unit(np.random.default_rng(0).normal(size=(4 * 2, 16))).reshape(4, 2, 16)
    source = EmbeddedSet(
        "shapes",
        {"name": "m", "fingerprint": "f"},
        {"image": made.image},
        labels=labels,
        class_prompts=prompts,
        class_names=["<a>", "b", "c", "d"],
        templates=["a {}", "the {}"],
        keys=made.keys,
    )
    found = project(source)
    assert found.total == 37
    assert len(np.unique(found.points[1].round(6), axis=0)) == 4
    (plot,) = drawn(tmp_path, source)
    assert "&lt;a&gt;" in plot.svg


def test_a_set_without_two_pairs_has_none():
    made = Embeddings(3, 0.3, 0.8, 0)
    made.pairs = made.pairs[:1]
    assert project(embedded(made)) is None


def test_collapsed_embeddings_are_drawn_as_one_point(tmp_path):
    made = Embeddings(5, 0.3, 0.8, 0)
    made.image[:] = made.text[:] = made.image[0]
    found = project(embedded(made))
    assert np.abs(found.points).max() < 1e-6
    (plot,) = drawn(tmp_path, embedded(made))
    assert "nan" not in plot.svg
