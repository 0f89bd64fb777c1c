"""CyCLIP's protocol: agrees with a plain transcription of it, and with itself from a file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from probe_cases import clouds, features_of

from modstruct.evaluation.classification.linear import RowBlocks
from modstruct.evaluation.classification.linear_probe import AdamWProbeConfig, fit_by_adamw

CPU = torch.device("cpu")


def test_it_is_adamw_with_a_cosine_and_no_decay_of_the_bias():
    rows, labels = clouds(50, 6, 4, seed=0)
    found, losses = fit_by_adamw(features_of(rows, labels), 4, AdamWProbeConfig(epochs=3, batch=16), seed=5, device=CPU)
    generator = torch.Generator().manual_seed(5)
    linear = torch.nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight.uniform_(-(6**-0.5), 6**-0.5, generator=generator)
        linear.bias.uniform_(-(6**-0.5), 6**-0.5, generator=generator)
    optimizer = torch.optim.AdamW(
        [{"params": [linear.bias], "weight_decay": 0}, {"params": [linear.weight], "weight_decay": 0.01}]
    )
    step, seen = 0, []
    for _ in range(3):
        order = torch.randperm(50, generator=generator)
        for batch in (order[:16], order[16:32], order[32:48], order[48:]):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (1 + math.cos(math.pi * step / 12)) * 0.005
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                linear(torch.from_numpy(rows)[batch]), torch.from_numpy(labels)[batch]
            )
            loss.backward()
            optimizer.step()
            seen.append(loss.item() * len(batch))
            step += 1
    np.testing.assert_allclose(found.weight, linear.weight.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found.bias, linear.bias.detach().numpy(), atol=1e-5)
    assert losses == pytest.approx([sum(seen[i : i + 4]) / 50 for i in (0, 4, 8)], rel=1e-5)


def test_rows_from_the_file_and_rows_in_memory_give_the_same(tmp_path):
    rows, labels = clouds(64, 5, 3, seed=1)
    np.save(tmp_path / "rows.npy", rows)
    held, _ = fit_by_adamw(features_of(rows, labels), 3, AdamWProbeConfig(epochs=2, batch=10), 0, CPU)
    mapped = features_of(np.load(tmp_path / "rows.npy", mmap_mode="r"), labels)
    np.testing.assert_array_equal(
        fit_by_adamw(mapped, 3, AdamWProbeConfig(epochs=2, batch=10), 0, CPU)[0].weight, held.weight
    )


def test_it_learns_separable_classes():
    (rows, labels), (others, truth) = clouds(600, 16, 5, seed=2), clouds(200, 16, 5, seed=3)
    found, losses = fit_by_adamw(features_of(rows, labels), 5, AdamWProbeConfig(), 0, CPU)
    ahead, _ = found.ahead(RowBlocks(features_of(others, truth), CPU))
    assert np.mean(ahead == 0) > 0.95
    assert losses[-1] < losses[0] / 5
    assert len(losses) == 32


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"weight_decay": -0.1}])
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"adamw.{next(iter(wrong))} = "):
        AdamWProbeConfig(**wrong)
