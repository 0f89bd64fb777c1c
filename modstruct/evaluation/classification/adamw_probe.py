"""A linear probe trained by AdamW in small batches: CyCLIP's protocol (Goel et al. 2022, its public code)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.features import HELD_ON_CPU, Features
from modstruct.evaluation.classification.logistic_regression import LinearClassifier


@dataclass(frozen=True)
class AdamWProbeConfig:
    """CyCLIP's values. The protocol takes the projected image features before normalisation."""

    epochs: int = 32
    learning_rate: float = 0.005
    """At the first step; decays to zero by half a cosine, without warm-up."""
    weight_decay: float = 0.01
    """Of the weights, not of the bias."""
    batch: int = 128

    def __post_init__(self) -> None:
        require_counts("adamw", self, ("epochs", "batch"))
        require(self.learning_rate > 0, "adamw.learning_rate", self.learning_rate, "above 0")
        require(self.weight_decay >= 0, "adamw.weight_decay", self.weight_decay, "at least 0")


def fit_by_adamw(
    features: Features, classes: int, config: AdamWProbeConfig, seed: int, device: torch.device, progress: bool = False
) -> tuple[LinearClassifier, list[float]]:
    """A classifier after config.epochs passes over the rows, and the mean loss of each pass.

    features: labels 0 … classes - 1. seed: of the initial weights (uniform within 1 / sqrt(D), as in torch's Linear)
    and of the order of rows in each pass. Up to 256 MiB of rows stay in memory, else each batch is read from the file.
    """
    count, dimension = len(features), features.dimension
    generator = torch.Generator().manual_seed(seed)
    bound = dimension**-0.5
    weight, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in ((classes, dimension), classes)
    )
    weight, bias = (v.to(device).requires_grad_() for v in (weight, bias))
    groups = [{"params": [weight], "weight_decay": config.weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    labels = torch.from_numpy(features.labels).to(device)
    held = features.read(np.arange(count), device) if 4 * count * dimension <= HELD_ON_CPU else None
    steps = config.epochs * math.ceil(count / config.batch)
    losses, step = [], 0
    with tqdm(total=steps, desc="probe", unit="step", disable=not progress, leave=False) as bar:
        for _ in range(config.epochs):
            total = torch.zeros((), device=device, dtype=torch.float64)
            for places in torch.randperm(count, generator=generator).split(config.batch):
                for group in optimizer.param_groups:
                    group["lr"] = cosine_rate(config.learning_rate, step, steps)
                places = places.sort().values
                rows = held[places.to(device)] if held is not None else features.read(places.numpy(), device)
                loss = _step(optimizer, weight, bias, rows, labels[places.to(device)])
                total += loss.double() * len(places)
                step += 1
                bar.update()
            losses.append(float(total) / count)
    found_weight, found_bias = (parameter.detach().double().cpu().numpy() for parameter in (weight, bias))
    return LinearClassifier(found_weight, found_bias, steps, "epochs"), losses


def cosine_rate(first: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to 0 at step `steps`."""
    return first * (1 + math.cos(math.pi * step / steps)) / 2


def _step(optimizer: torch.optim.Optimizer, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = cross_entropy(torch.addmm(bias, rows, weight.T), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()
