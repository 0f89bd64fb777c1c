"""Shared by the tests of pairwise terms: random rows, a value with its gradients, comparison with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from modstruct.pairwise import torch_tiles

# Rows and dimension: single ones; blocks (192), vectors (32) and micro-kernels not filled, filled, and one above.
SIZES = [(1, 1), (2, 1), (1, 40), (7, 3), (192, 32), (193, 33), (145, 257), (300, 70), (450, 8), (20, 2048)]


def random_rows(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit_rows(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normalize(random_rows(rows, width, seed)).to(dtype)


def towers(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows whose pairs have cosines about 0.45: so no gradient is the small difference of large terms."""
    x = unit_rows(rows, width, seed, torch.float64)
    return x.float(), normalize(x + 2 * unit_rows(rows, width, seed + 1000, torch.float64)).float()


def cone_rows(rows: int, width: int, seed: int, spread: float) -> Tensor:
    """Unit norm, float32, noise of length `spread` around one direction, as embeddings of one modality are."""
    z = spread * random_rows(rows, width, seed) / width**0.5
    z[:, 0] += 1
    return normalize(z).float()


def integer_rows(rows: int, width: int, seed: int, largest: int = 1) -> Tensor:
    """Small integers in float32: inner products are exact, and many tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (rows, width), generator=generator).float()


def logit_scale(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([value], dtype=dtype)


def permutation(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(random_rows(width, width, seed)).Q


def with_gradients(function: Callable, *inputs: Tensor) -> list[Tensor]:
    """The value, and its gradient with respect to each input."""
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def relative_error(found: Tensor, right: Tensor, smallest: float = 1e-30) -> float:
    assert found.shape == right.shape
    return ((found.double() - right).norm() / right.norm().clamp_min(smallest)).item()


def errors(ours: Callable, printed: Callable, *inputs: Tensor, smallest: float = 1e-30) -> list[float]:
    """Relative errors of our value and of each of its gradients against the formula as printed, in float64.

    smallest: norm below which the printed form's own rounding counts as 0.
    """
    found = with_gradients(ours, *inputs)
    right = with_gradients(printed, *(z.double() for z in inputs))
    return [relative_error(f, r, smallest) for f, r in zip(found, right, strict=True)]


def assert_half_precision_is_taken_to_float32(ours: Callable, *inputs: Tensor, backward_too: bool = True) -> None:
    """float16 and bfloat16 inputs give the bits of float32 ones, gradients rounded last, whatever autocast says.

    backward_too: autocast is on in the backward as well, which torch advises against.
    """
    for dtype in (torch.float16, torch.bfloat16):
        halves = [z.to(dtype).requires_grad_() for z in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = ours(*halves)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_too):
            gradients = torch.autograd.grad(value, halves)
        right, *right_gradients = with_gradients(ours, *(z.float() for z in halves))
        assert value.dtype == torch.float32
        assert torch.equal(value, right)
        for gradient, expected in zip(gradients, right_gradients, strict=True):
            assert torch.equal(gradient, expected.to(dtype))


def assert_layout_does_not_matter(ours: Callable, *inputs: Tensor) -> None:
    """Strided and transposed inputs give the bits of contiguous ones."""
    right = with_gradients(ours, *inputs)
    with_gaps = [torch.stack((z, torch.full_like(z, torch.nan)), -1)[..., 0] for z in inputs]
    transposed = [z.T.contiguous().T for z in inputs]
    for given in (with_gaps, transposed):
        assert not any(z.is_contiguous() for z in given if min(z.shape) > 1)
        leaves = [z.requires_grad_() for z in given]
        value = ours(*leaves)
        for f, r in zip([value, *torch.autograd.grad(value, leaves)], right, strict=True):
            assert torch.equal(f, r)


def assert_each_input_alone_gets_its_gradient(ours: Callable, *inputs: Tensor) -> None:
    """One input that requires a gradient, the others not: the same gradient as when all do."""
    _, *right = with_gradients(ours, *inputs)
    for i, expected in enumerate(right):
        leaves = [z.clone().requires_grad_(i == j) for j, z in enumerate(inputs)]
        ours(*leaves).backward()
        assert torch.equal(leaves[i].grad, expected)
        assert all(z.grad is None for j, z in enumerate(leaves) if j != i)


def assert_compiles(ours: Callable, *inputs: Tensor, other_sizes: bool = True) -> None:
    """As one graph, with equal value and gradients; `other_sizes`: for other numbers of rows of the matrices too."""
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for fewer in (0, 1, 2) if other_sizes else (0,):
        given = [z[: len(z) - fewer] if z.dim() == 2 else z for z in inputs]
        for f, r in zip(with_gradients(compiled, *given), with_gradients(ours, *given), strict=True):
            torch.testing.assert_close(f, r)


def assert_second_derivative_is_refused(ours: Callable, operator: str, *inputs: Tensor) -> None:
    """By autograd, naming our operator, whichever input requires a gradient; never taken for zero."""
    for i in range(len(inputs)):
        leaves = [z.clone().requires_grad_(i == j) for j, z in enumerate(inputs)]
        value = ours(*leaves)
        (gradient,) = torch.autograd.grad(value, leaves[i], create_graph=True)
        with pytest.raises(RuntimeError, match=operator):
            (value + gradient.square().sum()).backward()


class OperatorCalls(TorchDispatchMode):
    """`with OperatorCalls() as calls: ...` leaves the calls of modstruct's operators there, name and arguments."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "modstruct":
            self.seen.append((function._opname, args))
        return function(*args, **(kwargs or {}))


def without_gradient(ours: Callable, *inputs: Tensor) -> Tensor:
    """The value under no_grad of inputs that require gradients."""
    with torch.no_grad():
        value = ours(*(z.clone().requires_grad_() for z in inputs))
    assert not value.requires_grad
    return value


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiles_of(elements: int):
    """Tiles of so many logits in torch_tiles."""
    return mock.patch.dict(torch_tiles.TILE_ELEMENTS, cpu=elements)
