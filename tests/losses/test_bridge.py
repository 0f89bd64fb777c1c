"""The Brownian bridge against its printed formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import assert_same, computed, random_embeddings, transformed, value_and_gradients

from modstruct.config import BridgeConfig
from modstruct.losses.bridge import Bridge, bridge_distances, drawn_t
from modstruct.losses.protocol import LossSettings


def printed(e, t):
    """1/N sum_j (2 - 2 <zV^a_j, mu_j>), which is the squared distance for unit embeddings."""
    count, total = len(e.image), 0
    for j in range(count):
        mean = t * e.image[j] + (1 - t) * e.text[j]
        total = total + 2 - 2 * e.image_augmented[j] @ (mean / torch.sqrt(mean @ mean))
    return total / count


def loss(e, t):
    return bridge_distances(e.image, e.text, e.image_augmented, t).mean()


@settings(max_examples=20, deadline=None)
@given(pairs=st.integers(1, 6), t=st.floats(0, 1), seed=st.integers(0, 999))
def test_agrees_with_the_printed_formula(pairs, t, seed):
    e = random_embeddings(pairs, 8, seed)
    found, right = value_and_gradients(lambda e: loss(e, t), e), value_and_gradients(lambda e: printed(e, t), e)
    # The print's two forms part off the sphere: |z|^2 adds a gradient along z, which the unit norm takes out again.
    for result in (found, right):
        z, gradient = e.image_augmented, result["image_augmented"]
        result["image_augmented"] = gradient - (gradient * z).sum(1, keepdim=True) * z
    assert_same(found, right)


@settings(max_examples=20, deadline=None)
@given(pairs=st.integers(1, 8), t=st.floats(0, 1), seed=st.integers(0, 999))
def test_symmetries(pairs, t, seed):
    e = random_embeddings(pairs, 8, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(random_embeddings(8, 8, seed).image).Q
    right = loss(e, t)
    torch.testing.assert_close(bridge_distances(e.text, e.image, e.image_augmented, 1 - t).mean(), right)
    torch.testing.assert_close(loss(transformed(e, lambda z: z[order]), t), right)
    torch.testing.assert_close(loss(transformed(e, lambda z: z @ rotation), t), right)


@settings(max_examples=20, deadline=None)
@given(t=st.floats(0, 1), seed=st.integers(0, 999))
def test_zero_on_the_mean_and_four_opposite_to_it(t, seed):
    e = random_embeddings(4, 8, seed)
    mean = torch.nn.functional.normalize(t * e.image + (1 - t) * e.text)
    assert bridge_distances(e.image, e.text, mean, t).max() < 1e-25
    torch.testing.assert_close(bridge_distances(e.image, e.text, -mean, t).mean().item(), 4.0)


def test_ends_of_the_bridge_are_image_and_text():
    e = random_embeddings(4, 8, 1)
    assert bridge_distances(e.image, e.text, e.image, 1).max() < 1e-25
    assert bridge_distances(e.image, e.text, e.text, 0).max() < 1e-25


@pytest.mark.parametrize("nudge", [0.0, 1e-9, 1e-5])
def test_opposite_image_and_text_give_finite_value_and_gradients(nudge):
    e = random_embeddings(4, 8, 1)
    image = e.image.float().requires_grad_()
    text = (-e.image + nudge * e.text).float().requires_grad_()
    value = bridge_distances(image, text, e.image_augmented.float(), 0.5).mean()
    value.backward()
    assert value.isfinite()
    assert image.grad.isfinite().all()
    assert text.grad.norm() < 1e4


def test_drawn_t_depends_on_seed_and_step_alone_and_is_uniform():
    draws = torch.tensor([drawn_t(seed, step) for seed in range(4) for step in range(500)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(draws.unique()) == len(draws)
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert (counts - 200).abs().max() < 5 * 200**0.5  # five standard deviations
    assert drawn_t(3, 17) == drawn_t(3, 17)


def test_the_loss_says_which_t_it_took():
    e = random_embeddings(4, 8, 1)
    value, terms = computed(Bridge(BridgeConfig(weight=1.0, t=None), LossSettings(seed=2)), e, step=5)
    assert terms["t"].item() == drawn_t(2, 5)
    assert value == loss(e, drawn_t(2, 5))
    value, terms = computed(Bridge(BridgeConfig(weight=1.0, t=0.25), LossSettings()), e, step=5)
    assert terms["t"] == 0.25
    assert value == loss(e, 0.25)


def test_t_outside_its_range_is_refused():
    e = random_embeddings(2, 4, 1)
    with pytest.raises(ValueError, match=r"t = 1\.5"):
        loss(e, 1.5)
