"""Momentum copies of a model and the queues of their embeddings: float32, seen by neither autograd nor DeepSpeed.

They are no part of the module's parameters and buffers: DeepSpeed would cast them to half precision, in which an
average stands still. Below ZeRO stage 3 every process holds them whole, and all hold the same. At stage 3 the copy's
weights are spread over the processes (partition.py), and follow the float32 masters, where otherwise they follow the
working copies, which half precision has rounded. The queue is whole everywhere.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from modstruct.models.fusion.partition import Part, PartitionedWeights

MOMENTUM = "momentum."
"""Before the names of momentum weights in a checkpoint."""


class Momentum:
    """Exponential average of a module's weights: w_m <- m w_m + (1 - m) w, once an optimizer step (Li et al. 2021).

    The copy is in evaluation mode (no dropout), and its weights ask for no gradient.
    """

    def __init__(self, module: nn.Module, share: float):
        self.share = share
        self.module = copy.deepcopy(module).float().requires_grad_(False).eval()
        self.partition: PartitionedWeights | None = None
        self._part: Part | None = None

    def spread(self, part: Part) -> None:
        """Keep this process's part of the weights alone from now on.

        part: this process's part of a parameter of the module that is followed, as partition.py has it.
        """
        self.partition, self._part = PartitionedWeights(self.module), part

    @torch.no_grad()
    def follow(self, weights: dict[str, nn.Parameter]) -> None:
        """weights: of the module that is followed, by name."""
        if self.partition:
            self.partition.follow(weights, self.share, self._part)
            return
        own = dict(self.module.named_parameters())
        mine = [own[name] for name in weights]
        theirs = [weight.detach().to(own[name]) for name, weight in weights.items()]
        torch._foreach_lerp_(mine, theirs, 1 - self.share)

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    def state(self) -> dict[str, Tensor]:
        """Whole weights by name; once spread, on the main process alone, and collective."""
        return self.partition.state() if self.partition else dict(self.module.state_dict())

    def load(self, state: dict[str, Tensor]) -> None:
        """Before they are spread."""
        self.module.load_state_dict(state)


class FollowedModel(nn.Module):
    """A model with a momentum copy of itself, if `start_momentum` makes one at the end of its construction."""

    batch_fields: frozenset[str] = frozenset()
    """Extra fields of a batch that it trains on."""

    def __init__(self):
        super().__init__()
        self._outside = []

    def start_momentum(self, share: float) -> None:
        # In a list, so that torch does not take it for a part of this module.
        self._outside = [Momentum(self, share)]

    @property
    def momentum(self) -> Momentum | None:
        return self._outside[0] if self._outside else None

    def spread_momentum(self, part: Part) -> None:
        """At ZeRO stage 3, once DeepSpeed has spread the weights: spread the copy's like them. part: see Momentum."""
        if self.momentum:
            self.momentum.spread(part)

    def follow(self, outputs: object, batch: dict[str, Tensor], step: int = 0) -> None:
        """After optimizer step `step`, from 0: the momentum weights follow. Collective."""
        if self.momentum:
            self.momentum.follow(dict(self.named_parameters()))

    def outside_state(self) -> dict[str, Tensor]:
        """Momentum weights (and queues) by name; whole on the main process, and collective once they are spread."""
        state = self.momentum.state() if self.momentum else {}
        return {f"{MOMENTUM}{name}": value for name, value in state.items()}

    def load_outside_state(self, state: dict[str, Tensor]) -> None:
        if self.momentum:
            self.momentum.load({n.removeprefix(MOMENTUM): v for n, v in state.items() if n.startswith(MOMENTUM)})

    def outside_to(self, device: torch.device) -> None:
        if self.momentum:
            self.momentum.to(device)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """In it the momentum copy, whose weights are float32, computes in what this model computes in."""
        half = next(self.parameters()).dtype
        return torch.autocast(device.type, half, enabled=half != torch.float32)


class FeatureQueue:
    """The last `size` pairs of momentum embeddings, oldest replaced first; any batch size fits.

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
