"""A pretraining run from recipe to table: open or resume, train, save, measure, export."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modstruct import checkpoints, distributed, hosts
from modstruct.config import Recipe, RunError, refuse, require
from modstruct.data.faults import FaultLedger
from modstruct.data.loader import steps_of, train_loader, train_order
from modstruct.data.run_data import RunData, open_run_data
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.examples import retrieved_examples
from modstruct.evaluation.report import flatten, save_metrics, table, validation_recall_at_1
from modstruct.evaluation.structure import structure
from modstruct.evaluation.zero_shot import load_classes
from modstruct.losses.objective import Objective
from modstruct.models.build import build_model, image_size
from modstruct.recipe_files import check_resumable, decisive_fields
from modstruct.training.checkpoint import restore, save
from modstruct.training.engine import build_engine, read_ds_config, resolve_ds_config
from modstruct.training.export import export
from modstruct.training.full_state import FullState
from modstruct.training.heartbeat import Heartbeat
from modstruct.training.profiler import profiled
from modstruct.training.schedule import learning_rate
from modstruct.training.step import StepReport, train_step
from modstruct.training.telemetry import Telemetry, start_logging

log = logging.getLogger("modstruct")
STOPPED_BY_SIGNAL = 128 + signal.SIGTERM
CHECK_SAMPLES_EVERY = 20  # steps


@dataclass
class Run:
    """A run that is ready to take its next step."""

    recipe: Recipe
    output: Path
    data: RunData
    objective: Objective
    engine: object
    full: FullState
    state: checkpoints.TrainState
    steps: int
    """Length of the run."""
    telemetry: Telemetry
    heartbeat: Heartbeat


def pretrain(recipe: Recipe, ds_config: str, resume: str | None = None, profile_steps: int = 0) -> dict:
    """Train, evaluate and export; every process calls it. Returns the final metrics.

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


class StopRequest:
    """Set by SIGTERM. The processes agree on it in the next step, since each may hear of it at another time."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_) -> None:
        self.requested = True


def open_run(recipe: Recipe, ds_config: str, resume: str | None) -> Run:
    """Data, model, engine, and what a checkpoint says of them."""
    if recipe.framework == "fusion" and recipe.train.micro_batch is not None:
        refuse("train.micro_batch", recipe.train.micro_batch, "the fusion model takes its batch whole: null")
    resolved = resolve_ds_config(read_ds_config(ds_config), recipe, distributed.world_size())
    output = Path(recipe.output)
    hosts.require_same(_same_everywhere(recipe, resolved), "start every host with the same command and versions")
    start = _starting_point(recipe, resume)
    saved = start and hosts.on_all(lambda: checkpoints.read(start))
    if saved:
        check_resumable(saved.recipe, recipe)
    tokenizer = start and checkpoints.read_tokenizer(start)
    samples = saved and saved.state.data_fingerprint.partition(" ")[0]
    data = open_run_data(recipe, image_size(recipe), tokenizer, fingerprint=samples)
    if data.zero_shot:
        load_classes(data.zero_shot)  # what is wrong with it is said now, not at the first validation
    fingerprint = f"{data.train.fingerprint} {data.train.weights}"
    state = saved.state if saved else checkpoints.TrainState(data_fingerprint=fingerprint)
    if state.data_fingerprint != fingerprint:
        refuse("data.train", recipe.data.train, "holds other samples, or other weights, than the checkpoint's")
    epoch_samples = train_order(data.train, recipe.data, recipe.train.seed).epoch_samples
    epoch_steps = math.ceil(epoch_samples / recipe.train.global_batch)
    objective = Objective(recipe.losses, recipe.train.pairwise_precision, epoch_steps)
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe, data.tokenizer, objective, read_weights=not saved)
    if saved:
        checkpoints.load_weights(model, saved.weights, start)
    if hasattr(model, "outside_state"):
        if saved:
            checkpoints.load_momentum(model, saved.momentum, start)
        model.outside_to(distributed.device())
    engine = build_engine(model, recipe, resolved)
    full = FullState(engine)
    if saved:
        restore(full, saved)
        log.info("Resumed from %s", start)
    else:
        # Weights start equal on every process; what is drawn from here on (dropout) must not be.
        torch.manual_seed(recipe.train.seed * 1_000_003 + distributed.rank())
    steps = run_length(recipe, epoch_samples)
    _describe(recipe, data, model, engine, steps)
    telemetry = Telemetry(output, state.step, steps, recipe.train.global_batch)
    heartbeat = Heartbeat(recipe.train.hang_timeout_minutes)
    return Run(recipe, output, data, objective, engine, full, state, steps, telemetry, heartbeat)


def _same_everywhere(recipe: Recipe, ds_config: dict) -> dict[str, object]:
    """Whatever decides the run, by name."""
    described = json.dumps(ds_config, sort_keys=True)
    return decisive_fields(recipe) | {"--ds_config": described, "the version of torch": torch.__version__}


def _starting_point(recipe: Recipe, resume: str | None) -> Path | None:
    """The checkpoint to go on from; None for a fresh run."""
    hosts.require_shared_folder(recipe.output, "output")
    if resume is None:
        require(
            not checkpoints.list_checkpoints(recipe.output),
            "output",
            recipe.output,
            "holds checkpoints of an earlier run: add `--resume latest` to go on with it, or choose another --output",
        )
    distributed.barrier()
    if distributed.is_main():
        checkpoints.clean(recipe.output)
    path = hosts.on_all(lambda: checkpoints.find(resume, recipe.output)) if resume else None
    if resume and path is None:
        log.info("No checkpoint in %s yet: starting from the beginning", recipe.output)
    hosts.require_same({"--resume": path and path.name}, "hosts must see the same checkpoints: share the folder")
    return path


def run_length(recipe: Recipe, epoch_samples: int) -> int:
    """Steps of the run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, math.ceil(recipe.train.epochs * epoch_samples / recipe.train.global_batch))


def _describe(recipe: Recipe, data: RunData, model: nn.Module, engine, steps: int) -> None:
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    log.info(
        "%s parameters, %s training pairs, %s steps of %s, %s, ZeRO stage %s, %s process(es) on %s",
        *(f"{n:,}" for n in (parameters, len(data.train), steps, recipe.train.global_batch)),
        recipe.train.precision,
        engine.zero_optimization_stage(),
        distributed.world_size(),
        distributed.device().type,
    )


def train(run: Run, stop: StopRequest, after_step: Callable[[], None] = lambda: None) -> None:
    """Take the steps that are left; measure and save on the way. Ends the process after a save if asked to stop."""
    recipe, state = run.recipe, run.state
    loader = train_loader(
        run.data.train,
        recipe.data,
        run.data.views,
        run.data.tokenizer,
        run.engine.module.batch_fields,
        global_batch=recipe.train.global_batch,
        seed=recipe.train.seed,
        micro_batch=recipe.train.micro_batch,
        start_step=state.step,
        stop_step=run.steps,
        masked_rate=recipe.losses.masked_language.rate,
    )
    ledger = FaultLedger("data.train", recipe.data.max_bad_share, distributed.rank())
    run.engine.train()
    clock = run.telemetry.clock
    for batches in run.heartbeat.following(clock.waiting(steps_of(loader)), state.step):
        parts = [batch.tensors for batch in batches]
        rate = learning_rate(recipe.optimizer, state.step, run.steps)
        report = train_step(
            run.engine, run.objective, parts, state.step, recipe.train.seed, rate, stop.requested, clock
        )
        run.full.clamp(run.engine.module.logit_scale, *run.engine.module.logit_scale_range)
        state.step += 1
        note_skip(report, state, recipe)
        for batch in batches:
            ledger.add(batch.faults, batch.tried)
        run.telemetry.step(state.step, report, recipe.logging.every_steps, rate, lambda: figures(report, ledger))  # noqa: B023
        if state.step % CHECK_SAMPLES_EVERY == 0 or state.step == run.steps:
            check_samples(ledger)
        after_step()
        with run.heartbeat.unhurried():
            measure_and_save(run, report.stop)
        if report.stop:
            log.warning("Stopped by SIGTERM after step %d; `--resume latest` goes on from there", state.step)
            run.telemetry.close()
            distributed.barrier()
            sys.exit(STOPPED_BY_SIGNAL)


def note_skip(report: StepReport, state: checkpoints.TrainState, recipe: Recipe) -> None:
    """Count steps skipped in a row; too many end the run."""
    if report.skipped is None:
        state.skipped_in_a_row = 0
        return
    if recipe.train.precision == "fp16" and report.overflow:
        return  # DeepSpeed answers with a smaller loss scale, and ends the run when there is none
    state.skipped_in_a_row += 1
    log.warning("Step %d skipped: %s", state.step, report.skipped)
    if state.skipped_in_a_row > recipe.train.max_skipped_steps:
        raise RunError(
            f"train.max_skipped_steps = {recipe.train.max_skipped_steps}: {state.skipped_in_a_row} steps in a row "
            f"were skipped, the last because {report.skipped}; lower the learning rate, or resume from a checkpoint"
        )


def figures(report: StepReport, ledger: FaultLedger) -> dict[str, float]:
    """Further scalars of a logged step; every process calls it."""
    image, text = (distributed.gather(z.detach()) for z in (report.embeddings.image, report.embeddings.text))
    shape = structure(image, text) if distributed.is_main() else {}
    return {f"structure/{name}": value for name, value in shape.items()} | {"data/bad_samples": ledger.bad}


def check_samples(ledger: FaultLedger) -> None:
    """Stop the run on every process when too many of all processes' samples were bad."""
    counts = torch.tensor([ledger.bad, ledger.tried], device=distributed.device())
    ledger.check(*distributed.sum_over_processes(counts).tolist())


def measure_and_save(run: Run, stopping: bool) -> None:
    """Checkpoints and validation that are due after the current step; saved first, so that no error loses a step."""
    recipe, state = run.recipe, run.state
    step, last = state.step, state.step == run.steps
    every, validate_every = recipe.checkpoints.every_steps, recipe.evaluation.every_steps
    validate = run.data.validation is not None and (last or (validate_every and step % validate_every == 0))
    if not (stopping or last or validate or (every and step % every == 0)):
        return
    run.telemetry.pause()
    run.full.agree_on_statistics()
    path = save(run.full, state, recipe, run.data.tokenizer)
    if validate and not stopping:
        recall = validation_recall_at_1(measure(run, run.data.validation, "validation"))
        if distributed.is_main():
            checkpoints.note_recall(path, recall)
    run.telemetry.resume()


def measure(run: Run, samples, name: str) -> dict:
    """Evaluate a source with all processes; scalars and an example grid go to TensorBoard under `name`."""

    def inspect(source) -> None:
        if run.recipe.logging.images:
            grid = retrieved_examples(source, samples, run.data.views, run.recipe.logging.images)
            run.telemetry.image(f"{name}/examples", grid, run.state.step)

    run.engine.eval()
    metrics = evaluate(
        run.engine,
        samples,
        run.data.views,
        run.data.tokenizer,
        run.recipe.evaluation,
        run.data.zero_shot,
        distributed.device(),
        f"data.{name}",
        inspect,
    )
    run.engine.train()
    run.telemetry.scalars({f"{name}/{key}": value for key, value in flatten(metrics).items()}, run.state.step)
    return metrics


def finish(run: Run) -> dict:
    """Export the last weights, measure data.eval with them, and print where everything lies."""
    run.telemetry.bar.close()
    last = checkpoints.step_folder(run.output, run.state.step)
    exported = run.output / "export"
    if not distributed.broadcast_object(last.exists()):  # a finished run, resumed into another folder
        save(run.full, run.state, run.recipe, run.data.tokenizer)
    if distributed.is_main():
        export(
            exported,
            checkpoints.read_weights(last),
            getattr(run.engine.module, "to_open_clip", {}),
            run.recipe,
            run.data.tokenizer,
        )
    metrics = measure(run, run.data.eval, "eval") if run.data.eval else {}
    run.telemetry.close()
    if distributed.is_main():
        if metrics:
            save_metrics(metrics, run.output / "metrics.json")
            print(f"\n{table(metrics)}\n")
        places = {
            "checkpoint": last,
            "exported weights": exported,
            "TensorBoard": run.telemetry.folder,
            "metrics": run.output / "metrics.json",
        }
        print("\n".join(f"{name + ':':<18}{place}" for name, place in places.items() if place.exists()))
    distributed.barrier()
    return metrics
