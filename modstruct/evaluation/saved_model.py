"""Measure a checkpoint without the training engine: any number of processes, a whole model on each."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.data.classification.class_files import load_classes
from modstruct.data.run_data import open_run_data
from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import refuse
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.tables import save_metrics, table
from modstruct.losses.objective import build_objective
from modstruct.models.build import build_model, image_size


def saved_model(recipe: Recipe, path: Path, tokenizer: Tokenizer) -> nn.Module:
    """The model of a checkpoint's folder, whole and in evaluation mode, where this process computes."""
    model = build_model(recipe, tokenizer, build_objective(recipe.losses), read_weights=False)
    checkpoints.load_weights(model, checkpoints.read_weights(path), path)
    return model.to(distributed.device()).eval()


def evaluate_checkpoint(recipe: Recipe, checkpoint: str, out: str | None = None) -> dict:
    """Embed data.eval with a checkpoint's weights in float32 and print its table; every process calls it.

    recipe: the checkpoint's, with overrides. checkpoint: its folder, or a run's folder for its last one. out: JSON file
    for the metrics, by default RUN/evaluation.json. Raises ValueError naming the option or field that is wrong.
    """
    distributed.start_processes()
    # The main process's choice: a run that is still training may write another one in between.
    path = distributed.broadcast_object(checkpoints.find(checkpoint, checkpoint, "--checkpoint"))
    if path is None:
        refuse("--checkpoint", checkpoint, "this run has no checkpoint yet")
    if recipe.data.eval is None:
        refuse("data.eval", None, "name the shards to measure")
    tokenizer = checkpoints.read_tokenizer(path)
    data = open_run_data(recipe, image_size(recipe), tokenizer, training=False)
    if data.zero_shot:
        load_classes(data.zero_shot)  # what is wrong with it is said before the work
    model = saved_model(recipe, path, tokenizer)
    metrics = evaluate(
        model,
        data.eval,
        data.views,
        tokenizer,
        recipe.evaluation,
        data.zero_shot,
        distributed.device(),
        fusion=model if recipe.framework == "fusion" else None,
    )
    if distributed.is_main():
        print(f"\n{path}\n\n{table(metrics)}")
        out = out or path.resolve().parents[1] / "evaluation.json"
        save_metrics(metrics, out)
        print(f"\nmetrics: {out}")
    return metrics
