"""Momentum copies of a model and the queues of their embeddings: float32, seen by neither autograd nor DeepSpeed.

They are no part of the module's parameters and buffers: DeepSpeed would cast them to half precision, in which an
average stands still, and spread them over the processes. Every process holds them whole, and all hold the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

MOMENTUM = "momentum."
"""Before the names of momentum weights in a checkpoint."""
AT_ONCE = 32
"""Parameters that are made whole together at ZeRO stage 3, about two layers' worth."""
Whole = Callable[[Iterable[nn.Parameter]], AbstractContextManager]


class Momentum:
    """Exponential average of a module's weights: w_m <- m w_m + (1 - m) w, once an optimizer step (Li et al. 2021).

    The copy is in evaluation mode (no dropout), and its weights ask for no gradient.
    """

    def __init__(self, module: nn.Module, share: float):
        self.share = share
        self.module = copy.deepcopy(module).float().requires_grad_(False).eval()

    @torch.no_grad()
    def follow(self, weights: dict[str, Tensor]) -> None:
        """weights: whole weights of the module, by name, some of them or all."""
        own = dict(self.module.named_parameters())
        mine = [own[name] for name in weights]
        theirs = [weight.detach().to(own[name]) for name, weight in weights.items()]
        torch._foreach_lerp_(mine, theirs, 1 - self.share)

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    def state(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load(self, state: dict[str, Tensor]) -> None:
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

    def follow(self, outputs: object, batch: dict[str, Tensor], whole: Whole, step: int = 0) -> None:
        """After optimizer step `step`, from 0: the momentum weights follow. Collective.

        whole: context in which the parameters given to it are whole on this process (ZeRO stage 3 has spread them).
        """
        named = list(self.named_parameters()) if self.momentum else []
        for first in range(0, len(named), AT_ONCE):
            some = dict(named[first : first + AT_ONCE])
            with whole(some.values()):
                self.momentum.follow(some)

    def outside_state(self) -> dict[str, Tensor]:
        """Momentum weights (and queues) by name; the same on every process."""
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
        self.counts = torch.zeros(2, dtype=torch.int64)  # where the next pair goes; how many pairs there are

    @property
    def filled(self) -> int:
        return int(self.counts[1])

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """image, text: (N, D) of the global batch in its order; ids: (N,) that tell the pictures."""
        size = len(self.image)
        if size == 0:
            return
        image, text, ids = image[-size:], text[-size:], ids[-size:]
        start, filled = self.counts.tolist()
        places = (torch.arange(len(image), device=self.image.device) + start) % size
        self.image[places], self.text[places], self.ids[places] = image.to(self.image), text.to(self.text), ids
        self.counts[0] = (start + len(image)) % size
        self.counts[1] = min(filled + len(image), size)

    def to(self, device: torch.device) -> None:
        self.image, self.text, self.ids = (rows.to(device) for rows in (self.image, self.text, self.ids))

    def state(self) -> dict[str, Tensor]:
        return {"image": self.image, "text": self.text, "ids": self.ids, "counts": self.counts}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
