"""What a training step holds, computes and sends, counted on tensors without numbers, for tools/plan_run.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from counting import ATTENTION, Count, as_one_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from modstruct.config import Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed.collectives import HostCopy
from modstruct.losses.objective import build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.build import (
    autocast_forward,
    build_model,
    cast_but_norms,
    image_size,
    recompute_activations,
)
from modstruct.models.fusion.published import QUEUE
from modstruct.models.protocol import Batch, TrainableModel
from modstruct.training.ds_config import size_buckets
from modstruct.training.pretrain import check_learns

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions whose weights and gradients are not float32."""
KEPT_AT_STAGE_3 = 500_000_000
"""Elements that DeepSpeed leaves gathered between a weight's use in the forward pass and in the backward pass: half of
stage3_max_reuse_distance."""
ALWAYS_GATHERED = 100_000
"""Elements of the largest weight that DeepSpeed keeps whole on every process at stage 3
(stage3_param_persistence_threshold), gathered once a step."""
VOCABULARIES = {"clip_bpe": 49_409, "bert_wordpiece": 30_522}


def sizes_of_tokenizer(recipe: Recipe) -> Tokenizer:
    """Stands for the tokenizer, of which a model asks sizes and ids."""
    given = recipe.tokenizer
    words = VOCABULARIES.get(given.kind, given.vocab_size)
    ids = {"padding_id": 0, "start_id": 1, "end_id": 2, "ids_with_mask": words}
    return cast(
        Tokenizer, SimpleNamespace(kind=given.kind, vocab_size=words, context_length=given.context_length, **ids)
    )


def batch_for(model: TrainableModel, recipe: Recipe, rows: int) -> Batch:
    """All fields that the model trains on."""
    side, length = image_size(recipe), recipe.tokenizer.context_length
    images, texts = (rows, 3, side, side), (rows, length)
    batch = {}
    for name in model.batch_fields | {"image", "text"}:
        if name in ("image", "image_augmented"):
            batch[name] = torch.zeros(images, dtype=torch.uint8)
        else:
            one_each = name.endswith("_id") or name in ("slot", "patch_seed")
            batch[name] = torch.zeros(rows if one_each else texts, dtype=torch.int64)
    if "masked_labels" in batch:
        masked = max(1, round(rows * length * recipe.losses.masked_language.rate))
        batch["masked_places"] = torch.zeros(masked, 2, dtype=torch.int64)
    return batch


def as_trained(model: TrainableModel, recipe: Recipe) -> None:
    """Weights and forward in the recipe's precision, as `build_engine` and DeepSpeed make them."""
    precision = recipe.train.precision
    if precision == "bf16" and recipe.train.float32_norms:
        cast_but_norms(model, HALF[precision])
    elif precision in HALF:
        for weight in model.parameters():
            weight.data = weight.data.to(HALF[precision])
    elif precision == "bf16_mixed":
        autocast_forward(model, torch.bfloat16)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def outside_autograd(model: TrainableModel) -> list[Tensor]:
    """EMA weights and queues."""
    return list(model.ema_state_dict().values())


class Measured:
    """A recipe's model and losses as one of `processes` runs them.

    elements, trained: of the weights, and of those that are trained. weights, gradients, ema, queue, buffers: bytes.
    kept_whole: of the weights that stage 3 leaves whole; frozen: of those that it shares out and no backward pass uses.
    fullest: of the steps that take all patches, if any do.
    """

    def __init__(self, recipe: Recipe, processes: int):
        self.recipe, self.processes = recipe, processes
        self.objective = build_objective(recipe.losses, LossSettings(recipe.train.pairwise_precision, 1000))
        self.objective.checked = True
        with as_one_of(processes), Count():
            self.model = model = build_model(recipe, sizes_of_tokenizer(recipe), self.objective, read_weights=False)
            check_learns(model, self.objective)
            if recipe.train.activation_checkpointing:
                recompute_activations(model)
            weights = list(model.parameters())
            self.elements = sum(weight.numel() for weight in weights)
            self.trained = sum(weight.numel() for weight in weights if weight.requires_grad)
            self.ema = sum(v.nbytes for name, v in model.ema_state_dict().items() if not name.startswith(QUEUE))
            self.queue = sum(value.nbytes for value in outside_autograd(model)) - self.ema
            self.buffers = sum(buffer.nbytes for buffer in model.buffers())
            as_trained(model, recipe)
            for weight in weights:
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(_drop_gradient)
            self.weights = _bytes(weights)
            self.gradients = _bytes(weight for weight in weights if weight.requires_grad)
            self.kept_whole = _bytes(weight for weight in weights if weight.numel() <= ALWAYS_GATHERED)
            locked = (weight for weight in weights if not weight.requires_grad)
            self.frozen = _bytes(weight for weight in locked if weight.numel() > ALWAYS_GATHERED)
            model.train()
            self.views = 1 + ("image_augmented" in model.batch_fields)
            queue, ema = getattr(model, "queue", None), getattr(model, "ema", None)
            if queue is not None:
                queue.filled = len(queue.image)
            self._ema_called = 0
            for module in ema.module.modules() if ema else ():
                module.register_forward_pre_hook(self._note_ema)
            small, large = self._passes(32), self._passes(64)
        self._losses: dict[int, dict[str, Any]] = {}
        self.fixed = {name: 2 * small[name] - large[name] for name in small}
        self.by_row = {name: (large[name] - small[name]) / 32 for name in small}
        self.fullest = self
        if recipe.train.patch_dropout and recipe.train.unmasked_share:
            self.fullest = Measured(replace(recipe, train=replace(recipe.train, patch_dropout=0.0)), processes)

    def towers(self, rows: int, cached: bool = False) -> dict[str, float]:
        """Of rows that are embedded at once: bytes `saved` for the backward pass, `most` bytes beside weights and their
        gradients at any time of both passes; operations of the `forward` pass and of `both`; bytes `sent`; bytes of the
        `batch`; bytes of EMA weights that the forward pass uses, `ema`.

        cached: of the gradient cache. `forward` and `ema_first` are of its first pass, `sent` and what it has
        `exchanged`, bytes, of a process's whole batch.
        """
        found = {name: max(0.0, fixed + rows * self.by_row[name]) for name, fixed in self.fixed.items()}
        return found | {name.removeprefix("cached_"): found[name] for name in found if cached and "cached_" in name}

    def _note_ema(self, module: nn.Module, _: object) -> None:
        self._ema_called += _bytes(module.parameters(recurse=False))

    def _passes(self, rows: int) -> dict[str, float]:
        """All that `towers` gives, of the whole batch and `cached_`."""
        of_one = mock.patch.object(HostCopy, "read", _as_if_all_were_of_one(rows, self.processes))
        batch = batch_for(self.model, self.recipe, rows)
        with of_one:
            whole, outputs = self._both_passes(batch)
            with Count() as count:
                self.model.update_ema(outputs, batch, 10**6)
            after = sum(count.sent.values())
            with Count() as count:
                exchanged = self.model.exchange(outputs, batch)()
            held = [*exchanged.values(), *(batch[name] for name in batch.keys() & self.model.whole_fields)]
            cached = self._both_passes(batch | exchanged)[0] if exchanged else whole
            self._ema_called, operations = 0, FlopCounterMode(display=False, custom_mapping=ATTENTION)
            with operations, Count(), torch.no_grad():
                self.model(batch, embed_only=True)
        cached = cached | {"forward": operations.get_total_flops(), "sent": sum(count.sent.values()) + after}
        cached |= {"ema_first": self._ema_called, "exchanged": _bytes(held)}
        whole |= {"sent": whole["sent"] + after, "batch": _bytes(batch.values())}
        return whole | {f"cached_{name}": value for name, value in cached.items()}

    def _both_passes(self, batch: Batch) -> tuple[dict[str, float], Batch]:
        """What they hold, compute and send; and the outputs."""
        given = [*self.model.parameters(), *outside_autograd(self.model)]
        own = {id(_storage(value)) for value in given}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(value: Tensor) -> Tensor:
            storage = _storage(value)
            if id(storage) not in own:
                saved[id(storage)] = storage
            return value

        self._ema_called = 0
        count, operations = Count(given), FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with operations, count:
            batch = {name: rows.clone() for name, rows in batch.items()}
            with saved_tensors_hooks(keep, lambda value: value):
                outputs = self.model(batch)
                total = sum(z.float().sum() for z in outputs.values() if z.requires_grad)
                counts = {name: torch.ones(()) for name in self.objective.row_losses}
                if counts:
                    total = total + self.objective.over_part(outputs, 10**6, counts)[0]
            kept, forward = sum(storage.nbytes() for storage in saved.values()), operations.get_total_flops()
            saved.clear()
            self.outputs = {name: (tuple(z.shape), z.dtype, z.requires_grad) for name, z in outputs.items()}
            outputs = {name: z.detach() for name, z in outputs.items()}
            total.backward()
        both = operations.get_total_flops()
        found = {"saved": kept, "most": count.most, "forward": forward, "both": both, "ema": self._ema_called}
        return found | {"sent": sum(count.sent.values())}, outputs

    def losses(self, rows: int) -> dict[str, Any]:
        """Of a process's whole batch: bytes of its `embeddings`, the most that the losses hold beside them (`buffers`),
        and bytes that cross the processes by kind (`sent`). Losses over labelled rows are among the towers'."""
        if rows not in self._losses:
            self._losses[rows] = self._measure_losses(rows)
        return self._losses[rows]

    def _measure_losses(self, rows: int) -> dict[str, Any]:
        count, embeddings, shared = Count(), 0, self.model.shared_outputs
        with as_one_of(self.processes), count:
            made = {}
            for name, (shape, dtype, trained) in self.outputs.items():
                if not name.startswith(("masked", "matching")):
                    size = shape if name in shared else (rows, *shape[1:])
                    made[name] = torch.zeros(size, dtype=dtype).requires_grad_(trained)
                    embeddings += made[name].nbytes * (name not in shared)
            before = count.most
            total, _ = self.objective(made, 10**6, without=self.objective.row_losses)
            total.backward()
        return {"embeddings": embeddings, "buffers": count.most - before, "sent": count.sent}


def _storage(value: Tensor) -> torch.UntypedStorage:
    return value.untyped_storage()


def _drop_gradient(weight: Tensor) -> None:
    """DeepSpeed takes a gradient as it comes: how many it keeps is the stage's."""
    weight.grad = None


def _as_if_all_were_of_one(rows: int, processes: int) -> Callable[[HostCopy], list]:
    """Numbers of rows that go to each process and come from each."""
    return lambda copy: [[rows] + [0] * (processes - 1)] * 2


# --- what follows for a process ---


def memory(measured: Measured, stage: int, rows: int, micro: int) -> dict[str, float]:
    """Bytes that a GPU holds at the fullest point of a step, by part.

    As DeepSpeed holds them: at stage 0 in half precision gradients once more in float32 while the optimizer steps; from
    stage 1 on that for a share. At stage 3 autograd keeps what was gathered for the forward pass until the backward
    pass, as was seen on small models, but where activations are recomputed.
    """
    measured = measured.fullest
    train, processes = measured.recipe.train, measured.processes
    trained, half = measured.trained, train.precision in HALF
    share = 1 / processes if stage else 1
    cached = micro < rows
    towers, losses = measured.towers(micro, cached), measured.losses(rows)
    zero = size_buckets({"zero_optimization": {"stage": stage}}, measured.elements)["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", 0) * (2 if half else 4)
    weights, gathered = float(measured.weights), 0.0
    if stage == 3:
        reused = (2.0 if half else 4.0) * KEPT_AT_STAGE_3
        # By autograd, for the backward pass.
        kept = 0.0 if train.activation_checkpointing else weights - measured.frozen
        gathered, weights = kept + min(weights - kept, reused), weights / processes
    gradients = measured.gradients * (1 if stage < 2 else share)
    if cached and stage >= 2 and train.gradient_sums == "sharded":
        gradients = 4 * trained * share
    elif cached:
        gradients = measured.gradients + 4 * trained * half  # sums in float32 beside the last micro-batch's
    whole = measured.towers(rows, cached)
    embeddings = losses["embeddings"] + whole["batch"]  # the next step's, which is sent ahead
    if cached:
        embeddings += losses["embeddings"] + whole["batch"] + whole["exchanged"]
    ema = measured.ema / (processes if stage == 3 else 1) + measured.queue
    if train.ema_decay is not None:
        ema += 4 * trained * share
    parts = {
        "weights": weights,
        "gathered": gathered,
        "gradients": gradients,
        "moments": 8 * trained * share,
        "master": 4 * trained * share if stage or half else 0,
        "buckets": bucket * (2 if stage == 2 else 1),
        "activations": max(towers["saved"], towers["most"]),
        "embeddings": embeddings,
        "losses": losses["buffers"],
        "EMA, queue": ema,
    }
    # The optimizer's gradients in float32 come when activations are gone.
    step = 4 * trained * share if half or stage else 0
    parts["activations"] = max(parts["activations"], step - parts["losses"])
    return parts


def sent(measured: Measured, stage: int, rows: int, micro: int) -> dict[str, float]:
    """Bytes of the tensors that a step sends, by kind: of what an all-reduce takes, a gather makes, a reduce-scatter
    takes (which costs what a gather does)."""
    train = measured.recipe.train
    parts = -(-rows // micro)
    cached = parts > 1
    towers = measured.towers(rows, cached)
    passes = parts if stage >= 2 and cached and train.gradient_sums == "sharded" else 1
    found: Counter[str] = Counter(measured.losses(rows)["sent"])
    found["gather"] += round(towers["sent"])
    if stage < 3:
        found["all_reduce"] += measured.gradients * passes
        found["gather"] += measured.gradients * (stage > 0)
    else:
        others = measured.weights - measured.kept_whole
        beyond = max(0.0, others - measured.frozen - (2 if train.precision in HALF else 4) * KEPT_AT_STAGE_3)
        found["gather"] += measured.gradients * passes + measured.kept_whole
        found["gather"] += parts * (3 * others - measured.frozen) if cached else others + beyond
        found["gather"] += towers["ema"] * parts + (towers["ema_first"] * parts if cached else 0)  # a block at a time
    return {kind: value for kind, value in found.items()}


def on_links(found: Mapping[str, float], processes: int) -> float:
    """Bytes that each process sends, in rings over all: twice (W - 1) / W of an all-reduce, once of the others. So much
    leaves each host too, whose processes' rings cross its border once."""
    return sum(value * (2 if kind == "all_reduce" else 1) for kind, value in found.items()) * (1 - 1 / processes)
