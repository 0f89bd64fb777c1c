"""One-sided contrast: InfoNCE and ALBEF's softened targets by their formulas, at high scales, with queues."""

from __future__ import annotations

import math

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

from modstruct.pairwise import info_nce, soft_contrastive
from modstruct.pairwise.contrast import row_contrast, row_contrast_grad


def drawn(rows: int, width: int, queue: int, seed: int = 1, dtype: torch.dtype = torch.float32):
    """x, its momentum rows and the columns, all near each other as a trained pair of encoders would have them."""
    x = unit_rows(rows, width, seed, torch.float64)
    x_momentum = normalize(x + 0.3 * unit_rows(rows, width, seed + 1000, torch.float64))
    pairs = normalize(x + 0.8 * unit_rows(rows, width, seed + 2000, torch.float64))
    columns = torch.cat((pairs, unit_rows(queue, width, seed + 3000, torch.float64)))
    return x.to(dtype), x_momentum.to(dtype), columns.to(dtype)


def softened(x_momentum, columns, alpha: float, form=soft_contrastive):
    """soft_contrastive of x and logit_scale, the inputs that get gradients, in the dtype of x."""
    return lambda x, scale: form(x, x_momentum.to(x.dtype), columns.to(x.dtype), scale, alpha)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 6),
    tile_rows=st.integers(1, 12),
    scale=st.floats(1, 100),
    seed=st.integers(0, 999),
)
def test_info_nce_agrees_with_the_formula_in_value_and_gradients(rows, width, tile_rows, scale, seed):
    inputs = (
        unit_rows(rows, width, seed, torch.float64),
        unit_rows(rows, width, seed + 1000, torch.float64),
        logit_scale(scale, torch.float64),
    )
    with tiles_of(tile_rows * rows):
        found = with_gradients(info_nce, *inputs)
    for f, right in zip(found, with_gradients(reference.info_nce, *inputs), strict=True):
        torch.testing.assert_close(f, right, rtol=1e-10, atol=1e-12)
        assert f.shape == right.shape


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    queue=st.integers(0, 9),
    tile_rows=st.integers(1, 12),
    alpha=st.floats(0, 1),
    scale=st.floats(1, 100),
    seed=st.integers(0, 999),
)
def test_soft_contrastive_agrees_with_albef_in_value_and_gradients(rows, queue, tile_rows, alpha, scale, seed):
    x, x_momentum, columns = drawn(rows, 5, queue, seed, torch.float64)
    inputs = x, logit_scale(scale, torch.float64)
    with tiles_of(tile_rows * len(columns)):
        found = with_gradients(softened(x_momentum, columns, alpha), *inputs)
    printed = with_gradients(softened(x_momentum, columns, alpha, reference.soft_contrastive), *inputs)
    for f, right in zip(found, printed, strict=True):
        torch.testing.assert_close(f, right, rtol=1e-9, atol=1e-11)
        assert f.shape == right.shape


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_float32_is_within_1e_5_of_float64(rows, width, scale):
    (x, y), x_momentum, queue = towers(rows, width, 1), unit_rows(rows, width, 2), unit_rows(77, width, 3)
    assert max(errors(info_nce, reference.info_nce, x, y, logit_scale(scale))) < 1e-5
    for columns in (y, torch.cat((y, queue))):
        ours, printed = (softened(x_momentum, columns, 0.4, f) for f in (soft_contrastive, reference.soft_contrastive))
        if width > 1:
            assert max(errors(ours, printed, x, logit_scale(scale))) < 1e-5
        else:  # momentum rows equal the rows, or equal columns share the probability: gradients cancel to nothing
            found, right = (with_gradients(f, x, logit_scale(scale)) for f in (ours, printed))
            for f, r in zip(found, right, strict=True):
                torch.testing.assert_close(f, r, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("rows", [64, 250])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_float32_keeps_its_digits_where_the_loss_is_1e_8(rows, alpha):
    # All rows lie near one direction, so that negatives have cosines up to 0.8, and every positive has 1: at scale 100
    # a loss about e^-20. One minus the probability of the positive, formed in float32, would have no right digit.
    center = unit_rows(1, 48, 5, torch.float64)
    x = normalize(1.5 * center + unit_rows(rows, 48, 6, torch.float64)).float()
    scale = logit_scale(100.0)
    assert 1e-9 < reference.info_nce(x.double(), x.double(), scale.double()) < 1e-6
    assert max(errors(info_nce, reference.info_nce, x, x, scale)) < 1e-4
    if alpha:  # momentum rows a little off: targets within 1e-7 of one-hot are softened no less exactly
        x_momentum = normalize(x + 0.01 * unit_rows(rows, 48, 7))
        functions = [softened(x_momentum, x, alpha, f) for f in (soft_contrastive, reference.soft_contrastive)]
        assert max(errors(*functions, x, scale)) < 1e-4


def test_scale_100_does_not_overflow():
    x = unit_rows(6, 4, 3)
    y = x.flip(0)
    y[0] = -x[0]  # the worst case: the positive opposite, a negative aligned
    assert max(errors(info_nce, reference.info_nce, x, y, logit_scale(100.0))) < 1e-5
    for alpha in (0.4, 1.0):
        functions = [softened(-x, y, alpha, form) for form in (soft_contrastive, reference.soft_contrastive)]
        assert max(errors(*functions, x, logit_scale(100.0))) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 300),
    queue=st.integers(0, 300),
    width=st.integers(1, 40),
    scale=st.floats(0.1, 100),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_float32_stays_finite_and_near_float64_at_any_scale(rows, queue, width, scale, alpha, seed):
    x, x_momentum, columns = drawn(rows, width, queue, seed)
    ours, printed = (softened(x_momentum, columns, alpha, f) for f in (soft_contrastive, reference.soft_contrastive))
    assert all(z.isfinite().all() for z in with_gradients(ours, x, logit_scale(scale)))
    # Relative to the logits too: a loss may be far smaller than the terms of alpha it is the sum of.
    value, right = ours(x, logit_scale(scale)).double(), printed(x.double(), logit_scale(scale).double())
    assert (value - right).abs() < 1e-5 * right.abs() + 1e-6 * scale * alpha + 1e-7


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 10), queue=st.integers(0, 9), seed=st.integers(0, 999))
def test_symmetries(rows, queue, seed):
    x, x_momentum, columns = drawn(rows, 4, queue, seed, torch.float64)
    scale = logit_scale(20.0, torch.float64)
    order, turn = permutation(rows, seed), rotation(4, seed + 2000)
    queue_order = rows + permutation(queue, seed)
    right = soft_contrastive(x, x_momentum, columns, scale, 0.4)
    moved = columns[torch.cat((order, queue_order))]
    torch.testing.assert_close(soft_contrastive(x[order], x_momentum[order], moved, scale, 0.4), right)
    torch.testing.assert_close(soft_contrastive(x @ turn, x_momentum @ turn, columns @ turn, scale, 0.4), right)
    y = columns[:rows]
    right = info_nce(x, y, scale)
    torch.testing.assert_close(info_nce(x[order], y[order], scale), right)
    torch.testing.assert_close(info_nce(x @ turn, y @ turn, scale), right)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 120), scale=st.floats(1, 30), seed=st.integers(0, 999))
def test_a_batch_twice_over_costs_log_2_more(rows, scale, seed):
    x, y, scale = unit_rows(rows, 16, seed), unit_rows(rows, 16, seed + 1000), logit_scale(scale)
    twice = info_nce(torch.cat((x, x)), torch.cat((y, y)), scale)
    torch.testing.assert_close(twice, info_nce(x, y, scale) + math.log(2), rtol=1e-5, atol=1e-5)
    one_more = torch.cat((x, x[:1])), torch.cat((y, y[:1])), scale
    assert max(errors(info_nce, reference.info_nce, *one_more)) < 1e-5


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 60), queue=st.integers(0, 60), scale=st.floats(1, 30), seed=st.integers(0, 999))
def test_columns_twice_over_cost_log_2_more_where_the_targets_are_the_momentum_softmax(rows, queue, scale, seed):
    # With alpha 1 a column's copy takes half of its target, and every probability halves.
    x, x_momentum, columns = drawn(rows, 16, queue, seed)
    once = soft_contrastive(x, x_momentum, columns, logit_scale(scale), 1.0)
    twice = soft_contrastive(x, x_momentum, torch.cat((columns, columns)), logit_scale(scale), 1.0)
    torch.testing.assert_close(twice, once + math.log(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queue", [0, 1, 45, 501])
def test_alpha_0_is_info_nce_over_all_columns(queue):
    x, x_momentum, columns = drawn(210, 24, queue)
    inputs = x, logit_scale(15.0)
    ours = softened(x_momentum, columns, 0.0)
    assert max(errors(ours, softened(x_momentum, columns, 0.0, reference.soft_contrastive), *inputs)) < 1e-5
    # The momentum rows are not read: NaN in them does not reach the result.
    assert torch.equal(ours(*inputs), softened(x_momentum * math.nan, columns, 0.0)(*inputs))
    if queue == 0:
        value, x_gradient, _, scale_gradient = with_gradients(info_nce, x, columns, inputs[1])
        for f, r in zip(with_gradients(ours, *inputs), (value, x_gradient, scale_gradient), strict=True):
            assert torch.equal(f, r)


@pytest.mark.parametrize("queue", [0, 1, 45, 501])
def test_alpha_1_has_no_one_hot_part(queue):
    x, x_momentum, columns = drawn(210, 24, queue)
    inputs = x, logit_scale(15.0)
    printed = softened(x_momentum, columns, 1.0, reference.soft_contrastive)
    assert max(errors(softened(x_momentum, columns, 1.0), printed, *inputs)) < 1e-5
    # Then the place of the pairs among the columns does not matter either.
    reordered = softened(x_momentum, columns[permutation(len(columns), 3)], 1.0)
    torch.testing.assert_close(reordered(*inputs), softened(x_momentum, columns, 1.0)(*inputs))


def test_momentum_rows_equal_to_the_rows_have_no_gradient_at_alpha_1():
    # The cross entropy against its own distribution is at its minimum.
    x, _, columns = drawn(210, 24, 33)
    _, gradient, _ = with_gradients(softened(x, columns, 1.0), x, logit_scale(15.0))
    _, usual, _ = with_gradients(softened(x, columns, 0.0), x, logit_scale(15.0))
    assert gradient.norm() < 1e-5 * usual.norm()


def test_the_value_is_linear_in_alpha():
    x, x_momentum, columns = drawn(100, 24, 33)
    at = {alpha: softened(x_momentum, columns, alpha)(x, logit_scale(15.0)) for alpha in (0.0, 0.25, 1.0)}
    torch.testing.assert_close(at[0.25], 0.75 * at[0.0] + 0.25 * at[1.0], rtol=1e-5, atol=0)


def test_orthogonal_towers_cost_the_logarithm_of_the_columns_for_any_targets():
    x, columns = torch.zeros(200, 32), torch.zeros(231, 32)
    x[:, :16], columns[:, 16:] = unit_rows(200, 16, 1), unit_rows(231, 16, 2)
    for alpha in (0.0, 0.4, 1.0):
        value, _, scale_gradient = with_gradients(softened(columns[:200], columns, alpha), x, logit_scale(50.0))
        assert value.item() == pytest.approx(math.log(231), rel=1e-6)
        assert scale_gradient.item() == pytest.approx(0, abs=1e-6)


def test_a_pair_alone_costs_nothing_and_has_no_gradient():
    x, x_momentum, columns = drawn(1, 5, 0)
    for function in (softened(x_momentum, columns, 0.4), lambda x, scale: info_nce(x, columns, scale)):
        value, *gradients = with_gradients(function, x, logit_scale(100.0))
        assert value == 0
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("tile_rows", [2, 8])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_a_row_reaches_the_result(which, tile_rows, dtype):
    inputs = [unit_rows(8, 4, 1, dtype), unit_rows(8, 4, 2, dtype)]
    inputs[which][5, 2] = torch.nan
    with tiles_of(tile_rows * 8):
        assert info_nce(*inputs, logit_scale(10.0)).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 192, 249])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_reaches_the_value_and_the_gradient_of_its_row(value, row, which):
    inputs = [unit_rows(250, 20, 1), unit_rows(250, 20, 2)]
    inputs[which][row, 7] = value
    result = with_gradients(info_nce, *inputs, logit_scale(10.0))
    assert not result[0].isfinite()
    assert not result[1 + which][row].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 192, 249])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_reaches_softened_contrast(value, row, which, dtype):
    tensors = drawn(250, 20, 31, dtype=dtype)
    tensors[which][row, 7] = value
    x, x_momentum, columns = tensors
    loss, gradient, _ = with_gradients(softened(x_momentum, columns, 0.4), x, logit_scale(10.0, dtype))
    assert not loss.isfinite()
    assert not gradient[row].isfinite().all()


def test_no_matrix_of_all_pairs_is_made():
    x, y = (unit_rows(400, 8, seed).requires_grad_() for seed in (1, 2))
    scale = logit_scale(10.0).requires_grad_()
    with LargestTensor() as largest:
        (info_nce(x, y, scale) + soft_contrastive(x, x.detach(), y.detach(), scale, 0.4)).backward()
    assert largest.elements == 400 * 8


def test_half_precision_is_computed_in_float32_even_under_autocast():
    x, x_momentum, columns = (z.bfloat16() for z in drawn(40, 16, 9))
    assert_half_precision_is_taken_to_float32(info_nce, x, columns[:40], logit_scale(30.0))
    assert_half_precision_is_taken_to_float32(softened(x_momentum, columns, 0.4), x, logit_scale(30.0))


def test_layout_does_not_matter():
    x, x_momentum, columns = drawn(200, 33, 9)
    scale = logit_scale(10.0)
    assert_layout_does_not_matter(lambda x, y: info_nce(x, y, scale), x, columns[:200])
    assert_layout_does_not_matter(lambda x: soft_contrastive(x, x_momentum, columns, scale, 0.4), x)
    transposed = [z.T.contiguous().T for z in (x_momentum, columns)]
    right = soft_contrastive(x, x_momentum, columns, scale, 0.4)
    assert torch.equal(soft_contrastive(x, *transposed, scale, 0.4), right)


def test_each_input_alone_gets_its_gradient():
    x, x_momentum, columns = drawn(30, 8, 9)
    assert_each_input_alone_gets_its_gradient(info_nce, x, columns[:30], logit_scale(9.0))
    assert_each_input_alone_gets_its_gradient(softened(x_momentum, columns, 0.4), x, logit_scale(9.0))


@pytest.mark.parametrize(("with_momentum", "with_columns"), [(False, True), (True, False), (True, True)])
def test_operators_pass_opcheck(with_momentum, with_columns):
    x, x_momentum, columns = drawn(5, 4, 6)
    momentum, alpha, scale = (x_momentum if with_momentum else None), 0.4 * with_momentum, logit_scale(9.0)
    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_(), columns.clone().requires_grad_(with_columns)
    rest = (3, alpha, "all" if with_columns else "rows", "float32")
    torch.library.opcheck(row_contrast, (leaves[0], momentum, leaves[2], leaves[1], *rest))
    _, x_grad, column_grad = row_contrast(x, momentum, columns, scale, *rest)
    torch.library.opcheck(
        row_contrast_grad, (torch.tensor(0.7), x, columns, scale, x_grad, column_grad, x.new_empty(0))
    )


def test_torch_compile_takes_the_whole_function():
    x, x_momentum, columns = drawn(20, 8, 9)
    assert_compiles(info_nce, x, columns[:20], logit_scale(9.0))
    assert_compiles(softened(x_momentum, columns, 0.4), x, logit_scale(9.0), other_sizes=False)


def test_a_second_derivative_is_refused():
    x, x_momentum, columns = drawn(6, 3, 5)
    assert_second_derivative_is_refused(info_nce, "row_contrast_grad", x, columns[:6], logit_scale(9.0))
    softer = softened(x_momentum, columns, 0.4)
    assert_second_derivative_is_refused(softer, "row_contrast_grad", x, logit_scale(9.0))


def test_no_gradient_is_made_where_none_is_wanted():
    x, x_momentum, columns = drawn(20, 8, 9)
    scale = logit_scale(9.0)
    softer = softened(x_momentum, columns, 0.4)
    for function, inputs in ((info_nce, (x, columns[:20], scale)), (softer, (x, scale))):
        with OperatorCalls() as calls:
            assert torch.equal(without_gradient(function, *inputs), function(*inputs))
            function(inputs[0].clone().requires_grad_(), *inputs[1:])
        assert [arguments[6] for _, arguments in calls.seen] == ["none", "none", "rows"]
    x.requires_grad_()
    total, x_grad, column_grad = row_contrast(x, x_momentum, columns, scale, 0, 0.4, "none", "float32")
    assert x_grad.shape == column_grad.shape == (0, 8)
    with pytest.raises(ValueError, match="grads = 'none'"):
        total.backward()
    total = row_contrast(x, None, columns.requires_grad_(), scale, 0, 0.0, "rows", "float32")[0]
    with pytest.raises(ValueError, match="grads = 'rows': must be 'all'"):
        total.backward()


GOOD = {
    "x": torch.zeros(4, 3),
    "x_momentum": torch.zeros(4, 3),
    "columns": torch.zeros(6, 3),
    "logit_scale": torch.ones(1),
    "alpha": 0.4,
    "precision": "float32",
}
BAD_INPUT = [
    ({"x_momentum": torch.zeros(5, 3)}, "shape of x_momentum"),
    ({"columns": torch.zeros(6, 2)}, "width of columns"),
    ({"columns": torch.zeros(6)}, "shape of columns"),
    ({"columns": torch.zeros(3, 3)}, "rows of columns"),
    ({"x": torch.zeros(0, 3), "x_momentum": torch.zeros(0, 3)}, "shape of x"),
    ({"x": torch.zeros(4), "x_momentum": torch.zeros(4)}, "shape of x"),
    ({"x": torch.zeros(4, 3, dtype=torch.int64), "x_momentum": torch.zeros(4, 3)}, "dtype of x"),
    ({"x": torch.zeros(4, 3, dtype=torch.complex64), "x_momentum": torch.zeros(4, 3)}, "dtype of x"),
    ({"x_momentum": torch.zeros(4, 3, dtype=torch.float64)}, "dtype of x_momentum"),
    ({"columns": torch.zeros(6, 3, dtype=torch.bfloat16)}, "dtype of columns"),
    ({"columns": torch.zeros(6, 3, dtype=torch.int64)}, "dtype of columns"),
    ({"x_momentum": torch.zeros(4, 3, device="meta")}, "device of x_momentum"),
    ({"columns": torch.zeros(6, 3, device="meta")}, "device of columns"),
    ({"logit_scale": torch.ones(2)}, "shape of logit_scale"),
    ({"logit_scale": torch.ones(1, dtype=torch.int64)}, "dtype of logit_scale"),
    ({"alpha": -0.1}, "alpha"),
    ({"alpha": 1.1}, "alpha"),
    ({"alpha": math.nan}, "alpha"),
    ({"precision": "fp8"}, "precision"),
    ({"columns": torch.zeros(6, 3, requires_grad=True)}, "columns.requires_grad"),
    ({"x_momentum": torch.zeros(4, 3, requires_grad=True)}, "x_momentum.requires_grad"),
]


@pytest.mark.parametrize(("bad", "name"), BAD_INPUT)
def test_bad_input_is_refused_by_name(bad, name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        soft_contrastive(**(GOOD | bad))


def test_constants_that_ask_for_a_gradient_are_taken_where_none_is_made():
    x, x_momentum, columns = drawn(4, 3, 2)
    with torch.no_grad():
        asking = x_momentum.clone().requires_grad_(), columns.clone().requires_grad_()
        soft_contrastive(x, *asking, logit_scale(5.0), 0.4)
