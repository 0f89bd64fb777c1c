"""Tiny runs, many in one set of processes: what they learnt, and which rows every step of theirs took."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tiny_run import ds_config, tiny_recipe

from modstruct import checkpoints, distributed
from modstruct.cli import parse, recipe_parser
from modstruct.config import LossesConfig, Recipe

STAGES = ["zero0", "zero1", "zero2", "zero3"]
OFFLOADED = ["zero2_offload", "zero3_offload"]


def framework_of(method: str) -> str:
    return "fusion" if method.startswith("albef") else "two_tower"


def losses_of(method: str) -> LossesConfig:
    """The losses of a file in modstruct/recipes/methods, or of one with overrides behind its name."""
    recipe, _ = parse(recipe_parser("", ""), ["--framework", framework_of(method), "--method", *method.split()])
    return recipe.losses


def small_recipe(
    output: str,
    cache: str,
    steps: int,
    method: str,
    batch: int,
    micro: int | None,
    workers: int,
    every_steps: int,
    precision: str = "fp32",
    anew: bool = False,
) -> Recipe:
    recipe = tiny_recipe(output, cache, steps, precision, micro_batch=micro, activation_checkpointing=anew)
    return replace(
        recipe,
        framework=framework_of(method),
        losses=losses_of(method),
        data=replace(recipe.data, workers=workers),
        train=replace(recipe.train, global_batch=batch),
        checkpoints=replace(recipe.checkpoints, every_steps=every_steps),
        logging=replace(recipe.logging, every_steps=steps),
    )


def train_small(
    output: str,
    cache: str,
    stage: str,
    *,
    steps: int,
    method: str = "all",
    batch: int = 12,
    micro: int | None = None,
    workers: int = 0,
    every_steps: int = 0,
    resume: str | None = None,
    precision: str = "fp32",
    init: str | None = None,
    anew: bool = False,
) -> None:
    """A run to its end; beside its checkpoints, rows.json says what the steps took. Every process calls it.

    anew: compute activations anew in the backward pass. init: weights that the fusion model starts from.
    """
    from modstruct.training import trainer
    from modstruct.training.pretrain import Pretraining

    recipe = small_recipe(output, cache, steps, method, batch, micro, workers, every_steps, precision, anew)
    recipe = replace(recipe, fusion=replace(recipe.fusion, init=init))
    taken: dict[int, list[int]] = {}
    take = trainer.train_step

    def noting(engine, objective, parts, step, *rest):
        mine = [zlib.crc32(row.numpy().tobytes()) for part in parts for row in part["image"]]
        taken[step] = [row for rows in distributed.gather_objects(mine) for row in rows]
        return take(engine, objective, parts, step, *rest)

    with mock.patch.object(trainer, "train_step", noting):
        Pretraining(recipe, ds_config(stage), resume).build().train()
    if distributed.is_main():
        Path(output, "rows.json").write_text(json.dumps(taken))
    distributed.barrier()


def train_several(cache: str, runs: dict[str, dict]) -> None:
    """Runs one after the other in these processes. runs: by output folder, what `train_small` takes."""
    for output, options in runs.items():
        train_small(output, cache, **options)


def rows_taken(output: Path | str) -> dict[int, list[int]]:
    """Step, counted from 0 -> a number for each row of its global batch, which its pixels decide."""
    return {int(step): rows for step, rows in json.loads(Path(output, "rows.json").read_text()).items()}


def weights_of(output: Path | str) -> torch.Tensor:
    weights = checkpoints.read_weights(checkpoints.list_checkpoints(output)[-1])
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def momentum_of(output: Path | str) -> dict[str, torch.Tensor]:
    """Momentum weights and queues of a run's last checkpoint."""
    return checkpoints.read(checkpoints.list_checkpoints(output)[-1]).momentum


def momentum_distance(one: Path | str, other: Path | str) -> float:
    """Of two runs' last momentum weights and queues, relative to the first's; infinite where queues stand elsewhere."""
    ours, theirs = momentum_of(one), momentum_of(other)
    exact = ("queue.counts", "queue.ids")
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[name], theirs[name]) for name in exact):
        return math.inf
    mine, others = (torch.cat([s[n].flatten() for n in sorted(s) if n not in exact]) for s in (ours, theirs))
    return float((mine - others).norm() / mine.norm())


def distance(one: Path | str, other: Path | str) -> float:
    """Of two runs' last weights, relative to the first's."""
    ours, theirs = weights_of(one), weights_of(other)
    return float((ours - theirs).norm() / ours.norm())
