"""Gaussian potential over all pairs: values and gradients against float64, symmetries, operators, bad input."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from comparison import (
    SIZES,
    OperatorCalls,
    assert_compiles,
    assert_half_precision_is_taken_to_float32,
    assert_layout_does_not_matter,
    assert_second_derivative_is_refused,
    cone_rows,
    errors,
    permutation,
    rotation,
    unit_rows,
    with_gradients,
    without_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor
from torch.nn.functional import normalize

from modstruct.pairwise import gaussian_potential
from modstruct.pairwise.gaussian import potential_grad, potential_sum


def log_mean(t: float, form=gaussian_potential):
    return lambda z: form(z, t)


def total(t: float):
    """The sum over all pairs, of x with itself or of x with y."""
    return lambda x, y=None: potential_sum(x, y, t, True, "float32")[0]


def printed_total(t: float):
    return lambda x, y=None: reference.gaussian_potential_sum(x, t, y)


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("spread", [None, 0.01, 1e-3])
def test_sum_and_gradient_agree_with_float64(rows, width, spread):
    z = unit_rows(rows, width, 0) if spread is None else cone_rows(rows, width, 0, spread)
    value_error, gradient_error = errors(total(2.0), printed_total(2.0), z)
    assert value_error < 1e-6
    assert gradient_error < 5e-6


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 300, 5), (130, 1, 40), (101, 290, 130), (400, 390, 33)])
def test_unequal_rows_and_columns_agree_with_float64(rows, columns, width):
    value_error, *gradient_errors = errors(
        total(1.5), printed_total(1.5), unit_rows(rows, width, 1), unit_rows(columns, width, 2)
    )
    assert value_error < 1e-6
    assert max(gradient_errors) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_of_the_mean_and_its_bounds(dtype):
    z = unit_rows(50, 16, 0, dtype)
    value_error, gradient_error = errors(log_mean(2.0), log_mean(2.0, reference.gaussian_potential), z)
    assert value_error < 1e-6
    assert gradient_error < 5e-6
    value = gaussian_potential(z, 2.0)
    assert value.dtype == dtype
    assert -math.log(50) <= value.item() <= 0
    assert gaussian_potential(z[:1].expand(20, -1), 2.0).item() == pytest.approx(0, abs=1e-6)  # all equal


def test_gradient_of_the_value_itself():
    z, columns = (unit_rows(rows, 4, rows, torch.float64).requires_grad_() for rows in (9, 5))
    assert torch.autograd.gradcheck(log_mean(2.0), z)
    assert torch.autograd.gradcheck(total(2.0), (z, columns))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 220),
    width=st.integers(1, 60),
    t=st.floats(0.05, 8),
    shift=st.floats(-2, 2),
)
def test_permutation_rotation_and_shift_change_nothing(seed, rows, width, t, shift):
    z = unit_rows(rows, width, seed)
    order, turn = permutation(rows, seed), rotation(width, seed).float()
    value, gradient = with_gradients(total(t), z)
    moved, moved_gradient = with_gradients(total(t), z[order] @ turn + shift)
    assert moved.item() == pytest.approx(value.item(), rel=2e-5)
    size = max(gradient.norm().item(), t * rows)  # of the terms before they cancel
    assert (moved_gradient - gradient[order] @ turn).norm().item() < 2e-5 * size
    assert moved_gradient.sum(0).norm().item() < 2e-5 * size  # a common shift moves no distance


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 220), width=st.integers(1, 30), t=st.floats(0.05, 8))
def test_duplicates(seed, rows, width, t):
    # All rows twice: each pair four times over four times as many. One row twice: its potentials once more for either
    # role, and 1 for the new pair with itself.
    z = unit_rows(rows, width, seed)
    torch.testing.assert_close(gaussian_potential(torch.cat((z, z)), t), gaussian_potential(z, t), rtol=1e-5, atol=1e-6)
    grown = total(t)(torch.cat((z, z[:1]))) - total(t)(z)
    assert grown.item() == pytest.approx(2 * total(t)(z[:1], z).item() + 1, rel=1e-5, abs=1e-6 * rows**2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 220), columns=st.integers(1, 220), t=st.floats(0.05, 8))
def test_the_sum_over_a_union_is_that_of_its_parts(seed, rows, columns, t):
    x, y = unit_rows(rows, 12, seed), unit_rows(columns, 12, seed + 1000)
    parts = total(t)(x) + total(t)(y) + total(t)(x, y) + total(t)(y, x)
    near = 1e-6 + 5e-7 * t  # a squared distance is right to a few float32 steps of 4; exp(-t ·) makes that relative
    assert total(t)(torch.cat((x, y))).item() == pytest.approx(parts.item(), rel=near)
    value, *gradients = with_gradients(total(t), x, y)
    swapped, *swapped_gradients = with_gradients(total(t), y, x)
    assert swapped.item() == pytest.approx(value.item(), rel=near)
    for f, r in zip(swapped_gradients[::-1], gradients, strict=True):
        assert (f - r).norm() < 5e-6 * max(r.norm().item(), 1e-3 * t * rows)


def test_orthonormal_rows_are_all_equally_far():
    z = rotation(230, 1).float()
    right = math.log((230 + 230 * 229 * math.exp(-2 * 0.7)) / 230**2)
    assert gaussian_potential(z, 0.7).item() == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 200])
def test_equal_rows_have_no_gradient(rows):
    value, gradient = with_gradients(log_mean(2.0), unit_rows(1, 37, 1).expand(rows, -1).contiguous())
    assert value == 0
    assert (gradient == 0).all()


def test_a_pair_of_equal_rows_does_not_spoil_the_gradient_of_the_others():
    # At t = 100 every other potential is some 1e-80 of its own; the gradient is made of those alone.
    x = cone_rows(60, 24, 1, 0.3)
    z = torch.cat((x, x[:30]))
    assert errors(total(100.0), printed_total(100.0), z)[1] < 5e-5


def test_half_precision_is_taken_to_float32():
    assert_half_precision_is_taken_to_float32(log_mean(2.0), unit_rows(40, 24, 0))


def test_layout_does_not_matter():
    assert_layout_does_not_matter(log_mean(2.0), unit_rows(200, 33, 0))


def test_no_matrix_of_all_pairs_is_made():
    z = unit_rows(400, 8, 1).requires_grad_()
    with LargestTensor() as largest:
        gaussian_potential(z, 2.0).backward()
    assert largest.elements == 400 * 8


def test_operators_pass_opcheck():
    x, y, t = unit_rows(20, 8, 1), unit_rows(30, 8, 2), 2.0
    asking = x.clone().requires_grad_(), y.clone().requires_grad_()
    torch.library.opcheck(potential_sum, (*asking, t, True, "float32"))
    torch.library.opcheck(potential_sum, (asking[0], None, t, True, "float32"))
    torch.library.opcheck(potential_sum, (x, y, t, False, "float32"))
    gradient = torch.tensor(0.7, dtype=torch.float64)
    torch.library.opcheck(potential_grad, (gradient, x, x.clone(), y.clone(), t))
    torch.library.opcheck(potential_grad, (gradient, x, x.clone(), y[:0].clone(), t))


def test_torch_compile_takes_the_whole_function():
    def uniformity(z: Tensor) -> Tensor:
        return gaussian_potential(normalize(z, dim=1), 2.0)

    assert_compiles(uniformity, 3 * unit_rows(40, 8, 0))


def test_a_second_derivative_is_refused():
    assert_second_derivative_is_refused(log_mean(2.0), "gaussian_potential_grad", unit_rows(5, 3, 0))


def test_no_gradient_is_made_where_none_is_wanted():
    z = unit_rows(5, 3, 0)
    with OperatorCalls() as calls:
        assert torch.equal(without_gradient(log_mean(2.0), z), gaussian_potential(z, 2.0))
        gaussian_potential(z.clone().requires_grad_(), 2.0)
    assert [arguments[3] for _, arguments in calls.seen] == [False, False, True]
    for y in (None, z):
        value, x_grad, y_grad = potential_sum(z.clone().requires_grad_(), y, 2.0, False, "float32")
        assert x_grad.shape == y_grad.shape == (0, 3)
        assert torch.equal(value, total(2.0)(z, y))
        with pytest.raises(ValueError, match="with_grad"):
            value.backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 100, 249])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_reaches_the_result(value, row, dtype):
    z = unit_rows(250, 20, 0, dtype)
    z[row, 7] = value
    for function in (total(2.0), log_mean(2.0)):
        result, gradient = with_gradients(function, z)
        assert result.isnan()
        assert gradient[row].isnan().any()


@pytest.mark.parametrize("t", [2e-38, 1e-30, 1e4, 1e30])
def test_extreme_t_stays_finite(t):
    z = 100 * unit_rows(150, 20, 0)
    value, gradient = with_gradients(total(t), z)
    assert value.item() == pytest.approx(150**2 if t < 1 else 150)
    assert gradient.isfinite().all()


GOOD = {"z": torch.zeros(4, 4), "t": 2.0, "precision": "float32"}
BAD_INPUT = [
    ({"z": torch.zeros(0, 4)}, "shape of z"),
    ({"z": torch.zeros(4, 0)}, "shape of z"),
    ({"z": torch.zeros(4)}, "shape of z"),
    ({"z": torch.zeros(2, 3, 4)}, "shape of z"),
    ({"z": torch.zeros(4, 4, dtype=torch.int64)}, "dtype of z"),
    ({"z": torch.zeros(4, 4, dtype=torch.complex64)}, "dtype of z"),
    ({"t": 0.0}, "t"),
    ({"t": -1.0}, "t"),
    ({"t": math.inf}, "t"),
    ({"t": math.nan}, "t"),
    ({"t": 1e-50}, "t"),  # 0 as a float32: the kernels would multiply it with infinite distances
    ({"t": 1e39}, "t"),
    ({"precision": "float16"}, "precision"),
]


@pytest.mark.parametrize(("bad", "name"), BAD_INPUT)
def test_bad_input_is_refused_by_name(bad, name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        gaussian_potential(**(GOOD | bad))
