"""A run from its first step to its last: what pre-training and fine-tuning have in common."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modstruct import checkpoints, distributed
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.config.recipe_files import check_resumable, decisive_fields
from modstruct.data.shards.faults import BadSampleCounter
from modstruct.data.shards.loader import steps_of
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed import hosts
from modstruct.distributed.heartbeat import Heartbeat
from modstruct.errors import RunError, refuse, require
from modstruct.training.checkpoint import restore, save
from modstruct.training.engine import build_engine, read_ds_config, resolve_ds_config
from modstruct.training.full_state import FullState, own_part
from modstruct.training.schedule import learning_rate
from modstruct.training.step import StepReport, train_step
from modstruct.training.telemetry import Telemetry

log = logging.getLogger("modstruct")
STOPPED_BY_SIGNAL = 128 + signal.SIGTERM
CHECK_SAMPLES_EVERY = 20  # steps


@dataclass
class Run:
    """A run that is ready to take its next step: pre-training or fine-tuning."""

    recipe: Recipe | FinetuneRecipe
    output: Path
    tokenizer: Tokenizer
    objective: Callable[[object, int, int], tuple[Tensor, dict[str, Tensor]]]
    """(what the model made, step, seed) -> total and terms of the global batch."""
    engine: object
    full: FullState
    state: checkpoints.TrainState
    steps: int
    """Length of the run."""
    telemetry: Telemetry
    heartbeat: Heartbeat
    loader: Callable[[int], WorkerLoader]
    """Batches from a step on, to the end of the run."""
    figures: Callable[[StepReport], dict[str, float]]
    """Further scalars of a logged step; every process calls it."""
    validate: Callable[[Run], float] | None
    """Measures the validation source; the figure by which the best checkpoint is chosen, from 0 to 1."""


class StopRequest:
    """Set by SIGTERM. The processes agree on it in the next step, since each may hear of it at another time."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_) -> None:
        self.requested = True


@dataclass
class Start:
    """Where a run begins: DeepSpeed's settings, resolved, and the checkpoint to go on from, if any."""

    ds_config: dict
    path: Path | None
    saved: checkpoints.Checkpoint | None

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.path and checkpoints.read_tokenizer(self.path)

    @property
    def samples(self) -> str | None:
        """Fingerprint of the checkpoint's training samples, their weights aside."""
        return self.saved and self.saved.state.data_fingerprint.partition(" ")[0]

    def state(self, fingerprint: str, named: object) -> checkpoints.TrainState:
        """Of the checkpoint, or of a fresh run. fingerprint: of the samples that there are; named: for the error."""
        if self.saved is None:
            return checkpoints.TrainState(data_fingerprint=fingerprint)
        if self.saved.state.data_fingerprint != fingerprint:
            refuse("data.train", named, "holds other samples, or other weights, than the checkpoint's")
        return self.saved.state


def find_start(recipe: Recipe | FinetuneRecipe, ds_config: str, resume: str | None) -> Start:
    """Check DeepSpeed's file, all hosts' settings and the checkpoint against the recipe; every process calls it."""
    resolved = resolve_ds_config(read_ds_config(ds_config), recipe, distributed.world_size())
    hosts.require_same(_same_everywhere(recipe, resolved), "start every host with the same command and versions")
    path = _starting_point(recipe, resume)
    saved = path and hosts.on_all(lambda: checkpoints.read(path))
    if saved:
        check_resumable(saved.recipe, recipe)
    return Start(resolved, path, saved)


def _same_everywhere(recipe: Recipe | FinetuneRecipe, ds_config: dict) -> dict[str, object]:
    """Whatever decides the run, by name."""
    described = json.dumps(ds_config, sort_keys=True)
    return decisive_fields(recipe) | {"--ds_config": described, "the version of torch": torch.__version__}


def _starting_point(recipe: Recipe | FinetuneRecipe, resume: str | None) -> Path | None:
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


def start_engine(recipe: Recipe | FinetuneRecipe, model: nn.Module, start: Start) -> FullState:
    """The model, with a checkpoint's weights if there is one, in DeepSpeed's hands."""
    if start.saved:
        checkpoints.load_weights(model, start.saved.weights, start.path)
    else:
        # Of momentum copies too: DeepSpeed does not broadcast them.
        hosts.require_same({"the first weights": _checksum(model)}, "hosts must read the same weight files")
    if hasattr(model, "outside_state"):
        if start.saved:
            checkpoints.load_momentum(model, start.saved.momentum, start.path)
        model.outside_to(distributed.device())
    full = FullState(build_engine(model, recipe, start.ds_config))
    if full.engine.zero_optimization_stage() == 3 and hasattr(model, "spread_momentum"):
        model.spread_momentum(own_part)
    if start.saved:
        restore(full, start.saved)
        log.info("Resumed from %s", start.path)
    else:
        # Weights start equal on every process; what is drawn from here on (dropout) must not be.
        torch.manual_seed(recipe.train.seed * 1_000_003 + distributed.rank())
    return full


def _checksum(model: nn.Module) -> str:
    content = hashlib.blake2b(digest_size=16)
    for _, value in sorted(model.state_dict().items()):
        content.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def run_length(recipe: Recipe | FinetuneRecipe, epoch_samples: int) -> int:
    """Steps of the run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, math.ceil(recipe.train.epochs * epoch_samples / recipe.train.global_batch))


def describe(recipe: Recipe | FinetuneRecipe, samples: int, engine, steps: int) -> None:
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    log.info(
        "%s parameters, %s training samples, %s steps of %s, %s, ZeRO stage %s, %s process(es) on %s",
        *(f"{n:,}" for n in (parameters, samples, steps, recipe.train.global_batch)),
        recipe.train.precision,
        engine.zero_optimization_stage(),
        distributed.world_size(),
        distributed.device().type,
    )


def train(run: Run, stop: StopRequest, after_step: Callable[[], None] = lambda: None) -> None:
    """Take the steps that are left; measure and save on the way. Ends the process after a save if asked to stop."""
    recipe, state = run.recipe, run.state
    ledger = BadSampleCounter("data.train", recipe.data.max_bad_share, distributed.rank())
    run.engine.train()
    clock = run.telemetry.clock
    for batches in run.heartbeat.following(clock.waiting(steps_of(run.loader(state.step))), state.step):
        parts = [batch.tensors for batch in batches]
        rate = learning_rate(recipe.optimizer, state.step, run.steps)
        report = train_step(
            run.engine, run.objective, parts, state.step, recipe.train.seed, rate, stop.requested, clock
        )
        if hasattr(run.engine.module, "logit_scale"):
            run.full.clamp(run.engine.module.logit_scale, *run.engine.module.logit_scale_range)
        state.step += 1
        note_skip(report, state, recipe)
        for batch in batches:
            ledger.add(batch.faults, batch.tried)
        more = partial(_figures, run, report, ledger)
        run.telemetry.step(state.step, report, recipe.logging.every_steps, rate, more)
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


def note_skip(report: StepReport, state: checkpoints.TrainState, recipe: Recipe | FinetuneRecipe) -> None:
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


def _figures(run: Run, report: StepReport, ledger: BadSampleCounter) -> dict[str, float]:
    return run.figures(report) | {"data/bad_samples": ledger.bad}


def check_samples(ledger: BadSampleCounter) -> None:
    """Stop the run on every process when too many of all processes' samples were bad."""
    counts = torch.tensor([ledger.bad, ledger.tried], device=distributed.device())
    ledger.check(*distributed.sum_over_processes(counts).tolist())


def measure_and_save(run: Run, stopping: bool) -> None:
    """Checkpoints and validation that are due after the current step; saved first, so that no error loses a step."""
    recipe, state = run.recipe, run.state
    step, last = state.step, state.step == run.steps
    every, validate_every = recipe.checkpoints.every_steps, recipe.evaluation.every_steps
    validate = run.validate is not None and (last or (validate_every and step % validate_every == 0))
    if not (stopping or last or validate or (every and step % every == 0)):
        return
    run.telemetry.pause()
    run.full.agree_on_statistics()
    path = save(run.full, state, recipe, run.tokenizer)
    if validate and not stopping:
        score = run.validate(run)
        if distributed.is_main():
            checkpoints.note_score(path, score)
    run.telemetry.resume()
