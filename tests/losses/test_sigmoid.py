"""The sigmoid loss against its printed formula."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from towers import assert_same, computed, modalities_exchanged, random_embeddings, value_and_gradients

from modstruct.config.losses import SigmoidConfig
from modstruct.losses.protocol import LossSettings
from modstruct.losses.sigmoid import Sigmoid


def printed(e):
    """-1/N sum_jk log sigmoid( l_jk (s <x_j, y_k> + b) ) (Zhai et al. 2023, equation 1), pair by pair."""
    total, count = 0, len(e.image)
    for j in range(count):
        for k in range(count):
            sign = 1 if j == k else -1
            total = total - logsigmoid(sign * (e.logit_scale[0] * e.image[j] @ e.text[k] + e.logit_bias[0]))
    return total / count


def loss(e):
    return computed(Sigmoid(SigmoidConfig(weight=1.0), LossSettings()), e)[0]


@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 6), seed=st.integers(0, 999))
def test_agrees_with_the_printed_formula(pairs, seed):
    e = random_embeddings(pairs, 5, seed)
    assert_same(value_and_gradients(loss, e), value_and_gradients(printed, e))
    torch.testing.assert_close(loss(modalities_exchanged(e)), loss(e))


def test_the_bias_is_a_scalar_that_the_model_owns():
    (bias,) = Sigmoid(SigmoidConfig(weight=1.0, bias_init=-7.0), LossSettings()).scalars
    assert (bias.name, bias.initial) == ("logit_bias", -7.0)
