"""tools/plan_run.py: what it counts without numbers, against what real processes hold and send."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modstruct import distributed
from modstruct.config import Recipe, SeparationConfig
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model, recompute_activations
from modstruct.training.ds_config import read_ds_config, resolve_ds_config
from modstruct.training.step import train_step
from modstruct.training.trainer import build_engine

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "distributed"), str(ROOT / "tests" / "models")]
import plan_run  # noqa: E402
import planning  # noqa: E402
from processes import run_on_processes  # noqa: E402
from tiny_fusion import fusion_recipe  # noqa: E402
from tiny_run import ds_config, tiny_recipe  # noqa: E402

ROWS = 8


def recipe_of(rows: int, **train) -> Recipe:
    """Two towers of a million weights; all structure losses, over both views."""
    tiny = tiny_recipe("", "", **train)
    vision = replace(tiny.model.vision, width=160, layers=2, head_width=32)
    text = replace(tiny.model.text, width=128, layers=2, heads=4)
    model = replace(tiny.model, vision=vision, text=text, embed_dim=64)
    return replace(tiny, model=model, train=replace(tiny.train, global_batch=rows * distributed.world_size()))


def model_of(recipe: Recipe):
    objective = build_objective(recipe.losses)
    model = build_model(recipe, planning.sizes_of_tokenizer(recipe), objective)
    if recipe.train.activation_checkpointing:
        recompute_activations(model)
    return model.train(), objective


def held() -> int:
    """Bytes of this process's tensors."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors + gradients]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Sent(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d"):
            given = [[args[i]] if isinstance(args[i], Tensor) else args[i] for i in (0, 1)]
            sizes = [sum(t.nbytes for t in some if isinstance(t, Tensor)) for some in given if isinstance(some, list)]
            self.bytes["all_reduce" if "allreduce" in name else "gather"] += max(sizes)
        return function(*args, **(kwargs or {}))


def real_steps(stages: list[tuple[int, str]]) -> dict[str, dict[str, float]]:
    """What this process holds and sends at ZeRO stages, in bytes, and what is planned for it."""
    found = {}
    for stage, precision in stages:
        recipe = recipe_of(ROWS, precision=precision)
        torch.manual_seed(0)
        gc.collect()
        before = held()
        model, objective = model_of(recipe)
        config = resolve_ds_config(read_ds_config(ds_config(f"zero{stage}")), recipe, distributed.world_size())
        engine = build_engine(model, recipe, config)
        gc.collect()
        state, trained = held() - before, engine.element_count
        batch = planning.batch_for(model, recipe, ROWS)
        train_step(engine, objective, [batch], 0, 1e-5)  # stage 3 notes the order of the weights
        largest = []
        for weight in model.parameters():
            if weight.shape == model.image["trunk"].conv1.weight.shape:
                weight.register_post_accumulate_grad_hook(lambda _, found=largest: found.append(held() - before))
        with Sent() as sent:
            train_step(engine, objective, [batch], 1, 1e-5)
        found[f"{stage} {precision}"] = {"state": state, "trained": trained, **sent.bytes}
        del model, objective, engine, batch
    return found


def planned_step(stage: int, precision: str, processes: int) -> dict[str, float]:
    recipe = recipe_of(ROWS, precision=precision)
    recipe = replace(recipe, train=replace(recipe.train, global_batch=ROWS * processes))
    measured = planning.Measured(recipe, processes)
    parts = planning.memory(measured, stage, ROWS, ROWS)
    return parts | {"elements": measured.trained} | planning.sent(measured, stage, ROWS, ROWS)


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_and_moments_are_those_that_processes_hold(processes):
    stages = [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")] if processes == 1 else [(2, "bf16"), (3, "bf16")]
    for found in run_on_processes(real_steps, processes, stages):
        for stage, precision in stages:
            print(found[f"{stage} {precision}"], planned_step(stage, precision, processes))
