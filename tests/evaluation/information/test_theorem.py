"""Theorem 3.1 (Jiang et al. 2023) by enumeration, on random distributions and on the built-in scenes.

If Z_T = f(X_T) and Z_V = g(X_V) are equal, or a bijection of each other, then
  inf_h E CE(h(Z_T, Z_V), Y) - inf_h' E CE(h'(X_T, X_V), Y) >= Delta_p = |I(X_T; Y) - I(X_V; Y)|.
The infimum of E CE(h(X), Y) over all h is H(Y | X), so that the left side is I(X_T, X_V; Y) - I(Z; Y).
"""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.data.synthetic.information import (
    OBJECT_FACTORS,
    captions_of_a_split,
    entropy,
    exact_information,
    mutual_information,
)

ROUNDING = 1e-9


def common_part(joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The finest variable that each of two variables alone determines (Gács & Körner 1973).

    joint: (T, V), p(t, v). Returns the number of the part that each t (T,) and each v (V,) belongs to: the connected
    components of the pairs that occur. Values that never occur have -1.
    """
    text, image = np.full(joint.shape[0], -1), np.full(joint.shape[1], -1)
    occurs = joint > 0
    part = 0
    for first in np.flatnonzero(occurs.any(1)):
        if text[first] >= 0:
            continue
        found = np.array([first])
        while len(found):
            text[found] = part
            reached = np.flatnonzero(occurs[found].any(0) & (image < 0))
            image[reached] = part
            found = np.flatnonzero(occurs[:, reached].any(1) & (text < 0))
        part += 1
    return text, image


@dataclass(frozen=True)
class Sides:
    """Both sides of the theorem, in nats. excess: the left one, the cross-entropy that the features cost."""

    excess: float
    gap: float


def exact_sides(joint: np.ndarray, text_features: np.ndarray | None = None) -> Sides:
    """Both sides for one exactly aligned feature, by enumeration.

    joint: (T, V, Y), p(x_T, x_V, y). text_features: (T,) whole numbers, Z_T of each x_T; a feature that x_V tells too.
    None takes the feature that keeps most, the common part of x_T and x_V, of which every exactly aligned one is a
    function. Raises ValueError where x_V does not tell the feature, which is then no exactly aligned one.
    """
    if joint.ndim != 3 or (joint < 0).any() or not np.isclose(joint.sum(), 1):
        raise ValueError(f"joint: shape {joint.shape}, sum {joint.sum():.6g}; give probabilities (T, V, Y) of sum 1")
    pairs = joint.sum(2)
    parts, _ = common_part(pairs)
    text_features = parts if text_features is None else np.asarray(text_features)
    for part in range(parts.max() + 1):
        kinds = np.unique(text_features[parts == part])
        if len(kinds) > 1:
            raise ValueError(
                f"text_features: {kinds[:2].tolist()} occur beside images that cannot tell them apart; "
                "give a function of the common part"
            )
    occurring = parts >= 0
    numbers = np.unique(text_features[occurring], return_inverse=True)[1]
    features = np.zeros((numbers.max() + 1, joint.shape[2]))
    np.add.at(features, numbers, joint.sum(1)[occurring])
    known = mutual_information(joint.reshape(-1, joint.shape[2]))
    gap = abs(mutual_information(joint.sum(1)) - mutual_information(joint.sum(0)))
    return Sides(known - mutual_information(features), gap)


@st.composite
def distributions(draw):
    """p(t, v, y) whose pairs (t, v) fall apart into 1 to 4 parts, each of several texts and images."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = draw(st.integers(1, 4))
    text = random.integers(0, parts, draw(st.integers(1, 9)))
    image = random.integers(0, parts, draw(st.integers(1, 9)))
    together = text[:, None] == image[None, :]
    together &= random.random(together.shape) < draw(st.sampled_from([0.5, 1.0]))
    if not together.any():
        together[0, 0] = True
    labels = draw(st.integers(1, 5))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0]))  # from labels that are almost certain to almost uniform
    joint = together[:, :, None] * random.dirichlet(np.full(labels, sharpness), together.shape)
    joint = joint * random.random(together.shape)[:, :, None]
    return joint / joint.sum()


@settings(max_examples=300, deadline=None)
@given(joint=distributions())
def test_the_feature_that_keeps_most_costs_at_least_the_gap(joint):
    sides = exact_sides(joint)
    assert sides.excess >= sides.gap - ROUNDING


@settings(max_examples=300, deadline=None)
@given(joint=distributions(), seed=st.integers(0, 2**32 - 1), kinds=st.integers(1, 4))
def test_every_aligned_feature_costs_at_least_the_one_that_keeps_most(joint, seed, kinds):
    parts, _ = common_part(joint.sum(2))
    feature = np.random.default_rng(seed).integers(0, kinds, parts.max() + 1)[parts]
    sides = exact_sides(joint, feature)
    assert sides.excess >= exact_sides(joint).excess - ROUNDING
    assert sides.excess >= sides.gap - ROUNDING


@settings(max_examples=200, deadline=None)
@given(joint=distributions())
def test_the_left_side_is_a_difference_of_cross_entropies(joint):
    """Transcription: the best h has p(y | z), the best h' has p(y | x_T, x_V); E CE of both, summed term by term."""
    parts, _ = common_part(joint.sum(2))
    excess = 0.0
    for t, v, y in np.argwhere(joint > 0):
        own = joint[parts == parts[t]].sum((0, 1))
        excess += joint[t, v, y] * (np.log(joint[t, v, y] / joint[t, v].sum()) - np.log(own[y] / own.sum()))
    assert exact_sides(joint).excess == pytest.approx(excess, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(joint=distributions())
def test_the_common_part_is_the_finest_variable_that_both_determine(joint):
    pairs = joint.sum(2)
    text, image = common_part(pairs)
    for t, v in np.argwhere(pairs > 0):
        assert text[t] == image[v] >= 0
    # Reachability by powers of the matrix of neighbours: texts of one part are those that images lead to.
    steps = np.linalg.matrix_power(((pairs > 0).astype(float) @ (pairs > 0).T > 0).astype(float), len(pairs)) > 0
    known = pairs.any(1)
    assert np.array_equal(steps[known][:, known], text[known][:, None] == text[known][None, :])


def test_a_bijection_between_features_loses_what_one_modality_alone_knows():
    """x_T = (shared, own), x_V = shared, y = (shared, own): exactly H(own) is lost, and the gap is as large."""
    joint = np.zeros((6, 2, 6))
    for x in range(6):
        joint[x, x // 3, x] = 1 / 6
    sides = exact_sides(joint)
    assert sides.excess == pytest.approx(np.log(3))
    assert sides.gap == pytest.approx(np.log(3))


def test_a_feature_that_one_modality_does_not_tell_is_refused():
    joint = np.full((2, 2, 2), 1 / 8)
    with pytest.raises(ValueError, match="text_features"):
        exact_sides(joint, np.array([0, 1]))
    with pytest.raises(ValueError, match="joint"):
        exact_sides(np.ones((2, 2, 2)))


@pytest.mark.parametrize(
    ("label", "told"), [("size", 1.0), ("fill", 1.0), ("shape", 1.0), ("fill", 0.5), ("shape", 0.5)]
)
def test_the_theorem_on_scenes_with_aligned_features(label, told):
    """Every caption and image of one object of the training split, up to places and ground, and the best feature."""
    axes = captions_of_a_split("train", told)  # what is mentioned of each factor, and what is true
    joint = axes.reshape(np.prod(axes.shape[:4]), -1)
    values = np.indices(axes.shape[4:])[OBJECT_FACTORS.index(label)].ravel()
    labelled = joint[:, :, None] * (values[:, None] == np.arange(values.max() + 1))
    sides, exact = exact_sides(labelled), exact_information(label, "train", told)
    assert sides.excess == pytest.approx(exact.aligned_excess, abs=1e-9)
    assert sides.gap == pytest.approx(exact.gap, abs=1e-9)
    if (label, told) != ("shape", 1.0):  # which every caption tells
        assert sides.excess > sides.gap > 0.1


def test_entropy_and_information_of_known_tables():
    assert entropy(np.array([0.5, 0.25, 0.25, 0])) == pytest.approx(1.5 * np.log(2))
    assert mutual_information(np.eye(4) / 4) == pytest.approx(np.log(4))
    assert mutual_information(np.full((3, 5), 1 / 15)) == pytest.approx(0)
    flip = np.array([[0.45, 0.05], [0.05, 0.45]])
    assert mutual_information(flip) == pytest.approx(np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
