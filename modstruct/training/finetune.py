"""A fine-tuning run from recipe to table."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from modstruct import checkpoints, distributed
from modstruct.config import FinetuneRecipe
from modstruct.data.downstream.batches import task_loader, task_order
from modstruct.data.downstream.published_files import TaskEntries
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.synthetic.task_files import ensure_scene_tasks
from modstruct.distributed.collect import on_main
from modstruct.distributed.hosts import require_same
from modstruct.errors import require
from modstruct.evaluation.result import Result
from modstruct.evaluation.tables import scalars
from modstruct.files import atomic_write, refusing
from modstruct.losses.objective import Objective
from modstruct.models.bounded import no_larger_than
from modstruct.models.fusion.backbone import without_files
from modstruct.models.fusion.ema import EmaModel
from modstruct.models.fusion.initial_weights import find_initial, start_from
from modstruct.models.protocol import load_weights
from modstruct.tasks import Task, build_task
from modstruct.tasks.task import SPLITS
from modstruct.training.export import export_task
from modstruct.training.model_card import write_card
from modstruct.training.trainer import Trainer, best_checkpoint

log = logging.getLogger("modstruct")


def finetune(
    recipe: FinetuneRecipe, ds_config: str, resume: str | None = None, profile_steps: int = 0
) -> dict[str, Result]:
    """Train a task, measure it and export; every process calls it. Returns the result of the test split, by its name.

    Arguments and errors as Trainer has them.
    """
    return Finetuning(recipe, ds_config, resume).run(profile_steps)


class Finetuning(Trainer[FinetuneRecipe]):
    """A fine-tuning run of a downstream task."""

    task: Task
    model: EmaModel
    splits: dict[str, TaskEntries]
    """Entries of each split that there is."""

    def build(self) -> Finetuning:
        recipe, start = self.recipe, self.find_start()
        seed = recipe.train.seed
        require(seed >= 0 or start.saved is not None, "train.seed", seed, "0 or more")
        with refusing("data.cache", recipe.data.cache):
            initial = find_initial(recipe.init, recipe.tokenizer, recipe.data.cache, start.tokenizer)
        self.tokenizer = initial.tokenizer
        # Weights of a checkpoint or of --init follow: the encoders' own are not read, and need not be there any more.
        follow = start.saved is not None or initial.weights is not None
        described = replace(recipe, fusion=without_files(recipe.fusion)) if follow else recipe
        self.task = build_task(described, initial.tokenizer)
        self.splits = read_splits(recipe, self.task)
        self.has_validation = "validation" in self.splits
        train = self.splits["train"]
        self.state = start.state(train.fingerprint, "its files")
        entries, batch = len(train.entries), recipe.train.global_batch
        self.objective = self.task.objective(-(-entries // batch))
        check_batch(self.objective, batch, entries)
        torch.manual_seed(recipe.train.seed)
        if initial.weights is None:
            self.model = self.task.build_model()
        else:
            with no_larger_than(initial.weights, "--init", initial.path):
                self.model = self.task.build_model()
        if start.saved is None and initial.weights is not None:
            start_from(self.model, initial)
        self.start(self.model, start, entries, task_order(entries, recipe.train.seed).epoch_samples)
        return self

    def loader(self, first_step: int) -> WorkerLoader:
        recipe = self.recipe
        return task_loader(
            self.task,
            self.splits["train"].entries,
            recipe.data,
            global_batch=recipe.train.global_batch,
            seed=recipe.train.seed,
            start_step=first_step,
            stop_step=self.steps,
        )

    def validate(self) -> float:
        self.engine.eval()
        result, _ = self.task.measure(self.model, self.splits["validation"].entries, "validation")
        self.engine.train()
        assert result is not None  # a validation split without labels is refused
        self.telemetry.measured("validation", scalars([result]), self.state.step)
        return self.task.score(result)

    def finish(self) -> dict[str, Result]:
        """Export the best weights by validation, measure the test split with them, and print where everything lies."""
        self.telemetry.bar.close()
        best = best_checkpoint(self.output, self.last_checkpoint())
        recipe, folder, step = self.recipe, self.output / "export", checkpoints.step_of(best)
        on_main(lambda: export_task(folder, checkpoints.read_weights(best), recipe, self.tokenizer, step))
        results: dict[str, Result] = {}
        if "test" in self.splits:
            model = load_task_model(self.task, best)
            result, predictions = self.task.measure(model, self.splits["test"].entries)
            results = {} if result is None else {result.metric: result}
            self.telemetry.measured("test", scalars(results.values()), self.state.step)
            write_predictions(predictions, self.output / "predictions.json")
        on_main(lambda: write_card(folder, recipe, step, {"test": results.values()} if results else None))
        self.conclude(best, results)
        return results


def check_batch(objective: Objective, batch: int, entries: int) -> None:
    """Refuse a batch of one pair for losses that compare pairs; name one that takes entries twice."""
    objective.require_pairs(batch)
    if batch > entries and distributed.is_main():  # no negatives of themselves: retrieval tells pairs by their images
        log.warning("train.global_batch = %d: of %d entries of data.train a step takes some twice", batch, entries)


def read_splits(recipe: FinetuneRecipe, task: Task, wanted: Sequence[str] = SPLITS) -> dict[str, TaskEntries]:
    """The entries of every split wanted that there is; every process reads them, one of each host first."""

    def read() -> dict[str, TaskEntries]:
        paths = None
        with refusing("data.cache", recipe.data.cache):
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


def load_task_model(task: Task, checkpoint: Path) -> EmaModel:
    """The model of a checkpoint's folder in float32, in evaluation mode, whole on each process."""
    weights = checkpoints.read_weights(checkpoint)
    with no_larger_than(weights, "--checkpoint", checkpoint):
        model = task.build_model()
    load_weights(model, weights, checkpoint)
    return model.to(distributed.device()).eval()


def write_predictions(predictions: object, path: Path) -> None:
    """Write what a task answered, where it writes anything, on the main process."""
    if predictions is not None and distributed.is_main():
        with atomic_write(path) as file:
            file.write(json.dumps(predictions).encode())
