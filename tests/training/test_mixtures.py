"""Several sources: how an epoch draws them is said, and losses and counts are told for each."""

from __future__ import annotations

import pytest
import torch
from crafted_shards import config, write_shards

from modstruct.config import Recipe, Source
from modstruct.data.faults import BadSampleCounter
from modstruct.data.shards.loader import TrainBatch, train_order
from modstruct.data.shards.samples import open_samples
from modstruct.losses.contrastive import row_losses
from modstruct.training.pretrain import Pretraining, describe_mixture
from modstruct.training.step import StepReport


def test_a_mixture_and_what_it_does_to_an_epoch_are_described(tmp_path):
    small, large = (write_shards(tmp_path / str(size), [size]) for size in (10, 30))
    sources = [Source(small, [1, 3], max_repeats=1.5, name="own"), Source(large, 1)]
    samples = open_samples(sources, config(tmp_path), "data.train")
    length = train_order(samples, config(tmp_path), 0, 4).epoch_samples
    assert [*describe_mixture(samples, length)] == [
        "data.train.max_repeats: an epoch is 20 of 40 samples long",
        "Epoch 0 draws each sample of own 1 times, source_1 0.333 times",
        "Epoch 1 and later draws each sample of own 1.5 times, source_1 0.167 times",
    ]
    assert samples.drawn == f"{samples.fingerprint} [[1, 3], 1] repeats [1.5, None]"
    assert [*describe_mixture(open_samples([Source(small)], config(tmp_path), "data.train"), 10)] == []


def test_losses_and_counts_are_told_by_source(tmp_path):
    sources = [Source(write_shards(tmp_path / name, [4]), name=name) for name in ("web", "own", "none")]
    run = Pretraining(Recipe(data=config(tmp_path)), "ds_configs/zero2.json")
    run.samples = open_samples(sources, run.recipe.data, "data.train")
    image, text = (torch.nn.functional.normalize(torch.randn(6, 5), dim=1) for _ in range(2))
    outputs = {"image": image, "text": text, "logit_scale": torch.tensor([10.0])}
    report = StepReport(torch.zeros(()), {}, outputs)
    parts = [TrainBatch({}, sources=[0, 1, 1]), TrainBatch({}, sources=[0, 1, 0])]
    found = run.step_metrics(report, parts)
    losses = row_losses(outputs, image, text)
    assert found["loss_by_source/web"] == pytest.approx(losses[[0, 3, 5]].mean().item())
    assert found["loss_by_source/own"] == pytest.approx(losses[[1, 2, 4]].mean().item())
    assert "loss_by_source/none" not in found
    told = run._logged(report, parts, BadSampleCounter("data.train", 0.1), {"bad_samples/own": 3})
    assert {name: value for name, value in told.items() if name.startswith("data/")} == {
        "data/bad_samples": 0,
        "data/bad_samples/web": 0,
        "data/bad_samples/own": 3,
        "data/bad_samples/none": 0,
    }
