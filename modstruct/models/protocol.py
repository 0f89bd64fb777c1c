"""What training may ask of a model, with a default for every model that has none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from modstruct.checkpoints import Piece, require_same_names
from modstruct.losses.protocol import SharedScalar

Batch = dict[str, Tensor]
LocalPart = Callable[[nn.Parameter], Tensor]
"""This process's part of a weight under ZeRO stage 3: 1-D, ceil(elements / processes) long; past its end, anything."""


class TokenEncoders(Protocol):
    """What makes tokens of images and texts, apart from each other; see models/fusion/backbone.py."""

    image_size: int

    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor: ...
    def mask(self, ids: Tensor) -> Tensor: ...


class Matcher(Protocol):
    """A model that scores pairs by matching (ITM), as models/fusion/pretraining.py does."""

    @property
    def backbone(self) -> TokenEncoders: ...
    def match(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor: ...
    def __call__(self, batch: Batch) -> dict[str, Tensor]: ...


class TrainableModel(nn.Module):
    """A model that maps a batch of tensors to the fields of embeddings.Outputs that the batch allows."""

    embed_dim: int
    """Dimension of the shared embeddings."""
    batch_fields: frozenset[str] = frozenset()
    """Extra fields of a batch (data/shards/loader.py) that it trains on."""
    constants: frozenset[str] = frozenset()
    """Outputs that have no gradient."""
    shared_outputs: frozenset[str] = frozenset({"logit_scale"})
    """Outputs that it makes once for a batch and not for each row."""
    whole_fields: frozenset[str] = frozenset()
    """Fields that it takes of the whole batch, by row, where that comes in micro-batches: for `exchange`, `update_ema`
    and the counts of labelled rows."""
    to_open_clip: Mapping[str, str] = {}
    """Prefixes of its weights' names -> open_clip's; a `.T` at the end of the latter transposes the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.new_weights: frozenset[str] = frozenset()
        """Of its parameters, by name, those that pretrained weights did not bring; none if it started from none."""
        self.scalar_limits: dict[str, tuple[float, float]] = {}
        """Learnt numbers by name, with the limits that training keeps them in."""

    def add_scalars(self, scalars: Sequence[SharedScalar]) -> None:
        """Own the numbers that losses declare."""
        for scalar in scalars:
            # Shape (1,): DeepSpeed cannot broadcast a parameter without dimensions at stages 2 and 3.
            self.register_parameter(scalar.name, nn.Parameter(torch.tensor([scalar.initial])))
            self.scalar_limits[scalar.name] = (scalar.low, scalar.high)
        self.shared_outputs = self.shared_outputs | {scalar.name for scalar in scalars}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: half precision where DeepSpeed's working copies have it, be it without norms and scalars."""
        dtypes = (parameter.dtype for parameter in self.parameters())
        return next((dtype for dtype in dtypes if dtype != torch.float32), torch.float32)

    def clamped(self, name: str) -> Tensor:
        """A learnt number between its limits, (1,) float32.

        DeepSpeed's working copy may lie beyond a limit by one step; its master copy is clamped after every step.
        """
        return Clamp.apply(self.get_parameter(name).float(), *self.scalar_limits[name])

    def starting_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this model starts from, by its own names. weights: a pre-trained model's, by ours."""
        return weights

    @property
    def matcher(self) -> Matcher | None:
        """Itself, if it scores pairs by matching (ITM), which reranks retrieval."""
        return None

    def trunks(self) -> dict[str, nn.Module]:
        """The parts that models/build.py compiles or recomputes, by name."""
        return {}

    def exchange(self, outputs: Mapping[str, Tensor], batch: Batch) -> Callable[[], Batch]:
        """What micro-batches need of the whole batch, made from its embeddings: fields to cut by rows like the batch's.

        Called before the losses' backward, and what it returns after it, so that the host waits for no device.
        """
        return dict

    def update_ema(self, outputs: Mapping[str, Tensor], batch: Batch, step: int) -> None:
        """After optimizer step `step`, from 0: the EMA weights follow. Collective."""

    def shard_ema(self, part: LocalPart) -> None:
        """At ZeRO stage 3, once DeepSpeed has sharded the weights: shard the EMA weights like them."""

    def ema_state_dict(self) -> dict[str, Tensor]:
        """EMA weights and queues by name, whole; before they are sharded."""
        return {}

    def ema_pieces(self) -> dict[str, Piece]:
        """What this process writes of them, sharded or not: together the processes write all."""
        return {name: Piece.share(value) for name, value in self.ema_state_dict().items()}

    def load_ema_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Before they are sharded."""

    def ema_to(self, device: torch.device) -> None:
        """Move EMA weights and queues, which are no part of the module."""


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """A checkpoint's weights and buffers into the model. path: for the error if they belong to another one."""
    require_same_names(model.state_dict(), weights, path)
    copy_into(model, weights)


@torch.no_grad()
def copy_into(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weights and buffers of the same names into a module, one at a time: they may be read as they are asked for.

    Deferred ones (models/deferred.py) are left: who shards them gives them their values.
    """
    for name, value in module.state_dict().items():
        if not value.is_meta:
            value.copy_(weights[name])


class Clamp(torch.autograd.Function):
    """The value clamped, the gradient as it is: a hard clamp's gradient is 0 outside, and nothing would come back."""

    @staticmethod
    def forward(ctx, value: Tensor, low: float, high: float) -> Tensor:
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # torch's is *Any
        return gradient, None, None
