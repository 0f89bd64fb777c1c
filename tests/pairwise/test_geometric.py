"""Geometric consistency in closed form: the printed sums over pairs, digits that stay, symmetries, memory."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import reference
import torch
from comparison import (
    assert_compiles,
    assert_each_input_alone_gets_its_gradient,
    assert_half_precision_is_taken_to_float32,
    assert_layout_does_not_matter,
    assert_second_derivative_is_refused,
    cone_rows,
    errors,
    permutation,
    random_rows,
    relative_error,
    rotation,
    threads,
    tiles_of,
    unit_rows,
    with_gradients,
    without_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from modstruct.pairwise import geometric, geometric_consistency, gram_asymmetry, gram_difference
from modstruct.pairwise.geometric import geometric_grad, geometric_products, gram_grad, gram_products

ALL = [
    (geometric_consistency, reference.geometric_consistency),
    (gram_difference, reference.gram_difference),
    (gram_asymmetry, reference.gram_asymmetry),
]
FUNCTIONS = [ours for ours, _ in ALL]
# Rows and dimension, all but the second in the closed form: single ones; below, at and above a block (192) and a vector
# (32), a part of the products (128) and the row blocks that are packed at once (8 x 192).
SIZES = [(1, 1), (1, 40), (4, 3), (192, 32), (193, 33), (300, 200), (420, 385), (1550, 65), (1600, 8)]


def unit64(rows: int, width: int, seed: int) -> torch.Tensor:
    return unit_rows(rows, width, seed, torch.float64)


@pytest.mark.parametrize(("ours", "printed"), ALL)
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 999))
def test_agrees_with_the_sum_over_pairs_in_value_and_gradients(ours, printed, rows, width, seed):
    inputs = unit64(rows, width, seed), unit64(rows, width, seed + 1000)
    with mock.patch.object(geometric, "FLOAT64_ROWS", 5), tiles_of(5 * width):
        found = with_gradients(ours, *inputs)
    for f, right in zip(found, with_gradients(printed, *inputs), strict=True):
        torch.testing.assert_close(f, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize(("ours", "printed"), ALL)
def test_float32_is_within_1e_6_of_float64(ours, printed, rows, width):
    inputs = unit_rows(rows, width, 1), unit_rows(rows, width, 2)
    if rows == 1:
        value, *gradients = with_gradients(ours, *inputs)  # all differences are 0 for unit rows, but for rounding
        assert value < 1e-9
        assert all(g.abs().max() < 1e-5 for g in gradients)
        return
    value_error, *gradient_errors = errors(ours, printed, *inputs)
    assert value_error < 1e-6
    assert max(gradient_errors) < 2e-6


@pytest.mark.parametrize("rows", [3, 7])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_gradient_of_the_value_itself(ours, rows):
    assert torch.autograd.gradcheck(ours, [unit64(rows, 4, seed).requires_grad_() for seed in (1, 2)])


@pytest.mark.parametrize("rows", [24, 96, 500])
@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize(("ours", "printed"), ALL)
def test_float32_keeps_its_digits_for_towers_that_nearly_agree(ours, printed, noise, rows):
    a = unit64(rows, 32, 1)
    b = a + noise * random_rows(rows, 32, 2)
    value_error, *gradient_errors = errors(ours, printed, a.float(), b.float())
    assert value_error < 2e-6
    assert max(gradient_errors) < 1e-5


@pytest.mark.parametrize("rows", [24, 96])
def test_gram_difference_keeps_its_digits_for_a_rotated_tower(rows):
    a = unit64(rows, 32, 1)
    b = a @ rotation(32, 3) + 1e-4 * random_rows(rows, 32, 2)
    assert max(errors(gram_difference, reference.gram_difference, a.float(), b.float())) < 1e-6


@pytest.mark.parametrize("rows", [24, 96])
def test_gram_asymmetry_keeps_its_digits_where_a_b_is_nearly_symmetric(rows):
    # b = a s with s symmetric makes a b^T symmetric, while the Gram matrices stay far apart.
    a, s = unit64(rows, 32, 1), random_rows(32, 32, 3)
    b = a @ (s + s.T) / 10 + 1e-4 * random_rows(rows, 32, 2)
    assert max(errors(gram_asymmetry, reference.gram_asymmetry, a.float(), b.float())) < 1e-6


def test_gradient_of_gram_difference_stays_right_where_the_value_is_rounding():
    a = unit64(96, 32, 1).float()
    b = (a.double() @ rotation(32, 3)).float()  # the Gram matrices differ by float32's rounding alone
    found = with_gradients(gram_difference, a, b)
    right = with_gradients(reference.gram_difference, a.double(), b.double())
    assert 0 <= found[0] < 1e-9
    assert all(relative_error(f, r) < 1e-4 for f, r in zip(found[1:], right[1:], strict=True))


def test_a_single_term_is_never_negative():
    for seed in range(10):
        a, s = unit64(96, 32, seed), random_rows(32, 32, seed + 200)
        assert 0 <= gram_difference(a, a @ rotation(32, seed + 100)) < 1e-9  # 0, but for rounding of either sign
        assert 0 <= gram_asymmetry(a, a @ (s + s.T)) < 1e-9


@pytest.mark.parametrize("rows", [4, 16, 250])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_identical_towers_give_exactly_zero(ours, rows):
    a = unit_rows(rows, 8, 1)
    value, *gradients = with_gradients(ours, a, a)
    assert value == 0
    assert value.shape == ()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("rows", [30, 250])
def test_orthogonal_towers_have_no_asymmetry(rows):
    # All inner products between the towers are 0; what is left are the two Gram matrices.
    a, b = torch.zeros(rows, 64), torch.zeros(rows, 64)
    a[:, :32], b[:, 32:] = unit_rows(rows, 32, 1), unit_rows(rows, 32, 2)
    assert gram_asymmetry(a, b) < 1e-6
    torch.testing.assert_close(geometric_consistency(a, b), gram_difference(a, b), rtol=1e-6, atol=0)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 12), seed=st.integers(0, 999))
def test_symmetries(rows, seed):
    a, b = unit64(rows, 6, seed), unit64(rows, 6, seed + 1000)
    order = permutation(rows, seed)
    q, r = rotation(6, seed + 2000), rotation(6, seed + 3000)
    for ours in FUNCTIONS:
        torch.testing.assert_close(ours(a, b), ours(b, a))
        torch.testing.assert_close(ours(a, b), ours(a[order], b[order]))
        torch.testing.assert_close(ours(a, b), ours(a @ q, b @ q))
    torch.testing.assert_close(gram_difference(a, b), gram_difference(a @ q, b @ r))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 220), width=st.integers(1, 30), scale=st.floats(0.1, 10), seed=st.integers(0, 999))
def test_both_terms_make_the_sum_and_grow_with_copies_and_lengths(rows, width, scale, seed):
    a, b = unit_rows(rows, width, seed), unit_rows(rows, width, seed + 1000)
    whole = geometric_consistency(a, b)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * rows}
    torch.testing.assert_close(gram_difference(a, b) + gram_asymmetry(a, b), whole, **tolerance)
    for ours in FUNCTIONS:
        twice = ours(torch.cat((a, a)), torch.cat((b, b)))  # four times the pairs
        torch.testing.assert_close(twice, 4 * ours(a, b), **tolerance)
        longer = ours(scale * a, scale * b) / scale**4
        torch.testing.assert_close(longer, ours(a, b), **tolerance)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [4, 16, 250])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_what_is_not_finite_reaches_the_result(ours, rows, value):
    inputs = [unit_rows(rows, 8, 1), unit_rows(rows, 8, 2)]
    inputs[1][2, 3] = value
    for which, (a, b) in ((1, inputs), (0, inputs[::-1])):
        result = with_gradients(ours, a, b)
        assert not result[0].isfinite()
        assert not result[1 + which][2].isfinite().all()
        assert value == math.inf or result[0].isnan()


@pytest.mark.parametrize(("rows", "limit"), [(256, 256 * 8), (8, 64 * 64)])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_no_matrix_of_all_pairs_is_made_unless_it_is_the_smaller(ours, rows, limit):
    width = 8 if rows == 256 else 64
    a, b = (unit_rows(rows, width, seed).requires_grad_() for seed in (1, 2))
    with LargestTensor() as largest:
        ours(a, b).backward()
    assert largest.elements <= limit


@pytest.mark.parametrize("rows", [4, 24])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_half_precision_is_computed_in_float32_even_under_autocast(ours, rows):
    # Of 4 rows all pairs are formed, by torch's own product, whose backward autocast would halve.
    inputs = unit_rows(rows, 8, 1), unit_rows(rows, 8, 2)
    assert_half_precision_is_taken_to_float32(ours, *inputs, backward_too=rows > 8)


@pytest.mark.parametrize("rows", [20, 200])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_layout_and_which_inputs_require_gradients_do_not_matter(ours, rows):
    inputs = unit_rows(rows, 33, 1), unit_rows(rows, 33, 2)
    assert_layout_does_not_matter(ours, *inputs)
    assert_each_input_alone_gets_its_gradient(ours, *inputs)
    assert torch.equal(without_gradient(ours, *inputs), ours(*inputs))


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.03])
@pytest.mark.parametrize(("ours", "printed"), ALL)
def test_float32_keeps_its_digits_in_narrow_cones(ours, printed, spread):
    """Each modality around its own direction, as untrained towers embed: the means' large parts must not cancel."""
    a = cone_rows(300, 64, 1, spread)
    b = cone_rows(300, 64, 2, spread) @ rotation(64, 3).float()
    found = with_gradients(ours, a, b)
    right = with_gradients(printed, a.double(), b.double())
    assert relative_error(found[0], right[0]) < 2e-6
    assert all(relative_error(f, r) < 1e-5 for f, r in zip(found[1:], right[1:], strict=True))


@pytest.mark.parametrize("ours", FUNCTIONS)
def test_one_and_two_threads_give_the_same_bits(ours):
    a, b = unit_rows(600, 300, 1), unit_rows(600, 300, 2)
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(with_gradients(ours, a, b))
    if ours is geometric_consistency:  # the others' products in float64 are a BLAS's
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(relative_error(one, two.double()) < 1e-6 for one, two in zip(*found, strict=True))


def test_operators_pass_opcheck():
    a, b = unit_rows(9, 4, 1), unit_rows(9, 4, 2)
    asking = a.clone().requires_grad_(), b.clone().requires_grad_()
    centers = torch.randn(3, 4)
    torch.library.opcheck(geometric_products, (*asking, centers, "float32"))
    torch.library.opcheck(geometric_grad, (a, b, centers, torch.randn(2, 4, 4), "float32"))
    torch.library.opcheck(gram_products, asking)
    torch.library.opcheck(gram_grad, (torch.randn(3, 4, 4, dtype=torch.float64), a, b))


@pytest.mark.parametrize("rows", [4, 24])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_torch_compile_takes_the_whole_function(ours, rows):
    assert_compiles(ours, unit_rows(rows, 8, 1), unit_rows(rows, 8, 2))


@pytest.mark.parametrize("ours", FUNCTIONS)
def test_a_second_derivative_is_refused(ours):
    operator = "geometric_grad" if ours is geometric_consistency else "gram_grad"
    assert_second_derivative_is_refused(ours, operator, unit_rows(9, 4, 1), unit_rows(9, 4, 2))


@pytest.mark.parametrize("ours", FUNCTIONS)
def test_a_second_derivative_is_right_where_all_pairs_are_formed(ours):
    assert torch.autograd.gradgradcheck(ours, [unit64(2, 3, seed).requires_grad_() for seed in (1, 2)])


GOOD = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
BAD_INPUT = [
    ({"b": torch.zeros(3, 3)}, "shape of b"),
    ({"b": torch.zeros(4, 2)}, "shape of b"),
    ({"a": torch.zeros(4), "b": torch.zeros(4)}, "shape of a"),
    ({"a": torch.zeros(0, 3), "b": torch.zeros(0, 3)}, "shape of a"),
    ({"a": torch.zeros(4, 0), "b": torch.zeros(4, 0)}, "shape of a"),
    ({"a": torch.zeros(4, 3, dtype=torch.int64), "b": torch.zeros(4, 3, dtype=torch.int64)}, "dtype of a"),
    ({"b": torch.zeros(4, 3, dtype=torch.complex64)}, "dtype of b"),
    ({"b": torch.zeros(4, 3, dtype=torch.float64)}, "dtype of b"),
    ({"b": torch.zeros(4, 3, device="meta")}, "device of b"),
]


@pytest.mark.parametrize(("bad", "name"), BAD_INPUT)
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_bad_input_is_refused_by_name(ours, bad, name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        ours(**(GOOD | bad))


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^precision = "):
        geometric_consistency(**GOOD, precision="float16")
