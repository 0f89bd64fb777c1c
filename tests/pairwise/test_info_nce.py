"""InfoNCE in tiles: the printed formula, its precision at a high logit scale, its symmetries, its memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from modstruct.pairwise.info_nce import info_nce, symmetric_info_nce
from torch.nn.functional import normalize

from modstruct.pairwise import info_nce as info_nce_module
from modstruct.pairwise import reference


def tiles_of(elements: int):
    return mock.patch.dict(info_nce_module.TILE_ELEMENTS, cpu=elements)


def unit_rows(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normalize(torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(
        dtype
    )


def with_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value, and its gradient with respect to each input."""
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


def both_ways_weighted(x, y, scale):
    """The two directions with unequal weights, so that one in the other's place would show."""
    x_to_y, y_to_x = symmetric_info_nce(x, y, scale)
    return 0.3 * x_to_y + 0.7 * y_to_x


def both_ways_weighted_reference(x, y, scale):
    return 0.3 * reference.info_nce(x, y, scale) + 0.7 * reference.info_nce(y, x, scale)


PAIRS = [(info_nce, reference.info_nce), (both_ways_weighted, both_ways_weighted_reference)]


@pytest.mark.parametrize(("ours", "printed"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 6),
    tile_rows=st.integers(1, 12),
    scale=st.floats(1, 100),
    seed=st.integers(0, 999),
)
def test_agrees_with_the_formula_in_value_and_gradients(ours, printed, rows, width, tile_rows, scale, seed):
    inputs = (
        unit_rows(rows, width, seed),
        unit_rows(rows, width, seed + 1000),
        torch.tensor([scale], dtype=torch.float64),
    )
    with tiles_of(tile_rows * rows):
        found = with_gradients(ours, *inputs)
    for f, right in zip(found, with_gradients(printed, *inputs), strict=True):
        torch.testing.assert_close(f, right, rtol=1e-10, atol=1e-12)
        assert f.shape == right.shape


@pytest.mark.parametrize("tile_rows", [2, 5])
@pytest.mark.parametrize("ours", [info_nce, both_ways_weighted])
def test_gradient_of_the_value_itself(ours, tile_rows):
    inputs = unit_rows(5, 3, 1), unit_rows(5, 3, 2), torch.tensor([8.0], dtype=torch.float64)
    with tiles_of(tile_rows * 5):
        assert torch.autograd.gradcheck(ours, [z.requires_grad_() for z in inputs])


@pytest.mark.parametrize("tile_rows", [7, 64])
@pytest.mark.parametrize(("ours", "printed"), PAIRS)
def test_float32_keeps_its_digits_where_the_loss_is_1e_8(ours, printed, tile_rows):
    # All rows lie near one direction, so that negatives have cosines up to 0.8, and every positive has 1: at scale 100
    # a loss about e^-20. One minus the probability of the positive, formed in float32, would have no right digit.
    center = unit_rows(1, 48, 5)
    x = normalize(1.5 * center + unit_rows(64, 48, 6)).float()
    inputs = x, x, torch.tensor([100.0])
    with tiles_of(tile_rows * 64):
        found = with_gradients(ours, *inputs)
    right = with_gradients(printed, *(z.double() for z in inputs))
    assert 1e-9 < right[0] < 1e-7
    assert all(relative_error(f, r) < 1e-4 for f, r in zip(found, right, strict=True))


@pytest.mark.parametrize(("ours", "printed"), PAIRS)
def test_scale_100_does_not_overflow(ours, printed):
    x = unit_rows(6, 4, 3, torch.float32)
    y = x.flip(0)
    y[0] = -x[0]  # the worst case: the positive opposite, a negative aligned
    inputs = x, y, torch.tensor([100.0])
    found, right = with_gradients(ours, *inputs), with_gradients(printed, *(z.double() for z in inputs))
    assert all(relative_error(f, r) < 1e-5 for f, r in zip(found, right, strict=True))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 10), seed=st.integers(0, 999))
def test_symmetries(rows, seed):
    x, y, scale = unit_rows(rows, 4, seed), unit_rows(rows, 4, seed + 1000), torch.tensor([20.0], dtype=torch.float64)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(unit_rows(4, 4, seed + 2000)).Q
    both = torch.stack(symmetric_info_nce(x, y, scale))
    torch.testing.assert_close(both, torch.stack(symmetric_info_nce(y, x, scale)).flip(0))
    torch.testing.assert_close(both, torch.stack(symmetric_info_nce(x[order], y[order], scale)))
    torch.testing.assert_close(both, torch.stack(symmetric_info_nce(x @ rotation, y @ rotation, scale)))
    torch.testing.assert_close(both, torch.stack((info_nce(x, y, scale), info_nce(y, x, scale))))


@pytest.mark.parametrize("tile_rows", [2, 8])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_in_a_row_reaches_the_result(which, tile_rows):
    inputs = [unit_rows(8, 4, 1, torch.float32), unit_rows(8, 4, 2, torch.float32)]
    inputs[which][5, 2] = torch.nan
    with tiles_of(tile_rows * 8):
        assert info_nce(*inputs, torch.tensor([10.0])).isnan()
        assert all(loss.isnan() for loss in symmetric_info_nce(*inputs, torch.tensor([10.0])))


def test_no_matrix_of_all_pairs_is_made():
    x, y = (unit_rows(64, 8, seed, torch.float32).requires_grad_() for seed in (1, 2))
    scale = torch.tensor([10.0], requires_grad=True)
    with tiles_of(16 * 64), LargestTensor() as largest:
        (info_nce(x, y, scale) + sum(symmetric_info_nce(x, y, scale))).backward()
    assert largest.elements == 16 * 64


def test_half_precision_is_computed_in_float32_even_under_autocast():
    inputs = [unit_rows(8, 16, seed, torch.bfloat16) for seed in (1, 2)] + [torch.tensor([30.0])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(both_ways_weighted, *inputs)
    right = with_gradients(both_ways_weighted, *(z.float() for z in inputs))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1].bfloat16())


def test_shapes_that_do_not_fit_are_refused():
    x, scale = torch.zeros(4, 3), torch.ones(1)
    for bad in (torch.zeros(5, 3), torch.zeros(4, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match="x and y"):
            info_nce(x, bad, scale)
    with pytest.raises(ValueError, match="x and y"):
        symmetric_info_nce(x[:0], x[:0], scale)
    with pytest.raises(ValueError, match="logit_scale"):
        info_nce(x, x, torch.ones(2))
