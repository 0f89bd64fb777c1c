"""A fine-tuning run from recipe to table: open or resume, train, save, measure, write predictions, export."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modstruct import checkpoints, distributed
from modstruct.config import FinetuneRecipe
from modstruct.data.scenes.tasks.folder import ensure_scene_tasks
from modstruct.data.tasks.batches import task_loader, task_order
from modstruct.data.tasks.published_files import TaskEntries
from modstruct.evaluation.report import flatten, save_metrics, task_table
from modstruct.files import written_aside
from modstruct.hosts import on_all, require_same
from modstruct.models.fusion.backbone import without_files
from modstruct.models.fusion.initial_weights import Initial, find_initial, start_from
from modstruct.tasks import Task, build_task
from modstruct.tasks.task import SPLITS
from modstruct.training.checkpoint import save
from modstruct.training.export import export_task
from modstruct.training.heartbeat import Heartbeat
from modstruct.training.profiler import profiled
from modstruct.training.run import Run, Start, StopRequest, describe, find_start, run_length, start_engine, train
from modstruct.training.telemetry import Telemetry, start_logging

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
    distributed.start_processes()
    start_logging(Path(recipe.output))
    stop = StopRequest()
    run = open_run(recipe, ds_config, resume)
    profiling = profiled(run.output / "profile", profile_steps, run.state.step, run.steps)
    with run.heartbeat:
        with profiling as after_step:
            train(run, stop, after_step)
        return finish(run)


def open_run(recipe: FinetuneRecipe, ds_config: str, resume: str | None) -> FinetuningRun:
    """Task, entries, model, engine, and what a checkpoint says of them."""
    start = find_start(recipe, ds_config, resume)
    initial = find_initial(recipe.init, recipe.tokenizer, recipe.data.cache, start.tokenizer)
    # Weights of a checkpoint or of --init follow: the encoders' own are not read, and need not be there any more.
    follow = start.saved is not None or initial.weights is not None
    task = build_task(replace(recipe, fusion=without_files(recipe.fusion)) if follow else recipe, initial.tokenizer)
    on_all(task.check_shared_memory)
    splits = _splits(recipe, task)
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


def _splits(recipe: FinetuneRecipe, task: Task) -> dict[str, TaskEntries]:
    """The entries of every split that there is; every process reads them, one of each host first."""

    def read() -> dict[str, TaskEntries]:
        paths = None
        if recipe.data.source == "scenes":
            paths = ensure_scene_tasks(recipe.data.scenes, recipe.data.cache, recipe.fusion.vision.image_size)
        found = {split: task.entries(split, paths) for split in SPLITS}
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
    return run.task.score(measure(run, "validation")[0])


def measure(run: FinetuningRun, split: str) -> tuple[dict, object]:
    """Figures and predictions of a split, by all processes; the figures go to TensorBoard under its name."""
    run.engine.eval()
    metrics, predictions = run.task.measure(run.engine.module, run.splits[split].entries)
    run.engine.train()
    run.telemetry.scalars({f"{split}/{key}": value for key, value in flatten(metrics).items()}, run.state.step)
    return metrics, predictions


def finish(run: FinetuningRun) -> dict:
    """Export the last weights, measure the test split with them, and print where everything lies."""
    run.telemetry.bar.close()
    last = checkpoints.step_folder(run.output, run.state.step)
    exported, predicted = run.output / "export", run.output / "predictions.json"
    if not distributed.broadcast_object(last.exists()):  # a finished run, resumed into another folder
        save(run.full, run.state, run.recipe, run.tokenizer)
    if distributed.is_main():
        export_task(exported, checkpoints.read_weights(last), run.recipe, run.tokenizer)
    metrics, predictions = measure(run, "test") if "test" in run.splits else ({}, None)
    run.telemetry.close()
    if distributed.is_main():
        if predictions is not None:
            with written_aside(predicted) as file:
                file.write(json.dumps(predictions).encode())
        if metrics:
            save_metrics(metrics, run.output / "metrics.json")
            print(f"\n{task_table(run.recipe.task.name, metrics)}\n")
        places = {
            "checkpoint": last,
            "exported weights": exported,
            "TensorBoard": run.telemetry.folder,
            "metrics": run.output / "metrics.json",
            "predictions": predicted,
        }
        print("\n".join(f"{name + ':':<18}{place}" for name, place in places.items() if place.exists()))
    distributed.barrier()
    return metrics
