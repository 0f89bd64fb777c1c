"""k-means over both modalities: V-measure and homogeneity are scikit-learn's, and chance is what shuffling gives."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import homogeneity_completeness_v_measure

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.structure.measure import StructureConfig, measure
from modstruct.evaluation.structure.metrics import told

CONFIG = StructureConfig(separability_pairs=10, cluster_starts=3)


def test_homogeneity_and_v_measure_are_scikit_learns_and_chance_is_the_mean_of_shuffles():
    random = np.random.default_rng(0)
    classes = random.integers(0, 4, 60)
    clusters = np.where(random.random(60) < 0.6, classes, random.integers(0, 5, 60))
    homogeneity, of_homogeneity, v_measure, of_v_measure = told(classes, clusters)
    right = homogeneity_completeness_v_measure(classes, clusters)
    assert (homogeneity, v_measure) == pytest.approx((right[0], right[2]))
    shuffled = [told(classes, random.permutation(clusters)) for _ in range(400)]
    assert np.mean(shuffled, axis=0)[[0, 2]] == pytest.approx([of_homogeneity, of_v_measure], abs=0.01)
    assert told(classes, np.zeros(60)) == (0, 0, 0, 0)


def a_set(gap: float, **more) -> EmbeddedSet:
    """Three classes of 20 images, each with two captions, gap apart along an axis of its own."""
    labels = np.arange(60) % 3
    rows = 3 * np.eye(5)[labels] + 0.1 * np.random.default_rng(0).normal(size=(60, 5))
    image, text = (rows + gap * side * np.eye(5)[3] for side in (1, -1))
    arrays = {"image": image, "text": np.repeat(text, 2, axis=0)}
    arrays = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in arrays.items()}
    pairs = np.stack([np.arange(120) // 2, np.arange(120)], axis=1)
    return EmbeddedSet("made", {"logit_scale": 50.0}, arrays, pairs=pairs, **more)


@pytest.fixture
def classes():
    return {"labels": np.arange(60) % 3, "class_names": ["a", "b", "c"]}


def test_clusters_follow_the_classes_or_where_the_gap_is_wide_the_modalities(classes):
    near, far = (measure(a_set(gap, **classes), CONFIG).values for gap in (0.0, 9.0))
    assert near["v_measure"].value == pytest.approx(1)
    assert near["cluster_modality"].value == pytest.approx(0, abs=1e-9)
    assert (near["v_measure"].higher_is_better, near["v_measure"].unit) == (True, "share")
    assert 0 < near["v_measure"].chance < 0.1
    assert far["cluster_modality"].value == pytest.approx(1)
    assert far["v_measure"].value < 0.7
    assert near["temperature"].value == 0.02


def test_classes_may_be_a_field_of_the_metadata_and_images_without_one_are_left_out(classes):
    fields = {"metadata": [{"kind": "abc"[n % 3]} if n < 50 else {} for n in range(60)]}
    by_field = measure(a_set(0.0, **fields), StructureConfig(separability_pairs=10, label="kind"))
    assert by_field.values["v_measure"].value == pytest.approx(1)
    unlabelled = measure(a_set(0.0, **fields), CONFIG)
    assert "v_measure" not in unlabelled.values
    assert unlabelled.settings["notes"] == ["no clusters: the set has no classes; name structure.label"]
    with pytest.raises(ValueError, match=r"structure.label = 'king': no image has it: name one of \['kind'\]"):
        measure(a_set(0.0, **fields), StructureConfig(label="king"))
