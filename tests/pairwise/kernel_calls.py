"""One call of every operator, as the kernels of all devices take it, on drawn rows."""

from __future__ import annotations

from types import ModuleType

import torch
from comparison import integer_rows, logit_scale, random_rows, relative_error, unit_rows
from torch import Tensor

from modstruct.pairwise import torch_tiles

LOWEST = torch.finfo(torch.float32).min
# Rows, columns, dimension, column of the first row's positive. Single ones; less and more than a block (192) and a
# micro-kernel; no row or column block full; 1,300 x 1,700: on one thread two groups of row blocks; a long dimension.
SHAPES = [
    (1, 1, 1, 0),
    (1, 5, 3, 4),
    (7, 300, 33, 100),
    (192, 192, 32, 0),
    (193, 385, 31, 192),
    (40, 400, 600, 17),
    (1300, 1700, 37, 350),
]
TOLERANCES = {  # of each result, relative to its norm; counts are exact
    "contrastive_statistics": 1e-6,
    "contrastive_grad": 5e-6,
    "row_contrast": 5e-6,
    "sigmoid_contrast": 5e-6,
    "gaussian_potential_sum": 5e-6,
    "geometric_products": 1e-6,
    "geometric_grad": 2e-6,
    "nearest_counts": 0.0,
}
NAMES = [
    "contrastive_statistics",
    "contrastive_grad",
    "row_contrast",
    "row_contrast, values",
    "row_contrast, rows alone",
    "row_contrast, softened",
    "row_contrast, softened, values",
    "sigmoid_contrast",
    "sigmoid_contrast, values",
    "sigmoid_contrast, rows alone",
    "gaussian_potential_sum",
    "gaussian_potential_sum, values",
    "gaussian_potential_sum, one side",
    "geometric_products",
    "geometric_grad",
    "nearest_counts",
]


def arguments(name: str, rows: int, columns: int, width: int, first: int) -> tuple:
    """What the function before the comma takes, in float32."""
    x, x_momentum, y = (unit_rows(n, width, seed) for seed, n in ((1, rows), (2, rows), (3, columns)))
    y[first : first + rows] += x  # positives are near
    x_momentum += x
    pairs = x, y, logit_scale(8.0), first
    positive = torch.rand(2 * rows + columns, generator=torch.Generator().manual_seed(4))
    weights = positive[:rows], positive[rows : rows + columns], -positive[-rows:]
    other = unit_rows(rows, width, 5)
    queries, gallery = integer_rows(rows, width, 6), integer_rows(columns, width, 7)
    count = rows + columns
    pair_query = torch.arange(count) * rows // count
    pair_gallery = torch.arange(count) * 7 % columns
    match name.split(", "):
        case ["contrastive_statistics"]:
            return *pairs, "float32"
        case ["contrastive_grad"]:
            lse = [z.clamp(min=LOWEST).float() for z in torch_tiles.contrastive_statistics(*in_float64(pairs), "")[:3]]
            values = torch.stack((lse[0], weights[0], weights[2])), torch.stack((lse[1], weights[1]))
            return *pairs, *values, "float32"
        case ["row_contrast", *rest]:
            softened = "softened" in rest
            return x, x_momentum if softened else None, *pairs[1:], 0.4 if softened else 0.0, grads(rest), "float32"
        case ["sigmoid_contrast", *rest]:
            return x, y, torch.tensor([8.0, -4.0]), first, grads(rest), "float32"
        case ["gaussian_potential_sum", *rest]:
            return x, None if "one side" in rest else y, 1.5, "values" not in rest, "float32"
        case ["geometric_products"]:
            return x, other, random_rows(3, width, 10).float(), "float32"
        case ["geometric_grad"]:
            products = torch.stack([random_rows(width, width, seed) for seed in (8, 9)]).float()
            return x, other, random_rows(3, width, 10).float(), products, "float32"
        case ["nearest_counts"]:
            return queries, gallery, pair_query, pair_gallery, "float32"
    raise KeyError(name)


def grads(options: list[str]) -> str:
    return "none" if "values" in options else "rows" if "rows alone" in options else "all"


def in_float64(given: tuple) -> tuple:
    return tuple(z.double() if isinstance(z, Tensor) and z.is_floating_point() else z for z in given)


def results(kernels: ModuleType, name: str, given: tuple) -> tuple[Tensor, ...]:
    found = getattr(kernels, name.split(", ")[0])(*given)
    return (found,) if isinstance(found, Tensor) else found


def assert_agree(name: str, found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """Each result within its tolerance of the one in float64; a log-sum-exp over nothing is LOWEST exactly."""
    tolerance = TOLERANCES[name.split(", ")[0]]
    for f, r in zip(found, right, strict=True):
        if not r.is_floating_point():
            assert torch.equal(f, r)
            continue
        of_nothing = r <= LOWEST
        assert (f[of_nothing] == LOWEST).all()
        assert relative_error(f.masked_fill(of_nothing, 0), r.masked_fill(of_nothing, 0)) <= tolerance
