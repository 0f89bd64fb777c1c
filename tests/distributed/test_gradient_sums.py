"""The gradient cache at ZeRO stages 2 and 3: its sums' precision, what a process keeps of them, and what it sends."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

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
from modstruct.training.gradient_cache import CachedBatch

PROCESSES, PARTS, ROWS = 2, 4, 4
WIDTH, LAYERS, BUCKET = 256, 12, 70_000
LAYER = WIDTH * WIDTH + WIDTH
WEIGHTS = LAYERS * LAYER
CASES = [
    ("zero2", "fp32", "whole", None),
    *((stage, "bf16", "whole", None) for stage in ("zero2", "zero3")),
    *((stage, precision, "sharded", None) for stage in ("zero2", "zero3") for precision in ("fp32", "bf16")),
    *((stage, "fp32", "sharded", None) for stage in ("zero2_offload", "zero3_offload")),
    *((stage, "bf16", "sharded", "fp32") for stage in ("zero2", "zero3", "zero2_offload")),
]
"""DeepSpeed's file, precision, train.gradient_sums, communication_data_type."""
OBJECTIVE = SimpleNamespace(row_losses=frozenset(), row_counts=lambda batch: {})


class Stack(TrainableModel):
    """A million weights in layers smaller than a bucket."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def forward(self, batch: Batch, **_: bool) -> Outputs:
        return {"image": self.layers(batch["image"]).float()}


class Sent(TorchDispatchMode):
    """Bytes of reductions and of gathers, by kind of number: of whole tensors, not of a process's share."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d"):
            values = args[0][0] if isinstance(args[0], list) else args[0]  # of a gather what comes out
            if "scatter" in name:
                values = args[1]
            kind = f"{'gather' if 'gather' in name else 'reduction'} {values.dtype}"
            if values.is_floating_point():
                self.bytes[kind] += values.nbytes
        return function(*args, **(kwargs or {}))


def start(stage: str, precision: str, sums: str, sent_as: str | None) -> Engine:
    train = TrainConfig(global_batch=PROCESSES, micro_batch=1, steps=1, precision=precision, gradient_sums=sums)
    recipe = replace(Recipe(), train=train)
    given = read_ds_config(ds_config(stage)) | ({"communication_data_type": sent_as} if sent_as else {})
    config = resolve_ds_config(given, recipe, distributed.world_size())
    config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    model = Stack()
    return start_engine(model, build_optimizer(model, recipe.optimizer), config)


def held() -> int:
    """Bytes of this process's tensors."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors + gradients]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def exact(parts: list[Batch], dtype: torch.dtype) -> Tensor:
    """The mean over the processes of the sum of the micro-batches' gradients, added in float64."""
    model = Stack().to(dtype)
    total = torch.zeros(WEIGHTS, dtype=torch.float64)
    for part in parts:
        loss = model(part)["image"].square().sum() / (PARTS * ROWS)
        total += torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
    return distributed.sum_over_processes(total) / PROCESSES


def all_cases() -> dict[str, dict[str, float]]:
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for case in CASES:
        torch.manual_seed(distributed.rank() + 5)
        dtype = torch.bfloat16 if case[1] == "bf16" else torch.float32
        parts = [{"image": torch.randn(ROWS, WIDTH).to(dtype)} for _ in range(PARTS)]
        right, engine = exact(parts, dtype), start(*case)
        gc.collect()
        before, most = held(), []
        last = engine.model.layers[0].weight  # of all the others DeepSpeed has the gradients by then
        last.register_post_accumulate_grad_hook(lambda _, most=most: most.append(held()))
        with Sent() as sent:
            cached = CachedBatch(engine, parts, OBJECTIVE, 0)
            cached.backward(cached.outputs["image"].square().sum() / (PARTS * ROWS))
        gradient = torch.cat([safe_get_full_grad(p).double().flatten() for p in engine.model.parameters()])
        norm, finite = engine.step(1e-3, 0)
        found[" ".join(map(str, case))] = {
            "error": float((gradient - right).norm() / right.norm()),
            "norm": float(norm / right.norm()) if finite else 0.0,
            "kept": max(most) - before,
            **sent.bytes,
        }
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, float]]]:
    """What each process saw, by case."""
    return run_on_processes(all_cases, PROCESSES)


def test_sums_are_exact_and_no_worse_than_rounded_once(found):
    for case, seen in found[0].items():
        rounded_once = found[0]["zero2 bf16 whole None"]["error"]
        if "fp32" in case:  # among them bfloat16 gradients that cross the processes in float32
            assert seen["error"] < 1e-6, case
        else:
            assert seen["error"] <= rounded_once < 2**-8, case
        assert seen["norm"] == pytest.approx(1, abs=2**-8), case


def test_a_process_keeps_its_share_of_the_sums_and_buckets(found):
    for process in found:
        for case, seen in process.items():
            size = 4 if "fp32" in case else 2
            if "whole" in case:
                assert seen["kept"] > WEIGHTS * (4 if size == 4 else 6) - LAYER * 4, case
            else:
                # Shares differ by their alignment: 2 KB have been seen.
                assert seen["kept"] < WEIGHTS * 4 / PROCESSES + 2 * BUCKET * size + LAYER * size + 2**14, case


def test_what_crosses_the_processes_is_once_a_step_or_once_a_micro_batch(found):
    """And, at stage 3, all weights three times a micro-batch: for two forward passes and the backward."""
    for case, seen in found[0].items():
        stage, precision, sums, sent_as = case.split()
        reduced = [value for kind, value in seen.items() if kind.startswith("reduction")]
        size = 4 if precision == "fp32" or sent_as == "fp32" else 2
        assert reduced == [WEIGHTS * size * (PARTS if sums == "sharded" else 1)], case
        gathered = [value for kind, value in seen.items() if kind.startswith("gather")]
        weights = WEIGHTS * (4 if precision == "fp32" else 2)
        assert gathered == ([3 * PARTS * weights] if stage.startswith("zero3") else []), case
