"""Gaussian potential over all pairs: values and gradients against float64, symmetries, ops, bad input, processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on_processes
from torch import Tensor

from modstruct import distributed
from modstruct.pairwise import gaussian_potential as potential
from modstruct.pairwise import reference
from modstruct.pairwise.extension import gaussian_potential_sums_cpu, load_extension

INSTRUCTION_SETS = load_extension().features()["cpu_here"]
# One row, one dimension, tiles not filled (a tile has 96 rows, 144 columns, 256 dimensions at a time), several tiles.
SIZES = [(1, 1), (1, 40), (2, 1), (7, 3), (96, 32), (97, 33), (145, 257), (300, 70), (450, 8), (20, 2048)]


def unit_rows(count: int, dimension: int, seed: int = 0, spread: float | None = None) -> Tensor:
    """(count, dimension), unit norm, float32; with `spread`, in a cone: noise of that length around one direction."""
    z = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    if spread is not None:
        z = spread * z / dimension**0.5
        z[:, 0] += 1
    return torch.nn.functional.normalize(z, dim=1)


def value_and_gradient(function, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = function(z, t)
    return value.detach(), torch.autograd.grad(value, z)[0]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def pair_sums(rows: Tensor, columns: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Row sums and pull in float64, as the formulas are written."""
    rows, columns = rows.double(), columns.double()
    differences = columns[None] - rows[:, None]  # (n, N, D)
    potentials = torch.exp(-t * differences.square().sum(2))
    return potentials.sum(1), (potentials[..., None] * differences).sum(1)


@pytest.mark.parametrize(("count", "dimension"), SIZES)
@pytest.mark.parametrize("spread", [None, 0.01])
def test_value_and_gradient_agree_with_float64(count, dimension, spread):
    z = unit_rows(count, dimension, spread=spread)
    value, gradient = value_and_gradient(potential.gaussian_potential_sum, z, 2.0)
    expected, expected_gradient = value_and_gradient(reference.gaussian_potential_sum, z.double(), 2.0)
    assert value.dtype == torch.float32
    assert relative_error(value, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 5e-6


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("row_count", "column_count", "dimension"), [(1, 300, 5), (130, 1, 40), (101, 290, 130)])
def test_every_instruction_set_serves_unequal_rows_and_columns(instruction_set, row_count, column_count, dimension):
    rows, columns = unit_rows(row_count, dimension, seed=1), unit_rows(column_count, dimension, seed=2)
    sums, pull = gaussian_potential_sums_cpu(rows, columns, 1.5, True, instruction_set)
    expected_sums, expected_pull = pair_sums(rows, columns, 1.5)
    assert relative_error(sums, expected_sums) < 1e-6
    assert relative_error(pull, expected_pull) < 5e-6
    assert torch.equal(sums, gaussian_potential_sums_cpu(rows, columns, 1.5, False, instruction_set)[0])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dimension", [2, 37, 600])
def test_a_vector_is_at_distance_zero_from_itself(instruction_set, dimension):
    z = 30 * torch.randn(200, dimension, generator=torch.Generator().manual_seed(3))
    sums, _ = gaussian_potential_sums_cpu(z, z, 1e30, False, instruction_set)
    assert torch.equal(sums, torch.ones(200))  # all others are so far that nothing but the own term is left


def test_the_logarithm_of_the_mean_and_its_bounds():
    z = unit_rows(50, 16)
    value, gradient = value_and_gradient(potential.gaussian_potential, z, 2.0)
    expected, expected_gradient = value_and_gradient(
        lambda z, t: torch.log(reference.gaussian_potential_sum(z, t) / 50**2), z.double(), 2.0
    )
    assert relative_error(value, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 5e-6
    assert potential.gaussian_potential(z[:1].expand(20, -1), 2.0).item() == pytest.approx(0, abs=1e-6)  # all equal
    assert -math.log(50) <= value.item() <= 0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 120),
    dimension=st.integers(1, 60),
    t=st.floats(0.05, 8),
    shift=st.floats(-2, 2),
)
def test_permutation_rotation_and_shift_change_nothing(seed, count, dimension, t, shift):
    generator = torch.Generator().manual_seed(seed)
    z = unit_rows(count, dimension, seed=seed)
    order = torch.randperm(count, generator=generator)
    rotation = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator))[0]
    value, gradient = value_and_gradient(potential.gaussian_potential_sum, z, t)
    moved, moved_gradient = value_and_gradient(potential.gaussian_potential_sum, z[order] @ rotation + shift, t)
    assert moved.item() == pytest.approx(value.item(), rel=2e-5)
    size = max(gradient.norm().item(), t * count)  # of the pulls before they cancel
    assert (moved_gradient - gradient[order] @ rotation).norm().item() < 2e-5 * size
    assert moved_gradient.sum(0).norm().item() < 2e-5 * size  # a common shift moves no distance


def test_one_and_two_threads_give_the_same_bits():
    z, threads = unit_rows(333, 70), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gaussian_potential_sums_cpu(z, z, 2.0, True))
    finally:
        torch.set_num_threads(threads)
    for sums, pull in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(pull, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_to_float32(dtype):
    z = unit_rows(40, 24).to(dtype)
    value, gradient = value_and_gradient(potential.gaussian_potential_sum, z, 2.0)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(value, potential.gaussian_potential_sum(z.float(), 2.0))


@pytest.mark.parametrize(("row_tile", "column_tile"), [(1024, 4096), (16, 7)])
def test_plain_torch_form_agrees_with_the_kernel_and_with_autograd(monkeypatch, row_tile, column_tile):
    monkeypatch.setattr(potential, "TILE_ROWS", row_tile)
    monkeypatch.setattr(potential, "TILE_COLUMNS", column_tile)
    rows, columns = unit_rows(33, 12, seed=1), unit_rows(50, 12, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = potential.gaussian_potential_sums_torch(rows, columns, 2.0, True)
    for value, expected in zip(plain, gaussian_potential_sums_cpu(rows, columns, 2.0, True), strict=True):
        assert relative_error(value, expected.double()) < 2e-6
    z = unit_rows(9, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: potential.gaussian_potential_sum(z, 2.0), z)


def test_ops_pass_opcheck():
    rows, columns, t = unit_rows(20, 8, seed=1), unit_rows(30, 8, seed=2), 2.0
    torch.library.opcheck(potential.gaussian_potential_sums, (rows.clone().requires_grad_(), columns, t, True))
    torch.library.opcheck(potential.gaussian_potential_sums, (rows, columns, t, False))
    torch.library.opcheck(potential.gaussian_potential_sums_backward, (torch.randn(20), rows, rows.clone(), t))


def test_torch_compile_takes_the_whole_function():
    def uniformity(z: Tensor, t: float) -> Tensor:
        return potential.gaussian_potential(torch.nn.functional.normalize(z, dim=1), t)

    z = 3 * unit_rows(40, 8)
    compiled = value_and_gradient(torch.compile(uniformity, fullgraph=True, backend="aot_eager"), z, 2.0)
    for value, expected in zip(compiled, value_and_gradient(uniformity, z, 2.0), strict=True):
        torch.testing.assert_close(value, expected)


def test_a_second_derivative_is_refused():
    z = unit_rows(5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(potential.gaussian_potential_sum(z, 2.0), z, create_graph=True)
    with pytest.raises(RuntimeError, match="gaussian_potential_sums_backward"):
        gradient.sum().backward()


def test_no_gradient_no_pull():
    z = unit_rows(5, 3).requires_grad_()
    with torch.no_grad():
        value = potential.gaussian_potential_sum(z, 2.0)
    assert not value.requires_grad
    sums, _ = potential.gaussian_potential_sums(z, z.detach(), 2.0, False)
    with pytest.raises(ValueError, match="with_pull"):
        sums.sum().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 100, 149])
def test_what_is_not_finite_reaches_the_result(value, row):
    z = unit_rows(150, 20)
    z[row, 7] = value
    total, gradient = value_and_gradient(potential.gaussian_potential_sum, z, 2.0)
    assert total.isnan()
    assert gradient[row].isnan().any()


@pytest.mark.parametrize("t", [1e-30, 1e4, 1e30])
def test_extreme_t_stays_finite(t):
    z = 100 * unit_rows(150, 20)
    value, gradient = value_and_gradient(potential.gaussian_potential_sum, z, t)
    assert value.item() == pytest.approx(150**2 if t < 1 else 150)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("z", "t", "name"),
    [
        (torch.zeros(0, 4), 2.0, "z"),
        (torch.zeros(4, 0), 2.0, "z"),
        (torch.zeros(4), 2.0, "z"),
        (torch.zeros(2, 3, 4), 2.0, "z"),
        (torch.zeros(4, 4, dtype=torch.int64), 2.0, "z"),
        (torch.zeros(4, 4, dtype=torch.complex64), 2.0, "z"),
        (torch.zeros(4, 4), 0.0, "t"),
        (torch.zeros(4, 4), -1.0, "t"),
        (torch.zeros(4, 4), math.inf, "t"),
        (torch.zeros(4, 4), math.nan, "t"),
    ],
)
def test_bad_input_is_refused_by_name(z, t, name):
    for function in (potential.gaussian_potential_sum, potential.gaussian_potential):
        with pytest.raises(ValueError, match=f"^{name} = "):
            function(z, t)


def share_of_global_batch(z: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """On one of several processes: value, logarithm, and the gradient of both of its own rows of z."""
    count = len(z) // distributed.world_size()
    own = z[distributed.rank() * count :][:count].clone().requires_grad_()
    total, logarithm = potential.gaussian_potential_sum(own, t), potential.gaussian_potential(own, t)
    (total + logarithm).backward()
    return total.detach(), logarithm.detach(), own.grad


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_agree_with_one(world_size):
    z = unit_rows(120, 24)
    one_total, one_logarithm, one_gradient = share_of_global_batch(z, 2.0)
    results = run_on_processes(share_of_global_batch, world_size, z, 2.0)
    for total, logarithm, _ in results:
        assert torch.equal(total, results[0][0])
        torch.testing.assert_close(total, one_total, rtol=1e-6, atol=0)
        torch.testing.assert_close(logarithm, one_logarithm, rtol=1e-6, atol=0)
    # DeepSpeed averages over the processes, and each row belongs to one process only.
    gradient = torch.cat([share for _, _, share in results]) / world_size
    torch.testing.assert_close(gradient, one_gradient, rtol=1e-5, atol=1e-5 * one_gradient.abs().max().item())
