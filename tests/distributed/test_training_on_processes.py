"""Real training runs on real processes: every ZeRO stage, resumed bit for bit, the same mathematics on any number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_on_processes
from tiny_run import ds_config, tiny_recipe

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.models import deferred

STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
CASES = [(stage, "fp32") for stage in STAGES] + [(stage, "bf16") for stage in ("zero0", "zero1", "zero2", "zero3")]
LOCKED = [(stage, decay) for stage in ("zero2", "zero3") for decay in (1.0, 0.5, 0.25)]
CASES += [("zero2", "bf16_mixed"), ("zero3", "bf16_mixed")]


def run_recipe(output: str, cache: str, steps: int = 4, precision: str = "fp32") -> Recipe:
    """Patches are dropped in all steps but the last; an EMA is kept and measured."""
    recipe = tiny_recipe(output, cache, steps, precision, ema_decay=0.75, patch_dropout=0.3, unmasked_share=0.25)
    return replace(recipe, evaluation=replace(recipe.evaluation, ema=True))


def train_once(output: str, cache: str, stage: str, precision: str, steps: int = 4, resume: str | None = None) -> None:
    from modstruct.training.pretrain import Pretraining

    run = Pretraining(run_recipe(output, cache, steps, precision), ds_config(stage), resume).build()
    engine = run.engine
    elements = {name: len(engine.read(parameter)["weight"]) for name, parameter in engine.parameters()}
    assert {name: len(kept) for name, kept in engine.ema.kept.items()} == elements
    run.train()
    drawn = torch.get_rng_state()
    _, measured = run._measured()
    assert torch.equal(torch.get_rng_state(), drawn)
    ema = checkpoints.read_weights(run.last_checkpoint(), "momentum")
    for name, weight in measured.named_parameters():
        assert torch.equal(weight, ema[f"momentum.{name}"])


def unbroken_and_resumed(folder: str, cache: str) -> None:
    deferred.SMALL = 64  # at stage 3 hardly a weight is made before it is sharded
    for stage, precision in CASES:
        name = f"{folder}/{stage}-{precision}"
        train_once(name, cache, stage, precision)
        train_once(f"{name}-resumed", cache, stage, precision, resume=str(checkpoints.step_folder(name, 2)))


def locked_at_rates(folder: str, cache: str) -> None:
    """One step with a locked image tower, at three rates a layer."""
    from modstruct.training.pretrain import Pretraining

    for stage, decay in LOCKED:
        recipe = tiny_recipe(f"{folder}/{stage}-{decay}", cache, 1)
        recipe.model.unlocked_image_layers, recipe.optimizer.layer_decay = 0, decay
        Pretraining(recipe, ds_config(stage), None).build().train()


def new_ones_first(folder: str, cache: str) -> None:
    """Runs that start from one without independent heads, unbroken and resumed while the towers wait."""
    from modstruct.training.pretrain import Pretraining

    start = tiny_recipe(f"{folder}/start", cache, 1)
    start.losses.separation.weight = 0.0
    Pretraining(start, ds_config("zero0"), None).build().train()
    for stage in STAGES[:4]:
        for name, resume in ((stage, None), (f"{stage}-resumed", f"{folder}/{stage}/checkpoints/step-00000002")):
            recipe = tiny_recipe(f"{folder}/{name}", cache, 5)
            recipe.model.pretrained = f"{folder}/start"
            recipe.optimizer.new_first_steps, recipe.optimizer.new_first_scale = 3, False
            Pretraining(recipe, ds_config(stage), resume).build().train()
    recipe = tiny_recipe(f"{folder}/nothing", cache, 2)
    recipe.optimizer.new_first_steps = 1
    with pytest.raises(ValueError, match=r"optimizer.new_first_steps = 1: no weight is new beside pretrained ones"):
        Pretraining(recipe, ds_config("zero0"), None).build()


def several(folder: str, cache: str, runs: list[tuple[str, str, str | None]]) -> None:
    for name, stage, resume in runs:
        train_once(f"{folder}/{name}", cache, stage, "fp32", resume=resume)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, cache) -> Path:
    """All cases, trained at two processes, unbroken and resumed in the middle."""
    folder = tmp_path_factory.mktemp("two")
    run_on_processes(unbroken_and_resumed, 2, str(folder), cache)
    return folder


def first_weights(folder: str, cache: str) -> dict[str, dict[str, torch.Tensor]]:
    """This process's parts of the master weights before the first step."""
    from modstruct.training.pretrain import Pretraining

    deferred.SMALL = 64
    found = {}
    for stage, precision in (("zero3", "fp32"), ("zero0", "fp32"), ("zero3", "bf16"), ("zero0", "bf16")):
        recipe = tiny_recipe(f"{folder}/{stage}-{precision}-{distributed.world_size()}", cache, precision=precision)
        engine = Pretraining(recipe, ds_config(stage), None).build().engine
        found[f"{stage} {precision}"] = {name: engine.read(p)["weight"].clone() for name, p in engine.parameters()}
    return found


def last(output: Path) -> checkpoints.Checkpoint:
    return checkpoints.read(checkpoints.list_checkpoints(output)[-1])


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(two_processes, stage, precision):
    whole, resumed = last(two_processes / f"{stage}-{precision}"), last(two_processes / f"{stage}-{precision}-resumed")
    assert whole.state.step == resumed.state.step == 4
    assert whole.optimizer == resumed.optimizer
    for kind in ("weights", "moments", "rng", "momentum"):
        ours, theirs = getattr(whole, kind), getattr(resumed, kind)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (kind, name)


def assert_same_run(one: checkpoints.Checkpoint, other: checkpoints.Checkpoint, tolerance: float) -> None:
    for kind in ("weights", "momentum"):
        first, second = getattr(one, kind), getattr(other, kind)
        ours, theirs = (torch.cat([made[name].flatten() for name in sorted(first)]) for made in (first, second))
        assert (ours - theirs).norm() < tolerance * ours.norm()


def test_the_ema_lags_behind_the_weights(two_processes):
    """After four steps: w_0 to w_4 with 0.75^4, 0.25 x 0.75^3, …, of which the checkpoints have two."""
    early, late = (checkpoints.read(p) for p in checkpoints.list_checkpoints(two_processes / "zero2-fp32"))
    assert late.momentum.keys() == {f"momentum.{name}" for name in late.weights}
    for name, after in late.weights.items():
        ema, before = late.momentum[f"momentum.{name}"], early.momentum[f"momentum.{name}"]
        third = (ema - 0.25 * after - 0.75**2 * before) / (0.25 * 0.75)  # the weights after the third step
        ends = torch.stack([early.weights[name], after])
        assert (third - ends.mean(0)).norm() <= 1.5 * (ends[1] - ends[0]).norm() + 1e-6
        assert not torch.equal(ema, after)


def test_new_weights_learn_first_and_the_others_follow_from_where_they_started(tmp_path, cache):
    run_on_processes(new_ones_first, 2, str(tmp_path), cache)
    start = last(tmp_path / "start").weights
    for stage in STAGES[:4]:
        early, whole = (checkpoints.read(tmp_path / stage / "checkpoints" / f"step-0000000{n}") for n in (2, 5))
        new = {name for name in whole.weights if name not in start}
        assert early.state.new_weights == sorted(new) == sorted(n for n in whole.weights if "independent" in n)
        for name, weight in start.items():
            assert torch.equal(early.weights[name], weight), (stage, name)
        old = [name for name in start if early.moments[f"exp_avg_sq.{name}"].any()]
        assert len(old) > len(start) / 2  # what they would have done is known when they begin
        assert all(not torch.equal(whole.weights[name], start[name]) for name in old)
        for name in new:
            assert early.moments[f"exp_avg_sq.{name}"].any()
        resumed = last(tmp_path / f"{stage}-resumed")
        assert resumed.state == whole.state
        for kind in ("weights", "moments"):
            for name, values in getattr(whole, kind).items():
                assert torch.equal(getattr(resumed, kind)[name], values), (stage, kind, name)


def test_locked_layers_stay_and_a_layers_step_is_as_long_as_its_rate(tmp_path, cache):
    """In the first step a weight goes as far as its learning rate says; two layers lie after a table of positions."""
    run_on_processes(locked_at_rates, 2, str(tmp_path), cache)
    for stage in ("zero2", "zero3"):
        ends = [last(tmp_path / f"{stage}-{decay}").weights for decay in (1.0, 0.5, 0.25)]
        for name, factor in (("text.trunk.positional_embedding", 2), ("text.trunk.ln_final.weight", 0)):
            full, half, quarter = (end[name] for end in ends)
            if factor:
                moved = (full - quarter) / (1 - 0.25**factor) - (full - half) / (1 - 0.5**factor)
                assert moved.abs().max() < 1e-5
                assert (full - half).abs().max() > 1e-4
            else:
                assert torch.equal(full, half)
        locked = [name for name in ends[0] if name.startswith(("image.trunk.", "image.head."))]
        assert locked
        assert all(torch.equal(ends[0][name], end[name]) for name in locked for end in ends[1:])
        moments = last(tmp_path / f"{stage}-0.5").moments
        assert not any(name.removeprefix("exp_avg.") in locked for name in moments)
        assert "exp_avg.image.independent_head.weight" in moments


def test_a_run_begins_with_the_same_weights_at_every_stage_on_any_number_of_processes(tmp_path, cache):
    (alone,) = run_on_processes(first_weights, 1, str(tmp_path), cache)
    parts = run_on_processes(first_weights, 3, str(tmp_path), cache)
    for case in parts[0]:
        one = alone["zero0 " + case.split()[1]]
        for name, weight in one.items():
            found = parts[0][case][name] if "zero0" in case else torch.cat([part[case][name] for part in parts])
            assert torch.equal(found, weight), (case, name)


def test_training_moves_the_weights(two_processes):
    early, late = (checkpoints.read(p) for p in checkpoints.list_checkpoints(two_processes / "zero2-fp32"))
    assert all(
        not torch.equal(early.weights[name], late.weights[name])
        for name in (n.removeprefix("exp_avg.") for n in early.moments if n.startswith("exp_avg."))
    )


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_ends_with_the_same_weights(two_processes, stage):
    assert_same_run(last(two_processes / "zero0-fp32"), last(two_processes / f"{stage}-fp32"), 1e-4)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_number_of_processes_does_not_matter(two_processes, tmp_path, cache, processes):
    """From the start, and from another number of processes' checkpoint of another stage."""
    half_way = str(checkpoints.step_folder(two_processes / "zero3-fp32", 2))
    runs = [("fresh", "zero2", None), ("resumed", "zero1", half_way)]
    run_on_processes(several, processes, str(tmp_path), cache, runs)
    for name, *_ in runs:
        assert_same_run(last(two_processes / "zero2-fp32"), last(tmp_path / name), 1e-4)


def dtypes_of_products(model: torch.nn.Module) -> set[torch.dtype]:
    """A set that the next forward fills: of what products of the towers and heads result in."""
    found: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, inputs, made: found.add(made.dtype))
    return found


def norms_are_float32(engine) -> bool:
    """Whether what the next step reads of each norm and of the logit scale is the float32 master, bit for bit."""
    norms = [name for name, module in engine.model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    kept = {"logit_scale"} | {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    same = []
    for name, parameter in engine.parameters():
        if name in kept:
            start, end = engine.span(parameter)
            held = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.flatten()[start:end]
            master = engine.read(parameter)["weight"]
            same.append(held.dtype == torch.float32 and torch.equal(held[: len(master)], master))
    return len(same) == len(kept) > 5 and all(same)


def skipped_steps(folder: str, cache: str) -> dict[str, bool]:
    """At every stage: one step with a non-finite gradient, one with a non-finite loss; do the weights stay? And what
    the towers compute in at a sound step."""
    from modstruct import distributed
    from modstruct.training.pretrain import Pretraining
    from modstruct.training.step import train_step

    outcome = {}
    for stage, precision in [*CASES, ("zero3_offload", "bf16")]:
        recipe = tiny_recipe(f"{folder}/{stage}{precision}", cache, precision=precision)
        run = Pretraining(recipe, ds_config(stage), None).build()
        torch.manual_seed(0)
        batch = {
            "image": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8),
            "text": run.data.tokenizer([f"caption {i}" for i in range(6)]),
        }
        batch |= {f"{name}_augmented": rows for name, rows in batch.items()}

        def weights(run=run):
            return [run.engine.read(p)["weight"].clone() for _, p in run.engine.parameters()]

        def poison(run, where):
            def objective(outputs, step, without):
                total, terms = run.objective(outputs, step, without)
                if where == "loss":
                    return total * float("nan"), terms | {"bridge": total.detach() * float("nan")}
                if distributed.rank() == 1:  # one process alone is hurt; all must skip
                    outputs["image"].register_hook(lambda gradient: gradient * float("nan"))
                    total = total + 0 * outputs["image"].sum()
                return total, terms

            return objective

        before = weights()
        for where in ("gradient", "loss"):
            report = train_step(run.engine, poison(run, where), [batch], 0, 1e-2)
            unmoved = all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
            reason = "bridge" if where == "loss" else "gradient"
            outcome[f"{stage} {precision} {where}"] = unmoved and reason in (report.skipped or "")
        products = dtypes_of_products(run.engine.model)
        report = train_step(run.engine, run.objective, [batch], 1, 1e-2)
        half = {torch.float32 if precision == "fp32" else torch.bfloat16}
        outcome[f"{stage} {precision} products' dtype"] = products == half
        outcome[f"{stage} {precision} losses' dtype"] = {o.dtype for o in report.outputs.values()} == {torch.float32}
        outcome[f"{stage} {precision} norms' dtype"] = norms_are_float32(run.engine)
        moved = any(not torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        outcome[f"{stage} {precision} recovers"] = moved and report.skipped is None and run.engine.steps_taken == 1
    return outcome


def test_what_is_not_finite_never_reaches_the_weights(tmp_path, cache):
    for outcome in run_on_processes(skipped_steps, 2, str(tmp_path), cache):
        assert [case for case, right in outcome.items() if not right] == []


def refuses_changed_recipe(folder: str, cache: str) -> str:
    from modstruct.training.pretrain import Pretraining

    recipe = run_recipe(folder, cache)
    changed = replace(recipe, train=replace(recipe.train, global_batch=24))
    try:
        Pretraining(changed, ds_config("zero2"), "latest").build()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_resuming_with_another_batch_is_refused_by_name(two_processes, cache):
    (message,) = run_on_processes(refuses_changed_recipe, 1, str(two_processes / "zero2-fp32"), cache)
    assert message.startswith("train.global_batch = 24")
