"""The compiled CPU kernels: every instruction set, any shape, the same bits on any number of threads, little memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from comparison import integer_rows, logit_scale, random_rows, relative_error, threads, unit_rows, with_gradients
from kernel_calls import NAMES, SHAPES, arguments, assert_agree, in_float64, results

from modstruct.pairwise import cpu_kernels, torch_tiles
from modstruct.pairwise.contrast import row_and_column_lse
from modstruct.pairwise.operators import load_extension

INSTRUCTION_SETS = load_extension().features()["cpu_here"]


@pytest.fixture
def instruction_set(request, monkeypatch) -> str:
    """Kernels of another instruction set than the fastest."""
    monkeypatch.setattr(cpu_kernels, "instruction_set", lambda: request.param)
    return request.param


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_set_agrees_with_float64(name, shape, instruction_set):
    given = arguments(name, *shape)
    with threads(1):
        found = results(cpu_kernels, name, given)
    assert_agree(name, found, results(torch_tiles, name, in_float64(given)))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1537, 33), (300, 385), (3100, 130)])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("name", ["geometric_products", "geometric_grad"])
def test_every_instruction_set_agrees_with_float64_over_many_rows(name, instruction_set, rows, width):
    given = arguments(name, rows, rows, width, 0)
    with threads(1):
        found = results(cpu_kernels, name, given)
    assert_agree(name, found, results(torch_tiles, name, in_float64(given)))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 300, 5), (130, 1, 40), (101, 290, 130), (900, 390, 33)])
def test_potentials_and_counts_may_have_more_rows_than_columns(instruction_set, rows, columns, width):
    x, y = unit_rows(rows, width, 1), unit_rows(columns, width, 2)
    found = cpu_kernels.gaussian_potential_sum(x, y, 1.5, True, "float32")
    total, x_gradient, y_gradient = with_gradients(
        lambda x, y: reference.gaussian_potential_sum(x, 1.5, y), x.double(), y.double()
    )
    assert relative_error(found[0], total) < 1e-6
    assert relative_error(found[1], x_gradient / 3) < 5e-6  # over 2 t
    assert relative_error(found[2], y_gradient / 3) < 5e-6
    queries, gallery, pairs = integer_rows(rows, width, 3), integer_rows(columns, width, 4), torch.arange(rows)
    counts = cpu_kernels.nearest_counts(queries, gallery, pairs, pairs % columns, "float32")
    right = reference.nearest_counts(queries.double(), gallery.double(), torch.stack((pairs, pairs % columns), 1))
    assert all(torch.equal(f, r) for f, r in zip(counts, right, strict=True))


def fresh_pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_memory_is_kept_for_the_next_call_up_to_64_mib():
    x, y, many = unit_rows(1000, 512, 1), unit_rows(1000, 512, 2), torch.zeros(50_000, 512)
    arguments = (logit_scale(9.0), 0, 0.0, "none", "float32")
    touched = []
    for columns in (y, many):
        for _ in range(2):
            before = fresh_pages()
            cpu_kernels.row_contrast(x, None, columns, *arguments)
        touched.append((fresh_pages() - before) * resource.getpagesize())
    assert touched[0] < 2**17 < y.nbytes
    assert touched[1] > many.nbytes  # 98 MiB, which were given back


@pytest.mark.parametrize("shape", [(1300, 1700, 37, 350), (193, 385, 31, 192), (40, 4000, 70, 17)])
@pytest.mark.parametrize("name", NAMES)
def test_one_two_and_three_threads_give_the_same_bits(name, shape):
    given = arguments(name, *shape)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(results(cpu_kernels, name, given))
    for others in found[1:]:
        for f, r in zip(others, found[0], strict=True):
            assert torch.equal(f, r)


@pytest.mark.parametrize(
    "name", ["row_contrast", "row_contrast, softened", "sigmoid_contrast", "gaussian_potential_sum"]
)
def test_values_have_the_same_bits_with_and_without_gradients(name):
    shape = (1300, 1700, 37, 350)
    value, x_grad, y_grad, *bias_grad = results(cpu_kernels, name, arguments(name, *shape))
    alone, no_x_grad, no_y_grad, *same_bias_grad = results(
        cpu_kernels, f"{name}, values", arguments(f"{name}, values", *shape)
    )
    assert torch.equal(alone, value)
    assert bias_grad == same_bias_grad
    assert (x_grad.shape, y_grad.shape) == ((1300, 37), (1700, 37))
    assert no_x_grad.shape == no_y_grad.shape == (0, 37)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dimension", [2, 37, 600])
def test_a_vector_is_at_distance_zero_from_itself(instruction_set, dimension):
    z = 30 * random_rows(200, dimension, 3).float()
    for y in (None, z):  # all others are so far that nothing but the own term is left
        total, grad, _ = cpu_kernels.gaussian_potential_sum(z, y, 1e30, True, "float32")
        assert total == 200
        assert (grad == 0).all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("width", [3, 40, 300])
def test_equal_gallery_rows_tie_exactly_wherever_they_lie(instruction_set, width):
    gallery = unit_rows(700, width, 1)
    copies = torch.tensor([0, 5, 31, 191, 192, 400, 699])
    gallery[copies] = gallery[0].clone()
    query, item = torch.arange(50).repeat_interleave(7), copies.repeat(50)
    above, ties = cpu_kernels.nearest_counts(unit_rows(50, width, 2), gallery, query, item, "float32")
    assert (ties == 6).all()
    assert (above.reshape(50, 7) == above[::7, None]).all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("scale", [0.0, 30.0, 100.0, 1000.0])
def test_log_sum_exps_hold_at_any_scale(instruction_set, scale):
    # Beyond some 50 between rows and columns of a tile a common exponential would underflow.
    x, y = unit_rows(250, 6, 1), unit_rows(300, 6, 2)
    x[10], y[20] = 0, 0
    given = x, y, logit_scale(scale), 30
    found = cpu_kernels.contrastive_statistics(*given, "float32")
    for f, r in zip(found[:3], torch_tiles.contrastive_statistics(*in_float64(given), "float32")[:3], strict=True):
        assert f.isfinite().all()
        assert (f - r).abs().max() < 1e-6 * max(scale, 5)
    row_lse, column_lse, _, _ = found
    row_values = torch.stack((row_lse, torch.ones(250), torch.zeros(250)))
    values = row_values, torch.stack((column_lse, torch.ones(300)))
    grads = cpu_kernels.contrastive_grad(*given, *values, "float32")
    right = torch_tiles.contrastive_grad(*in_float64((*given, *values)), "float32")
    for f, r in zip(grads[:2], right[:2], strict=True):
        assert (f - r).norm() <= 1e-6 * max(scale, 5) * r.norm()
    logits = cpu_kernels.contrastive_statistics(*given, "float32", keep=True)[3]
    kept = cpu_kernels.contrastive_grad(*given, *values, "float32", logits)
    assert all(torch.equal(f, r) for f, r in zip(kept, grads, strict=True))


def test_logits_are_kept_where_they_fit_and_a_gradient_is_wanted(monkeypatch):
    leaves = [z.requires_grad_() for z in (unit_rows(30, 8, 1), unit_rows(40, 8, 2), logit_scale(9.0))]

    def kept(budget: int) -> tuple[int, list[torch.Tensor]]:
        monkeypatch.setattr(cpu_kernels, "KEPT_BYTES", budget)
        with torch.autograd.graph.saved_tensors_hooks(lambda z: sizes.append(z.numel()) or z, lambda z: z):
            sums = sum(z.sum() for z in row_and_column_lse(*leaves, 3, "float32"))
        return max(sizes), torch.autograd.grad(sums, leaves)

    sizes: list[int] = []
    count = 192 * 192  # one tile
    most, right = kept(4 * count)
    assert most == count
    sizes.clear()
    most, found = kept(4 * count - 1)
    assert most == 40 * 8
    assert all(torch.equal(f, r) for f, r in zip(found, right, strict=True))
    sizes.clear()
    with torch.no_grad():
        row_and_column_lse(*leaves, 3, "float32")
    assert not sizes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("name", [name for name in NAMES if "values" not in name])
def test_what_is_not_finite_in_the_last_row_reaches_its_results(name, instruction_set, value):
    given = arguments(name, 250, 260, 37, 4)
    given[0][249, 36] = value
    found = results(cpu_kernels, name, given)
    right = results(torch_tiles, name, in_float64(given))
    for f, r in zip(found, right, strict=True):
        if r.is_floating_point():
            assert (~f.isfinite() | r.isfinite()).all()  # where float64 has no finite number, nor has float32
        else:
            assert torch.equal(f, r)
    assert name == "nearest_counts" or not all(f.isfinite().all() for f in found)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
def test_counts_of_many_equal_scores(instruction_set):
    queries, gallery = integer_rows(300, 3, 1), integer_rows(3500, 3, 2)
    pair_query = torch.arange(900) // 3
    pair_gallery = torch.arange(900) * 13 % 3500
    found = cpu_kernels.nearest_counts(queries, gallery, pair_query, pair_gallery, "float32")
    right = torch_tiles.nearest_counts(queries.double(), gallery.double(), pair_query, pair_gallery, "float32")
    for f, r in zip(found, right, strict=True):
        assert torch.equal(f, r)


MEMORY_OF_20_000_PAIRS = """
import torch
from modstruct.pairwise import contrastive, gaussian_potential, nearest_counts
from comparison import logit_scale, unit_rows

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
def work(rows):
    x, y = (unit_rows(rows, 64, seed).requires_grad_() for seed in (1, 2))
    before = kilobytes("VmRSS")
    (sum(contrastive(x, y, logit_scale(20.0))) + gaussian_potential(x, 2.0)).backward()
    nearest_counts(x, y, torch.arange(rows).repeat(2, 1).T)
    return kilobytes("VmHWM") - before

work(300)
print(work(20000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_20_000_pairs_take_less_than_200_megabytes():
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", MEMORY_OF_20_000_PAIRS]
    output = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True, check=True
    )
    assert 0 < int(output.stdout) < 200_000  # all logits would be 1.6 million
