"""A pretraining run from recipe to table: open or resume, train, save, measure, export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.data.classification.class_files import load_classes
from modstruct.data.run_data import RunData, open_run_data
from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader, train_order
from modstruct.data.shards.workers import WorkerLoader
from modstruct.distributed.heartbeat import Heartbeat
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.example_grid import retrieved_examples
from modstruct.evaluation.structure.basic import structure
from modstruct.evaluation.tables import flatten, table, validation_recall_at_1
from modstruct.losses.objective import Objective
from modstruct.models.build import build_model, image_size, initial_tokenizer
from modstruct.training.conduct import conclude, conduct, last_checkpoint
from modstruct.training.export import export
from modstruct.training.run import Run, describe, find_start, run_length, start_engine
from modstruct.training.step import StepReport
from modstruct.training.telemetry import Telemetry


@dataclass(kw_only=True)
class PretrainingRun(Run):
    """A pre-training run that is ready to take its next step."""

    data: RunData


def pretrain(recipe: Recipe, ds_config: str, resume: str | None = None, profile_steps: int = 0) -> dict:
    """Train, evaluate and export; every process calls it. Returns the final metrics.

    ds_config: path of the DeepSpeed JSON. resume: `latest`, `best`, a checkpoint folder, or None for a fresh run.
    profile_steps: steps to trace into OUTPUT/profile. Raises ValueError naming the field for what cannot work, before
    the first step.
    """
    return conduct(recipe, lambda: open_run(recipe, ds_config, resume), finish, profile_steps)


def open_run(recipe: Recipe, ds_config: str, resume: str | None) -> Run:
    """Data, model, engine, and what a checkpoint says of them."""
    start = find_start(recipe, ds_config, resume)
    tokenizer = start.tokenizer or initial_tokenizer(recipe)
    data = open_run_data(recipe, image_size(recipe), tokenizer, fingerprint=start.samples)
    if data.zero_shot:
        load_classes(data.zero_shot)  # what is wrong with it is said now, not at the first validation
    state = start.state(f"{data.train.fingerprint} {data.train.weights}", recipe.data.train)
    epoch_samples = train_order(data.train, recipe.data, recipe.train.seed).epoch_samples
    steps = run_length(recipe, epoch_samples)
    epoch_steps = math.ceil(epoch_samples / recipe.train.global_batch)
    objective = Objective(recipe.losses, recipe.train.pairwise_precision, epoch_steps)
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe, data.tokenizer, objective, read_weights=start.saved is None)
    full = start_engine(recipe, model, start)
    describe(recipe, len(data.train), full.engine, steps)

    def loader(first_step: int) -> WorkerLoader:
        contents = BatchContents(data.views, data.tokenizer, model.batch_fields, recipe.losses.masked_language.rate)
        plan = BatchPlan(recipe.train.global_batch, recipe.train.seed, first_step, steps, recipe.train.micro_batch)
        return train_loader(data.train, recipe.data, contents, plan)

    def validate(run: PretrainingRun) -> float:
        return validation_recall_at_1(measure(run, data.validation, "validation"))

    return PretrainingRun(
        recipe=recipe,
        output=Path(recipe.output),
        tokenizer=data.tokenizer,
        objective=objective,
        engine=full.engine,
        full=full,
        state=state,
        steps=steps,
        telemetry=Telemetry(Path(recipe.output), state.step, steps, recipe.train.global_batch),
        heartbeat=Heartbeat(recipe.train.hang_timeout_minutes),
        loader=loader,
        figures=batch_structure,
        validate=None if data.validation is None else validate,
        data=data,
    )


def batch_structure(report: StepReport) -> dict[str, float]:
    """Structure figures of a step's batch; every process calls it."""
    image, text = (distributed.gather(z.detach()) for z in (report.embeddings.image, report.embeddings.text))
    shape = structure(image, text) if distributed.is_main() else {}
    return {f"structure/{name}": value for name, value in shape.items()}


def measure(run: PretrainingRun, samples, name: str) -> dict:
    """Evaluate a source with all processes; scalars and an example grid go to TensorBoard under `name`."""

    def inspect(source) -> None:
        if run.recipe.logging.images:
            grid = retrieved_examples(source, samples, run.data.views, run.recipe.logging.images)
            run.telemetry.image(f"{name}/examples", grid, run.state.step)

    run.engine.eval()
    metrics = evaluate(
        run.engine,
        samples,
        run.data,
        run.recipe.evaluation,
        distributed.device(),
        f"data.{name}",
        inspect,
        run.engine.module if run.recipe.framework == "fusion" else None,
    )
    run.engine.train()
    run.telemetry.scalars({f"{name}/{key}": value for key, value in flatten(metrics).items()}, run.state.step)
    return metrics


def finish(run: PretrainingRun) -> dict:
    """Export the last weights, measure data.eval with them, and print where everything lies."""
    run.telemetry.bar.close()
    last = last_checkpoint(run)
    if distributed.is_main():
        renamed = getattr(run.engine.module, "to_open_clip", {})
        export(run.output / "export", checkpoints.read_weights(last), renamed, run.recipe, run.data.tokenizer)
    metrics = measure(run, run.data.eval, "eval") if run.data.eval else {}
    conclude(run, last, metrics, table)
    return metrics
