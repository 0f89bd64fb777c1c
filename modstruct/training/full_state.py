"""Every weight and moment whole, in float32, by name: what ZeRO has spread over the processes, read and written.

DeepSpeed keeps float32 master weights and moments in a different place at each stage:
  stage 0, fp32        the parameter itself and the torch optimizer's state
  stage 0, bf16 / fp16 `fp32_groups` of its low-precision optimizer
  stages 1 and 2       fragments of flat partitions, reached through `parameter._hp_mapping`
  stage 3              partitions, reached through `parameter.ds_id`
Reading is collective: every process calls it for the same names in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modstruct import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


def own_part(parameter: nn.Parameter) -> Tensor:
    """This process's part of a parameter at stage 3: of its float32 master, or, where it is frozen, of itself.

    1-D, ceil(elements / processes) long; what lies beyond the parameter's end is anything.
    """
    from deepspeed import utils

    return utils.safe_get_local_fp32_param(parameter) if parameter.requires_grad else parameter.ds_tensor


class FullState:
    """View of a new DeepSpeed engine's weights and AdamW moments by parameter.

    Makes the moments (zeros) at once, where the optimizer would wait for its first step, so that they can be read
    and written at any time.
    """

    def __init__(self, engine):
        self.engine = engine
        self.optimizer = engine.optimizer
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        self.inner: torch.optim.Optimizer = inner
        self.masters = self._stage_0_masters()
        for tensor in self._optimized_tensors():
            zeros = {key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in MOMENTS}
            inner.state[tensor].update(step=torch.tensor(0.0, device=tensor.device), **zeros)
        if hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            # DeepSpeed links a parameter to its moments at the first step, and then those of the first group only.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all weights, frozen ones included."""
        return self.engine.module.named_parameters()

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """weight and, for a trained parameter, exp_avg and exp_avg_sq: float32 on the CPU. Collective."""
        if not parameter.requires_grad:
            return {"weight": self._frozen(parameter)}
        keys = {"weight": None} | {key: key for key in MOMENTS}
        return {kind: self._read(parameter, key).float().cpu().clone() for kind, key in keys.items()}

    def write(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set the float32 master weight and the moments. The working copy must already hold the weight."""
        if not parameter.requires_grad:
            return
        for kind, value in values.items():
            self._write(parameter, None if kind == "weight" else kind, value)

    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Keep the float32 master weight between two limits; the working copy follows at the next step."""
        from deepspeed import utils

        if self.masters:
            self.masters[id(parameter)].data.clamp_(low, high)
        elif hasattr(parameter, "ds_id"):
            mine = utils.safe_get_local_fp32_param(parameter)
            utils.safe_set_local_fp32_param(parameter, mine.clamp(low, high))
        elif parameter._hp_mapping is not None:  # None where another process holds it
            parameter._hp_mapping.hp_fragment.data.clamp_(low, high)

    @torch.no_grad()
    def agree_on_statistics(self) -> None:
        """Give every process the mean of all processes' BatchNorm statistics. Collective; training reads none."""
        for name, buffer in self.engine.module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(distributed.sum_over_processes(buffer) / distributed.world_size())

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(max(float(state["step"]) for state in self.inner.state.values()))

    @step.setter
    def step(self, value: int) -> None:
        for state in self.inner.state.values():
            state["step"].fill_(value)

    def _stage_0_masters(self) -> dict[int, Tensor]:
        """id of each parameter -> its float32 master, at stage 0 only."""
        if self.engine.zero_optimization():
            return {}
        if hasattr(self.optimizer, "fp32_groups"):
            pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            return {id(p): master for low, high in pairs for p, master in zip(low, high, strict=True)}
        return {id(p): p for _, p in self.parameters() if p.requires_grad}

    def _optimized_tensors(self) -> list[Tensor]:
        if self.masters:
            return list(self.masters.values())
        if self.engine.zero_optimization_stage() == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.masters:
            master = self.masters[id(parameter)]
            return (master if key is None else self.inner.state[master][key]).detach()
        if key is None:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, key).detach()

    def _write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed import utils

        if self.masters:
            master = self.masters[id(parameter)]
            (master if key is None else self.inner.state[master][key]).data.copy_(value)
        elif hasattr(parameter, "ds_id"):
            self._write_partition(parameter, key, value)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def _write_partition(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Stage 3. DeepSpeed's own setter of whole parameters fails where the size does not divide by the processes."""
        from deepspeed import utils

        size = utils.safe_get_local_fp32_param(parameter).numel()
        padded = value.new_zeros(size * distributed.world_size())
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, size * distributed.rank(), size)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, mine)
        else:
            utils.safe_set_local_optimizer_state(parameter, mine, key)

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().float().cpu().clone()
        return parameter.detach().float().cpu().clone()
