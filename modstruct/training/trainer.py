"""A run from its first line to its table: what pre-training and fine-tuning have in common."""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from modstruct import checkpoints, distributed, stopping
from modstruct.checkpoints import Checkpoint, TrainState
from modstruct.config import FinetuneRecipe, OptimizerConfig, Recipe
from modstruct.config.recipe_files import check_resumable, decisive_fields, recipe_to_dict
from modstruct.data.faults import BadSampleCounter
from modstruct.data.shards.loader import TrainBatch, steps_of
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.tokenizers import Tokenizer, load_tokenizer
from modstruct.distributed import hosts, run_lock
from modstruct.distributed.collect import on_main
from modstruct.distributed.heartbeat import Heartbeat
from modstruct.errors import RunError, refuse, require
from modstruct.evaluation.result import Result
from modstruct.evaluation.tables import save_results, table
from modstruct.losses.objective import Objective
from modstruct.models.build import (
    autocast_forward,
    cast_but_norms,
    compile_trunks,
    float32_products,
    lay_channels_last,
    recompute_activations,
)
from modstruct.models.deferred import Deferred
from modstruct.models.protocol import TrainableModel, load_weights
from modstruct.training.checkpoint import CheckpointWriter, require_moments, restore
from modstruct.training.deepspeed_adapter import Engine, local_part, shard, start_engine
from modstruct.training.ds_config import build_optimizer, read_ds_config, resolve_ds_config, size_buckets, zero_stage
from modstruct.training.ema import ShardedEma
from modstruct.training.first_weights import FirstWeights
from modstruct.training.logging import Telemetry, start_logging
from modstruct.training.step import StepReport, sent_ahead, train_step
from modstruct.training.timing import profiled

log = logging.getLogger("modstruct")
CHECK_SAMPLES_EVERY = 20  # steps
WRITER_FAILED = 1 << 10
"""In the place of a signal's number, which is lower: a checkpoint could not be written."""
RecipeT = TypeVar("RecipeT", Recipe, FinetuneRecipe)


@dataclass
class Start:
    """Where a run begins: DeepSpeed's settings, resolved, and the checkpoint to resume from, if any."""

    ds_config: dict
    path: Path | None
    saved: Checkpoint | None
    tokenizer: Tokenizer | None

    @property
    def samples(self) -> str | None:
        """Fingerprint of the checkpoint's training samples, their weights aside."""
        return None if self.saved is None else self.saved.state.data_fingerprint.partition(" ")[0]

    def state(self, fingerprint: str, named: object) -> TrainState:
        """Of the checkpoint, or of a fresh run. fingerprint: of the samples that there are; named: for the error."""
        if self.saved is None:
            return TrainState(data_fingerprint=fingerprint)
        if self.saved.state.data_fingerprint != fingerprint:
            remedy = "holds other samples, weights, max_repeats or lines that are captions than the checkpoint's"
            before, now = (" lines " in text for text in (self.saved.state.data_fingerprint, fingerprint))
            if before != now:
                remedy += f": give data.caption_lines: {str(before).lower()}, as it was read before"
            else:
                remedy += "; give those, or begin a run of its own, from its weights: --model.pretrained RUN"
            refuse("data.train", named, remedy)
        return self.saved.state


class Trainer(ABC, Generic[RecipeT]):
    """A run. Subclasses say how to build, validate and finish it; every process calls every method.

    ds_config: path of the DeepSpeed JSON, which is read at once. resume: `latest`, `best`, a checkpoint folder, or None
    for a fresh run.
    """

    tokenizer: Tokenizer
    objective: Objective
    engine: Engine
    telemetry: Telemetry
    heartbeat: Heartbeat
    writer: CheckpointWriter
    state: TrainState
    steps: int
    """Length of the run."""
    has_validation: bool

    def __init__(self, recipe: RecipeT, ds_config: str, resume: str | None = None):
        self.recipe: RecipeT = recipe
        self.ds_config, self.resume = read_ds_config(ds_config), resume
        self.output = Path(recipe.output)

    @abstractmethod
    def build(self) -> Trainer:
        """Data, objective, model and engine, and what a checkpoint says of them; ready for the next step."""

    @abstractmethod
    def loader(self, first_step: int) -> WorkerLoader:
        """Batches from a step on, to the end of the run."""

    @abstractmethod
    def validate(self) -> float:
        """Measure the validation source; the score by which the best checkpoint is chosen, from 0 to 1."""

    @abstractmethod
    def finish(self) -> dict:
        """Measure, export and print at the end of the run. Returns the final metrics."""

    def step_metrics(self, report: StepReport, batches: Sequence[TrainBatch]) -> dict[str, float]:
        """Further scalars of a logged step. batches: its parts."""
        return {}

    @property
    def counted(self) -> list[str]:
        """Names of the loader's counts that are logged."""
        return []

    def run(self, profile_steps: int = 0) -> dict:
        """The whole run. profile_steps: steps to trace into OUTPUT/profile. Returns the final metrics.

        Signals end the process as Python has it, without saving, unless `stopping.listen` was called before, as launch
        scripts do. Raises ValueError naming the field for what cannot work, before the first step.
        """
        output, remedy = self.recipe.output, "name a folder for the run, such as runs/mine"
        require(bool(output.strip()), "output", output, remedy)  # Path("") would be the current one
        distributed.start_processes()
        nothing = "no step was taken, so there is nothing to save"
        products = float32_products(self.recipe.train.tf32)
        with run_lock.held(self.output, "output"), stopping.stage(nothing) as stage, products:
            start_logging(self.output)
            self.build()
            profiling = profiled(self.output / "profile", profile_steps, self.state.step, self.steps)
            # What holds after the training, which is a stage of its own.
            stage.meaning = f"step {self.steps} is saved, and `--resume latest` ends the run from there"
            with self.heartbeat:
                with profiling as after_step:
                    self.train(after_step)
                return self.finish()

    def train(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Take the steps that are left; measure and save on the way. Ends the process after a save if asked to stop.

        The processes agree on that in a step, since each may hear of it at another time.
        """
        with stopping.stage("no step was taken, so there is nothing to save") as stage, self.writer.finishing():
            self._take_steps(after_step, stage)

    def _take_steps(self, after_step: Callable[[], None], stage: stopping.Stage) -> None:
        recipe, state = self.recipe, self.state
        bad_samples = BadSampleCounter("data.train", recipe.data.max_bad_share, distributed.rank())
        counts: Counter[str] = Counter()
        with self.heartbeat.unhurried():
            self._validate_again()
        self.engine.train()
        clock = self.telemetry.clock
        batches_of_steps = clock.waiting(sent_ahead(steps_of(self.loader(state.step))))
        for batches in self.heartbeat.following(batches_of_steps, state.step):
            parts = [batch.tensors for batch in batches]
            rate = learning_rate(recipe.optimizer, state.step, self.steps)
            stop = WRITER_FAILED if self.writer.failed else stopping.requested()
            report = train_step(self.engine, self.objective, parts, state.step, rate, stop, clock)
            if report.stop == WRITER_FAILED:
                self.writer.wait()  # which raises why, on every process
            stage.deferred = True
            state.step += 1
            note_skip(report, state, recipe)
            for batch in batches:
                bad_samples.add(batch.faults, batch.tried)
                counts.update(batch.counts)
            more = partial(self._logged, report, batches, bad_samples, counts)
            self.telemetry.step(state.step, report, recipe.logging.every_steps, rate, more)
            if state.step % CHECK_SAMPLES_EVERY == 0 or state.step == self.steps:
                check_samples(bad_samples)
            after_step()
            with self.heartbeat.unhurried():
                self.validate_and_save(bool(report.stop))
            if report.stop:
                by = stopping.name_of(report.stop)
                log.info("Stopped by %s after step %d; `--resume latest` resumes from there", by, state.step)
                self.telemetry.close()
                distributed.barrier()
                raise stopping.Stopped(report.stop)

    def _logged(
        self,
        report: StepReport,
        batches: Sequence[TrainBatch],
        bad_samples: BadSampleCounter,
        counts: Mapping[str, int],
    ) -> dict[str, float]:
        """counts: of this process, by names of the loader; of all processes, since this process started, as scalars."""
        found = {"data/bad_samples": float(bad_samples.bad)}
        if self.counted:
            mine = torch.tensor([counts.get(name, 0) for name in self.counted], device=distributed.device())
            summed = distributed.sum_over_processes(mine).tolist()
            found |= {f"data/{name}": count for name, count in zip(self.counted, summed, strict=True)}
        return self.step_metrics(report, batches) | found

    def validate_and_save(self, stop: bool) -> None:
        """Checkpoint and validation that are due after the current step; saved first, so that no error loses a step."""
        recipe, step, last = self.recipe, self.state.step, self.state.step == self.steps
        every, validate = recipe.checkpoints.every_steps, self._validation_is_due()
        if not (stop or last or validate or (every and step % every == 0)):
            return
        self.telemetry.pause()
        self.engine.agree_on_statistics()
        path = self.writer.save(self.engine, self.state, recipe, self.tokenizer)
        if stop or last:
            self.writer.wait_for_last()
        elif validate or not recipe.checkpoints.asynchronous:
            self.writer.wait()
        if validate and not stop:
            self._validate_and_note(path)
        self.telemetry.resume()

    def _validation_is_due(self) -> bool:
        step, every = self.state.step, self.recipe.evaluation.every_steps
        return self.has_validation and (step == self.steps or bool(every and step % every == 0))

    def _validate_and_note(self, path: Path) -> None:
        """path: the current step's checkpoint."""
        with stopping.stage(f"step {self.state.step} is saved, and `--resume latest` resumes from there"):
            score = self.validate()
        if distributed.is_main():
            checkpoints.note_score(path, score)

    def _validate_again(self) -> None:
        """What a stop cut short before the resume, so that the best checkpoint is the unbroken run's."""
        path = checkpoints.step_folder(self.output, self.state.step)
        if self.state.step == 0 or not self._validation_is_due():
            return
        if distributed.broadcast_object(path.exists() and not checkpoints.was_validated(path)):
            log.info("Validating step %d, which a stop cut short", self.state.step)
            self._validate_and_note(path)

    def find_start(self) -> Start:
        """Check DeepSpeed's file, all hosts' settings and the checkpoint against the recipe."""
        recipe = self.recipe
        resolved = resolve_ds_config(self.ds_config, recipe, distributed.world_size())
        described = {"--ds_config": json.dumps(resolved, sort_keys=True), "the version of torch": torch.__version__}
        hosts.require_same(decisive_fields(recipe) | described, "start every host with the same command and versions")
        path = self._starting_point()
        if path is None:
            return Start(resolved, None, None, None)
        mine = distributed.rank(), distributed.world_size()  # each process checks a share of it
        saved, tokenizer = hosts.on_all(lambda: (checkpoints.read(path, *mine), load_tokenizer(path / "tokenizer")))
        check_resumable(saved.recipe, recipe)
        before, now = saved.recipe["data"].get("validation"), recipe_to_dict(recipe)["data"]["validation"]
        if before != now and distributed.is_main() and checkpoints.read_best(self.output):
            told = "data.validation = %s: the best checkpoint so far was found by %s, and stays the best until a higher"
            log.warning(f"{told} score comes, comparable or not; without checkpoints/best.json it is none", now, before)
        return Start(resolved, path, saved, tokenizer)

    def _starting_point(self) -> Path | None:
        """The checkpoint to resume from; None for a fresh run, and for `latest` where there is none yet."""
        output, resume = self.recipe.output, self.resume
        given = resume is None or bool(resume.strip())
        require(given, "--resume", resume, "give `latest`, `best` or a checkpoint's folder; without it a run is new")
        there = checkpoints.list_checkpoints(output)
        if resume is None:
            remedy = "add `--resume latest` to resume it, or choose another --output"
            require(not there, "output", output, f"holds checkpoints of an earlier run: {remedy}")
        distributed.barrier()
        if distributed.is_main():
            checkpoints.clean(output)
        path = hosts.on_all(lambda: checkpoints.find(resume, output)) if resume else None
        if path:
            hosts.on_all(partial(self._look_at_output, path, there))
        elif resume:
            require(resume == "latest", "--resume", resume, "holds no checkpoint; only `latest` may begin a new run")
            log.info("No checkpoint in %s yet: starting from the beginning", output)
        hosts.require_same({"--resume": path and path.name}, "hosts must see the same checkpoints: share the folder")
        return path

    def _look_at_output(self, path: Path, there: Sequence[Path]) -> None:
        """Refuse to write over another run's checkpoints; name those of this run that a resume from `path` leaves.

        there: the checkpoints in the output folder.
        """
        if path.resolve().parent != checkpoints.folder(self.output).resolve():
            remedy = "choose another --output, or resume that run by `--resume latest`"
            named = f"holds checkpoints of another run than {path}, which would be removed"
            require(not there, "output", self.recipe.output, f"{named}: {remedy}")
        later = [other.name for other in there if checkpoints.step_of(other) > checkpoints.step_of(path)]
        if later and distributed.is_main():
            best = checkpoints.read_best(self.output)
            noted = f" (the best is {best['checkpoint']})" if best else ""
            told = "Resuming from %s: later checkpoints are removed once the next is saved: %s%s; to keep them, stop"
            log.warning(f"{told} now and give another --output", path.name, ", ".join(later), noted)

    def start(
        self, model: TrainableModel, start: Start, samples: int, epoch_samples: int, deferred: Deferred | None = None
    ) -> None:
        """The model, with a checkpoint's weights if there is one, in DeepSpeed's hands.

        samples: for the log. deferred: the context that a model was made in which ZeRO stage 3 is to shard.
        """
        recipe, self.steps = self.recipe, run_length(self.recipe, epoch_samples)
        check_length(recipe, self.steps, self.state.step)
        if recipe.optimizer.new_first_steps:
            self._note_new_weights(model, start.saved is not None)
        first = FirstWeights(model, deferred, start.saved.weights if start.saved else None)
        if start.saved and start.path:
            load_weights(model, start.saved.weights, start.path)
            require_moments(model, start.saved, start.path)
            expected = model.ema_state_dict()
            if recipe.train.ema_decay is not None:
                trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
                expected |= {f"{checkpoints.EMA}{name}": parameter for name, parameter in trained}
            checkpoints.require_same_names(expected, start.saved.momentum, start.path)
            model.load_ema_state_dict(start.saved.momentum)
        elif not deferred:
            first.require_same()
        model.ema_to(distributed.device())
        self.engine = build_engine(model, recipe, start.ds_config, first if deferred else None)
        if deferred and not start.saved:
            first.require_same()
        if self.engine.stage == 3:
            model.shard_ema(local_part)
        if recipe.train.ema_decay is not None:
            self.engine.ema = ShardedEma(self.engine, recipe.train.ema_decay)
        if start.saved:
            restore(self.engine, start.saved)
            log.info("Resumed from %s", start.path)
        else:
            # Weights start equal on every process; what is drawn from here on (dropout) must not be.
            seed = recipe.train.seed * 1_000_003 + distributed.rank()
            torch.manual_seed(seed if abs(seed) < 2**63 else seed % 2**63)
        self.writer = CheckpointWriter()
        self.heartbeat = Heartbeat(recipe.train.hang_timeout_minutes)
        self.telemetry = Telemetry(recipe, self.state.step, self.steps)
        log.info(
            "%s parameters, %s training samples, %s steps of %s, %s, ZeRO stage %s, %s process(es) on %s",
            *(f"{n:,}" for n in (self.engine.element_count, samples, self.steps, recipe.train.global_batch)),
            recipe.train.precision,
            self.engine.stage,
            distributed.world_size(),
            distributed.device().type,
        )

    def _note_new_weights(self, model: TrainableModel, resumed: bool) -> None:
        """Of a resumed run those that the checkpoint names: the pretrained weights are not read again."""
        if resumed:
            model.new_weights = frozenset(self.state.new_weights)
        self.state.new_weights = sorted(model.new_weights)
        count, remedy = self.recipe.optimizer.new_first_steps, "no weight is new beside pretrained ones; give 0"
        require(bool(model.new_weights), "optimizer.new_first_steps", count, remedy)
        log.info("Until step %d only new weights learn: %s", count, ", ".join(self.state.new_weights))

    def last_checkpoint(self) -> Path:
        """Folder of the checkpoint after the last step, written if need be."""
        path = checkpoints.step_folder(self.output, self.state.step)
        if not distributed.broadcast_object(path.exists()):  # a finished run, resumed into another folder
            self.writer.save(self.engine, self.state, self.recipe, self.tokenizer)
            self.writer.wait_for_last()
        return path

    def conclude(self, checkpoint: Path, results: dict[str, Result]) -> None:
        """Save the results, print them, and say where everything lies."""
        self.telemetry.close()
        places = {
            "checkpoint": checkpoint,
            "exported weights": self.output / "export",
            "TensorBoard": self.telemetry.folder,
            "metrics": self.output / "metrics.json",
            "predictions": self.output / "predictions.json",
        }

        def tell() -> None:
            if results:
                save_results(results.values(), places["metrics"])
                print(f"\n{table([*results.values()])}\n")
                log.debug("measured after step %d:\n%s", self.state.step, table([*results.values()]))
            print("\n".join(f"{name + ':':<18}{place}" for name, place in places.items() if place.exists()))

        on_main(tell)


def build_engine(
    model: TrainableModel,
    recipe: Recipe | FinetuneRecipe,
    ds_config: dict,
    weight: Callable[[str], Tensor] | None = None,
) -> Engine:
    """The model as the recipe wants it carried out, in DeepSpeed's hands.

    ds_config: resolved. weight: makes a weight by its name where the model's are deferred; at ZeRO stage 3.
    """
    if recipe.train.precision == "fp16" and not distributed.on_gpu():
        refuse("train.precision", "fp16", "needs a GPU; use bf16 or fp32 on the CPU")
    if recipe.train.precision == "bf16" and recipe.train.float32_norms:
        cast_but_norms(model, torch.bfloat16)
    if recipe.train.precision == "bf16_mixed":
        autocast_forward(model, torch.bfloat16, sharded=zero_stage(ds_config) == 3)
    if distributed.on_gpu():
        lay_channels_last(model)
    if recipe.train.activation_checkpointing:
        recompute_activations(model)
    if recipe.train.compile:
        log.info("train.compile: PyTorch compiles the towers in the first steps, which takes a while")
        compile_trunks(model, zero_stage(ds_config))
    sized = size_buckets(ds_config, sum(p.numel() for p in model.parameters()))
    log.debug("DeepSpeed's configuration: %s", json.dumps(sized))
    if weight:
        shard(model, weight, sized)
    return start_engine(model, build_optimizer(model, recipe.optimizer), sized)


def best_checkpoint(output: Path, last: Path) -> Path:
    """Folder of the best checkpoint by the validation split; the last one where there is none."""
    found = checkpoints.find("best", output) if checkpoints.read_best(output) else None
    return Path(str(distributed.broadcast_object(str(found or last))))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of a run of `steps`: linear warm-up, then half a cosine to the final rate."""
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        rise = config.learning_rate - config.initial_learning_rate
        return config.initial_learning_rate + rise * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    share = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.final_learning_rate + share * (config.learning_rate - config.final_learning_rate)


def run_length(recipe: Recipe | FinetuneRecipe, epoch_samples: int) -> int:
    """Steps of the run."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, math.ceil((recipe.train.epochs or 0) * epoch_samples / recipe.train.global_batch))


def check_length(recipe: Recipe | FinetuneRecipe, steps: int, taken: int) -> None:
    """Say that a resumed run has no step left, or that the rate only rises; refuse a run that is to end before its
    checkpoint or its new_first_steps.

    steps: length of the run; taken: steps of the checkpoint.
    """
    first = recipe.optimizer.new_first_steps
    remedy = f"no other weight would learn in a run of {steps:,} steps: give fewer"
    require(first == 0 or first < steps, "optimizer.new_first_steps", first, remedy)
    warmup = recipe.optimizer.warmup_steps
    if warmup > steps:
        told = "optimizer.warmup_steps = %d: the run has %d steps, in which it warms up to the full rate; a longer one"
        log.info(f"{told} rises more slowly", warmup, steps)
    named = "steps" if recipe.train.steps is not None else "epochs"
    field, value = f"train.{named}", getattr(recipe.train, named)
    length = f"{steps:,} steps" if named == "steps" else f"{value:g} epochs, {steps:,} steps"
    if taken > steps:
        remedy = f"the checkpoint is at step {taken:,}, beyond the {length} of the run: nothing to train; raise {field}"
        refuse(field, value, f"{remedy}, or resume from an earlier checkpoint")
    if taken == steps:
        last = f"The checkpoint is at step {taken:,}, the last of {field} = {value}"
        log.info("%s: nothing to train, only to measure and export; raise %s to train longer", last, field)


def note_skip(report: StepReport, state: TrainState, recipe: Recipe | FinetuneRecipe) -> None:
    """Count steps skipped in a row; too many end the run."""
    if report.skipped is None:
        state.skipped_in_a_row = 0
        return
    if recipe.train.precision == "fp16" and report.overflow:
        return  # DeepSpeed answers with a smaller loss scale, and ends the run when there is none
    state.skipped_in_a_row += 1
    if distributed.is_main():
        log.warning("Step %d skipped: %s", state.step, report.skipped)
    if state.skipped_in_a_row > recipe.train.max_skipped_steps:
        raise RunError(
            f"train.max_skipped_steps = {recipe.train.max_skipped_steps}: {state.skipped_in_a_row} steps in a row "
            f"were skipped, the last because {report.skipped}; lower the learning rate, or resume from a checkpoint"
        )


def check_samples(counter: BadSampleCounter) -> None:
    """Stop the run on every process when too many of all processes' samples were bad."""
    counts = torch.tensor([counter.bad, counter.tried], device=distributed.device())
    counter.check(*distributed.sum_over_processes(counts).tolist())
