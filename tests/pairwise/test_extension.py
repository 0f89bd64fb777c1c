"""The compiled part: what it says it holds, how it is found, and what is refused before an address is handed over."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

from modstruct.pairwise.extension import gaussian_potential_sums_cpu, load_extension


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
    assert "compute_80" in load_extension().features()["cuda"]
    assert load_extension().cuda_sizes()["tile_rows"] == 128


def test_the_error_of_a_missing_build_says_what_to_do(monkeypatch):
    import modstruct

    monkeypatch.delattr(modstruct, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "modstruct._C", None)
    with pytest.raises(RuntimeError, match="pip install -e"):
        load_extension()


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3), r"rows = torch\.float64"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bfloat16), r"columns = torch\.bfloat16"),
        (torch.zeros(4, 3), torch.zeros(3, 4).T, r"columns = \(1, 4\): must be contiguous"),
        (torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3), r"rows = .* must be contiguous"),
        (torch.zeros(4, 3), torch.zeros(4, 5), r"columns = \(4, 5\): must be \(N, 3\)"),
        (torch.zeros(0, 3), torch.zeros(4, 3), r"rows = \(0, 3\)"),
        (torch.zeros(4), torch.zeros(4, 3), r"rows = \(4,\): must be 2-D"),
        (torch.zeros(4, 3, device="meta"), torch.zeros(4, 3), r"rows = .*meta"),
    ],
)
def test_tensors_a_kernel_cannot_take_are_refused_by_name(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        gaussian_potential_sums_cpu(rows, columns, 2.0, True)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction_set = 'abacus'"):
        gaussian_potential_sums_cpu(torch.zeros(4, 3), torch.zeros(4, 3), 2.0, True, "abacus")


def test_addresses_and_sizes_are_checked_once_more_in_the_extension():
    arguments = {"rows": 0, "row_count": 1, "columns": 0, "column_count": 1, "dimension": 1, "t": 1.0}
    rest = {"sums": 0, "pull": 0, "threads": 1, "instruction_set": "portable"}
    with pytest.raises(ValueError, match="addresses"):
        load_extension().gaussian_potential_sums(**arguments, **rest)
    with pytest.raises(ValueError, match="at least 1"):
        load_extension().gaussian_potential_sums(**(arguments | {"dimension": 0}), **rest)
