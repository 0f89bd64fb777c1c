"""Pairs of Gaussian factors, whose information about a target is known exactly.

An image and its text share factors s; each modality has private ones, p_V and p_T, and a nuisance, n_V and n_T, all of
them independent standard normal numbers. x_V = f_V(s, p_V, n_V) and x_T = f_T(s, p_T, n_T), by mixings f that are drawn
once, by the seed of the data, and have a left inverse: nothing is lost in them. A second view keeps the factors and
draws the nuisance anew. The downstream target Y has m numbers,

    Y = sqrt(1 - w) A s + sqrt(w) B p_V + e,   e ~ N(0, v I),   tr A A^T = tr B B^T = m,   w = LEVELS[level],
    I(X_V; Y) = I(X_V, X_T; Y) = 1/2 log det(I + ((1 - w) A A^T + w B B^T) / v),
    Delta_p = I(X_V; Y) - I(X_T; Y) = 1/2 log det(I + w B B^T / v).

By theorem 3.1 of Jiang et al. (2023) exactly aligned features lose at least Delta_p of what the inputs tell of Y, and
here no more than that if they keep s. The level changes Y alone, not the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct.errors import require, require_counts

LEVELS = {1: 0.0, 2: 0.25, 3: 0.75}
"""Share w of Y's signal that hangs on the image's private factors. Delta_p is 0, 4 log 2 = 2.77 and 4 log 4 = 5.55 of
I(X_V; Y) = 6.44 nats by default."""
MODALITIES = ("image", "text")
AUGMENTED = tuple(f"{modality}_augmented" for modality in MODALITIES)
WORLD, PAIRS, HELD_OUT = range(3)
"""Streams of random numbers, apart from each other."""
STEPS_AT_ONCE = 32
"""Whose pairs are drawn together."""
Mixing = Literal["nonlinear", "linear"]


@dataclass(frozen=True)
class Data:
    """The distribution of pairs, and how many are held out."""

    level: int = 2
    shared: int = 8
    private: int = 8
    """Private factors of each modality."""
    nuisance: int = 8
    view_noise: float = 1.0
    """Standard deviation of the nuisance; at 0 the two views of a pair are equal."""
    observed: int = 64
    """Numbers of an image, and of a text."""
    mixing: Mixing = "nonlinear"
    """nonlinear: Q leaky(W u + b), with leaky ReLU of slope 1/5; linear: W u. Columns of W and Q are orthogonal."""
    targets: int = 8
    """m, the numbers of Y."""
    target_noise: float = 0.25
    """Variance v of Y's noise; its signal has variance 1."""
    seed: int = 0
    """Of the mixings and of Y's directions."""
    probe_rows: int = 10_000
    """Held-out pairs that probes are fitted on, and means are taken of for centring."""
    test_rows: int = 2_000
    """Other held-out pairs, of which everything is measured."""

    def __post_init__(self) -> None:
        require(self.level in LEVELS, "data.level", self.level, f"one of {', '.join(map(str, LEVELS))}")
        require(self.mixing in get_args(Mixing), "data.mixing", self.mixing, f"one of {', '.join(get_args(Mixing))}")
        require_counts("data", self, ("shared", "private", "targets"))
        for name in ("nuisance", "seed", "view_noise"):
            require(0 <= getattr(self, name) < math.inf, f"data.{name}", getattr(self, name), "0 or more, and finite")
        least = self.shared + self.private + self.nuisance
        require(self.observed >= least, "data.observed", self.observed, f"at least {least}, for factors and nuisance")
        require(0 < self.target_noise < math.inf, "data.target_noise", self.target_noise, "above 0, and finite")
        require(self.probe_rows >= 1000, "data.probe_rows", self.probe_rows, "at least 1000, or the probes overfit")
        require(self.test_rows >= 100, "data.test_rows", self.test_rows, "at least 100")


class World:
    """Fixed mixings and directions of Y, and draws of pairs."""

    def __init__(self, data: Data):
        self.data = data
        random = np.random.default_rng([data.seed, WORLD])
        factors = data.shared + data.private + data.nuisance

        def mixed(rows: int, columns: int) -> np.ndarray:
            """Orthogonal rows or columns; squares add up to the number of rows."""
            tall = np.linalg.qr(random.standard_normal((max(rows, columns), min(rows, columns))))[0]
            return (tall if rows >= columns else tall.T) * (rows / min(rows, columns)) ** 0.5

        self.mixings = {}
        for modality in MODALITIES:
            into, out = mixed(data.observed, factors), mixed(data.observed, data.observed)
            parts = (into, random.standard_normal(data.observed) / 2, out)
            self.mixings[modality] = [torch.from_numpy(part).float() for part in parts]
        w = LEVELS[data.level]
        self.of_shared = (1 - w) ** 0.5 * mixed(data.targets, data.shared)
        self.of_private = w**0.5 * mixed(data.targets, data.private)

    def information(self) -> dict[str, float]:
        """Exact I(X_V; Y), I(X_T; Y) and Delta_p, in nats."""

        def half_log_det(*directions: np.ndarray) -> float:
            signal = sum(d @ d.T for d in directions)
            return float(np.linalg.slogdet(np.eye(self.data.targets) + signal / self.data.target_noise)[1]) / 2

        image, gap = half_log_det(self.of_shared, self.of_private), half_log_det(self.of_private)
        return {"image": image, "text": image - gap, "gap": gap}

    def draw(self, rows: int, *stream: int) -> dict[str, Tensor]:
        """Pairs as a function of the stream, (rows, …) float32 each: shared, image_private, text_private; image, text
        and their second views, …_augmented; target and target_mean, Y and its mean given the factors."""
        data = self.data
        sizes = [data.shared, data.private, data.private, *[data.nuisance] * 4, data.targets]
        normal = np.random.default_rng([data.seed, *stream]).standard_normal((rows, sum(sizes)), dtype=np.float32)
        shared, image, text, *nuisances, noise = torch.from_numpy(normal).split(sizes, dim=1)
        drawn = {"shared": shared, "image_private": image, "text_private": text}
        for name, nuisance in zip((*MODALITIES, *AUGMENTED), nuisances, strict=True):
            modality = name.removesuffix("_augmented")
            into, bias, out = self.mixings[modality]
            factors = torch.cat([shared, drawn[f"{modality}_private"], data.view_noise * nuisance], dim=1)
            drawn[name] = factors @ into.T
            if data.mixing == "nonlinear":
                drawn[name] = F.leaky_relu(drawn[name] + bias, 0.2) @ out.T
        of_shared, of_private = (torch.from_numpy(d).float() for d in (self.of_shared, self.of_private))
        drawn["target_mean"] = shared @ of_shared.T + image @ of_private.T
        drawn["target"] = drawn["target_mean"] + data.target_noise**0.5 * noise
        return drawn

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Pairs for each step, which never repeat; the first are the same however many steps there are."""
        for step in range(steps):
            place = step % STEPS_AT_ONCE
            if place == 0:
                drawn = self.draw(STEPS_AT_ONCE * batch, PAIRS, seed, step)
            yield {name: rows[place * batch :][:batch] for name, rows in drawn.items()}
