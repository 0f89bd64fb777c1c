"""A pre-training run from recipe to table."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.data.classification.class_files import load_classes
from modstruct.data.run_data import RunData, check_caption_fields, check_text_field, open_run_data
from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.shards.loader import BatchContents, BatchPlan, TrainBatch, counted, train_loader, train_order
from modstruct.data.shards.order import weights_by_epoch
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.sources import as_sources
from modstruct.data.shards.workers import WorkerLoader
from modstruct.data.tokenizers import WordPieceTokenizer, build_tokenizer
from modstruct.distributed.collect import on_main
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.model import Encode, load_model
from modstruct.evaluation.evaluate import evaluate
from modstruct.evaluation.examples import projected_points, retrieved_examples
from modstruct.evaluation.result import Result
from modstruct.evaluation.retrieval.measure import DIRECTIONS
from modstruct.evaluation.structure.metrics import structure
from modstruct.evaluation.tables import scalars
from modstruct.losses.contrastive import row_losses
from modstruct.losses.objective import Objective, build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.build import build_model, image_size, initial_tokenizer
from modstruct.models.deferred import Deferred
from modstruct.models.protocol import TrainableModel
from modstruct.training.ds_config import BUCKETS, read_ds_config, resolve_ds_config, size_buckets, zero_stage
from modstruct.training.export import export
from modstruct.training.gradient_cache import random_state, set_random_state
from modstruct.training.model_card import write_card
from modstruct.training.step import StepReport
from modstruct.training.trainer import Start, Trainer

log = logging.getLogger("modstruct")


def pretrain(recipe: Recipe, ds_config: str, resume: str | None = None, profile_steps: int = 0) -> dict[str, Result]:
    """Train, evaluate and export; every process calls it. Arguments, result and errors as Trainer has them."""
    return Pretraining(recipe, ds_config, resume).run(profile_steps)


def bucket_sizes(recipe: Recipe, ds_config: str) -> dict[str, int]:
    """Elements of the buckets of a run, by DeepSpeed's names; the model is made without its memory.

    A tokenizer that the run would train counts as one of tokenizer.vocab_size entries.
    """
    config, tokenizer = recipe.tokenizer, initial_tokenizer(recipe)
    if tokenizer is None and config.kind == "sentencepiece" and config.path is None:
        entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(config.vocab_size - 4))]
        tokenizer = WordPieceTokenizer("\n".join(entries).encode(), config.context_length)
    elif tokenizer is None:
        tokenizer = build_tokenizer(config, list, recipe.data.cache, "")
    given, processes = read_ds_config(ds_config), os.environ.get("WORLD_SIZE")
    if not processes:  # outside a launcher nobody knows how many will share a batch
        given.pop("train_micro_batch_size_per_gpu", None)
    resolved = resolve_ds_config(given, recipe, int(processes or 1))
    with Deferred():
        model = build_model(recipe, tokenizer, build_objective(recipe.losses), read_weights=False)
    zero = size_buckets(resolved, sum(p.numel() for p in model.parameters())).get("zero_optimization", {})
    return {name: zero[name] for name in BUCKETS.get(zero_stage(resolved), ())}


class Pretraining(Trainer[Recipe]):
    """A pre-training run of two towers or of the fusion model."""

    data: RunData
    samples: Samples
    """Of the training source."""

    def build(self) -> Pretraining:
        self.recipe.losses.require_any()
        recipe, start = self.recipe, self.find_start()
        with refused_if_new(start):
            check_settings(recipe)
        tokenizer = start.tokenizer or initial_tokenizer(recipe)
        self.data = data = open_run_data(recipe, image_size(recipe), tokenizer, fingerprint=start.samples)
        if data.zero_shot:
            load_classes(data.zero_shot)  # what is wrong with it is said now, not at the first validation
        assert data.train is not None  # opened for training
        self.samples = data.train
        self.tokenizer, self.has_validation = data.tokenizer, data.validation is not None
        self.state = start.state(self.samples.drawn, recipe.data.train)
        order = train_order(self.samples, recipe.data, recipe.train.seed, recipe.train.global_batch)
        epoch_samples = order.epoch_samples
        epoch_steps = math.ceil(epoch_samples / recipe.train.global_batch)
        settings = LossSettings(recipe.train.pairwise_precision, epoch_steps, recipe.train.seed)
        self.objective = build_objective(recipe.losses, settings)
        with refused_if_new(start):
            check_batch(recipe, self.objective, order.largest_batches())
        torch.manual_seed(recipe.train.seed)
        deferred = Deferred() if zero_stage(start.ds_config) == 3 and recipe.framework == "two_tower" else None
        with deferred or nullcontext():
            model = build_model(recipe, data.tokenizer, self.objective, read_weights=start.saved is None)
        check_learns(model, self.objective)
        if "text_augmented" in model.batch_fields:
            distributed.main_first(lambda: check_text_field(self.samples, recipe))
        distributed.main_first(lambda: check_caption_fields(self.samples, recipe))
        for line in describe_mixture(self.samples, epoch_samples):
            log.info("%s", line)
        self.start(model, start, len(self.samples), epoch_samples, deferred)
        return self

    def loader(self, first_step: int) -> WorkerLoader:
        recipe, data = self.recipe, self.data
        fields, rate = self.engine.model.batch_fields, recipe.losses.masked_language.rate
        contents = BatchContents(data.views, data.tokenizer, fields, rate)
        train, unmasked_from = recipe.train, self.steps - round(recipe.train.unmasked_share * self.steps)
        plan = BatchPlan(
            train.global_batch, train.seed, first_step, self.steps, train.micro_batch, unmasked_from=unmasked_from
        )
        return train_loader(self.samples, recipe.data, contents, plan)

    def step_metrics(self, report: StepReport, batches: Sequence[TrainBatch]) -> dict[str, float]:
        """Structure metrics of a step's batch, and its contrastive loss by source where there are several."""
        image, text = (distributed.gather(report.outputs[name].detach()) for name in ("image", "text"))
        shape = structure(image, text) if distributed.is_main() else {}
        found = {f"structure/{name}": value for name, value in shape.items()}
        names, sources = self.samples.names, [source for batch in batches for source in batch.sources]
        if sources and "logit_scale" in report.outputs:
            losses = row_losses(report.outputs, image, text)
            sums = losses.new_zeros(2, len(names))
            sums.index_add_(
                1, torch.tensor(sources, device=losses.device), torch.stack([losses, torch.ones_like(losses)])
            )
            totals, rows = distributed.sum_over_processes(sums).tolist()
            by_source = zip(names, totals, rows, strict=True)
            found |= {f"loss_by_source/{name}": total / count for name, total, count in by_source if count}
        return found

    @property
    def counted(self) -> list[str]:
        return counted(self.samples, self.recipe.data)

    def validate(self) -> float:
        assert self.data.validation is not None  # has_validation
        found = self.measure(self.data.validation, "validation")["retrieval"].values
        return sum(found[f"{direction}/recall_at_1"].value for direction in DIRECTIONS) / len(DIRECTIONS)

    def measure(self, samples: EvaluationSamples, name: str) -> dict[str, Result]:
        """Evaluate a source with all processes; scalars and an example grid go to TensorBoard under `name`."""

        def inspect(source) -> None:
            if self.recipe.logging.images:
                grid = retrieved_examples(source, samples, self.data.views, self.recipe.logging.images)
                self.telemetry.image(f"{name}/examples", grid, self.state.step)
            if self.recipe.logging.projector and name == "eval":
                points = projected_points(source, samples, self.data.views, self.recipe.logging.projector)
                self.telemetry.embeddings(name, points, self.state.step)

        self.engine.eval()
        encode, model = self._measured()
        results = evaluate(
            encode,
            samples,
            self.data,
            self.recipe.evaluation,
            f"data.{name}",
            inspect,
            model,
        )
        self.engine.train()
        self.telemetry.measured(name, scalars(results.values()), self.state.step)
        return results

    def _measured(self) -> tuple[Encode, TrainableModel]:
        """What embeds, and the model: the trained one, or, whole on each process, that of the saved step's EMA."""
        if not self.recipe.evaluation.ema:
            return self.engine, self.engine.model
        path, before = checkpoints.step_folder(self.output, self.state.step), random_state()
        model = load_model(self.recipe, path, self.tokenizer)
        set_random_state(before)  # a resumed run measures elsewhere
        return model, model

    def finish(self) -> dict[str, Result]:
        """Export the last weights, or their EMA, measure data.eval with them, and print where everything lies."""
        self.telemetry.bar.close()
        last, names = self.last_checkpoint(), self.engine.model.to_open_clip
        folder = self.output / "export"
        ema = self.recipe.evaluation.ema
        recipe, step = self.recipe, self.state.step
        on_main(lambda: export(folder, checkpoints.read_measured(last, ema), names, recipe, self.tokenizer, step))
        results = self.measure(self.data.eval, "eval") if self.data.eval else {}
        on_main(lambda: write_card(folder, recipe, step, {"data.eval": results.values()} if results else None))
        self.conclude(last, results)
        return results


def describe_mixture(samples: Samples, epoch_samples: int) -> Iterator[str]:
    """How often an epoch draws each weighted source, and what that does to its length."""
    if samples.weights is None:
        return
    if epoch_samples < len(samples):
        yield f"data.train.max_repeats: an epoch is {epoch_samples:,} of {len(samples):,} samples long"
    sizes = [int(counts.sum()) for counts in samples.shard_sizes()]
    schedule = weights_by_epoch(samples.weights)
    for epoch, weights in enumerate(schedule):
        times = [epoch_samples * weight / sum(weights) / size for weight, size in zip(weights, sizes, strict=True)]
        drawn = ", ".join(f"{name} {often:.3g} times" for name, often in zip(samples.names, times, strict=True))
        which = (
            "An epoch" if len(schedule) == 1 else f"Epoch {epoch}{'' if epoch < len(schedule) - 1 else ' and later'}"
        )
        yield f"{which} draws each sample of {drawn}"


@contextmanager
def refused_if_new(start: Start) -> Iterator[None]:
    """A resumed run was begun with what is refused here, so that it is only said in the log."""
    try:
        yield
    except ValueError as error:
        if start.saved is None:
            raise
        if distributed.is_main():
            log.warning("%s", error)


def check_settings(recipe: Recipe) -> None:
    """Refuse a negative seed and fields without effect, where a run starts, since earlier checkpoints may hold them."""
    train, fusion = recipe.train, recipe.framework == "fusion"
    require(train.seed >= 0, "train.seed", train.seed, "0 or more")
    remedy = "no step leaves patches out: give train.patch_dropout, such as 0.5, or 0 here"
    require(not train.unmasked_share or train.patch_dropout > 0, "train.unmasked_share", train.unmasked_share, remedy)
    rerank, remedy = recipe.evaluation.rerank, "two towers have no matching, which reranks; give 0"
    require(fusion or rerank == 0, "evaluation.rerank", rerank, remedy)
    for name in ("unlocked_image_layers", "unlocked_text_layers"):
        unlocked, remedy = getattr(recipe.model, name), "locks layers of two towers, not of a fusion model; give null"
        require(not fusion or unlocked is None, f"model.{name}", unlocked, remedy)


def check_learns(model: TrainableModel, objective: Objective) -> None:
    """Refuse two locked towers whose losses teach nothing else: no logit scale, other number or head."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained <= {"logit_scale"} and not any("logit_scale" in loss.needs for loss in objective.losses.values()):
        named = ", ".join(f"losses.{name}" for name in objective.losses)
        remedy = f"with model.unlocked_text_layers = 0, too, {named} would teach no weight: give null, or more, for one"
        refuse("model.unlocked_image_layers", 0, remedy)


def check_batch(recipe: Recipe, objective: Objective, largest: Sequence[int]) -> None:
    """Refuse a global batch that holds a single pair, or samples twice, where losses compare its pairs.

    largest: of SampleOrder, or empty where the samples are not known. What is only in part so is said in the log.
    """
    batch, queue = recipe.train.global_batch, recipe.fusion.queue
    objective.require_pairs(batch)
    local = recipe.losses.matching.weight > 0 and recipe.losses.matching.negatives == "local"
    if local and batch == distributed.world_size():
        remedy = (
            "each process has one pair and no negative for it: give two a process, or losses.matching.negatives global"
        )
        refuse("train.global_batch", batch, remedy)
    if not largest:
        return
    most, number = min((most, number) for number, most in enumerate(largest))
    source = as_sources(recipe.data.train)[number] if len(largest) > 1 else None
    name = "data.train" if source is None else f"{source.shards!r} of data.train, of weight {source.weight},"
    if batch > most and objective.comparing:
        why = f"{name} has so few samples that a batch holds some twice, each its own negative"
        lower = "" if source is None else ", or a lower weight"
        refuse("train.global_batch", batch, f"{why}; give at most {most}{lower}, or more samples")
    if not distributed.is_main():
        return
    ends_with_epochs = len(largest) == 1 and recipe.data.groups == 1 and most % batch == 0
    if 4 * batch > most and not ends_with_epochs:
        log.warning(
            "%s has so few samples that train.global_batch = %d %s; up to %d keeps that rare",
            name,
            batch,
            "takes some of them twice a step" if batch > most else "often spans the end of an epoch and has some twice",
            max(most // 4, 1),
        )
    earlier = objective.losses.keys() & {"queue_contrast"} and recipe.losses.queue_contrast.positives == "pair"
    if earlier and queue + batch > most:
        log.warning(
            "fusion.queue = %d: %s has so few samples that the queue holds earlier embeddings of a batch's own pairs, "
            "which count as their negatives; at most %d, or losses.queue_contrast.positives image",
            queue,
            name,
            max(most - batch, 0),
        )
