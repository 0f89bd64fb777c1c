"""A batch that would hold a sample twice, or a single pair, is refused where losses compare its pairs."""

from __future__ import annotations

import numpy as np
import pytest

from modstruct import distributed
from modstruct.config import FinetuneRecipe, Recipe, Source
from modstruct.data.shards.order import SampleOrder
from modstruct.losses.objective import Objective, build_objective
from modstruct.training import finetune
from modstruct.training.pretrain import check_batch


def recipe(batch: int, **weights: float) -> Recipe:
    made = Recipe()
    made.train.global_batch = batch
    for name, weight in (weights or {"contrastive": 1.0}).items():
        getattr(made.losses, name).weight = weight
    return made


def check(made: Recipe, sizes: list[int], weights: list[float] | None = None) -> None:
    order = SampleOrder([np.array([size]) for size in sizes], 0, 4, 3, weights)
    check_batch(made, build_objective(made.losses), order.largest_batches())


@pytest.mark.parametrize("name", ["contrastive", "sigmoid", "separation", "geometry", "queue_contrast", "matching"])
def test_one_pair_is_refused_by_what_compares_pairs(name):
    with pytest.raises(ValueError, match=rf"train\.global_batch = 1: at least 2, .*losses\.{name}"):
        check(recipe(1, **{name: 1.0}), [100])
    check(recipe(2, **{name: 1.0}), [100])


@pytest.mark.parametrize("name", ["bridge", "masked_language"])
def test_one_pair_is_enough_for_what_does_not(name, caplog):
    check(recipe(1, **{name: 1.0}), [100])
    check(recipe(8, **{name: 1.0}), [4])
    assert "takes some of them twice a step" in caplog.text


def test_local_negatives_need_two_pairs_a_process(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    made = recipe(4, matching=1.0)
    check(made, [100])
    made.losses.matching.negatives = "local"
    with pytest.raises(ValueError, match=r"train\.global_batch = 4: each process has one pair"):
        check(made, [100])


@pytest.mark.parametrize("samples", [31, 32, 33])
def test_a_set_smaller_than_the_batch_is_refused_and_an_epoch_that_ends_within_batches_told(samples, caplog):
    if samples < 32:
        with pytest.raises(ValueError, match=r"train\.global_batch = 32: data\.train has so few samples .* at most 31"):
            check(recipe(32), [11, samples - 11])
        return
    check(recipe(32), [11, samples - 11])
    told = "often spans the end of an epoch and has some twice; up to 8 keeps that rare" in caplog.text
    order = SampleOrder([np.array([samples])], 0, 4, 3)
    distinct = [len(set(order.locate(np.arange(step * 32, step * 32 + 32))[1].tolist())) for step in range(9)]
    assert told == (min(distinct) < 32) == (samples == 33)


def test_a_small_source_of_a_mixture_is_named():
    made = recipe(32)
    made.data.train = [Source("large.tar", weight=3), Source("small.tar", weight=1)]
    check(made, [1000, 8], [3, 1])
    with pytest.raises(ValueError, match=r"'small\.tar' of data\.train, of weight 1, has .* at most 28, or a lower w"):
        check(made, [1000, 7], [3, 1])


def test_a_queue_longer_than_the_set_is_named(caplog):
    made = recipe(8, queue_contrast=1.0)
    made.fusion.queue = 100
    check(made, [108])
    assert not caplog.text
    check(made, [107])
    assert "fusion.queue = 100: data.train has so few samples" in caplog.text
    assert "at most 99" in caplog.text


def test_a_task_s_batch_is_judged_too(caplog):
    objective = build_objective(FinetuneRecipe().losses)  # of retrieval
    with pytest.raises(ValueError, match=r"train\.global_batch = 1: at least 2"):
        finetune.check_batch(objective, 1, 100)
    finetune.check_batch(objective, 12, 12)
    assert not caplog.text
    finetune.check_batch(objective, 12, 11)
    assert "train.global_batch = 12: of 11 entries of data.train a step takes some twice" in caplog.text
    finetune.check_batch(Objective({}, {}), 1, 100)
