"""EMA of a model's weights, in shares like the float32 weights that it follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modstruct.checkpoints import EMA, Piece, StoredTensors


class Weights(Protocol):
    """Of an Engine."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def span(self, parameter: Any) -> tuple[int, int]: ...
    def weight(self, parameter: nn.Parameter) -> Tensor: ...
    def pieces(self, parameter: Any, values: dict[str, Tensor] | None = None) -> dict[str, Piece]: ...


class ShardedEma:
    """w_ema <- d w_ema + (1 - d) w after each optimizer step, w the trained float32 weights (Polyak & Juditsky 1992).

    Each process keeps what its ZeRO stage makes it keep of w, at stages 1 to 3 a share of 4 bytes x weights. Unlike
    models/fusion/ema.py's, whose model is called in every step, it is read from checkpoints alone.
    """

    def __init__(self, weights: Weights, decay: float):
        self.weights, self.decay = weights, decay
        self._trained = [(name, p) for name, p in weights.parameters() if p.requires_grad]
        self.kept = {name: weights.weight(p).clone() for name, p in self._trained}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        pairs = [(self.kept[name], self.weights.weight(p)) for name, p in self._trained]
        mine, theirs = zip(*pairs, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)

    def pieces(self) -> dict[str, Piece]:
        """What this process writes of it, by name."""
        values = {name: {"weight": self.kept[name]} for name in self.kept}
        made = {name: self.weights.pieces(p, values[name]) for name, p in self._trained}
        return {f"{EMA}{name}": pieces["weight"] for name, pieces in made.items()}

    def load(self, stored: StoredTensors) -> None:
        """stored: all processes' pieces, of any number of processes and any stage."""
        for name, parameter in self._trained:
            self.kept[name].copy_(stored.range(f"{EMA}{name}", *self.weights.span(parameter)))
