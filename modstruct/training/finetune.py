"""A fine-tuning run from recipe to table: open or resume, train, save, measure, write predictions, export."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from modstruct import checkpoints, distributed
from modstruct.config import FinetuneRecipe
from modstruct.data.downstream.batches import task_loader, task_order
from modstruct.data.downstream.published_files import TaskEntries
from modstruct.data.synthetic.task_files import ensure_scene_tasks
from modstruct.distributed.collect import on_main
from modstruct.distributed.heartbeat import Heartbeat
from modstruct.distributed.hosts import on_all, require_same
from modstruct.evaluation.tables import flatten, task_table
from modstruct.files import atomic_write
from modstruct.models.fusion.backbone import without_files
from modstruct.models.fusion.initial_weights import Initial, find_initial, start_from
from modstruct.tasks import Task, build_task
from modstruct.tasks.task import SPLITS
from modstruct.training.conduct import best_checkpoint, conclude, conduct, last_checkpoint
from modstruct.training.export import export_task
from modstruct.training.run import Run, Start, describe, find_start, run_length, start_engine
from modstruct.training.telemetry import Telemetry

log = logging.getLogger("modstruct")


@dataclass(kw_only=True)
class FinetuningRun(Run):
    """A fine-tuning run that is ready to take its next step."""

    task: Task
    splits: dict[str, TaskEntries]
    """Entries of each split that there is."""


def finetune(recipe: FinetuneRecipe, ds_config: str, resume: str | None = None, profile_steps: int = 0) -> dict:
    """Train a task, measure it and export; every process calls it. Returns the final metrics of the test split.

    ds_config: path of the DeepSpeed JSON. resume: `latest`, `best`, a checkpoint folder, or None for a fresh run.
    profile_steps: steps to trace into OUTPUT/profile. Raises ValueError naming the field for what cannot work, before
    the first step.
    """
    return conduct(recipe, lambda: open_run(recipe, ds_config, resume), finish, profile_steps)


def open_run(recipe: FinetuneRecipe, ds_config: str, resume: str | None) -> FinetuningRun:
    """Task, entries, model, engine, and what a checkpoint says of them."""
    start = find_start(recipe, ds_config, resume)
    initial = find_initial(recipe.init, recipe.tokenizer, recipe.data.cache, start.tokenizer)
    # Weights of a checkpoint or of --init follow: the encoders' own are not read, and need not be there any more.
    follow = start.saved is not None or initial.weights is not None
    task = build_task(replace(recipe, fusion=without_files(recipe.fusion)) if follow else recipe, initial.tokenizer)
    on_all(task.check_shared_memory)
    splits = read_splits(recipe, task)
    entries = splits["train"].entries
    state = start.state(splits["train"].fingerprint, "its files")
    steps = run_length(recipe, task_order(len(entries), recipe.train.seed).epoch_samples)
    full = _start(recipe, task, initial, start)
    describe(recipe, len(entries), full.engine, steps)

    def loader(first_step: int):
        return task_loader(
            task,
            entries,
            recipe.data,
            global_batch=recipe.train.global_batch,
            seed=recipe.train.seed,
            start_step=first_step,
            stop_step=steps,
        )

    return FinetuningRun(
        recipe=recipe,
        output=Path(recipe.output),
        tokenizer=initial.tokenizer,
        objective=task.objective(-(-len(entries) // recipe.train.global_batch)),
        engine=full.engine,
        full=full,
        state=state,
        steps=steps,
        telemetry=Telemetry(Path(recipe.output), state.step, steps, recipe.train.global_batch),
        heartbeat=Heartbeat(recipe.train.hang_timeout_minutes),
        loader=loader,
        figures=lambda report: {},
        validate=_validate if "validation" in splits else None,
        task=task,
        splits=splits,
    )


def read_splits(recipe: FinetuneRecipe, task: Task, wanted: Sequence[str] = SPLITS) -> dict[str, TaskEntries]:
    """The entries of every split wanted that there is; every process reads them, one of each host first."""

    def read() -> dict[str, TaskEntries]:
        paths = None
        if recipe.data.source == "scenes":
            paths = ensure_scene_tasks(recipe.data.scenes, recipe.data.cache, recipe.fusion.vision.image_size)
        found = {split: task.entries(split, paths) for split in wanted}
        return {split: entries for split, entries in found.items() if entries is not None}

    splits = distributed.main_first(read)
    for split, entries in splits.items():
        for cause, number in entries.left_out.items():
            log.info("data.%s: %s entries left out: %s", split, f"{number:,}", cause)
    fingerprints = {f"data.{split}": entries.fingerprint for split, entries in splits.items()} | task.identity()
    require_same(fingerprints, "hosts must see the same files: share the folder, or copy it to each of them")
    return splits


def _start(recipe: FinetuneRecipe, task: Task, initial: Initial, start: Start):
    """The model with the pre-trained weights, or a checkpoint's, in DeepSpeed's hands."""
    torch.manual_seed(recipe.train.seed)
    model = task.build_model()
    if start.saved is None and initial.weights is not None:
        start_from(model, initial)
    return start_engine(recipe, model, start)


def _validate(run: FinetuningRun) -> float:
    run.engine.eval()
    metrics, _ = run.task.measure(run.engine.module, run.splits["validation"].entries)
    run.engine.train()
    _log(run, "validation", metrics)
    return run.task.score(metrics)


def _log(run: FinetuningRun, split: str, metrics: dict) -> None:
    run.telemetry.scalars({f"{split}/{key}": value for key, value in flatten(metrics).items()}, run.state.step)


def finish(run: FinetuningRun) -> dict:
    """Export the best weights by validation, measure the test split with them, and print where everything lies."""
    run.telemetry.bar.close()
    best = best_checkpoint(run, last_checkpoint(run))
    on_main(lambda: export_task(run.output / "export", checkpoints.read_weights(best), run.recipe, run.tokenizer))
    metrics = {}
    if "test" in run.splits:
        metrics, predictions = measure_checkpoint(run.task, best, run.splits["test"])
        _log(run, "test", metrics)
        write_predictions(predictions, run.output / "predictions.json")
    conclude(run, best, metrics, partial(task_table, run.recipe.task.name))
    return metrics


def measure_checkpoint(task: Task, checkpoint: Path, entries: TaskEntries) -> tuple[dict, object]:
    """Figures and predictions of a split with a checkpoint's weights in float32; every process calls it.

    Each holds the whole model, whatever the ZeRO stage of the run.
    """
    model = task.build_model()
    checkpoints.load_weights(model, checkpoints.read_weights(checkpoint), checkpoint)
    return task.measure(model.to(distributed.device()).eval(), entries.entries)


def write_predictions(predictions: object, path: Path) -> None:
    """Write what a task answered, where it writes anything, on the main process."""
    if predictions is not None and distributed.is_main():
        with atomic_write(path) as file:
            file.write(json.dumps(predictions).encode())
