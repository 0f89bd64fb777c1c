"""Selected rows are the set's rows, side by side, stacked, normalised and standardised as asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import clouds, embedded, features_of, unit

from modstruct.evaluation.classification import linear as features_module
from modstruct.evaluation.classification.linear import RowBlocks, column_statistics
from modstruct.evaluation.classification.probe import select_features

CPU = torch.device("cpu")


def all_rows(features):
    return features.read(np.arange(len(features)), CPU, torch.float64).numpy()


def test_a_selection_has_the_labelled_rows_of_the_arrays_named():
    rows, labels = clouds(20, 6, 4, seed=0)
    labels[[3, 7]] = -1
    independent = unit(clouds(20, 3, 4, seed=1)[0])
    made = embedded("s", rows, labels, image_independent=independent)
    kept = labels >= 0
    for arrays, expected in (
        ("image_features", rows),
        ("image", unit(rows)),
        ("image+image_independent", np.hstack([unit(rows), independent])),
    ):
        found = select_features(made, arrays, labels)
        np.testing.assert_allclose(all_rows(found), expected[kept], rtol=1e-6)
        assert found.labels.tolist() == labels[kept].tolist()
        assert found.dimension == expected.shape[1]
    both = all_rows(select_features(made, "image_features + image_independent", labels, unit=True))
    np.testing.assert_allclose(both, np.hstack([unit(rows), independent])[kept], rtol=1e-6)


@given(st.integers(1, 9), st.lists(st.integers(0, 24), unique=True))
def test_taking_stacking_and_blocks_agree_with_plain_indexing(rows_at_once, chosen):
    rows, labels = clouds(15, 4, 3, seed=2)
    below, below_labels = clouds(10, 4, 3, seed=3)
    chosen = np.sort(np.array(chosen, dtype=np.int64))
    above, beneath = chosen[chosen < 15], chosen[chosen >= 15] - 15
    expected, expected_labels = np.vstack([rows, below]), np.concatenate([labels, below_labels])
    taken = [features_of(rows, labels).take(above[::-1]), features_of(below, below_labels).take(beneath)]
    np.testing.assert_array_equal(all_rows(taken[0]), rows[above])
    np.testing.assert_array_equal(taken[1].labels, below_labels[beneath])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "BLOCK_BYTES", rows_at_once * 16)
        for hold_bytes in (0, None):
            blocks = RowBlocks(taken, CPU, hold_bytes=hold_bytes)
            for _ in range(2):
                seen = list(blocks)
                assert [place.start for place, _, _ in seen] == np.cumsum([0, *(len(b) for _, b, _ in seen)])[
                    :-1
                ].tolist()
                assert all(len(block) <= rows_at_once for _, block, _ in seen)
                np.testing.assert_array_equal(np.vstack([np.empty((0, 4)), *(b for _, b, _ in seen)]), expected[chosen])
                assert [label for _, _, labels in seen for label in labels.tolist()] == expected_labels[chosen].tolist()


def test_statistics_are_of_one_pass_and_constant_columns_are_not_stretched(monkeypatch):
    monkeypatch.setattr(features_module, "BLOCK_BYTES", 4 * 5 * 3)
    rows, labels = clouds(50, 4, 2, seed=4)
    rows = np.hstack([rows * 10 + 1000, np.full((50, 1), 0.1, np.float32)])
    statistics = column_statistics(features_of(rows, labels), CPU)
    np.testing.assert_allclose(statistics[0], rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics[1], rows.astype(np.float64).std(0), rtol=1e-9, atol=1e-12)
    found = all_rows(features_of(rows, labels).standardised_by(statistics))
    np.testing.assert_allclose(found[:, :4].std(0), 1, rtol=1e-9)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(found[:, 4], 0, atol=1e-9)


def test_a_zero_row_stays_zero_at_unit_norm():
    np.testing.assert_array_equal(all_rows(features_of(np.zeros((1, 3), np.float32), [0], unit=True)), np.zeros((1, 3)))


def test_arrays_that_cannot_be_used_are_named():
    rows, labels = clouds(12, 6, 4, seed=5)
    made = embedded("s", rows, labels)
    with pytest.raises(ValueError, match="image_independent"):
        select_features(made, "image+image_independent", labels)
    with pytest.raises(ValueError, match="name each embedding once"):
        select_features(made, "image+image", labels)
    with pytest.raises(ValueError, match="12 rows of image and 11 labels"):
        select_features(made, "image", labels[:11])
    rows[5, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 12 s's image_features embeddings are not finite, the first is row 5"):
        select_features(made, "image_features", labels)
