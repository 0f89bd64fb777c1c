"""The EMA of all weights against its formula, and the recipes that may ask for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from modstruct.config import EvaluationConfig, FinetuneRecipe, Recipe, TrainConfig
from modstruct.training.ema import ShardedEma


class HeldShare:
    """An engine that keeps the first half of the first weight, all of the second, and nothing of the third."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.ParameterList([torch.randn(3, 2), torch.randn(4), torch.randn(5)])
        self.ends = {"0": 3, "1": 4, "2": 0}

    def parameters(self):
        return self.model.named_parameters()

    def weight(self, parameter):
        (name,) = (name for name, p in self.parameters() if p is parameter)
        return parameter.detach().flatten()[: self.ends[name]]


def test_the_ema_follows_the_share_of_the_weights_that_is_kept():
    engine = HeldShare()
    ema = ShardedEma(engine, decay=0.9)
    expected = {name: engine.weight(p).double() for name, p in engine.parameters()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in engine.model:
                parameter += torch.randn_like(parameter)
        ema.update()
        for name, parameter in engine.parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * engine.weight(parameter).double()
    assert {name: len(kept) for name, kept in ema.kept.items()} == engine.ends
    for name, kept in ema.kept.items():
        torch.testing.assert_close(kept.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_what_cannot_have_an_ema_is_refused_by_name():
    train, measured = TrainConfig(steps=1, ema_decay=0.9), EvaluationConfig(ema=True)
    assert replace(Recipe(), train=train, evaluation=measured).evaluation.ema
    assert replace(Recipe(), framework="fusion", losses=FinetuneRecipe().losses, evaluation=measured).evaluation.ema
    with pytest.raises(ValueError, match=r"evaluation.ema = True: there is no EMA: give train.ema_decay"):
        replace(Recipe(), evaluation=measured)
    with pytest.raises(ValueError, match=r"train.ema_decay = 0.9: a fusion model's EMA is its momentum encoders"):
        replace(Recipe(), framework="fusion", losses=FinetuneRecipe().losses, train=train)
    with pytest.raises(ValueError, match=r"train.ema_decay = 0.9: fine-tuning has task.momentum"):
        replace(FinetuneRecipe(), train=train)
    with pytest.raises(ValueError, match=r"train.ema_decay = 1.0: from 0 to below 1"):
        TrainConfig(steps=1, ema_decay=1.0)
