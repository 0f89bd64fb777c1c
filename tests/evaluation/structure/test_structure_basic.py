"""Metrics of structure agree with their formulas and have the extreme values that geometry gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from modstruct.evaluation.structure import metrics as module
from modstruct.evaluation.structure.metrics import structure, uniformity


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_metrics_agree_with_their_formulas():
    image, text = unit(40, 8), unit(30, 8, seed=1)
    pairs = torch.randint(0, 30, (50, 2), generator=torch.Generator().manual_seed(2))
    metrics = structure(image, text, pairs)
    z_v, z_t = image.double(), text.double()
    distances = (z_v[pairs[:, 0]] - z_t[pairs[:, 1]]).square().sum(1)
    assert metrics["alignment"] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert metrics["modality_gap"] == pytest.approx((z_v.mean(0) - z_t.mean(0)).norm().item(), rel=1e-5)
    for name, z in (("uniformity_image", z_v), ("uniformity_text", z_t)):
        assert metrics[name] == pytest.approx(torch.pdist(z).square().mul(-2).exp().mean().log().item(), rel=1e-5)


def test_metrics_do_not_change_under_rotation():
    image, text = unit(20, 6), unit(20, 6, seed=1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    assert structure(image @ rotation, text @ rotation) == pytest.approx(structure(image, text), rel=1e-4)


def test_extremes():
    north = torch.tensor([[0.0, 1.0]]).repeat(10, 1)
    assert structure(north, -north) == pytest.approx(
        {"alignment": 4, "uniformity_image": 0, "uniformity_text": 0, "modality_gap": 2}, abs=1e-5
    )
    poles = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert uniformity(poles) == pytest.approx(-8, abs=1e-3)
    spread = unit(2000, 256)  # in many dimensions random directions are nearly orthogonal: |u - v|^2 = 2
    assert uniformity(spread) == pytest.approx(-4, abs=0.05)


def test_uniformity_of_a_batch_does_not_shift_with_its_size():
    large = uniformity(unit(4000, 16))
    small = [math.exp(uniformity(unit(16, 16, seed=s))) for s in range(300)]
    assert math.log(sum(small) / len(small)) == pytest.approx(large, abs=0.02)


def test_many_rows_are_thinned_evenly(monkeypatch):
    z = unit(400, 16)
    whole = uniformity(z)
    monkeypatch.setattr(module, "UNIFORMITY_ROWS", 100)
    assert uniformity(z) == pytest.approx(uniformity(z[torch.linspace(0, 399, 100).round().long()]))
    assert uniformity(z) != whole
    assert uniformity(z) == pytest.approx(whole, abs=0.1)


def test_one_pair_has_no_uniformity_and_no_gradient_flows():
    image, text = unit(1, 4).requires_grad_(), unit(1, 4, seed=1)
    assert set(structure(image, text)) == {"alignment", "modality_gap"}


def test_half_precision_is_measured_in_float32():
    image, text = unit(50, 16).bfloat16(), unit(50, 16, seed=1).bfloat16()
    assert structure(image, text) == pytest.approx(structure(image.float(), text.float()))


def test_rows_that_cannot_be_pairs_are_refused():
    with pytest.raises(ValueError, match="3 image and 2 text rows"):
        structure(unit(3, 4), unit(2, 4))
