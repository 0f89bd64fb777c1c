"""Symmetric InfoNCE: the printed formula, its precision at a high logit scale, its symmetries, its memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from comparison import (
    SIZES,
    OperatorCalls,
    assert_compiles,
    assert_each_input_alone_gets_its_gradient,
    assert_half_precision_is_taken_to_float32,
    assert_layout_does_not_matter,
    assert_second_derivative_is_refused,
    errors,
    logit_scale,
    permutation,
    rotation,
    tiles_of,
    towers,
    unit_rows,
    with_gradients,
    without_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.nn.functional import normalize

from modstruct.pairwise import contrastive, cpu_kernels, info_nce
from modstruct.pairwise.contrast import contrastive_grad, contrastive_statistics


def both_ways_weighted(x, y, scale):
    """The two directions with unequal weights, so that one in the other's place would show."""
    x_to_y, y_to_x = contrastive(x, y, scale)
    return 0.3 * x_to_y + 0.7 * y_to_x


def printed(x, y, scale):
    return 0.3 * reference.info_nce(x, y, scale) + 0.7 * reference.info_nce(y, x, scale)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 6),
    tile_rows=st.integers(1, 12),
    scale=st.floats(1, 100),
    seed=st.integers(0, 999),
)
def test_agrees_with_the_formula_in_value_and_gradients(rows, width, tile_rows, scale, seed):
    inputs = (
        unit_rows(rows, width, seed, torch.float64),
        unit_rows(rows, width, seed + 1000, torch.float64),
        logit_scale(scale, torch.float64),
    )
    with tiles_of(tile_rows * rows):
        found = with_gradients(both_ways_weighted, *inputs)
    for f, right in zip(found, with_gradients(printed, *inputs), strict=True):
        torch.testing.assert_close(f, right, rtol=1e-10, atol=1e-12)
        assert f.shape == right.shape


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_float32_is_within_1e_5_of_float64(rows, width, scale):
    inputs = *towers(rows, width, 1), logit_scale(scale)
    assert max(errors(both_ways_weighted, printed, *inputs, smallest=1e-10)) < 1e-5


@pytest.mark.parametrize("rows", [64, 250])
def test_float32_keeps_its_digits_where_the_loss_is_1e_8(rows):
    # All rows lie near one direction, so that negatives have cosines up to 0.8, and every positive has 1: at scale 100
    # a loss about e^-20. One minus the probability of the positive, formed in float32, would have no right digit.
    center = unit_rows(1, 48, 5, torch.float64)
    x = normalize(1.5 * center + unit_rows(rows, 48, 6, torch.float64)).float()
    inputs = x, x, logit_scale(100.0)
    assert 1e-9 < printed(*(z.double() for z in inputs)) < 1e-6
    assert max(errors(both_ways_weighted, printed, *inputs)) < 1e-4


def test_scale_100_does_not_overflow():
    x = unit_rows(6, 4, 3)
    y = x.flip(0)
    y[0] = -x[0]  # the worst case: the positive opposite, a negative aligned
    assert max(errors(both_ways_weighted, printed, x, y, logit_scale(100.0))) < 1e-5


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 300), width=st.integers(1, 40), scale=st.floats(0.1, 100), seed=st.integers(0, 999))
def test_float32_stays_finite_and_near_float64_at_any_scale(rows, width, scale, seed):
    inputs = unit_rows(rows, width, seed), unit_rows(rows, width, seed + 1000), logit_scale(scale)
    assert all(z.isfinite().all() for z in with_gradients(both_ways_weighted, *inputs))
    # Against our own form in float64: where the loss is 1e-12, the printed one has lost its digits in float64 too.
    assert errors(both_ways_weighted, both_ways_weighted, *inputs)[0] < 2e-5


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 10), seed=st.integers(0, 999))
def test_symmetries(rows, seed):
    x, y = unit_rows(rows, 4, seed, torch.float64), unit_rows(rows, 4, seed + 1000, torch.float64)
    scale = logit_scale(20.0, torch.float64)
    order, turn = permutation(rows, seed), rotation(4, seed + 2000)
    both = torch.stack(contrastive(x, y, scale))
    torch.testing.assert_close(both, torch.stack(contrastive(y, x, scale)).flip(0))
    torch.testing.assert_close(both, torch.stack(contrastive(x[order], y[order], scale)))
    torch.testing.assert_close(both, torch.stack(contrastive(x @ turn, y @ turn, scale)))
    torch.testing.assert_close(both, torch.stack((info_nce(x, y, scale), info_nce(y, x, scale))))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(2, 250), width=st.integers(2, 40), seed=st.integers(0, 999))
def test_gradients_move_with_a_permutation_and_a_rotation(rows, width, seed):
    x, y, scale = unit_rows(rows, width, seed), unit_rows(rows, width, seed + 1000), logit_scale(10.0)
    order, turn = permutation(rows, seed), rotation(width, seed).float()
    value, *gradients, scale_gradient = with_gradients(both_ways_weighted, x, y, scale)
    moved = with_gradients(both_ways_weighted, x[order] @ turn, y[order] @ turn, scale)
    right = [value, *(g[order] @ turn for g in gradients), scale_gradient]
    for f, r in zip(moved, right, strict=True):
        torch.testing.assert_close(f, r, rtol=1e-4, atol=1e-5 * r.abs().max().item())


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 120), scale=st.floats(1, 30), seed=st.integers(0, 999))
def test_a_batch_twice_over_costs_log_2_more(rows, scale, seed):
    # Every exponential is in its sum twice, and no positive moves; one pair more goes by the formula.
    x, y, scale = unit_rows(rows, 16, seed), unit_rows(rows, 16, seed + 1000), logit_scale(scale)
    once = torch.stack(contrastive(x, y, scale))
    twice = torch.stack(contrastive(torch.cat((x, x)), torch.cat((y, y)), scale))
    torch.testing.assert_close(twice, once + math.log(2), rtol=1e-5, atol=1e-5)
    one_more = torch.cat((x, x[:1])), torch.cat((y, y[:1])), scale
    assert max(errors(both_ways_weighted, printed, *one_more, smallest=1e-10)) < 1e-5


def test_identical_towers_have_equal_directions_and_equal_gradients():
    z, scale = unit_rows(210, 24, 1), logit_scale(15.0)
    x_to_y, y_to_x = contrastive(z, z, scale)
    torch.testing.assert_close(x_to_y, y_to_x)
    _, x_gradient, y_gradient = with_gradients(lambda x, y: sum(contrastive(x, y, scale)), z, z)
    torch.testing.assert_close(x_gradient, y_gradient, rtol=1e-4, atol=1e-7)


def test_orthogonal_towers_cost_log_n_and_do_not_move_the_scale():
    x, y = torch.zeros(200, 32), torch.zeros(200, 32)
    x[:, :16], y[:, 16:] = unit_rows(200, 16, 1), unit_rows(200, 16, 2)
    value, _, _, scale_gradient = with_gradients(both_ways_weighted, x, y, logit_scale(50.0))
    assert value.item() == pytest.approx(math.log(200), rel=1e-6)
    assert scale_gradient.item() == 0


def test_a_pair_alone_costs_nothing_and_has_no_gradient():
    value, *gradients = with_gradients(both_ways_weighted, unit_rows(1, 5, 1), unit_rows(1, 5, 2), logit_scale(100.0))
    assert value == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("tile_rows", [2, 8])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_a_row_reaches_the_result(which, tile_rows, dtype):
    inputs = [unit_rows(8, 4, 1, dtype), unit_rows(8, 4, 2, dtype)]
    inputs[which][5, 2] = torch.nan
    with tiles_of(tile_rows * 8):
        assert all(loss.isnan() for loss in contrastive(*inputs, logit_scale(10.0)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 192, 249])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_reaches_the_value_and_the_gradient_of_its_row(value, row, which):
    inputs = [unit_rows(250, 20, 1), unit_rows(250, 20, 2)]
    inputs[which][row, 7] = value
    result = with_gradients(both_ways_weighted, *inputs, logit_scale(10.0))
    assert not result[0].isfinite()
    assert not result[1 + which][row].isfinite().all()


def test_no_matrix_of_all_pairs_is_made_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "KEPT_BYTES", 4 * 400 * 400)
    x, y = (unit_rows(400, 8, seed).requires_grad_() for seed in (1, 2))
    scale = logit_scale(10.0).requires_grad_()
    with LargestTensor() as largest:
        sum(contrastive(x, y, scale)).backward()
    assert largest.elements == 400 * 8


def test_half_precision_is_computed_in_float32_even_under_autocast():
    assert_half_precision_is_taken_to_float32(
        both_ways_weighted, unit_rows(40, 16, 1), unit_rows(40, 16, 2), logit_scale(30.0)
    )


def test_layout_does_not_matter():
    x, y, scale = unit_rows(200, 33, 1), unit_rows(200, 33, 2), logit_scale(10.0)
    assert_layout_does_not_matter(lambda x, y: both_ways_weighted(x, y, scale), x, y)


def test_each_input_alone_gets_its_gradient():
    assert_each_input_alone_gets_its_gradient(
        both_ways_weighted, unit_rows(30, 8, 1), unit_rows(30, 8, 2), logit_scale(9.0)
    )


def test_operators_pass_opcheck():
    x, y, scale = unit_rows(5, 4, 1), unit_rows(9, 4, 2), logit_scale(9.0)
    row_lse, column_lse, positive, _ = contrastive_statistics(x, y, scale, 3, "float32")
    leaves = [z.clone().requires_grad_() for z in (x, y, scale)]
    torch.library.opcheck(contrastive_statistics, (*leaves, 3, "float32"))
    whole_tile = [unit_rows(192, 4, seed).requires_grad_() for seed in (1, 2)]  # of kept logits all are written
    torch.library.opcheck(contrastive_statistics, (*whole_tile, leaves[2], 0, "float32", True))
    row_values = torch.stack((row_lse, torch.ones_like(row_lse), torch.ones_like(positive)))
    column_values = torch.stack((column_lse, torch.ones_like(column_lse)))
    torch.library.opcheck(contrastive_grad, (x, y, scale, 3, row_values, column_values, "float32"))


def test_torch_compile_takes_the_whole_function():
    assert_compiles(both_ways_weighted, unit_rows(20, 8, 1), unit_rows(20, 8, 2), logit_scale(9.0))


def test_a_second_derivative_is_refused():
    inputs = unit_rows(6, 3, 1), unit_rows(6, 3, 2), logit_scale(9.0)
    assert_second_derivative_is_refused(both_ways_weighted, "contrastive_grad", *inputs)


def test_no_gradient_is_made_where_none_is_wanted():
    inputs = unit_rows(20, 8, 1), unit_rows(20, 8, 2), logit_scale(9.0)
    with OperatorCalls() as calls:
        assert torch.equal(without_gradient(both_ways_weighted, *inputs), both_ways_weighted(*inputs))
    assert [name for name, _ in calls.seen] == ["contrastive_statistics"] * 2


def test_the_shape_of_the_scale_does_not_matter():
    x, y = unit_rows(20, 8, 1), unit_rows(20, 8, 2)
    for scale in (torch.tensor(9.0), torch.tensor([[9.0]]), torch.tensor([9.0], dtype=torch.float64)):
        value, _, _, gradient = with_gradients(both_ways_weighted, x, y, scale)
        assert torch.equal(value, both_ways_weighted(x, y, logit_scale(9.0)))
        assert (gradient.shape, gradient.dtype) == (scale.shape, scale.dtype)


GOOD = {"x": torch.zeros(4, 3), "y": torch.zeros(4, 3), "logit_scale": torch.ones(1), "precision": "float32"}
BAD_INPUT = [
    ({"y": torch.zeros(5, 3)}, "shape of y"),
    ({"y": torch.zeros(4, 2)}, "shape of y"),
    ({"y": torch.zeros(4)}, "shape of y"),
    ({"x": torch.zeros(0, 3), "y": torch.zeros(0, 3)}, "shape of x"),
    ({"x": torch.zeros(4, 0), "y": torch.zeros(4, 0)}, "shape of x"),
    ({"x": torch.zeros(2, 3, 4), "y": torch.zeros(2, 3, 4)}, "shape of x"),
    ({"x": torch.zeros(4, 3, dtype=torch.int64), "y": torch.zeros(4, 3, dtype=torch.int64)}, "dtype of x"),
    ({"x": torch.zeros(4, 3, dtype=torch.complex64), "y": torch.zeros(4, 3, dtype=torch.complex64)}, "dtype of x"),
    ({"y": torch.zeros(4, 3, dtype=torch.int32)}, "dtype of y"),
    ({"y": torch.zeros(4, 3, dtype=torch.float64)}, "dtype of y"),
    ({"y": torch.zeros(4, 3, dtype=torch.bfloat16)}, "dtype of y"),
    ({"y": torch.zeros(4, 3, device="meta")}, "device of y"),
    ({"logit_scale": torch.ones(2)}, "shape of logit_scale"),
    ({"logit_scale": torch.ones(1, dtype=torch.int64)}, "dtype of logit_scale"),
    ({"logit_scale": torch.ones(1, device="meta")}, "device of logit_scale"),
    ({"logit_scale": 14.0}, "logit_scale"),
    ({"x": np.zeros((4, 3), np.float32)}, "x"),
    ({"precision": "float16"}, "precision"),
]


@pytest.mark.parametrize(("bad", "name"), BAD_INPUT)
@pytest.mark.parametrize("function", [contrastive, info_nce])
def test_bad_input_is_refused_by_name(function, bad, name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        function(**(GOOD | bad))
