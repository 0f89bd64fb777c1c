"""The contrastive base against its printed formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize
from towers import (
    assert_same,
    computed,
    modalities_exchanged,
    random_embeddings,
    replace,
    transformed,
    value_and_gradients,
)

from modstruct.config import ContrastiveConfig
from modstruct.losses.contrastive import Contrastive, row_losses
from modstruct.losses.objective import Objective
from modstruct.losses.protocol import LossSettings


def printed_direction(x, y, scale):
    """-1/N sum_j log( exp(<x_j, y_j>/tau) / sum_k exp(<x_j, y_k>/tau) ), pair by pair."""
    losses = []
    for j in range(len(x)):
        candidates = torch.stack([torch.exp(scale[0] * (x[j] @ y[k])) for k in range(len(y))])
        losses.append(-torch.log(candidates[j] / candidates.sum()))
    return sum(losses) / len(losses)


def printed_clip(e):
    return (printed_direction(e.image, e.text, e.logit_scale) + printed_direction(e.text, e.image, e.logit_scale)) / 2


def printed_clip_inmodal(e):
    pairs = [(e.image, e.text), (e.text, e.image), (e.image, e.image_augmented), (e.text, e.text_augmented)]
    return sum(printed_direction(x, y, e.logit_scale) for x, y in pairs) / 4


def printed_clip_2v(e):
    augmented = replace(e, image=e.image_augmented, text=e.text_augmented)
    return (printed_clip(e) + printed_clip(augmented)) / 2


FORMS = {
    "clip": (ContrastiveConfig(weight=1.0), printed_clip),
    "clip_inmodal": (ContrastiveConfig(weight=1.0, in_modal=True), printed_clip_inmodal),
    "clip_2v": (ContrastiveConfig(weight=1.0, second_view=True), printed_clip_2v),
}


def loss(form: str):
    return lambda e: computed(Contrastive(FORMS[form][0], LossSettings()), e)[0]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(1, 6), seed=st.integers(0, 999))
def test_agrees_with_the_printed_formula(form, pairs, seed):
    e = random_embeddings(pairs, 5, seed)
    assert_same(value_and_gradients(loss(form), e), value_and_gradients(FORMS[form][1], e))


@pytest.mark.parametrize("form", FORMS)
def test_components_carry_the_names_of_their_directions(form):
    e = random_embeddings(5, 4, 1)
    value, terms = computed(Contrastive(FORMS[form][0], LossSettings()), e)
    pairs = {"image_to_text": (e.image, e.text), "text_to_image": (e.text, e.image)}
    if form == "clip_inmodal":
        pairs |= {"image_to_image": (e.image, e.image_augmented), "text_to_text": (e.text, e.text_augmented)}
    if form == "clip_2v":
        pairs["image_to_text_augmented"] = (e.image_augmented, e.text_augmented)
        pairs["text_to_image_augmented"] = (e.text_augmented, e.image_augmented)
    assert terms.keys() == pairs.keys()
    for name, (x, y) in pairs.items():
        torch.testing.assert_close(terms[name], printed_direction(x, y, e.logit_scale))
    torch.testing.assert_close(value, torch.stack(list(terms.values())).mean())


def test_two_equal_views_are_worth_one():
    e = random_embeddings(5, 4, 1)
    e = replace(e, image_augmented=e.image, text_augmented=e.text)
    torch.testing.assert_close(loss("clip_2v")(e), loss("clip")(e))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(pairs=st.integers(2, 8), seed=st.integers(0, 999))
def test_symmetries(form, pairs, seed):
    e = random_embeddings(pairs, 5, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(random_embeddings(5, 5, seed).image).Q
    right = loss(form)(e)
    torch.testing.assert_close(loss(form)(modalities_exchanged(e)), right)
    torch.testing.assert_close(loss(form)(transformed(e, lambda z: z[order])), right)
    torch.testing.assert_close(loss(form)(transformed(e, lambda z: z @ rotation)), right)


@pytest.mark.parametrize("cone", [1.0, -2.0])
def test_largest_scale_of_the_fusion_model_neither_overflows_nor_underflows(cone):
    """Logits of plus and minus 900, whose exponentials float64 does not hold."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 8, dtype=torch.float64, generator=generator) + mean for mean in (cone, abs(cone)))
    image, text = (normalize(rows, dim=1).requires_grad_() for rows in (x, y))
    scale = torch.tensor([1000.0], dtype=torch.float64)
    contrastive = Contrastive(ContrastiveConfig(weight=1.0), LossSettings())
    objective = Objective({"contrastive": contrastive}, {"contrastive": 1.0})
    total, _ = objective({"image": image, "text": text, "logit_scale": scale}, 0)
    logits, own = scale * image @ text.T, torch.arange(6)
    expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(total, expected)
    inputs = (image, text)
    torch.testing.assert_close(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs))


def test_the_mean_of_the_losses_of_rows_is_the_loss():
    e = random_embeddings(7, 5, seed=0)
    outputs = {name: getattr(e, name) for name in ("image", "text", "logit_scale")}
    losses = row_losses(outputs, e.image, e.text)
    assert losses.shape == (7,)
    torch.testing.assert_close(losses.mean(), printed_clip(e).detach().float())
