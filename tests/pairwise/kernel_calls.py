"""One call of every local term, as the kernels of all devices take it, on drawn rows."""

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
    "contrastive_pulls": 5e-6,
    "row_contrast": 5e-6,
    "gaussian_potential": 5e-6,
    "geometric_products": 1e-6,
    "geometric_pulls": 2e-6,
    "nearest_counts": 0.0,
}
NAMES = [
    "contrastive_statistics",
    "contrastive_pulls",
    "row_contrast",
    "row_contrast, values",
    "row_contrast, rows alone",
    "row_contrast, softened",
    "row_contrast, softened, values",
    "gaussian_potential",
    "gaussian_potential, values",
    "gaussian_potential, one side",
    "geometric_products",
    "geometric_pulls",
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
            return pairs
        case ["contrastive_pulls"]:
            row_lse, column_lse, _ = torch_tiles.contrastive_statistics(*in_float64(pairs))
            return *pairs, *(lse.clamp(min=LOWEST).float() for lse in (row_lse, column_lse)), *weights
        case ["row_contrast", *rest]:
            softened, values = "softened" in rest, "values" in rest
            options = (0.4 if softened else 0.0, not values, not values and "rows alone" not in rest)
            return x, x_momentum if softened else None, *pairs[1:], *options
        case ["gaussian_potential", *rest]:
            return x, None if "one side" in rest else y, 1.5, "values" not in rest
        case ["geometric_products"]:
            return x, other, random_rows(3, width, 10).float()
        case ["geometric_pulls"]:
            return (
                x,
                other,
                random_rows(3, width, 10).float(),
                random_rows(width, width, 8).float(),
                random_rows(width, width, 9).float(),
            )
        case ["nearest_counts"]:
            return queries, gallery, pair_query, pair_gallery
    raise KeyError(name)


def in_float64(given: tuple) -> tuple:
    return tuple(z.double() if isinstance(z, Tensor) and z.is_floating_point() else z for z in given)


def results(kernels: ModuleType, name: str, given: tuple, **options: str) -> tuple[Tensor, ...]:
    return getattr(kernels, name.split(", ")[0])(*given, **options)


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
