"""Every pairwise term over 2, 3 and 4 processes: one value, and gradients whose mean over them is its gradient."""

from __future__ import annotations

import pytest
import torch
from comparison import cone_rows, logit_scale, relative_error, towers, unit_rows
from processes import run_on_processes
from torch import Tensor

from modstruct import distributed
from modstruct.config import ContrastiveConfig, LossesConfig
from modstruct.errors import FailedElsewhere
from modstruct.losses.objective import build_objective
from modstruct.pairwise import (
    contrastive,
    gaussian_potential,
    geometric_consistency,
    gram_asymmetry,
    gram_difference,
    info_nce,
    sigmoid_contrastive,
    soft_contrastive,
)

WIDTH, QUEUE = 12, 37
# Rows of one process. Of one row the Gaussian potential has no half; of three, unequal ones; with up to three rows the
# geometric terms form all pairs (N < D), with 70 their closed form.
ROWS = [1, 3, 70]


def weighted(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    x_to_y, y_to_x = contrastive(x, y, scale)
    return 0.3 * x_to_y + 0.7 * y_to_x


# Of this process's x, y, their momentum rows and the columns of all processes, and the scale.
TERMS = {
    "contrastive": lambda x, y, momentum, columns, scale: weighted(x, y, scale),
    "info_nce": lambda x, y, momentum, columns, scale: info_nce(x, y, scale),
    "sigmoid_contrastive": lambda x, y, momentum, columns, scale: sigmoid_contrastive(x, y, scale, scale - 15.0),
    "soft_contrastive": lambda x, y, momentum, columns, scale: soft_contrastive(x, momentum, columns, scale, 0.4),
    "gaussian_potential": lambda x, y, momentum, columns, scale: gaussian_potential(x, 2.0),
    "geometric_consistency": lambda x, y, momentum, columns, scale: geometric_consistency(x, y),
    "gram_difference": lambda x, y, momentum, columns, scale: gram_difference(x, y),
    "gram_asymmetry": lambda x, y, momentum, columns, scale: gram_asymmetry(x, y),
}


def global_batch(rows: int) -> tuple[Tensor, ...]:
    """x, y, momentum rows and columns: those of y, then a queue."""
    x, y = towers(rows, WIDTH, 1)
    return x, y, cone_rows(rows, WIDTH, 2, 2.0), torch.cat((y, unit_rows(QUEUE, WIDTH, 3)))


def own(rows: Tensor) -> Tensor:
    count = len(rows) // distributed.world_size()
    return rows[distributed.rank() * count :][:count].clone()


def values_and_gradients(sizes: list[int]) -> dict[str, dict[str, Tensor]]:
    """For each term and global number of rows: its value here, and the mean over the processes of its gradients."""
    results = {}
    for rows in sizes:
        all_x, all_y, momentum, columns = global_batch(rows)
        for name, term in TERMS.items():
            x, y, scale = (z.requires_grad_() for z in (own(all_x), own(all_y), logit_scale(9.0)))
            value = term(x, y, own(momentum), columns, scale)
            value.backward()
            result = results[f"{name} of {rows}"] = {"value": value.detach()}
            for leaf_name, leaf in (("x", x), ("y", y), ("scale", scale)):
                if leaf.grad is not None:
                    gradient = leaf.grad
                    if leaf_name != "scale":  # a row belongs to one process
                        gradient = torch.zeros_like(all_x)
                        own_places = own(torch.arange(rows))
                        gradient[own_places] = leaf.grad
                    mean = distributed.sum_over_processes(gradient) / distributed.world_size()
                    result[f"gradient of {leaf_name}"] = mean
    return results


def spoiled_values(rows: int) -> dict[str, Tensor]:
    """The terms where the last row of the last process holds a NaN."""
    x, y, momentum, columns = global_batch(rows)
    x[-1, 3] = torch.nan
    return {name: term(own(x), own(y), own(momentum), columns, logit_scale(9.0)) for name, term in TERMS.items()}


def refusal_of_rows(of_process_1: int) -> str:
    """What the objective says where process 1 brings so many rows, and the others 4."""
    x, y = towers(4, WIDTH, 1)
    if distributed.rank() == 1:
        x, y = (rows.repeat(2, 1)[:of_process_1] for rows in (x, y))
    with pytest.raises((ValueError, FailedElsewhere)) as refusal:
        build_objective(LossesConfig(contrastive=ContrastiveConfig(weight=1.0)))(
            dict(image=x, text=y, logit_scale=logit_scale(9.0)), step=0
        )
    return str(refusal.value)


def all_of_it() -> tuple:
    processes = distributed.world_size()
    return (
        values_and_gradients([rows * processes for rows in ROWS]),
        spoiled_values(3 * processes),
        spoiled_values(20 * processes),
        [refusal_of_rows(5), refusal_of_rows(0)],
    )


@pytest.fixture(scope="module", params=[2, 3, 4])
def on_processes(request) -> tuple[int, list]:
    """How many processes, and what each of them found."""
    return request.param, run_on_processes(all_of_it, request.param)


def test_processes_agree_with_one(on_processes):
    processes, found = on_processes
    alone = values_and_gradients([rows * processes for rows in ROWS])
    for results, *_ in found:
        assert results.keys() == alone.keys()
        for term, right in alone.items():
            assert results[term].keys() == right.keys()
            for part, value in right.items():
                error = relative_error(results[term][part], value.double())
                assert error < (1e-6 if part == "value" else 1e-5), f"{term}, {part}: relative error {error:.1e}"
                largest = value.abs().max().item()
                torch.testing.assert_close(results[term][part], value, rtol=1e-5, atol=1e-5 * largest)


def test_every_process_has_the_same_value(on_processes):
    _, found = on_processes
    for results, *_ in found[1:]:
        for term, parts in results.items():
            assert torch.equal(parts["value"], found[0][0][term]["value"])


def test_nan_on_the_last_process_reaches_the_value_on_all(on_processes):
    for _, *spoiled, _ in on_processes[1]:
        for values in spoiled:
            assert all(value.isnan() for value in values.values()), values


def test_uneven_rows_are_refused_by_name_on_every_process(on_processes):
    processes, found = on_processes
    for rank, (*_, (uneven, none)) in enumerate(found):
        assert uneven.startswith(f"rows of embeddings.image = {5 if rank == 1 else 4}: ")
        assert "from 4 to 5" in uneven
        assert none.startswith("embeddings.image" if rank == 1 else "another process failed first: embeddings.image")
    assert len(found) == processes
