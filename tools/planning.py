"""What a training step holds, computes and sends, counted on tensors without numbers, for tools/plan_run.py."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from modstruct.config import Recipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed.collectives import HostCopy
from modstruct.losses.objective import build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.build import build_model, image_size, recompute_activations
from modstruct.models.fusion.published import QUEUE
from modstruct.models.protocol import Batch, TrainableModel
from modstruct.training.ds_config import size_buckets

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_AT_STAGE_3 = 500_000_000
"""Elements that DeepSpeed leaves gathered between a weight's use in the forward pass and in the backward pass: half of
stage3_max_reuse_distance."""
VOCABULARIES = {"clip_bpe": 49_409, "bert_wordpiece": 30_522}
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION = {
    CPU_ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


# --- counting, on tensors without numbers ---


class Count(TorchDispatchMode):
    """Bytes of tensors that are alive and the most at any time, and of what crosses the processes, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.sent: Counter[str] = Counter()
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "aten::_local_scalar_dense":
            return 0  # a number that is read while the model is built: timm's rates of dropped layers
        if name.startswith("c10d::"):
            self.sent[_kind(name)] += max(sum(t.nbytes for t in _tensors(arg)) for arg in args)
        result = function(*args, **kwargs or {})
        for tensor in _tensors(result):
            self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._released, size)

    def _released(self, size: int) -> None:
        self.alive -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _kind(name: str) -> str:
    return "all_reduce" if "allreduce" in name else "all_to_all" if "alltoall" in name else "gather"


@contextmanager
def as_one_of(processes: int) -> Iterator[None]:
    """Tensors without numbers, on a process that believes itself to be one of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        # EMA weights are a copy in float32, as the weights are; torch cannot convert tensors without numbers in place.
        whole, copied = (
            mock.patch.object(nn.Module, "float", lambda module: module),
            mock.patch.object(FakeTensor, "__deepcopy__", _copied),
        )
        with FakeTensorMode(allow_non_fake_inputs=True), whole, copied:
            yield
    finally:
        dist.destroy_process_group()


def _copied(tensor: Tensor, memo: dict[int, object]) -> Tensor:
    """What copy.deepcopy makes of a tensor without numbers, for EMA weights: torch's own looks for some."""
    copied = tensor.detach().clone()
    copied = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    memo[id(tensor)] = copied
    return copied


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
            one_each = name.endswith("_id") or name == "slot"
            batch[name] = torch.zeros(rows if one_each else texts, dtype=torch.int64)
    if "masked_labels" in batch:
        masked = max(1, round(rows * length * recipe.losses.masked_language.rate))
        batch["masked_places"] = torch.zeros(masked, 2, dtype=torch.int64)
    return batch


def outside_autograd(model: TrainableModel) -> list[Tensor]:
    """EMA weights and queues."""
    return list(model.ema_state_dict().values())


class Measured:
    """A recipe's model and losses as one of `processes` runs them.

    elements, trained: of the weights, and of those that are trained. ema, queue, buffers: bytes.
    """

    def __init__(self, recipe: Recipe, processes: int):
        self.recipe, self.processes = recipe, processes
        self.objective = build_objective(recipe.losses, LossSettings(recipe.train.pairwise_precision, 1000))
        self.objective.rows_agree = True
        with as_one_of(processes), Count():
            self.model = model = build_model(recipe, sizes_of_tokenizer(recipe), self.objective, read_weights=False)
            if recipe.train.activation_checkpointing:
                recompute_activations(model)
            weights = list(model.parameters())
            self.elements = sum(weight.numel() for weight in weights)
            self.trained = sum(weight.numel() for weight in weights if weight.requires_grad)
            self.ema = sum(v.nbytes for name, v in model.ema_state_dict().items() if not name.startswith(QUEUE))
            self.queue = sum(value.nbytes for value in outside_autograd(model)) - self.ema
            self.buffers = sum(buffer.nbytes for buffer in model.buffers())
            for weight in weights:
                weight.data = weight.data.to(DTYPES[recipe.train.precision])
                weight.register_post_accumulate_grad_hook(_drop_gradient)
            model.train()
            self.views = 1 + ("image_augmented" in model.batch_fields)
            queue = getattr(model, "queue", None)
            if queue is not None:
                queue.filled = len(queue.image)
            small, large = self._towers(32), self._towers(64)
        self._losses: dict[int, dict[str, Any]] = {}
        self.fixed = {name: 2 * small[name] - large[name] for name in small}
        self.by_row = {name: (large[name] - small[name]) / 32 for name in small}

    def towers(self, rows: int) -> dict[str, float]:
        """Of a micro-batch: bytes `saved` for the backward pass, `most` bytes beside weights and their gradients at any
        time of both passes; operations `forward` and of `both`."""
        return {name: max(0.0, fixed + rows * self.by_row[name]) for name, fixed in self.fixed.items()}

    def _towers(self, rows: int) -> dict[str, float]:
        own = {id(_storage(value)) for value in [*self.model.parameters(), *outside_autograd(self.model)]}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(value: Tensor) -> Tensor:
            storage = _storage(value)
            if id(storage) not in own:
                saved[id(storage)] = storage
            return value

        count, operations = Count(), FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with operations, count, mock.patch.object(HostCopy, "read", _as_if_all_were_of_one(rows, self.processes)):
            batch = batch_for(self.model, self.recipe, rows)
            with saved_tensors_hooks(keep, lambda value: value):
                outputs = self.model(batch)
                total = sum(z.float().sum() for z in outputs.values() if z.requires_grad)
                counts = {name: torch.ones(()) for name in self.objective.row_losses}
                if counts:
                    total = total + self.objective.over_part(outputs, 10**6, counts)[0]
            kept, forward = sum(storage.nbytes() for storage in saved.values()), operations.get_total_flops()
            saved.clear()
            self.outputs = {name: (tuple(z.shape), z.dtype, z.requires_grad) for name, z in outputs.items()}
            del outputs
            total.backward()
        both = operations.get_total_flops()
        return {"saved": kept, "most": count.most, "forward": forward, "both": both, "sent": sum(count.sent.values())}

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
    stage 1 on that for a share. Stage 3 keeps weights gathered from the forward pass to the backward pass.
    """
    train, processes = measured.recipe.train, measured.processes
    size, trained = SIZES[train.precision], measured.trained
    share = 1 / processes if stage else 1
    cached = micro < rows
    sharded = cached and stage >= 2 and train.gradient_sums == "sharded"
    towers, losses = measured.towers(micro), measured.losses(rows)
    zero = size_buckets({"zero_optimization": {"stage": stage}}, measured.elements)["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", 0) * size
    weights, gathered = float(size * measured.elements), 0.0
    if stage == 3:
        weights, gathered = weights / processes, size * float(min(measured.elements, KEPT_AT_STAGE_3))
    master = 4 * trained * share if stage or size == 2 else 0
    gradients = size * trained * (1 if stage < 2 else share)
    if sharded:
        gradients = 4 * trained * share
    elif cached:
        gradients = (4 + size * (size == 2)) * trained  # sums in float32, beside them the last micro-batch's
    parts = {
        "weights": weights,
        "gathered": gathered,
        "gradients": gradients,
        "moments": 8 * trained * share,
        "master": master,
        "buckets": bucket * (2 if stage == 2 else 1),
        "activations": max(towers["saved"], towers["most"]),
        "embeddings": losses["embeddings"] * (2 if cached else 1),
        "losses": losses["buffers"],
        "EMA, queue": measured.ema / (processes if stage == 3 else 1) + measured.queue,
    }
    # The optimizer's gradients in float32 come when activations are gone.
    step = 4 * trained * share if size == 2 or stage else 0
    parts["activations"] = max(parts["activations"], step - parts["embeddings"] - parts["losses"])
    return parts


def sent(measured: Measured, stage: int, rows: int, micro: int) -> dict[str, float]:
    """Bytes of the tensors that a step sends, by kind: of what an all-reduce takes, a gather makes, a reduce-scatter
    takes."""
    train = measured.recipe.train
    size = SIZES[train.precision]
    parts = -(-rows // micro)
    passes = parts if stage >= 2 and parts > 1 and train.gradient_sums == "sharded" else 1
    weights, trained = size * measured.elements, size * measured.trained
    over = size * max(0, measured.elements - KEPT_AT_STAGE_3)
    found: Counter[str] = Counter(measured.losses(rows)["sent"])
    if stage < 3:
        found["all_reduce"] += trained * passes
        found["gather"] += trained * (stage > 0)
    else:
        found["gather"] += trained * passes  # what a reduce-scatter takes costs what a gather makes
        found["gather"] += (weights + over) * parts + (weights * parts if parts > 1 else 0)
        found["gather"] += measured.ema * (2 * parts if parts > 1 else 1)  # a block at a time
    found["gather"] += round(measured.towers(rows)["sent"])
    return {kind: value for kind, value in found.items()}


def on_links(found: Mapping[str, float], processes: int) -> float:
    """Bytes that each process sends, in rings over all: twice (W - 1) / W of an all-reduce, once of the others. So much
    leaves each host too, whose processes' rings cross its border once."""
    return sum(value * (2 if kind == "all_reduce" else 1) for kind, value in found.items()) * (1 - 1 / processes)
