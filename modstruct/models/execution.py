"""How the towers' trunks are executed: activations recomputed in the backward pass, and compiled code.

Neither changes what is computed, nor the name of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modstruct.errors import refuse
from modstruct.models.protocol import TrainableModel
from modstruct.models.towers import Float32BatchNorm

BatchNorm = nn.modules.batchnorm._BatchNorm
SWITCHES = ("grad_checkpointing", "gradient_checkpointing")  # open_clip's and timm's, transformers'


class Switched(Protocol):
    """A trunk, of open_clip's, timm's or ours."""

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...


def recompute_activations(model: TrainableModel) -> None:
    """Keep the input of each layer only (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

    Raises ValueError naming the field where a tower cannot do it.
    """
    from open_clip.modified_resnet import ModifiedResNet

    for name, trunk in model.trunks().items():
        if isinstance(trunk, ModifiedResNet):  # open_clip's own switch does nothing here
            for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
                for block in layer:
                    block.forward = _Recomputed(block)
            continue
        if any(isinstance(module, BatchNorm) for module in trunk.modules()):
            remedy = f"the {name} tower's BatchNorm statistics would move twice a step; leave it off"
            refuse("train.activation_checkpointing", True, remedy)
        cast(Switched, trunk).set_grad_checkpointing(True)
        # A timm tower without the switch only writes a warning.
        if not any(getattr(m, switch, False) for m in trunk.modules() for switch in SWITCHES):
            refuse("train.activation_checkpointing", True, f"the {name} tower has no such switch; leave it off")


def compile_trunks(model: TrainableModel, zero_stage: int, backend: str = "inductor") -> None:
    """Compile the trunks at their first call; each new shape of a batch compiles again.

    Raises ValueError naming the field at stage 3, whose hooks fetch the weights of each layer while it runs: a compiled
    trunk would see their empty places; and for a CLIP ResNet whose activations are recomputed.
    """
    if zero_stage == 3:
        refuse("train.compile", True, "ZeRO stage 3 fetches weights inside the towers; use stage 2, or leave it off")
    if any(isinstance(module.forward, _Recomputed) for module in model.modules()):
        refuse("train.compile", True, "torch cannot compile a CLIP ResNet with train.activation_checkpointing; choose")
    # Dropout falls as without compilation, so that the two passes of the gradient cache agree.
    options: dict[str, str | int | bool] | None = {"fallback_random": True} if backend == "inductor" else None
    for trunk in model.trunks().values():
        trunk.compile(backend=backend, options=options)


class _Recomputed:
    """The forward of a CLIP ResNet's bottleneck, run again for its backward."""

    def __init__(self, block: nn.Module):
        self.block, self.forward = block, block.forward

    def __call__(self, x: Tensor) -> Tensor:
        return checkpoint(self.forward, x, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Of the first run and of the second."""
        return nullcontext(), _statistics_held(self.block)


@contextmanager
def _statistics_held(block: nn.Module) -> Iterator[None]:
    """BatchNorm keeps its running statistics: they moved when the block ran first."""
    layers = [module for module in block.modules() if isinstance(module, Float32BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0  # not another copy of the statistics: autograd would take it for a change of what it saved
        layer.num_batches_tracked.sub_(int(layer.training))
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
