"""DeepSpeed's gradient norm in one operation over all gradients, which also tells whether they are finite.

DeepSpeed 0.19 takes two operations for each parameter's norm, and before that, in half precision, thirteen more for
what is not finite in it, which its norm then shows again: two thirds of all that a step of ZeRO 1 or 2 launches, for
which a GPU waits. Each group of parameters, of which layer-wise learning rates make dozens, costs it an all-reduce,
and at stages 1 and 2 a wait for the device.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from modstruct import distributed


def measure_at_once(optimizer: Any) -> None:
    """Let one of DeepSpeed's optimizers, of any ZeRO stage, measure so."""
    if hasattr(optimizer, "averaged_gradients"):
        optimizer.check_overflow = lambda **_: None  # its step asks the norm, too
        if hasattr(optimizer, "offload_optimizer"):  # stage 3
            if not optimizer.offload_optimizer:
                optimizer._get_norm_groups = lambda: [_norm_of_all_shares(optimizer)]
        elif not optimizer.cpu_offload:
            optimizer.scaled_global_norm = partial(_norm_of_all_shares, optimizer)
            optimizer.unscale_and_clip_grads = partial(_unscale_and_clip, optimizer)
    elif hasattr(optimizer, "overflow_checker"):  # stage 0 in half precision, where every process has whole gradients
        from deepspeed.runtime.fp16 import unfused_optimizer

        unfused_optimizer.get_weight_norm = lambda gradients, mpu: _sum_of_squares(gradients)
        unfused_optimizer.get_global_norm = lambda norm_list: math.sqrt(sum(norm_list))
        optimizer.overflow_checker.check = lambda: False


def forget_refused(optimizer: Any) -> None:
    """Let go of the gradients of a step that was not taken.

    DeepSpeed 0.19 keeps them at stage 3 and where the optimizer is offloaded. Those of a weight that has no gradient
    afterwards, and sums of several backwards (`Engine.summing`), would refuse every later step, or move the weight.
    """
    kept = [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        kept += [share.grad for share in getattr(optimizer, name, ())]
    for gradients in kept:
        if gradients is not None:
            gradients.zero_()
    if getattr(optimizer, "cpu_offload", False):  # of stages 1 and 2
        optimizer.averaged_gradients = {}


def _norm_of_all_shares(optimizer: Any) -> Tensor:
    """Norm of all groups over the processes' shares, finite where all are."""
    gradients = list(chain.from_iterable(optimizer.averaged_gradients.values()))
    return distributed.sum_over_processes(_sum_of_squares(gradients)).sqrt().float()


def _unscale_and_clip(optimizer: Any, gradients: list[Tensor], norm: Tensor) -> None:
    """Of a group; `norm`, of all of them as they are scaled, is finite, or its step would have been refused."""
    scale = optimizer.loss_scale
    if optimizer.clip_grad > 0:
        scale = scale * ((norm / scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
    elif scale == 1:
        return
    for gradient in gradients:
        gradient.mul_(1 / scale)


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, dtype=torch.float64)
    return torch.stack(norms).to(distributed.device()).square().sum()
