"""Weights that a run begins with, where they are made one at a time."""

from __future__ import annotations

import torch
from tiny_models import tiny_config, tiny_model, word_tokenizer

from modstruct import distributed
from modstruct.models.deferred import Deferred
from modstruct.training.first_weights import FirstWeights


def test_buffers_are_made_where_the_model_computes(monkeypatch):
    """DeepSpeed leaves a model alone that is sharded: a causal mask stayed on the CPU beside a GPU's weights."""
    with Deferred(small=8) as deferred:
        model = tiny_model(tiny_config(), word_tokenizer())
    elsewhere = torch.device("meta")
    monkeypatch.setattr(distributed, "device", lambda: elsewhere)
    FirstWeights(model, deferred, None)
    assert {buffer.device for buffer in model.buffers()} == {elsewhere}
    assert len(list(model.buffers())) >= 1
