"""A batch that would hold a sample twice, or a single pair, is refused where losses compare its pairs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model, word_tokenizer

from modstruct import cli, distributed
from modstruct.config import FinetuneRecipe, Recipe, Source
from modstruct.data.shards.order import SampleOrder
from modstruct.losses.objective import Objective, build_objective
from modstruct.models.layers import lock_layers
from modstruct.training import checkpoint, finetune
from modstruct.training.pretrain import check_batch, check_learns, check_settings


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


IDLE = {
    "train.seed = -1": lambda made: setattr(made.train, "seed", -1),
    "train.unmasked_share = 0.1": lambda made: setattr(made.train, "unmasked_share", 0.1),
    "evaluation.rerank = 8": lambda made: setattr(made.evaluation, "rerank", 8),
    "model.unlocked_image_layers = 0": lambda made: [
        setattr(made, "framework", "fusion"),
        setattr(made.model, "unlocked_image_layers", 0),
    ],
}


@pytest.mark.parametrize("said", IDLE)
def test_settings_without_effect_are_refused_where_a_run_starts(said):
    made = Recipe()
    check_settings(made)
    IDLE[said](made)
    with pytest.raises(ValueError, match=f"^{said}: "):
        check_settings(made)


def test_the_recipes_that_come_along_have_effect():
    parser = cli.recipe_parser("", "")
    for path in cli.RECIPES.glob("*.yaml"):
        check_settings(cli.parse(parser, ["--recipe", path.stem])[0])


def test_two_locked_towers_are_refused_where_nothing_else_learns():
    config = tiny_config(unlocked_image_layers=0, unlocked_text_layers=0)
    made = recipe(8, bridge=1.0)
    model = tiny_model(config, word_tokenizer())
    check_learns(model, build_objective(made.losses))
    lock_layers(model, config)
    with pytest.raises(ValueError, match=r"^model\.unlocked_image_layers = 0: .*unlocked_text_layers.*losses\.bridge "):
        check_learns(model, build_objective(made.losses))
    check_learns(model, build_objective(recipe(8, bridge=1.0, contrastive=1.0).losses))
    independent = tiny_model(config, word_tokenizer(), independent=True)
    lock_layers(independent, config)
    check_learns(independent, build_objective(recipe(8, separation=1.0).losses))


def test_a_run_of_a_negative_seed_is_resumed_on_more_processes():
    """Earlier versions began such runs."""
    torch.manual_seed(-1)
    engine = SimpleNamespace(parameters=list, loss_scaler=None, ema=None)
    saved = SimpleNamespace(optimizer={"step": 2}, rng={}, state=SimpleNamespace(step=2))
    checkpoint.restore(engine, saved)
    assert torch.initial_seed() == 2 * 1_000_003 - 1
