"""The plain torch kernels: agree with the compiled ones, work in the public functions, stay within a tile."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import reference
import torch
from comparison import (
    assert_half_precision_is_taken_to_float32,
    errors,
    logit_scale,
    random_rows,
    relative_error,
    tiles_of,
    towers,
    unit_rows,
    with_gradients,
)
from kernel_calls import NAMES, SHAPES, arguments, assert_agree, in_float64, results
from largest_tensor import LargestTensor
from torch.nn.functional import normalize

from modstruct.pairwise import (
    contrastive,
    cpu_kernels,
    gaussian_potential,
    geometric_consistency,
    info_nce,
    nearest_counts,
    soft_contrastive,
    torch_tiles,
)
from modstruct.pairwise.contrast import contrastive_grad, contrastive_statistics, row_contrast, sigmoid_contrast
from modstruct.pairwise.gaussian import potential_sum
from modstruct.pairwise.geometric import geometric_grad, geometric_products
from modstruct.pairwise.ranks import counted

OPERATORS = [
    *(contrastive_statistics, contrastive_grad, row_contrast, sigmoid_contrast),
    *(potential_sum, geometric_products, geometric_grad, counted),
]


@pytest.fixture
def torch_alone():
    """As on a device without kernels: the public functions compute in plain torch, float32 too."""
    with ExitStack() as disabled:
        for operator in OPERATORS:
            disabled.enter_context(operator.set_kernel_enabled("cpu", False))
        yield


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] < 1000])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
def test_agrees_with_the_kernels(name, shape, tile_rows):
    given = arguments(name, *shape)
    with tiles_of(tile_rows * shape[1]):
        found = results(torch_tiles, name, given)
    kernels = results(cpu_kernels, name, given)
    assert [(f.shape, f.dtype) for f in found] == [(k.shape, k.dtype) for k in kernels]
    assert_agree(name, found, tuple(k.double() if k.is_floating_point() else k for k in kernels))


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_tiles_changes_nothing_but_rounding(name):
    given = in_float64(arguments(name, 45, 130, 12, 30))
    whole = results(torch_tiles, name, given)
    for tile_rows in (1, 7, 45):
        with tiles_of(tile_rows * 130):
            for f, r in zip(results(torch_tiles, name, given), whole, strict=True):
                torch.testing.assert_close(f, r, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [0, 3, 8])
def test_the_first_positive_may_be_any_column(first):
    # The formula's positive of row j is column j: rolled columns put them there.
    x, x_momentum, y = (unit_rows(rows, 5, rows, torch.float64) for rows in (7, 8, 15))
    x_momentum, scale = x_momentum[:7], logit_scale(6.0, torch.float64)
    rolled = y.roll(-first, 0)
    with tiles_of(3 * 15):
        total, x_grad, column_grad = torch_tiles.row_contrast(x, x_momentum, y, scale, first, 0.3, "all", "float32")
        row_lse, column_lse, positive, _ = torch_tiles.contrastive_statistics(x, y, scale, first, "float32")
    right = reference.soft_contrastive(x, x_momentum, rolled, scale, 0.3)
    torch.testing.assert_close(total / 7, right)
    torch.testing.assert_close(right, reference.soft_contrastive(x, x_momentum, y, scale, 0.3, first))
    _, x_gradient, y_gradient, _ = with_gradients(
        lambda x, y, scale: reference.soft_contrastive(x, x_momentum, y.roll(-first, 0), scale, 0.0), x, y, scale
    )
    _, x_grad, column_grad = torch_tiles.row_contrast(x, None, y, scale, first, 0.0, "all", "float32")
    torch.testing.assert_close(x_grad * scale / 7, x_gradient)
    torch.testing.assert_close(column_grad * scale / 7, y_gradient)
    at_0 = torch_tiles.contrastive_statistics(x, rolled, scale, 0, "float32")[:3]
    for f, r in zip((row_lse, column_lse.roll(-first, 0), positive), at_0, strict=True):
        torch.testing.assert_close(f, r)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("geometric")])
def test_no_result_is_larger_than_a_tile(name):
    given = arguments(name, 256, 256, 8, 0)
    with tiles_of(16 * 256), LargestTensor() as largest:
        results(torch_tiles, name, given)
    assert largest.elements == 16 * 256  # above the inputs' 256 x 8


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("tile_rows", [7, 64])
def test_float32_keeps_its_digits_where_the_loss_is_1e_8(tile_rows):
    # As in test_contrast.py.
    center = unit_rows(1, 48, 5, torch.float64)
    x = normalize(1.5 * center + unit_rows(64, 48, 6, torch.float64)).float()
    inputs = x, x, logit_scale(100.0)
    with tiles_of(tile_rows * 64):
        assert max(errors(info_nce, reference.info_nce, *inputs)) < 1e-4
        for direction in (0, 1):
            function = lambda x, y, scale, d=direction: contrastive(x, y, scale)[d]  # noqa: E731
            printed = lambda x, y, scale, d=direction: reference.info_nce(*((x, y), (y, x))[d], scale)  # noqa: E731
            assert max(errors(function, printed, *inputs)) < 1e-4


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("tile_rows", [7, 100])
def test_the_public_functions_agree_with_their_formulas_in_float32(tile_rows):
    x, y = towers(90, 24, 1)
    momentum, queue, scale = unit_rows(90, 24, 3), unit_rows(11, 24, 4), logit_scale(20.0)
    columns = torch.cat((y, queue))
    with tiles_of(tile_rows * 90):
        assert max(errors(info_nce, reference.info_nce, x, y, scale)) < 1e-5
        both = [
            lambda x, y, scale: contrastive(x, y, scale)[1],
            lambda x, y, scale: reference.info_nce(y, x, scale),
        ]
        assert max(errors(*both, x, y, scale)) < 1e-5
        soft = [
            lambda x, scale, form=form: form(x, momentum.to(x.dtype), columns.to(x.dtype), scale, 0.4)
            for form in (soft_contrastive, reference.soft_contrastive)
        ]
        assert max(errors(*soft, x, scale)) < 1e-5
        potential = [lambda z, form=form: form(z, 2.0) for form in (gaussian_potential, reference.gaussian_potential)]
        assert max(errors(*potential, x)) < 1e-5
        close = x, x + 1e-3 * random_rows(90, 24, 5).float()
        assert max(errors(geometric_consistency, reference.geometric_consistency, *close)) < 1e-5


@pytest.mark.usefixtures("torch_alone")
def test_autocast_halves_no_product():
    x, y = towers(40, 24, 1)
    momentum, scale = unit_rows(40, 24, 3, torch.bfloat16), logit_scale(20.0)
    assert_half_precision_is_taken_to_float32(lambda x, y, scale: sum(contrastive(x, y, scale)), x, y, scale)
    assert_half_precision_is_taken_to_float32(info_nce, x, y, scale)
    assert_half_precision_is_taken_to_float32(lambda z: gaussian_potential(z, 2.0), x)
    assert_half_precision_is_taken_to_float32(geometric_consistency, x, y)
    assert_half_precision_is_taken_to_float32(
        lambda x, scale: soft_contrastive(x, momentum.to(x.dtype), momentum.to(x.dtype), scale, 0.4), x, scale
    )


@pytest.mark.parametrize("tile_rows", [2, 5])
def test_the_public_functions_pass_gradcheck(tile_rows):
    x, y = unit_rows(5, 3, 1, torch.float64), unit_rows(5, 3, 2, torch.float64)
    momentum, queue = unit_rows(5, 3, 3, torch.float64), unit_rows(4, 3, 4, torch.float64)
    scale = logit_scale(8.0, torch.float64)
    leaves = [z.clone().requires_grad_() for z in (x, y, scale)]
    with tiles_of(tile_rows * 5):
        assert torch.autograd.gradcheck(contrastive, leaves)
        assert torch.autograd.gradcheck(info_nce, leaves)
        assert torch.autograd.gradcheck(lambda z: gaussian_potential(z, 2.0), leaves[:1])
        assert torch.autograd.gradcheck(geometric_consistency, leaves[:2])
        columns = torch.cat((y, queue))
        assert torch.autograd.gradcheck(lambda x: soft_contrastive(x, momentum, columns, scale, 0.4), leaves[:1])


@pytest.mark.usefixtures("torch_alone")
def test_counts_in_tiles_are_those_of_the_kernels():
    queries, gallery, pair_query, pair_gallery, _ = arguments("nearest_counts", 45, 130, 12, 0)
    pairs = torch.stack((pair_query, pair_gallery), 1).flip(0)
    with tiles_of(7 * 130):
        found = nearest_counts(queries, gallery, pairs)
    for f, r in zip(found, reference.nearest_counts(queries.double(), gallery.double(), pairs), strict=True):
        assert torch.equal(f, r)


def test_float64_keeps_all_its_digits():
    x, y = (z.double() for z in towers(90, 24, 1))
    scale = logit_scale(20.0, torch.float64)
    assert relative_error(info_nce(x, y, scale), reference.info_nce(x, y, scale)) < 1e-13
    assert relative_error(gaussian_potential(x, 2.0), reference.gaussian_potential(x, 2.0)) < 1e-13
