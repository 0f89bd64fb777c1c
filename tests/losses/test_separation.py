"""Deep feature separation against its printed formulas."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contrastive import printed_direction
from towers import (
    assert_same,
    computed,
    modalities_exchanged,
    random_embeddings,
    replace,
    transformed,
    value_and_gradients,
)

from modstruct.config import SeparationConfig
from modstruct.losses.protocol import LossSettings
from modstruct.losses.separation import Separation, orthogonality


def printed_orthogonality(e):
    count = len(e.image)
    own = [(e.image[j] @ e.image_independent[j]) ** 2 + (e.text[j] @ e.text_independent[j]) ** 2 for j in range(count)]
    return sum(own) / count


def printed_contrast(e):
    return printed_direction(e.image_independent, e.image_independent_augmented, e.logit_scale) + printed_direction(
        e.text_independent, e.text_independent_augmented, e.logit_scale
    )


def printed_uniformity(e, t):
    count, total = len(e.image), 0
    for z in (e.image_independent, e.text_independent):
        for j in range(count):
            for k in range(count):
                total = total + torch.exp(-t * ((z[j] - z[k]) ** 2).sum())
    return torch.log(total / count**2)


def loss(e, t=2.0, orthogonality_weight=1.0):
    config = SeparationConfig(weight=1.0, uniformity_t=t, orthogonality_weight=orthogonality_weight)
    return computed(Separation(config, LossSettings()), e)


@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 6), t=st.floats(0.5, 4), weight=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 999))
def test_agrees_with_the_printed_formula(pairs, t, weight, seed):
    e = random_embeddings(pairs, 5, seed)

    def printed(e):
        return weight * printed_orthogonality(e) + printed_contrast(e) + printed_uniformity(e, t)

    assert_same(value_and_gradients(lambda e: loss(e, t, weight)[0], e), value_and_gradients(printed, e))


def test_components_are_the_printed_terms():
    e = random_embeddings(5, 4, 1)
    _, terms = loss(e)
    assert terms.keys() == {"orthogonality", "image_to_image", "text_to_text", "uniformity"}
    torch.testing.assert_close(terms["orthogonality"], printed_orthogonality(e))
    torch.testing.assert_close(terms["image_to_image"] + terms["text_to_text"], printed_contrast(e))
    torch.testing.assert_close(terms["uniformity"], printed_uniformity(e, 2.0))
    _, without = loss(e, orthogonality_weight=0.0)
    assert without == terms  # it is logged all the same


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


def test_extremes():
    e = random_embeddings(4, 4, 3)
    axes = torch.eye(4, dtype=torch.float64)
    assert not (orthogonality(axes, axes.roll(1, 0)) + orthogonality(axes, axes.roll(2, 0))).any()
    torch.testing.assert_close(
        orthogonality(e.image, e.image) + orthogonality(e.text, -e.text), torch.full((4,), 2.0).double()
    )
    collapsed = e.image[:1].expand(4, 4)
    same = replace(e, image_independent=collapsed, text_independent=collapsed)
    torch.testing.assert_close(loss(same)[1]["uniformity"].item(), math.log(2))


def test_uniformity_does_not_move_when_the_batch_is_doubled():
    e = random_embeddings(5, 4, 2)
    doubled = transformed(e, lambda z: torch.cat((z, z)))
    torch.testing.assert_close(loss(doubled)[1]["uniformity"], loss(e)[1]["uniformity"])


def test_a_spread_batch_is_more_uniform():
    e = random_embeddings(32, 8, 2)
    near = replace(
        e, image_independent=torch.nn.functional.normalize(e.image_independent + 3 * e.image_independent[:1])
    )
    assert loss(e)[1]["uniformity"] < loss(near)[1]["uniformity"]
