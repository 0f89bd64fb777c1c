"""Draws are balanced, seeded, nested, paired over models, and see no image of the test set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import clouds, features_of

from modstruct.evaluation.classification.linear_probe import FewShotConfig, draw_episodes, hold_out, run_episode
from modstruct.evaluation.classification.probe import Probe, drawn_order


def inputs_of(train, test, validation=None, keys=None, config=None):
    (rows, labels), classes = train, int(train[1].max()) + 1
    names = [f"class {c}" for c in range(classes)]
    keys = [f"image {i}" for i in range(len(rows))] if keys is None else keys
    splits, known = {"train": features_of(rows, labels), "test": features_of(*test)}, {"train": keys}
    if validation is not None:
        splits["validation"] = features_of(*validation)
        known["validation"] = [f"held {i}" for i in range(len(validation[0]))]
    return Probe(config or FewShotConfig(), names, splits, known)


def images(inputs, places):
    return {inputs.keys["train"][place] for place in places}


@given(st.integers(0, 5), st.integers(0, 5))
def test_episodes_are_balanced_nested_and_apart_from_what_is_held_out(seed, draw):
    data = clouds(90, 3, 4, seed=0)
    inputs = inputs_of(data, data)
    episodes = draw_episodes(inputs, FewShotConfig(seed=seed), draw)
    for shots, (chosen, held_out) in episodes.items():
        counts = np.bincount(inputs.splits["train"].labels[chosen], minlength=4)
        assert counts.tolist() == [shots] * 4
        assert np.bincount(inputs.splits["train"].labels[held_out]).tolist() == [min(shots, 4)] * 4
        assert not set(chosen) & set(held_out)
    for fewer, more in ((1, 2), (2, 4), (4, 8), (8, 16)):
        assert set(episodes[fewer][0]) < set(episodes[more][0])
    alone = draw_episodes(inputs, FewShotConfig(seed=seed, shots=(2,)), draw)
    np.testing.assert_array_equal(alone[2][1], episodes[2][1])


def test_draws_differ_and_are_the_same_again():
    data = clouds(90, 3, 3, seed=0)
    inputs, config = inputs_of(data, data), FewShotConfig(shots=(4,), strength=1.0)
    drawn = [tuple(draw_episodes(inputs, config, draw)[4][0]) for draw in range(8)]
    assert len(set(drawn)) == 8
    assert drawn == [tuple(draw_episodes(inputs, config, draw)[4][0]) for draw in range(8)]
    other = FewShotConfig(shots=(4,), strength=1.0, seed=1)
    assert drawn[0] != tuple(draw_episodes(inputs, other, 0)[4][0])


def test_another_order_of_rows_or_a_lost_image_draws_the_same_images():
    rows, labels = clouds(60, 3, 3, seed=0)
    config = FewShotConfig(shots=(4,), strength=1.0)
    one = inputs_of((rows, labels), (rows, labels))
    drawn = images(one, draw_episodes(one, config, 0)[4][0])
    unused = next(i for i in range(60) if one.keys["train"][i] not in drawn)
    order = np.delete(np.random.default_rng(1).permutation(60), 0)
    order = order if unused not in order else np.array([i for i in order if i != unused])
    order = np.union1d(order, [one.keys["train"].index(key) for key in drawn])[::-1]
    two = inputs_of((rows[order], labels[order]), (rows, labels), keys=[one.keys["train"][i] for i in order])
    assert images(two, draw_episodes(two, config, 0)[4][0]) == drawn


def test_every_image_is_drawn_as_often_as_another():
    labels = np.zeros(20, dtype=np.int64)
    keys = [f"image {i}" for i in range(20)]
    first = [drawn_order(labels, keys, seed=0, draw=draw)[0][:5] for draw in range(2000)]
    counts = np.bincount(np.concatenate(first), minlength=20)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_rows_with_one_key_are_drawn_after_each_other_and_once_each():
    order = drawn_order(np.array([0, 1, 0, 0, 1]), ["same"] * 5, seed=0)
    assert [places.tolist() for places in order] == [[0, 2, 3], [1, 4]]


def test_a_class_without_a_row_has_none_in_order():
    order = drawn_order(np.array([2, 0]), ["a", "b"], seed=0, classes=4)
    assert [places.tolist() for places in order] == [[1], [], [0], []]


def test_a_share_is_held_out_of_every_class_but_never_all_of_it():
    order = drawn_order(np.repeat([0, 1, 2], [50, 2, 1]), [str(i) for i in range(53)], seed=0)
    kept, out = hold_out(order, 0.2)
    assert sorted([*kept, *out]) == list(range(53))
    assert [int(((out >= a) & (out < b)).sum()) for a, b in ((0, 50), (50, 52), (52, 53))] == [10, 1, 0]
    with pytest.raises(ValueError, match="every class has a single row"):
        hold_out(drawn_order(np.arange(3), ["a", "b", "c"], seed=0), 0.2)


def test_the_strength_is_chosen_in_the_validation_set_where_there_is_one():
    data, validation = clouds(30, 4, 3, seed=0), clouds(12, 4, 3, seed=1)
    episodes = draw_episodes(inputs_of(data, data, validation), FewShotConfig(shots=(2, 10)), 0)
    assert np.bincount(data[1][episodes[10][0]]).tolist() == [10] * 3
    assert np.bincount(validation[1][episodes[10][1]]).tolist() == [4] * 3
    short = validation[0][validation[1] < 2], validation[1][validation[1] < 2]
    inputs = inputs_of(data, data, short)
    with pytest.raises(ValueError, match=r"shots = 1: class 'class 2' has 0 images in the validation .* \S+strength"):
        draw_episodes(inputs, FewShotConfig(shots=(1,)), 0)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_test_set_chooses_nothing(strength):
    """Other labels of the test set leave strength and predictions as they were."""
    train, (rows, labels) = clouds(40, 8, 4, seed=0, spread=2.0), clouds(60, 8, 4, seed=1, spread=2.0)
    config = FewShotConfig(shots=(4,), strength=strength, standardize=True)
    found = []
    for truth in (labels, (labels + 1) % 4):
        inputs = inputs_of(train, (rows, truth), config=config)
        found.append(run_episode(inputs, *draw_episodes(inputs, config, 0)[4]))
    assert found[0][1] == found[1][1]
    assert not np.any((found[0][0] == 0) & (found[1][0] == 0))  # a prediction is right for at most one truth


def test_a_class_with_too_few_images_is_named():
    rows, labels = clouds(40, 3, 4, seed=0)
    labels[labels == 2] = 1
    labels[[2, 6, 10]] = 2
    inputs = inputs_of((rows, labels), (rows, labels))
    with pytest.raises(ValueError, match=r"few_shot.shots = 2: class 'class 2' has 3 images .* 4 are needed"):
        draw_episodes(inputs, FewShotConfig(shots=(1, 2)), 0)
    with pytest.raises(ValueError, match=r"4 are needed: take fewer shots, or give the class more images$"):
        draw_episodes(inputs, FewShotConfig(shots=(4,), strength=1.0), 0)
    assert len(draw_episodes(inputs, FewShotConfig(shots=(3,), strength=1.0), 0)[3][0]) == 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shots": ()}, "few_shot.shots"),
        ({"shots": (0, 1)}, "few_shot.shots"),
        ({"shots": (4, 2)}, "few_shot.shots"),
        ({"draws": 0}, "few_shot.draws"),
        ({"strength": 0.0}, "few_shot.strength = 0.0: above 0"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FewShotConfig(**wrong)
