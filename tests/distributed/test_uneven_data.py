"""Data that does not divide: fewer shards than processes, shards of other sizes, an epoch that is no number of batches.

No process waits for another for ever, and an epoch holds every sample once.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import small_runs
from hypothesis import given
from hypothesis import strategies as st
from processes import run_on_processes

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "shards"))
from crafted_shards import LengthTokenizer, config, number_of, opened, views, write_shards

from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader
from modstruct.data.shards.order import SampleOrder

PROCESSES = (1, 2, 3, 4)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rows=st.integers(1, 7),
    block=st.integers(1, 8),
    window=st.integers(1, 4),
    processes=st.sampled_from(PROCESSES),
    epochs=st.integers(1, 3),
)
def test_the_processes_together_take_every_sample_once_an_epoch(sizes, rows, block, window, processes, epochs):
    """rows: of one process in a step. Process p takes the slots [s B + p B / W, s B + (p + 1) B / W) of step s."""
    order = SampleOrder([np.array(sizes)], seed=1, block=block, window=window)
    batch, slots = rows * processes, epochs * sum(sizes)
    taken = Counter()
    for process in range(processes):
        for step in range(-(-slots // batch)):
            first = step * batch + process * rows
            mine = np.arange(first, min(first + rows, slots))  # the last batch goes on into the next epoch
            taken.update(zip(*(numbers.tolist() for numbers in order.locate(mine)), strict=True))
    assert taken == Counter((epoch, sample) for epoch in range(epochs) for sample in range(sum(sizes)))


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("sizes", [[25], [23, 2], [1, 17, 1, 6]], ids=str)
def test_the_loaders_together_read_every_image_once_an_epoch(tmp_path, processes, sizes):
    """25 images in batches of 12: epochs begin in the middle of a batch, and of a process's rows."""
    data = config(tmp_path)
    samples = opened(write_shards(tmp_path, sizes), data)
    batch, epochs = 12, 12
    steps = epochs * 25 // batch
    loaders = [rows(samples, data, batch, steps, process, processes) for process in range(processes)]
    read = [
        number_of(image) for parts in zip(*loaders, strict=True) for part in parts for image in part.tensors["image"]
    ]
    for epoch in range(epochs):
        assert sorted(read[epoch * 25 : (epoch + 1) * 25]) == list(range(25))


def rows(samples, data, batch, steps, process, processes):
    contents, plan = BatchContents(views(), LengthTokenizer()), BatchPlan(batch, seed=2, start_step=0, stop_step=steps)
    return train_loader(samples, data, contents, plan, process, processes)


def run_over(pattern: str, folder: str) -> list[int]:
    """A whole run of two and a half epochs; the rows its steps took."""
    small = small_runs.small_recipe

    def over_shards(*options):
        recipe = small(*options)
        train = replace(recipe.train, steps=None, epochs=2.5)
        return replace(recipe, data=replace(recipe.data, train=pattern, shuffle_block=4, shuffle_window=3), train=train)

    with mock.patch.object(small_runs, "small_recipe", over_shards):
        small_runs.train_small(f"{folder}/run", f"{folder}/cache", "zero2", steps=99, micro=3, workers=1)
    return [row for _, taken in sorted(small_runs.rows_taken(f"{folder}/run").items()) for row in taken]


def test_a_real_run_on_three_processes_over_two_uneven_shards(tmp_path):
    pattern = write_shards(tmp_path / "shards", [23, 2])
    taken = run_on_processes(run_over, 3, pattern, str(tmp_path))[0]
    assert len(taken) == 6 * 12  # 62.5 samples, in whole batches
    # The plain view of an image is a function of its sample here (one colour), so a row tells its sample.
    assert len(set(taken)) == 25
    for epoch in range(2):
        assert len(set(taken[epoch * 25 : (epoch + 1) * 25])) == 25
