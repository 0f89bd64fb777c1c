"""A module's weights sharded over the processes: each keeps about 1/W of them, and gathers a block's while it runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modstruct import distributed
from modstruct.models.protocol import LocalPart

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class ShardedWeights:
    """Takes over the weights of a module without gradients; its modules are then called as before, by every process.

    Process p of W keeps elements [p s, (p + 1) s) of every flattened weight, s = ceil(elements / W), zeros after its
    end, as ZeRO stage 3 has it. A block is what lies in a list of modules (a layer of a transformer), or else a module
    that holds no such list (word, position and type vectors, a head). Its weights are whole from its call, or that of a
    module in it, to the return. So what is whole at a time is one block, and what calls it holds itself; a module that
    another block calls as well (the keys and values that both blocks of NLVR2's layers use) brings its own block.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.blocks = [_Block(modules, weights) for modules, weights in _blocks(module, "") if weights]

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter], momentum: float, part: LocalPart) -> None:
        """w <- momentum w + (1 - momentum) of the weights given. part: this process's part of one of them, (s,)."""
        for block in self.blocks:
            mine = list(block.parts().values())
            theirs = [part(weights[name]).detach().to(block.kept) for name in block.weights]
            torch._foreach_lerp_(mine, theirs, 1 - momentum)

    def state(self) -> dict[str, Tensor]:
        """Whole weights and persistent buffers by name, on the main process's CPU; nothing on others. Collective."""
        main = distributed.is_main()
        state = {name: value.cpu() for name, value in self.module.state_dict().items()} if main else {}
        for block in self.blocks:
            block.fetch()
            if main:
                state |= {name: weight.detach().cpu().clone() for name, weight in block.weights.items()}
            block.release()
        return state

    @property
    def local_elements(self) -> int:
        """Elements of weights that are on this process now."""
        whole = sum(weight.numel() for block in self.blocks for weight in block.weights.values())
        return whole + sum(len(block.kept) for block in self.blocks)


class _Block:
    """Weights that are gathered together. kept: this process's parts of them, one behind the other."""

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
        """This process's part of each weight, a view of what is kept."""
        return dict(zip(self.weights, self.kept.split(self.sizes), strict=True))

    def fetch(self) -> None:
        """One more module uses the weights, which are whole from now on. Collective."""
        self.users += 1
        if self.users > 1:
            return
        of_all = distributed.gather(self.kept).view(distributed.world_size(), -1)
        parts = of_all.split(self.sizes, dim=1)
        for weight, shape, part in zip(self.weights.values(), self.shapes, parts, strict=True):
            weight.data = part.reshape(-1)[: shape.numel()].view(shape)

    def release(self) -> None:
        """One module less; nothing but the parts stays after the last."""
        self.users -= 1
        if self.users == 0:
            for weight in self.weights.values():
                weight.data = weight.new_empty(0)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[list[nn.Module], dict[str, nn.Parameter]]]:
    """Modules that use the weights of a block, and these by name."""
    if not any(isinstance(part, _CONTAINERS) for part in module.modules()):
        yield list(module.modules()), dict(module.named_parameters(prefix))
        return
    dot = f"{prefix}." if prefix else ""
    yield [module], {f"{dot}{name}": weight for name, weight in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        yield from _blocks(child, f"{dot}{name}")
