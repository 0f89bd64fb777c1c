"""Geometric consistency in closed form: the printed sums over pairs, digits that stay, symmetries, memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.nn.functional import normalize

from modstruct.pairwise import geometric, reference
from modstruct.pairwise.geometric import geometric_consistency, gram_difference

BOTH = [
    (geometric_consistency, reference.geometric_consistency),
    (gram_difference, reference.gram_difference),
]
FUNCTIONS = [ours for ours, _ in BOTH]


def random_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    return normalize(random_rows(rows, width, seed))


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random_rows(width, width, seed)).Q


def with_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize(("ours", "printed"), BOTH)
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 999))
def test_agrees_with_the_sum_over_pairs_in_value_and_gradients(ours, printed, rows, width, seed):
    inputs = unit_rows(rows, width, seed), unit_rows(rows, width, seed + 1000)
    with mock.patch.object(geometric, "BLOCK_ROWS", 5):
        found = with_gradients(ours, *inputs)
    for f, right in zip(found, with_gradients(printed, *inputs), strict=True):
        torch.testing.assert_close(f, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 7])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_gradient_of_the_value_itself(ours, rows):
    assert torch.autograd.gradcheck(ours, [unit_rows(rows, 4, seed).requires_grad_() for seed in (1, 2)])


@pytest.mark.parametrize("rows", [24, 96])
@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize(("ours", "printed"), BOTH)
def test_float32_keeps_its_digits_for_towers_that_nearly_agree(ours, printed, noise, rows):
    a = unit_rows(rows, 32, 1)
    b = a + noise * random_rows(rows, 32, 2)
    found = with_gradients(ours, a.float(), b.float())
    right = with_gradients(printed, a.float().double(), b.float().double())
    assert relative_error(found[0], right[0]) < 2e-6
    assert all(relative_error(f, r) < 1e-5 for f, r in zip(found[1:], right[1:], strict=True))


@pytest.mark.parametrize("rows", [24, 96])
def test_gram_difference_keeps_its_digits_for_a_rotated_tower(rows):
    a = unit_rows(rows, 32, 1)
    b = a @ rotation(32, 3) + 1e-4 * random_rows(rows, 32, 2)
    found = with_gradients(gram_difference, a.float(), b.float())
    right = with_gradients(reference.gram_difference, a.float().double(), b.float().double())
    assert all(relative_error(f, r) < 1e-6 for f, r in zip(found, right, strict=True))


def test_gradient_of_gram_difference_stays_right_where_the_value_is_rounding():
    a = unit_rows(96, 32, 1).float()
    b = (a.double() @ rotation(32, 3)).float()  # the Gram matrices differ by float32's rounding alone
    found = with_gradients(gram_difference, a, b)
    right = with_gradients(reference.gram_difference, a.double(), b.double())
    assert 0 <= found[0] < 1e-9
    assert all(relative_error(f, r) < 1e-4 for f, r in zip(found[1:], right[1:], strict=True))


def test_gram_difference_is_never_negative():
    for seed in range(10):
        a = unit_rows(96, 32, seed)
        value = gram_difference(a, a @ rotation(32, seed + 100))  # 0, but for rounding of either sign
        assert 0 <= value < 1e-9


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_identical_towers_give_exactly_zero(ours, rows):
    a = unit_rows(rows, 8, 1).float()
    value, *gradients = with_gradients(ours, a, a)
    assert value == 0
    assert value.shape == ()
    assert all((g == 0).all() for g in gradients)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 12), seed=st.integers(0, 999))
def test_symmetries(rows, seed):
    a, b = unit_rows(rows, 6, seed), unit_rows(rows, 6, seed + 1000)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    q, r = rotation(6, seed + 2000), rotation(6, seed + 3000)
    for ours in FUNCTIONS:
        torch.testing.assert_close(ours(a, b), ours(b, a))
        torch.testing.assert_close(ours(a, b), ours(a[order], b[order]))
        torch.testing.assert_close(ours(a, b), ours(a @ q, b @ q))
    torch.testing.assert_close(gram_difference(a, b), gram_difference(a @ q, b @ r))


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_nan_in_a_row_reaches_the_result(ours, rows):
    a, b = unit_rows(rows, 8, 1).float(), unit_rows(rows, 8, 2).float()
    b[2, 3] = torch.nan
    assert ours(a, b).isnan()
    assert ours(b, a).isnan()


@pytest.mark.parametrize(("rows", "limit"), [(256, 256 * 8), (8, 64 * 64)])
@pytest.mark.parametrize("ours", FUNCTIONS)
def test_no_matrix_of_all_pairs_is_made_unless_it_is_the_smaller(ours, rows, limit):
    width = 8 if rows == 256 else 64
    a, b = (unit_rows(rows, width, seed).float().requires_grad_() for seed in (1, 2))
    with LargestTensor() as largest:
        ours(a, b).backward()
    assert largest.elements <= limit


def test_half_precision_is_computed_in_float32_even_under_autocast():
    a, b = unit_rows(24, 8, 1).bfloat16(), unit_rows(24, 8, 2).bfloat16()
    for ours in FUNCTIONS:
        for part in (slice(0, 24), slice(0, 4)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = ours(a[part], b[part])
            assert value.dtype == torch.float32
            assert torch.equal(value, ours(a[part].float(), b[part].float()))


def test_shapes_that_do_not_fit_are_refused():
    for ours in FUNCTIONS:
        with pytest.raises(ValueError, match="a and b"):
            ours(torch.zeros(4, 3), torch.zeros(3, 3))
