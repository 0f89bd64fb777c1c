"""Checkpoints of tensors at hand, written as one process writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from modstruct import checkpoints
from modstruct.checkpoints import Piece, TrainState, Written
from modstruct.distributed.side_channel import SideChannel


@dataclass
class Whole:
    """What a checkpoint is to hold; see checkpoints.Checkpoint."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: TrainState
    optimizer: dict
    recipe: dict
    momentum: Mapping[str, Tensor] = field(default_factory=dict)


def write(target: Path, whole: Whole, tokenizer: checkpoints.Saved) -> None:
    sections = {name: getattr(whole, name) for name in ("weights", "moments", "rng", "momentum")}
    pieces = {name: {n: Piece.whole(value) for n, value in tensors.items()} for name, tensors in sections.items()}
    written = Written(pieces, whole.state, whole.optimizer, whole.recipe)
    checkpoints.write(target, written, tokenizer, 1 << 30, SideChannel())
