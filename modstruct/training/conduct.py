"""What frames every run: processes and log before the first step; export, figures and their places at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modstruct import checkpoints, distributed
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.evaluation.tables import save_metrics
from modstruct.training.checkpoint import save
from modstruct.training.profiler import profiled
from modstruct.training.run import Run, StopRequest, train
from modstruct.training.telemetry import start_logging


def conduct(
    recipe: Recipe | FinetuneRecipe, open_run: Callable[[], Run], finish: Callable[[Run], dict], profile_steps: int
) -> dict:
    """A run from its first line to its table; every process calls it. Returns the final metrics.

    profile_steps: steps to trace into OUTPUT/profile.
    """
    distributed.start_processes()
    start_logging(Path(recipe.output))
    stop = StopRequest()
    run = open_run()
    profiling = profiled(run.output / "profile", profile_steps, run.state.step, run.steps)
    with run.heartbeat:
        with profiling as after_step:
            train(run, stop, after_step)
        return finish(run)


def last_checkpoint(run: Run) -> Path:
    """Folder of the checkpoint after the last step, written if need be; every process calls it."""
    path = checkpoints.step_folder(run.output, run.state.step)
    if not distributed.broadcast_object(path.exists()):  # a finished run, resumed into another folder
        save(run.full, run.state, run.recipe, run.tokenizer)
    return path


def best_checkpoint(run: Run, last: Path) -> Path:
    """Folder of the best checkpoint by the validation split; the last one where there is none."""
    found = checkpoints.find("best", run.output) if checkpoints.read_best(run.output) else None
    return distributed.broadcast_object(found or last)


def conclude(run: Run, checkpoint: Path, metrics: dict, table: Callable[[dict], str]) -> None:
    """Save the metrics, print them, and say where everything lies; every process calls it."""
    run.telemetry.close()
    if distributed.is_main():
        if metrics:
            save_metrics(metrics, run.output / "metrics.json")
            print(f"\n{table(metrics)}\n")
        places = {
            "checkpoint": checkpoint,
            "exported weights": run.output / "export",
            "TensorBoard": run.telemetry.folder,
            "metrics": run.output / "metrics.json",
            "predictions": run.output / "predictions.json",
        }
        print("\n".join(f"{name + ':':<18}{place}" for name, place in places.items() if place.exists()))
    distributed.barrier()
