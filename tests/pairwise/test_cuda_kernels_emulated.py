"""The pairwise kernels of the GPU against their formulas in float64, the kernels run on the CPU by an emulator.

Where there is a GPU, and kernels for it, the same tests run on it too.

Most inputs are bfloat16 numbers, which every precision takes without rounding: so what is left is the rounding of sums
and of weights. Panels have 256 rows here, so that 300 rows take two.
"""

from __future__ import annotations

import pytest
import torch
from emulated import build, compiler, replace_gpu

from modstruct.pairwise import cuda_kernels, cuda_panels
from modstruct.pairwise.operators import load_extension
from modstruct.pairwise.torch_tiles import combinations

PRECISIONS = ("float32", "tf32", "bf16")
# Relative to the largest value. Statistics see no rounding of weights, but tensor cores cut off the sums' last digits.
STATISTICS = {"float32": 2e-6, "tf32": 1e-5, "bf16": 1e-5}
GRADS = {"float32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
LOWEST = torch.finfo(torch.float32).min
SIZES = [  # rows, columns, dimension, column of the first positive
    (1, 1, 1, 0),
    (2, 127, 5, 100),
    (127, 129, 37, 2),
    (129, 300, 64, 171),
    (300, 300, 130, 0),
    (3, 130, 2048, 7),
]


BACKENDS = ["emulated", "gpu"] if torch.cuda.is_available() and load_extension().features()["cuda"] else ["emulated"]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no C++ compiler here")
    return build(tmp_path_factory.mktemp("cuda_on_cpu"))


class On:
    """The functions of cuda_kernels with their tensors taken to a device, and the results back."""

    def __init__(self, device):
        self.device = device

    def __getattr__(self, name):
        def call(*arguments):
            moved = (value.to(self.device) if isinstance(value, torch.Tensor) else value for value in arguments)
            found = getattr(cuda_kernels, name)(*moved)
            return found.cpu() if isinstance(found, torch.Tensor) else tuple(result.cpu() for result in found)

        return call


@pytest.fixture(params=BACKENDS)
def kernels(request, monkeypatch):
    monkeypatch.setattr(cuda_panels, "panel_rows", lambda dimension, precision: 256)
    if request.param == "gpu":
        return On("cuda")
    module = request.getfixturevalue("emulator")
    module.set_thread_order("forward")
    replace_gpu(monkeypatch, module)
    return On("cpu")


def vectors(rows, dimension, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(rows, dimension, generator=generator), dim=1)
    return (spread * directions).bfloat16().float()


def near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    expected = expected.double()
    largest = expected.abs().max().clamp_min(1e-30) if expected.numel() else 1.0
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).abs().le(tolerance * largest).all()


def logits(x, y, scale, first):
    """S with the positives at -inf, and the positives, float64."""
    s = scale.double() * (x.double() @ y.double().T)
    diagonal = s.diagonal(first)[: len(x)]
    positive = diagonal.clone()
    diagonal.fill_(-torch.inf)
    return s, positive


def lse(s, dim):
    return s.logsumexp(dim).clamp_min(LOWEST)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "columns", "dimension", "first"), SIZES)
def test_contrastive_statistics_are_log_sum_exps(rows, columns, dimension, first, precision, kernels):
    x, y, scale = vectors(rows, dimension), vectors(columns, dimension, 1), torch.tensor([30.0])
    row_lse, column_lse, positive, _ = kernels.contrastive_statistics(x, y, scale, first, precision)
    s, expected = logits(x, y, scale, first)
    near(row_lse, lse(s, 1), STATISTICS[precision])
    near(column_lse, lse(s, 0), STATISTICS[precision])
    near(positive, expected, STATISTICS[precision])


def contrastive_case(rows, columns, dimension, first):
    generator = torch.Generator().manual_seed(2)
    x, y, scale = vectors(rows, dimension), vectors(columns, dimension, 1), torch.tensor([30.0])
    s, _ = logits(x, y, scale, first)
    row_weight, column_weight = (torch.rand(n, generator=generator) for n in (rows, columns))
    row_values = torch.stack((lse(s, 1).float(), row_weight, -torch.rand(rows, generator=generator)))
    return x, y, scale, first, row_values, torch.stack((lse(s, 0).float(), column_weight))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "columns", "dimension", "first"), SIZES)
def test_contrastive_grad_is_products_with_the_weights(rows, columns, dimension, first, precision, kernels):
    case = contrastive_case(rows, columns, dimension, first)
    x, y, scale, first, row_values, column_values = case
    x_grad, y_grad, scale_grad = kernels.contrastive_grad(*case, precision)
    s, _ = logits(x, y, scale, first)
    row_lse, row_weight, positive_weight = row_values.double()
    column_lse, column_weight = column_values.double()
    w = row_weight[:, None] * (s - row_lse[:, None]).exp()
    w += column_weight * (s - column_lse).exp()
    w.diagonal(first)[:rows] = positive_weight
    near(x_grad, 30 * w @ y.double(), GRADS[precision])
    near(y_grad, 30 * w.T @ x.double(), GRADS[precision])
    products = (w @ y.double() * x.double()).sum(1)
    assert abs(scale_grad.item() - products.sum()) < GRADS[precision] * products.abs().sum()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4])
@pytest.mark.parametrize(("rows", "columns", "dimension", "first"), SIZES)
def test_row_contrast_is_cross_entropy_with_soft_targets(rows, columns, dimension, first, alpha, precision, kernels):
    x, c, scale = vectors(rows, dimension), vectors(columns, dimension, 1), torch.tensor([10.0])
    momentum = None if alpha is None else vectors(rows, dimension, 2)
    total, x_grad, column_grad = kernels.row_contrast(x, momentum, c, scale, first, alpha or 0.0, "all", precision)
    s = (10 * x.double() @ c.double().T).requires_grad_()
    targets = torch.nn.functional.one_hot(first + torch.arange(rows), columns).double()
    if alpha:
        targets = alpha * (10 * momentum.double() @ c.double().T).softmax(1) + (1 - alpha) * targets
    expected = -(targets * s.log_softmax(1)).sum()
    (w,) = torch.autograd.grad(expected, s)
    near(total, expected.detach(), 1e-5)
    near(x_grad, w @ c.double(), GRADS[precision])
    near(column_grad, w.T @ x.double(), GRADS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (30.0, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize(("rows", "columns", "dimension", "first"), SIZES)
def test_sigmoid_contrast_classifies_every_pair(rows, columns, dimension, first, scale, bias, precision, kernels):
    x, c, affine = vectors(rows, dimension), vectors(columns, dimension, 1), torch.tensor([scale, bias])
    total, x_grad, column_grad, bias_grad = kernels.sigmoid_contrast(x, c, affine, first, "all", precision)
    s = (scale * x.double() @ c.double().T + bias).requires_grad_()
    labels = 2.0 * torch.nn.functional.one_hot(first + torch.arange(rows), columns) - 1
    expected = -torch.nn.functional.logsigmoid(labels * s).sum()
    (w,) = torch.autograd.grad(expected, s)
    assert total.dtype == bias_grad.dtype == torch.float64
    near(total, expected.detach(), 1e-5)
    near(x_grad, w @ c.double(), GRADS[precision])
    near(column_grad, w.T @ x.double(), GRADS[precision])
    assert abs(bias_grad - w.sum()) < 1e-5 * w.abs().sum()


def test_gradients_that_are_not_wanted_are_empty(kernels):
    x, c, scale = vectors(3, 5), vectors(4, 5, 1), torch.tensor([10.0])
    affine = torch.tensor([10.0, -5.0])
    total, x_grad, column_grad = kernels.row_contrast(x, x, c, scale, 1, 0.4, "all", "float32")
    of_sigmoid = kernels.sigmoid_contrast(x, c, affine, 1, "all", "float32")
    for grads, with_x in (("rows", True), ("none", False)):
        result = kernels.row_contrast(x, x, c, scale, 1, 0.4, grads, "float32")
        assert torch.equal(result[0], total)
        assert torch.equal(result[1], x_grad if with_x else x[:0])
        assert torch.equal(result[2], x[:0])
        result = kernels.sigmoid_contrast(x, c, affine, 1, grads, "float32")
        assert torch.equal(result[1], of_sigmoid[1] if with_x else x[:0])
        assert torch.equal(result[2], x[:0])
        assert all(torch.equal(result[i], of_sigmoid[i]) for i in (0, 3))
    assert column_grad.shape == of_sigmoid[2].shape == c.shape
    assert kernels.gaussian_potential_sum(x, c, 2.0, False, "float32")[2].shape == (0, 5)


def gaussian(x, y, t):
    differences = y.double()[None] - x.double()[:, None]  # (B, N, D)
    g = torch.exp(-t * differences.square().sum(2))
    return g.sum(), torch.einsum("jk,jkd->jd", g, differences), -torch.einsum("jk,jkd->kd", g, differences)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "columns", "dimension"), [size[:3] for size in SIZES])
def test_gaussian_potential_of_two_sets(rows, columns, dimension, precision, kernels):
    x, y = vectors(rows, dimension), vectors(columns, dimension, 1)
    y[: rows // 3] = x[: rows // 3]  # equal pairs: the largest terms, without a gradient
    total, x_grad, y_grad = kernels.gaussian_potential_sum(x, y, 2.0, True, precision)
    expected = gaussian(x, y, 2.0)
    assert total.dtype == torch.float64
    near(total, expected[0], GRADS[precision])
    near(x_grad, expected[1], GRADS[precision])
    near(y_grad, expected[2], GRADS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "dimension"), [(1, 1), (2, 5), (129, 37), (300, 64), (600, 13)])
def test_gaussian_potential_of_a_set_with_itself(rows, dimension, precision, kernels):
    x = vectors(rows, dimension)
    x[rows // 2 :: 7] = x[0].clone()
    total, x_grad, y_grad = kernels.gaussian_potential_sum(x, None, 2.0, True, precision)
    expected = gaussian(x, x, 2.0)
    near(total, expected[0], GRADS[precision])
    near(x_grad, expected[1], GRADS[precision])
    assert y_grad.shape == (0, dimension)
    assert torch.equal(kernels.gaussian_potential_sum(x, None, 2.0, False, precision)[0], total)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_vectors_far_from_the_rest_have_no_gradient(precision, kernels):
    x = torch.cat((vectors(1, 64).expand(200, -1), -vectors(1, 64)))
    total, x_grad, _ = kernels.gaussian_potential_sum(x, None, 100.0, True, precision)
    near(total, torch.tensor(200.0**2 + 1), 1e-6)
    assert x_grad.abs().max() < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("queries", "gallery", "dimension"), [(1, 1, 1), (2, 127, 5), (129, 300, 37), (300, 129, 64)])
def test_nearest_counts_are_exact_with_ties(queries, gallery, dimension, precision, kernels):
    generator = torch.Generator().manual_seed(3)
    # Small whole numbers: every precision has the scores without rounding, and many are equal.
    x, y = (torch.randint(-2, 3, (n, dimension), generator=generator).float() for n in (queries, gallery))
    pair_query = torch.randint(queries, (2 * queries + 1,), generator=generator).sort().values
    pair_gallery = torch.randint(gallery, (len(pair_query),), generator=generator)
    above, ties = kernels.nearest_counts(x, y, pair_query, pair_gallery, precision)
    scores = (x @ y.T)[pair_query]
    own = scores.gather(1, pair_gallery[:, None])
    assert torch.equal(above, (scores > own).sum(1))
    assert torch.equal(ties, (scores == own).sum(1) - 1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_gallery_rows_tie_wherever_they_stand(precision, kernels):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(130, 130, generator=generator)
    y = torch.randn(4, 130, generator=generator).repeat(70, 1)
    pair_query = torch.arange(130)
    above, ties = kernels.nearest_counts(x, y, pair_query, pair_query, precision)
    assert torch.equal(ties, torch.full((130,), 69))
    assert (above % 70 == 0).all()
    assert above.unique().tolist() == [0, 70, 140, 210]


def test_ranks_of_nan_scores(kernels):
    x = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 1.0]])
    y = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [3.0, 0.0], [torch.nan, torch.nan]])
    pair_query = torch.tensor([0, 0, 0, 1, 2])
    pair_gallery = torch.tensor([0, 1, 2, 0, 0])
    above, ties = kernels.nearest_counts(x, y, pair_query, pair_gallery, "float32")
    # A NaN item stands above any other pair, and all items above a pair whose own score is NaN.
    assert above.tolist() == [3, 4, 2, 4, 2]
    assert ties.tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_reaches_what_it_is_in_and_nothing_else(precision, kernels):
    x, y, scale = vectors(130, 20), vectors(140, 20, 1), torch.tensor([10.0])
    x[70, 3] = torch.nan
    of_row = torch.arange(130) == 70
    row_lse, column_lse, positive, _ = kernels.contrastive_statistics(x, y, scale, 5, precision)
    assert torch.equal(row_lse.isnan(), of_row)
    assert torch.equal(positive.isnan(), of_row)
    assert torch.equal(column_lse.isnan(), torch.arange(140) != 75)
    row_values = torch.stack((row_lse.nan_to_num(), torch.ones(130), torch.ones(130)))
    column_values = torch.stack((column_lse.nan_to_num(), torch.ones(140)))
    x_grad, y_grad, _ = kernels.contrastive_grad(x, y, scale, 5, row_values, column_values, precision)
    assert torch.equal(x_grad.isnan().all(1), of_row)
    assert y_grad.isnan().any(1).all()
    for momentum in (None, x, y[:130]):
        total, x_grad, _ = kernels.row_contrast(x, momentum, y, scale, 5, 0.4, "all", precision)
        assert total.isnan()
        assert torch.equal(x_grad.isnan().all(1), of_row)
    total, _, _ = kernels.row_contrast(y[:130], x, y, scale, 5, 0.4, "none", precision)
    assert total.isnan()
    total, x_grad, _, bias_grad = kernels.sigmoid_contrast(x, y, torch.tensor([10.0, -5.0]), 5, "all", precision)
    assert total.isnan()
    assert bias_grad.isnan()
    assert torch.equal(x_grad.isnan().all(1), of_row)
    total, x_grad, _ = kernels.gaussian_potential_sum(x, None, 2.0, True, precision)
    assert total.isnan()
    assert x_grad.isnan().all()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_operands_are_rounded_to_nearest(precision, emulator, monkeypatch):
    replace_gpu(monkeypatch, emulator)
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(5))
    error = (cuda_panels.Operand.of(x, precision).values.float() - x) / x.abs()
    ulp = 2.0**-10 if precision == "tf32" else 2.0**-7
    assert error.abs().max() <= ulp / 2
    assert error.mean().abs() < ulp / 50
    special = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0]])
    rounded = cuda_panels.Operand.of(special, precision).values.float()
    torch.testing.assert_close(rounded, special, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_product_leaves_the_setting_of_torch_as_it_was(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    out = torch.ones(3, 2)
    cuda_panels.add_product(out, torch.eye(3), torch.ones(3, 2), precision)
    assert torch.equal(out, torch.full((3, 2), 2.0))
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dimension", [1, 37, 128, 512, 2048])
def test_memory_of_a_panel_grows_with_the_dimension_alone(dimension, precision):
    height = cuda_panels.panel_rows(dimension, precision)
    assert height % cuda_panels.PANEL_STEP == 0
    assert height * (2 if precision == "bf16" else 4) <= 8 * dimension + 2048  # bytes for each column


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dimension", [1, 37, 130])
@pytest.mark.parametrize("rows", [1, 300])
def test_geometric_products_and_their_gradients(rows, dimension, precision, kernels, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "GEOMETRIC_ROWS", 128)
    a, b = vectors(rows, dimension), vectors(rows, dimension, 1)
    centers = vectors(3, dimension, 4)
    plus, minus = combinations(a.double(), b.double(), centers.double())
    tolerance = {"float32": 2e-6, "tf32": 2e-3, "bf16": 2e-2}[precision]
    plus_products, minus_products = kernels.geometric_products(a, b, centers, precision)
    near(plus_products, plus.T @ plus, tolerance)
    near(minus_products, minus.T @ minus, tolerance)
    weights = torch.stack((vectors(dimension, dimension, 2), vectors(dimension, dimension, 3)))
    a_grad, b_grad = kernels.geometric_grad(a, b, centers, weights, precision)
    near(a_grad, plus @ weights[0].double() + minus @ weights[1].double(), tolerance)
    near(b_grad, plus @ weights[0].double() - minus @ weights[1].double(), tolerance)


def all_functions(kernels, precision):
    x, y, scale = torch.randn(140, 70), torch.randn(270, 70), torch.tensor([1.0])
    pairs = torch.arange(140)
    case = contrastive_case(140, 270, 70, 60)
    yield from kernels.contrastive_statistics(x, y, scale, 60, precision)
    yield from kernels.contrastive_grad(*case, precision)
    yield from kernels.row_contrast(x, x + 1, y, scale, 60, 0.4, "all", precision)
    yield from kernels.sigmoid_contrast(x, y, torch.tensor([1.0, -2.0]), 60, "all", precision)
    yield from kernels.gaussian_potential_sum(x, y, 0.01, True, precision)
    yield from kernels.nearest_counts(x, y, pairs, pairs, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_give_the_same_bits(precision, kernels):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(list(all_functions(kernels, precision)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_order_of_threads_changes_no_bit(precision, emulator, monkeypatch):
    replace_gpu(monkeypatch, emulator)
    results = []
    for order in ("forward", "reverse", "random"):
        torch.manual_seed(0)
        emulator.set_thread_order(order, seed=1)
        results.append(list(all_functions(On("cpu"), precision)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_arguments_of_a_kernel_are_checked_by_name(emulator):
    with pytest.raises(TypeError, match="rows is missing"):
        emulator.cuda_squared_norms(row_count=1)
    known = {"rows": 0, "row_count": 1, "row_bytes": 64, "norms": 0, "precision": "float32", "stream": 0}
    for name, value in (("row_count", 0), ("row_bytes", 60), ("precision", "fp8")):
        with pytest.raises(ValueError, match=f"{name} = "):
            emulator.cuda_squared_norms(**(known | {name: value}))
    with pytest.raises(TypeError, match="not known"):
        emulator.cuda_squared_norms(**known, columns=0)
