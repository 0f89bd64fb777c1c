"""The compiled part: what it says it holds, how it is found, and what is refused before an address is handed over."""

from __future__ import annotations

import os
import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from kernel_calls import NAMES, arguments, results

from modstruct.pairwise import cpu_kernels, operators
from modstruct.pairwise.gaussian import potential_sum
from modstruct.pairwise.operators import load_extension

KERNELS = sorted({name.split(", ")[0] for name in NAMES})


def test_features_name_what_the_build_holds():
    features = load_extension().features()
    assert set(features) == {"cpu", "cpu_here", "openmp", "cuda"}
    assert features["cpu_here"][0] == features["cpu"][0] == "portable"
    assert set(features["cpu_here"]) <= set(features["cpu"])
    assert isinstance(features["openmp"], bool)
    assert set(features["cuda"]) <= {"sm_80", "sm_90a", "compute_80"}


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("MODSTRUCT_CUDA") == "0", reason="built without CUDA"
)
def test_cuda_kernels_are_built_where_nvcc_is():
    assert set(load_extension().features()["cuda"]) == {"sm_80", "sm_90a", "compute_80"}
    assert load_extension().cuda_sizes()["tile_rows"] == 128


def test_the_error_of_a_missing_build_says_what_to_do(monkeypatch):
    import modstruct

    monkeypatch.delattr(modstruct, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "modstruct._C", None)
    with pytest.raises(RuntimeError, match="pip install -e"):
        load_extension()


def test_dtype_and_device_choose_the_kernel(monkeypatch):
    def unexpected() -> str:
        raise AssertionError("compiled")

    x, rest = torch.ones(2, 3), (None, 2.0, False, "float32")
    right = potential_sum(x, *rest)[0]
    monkeypatch.setattr(cpu_kernels, "instruction_set", unexpected)
    assert potential_sum(x.double(), *rest)[0] == right
    with pytest.raises(AssertionError, match="compiled"):
        potential_sum(x, *rest)
    with potential_sum.set_kernel_enabled("cpu", False):
        assert potential_sum(x, *rest)[0] == right


@pytest.mark.parametrize(
    ("capability", "cuda", "served"), [((7, 5), ["sm_80"], 0), ((8, 0), [], 0), ((9, 0), ["a"], 1)]
)
def test_a_gpu_without_kernels_is_named_in_a_warning(capability, cuda, served, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Old GPU")
    monkeypatch.setattr(operators, "load_extension", lambda: mock.Mock(features=lambda: {"cuda": cuda}))
    assert operators.has_kernels_for.__wrapped__(torch.device("cuda")) == bool(served)
    assert len(caplog.messages) == 1 - served


BAD_PAIRS = [
    (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3), r"x = torch\.float64"),
    (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bfloat16), r"y = torch\.bfloat16"),
    (torch.zeros(4, 3), torch.zeros(3, 4).T, r"y = \(1, 4\): must be contiguous"),
    (torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3), r"x = .* must be contiguous"),
    (torch.zeros(4, 3), torch.zeros(4, 5), r"y = \(4, 5\): must have shape \(4, 3\)"),
    (torch.zeros(0, 3), torch.zeros(4, 3), r"x = \(0, 3\)"),
    (torch.zeros(4), torch.zeros(4, 3), r"x = \(4,\): must be 2-D"),
    (torch.zeros(4, 3), torch.zeros(4), r"y = \(4,\): must be 2-D"),
    (torch.zeros(4, 3, device="meta"), torch.zeros(4, 3), r"x = .*meta"),
]


@pytest.mark.parametrize(("x", "y", "message"), BAD_PAIRS)
def test_rows_a_kernel_cannot_take_are_refused_by_name(x, y, message):
    scale, indices = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    row_values, column_values = torch.zeros(3, 4), torch.zeros(2, 4)
    for call in (
        lambda: cpu_kernels.contrastive_statistics(x, y, scale, 0, "float32"),
        lambda: cpu_kernels.contrastive_grad(x, y, scale, 0, row_values, column_values, "float32"),
        lambda: cpu_kernels.row_contrast(x, None, y, scale, 0, 0.0, "all", "float32"),
        lambda: cpu_kernels.sigmoid_contrast(x, y, torch.ones(2), 0, "all", "float32"),
        lambda: cpu_kernels.gaussian_potential_sum(x, y, 2.0, True, "float32"),
        lambda: cpu_kernels.nearest_counts(x, y, indices, indices, "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    message = re.sub("^x", "a", re.sub("^y", "b", message)).replace(r": must be 2-D", "")
    for call in (
        lambda: cpu_kernels.geometric_products(x, y, torch.zeros(3, 3), "float32"),
        lambda: cpu_kernels.geometric_grad(x, y, torch.zeros(3, 3), torch.zeros(2, 3, 3), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Of each kernel the arguments behind its rows: place, name, and what it cannot be.
BAD_ARGUMENTS = [
    ("contrastive_statistics", 2, "scale", torch.ones(2)),
    ("contrastive_statistics", 2, "scale", torch.ones(1, dtype=torch.float64)),
    ("contrastive_statistics", 3, "first", -1),
    ("contrastive_statistics", 3, "first", 7),  # of 5 rows among 9 columns: 4 is the last
    ("contrastive_grad", 3, "first", 5),
    ("contrastive_grad", 4, "row_values", torch.zeros(3, 9)),
    ("contrastive_grad", 4, "row_values", torch.zeros(3, 5, device="meta")),
    ("contrastive_grad", 5, "column_values", torch.zeros(3, 9)),
    ("contrastive_grad", 5, "column_values", torch.zeros(2, 9, dtype=torch.float64)),
    ("contrastive_grad", 5, "column_values", torch.zeros(2, 1).expand(2, 9)),
    ("row_contrast, softened", 1, "x_momentum", torch.zeros(4, 3)),
    ("row_contrast, softened", 4, "first", 5),
    ("sigmoid_contrast", 2, "affine", torch.ones(1)),
    ("sigmoid_contrast", 3, "first", 5),
    ("geometric_grad", 2, "centers", torch.zeros(2, 3)),
    ("geometric_grad", 3, "weights", torch.zeros(2, 3, 4)),
    ("geometric_grad", 3, "weights", torch.zeros(2, 3, 3, dtype=torch.float64)),
    ("nearest_counts", 2, "pair_query", torch.zeros(14, dtype=torch.int32)),
    ("nearest_counts", 3, "pair_gallery", torch.zeros(13, dtype=torch.int64)),
    ("nearest_counts", 3, "pair_gallery", torch.zeros(28, dtype=torch.int64)[::2]),
]


@pytest.mark.parametrize(("name", "place", "argument", "bad"), BAD_ARGUMENTS)
def test_other_arguments_a_kernel_cannot_take_are_refused_by_name(name, place, argument, bad):
    given = list(arguments(name, 5, 9, 3, 2))
    results(cpu_kernels, name, tuple(given))
    given[place] = bad
    with pytest.raises(ValueError, match=f"^{argument} = "):
        results(cpu_kernels, name, tuple(given))


@pytest.mark.parametrize("name", KERNELS)
def test_an_unknown_instruction_set_is_refused(name, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "instruction_set", lambda: "abacus")
    with pytest.raises(ValueError, match="instruction_set = 'abacus'"):
        results(cpu_kernels, name, arguments(name, 5, 9, 3, 2))


def compiled(name: str) -> str:
    return f"cpu_{name.removesuffix('_sum')}"


def handed_over(name: str) -> dict[str, object]:
    """What Python hands over to a kernel; the addresses of arrays that are gone, so it must not be called with them."""
    extension = mock.Mock(features=load_extension().features)
    with mock.patch.object(cpu_kernels, "load_extension", return_value=extension):
        results(cpu_kernels, name, arguments(name, 5, 9, 3, 2))
    return dict(getattr(extension, compiled(name)).call_args.kwargs)


@pytest.mark.parametrize("name", KERNELS)
def test_addresses_and_sizes_are_checked_once_more_in_the_extension(name):
    given = handed_over(name)
    sizes = {"rows", "columns", "dimension", "count", "threads"} & given.keys()
    options = {"first", "symmetric", "t", "alpha", "instruction_set"}
    assert {"dimension", "rows", "threads"} <= sizes
    for size in sizes:
        with pytest.raises(ValueError, match="at least 1"):
            getattr(load_extension(), compiled(name))(**(given | {size: 0}))
    # momentum, kept logits, and in some terms the gradients, may be left out, but not that of x alone
    for address in given.keys() - sizes - options - {"momentum", "logits"}:
        if (name, address) in (("row_contrast", "y_grad"), ("sigmoid_contrast", "y_grad")):
            continue
        with pytest.raises(ValueError, match=r"must be an address, not 0|must (not )?be given with"):
            getattr(load_extension(), compiled(name))(**(given | {address: 0}))
    if "first" in given:
        for first in (-1, 5):
            with pytest.raises(ValueError, match="first"):
                getattr(load_extension(), compiled(name))(**(given | {"first": first}))
