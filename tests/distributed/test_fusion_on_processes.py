"""The fusion model over several processes: rows that travel with their gradients, the same losses and gradients as one
process, momentum and queue that follow at every ZeRO stage and go on exactly after a resume."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import run_on_processes
from small_runs import (
    STAGES,
    distance,
    momentum_distance,
    momentum_of,
    rows_taken,
    train_several,
    weights_of,
)
from tiny_fusion import albef_losses, fusion_model, fusion_recipe, training_batch

from modstruct import checkpoints, distributed
from modstruct.config import BridgeConfig, GeometryConfig, QueueContrastConfig, SeparationConfig
from modstruct.losses.objective import build_objective
from modstruct.models.fusion.ema import EmaWeights

ROWS = 12


def mine(rows: torch.Tensor) -> torch.Tensor:
    """This process's part of the global batch."""
    return rows.chunk(distributed.world_size())[distributed.rank()]


def exchanged(wanted_seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(wanted_seed)
    rows = torch.randn(ROWS, 3, 2, dtype=torch.float64, generator=generator)
    wanted = torch.randint(ROWS, (ROWS,), generator=generator)
    if wanted_seed == 0:
        wanted = torch.zeros_like(wanted)  # all want one row: nothing comes from the others
    weights = torch.randn(ROWS, 3, 2, dtype=torch.float64, generator=generator)
    leaf = mine(rows).clone().requires_grad_()
    exchange = distributed.RowExchange(mine(wanted))
    found = exchange(leaf)
    (found * mine(weights)).sum().backward()
    found = found.detach()
    whole = rows.clone().requires_grad_()
    (whole[wanted] * weights).sum().backward()
    return {
        "rows": (found - mine(rows[wanted])).abs().max(),
        "gradient": (leaf.grad - mine(whole.grad)).abs().max(),
        "integers": (exchange(mine(torch.arange(ROWS))) != mine(wanted)).sum(),
    }


def exchanges() -> list[dict[str, torch.Tensor]]:
    return [exchanged(seed) for seed in range(5)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_exchanged_rows_are_plain_indexing_and_so_is_their_gradient(processes):
    for found in run_on_processes(exchanges, processes):
        for far in found:
            assert all(float(value) <= 1e-12 for value in far.values()), far


def albef_all(in_modal: bool):
    others = {"separation": SeparationConfig(weight=1.0), "bridge": BridgeConfig(weight=1.0)}
    others["queue_contrast"] = QueueContrastConfig(weight=1.0, ramp_steps=0, in_modal=in_modal)
    return fusion_recipe(losses=albef_losses(**others, geometry=GeometryConfig(weight=0.25)))


def losses_and_gradients() -> list[dict[str, torch.Tensor]]:
    """Without in-modal contrast and with it: two steps' terms here, and the mean over the processes of the second's
    gradients; the first fills the queue."""
    return [of_recipe(albef_all(in_modal)) for in_modal in (False, True)]


def of_recipe(recipe) -> dict[str, torch.Tensor]:
    model, objective = fusion_model(recipe), build_objective(recipe.losses)
    found = {}
    for step in range(2):
        whole = training_batch(ROWS, seed=step, rate=0.3)
        whole["image_id"][5] = whole["image_id"][0]
        model.zero_grad()
        outputs = model({name: mine(rows) for name, rows in whole.items()})
        total, terms = objective(outputs, step=step)
        total.backward()
        found |= {f"step {step}, {name}": value.detach() for name, value in terms.items()}
        model.queue.push(
            *(distributed.gather(rows.detach()) for rows in (outputs["image_augmented"], outputs["text_augmented"])),
            whole["image_id"],
        )
    for name, parameter in model.named_parameters():
        found[name] = distributed.sum_over_processes(parameter.grad) / distributed.world_size()
    return found


def assert_near(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    largest = max(float(value.norm()) for name, value in right.items() if not name.startswith("step"))
    for name, value in right.items():
        # Keys' biases have a gradient of 0 but for rounding.
        scale = float(value.norm()) if name.startswith("step") else max(float(value.norm()), 1e-2 * largest)
        assert float((found[name] - value).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_the_losses_and_gradients_of_one(processes):
    alone = losses_and_gradients()
    assert "step 1, queue_contrast/image_to_image" in alone[1].keys() - alone[0].keys()
    for found in run_on_processes(losses_and_gradients, processes):
        for one, other in zip(found, alone, strict=True):
            assert_near(one, other)


def assert_momentum_is_the_average(output: Path, steps: int, share: float) -> None:
    """Against the checkpoints of every step, each parameter's."""
    saved = [checkpoints.read(checkpoints.step_folder(output, step)) for step in range(1, steps + 1)]
    expected = {name: saved[0].momentum[f"momentum.{name}"].double() for name in saved[0].weights}
    for later in saved[1:]:
        for name, value in later.weights.items():
            expected[name] = share * expected[name] + (1 - share) * value.double()
    for name, value in expected.items():
        found = saved[-1].momentum[f"momentum.{name}"].double()
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved = saved[-1].weights[name] - saved[0].weights[name]
        behind = saved[-1].momentum[f"momentum.{name}"] - saved[0].momentum[f"momentum.{name}"]
        assert bool(moved.any()) == bool(behind.any()), f"{name} did not follow"


STEPS, STOP = 4, 3
ALL_IN_MODAL = "albef_all --losses.queue_contrast.in_modal true"
ALIKE = {"method": ALL_IN_MODAL, "steps": STEPS}


def train_and_weigh(cache: str, runs: dict[str, dict]) -> list[float]:
    """Of each run whose EMA weights are sharded: the fraction of them that is on this process at the end."""
    shard, partitions = EmaWeights.shard, []

    def noted(ema: EmaWeights, part) -> None:
        elements = sum(weight.numel() for weight in ema.module.parameters())
        shard(ema, part)
        partitions.append((ema.sharded, elements))

    with mock.patch.object(EmaWeights, "shard", noted):
        train_several(cache, runs)
    return [partition.local_elements / elements for partition, elements in partitions]


def test_momentum_follows_and_a_resume_in_mid_queue_is_exact(tmp_path):
    """The queue of 17 takes batches of 12: at step 3 it is full, and its next place is in its middle. At stage 3 the
    momentum weights are spread; what they come to is the same, there and in a resume elsewhere."""
    cache, stages = str(tmp_path / "cache"), ["zero0", "zero3"]
    whole = {stage: tmp_path / stage for stage in stages}
    resumed = {stage: tmp_path / f"{stage}-resumed" for stage in stages}
    runs = {str(whole[stage]): {"stage": stage, "every_steps": 1, **ALIKE} for stage in stages}
    for stage in stages:
        saved = str(checkpoints.step_folder(whole[stage], STOP))
        runs[str(resumed[stage])] = {"stage": stage, "resume": saved, **ALIKE}
    started = tmp_path / "started"
    runs[str(started)] = {"stage": "zero2", "method": ALL_IN_MODAL, "steps": 1, "init": str(whole["zero0"])}
    shares = run_on_processes(train_and_weigh, 2, cache, runs)
    assert len(shares[0]) == len(shares[1]) == 2  # of the two runs at stage 3
    assert all(0.5 <= share < 0.51 for of_process in shares for share in of_process), shares
    assert distance(whole["zero0"], whole["zero3"]) < 1e-5
    assert momentum_distance(whole["zero0"], whole["zero3"]) < 1e-5
    alone, saved = tmp_path / "alone", str(checkpoints.step_folder(whole["zero3"], STOP))
    run_on_processes(train_several, 1, cache, {str(alone): {"stage": "zero0", "resume": saved, **ALIKE}})
    assert distance(whole["zero3"], alone) < 1e-5
    assert momentum_distance(whole["zero3"], alone) < 1e-5
    # A run that starts from another's weights, momentum copies and queue.
    assert momentum_of(started)["queue.counts"].tolist() == [(STEPS + 1) * 12 % 17, 17]
    assert 0 < distance(whole["zero0"], started) < 0.1
    for stage in stages:
        assert_momentum_is_the_average(whole[stage], STEPS, share=0.8)
        queue = checkpoints.read(checkpoints.step_folder(whole[stage], STOP)).momentum["queue.counts"]
        assert queue.tolist() == [STOP * 12 % 17, 17]
        assert_same_bits(whole[stage], resumed[stage])
        assert rows_taken(resumed[stage]) == {STOP: rows_taken(whole[stage])[STOP]}


def assert_same_bits(one: Path, other: Path) -> None:
    assert torch.equal(weights_of(one), weights_of(other))
    ours, theirs = momentum_of(one), momentum_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_a_run_goes_on_at_any_stage_on_any_number_of_processes(tmp_path):
    cache = str(tmp_path / "cache")
    whole = {stage: tmp_path / stage for stage in STAGES}
    run_on_processes(
        train_several, 2, cache, {str(p): {"stage": s, "every_steps": 1, **ALIKE} for s, p in whole.items()}
    )
    found = {}
    for processes in (1, 2, 3, 4):
        runs = {
            str(tmp_path / f"{before}-to-{after}-on-{processes}"): {
                "stage": after,
                "resume": str(checkpoints.step_folder(whole[before], STOP)),
                **ALIKE,
            }
            for before in STAGES
            for after in STAGES
        }
        run_on_processes(train_several, processes, cache, runs)
        for output in map(Path, runs):
            before = whole[output.name.split("-")[0]]
            found[output.name] = max(distance(before, output), momentum_distance(before, output))
            if processes == 2 and output.name.startswith(f"{before.name}-to-{before.name}"):
                assert_same_bits(before, output)
    print(f"\n{len(found)} resumed runs, largest relative distance {max(found.values()):.1e}")
    assert {name: far for name, far in found.items() if far >= 1e-4} == {}


@pytest.mark.slow
def test_activations_computed_anew_end_with_the_same_weights(tmp_path):
    runs = {
        str(tmp_path / f"{stage}-{anew}"): {"stage": stage, "anew": anew, **ALIKE}
        for stage in STAGES
        for anew in (False, True)
    }
    run_on_processes(train_several, 2, str(tmp_path / "cache"), runs)
    for stage in STAGES:
        assert distance(tmp_path / f"{stage}-False", tmp_path / f"{stage}-True") < 1e-6, stage


def assert_finite(output: Path) -> None:
    assert weights_of(output).isfinite().all()
    saved = momentum_of(output)
    assert all(value.isfinite().all() for value in saved.values())
    assert all(value.dtype in (torch.float32, torch.int64) for value in saved.values())


def test_bfloat16_trains_without_nan(tmp_path):
    runs = {str(tmp_path / stage): {"stage": stage, "precision": "bf16", **ALIKE} for stage in ("zero0", "zero3")}
    run_on_processes(train_several, 2, str(tmp_path / "cache"), runs)
    for output in map(Path, runs):
        assert_finite(output)


@pytest.mark.slow
def test_bfloat16_trains_without_nan_at_every_stage(tmp_path):
    for processes in (1, 2):
        runs = {
            str(tmp_path / f"{stage}-on-{processes}"): {"stage": stage, "precision": "bf16", **ALIKE, "steps": 12}
            for stage in STAGES
        }
        run_on_processes(train_several, processes, str(tmp_path / "cache"), runs)
        for output in map(Path, runs):
            assert_finite(output)
