"""The objective: weights, the views and heads it asks for, the terms it names."""

from __future__ import annotations

from dataclasses import fields
from dataclasses import replace as changed

import pytest
import torch
from towers import NAMES, assert_same, random_embeddings, replace, transformed, value_and_gradients

from modstruct.config import (
    FUSION_LOSSES,
    BridgeConfig,
    ContrastiveConfig,
    GeometryConfig,
    LossesConfig,
    SeparationConfig,
)
from modstruct.config.losses import AlignmentConfig, SigmoidConfig
from modstruct.losses.objective import LOSSES, build_objective

BOTH_VIEWS = {"image_augmented", "text_augmented"}
OF_TWO_TOWERS = [name for name in LOSSES if name not in FUSION_LOSSES]


def everything() -> LossesConfig:
    return LossesConfig(
        contrastive=ContrastiveConfig(weight=0.5, in_modal=True),
        separation=SeparationConfig(weight=2.0),
        bridge=BridgeConfig(weight=3.0, t=None),
        geometry=GeometryConfig(weight=0.25),
        sigmoid=SigmoidConfig(weight=0.5),
        alignment=AlignmentConfig(weight=1.5, form="distance", uniformity_weight=0.5),
    )


def test_every_section_of_the_recipe_has_its_loss():
    assert list(LOSSES) == [field.name for field in fields(LossesConfig)]


@pytest.mark.parametrize(
    ("config", "views", "independent"),
    [
        (LossesConfig(contrastive=ContrastiveConfig(weight=1.0)), set(), False),
        (LossesConfig(contrastive=ContrastiveConfig(weight=1.0, in_modal=True)), BOTH_VIEWS, False),
        (LossesConfig(contrastive=ContrastiveConfig(weight=1.0, second_view=True)), BOTH_VIEWS, False),
        (LossesConfig(alignment=AlignmentConfig(weight=1.0, uniformity_weight=1.0)), set(), False),
        (LossesConfig(bridge=BridgeConfig(weight=1.0)), {"image_augmented"}, False),
        (LossesConfig(separation=SeparationConfig(weight=1.0)), BOTH_VIEWS, True),
        (LossesConfig(geometry=GeometryConfig(weight=1.0)), BOTH_VIEWS, False),
        (LossesConfig(geometry=GeometryConfig(weight=1.0, augmented=False)), set(), False),
        (everything(), BOTH_VIEWS, True),
    ],
)
def test_views_and_heads_that_the_losses_need(config, views, independent):
    objective = build_objective(config)
    assert objective.views == frozenset(views)
    assert objective.independent is independent
    # What is not asked for is not needed.
    absent = {
        name: None
        for name in NAMES
        if ("independent" in name and not independent)
        or (name.endswith("_augmented") and f"{name.split('_')[0]}_augmented" not in views)
    }
    total, _ = objective(replace(random_embeddings(4, 6, 1), **absent), step=0)
    assert total.isfinite()


def test_total_is_the_weighted_sum_of_the_named_terms():
    total, terms = build_objective(everything())(random_embeddings(6, 8, 1), step=3)
    weighted = 0.5 * terms["contrastive"] + 2 * terms["separation"] + 3 * terms["bridge"] + 0.25 * terms["geometry"]
    weighted = weighted + 0.5 * terms["sigmoid"] + 1.5 * terms["alignment"]
    torch.testing.assert_close(total, weighted)
    assert {
        "contrastive/image_to_text",
        "contrastive/text_to_image",
        "contrastive/image_to_image",
        "contrastive/text_to_text",
        "separation/orthogonality",
        "separation/image_to_image",
        "separation/text_to_text",
        "separation/uniformity",
        "bridge/t",
        "geometry/consistency",
        "geometry/view_consistency",
        "geometry/per_pair",
        "alignment/distance",
        "alignment/uniformity",
    } | set(OF_TWO_TOWERS) == set(terms)
    assert all(term.shape == () and not term.requires_grad for term in [total, *terms.values()])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_weight_of_zero_leaves_no_trace(weight):
    config = LossesConfig(contrastive=ContrastiveConfig(weight=1.0), bridge=BridgeConfig(weight=weight))
    e = random_embeddings(6, 8, 1)
    _, terms = build_objective(config)(e, step=0)
    result = value_and_gradients(lambda e: build_objective(config)(e, step=0)[0], e)
    assert ("bridge" in terms) == (weight > 0)
    assert bool(result["image_augmented"].any()) == (weight > 0)


def test_gradient_is_the_weighted_sum_of_the_single_gradients():
    e = random_embeddings(6, 8, 1)
    config = everything()
    expected: dict = {}
    for name in OF_TWO_TOWERS:
        # One loss alone: the others, at weight 0, keep their sections.
        others = {o: changed(getattr(config, o), weight=0.0) for o in LOSSES if o != name}
        single = build_objective(changed(config, **others))
        for part, value in value_and_gradients(lambda e, s=single: s(e, step=3)[0], e).items():
            expected[part] = expected.get(part, 0) + value
    assert_same(value_and_gradients(lambda e: build_objective(config)(e, step=3)[0], e), expected)


@pytest.mark.parametrize(
    ("missing", "loss"),
    [
        ("image_augmented", "contrastive"),
        ("text_independent", "separation"),
        ("image_independent_augmented", "separation"),
        ("text", "contrastive"),
    ],
)
def test_a_missing_embedding_is_named(missing, loss):
    e = replace(random_embeddings(4, 6, 1), **{missing: None})
    with pytest.raises(ValueError, match=rf"embeddings\.{missing} = None: losses\.{loss}"):
        build_objective(everything())(e, step=0)


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("text", lambda z: z[:3], r"shape of embeddings\.text = \(3, 6\): must be \(4, 6\), that of embeddings\.image"),
        ("image_augmented", lambda z: z.repeat(2, 1), r"shape of embeddings\.image_augmented = \(8, 6\): must be"),
        ("image_independent", lambda z: z[:, :5], r"shape of embeddings\.image_independent = \(4, 5\): must be"),
        ("text", lambda z: z[0], r"embeddings\.text = .*\(6,\)': must be \(B, D\)"),
        ("text", lambda z: z.long(), r"embeddings\.text = 'torch\.int64 .*: must be \(B, D\).*floating point"),
        ("text", lambda z: 28 * z, r"embeddings\.text = 'norm 28 in row .': must have unit norm: .*normalize"),
        ("text", lambda z: z.numpy(), r"embeddings\.text = 'ndarray': must be a tensor"),
        ("logit_scale", lambda s: s.expand(2), r"shape of logit_scale = \(2,\): give one number"),
        ("logit_scale", float, r"embeddings\.logit_scale = 'float': must be a tensor"),
    ],
)
def test_an_embedding_of_another_kind_than_the_others_is_named(name, wrong, told):
    """Where no kernel would notice: some losses would take as many rows as they find."""
    e = random_embeddings(4, 6, 1)
    with pytest.raises(ValueError, match=told):
        build_objective(everything())(replace(e, **{name: wrong(e[name])}), step=0)


def test_a_scale_without_dimensions_is_a_scale():
    e, objective = random_embeddings(4, 6, 1), build_objective(everything())
    assert objective(replace(e, logit_scale=e.logit_scale[0]), step=0)[0] == objective(e, step=0)[0]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_even_under_autocast(half):
    e = transformed(random_embeddings(6, 8, 1), lambda z: z.to(half))
    e.logit_scale, e.logit_bias = e.logit_scale.float(), e.logit_bias.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = build_objective(everything())(e, step=0)
    right, right_terms = build_objective(everything())(transformed(e, torch.Tensor.float), step=0)
    assert total.dtype == torch.float32
    assert torch.equal(total, right)
    assert all(torch.equal(terms[name], right_terms[name]) for name in terms)


def test_float32_stays_near_float64():
    e = random_embeddings(24, 8, 1)
    single = transformed(e, torch.Tensor.float)
    single.logit_scale, single.logit_bias = e.logit_scale.float(), e.logit_bias.float()
    found = value_and_gradients(lambda e: build_objective(everything())(e, step=0)[0], single)
    right = value_and_gradients(lambda e: build_objective(everything())(e, step=0)[0], e)
    for name, value in right.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("loss", OF_TWO_TOWERS)
def test_nan_in_a_row_reaches_the_term_it_is_in(loss):
    e = transformed(random_embeddings(8, 4, 1), torch.Tensor.float)
    e.logit_scale, e.logit_bias = e.logit_scale.float(), e.logit_bias.float()
    name = "image_independent" if loss == "separation" else "image"
    e[name][5, 2] = torch.nan
    total, terms = build_objective(everything())(e, step=0)
    assert total.isnan()
    assert terms[loss].isnan()
