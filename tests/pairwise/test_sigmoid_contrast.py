"""SigLIP's sigmoid loss: the printed formula, its digits, symmetries, memory."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from comparison import (
    SIZES,
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

from modstruct.pairwise import sigmoid_contrastive
from modstruct.pairwise.contrast import row_contrast_grad, sigmoid_contrast

logit_bias = logit_scale


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 6),
    tile_rows=st.integers(1, 12),
    scale=st.floats(1, 100),
    bias=st.floats(-20, 20),
    seed=st.integers(0, 999),
)
def test_agrees_with_the_formula_in_value_and_gradients(rows, width, tile_rows, scale, bias, seed):
    inputs = (
        unit_rows(rows, width, seed, torch.float64),
        unit_rows(rows, width, seed + 1000, torch.float64),
        logit_scale(scale, torch.float64),
        logit_bias(bias, torch.float64),
    )
    with tiles_of(tile_rows * rows):
        found = with_gradients(sigmoid_contrastive, *inputs)
    for f, right in zip(found, with_gradients(reference.sigmoid_contrastive, *inputs), strict=True):
        torch.testing.assert_close(f, right, rtol=1e-10, atol=1e-12)
        assert f.shape == right.shape


@pytest.mark.parametrize("tile_rows", [2, 5])
def test_gradient_of_the_value_itself(tile_rows):
    inputs = [unit_rows(5, 3, seed, torch.float64) for seed in (1, 2)]
    inputs += [logit_scale(8.0, torch.float64), logit_bias(-3.0, torch.float64)]
    with tiles_of(tile_rows * 5):
        assert torch.autograd.gradcheck(sigmoid_contrastive, [z.requires_grad_() for z in inputs])


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -16.0)])
def test_float32_is_within_1e_5_of_float64(rows, width, scale, bias):
    inputs = *towers(rows, width, 1), logit_scale(scale), logit_bias(bias)
    assert max(errors(sigmoid_contrastive, reference.sigmoid_contrastive, *inputs)) < 1e-5


def test_float32_keeps_the_digits_of_small_terms():
    # One minus a sigmoid within 1e-8 of 1 would have no right digit; all losses here are e^-20 and less.
    inputs = torch.eye(64), torch.eye(64), logit_scale(45.0), logit_bias(-22.0)
    assert reference.sigmoid_contrastive(*(z.double() for z in inputs)) < 1e-6
    assert max(errors(sigmoid_contrastive, reference.sigmoid_contrastive, *inputs)) < 1e-5


def test_the_worst_pairs_do_not_overflow():
    x = unit_rows(6, 4, 3)
    y = x.flip(0)
    y[0] = -x[0]  # the positive opposite, a negative aligned
    for bias in (-200.0, 0.0, 200.0):
        inputs = x, y, logit_scale(100.0), logit_bias(bias)
        assert max(errors(sigmoid_contrastive, reference.sigmoid_contrastive, *inputs)) < 1e-5


def test_a_pair_alone_is_one_binary_classification():
    x = unit_rows(1, 5, 1)
    value, *_, bias_gradient = with_gradients(sigmoid_contrastive, x, x, logit_scale(3.0), logit_bias(-1.0))
    assert value.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    assert bias_gradient.item() == pytest.approx(-1 / (1 + math.exp(2)), rel=1e-6)


def test_orthogonal_towers_cost_the_bias_alone():
    x, y = torch.zeros(200, 32), torch.zeros(200, 32)
    x[:, :16], y[:, 16:] = unit_rows(200, 16, 1), unit_rows(200, 16, 2)
    value, _, _, scale_gradient, _ = with_gradients(sigmoid_contrastive, x, y, logit_scale(9.0), logit_bias(-4.0))
    assert value.item() == pytest.approx(math.log1p(math.exp(4)) + 199 * math.log1p(math.exp(-4)), rel=1e-6)
    assert scale_gradient.item() == 0


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 10), seed=st.integers(0, 999))
def test_symmetries(rows, seed):
    x, y = unit_rows(rows, 4, seed, torch.float64), unit_rows(rows, 4, seed + 1000, torch.float64)
    numbers = logit_scale(20.0, torch.float64), logit_bias(-5.0, torch.float64)
    order, turn = permutation(rows, seed), rotation(4, seed + 2000)
    right = sigmoid_contrastive(x, y, *numbers)
    for moved in ((y, x), (x[order], y[order]), (x @ turn, y @ turn)):
        torch.testing.assert_close(sigmoid_contrastive(*moved, *numbers), right)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 192, 249])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_reaches_the_value_and_the_gradient_of_its_row(value, row, which, dtype):
    inputs = [unit_rows(250, 20, 1, dtype), unit_rows(250, 20, 2, dtype)]
    inputs[which][row, 7] = value
    result = with_gradients(sigmoid_contrastive, *inputs, logit_scale(10.0, dtype), logit_bias(-5.0, dtype))
    assert not result[0].isfinite()
    assert not result[2 - which].isfinite().all()


def test_no_matrix_of_all_pairs_is_made():
    inputs = unit_rows(400, 8, 1), unit_rows(400, 8, 2), logit_scale(10.0), logit_bias(-5.0)
    with tiles_of(8 * 400), LargestTensor() as largest:
        sigmoid_contrastive(*(z.requires_grad_() for z in inputs)).backward()
    assert largest.elements == 400 * 8


def test_half_precision_layout_and_which_inputs_require_gradients_do_not_matter():
    inputs = unit_rows(40, 16, 1), unit_rows(40, 16, 2), logit_scale(30.0), logit_bias(-8.0)
    assert_half_precision_is_taken_to_float32(sigmoid_contrastive, *inputs)
    assert_layout_does_not_matter(lambda x, y: sigmoid_contrastive(x, y, *inputs[2:]), *inputs[:2])
    assert_each_input_alone_gets_its_gradient(sigmoid_contrastive, *inputs)
    assert torch.equal(without_gradient(sigmoid_contrastive, *inputs), sigmoid_contrastive(*inputs))


def test_operators_pass_opcheck():
    x, columns, affine = unit_rows(5, 4, 1), unit_rows(9, 4, 2), torch.tensor([9.0, -4.0])
    leaves = [z.clone().requires_grad_() for z in (x, columns, affine)]
    torch.library.opcheck(sigmoid_contrast, (*leaves, 3, "all", "float32"))
    torch.library.opcheck(sigmoid_contrast, (leaves[0], columns, affine, 3, "rows", "float32"))
    torch.library.opcheck(sigmoid_contrast, (x, columns, affine, 3, "none", "float32"))
    _, x_grad, column_grad, bias_grad = sigmoid_contrast(x, columns, affine, 3, "all", "float32")
    given = torch.tensor(0.7, dtype=torch.float64), x, columns, affine, x_grad, column_grad
    torch.library.opcheck(row_contrast_grad, (*given, bias_grad.float().reshape(1)))


def test_torch_compile_takes_the_whole_function():
    assert_compiles(sigmoid_contrastive, unit_rows(20, 8, 1), unit_rows(20, 8, 2), logit_scale(9.0), logit_bias(-4.0))


def test_a_second_derivative_is_refused():
    inputs = unit_rows(6, 3, 1), unit_rows(6, 3, 2), logit_scale(9.0), logit_bias(-4.0)
    assert_second_derivative_is_refused(sigmoid_contrastive, "row_contrast_grad", *inputs)


def test_gradients_that_were_not_made_are_refused():
    x, columns, affine = unit_rows(5, 4, 1), unit_rows(9, 4, 2), torch.tensor([9.0, -4.0], requires_grad=True)
    for columns_too, grads in ((False, "none"), (True, "rows")):
        total, *_ = sigmoid_contrast(x, columns.requires_grad_(columns_too), affine, 3, grads, "float32")
        with pytest.raises(ValueError, match="grads"):
            total.backward()


GOOD = {
    "x": torch.zeros(4, 3),
    "y": torch.zeros(4, 3),
    "logit_scale": torch.ones(1),
    "logit_bias": torch.zeros(1),
    "precision": "float32",
}
BAD_INPUT = [
    ({"y": torch.zeros(5, 3)}, "shape of y"),
    ({"x": torch.zeros(0, 3), "y": torch.zeros(0, 3)}, "shape of x"),
    ({"y": torch.zeros(4, 3, dtype=torch.float64)}, "dtype of y"),
    ({"y": torch.zeros(4, 3, device="meta")}, "device of y"),
    ({"logit_scale": torch.ones(2)}, "shape of logit_scale"),
    ({"logit_bias": torch.ones(2)}, "shape of logit_bias"),
    ({"logit_bias": torch.ones(1, dtype=torch.int64)}, "dtype of logit_bias"),
    ({"logit_bias": torch.ones(1, device="meta")}, "device of logit_bias"),
    ({"precision": "float16"}, "precision"),
]


@pytest.mark.parametrize(("bad", "name"), BAD_INPUT)
def test_bad_input_is_refused_by_name(bad, name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        sigmoid_contrastive(**(GOOD | bad))
