"""Normalisation layers that keep their parameters in float32 beside activations in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BatchNorm = nn.modules.batchnorm._BatchNorm
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


class Float32BatchNorm(nn.BatchNorm2d):
    """BatchNorm with float32 parameters and statistics; its sums are float32 whatever its input is, which is kept for
    the backward pass as it comes."""

    momentum: float
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var, self.weight.float(), self.bias.float())
        return F.batch_norm(x, *statistics, self.training, self.momentum, self.eps)


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm with float32 parameters: computes in float32, keeps its input and gives its output as they come, where
    a cast, autocast's on a GPU included, would keep four bytes of each element of a bfloat16 input."""

    def forward(self, x: Tensor) -> Tensor:
        return _LayerNorm.apply(x, self.weight, self.bias, self.normalized_shape, self.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        made, mean, rstd = torch.native_layer_norm(x.float(), shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch's is *Any
        x, mean, rstd, weight, bias = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.float(), x.float(), ctx.shape, mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
        )
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias, None, None


def keep_norms_in_float32(model: nn.Module) -> list[nn.Parameter]:
    """Let the norms of a model take half precision with float32 parameters, which it returns; their names stay."""
    kept = []
    for module in model.modules():
        if isinstance(module, NORMS):
            kept += list(module.parameters(recurse=False))
            # Subclasses whose forward is torch's but for casts: open_clip's, timm's.
            plain = type(module).__name__ == "LayerNorm" and isinstance(module, nn.LayerNorm)
            if plain and module.weight is not None and module.bias is not None:
                module.__class__ = Float32LayerNorm
            elif not isinstance(module, (Float32BatchNorm, Float32LayerNorm)):
                module.forward = _in_float32(module.forward)  # type: ignore[method-assign]
    return kept


def _in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x.float()).to(x.dtype)
