"""EMA copies of a model and the queues of their embeddings: float32, seen by neither autograd nor DeepSpeed.

They are no part of the module's parameters and buffers: DeepSpeed would cast them to half precision, in which an
average stands still. Below ZeRO stage 3 every process holds them whole, and all hold the same. At stage 3 the copy's
weights are sharded (sharded_weights.py) and average the float32 masters, where otherwise they average the working
copies, which half precision has rounded. The queue is whole everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from modstruct.models.fusion.sharded_weights import ShardedWeights
from modstruct.models.protocol import Batch, LocalPart, TrainableModel

EMA = "momentum."
"""Before the names of EMA weights in a checkpoint (ALBEF's word)."""


class EmaWeights:
    """Moving average of a module's weights: w_m <- m w_m + (1 - m) w, once an optimizer step (Li et al. 2021).

    The copy is in evaluation mode (no dropout), and its weights have no gradient.
    """

    def __init__(self, module: nn.Module, momentum: float):
        self.momentum = momentum
        self.module = copy.deepcopy(module).float().requires_grad_(False).eval()
        self.sharded: ShardedWeights | None = None
        self._part: LocalPart = nn.Parameter.detach

    def shard(self, part: LocalPart) -> None:
        """Keep this process's part of the weights alone from now on. part: of a parameter of the averaged module."""
        self.sharded, self._part = ShardedWeights(self.module), part

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter]) -> None:
        """weights: of the averaged module, by name."""
        if self.sharded:
            self.sharded.update(weights, self.momentum, self._part)
            return
        own = dict(self.module.named_parameters())
        mine: list[Tensor] = [own[name] for name in weights]
        theirs = [weight.detach().to(own[name]) for name, weight in weights.items()]
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)

    def state(self) -> dict[str, Tensor]:
        """Whole weights by name; once sharded, on the main process alone, and collective."""
        return self.sharded.state() if self.sharded else dict(self.module.state_dict())


class EmaModel(TrainableModel):
    """A model with an EMA copy of itself, if `start_ema` makes one at the end of its construction."""

    def __init__(self) -> None:
        super().__init__()
        # In a list, so that torch does not take it for a part of this module.
        self._ema: list[EmaWeights] = []

    def start_ema(self, momentum: float) -> None:
        self._ema = [EmaWeights(self, momentum)]

    @property
    def ema(self) -> EmaWeights | None:
        return self._ema[0] if self._ema else None

    def shard_ema(self, part: LocalPart) -> None:
        for ema in self._ema:
            ema.shard(part)

    def update_ema(self, outputs: Mapping[str, Tensor], batch: Batch, step: int) -> None:
        for ema in self._ema:
            ema.update(dict(self.named_parameters()))

    def ema_state_dict(self) -> dict[str, Tensor]:
        return {f"{EMA}{name}": value for ema in self._ema for name, value in ema.state().items()}

    def load_ema_state_dict(self, state: dict[str, Tensor]) -> None:
        for ema in self._ema:
            ema.module.load_state_dict({n.removeprefix(EMA): v for n, v in state.items() if n.startswith(EMA)})

    def ema_to(self, device: torch.device) -> None:
        for ema in self._ema:
            ema.module.to(device)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """In it the EMA copy, whose weights are float32, computes in what this model computes in."""
        half = next(self.parameters()).dtype
        return torch.autocast(device.type, half, enabled=half != torch.float32)


class FeatureQueue:
    """The last `size` pairs of EMA embeddings, oldest replaced first; any batch size fits.

    It holds what has come: at the start nothing, where ALBEF's code begins with random vectors.
    """

    def __init__(self, size: int, dimension: int):
        self.image = torch.zeros(size, dimension)
        self.text = torch.zeros(size, dimension)
        self.ids = torch.zeros(size, dtype=torch.int64)
        self.place = 0
        """Where the next pair goes. Plain numbers, which no GPU waits to be asked for."""
        self.filled = 0
        """How many pairs there are."""

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """image, text: (N, D) of the global batch in its order; ids: (N,) that tell the images."""
        size = len(self.image)
        if size == 0:
            return
        image, text, ids = image[-size:], text[-size:], ids[-size:]
        places = (torch.arange(len(image), device=self.image.device) + self.place) % size
        self.image[places], self.text[places], self.ids[places] = image.to(self.image), text.to(self.text), ids
        self.place = (self.place + len(image)) % size
        self.filled = min(self.filled + len(image), size)

    def to(self, device: torch.device) -> None:
        self.image, self.text, self.ids = (rows.to(device) for rows in (self.image, self.text, self.ids))

    def state(self) -> dict[str, Tensor]:
        """counts: the next pair's place, and how many pairs there are."""
        counts = torch.tensor([self.place, self.filled])
        return {"image": self.image, "text": self.text, "ids": self.ids, "counts": counts}

    def load(self, state: dict[str, Tensor]) -> None:
        """state: all of `state()`, or nothing."""
        state = dict(state)
        if "counts" in state:
            self.place, self.filled = state.pop("counts").tolist()
        for name, value in state.items():
            getattr(self, name).copy_(value)
