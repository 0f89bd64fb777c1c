"""A step of either framework and of every task asks the GPU for nothing: the host never waits for it."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from host_waits import no_host_waits, unwatched
from plain_engine import PlainEngine
from processes import run_on_processes
from tiny_answers import ANSWERS, answer_model, answer_recipe, answer_tokenizer, question_batch, with_answers
from tiny_fusion import albef_losses, fusion_model, fusion_recipe, training_batch
from tiny_models import batch_of_both_views, tiny_config, tiny_model, word_tokenizer
from torch import Tensor

from modstruct import distributed
from modstruct.config import (
    BridgeConfig,
    ContrastiveConfig,
    GeometryConfig,
    LossesConfig,
    QueueContrastConfig,
    SeparationConfig,
)
from modstruct.data.transforms.text_views import masked_places
from modstruct.losses.distillation import Distillation
from modstruct.losses.objective import Objective, build_objective
from modstruct.models.fusion.classifier import Classifier, PairClassifier
from modstruct.models.protocol import TrainableModel
from modstruct.training.gradient_cache import CachedBatch, WholeBatch

STRUCTURE = {
    "separation": SeparationConfig(weight=1.0),
    "bridge": BridgeConfig(weight=1.0, t=None),
    "geometry": GeometryConfig(weight=0.25),
}
Step = tuple[TrainableModel, Objective, dict[str, Tensor]]


def two_tower() -> Step:
    losses = LossesConfig(contrastive=ContrastiveConfig(weight=1.0, in_modal=True), **STRUCTURE)
    tokenizer = word_tokenizer()
    return (
        tiny_model(tiny_config(), tokenizer, independent=True),
        build_objective(losses),
        batch_of_both_views(tokenizer),
    )


def pretraining(**contrast) -> Step:
    losses = albef_losses(**STRUCTURE)
    losses.queue_contrast = QueueContrastConfig(weight=1.0, ramp_steps=0, **contrast)
    recipe = fusion_recipe(losses=losses)
    batch = training_batch()
    return (
        fusion_model(recipe),
        build_objective(losses),
        batch | {"masked_places": masked_places(batch["masked_labels"])},
    )


def retrieval() -> Step:
    return pretraining(positives="image")


def distilled() -> Objective:
    return Objective({"task": Distillation(0.4, 0)}, {"task": 1.0})


def vqa() -> Step:
    return answer_model(), distilled(), with_answers(question_batch(), ANSWERS)


def snli_ve() -> Step:
    batch = question_batch() | {"label": torch.tensor([0, 2, 1, 0])}
    return Classifier(answer_recipe(), answer_tokenizer(), 3), distilled(), batch


def nlvr2() -> Step:
    batch = question_batch() | {"label": torch.tensor([0, 1, 1, 0])}
    batch["image"] = torch.stack([batch["image"], batch["image"].flip(0)], dim=1)
    return PairClassifier(answer_recipe(), answer_tokenizer(), 2), distilled(), batch


STEPS = {make.__name__: make for make in (two_tower, pretraining, retrieval, vqa, snli_ve, nlvr2)}


def take_steps(name: str, parts: int) -> None:
    """Two micro-steps as training takes them; the first fills what there is of queues. Only the second is watched."""
    model, objective, batch = STEPS[name]()
    engine = PlainEngine(model.to(distributed.device()))
    model.ema_to(distributed.device())
    step(engine, objective, batch, parts, 0)
    with watched():
        step(engine, objective, batch, parts, 1)


@contextmanager
def watched():
    if not distributed.on_gpu():
        with no_host_waits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(engine: PlainEngine, objective: Objective, batch: dict[str, Tensor], parts: int, number: int) -> None:
    if parts == 1:
        embedded = WholeBatch(engine, batch)
    else:
        with unwatched():  # the loader's work
            divided = [
                {n: rows.chunk(parts)[p] for n, rows in batch.items() if n != "masked_places"} for p in range(parts)
            ]
            divided = [part | {"masked_places": masked_places(part["masked_labels"])} for part in divided]
        embedded = CachedBatch(engine, divided, objective, number)
    total, _ = objective(embedded.outputs, number, without=embedded.deferred)
    embedded.backward(total)
    engine.model.update_ema(embedded.outputs, embedded.batch, number)


CASES = [(name, 1) for name in STEPS] + [("pretraining", 3), ("retrieval", 2)]


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_a_step_waits_for_nothing(name, parts):
    take_steps(name, parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "parts"), CASES)
def test_a_step_on_a_gpu_waits_for_nothing(name, parts):
    assert distributed.on_gpu()
    take_steps(name, parts)


def waits_of_a_step(parts: int) -> int:
    reads = []
    read = distributed.HostCopy.read

    def noted(copy: distributed.HostCopy) -> list:
        reads.append(1)
        with unwatched():
            return read(copy)

    with mock.patch.object(distributed.HostCopy, "read", noted):
        take_steps("pretraining", parts)
    return len(reads)


def waits() -> list[int]:
    return [waits_of_a_step(parts) for parts in (1, 2)]


def test_processes_wait_for_the_splits_of_the_two_exchanges_alone():
    assert run_on_processes(waits, 2) == [[4, 4]] * 2  # of two steps


def test_what_makes_the_host_wait_is_found():
    values = torch.arange(6.0)
    for wait in (
        lambda: values.sum().item(),
        lambda: values.tolist(),
        lambda: values.numpy(),
        lambda: values.cpu(),
        lambda: float(values[0]),
        lambda: bool((values > 1).any()),
        lambda: values[values > 2],
        lambda: values.masked_fill(values > 2, 0).nonzero(),
        lambda: values.unique(),
        lambda: torch.bincount(values.long()),
        lambda: torch.masked_select(values, values > 2),
        lambda: values.repeat_interleave(values.long()),
        lambda: torch.tensor([1.0], device=values.device),
        lambda: values.clone().index_put_((values > 2,), values[0]),
        lambda: torch.equal(values, values + 1),
    ):
        with no_host_waits(), pytest.raises(AssertionError, match="makes the host wait"):
            wait()
