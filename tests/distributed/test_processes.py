"""The helper that starts real processes: results by rank, and failures that are not lost."""

from __future__ import annotations

import pytest
import torch
from processes import run_on_processes

from modstruct import distributed


def sums_over_ranks(offset: int) -> dict:
    value = torch.tensor([float(distributed.rank() + offset)])
    return {"rank": distributed.rank(), "sum": distributed.all_sum(value), "threads": torch.get_num_threads()}


def fails_on_one_rank() -> None:
    if distributed.rank() == 1:
        raise ArithmeticError("rank 1 gave up")
    distributed.barrier()


def test_results_come_back_in_order_of_rank():
    results = run_on_processes(sums_over_ranks, 2, 10)
    assert [r["rank"] for r in results] == [0, 1]
    assert all(r["sum"].item() == 21.0 and r["threads"] == 1 for r in results)


def test_a_failure_on_one_process_is_raised_here():
    with pytest.raises(Exception, match="rank 1 gave up"):
        run_on_processes(fails_on_one_rank, 2)
