"""The gradient's norm over the processes at every ZeRO stage: its value, what it takes, and what is not finite."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_on_processes
from tiny_run import ds_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modstruct import distributed
from modstruct.config import Recipe, TrainConfig
from modstruct.embeddings import Outputs
from modstruct.models.protocol import Batch, TrainableModel
from modstruct.training.deepspeed_adapter import Engine, start_engine
from modstruct.training.ds_config import build_optimizer, read_ds_config, resolve_ds_config
from modstruct.training.gradient_norm import _unscale_and_clip

WIDTH, LAYERS = 16, 10
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
CASES = list(product(STAGES, ["fp32", "bf16"]))
WITHOUT_OFFLOAD = [case for case in CASES if "offload" not in case[0]]
SUMMED = [("zero2", "bf16"), ("zero2_offload", "bf16"), ("zero3_offload", "bf16")]
"""Two backwards a step, whose gradients are summed by share."""


class Stack(TrainableModel):
    """The gradient of layer i is the sum of all rows of the batch, times i + 1, at each of its outputs."""

    with_last = True
    """Whether the last layer is used, and gets a gradient."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, batch: Batch, **_: bool) -> Outputs:
        x = batch["image"].to(self.dtype)
        layers = list(self.layers)[: None if self.with_last else -1]
        return {"image": sum((i + 1) * layer(x).float() for i, layer in enumerate(layers))}


class Operations(TorchDispatchMode):
    """How many were carried out, views and messages left out; how many sums over the processes, and how many numbers
    were read, for which a host waits."""

    count = sums = reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.count += not function.is_view and "c10d" not in name
        self.sums += name == "c10d::allreduce_"
        self.reads += name == "aten::_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def start(stage: str, precision: str, layers: int, summed: bool = False, clip: float = 0.0, split=False) -> Engine:
    """split: each parameter is a group of its own, as layers are that have rates of their own."""
    train = TrainConfig(global_batch=2, micro_batch=1 if summed else None, steps=1, precision=precision)
    recipe = replace(Recipe(), train=train)
    config = resolve_ds_config(read_ds_config(ds_config(stage)), recipe, distributed.world_size())
    config["gradient_clipping"] = clip
    model = Stack(layers)
    optimizer = build_optimizer(model, recipe.optimizer)
    if split:
        groups = optimizer.param_groups
        optimizer.param_groups = [group | {"params": [one]} for group in groups for one in group["params"]]
    return start_engine(model, optimizer, config)


def backward(engine: Engine, value: float, summed: bool = False) -> None:
    batch = {"image": torch.full((1, WIDTH), value)}
    if not summed:
        engine.backward(engine(batch)["image"].sum())
        return
    with engine.summing() as after_each:
        for _ in range(2):
            engine.backward(engine(batch)["image"].sum())
            after_each()


def weights(engine: Engine) -> list[Tensor]:
    """This process's."""
    return [engine.weight(parameter).clone() for _, parameter in engine.parameters()]


def measure(stage: str, precision: str) -> dict[str, Any]:
    counts = {}
    for layers in (2, LAYERS):
        engine = start(stage, precision, layers)
        backward(engine, 1.0 + distributed.rank())
        with Operations() as operations:
            norm, finite = engine.step(0.0, 0)
        counts[layers] = operations.count
    each = (counts[LAYERS] - counts[2]) / (2 * (LAYERS - 2))
    return {"norm": float(norm), "finite": finite, "each": each}


def measure_groups(stage: str, precision: str) -> dict[str, Any]:
    """Of steps that clip: sums over the processes, numbers read, the norm, and weights of two groups and of twenty."""
    seen: dict[str, list] = {"sums": [], "reads": [], "norm": [], "weights": []}
    for split in (False, True):
        engine = start(stage, precision, LAYERS, clip=1.0, split=split)
        for _ in range(2):
            backward(engine, 1.0 + distributed.rank())
            with Operations() as operations:
                norm, _ = engine.step(1e-3, 0)
        seen["sums"].append(operations.sums)
        seen["reads"].append(operations.reads)
        seen["norm"].append(float(norm))
        whole = distributed.sum_over_processes(torch.stack([weight.double().sum() for weight in weights(engine)]))
        seen["weights"].append(whole)
    return seen


def refuse_and_go_on(stage: str, precision: str, summed: bool) -> dict[str, Any]:
    """A gradient that is not finite on one process, then steps in which the last layer has none."""
    engine, seen = start(stage, precision, 3, summed), {}
    for value in (float("nan"), float("inf")):
        engine.model.with_last = True
        before = weights(engine)
        backward(engine, value if distributed.is_main() else 1.0, summed)
        _, taken = engine.step(1e-3, 0)
        still = all(map(torch.equal, before, weights(engine)))
        engine.model.with_last = False
        goes_on = []
        for _ in range(2):
            backward(engine, 1.0, summed)
            goes_on.append(engine.step(1e-3, 0)[1])
        finite = all(bool(weight.isfinite().all()) for weight in weights(engine))
        seen[str(value)] = {"taken": taken, "still": still, "goes_on": goes_on[-1], "finite": finite}
    return seen


def measure_all() -> dict[tuple, dict[str, Any]]:
    refused = {(*case, False): refuse_and_go_on(*case, False) for case in CASES}
    refused |= {(*case, True): refuse_and_go_on(*case, True) for case in SUMMED}
    groups = {("groups", *case): measure_groups(*case) for case in WITHOUT_OFFLOAD}
    return {case: measure(*case) for case in CASES} | refused | groups


@pytest.fixture(scope="module")
def measured() -> list[dict[tuple, dict[str, Any]]]:
    return run_on_processes(measure_all, 2)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_norm_is_that_of_the_mean_gradient_of_all_processes(measured, stage, precision):
    # Of ten layers, whose weights' gradients are the mean of the processes' rows, 1.5, and whose biases' are 1.
    squares = sum(factor**2 for factor in range(1, LAYERS + 1)) * (WIDTH * WIDTH * 1.5**2 + WIDTH)
    for of_process in measured:
        seen = of_process[stage, precision]
        assert seen["finite"]
        assert seen["norm"] == pytest.approx(squares**0.5, rel=1e-6)  # all of these are bfloat16 numbers


@pytest.mark.parametrize("case", [(*case, False) for case in CASES] + [(*case, True) for case in SUMMED])
def test_what_is_not_finite_on_one_process_moves_no_weight_on_any_and_is_gone_afterwards(measured, case):
    """Offloaded, DeepSpeed keeps a refused step's gradients: those of the last layer, which has none afterwards."""
    for of_process in measured:
        for seen in of_process[case].values():
            assert seen == {"taken": False, "still": True, "goes_on": True, "finite": True}


@pytest.mark.parametrize(("stage", "precision"), WITHOUT_OFFLOAD)
def test_operations_of_a_step_do_not_grow_with_the_parameters(measured, stage, precision):
    """DeepSpeed's own check and norm are 15 for each. Stage 0 has a master weight of each, stage 3 a share of each."""
    bound = {"zero0": 8, "zero3": 2}.get(stage, 0.5)
    for of_process in measured:
        assert of_process[stage, precision]["each"] <= bound


@pytest.mark.parametrize(("stage", "precision"), WITHOUT_OFFLOAD)
def test_sums_and_waits_of_a_step_do_not_grow_with_the_groups(measured, stage, precision):
    for of_process in measured:
        seen = of_process["groups", stage, precision]
        assert seen["sums"][0] == seen["sums"][1] <= 1
        assert seen["reads"][0] == seen["reads"][1]
        assert seen["norm"][0] == pytest.approx(seen["norm"][1], rel=1e-6)
        torch.testing.assert_close(*seen["weights"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("clip", "scale", "left"), [(0.0, 1.0, 1.0), (0.0, 4.0, 0.25), (10.0, 4.0, 0.25), (1.25, 4.0, 0.125)]
)
def test_a_group_is_divided_by_the_loss_scale_and_clipped_by_the_norm_of_all(clip, scale, left):
    """The norm of all groups is 2.5 times the scale."""
    gradients = [torch.ones(3) * scale, torch.ones(2, 2) * scale]
    _unscale_and_clip(SimpleNamespace(loss_scale=scale, clip_grad=clip), gradients, torch.tensor(2.5 * scale))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.full_like(gradient, left * scale), rtol=1e-5, atol=0)
