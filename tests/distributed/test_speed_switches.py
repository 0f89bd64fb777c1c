"""What speeds up or explains a run must not change its result: phases, profile, recomputation, compilation."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import run_on_processes
from tiny_run import ds_config, tiny_recipe
from torch import nn

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.embeddings import Outputs
from modstruct.models.protocol import Batch, TrainableModel
from modstruct.training.deepspeed_adapter import start_engine
from modstruct.training.ds_config import build_optimizer, resolve_ds_config, size_buckets
from modstruct.training.timing import PHASES

STEPS = 5
STAGES = ["zero0", "zero2", "zero3"]
SWITCHES = {
    "plain": {},
    "recomputed": {"activation_checkpointing": True},
    "cached": {"micro_batch": 4},
    "recomputed-cached": {"micro_batch": 4, "activation_checkpointing": True},
}


def two_layers(output: str, cache: str, **train):
    recipe = tiny_recipe(output, cache, STEPS, **train)
    model = recipe.model
    text = replace(model.text, layers=2, architecture="bert", dropout=0.1)
    return replace(recipe, model=replace(model, vision=replace(model.vision, layers=2), text=text))


def train_all(folder: str, cache: str, cases: list[tuple[str, str]]) -> None:
    from modstruct.training.pretrain import Pretraining

    for stage, name in cases:
        run = Pretraining(
            two_layers(f"{folder}/{stage}-{name}", cache, **SWITCHES[name]), ds_config(stage), None
        ).build()
        run.train()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(checkpoints.list_checkpoints(output)[-1]).weights


@pytest.mark.parametrize("processes", [1, 2])
def test_recomputed_activations_give_the_same_weights(tmp_path, cache, processes):
    """At every stage, BERT's dropout and the gradient cache included."""
    cases = [(stage, name) for stage in STAGES for name in ("plain", "recomputed")]
    cases += [("zero2", "cached"), ("zero2", "recomputed-cached")]
    run_on_processes(train_all, processes, str(tmp_path), cache, cases)
    for stage, name in cases:
        if not name.startswith("recomputed"):
            continue
        other = "cached" if "cached" in name else "plain"
        with_it, without = weights(tmp_path / f"{stage}-{name}"), weights(tmp_path / f"{stage}-{other}")
        assert with_it.keys() == without.keys()
        for key in without:
            torch.testing.assert_close(with_it[key], without[key], rtol=1e-5, atol=1e-6)


def profiled_and_not(folder: str, cache: str) -> None:
    from modstruct.training.pretrain import pretrain

    for name, profile_steps in (("with", 2), ("without", 0)):
        pretrain(two_layers(f"{folder}/{name}", cache), ds_config("zero2"), None, profile_steps)
    pretrain(two_layers(f"{folder}/with", cache), ds_config("zero2"), "latest")  # nothing is left to do


@pytest.fixture(scope="module")
def profiled_run(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    run_on_processes(profiled_and_not, 1, str(folder), cache)
    return folder


def test_a_profile_changes_nothing_and_names_the_phases(profiled_run):
    with_it, without = weights(profiled_run / "with"), weights(profiled_run / "without")
    assert all(torch.equal(with_it[key], without[key]) for key in without)
    assert not (profiled_run / "without" / "profile").exists()
    (trace,) = (profiled_run / "with" / "profile").iterdir()
    assert trace.name == "steps-4-5.pt.trace.json"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert all(names.count(phase) >= 2 for phase in PHASES)


def test_the_phases_in_tensorboard_add_up_to_the_step(profiled_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(profiled_run / "without" / "tensorboard")).Reload()
    seconds = [events.Scalars(f"seconds/{phase}") for phase in PHASES]
    rates = events.Scalars("train/samples_per_second")
    assert [event.step for event in rates] == [2, 4, 5]
    for rate, *phases in zip(rates, *seconds, strict=True):
        assert all(phase.value > 0 for phase in phases)
        assert {phase.step for phase in phases} == {rate.step}
        step_seconds = 12 / rate.value
        assert 0.5 * step_seconds < sum(phase.value for phase in phases) <= 1.001 * step_seconds


def refuses(folder: str, cache: str) -> list[str]:
    from modstruct.training.pretrain import pretrain

    said = []
    for name, stage, profile_steps in (("compile", "zero3", 0), ("short", "zero2", STEPS), ("negative", "zero2", -1)):
        try:
            recipe = two_layers(f"{folder}/{name}", cache, compile=name == "compile")
            pretrain(recipe, ds_config(stage), None, profile_steps)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_cannot_work_is_refused_by_name(tmp_path, cache):
    (said,) = run_on_processes(refuses, 1, str(tmp_path), cache)
    compiled, short, negative = said
    assert compiled.startswith("train.compile = True: ZeRO stage 3")
    assert short.startswith("--profile = 5: from 1 to 2")
    assert negative.startswith("--profile = -1: ")


class Stack(TrainableModel):
    """4 million weights in 16 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16)))

    def forward(self, batch: Batch, **_: bool) -> Outputs:
        return {"image": self.layers(batch["image"])}


def reductions(stage: int, bucket: int | None) -> tuple[int, int]:
    """Reductions before the last gradient of a backward, and all of them."""
    import deepspeed.runtime.zero.stage3 as stage_3
    import torch.distributed as dist

    recipe, model, events = Recipe(), Stack(), []
    zero = {"stage": stage, "overlap_comm": True} | ({"reduce_bucket_size": bucket} if bucket else {})
    config = resolve_ds_config({"zero_optimization": zero}, recipe, distributed.world_size())
    config = size_buckets(config, sum(p.numel() for p in model.parameters()))
    engine = start_engine(model, build_optimizer(model, recipe.optimizer), config)
    places = [(dist, "all_reduce"), (dist, "reduce"), (stage_3, "reduce_scatter_coalesced")]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    with ExitStack() as patches:
        for module, name in places:
            send = getattr(module, name)

            def noted(*args, send=send, **kwargs):
                events.append("sent")
                return send(*args, **kwargs)

            patches.enter_context(mock.patch.object(module, name, noted))
        engine.backward(engine({"image": torch.randn(4, 512)})["image"].square().mean())
    last_gradient = len(events) - events[::-1].index("gradient")
    return events[:last_gradient].count("sent"), events.count("sent")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_sent_while_others_are_still_computed(stage):
    sent_early, sent = run_on_processes(reductions, 2, stage, None)[0]
    assert sent_early >= 3
    assert sent_early >= sent - 1
    # DeepSpeed's own bucket holds the whole model.
    assert run_on_processes(reductions, 2, stage, 500_000_000)[0][0] == 0
