"""Explicit alignment and uniformity of pair centres against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from towers import (
    assert_same,
    computed,
    modalities_exchanged,
    random_embeddings,
    replace,
    transformed,
    value_and_gradients,
)

from modstruct.config.losses import AlignmentConfig
from modstruct.losses.alignment import Alignment
from modstruct.losses.protocol import LossSettings

FORMS = ("inverse_square", "distance")
FLOOR = 0.2


def printed(e, form, weight, t):
    """Pair by pair."""
    count = len(e.image)
    cosines = [e.image[j] @ e.text[j] for j in range(count)]
    if form == "distance":
        pull = sum(((e.image[j] - e.text[j]) ** 2).sum() for j in range(count)) / count
    else:
        pull = sum(1 / torch.clamp(cosine**2, min=FLOOR**2) for cosine in cosines) / count
    centres = [(e.image[j] + e.text[j]) / torch.linalg.vector_norm(e.image[j] + e.text[j]) for j in range(count)]
    potential = sum(torch.exp(-t * ((c - d) ** 2).sum()) for c in centres for d in centres)
    return pull + weight * torch.log(potential / count**2)


def loss(e, form, weight=0.0, t=2.0):
    config = AlignmentConfig(1.0, form, FLOOR, uniformity_weight=weight, uniformity_t=t)
    return computed(Alignment(config, LossSettings()), e)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 6), t=st.floats(0.5, 4), weight=st.sampled_from([0.0, 0.7]), seed=st.integers(0, 999))
def test_agrees_with_the_formula(form, pairs, t, weight, seed):
    e = random_embeddings(pairs, 5, seed)
    found = value_and_gradients(lambda e: loss(e, form, weight, t)[0], e)
    assert_same(found, value_and_gradients(lambda e: printed(e, form, weight, t), e))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 8), seed=st.integers(0, 999))
def test_symmetries(form, pairs, seed):
    e = random_embeddings(pairs, 5, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(random_embeddings(5, 5, seed).image).Q
    right = loss(e, form, 1.0)[0]
    torch.testing.assert_close(loss(modalities_exchanged(e), form, 1.0)[0], right)
    torch.testing.assert_close(loss(transformed(e, lambda z: z[order]), form, 1.0)[0], right)
    torch.testing.assert_close(loss(transformed(e, lambda z: z @ rotation), form, 1.0)[0], right)


def test_extremes():
    e = random_embeddings(4, 6, 1)
    equal, opposite = replace(e, text=e.image), replace(e, text=-e.image)
    assert loss(equal, "distance")[0] < 1e-25
    torch.testing.assert_close(loss(opposite, "distance")[0].item(), 4.0)
    for pair in (equal, opposite):  # the paper's form draws to either
        torch.testing.assert_close(loss(pair, "inverse_square")[0].item(), 1.0)
    collapsed = replace(e, image=e.image[:1].expand(4, 6), text=e.text[:1].expand(4, 6))
    assert loss(collapsed, "distance", 1.0)[1]["uniformity"].abs() < 1e-12
    assert loss(e, "distance", 1.0)[1]["uniformity"] < 0


@pytest.mark.parametrize("cosine", [0.0, 1e-9, 0.19, -0.19])
def test_a_pair_near_the_pole_counts_as_at_the_floor_and_gets_no_gradient(cosine):
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    text = torch.tensor([[cosine, math.sqrt(1 - cosine**2)], [1.0, 0.0]])
    value, _ = loss(dict(image=image, text=text, logit_scale=torch.ones(1)), "inverse_square")
    torch.testing.assert_close(value, torch.tensor((1 / FLOOR**2 + 1 / 0.36) / 2))
    (gradient,) = torch.autograd.grad(value, image)
    assert not gradient[0].any()
    torch.testing.assert_close(gradient[1], torch.tensor([-1 / 0.6**3, 0.0]))


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_floor_a_pair_is_drawn_to_the_nearer_of_equal_and_opposite(sign):
    text = torch.tensor([[1.0, 0.0]])
    image = torch.tensor([[sign * 0.21, (1 - 0.21**2) ** 0.5]], requires_grad=True)
    value, _ = loss(dict(image=image, text=text, logit_scale=torch.ones(1)), "inverse_square")
    gradient = torch.autograd.grad(value, image)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-sign * 2 / 0.21**3, 0.0]]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nudge", [0.0, 1e-9, 1e-5])
def test_opposite_image_and_text_give_finite_value_and_gradients(form, nudge):
    e = random_embeddings(4, 8, 1)
    image = e.image.float().requires_grad_()
    text = normalize(-e.image + nudge * e.text).float().requires_grad_()
    value, _ = loss(dict(image=image, text=text, logit_scale=torch.ones(1)), form, 1.0)
    value.backward()
    assert value.isfinite()
    assert image.grad.isfinite().all()
    assert text.grad.norm() < 1e4


@pytest.mark.parametrize("form", FORMS)
def test_components_are_the_terms_without_their_weights(form):
    e = random_embeddings(5, 4, 1)
    value, terms = loss(e, form, 0.5)
    assert terms.keys() == {form, "uniformity"}
    torch.testing.assert_close(value, terms[form] + 0.5 * terms["uniformity"])
    assert loss(e, form)[1].keys() == {form}


def test_only_uniformity_compares_pairs_and_wants_those_of_all_processes():
    alone = Alignment(AlignmentConfig(weight=1.0), LossSettings())
    spread = Alignment(AlignmentConfig(weight=1.0, uniformity_weight=1.0), LossSettings())
    assert (alone.compares, spread.compares) == (False, True)
    assert (alone.columns(8, 4), spread.columns(8, 4)) == (frozenset(), {"image", "text"})
