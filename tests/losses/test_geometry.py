"""Geometric consistency, with its augmented part, against its printed formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import (
    assert_same,
    computed,
    modalities_exchanged,
    random_embeddings,
    replace,
    transformed,
    value_and_gradients,
)

from modstruct.config import GeometryConfig
from modstruct.losses.geometry import Geometry
from modstruct.losses.protocol import LossSettings


def printed_consistency(e):
    v, t, count = e.image, e.text, len(e.image)
    total = 0
    for j in range(count):
        for k in range(count):
            total = total + (v[j] @ t[k] - v[k] @ t[j]) ** 2 + (v[j] @ v[k] - t[j] @ t[k]) ** 2
    return total / count


def printed_view_consistency(e):
    v, t, va, ta, count = e.image, e.text, e.image_augmented, e.text_augmented, len(e.image)
    total = 0
    for j in range(count):
        for k in range(count):
            total = total + (v[j] @ v[k] - va[j] @ va[k]) ** 2 + (t[j] @ t[k] - ta[j] @ ta[k]) ** 2
        total = total + (v[j] @ t[j] - va[j] @ ta[j]) ** 2
    return total / count


def loss(e, augmented=True, normalize="batch"):
    config = GeometryConfig(weight=1.0, augmented=augmented, normalize=normalize)
    return computed(Geometry(config, LossSettings()), e)


@pytest.mark.parametrize("normalize", ["batch", "pairs"])
@pytest.mark.parametrize("augmented", [False, True])
@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 6), width=st.integers(2, 8), seed=st.integers(0, 999))
def test_agrees_with_the_printed_formula(augmented, normalize, pairs, width, seed):
    e = random_embeddings(pairs, width, seed)

    def printed(e):
        value = printed_consistency(e) + (printed_view_consistency(e) if augmented else 0)
        return value / pairs if normalize == "pairs" else value

    assert_same(value_and_gradients(lambda e: loss(e, augmented, normalize)[0], e), value_and_gradients(printed, e))


@pytest.mark.parametrize("normalize", ["batch", "pairs"])
def test_components_add_up_and_per_pair_is_always_there(normalize):
    e = random_embeddings(6, 4, 1)
    value, terms = loss(e, normalize=normalize)
    assert terms.keys() == {"consistency", "view_consistency", "per_pair"}
    torch.testing.assert_close(terms["consistency"] + terms["view_consistency"], value)
    torch.testing.assert_close(terms["per_pair"], (printed_consistency(e) + printed_view_consistency(e)) / 6)
    assert loss(e, augmented=False)[1].keys() == {"consistency", "per_pair"}


@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(2, 8), seed=st.integers(0, 999))
def test_symmetries(pairs, seed):
    e = random_embeddings(pairs, 5, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(random_embeddings(5, 5, seed).image).Q
    right = loss(e)[0]
    torch.testing.assert_close(loss(modalities_exchanged(e))[0], right)
    torch.testing.assert_close(loss(transformed(e, lambda z: z[order]))[0], right)
    torch.testing.assert_close(loss(transformed(e, lambda z: z @ rotation))[0], right)


@pytest.mark.parametrize("pairs", [4, 16])
def test_identical_towers_give_zero(pairs):
    e = random_embeddings(pairs, 8, 1)
    same = replace(e, text=e.image, image_augmented=e.image, text_augmented=e.image)
    assert loss(same)[0] == 0


def test_per_pair_does_not_move_when_the_batch_is_doubled():
    e = random_embeddings(6, 4, 1)
    doubled = transformed(e, lambda z: torch.cat((z, z)))
    torch.testing.assert_close(loss(doubled, augmented=False)[0], 2 * loss(e, augmented=False)[0])
    torch.testing.assert_close(loss(doubled, False, "pairs")[0], loss(e, False, "pairs")[0])
