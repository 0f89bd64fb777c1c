"""EMA weights of a model and queues of its embeddings: float32, outside autograd and DeepSpeed.

They are not among the module's parameters and buffers: DeepSpeed would cast them to half precision, in which an average
stands still. Below ZeRO stage 3 every process holds them whole, and all hold the same. At stage 3 the EMA weights are
sharded and average the float32 masters, where otherwise they average the working weights, which half precision has
rounded. The queue is whole everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Self, cast

import torch
from torch import Tensor, nn

from modstruct import distributed
from modstruct.checkpoints import EMA, Piece
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.protocol import Batch, LocalPart, TrainableModel

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class EmaWeights:
    """Moving average of a module's weights: w_m <- m w_m + (1 - m) w, once an optimizer step (Li et al. 2021).

    module: the model with the averaged weights, without gradients, in evaluation mode (no dropout).
    """

    def __init__(self, module: nn.Module, momentum: float):
        self.momentum = momentum
        self.module = copy.deepcopy(module).float().requires_grad_(False).eval()
        self.sharded: ShardedWeights | None = None
        self._part: LocalPart = nn.Parameter.detach

    def shard(self, part: LocalPart) -> None:
        """Keep this process's part of the weights alone. part: of a parameter of the trained module."""
        self.sharded, self._part = ShardedWeights(self.module), part

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter]) -> None:
        """weights: of the trained module, by name."""
        if self.sharded:
            self.sharded.update(weights, self.momentum, self._part)
            return
        own = dict(self.module.named_parameters())
        mine: list[Tensor] = [own[name] for name in weights]
        theirs = [weight.detach().to(own[name]) for name, weight in weights.items()]
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)

    def pieces(self) -> dict[str, Piece]:
        """What this process writes of the weights, by name."""
        if self.sharded:
            return self.sharded.pieces()
        return {name: Piece.share(value) for name, value in self.module.state_dict().items()}


class EmaModel(TrainableModel):
    """A model on the fusion model's backbone, with EMA weights if the end of its construction calls `start_ema`."""

    backbone: Backbone

    def __init__(self) -> None:
        super().__init__()
        # In a list, so that torch does not register it as a submodule.
        self._ema: list[EmaWeights] = []

    def trunks(self) -> dict[str, nn.Module]:
        """The three encoders."""
        return self.backbone.trunks()

    def start_ema(self, momentum: float) -> None:
        self._ema = [EmaWeights(self, momentum)]

    @property
    def ema(self) -> EmaWeights | None:
        return self._ema[0] if self._ema else None

    @property
    def ema_model(self) -> Self:
        """This model with the EMA weights."""
        return cast(Self, self._ema[0].module)

    def shard_ema(self, part: LocalPart) -> None:
        for ema in self._ema:
            ema.shard(part)

    def update_ema(self, outputs: Mapping[str, Tensor], batch: Batch, step: int) -> None:
        for ema in self._ema:
            ema.update(dict(self.named_parameters()))

    def ema_state_dict(self) -> dict[str, Tensor]:
        return {f"{EMA}{name}": value for ema in self._ema for name, value in ema.module.state_dict().items()}

    def ema_pieces(self) -> dict[str, Piece]:
        return {f"{EMA}{name}": piece for ema in self._ema for name, piece in ema.pieces().items()}

    @torch.no_grad()
    def load_ema_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in EmaModel.ema_state_dict(self).items():
            value.copy_(state[name])

    def ema_to(self, device: torch.device) -> None:
        for ema in self._ema:
            ema.module.to(device)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """In which the EMA model, whose weights are float32, computes in this model's precision."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)


class ShardedWeights:
    """Shards the weights of a module without gradients, which every process then calls as before.

    Process p of W keeps elements [p s, (p + 1) s) of every flattened weight, s = ceil(elements / W), zero-padded, as at
    ZeRO stage 3. A block is an entry of a list of modules (a transformer's layer), or a module without such a list
    (embeddings, a head). Its weights are gathered when it, or a module in it, is called, and released at the return. A
    module that another block calls too (the keys and values that both blocks of an NLVR2 layer use) gathers its own
    block.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.blocks = [_Block(modules, weights) for modules, weights in _blocks(module, "") if weights]

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter], momentum: float, part: LocalPart) -> None:
        """w <- momentum w + (1 - momentum) weights. part: this process's part of a weight, (s,)."""
        for block in self.blocks:
            mine = list(block.parts().values())
            theirs = [part(weights[name]).detach().to(block.kept) for name in block.weights]
            torch._foreach_lerp_(mine, theirs, 1 - momentum)

    def pieces(self) -> dict[str, Piece]:
        """This process's parts of the weights, and its share of persistent buffers, by name."""
        pieces = {name: Piece.share(value) for name, value in self.module.state_dict().items() if value.numel()}
        for block in self.blocks:
            for (name, part), shape in zip(block.parts().items(), block.shapes, strict=True):
                start = min(distributed.rank() * len(part), shape.numel())
                pieces[name] = Piece(part[: shape.numel() - start], start, tuple(shape))
        return pieces

    @property
    def local_elements(self) -> int:
        """Elements of weights in this process's memory now."""
        whole = sum(weight.numel() for block in self.blocks for weight in block.weights.values())
        return whole + sum(len(block.kept) for block in self.blocks)


class _Block:
    """Weights that are gathered together. kept: this process's parts, concatenated."""

    def __init__(self, modules: list[nn.Module], weights: dict[str, nn.Parameter]):
        self.weights = weights
        self.shapes = [weight.shape for weight in weights.values()]
        self.sizes = [-(-weight.numel() // distributed.world_size()) for weight in weights.values()]
        self.kept = next(iter(weights.values())).new_zeros(sum(self.sizes))
        for weight, part in zip(weights.values(), self.parts().values(), strict=True):
            first = distributed.rank() * len(part)
            mine = weight.detach().flatten()[first : first + len(part)]
            part[: len(mine)].copy_(mine)
            weight.data = weight.new_empty(0)
        self.users = 0
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.fetch())
            module.register_forward_hook(lambda *_: self.release(), always_call=True)

    def parts(self) -> dict[str, Tensor]:
        """This process's part of each weight, a view."""
        return dict(zip(self.weights, self.kept.split(self.sizes), strict=True))

    def fetch(self) -> None:
        """Gather the weights for one more module. Collective."""
        self.users += 1
        if self.users > 1:
            return
        of_all = distributed.gather(self.kept).view(distributed.world_size(), -1)
        parts = of_all.split(self.sizes, dim=1)
        for weight, shape, part in zip(self.weights.values(), self.shapes, parts, strict=True):
            weight.data = part.reshape(-1)[: shape.numel()].view(shape)

    def release(self) -> None:
        """After the last module, keep the parts alone."""
        self.users -= 1
        if self.users == 0:
            for weight in self.weights.values():
                weight.data = weight.new_empty(0)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[list[nn.Module], dict[str, nn.Parameter]]]:
    """The modules of each block, and its weights by name."""
    if not any(isinstance(part, _CONTAINERS) for part in module.modules()):
        yield list(module.modules()), dict(module.named_parameters(prefix))
        return
    dot = f"{prefix}." if prefix else ""
    yield [module], {f"{dot}{name}": weight for name, weight in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        yield from _blocks(child, f"{dot}{name}")


class FeatureQueue:
    """The last `size` pairs of EMA embeddings, oldest replaced first; any batch size fits.

    Empty at the start, where ALBEF's code begins with random vectors.
    """

    def __init__(self, size: int, dimension: int):
        self.image = torch.zeros(size, dimension)
        self.text = torch.zeros(size, dimension)
        self.ids = torch.zeros(size, dtype=torch.int64)
        self.place = 0
        """Where the next pair goes; like `filled` a plain number, so that no step waits for the GPU."""
        self.filled = 0
        """How many pairs there are."""

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """image, text: (N, D) of the global batch in its order. ids: (N,), of the images."""
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
