"""Tasks as whole runs: any number of processes, ZeRO-3, resumed, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_on_processes
from tiny_run import ds_config
from tiny_tasks import fine_tune_several, write_files, zero3_that_shards_all

from modstruct import checkpoints
from modstruct.models.fusion.ema import EMA
from modstruct.training.trainer import best_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, root) -> dict[str, Path]:
    """Text assignment, NLVR2 from its weights and resumed in the middle, SNLI-VE, VQA, retrieval and that resumed: at 1
    process, and at 2 under ZeRO-3."""
    made = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"on{processes}")
        stage = ds_config("zero0") if processes == 1 else zero3_that_shards_all(folder)
        assigned, whole = str(folder / "text_assignment"), str(folder / "nlvr2")
        listed = [
            {"task": "text_assignment", "output": assigned},
            {"task": "nlvr2", "output": whole, "init": assigned},
            {
                "task": "nlvr2",
                "output": f"{whole}-resumed",
                "init": assigned,
                "resume": str(checkpoints.step_folder(whole, 2)),
            },
        ]
        listed += [{"task": task, "output": str(folder / task)} for task in ("snli_ve", "retrieval", "vqa")]
        listed.append(
            {
                "task": "retrieval",
                "output": str(folder / "retrieval-resumed"),
                "resume": str(checkpoints.step_folder(folder / "retrieval", 2)),
            }
        )
        listed = [run | {"ds_config": stage} for run in listed]
        metrics = run_on_processes(fine_tune_several, processes, str(root), listed)
        assert all(found == metrics[0] for found in metrics)
        made[str(processes)] = folder
    return made


def last(run: Path) -> checkpoints.Checkpoint:
    return checkpoints.read(checkpoints.list_checkpoints(run)[-1])


@pytest.mark.parametrize("task", ["text_assignment", "nlvr2", "snli_ve", "retrieval", "vqa"])
def test_two_processes_under_zero_3_are_one_process(runs, task):
    one, two = (last(runs[number] / task) for number in ("1", "2"))
    for kind in ("weights", "momentum"):
        ours, theirs = getattr(one, kind), getattr(two, kind)
        assert ours.keys() == theirs.keys()
        assert bool(ours) == (kind == "weights" or task != "text_assignment")  # which does not distil
        if not ours:
            continue
        ours, theirs = (torch.cat([part[name].flatten() for name in sorted(ours)]) for part in (ours, theirs))
        assert (ours - theirs).norm() < 1e-4 * ours.norm()
    for name in ("metrics.json",) if task == "retrieval" else ("predictions.json", "metrics.json"):
        said = [json.loads((runs[number] / task / name).read_text()) for number in ("1", "2")]
        assert said[0] == said[1]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_shared_projections_are_saved_once_and_learn(runs, processes):
    early, late = (checkpoints.read(path) for path in checkpoints.list_checkpoints(runs[processes] / "nlvr2"))
    keys = [name for name in late.weights if ".crossattention.self.key.weight" in name]
    assert sorted(keys) == [f"backbone.fusion.left.{number}.crossattention.self.key.weight" for number in "12"]
    for name in keys:
        assert not torch.equal(early.weights[name], late.weights[name])
        assert late.moments[f"exp_avg.{name}"].abs().max() > 0
        assert not torch.equal(late.momentum[EMA + name], late.weights[name])


@pytest.mark.parametrize("task", ["nlvr2", "retrieval"])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(runs, processes, task):
    whole, resumed = (last(runs[processes] / name) for name in (task, f"{task}-resumed"))
    assert whole.state.step == resumed.state.step == 4
    for kind in ("weights", "moments", "momentum"):
        ours, theirs = getattr(whole, kind), getattr(resumed, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_two_blocks_learn_different_things(runs):
    weights = last(runs["1"] / "text_assignment").weights
    names = [name for name in weights if name.startswith("backbone.fusion.right.") and name.endswith("query.weight")]
    assert names
    assert not any(torch.equal(weights[name], weights[name.replace(".right.", ".left.")]) for name in names)


def test_every_run_leaves_predictions_metrics_and_an_export(runs):
    for task, size in (("text_assignment", 20), ("nlvr2", 16)):
        run = runs["2"] / task
        assert len(json.loads((run / "predictions.json").read_text())) == size
        accuracy = json.loads((run / "metrics.json").read_text())["results"][task]["values"]["accuracy"]
        assert 0 <= accuracy["value"] <= 1
        assert accuracy["chance"] == pytest.approx(0.5 if task == "nlvr2" else 1 / 3)
        assert checkpoints.read_best(run) is not None
        assert (run / "export" / "modstruct_model.safetensors").is_file()


def measure_again(run: str, out: str) -> None:
    from modstruct.cli import FINETUNE_RECIPES, parse, recipe_parser
    from modstruct.commands.arguments import checkpoint_arguments
    from modstruct.commands.task import measure_task
    from modstruct.config import FinetuneRecipe

    words = checkpoint_arguments(["--checkpoint", run], fine_tuned=True)
    parser = recipe_parser("", "", FinetuneRecipe, FINETUNE_RECIPES)
    parser.add_argument("--checkpoint")
    recipe, _ = parse(parser, words)
    measure_task(recipe, run, "test", out)


@pytest.mark.parametrize("task", ["nlvr2", "vqa"])
def test_a_saved_run_is_measured_again_to_the_same_metrics(runs, tmp_path, task):
    run = runs["2"] / task
    run_on_processes(measure_again, 1, str(run), str(tmp_path))
    best = checkpoints.read_best(run)["checkpoint"]
    assert best == checkpoints.list_checkpoints(run)[-1].name, "else the two measured other weights"
    measured = json.loads((run / "metrics.json").read_text())["results"][task]
    assert json.loads((tmp_path / "test.json").read_text()) == measured
    said = json.loads((tmp_path / "test-predictions.json").read_text())
    assert said == json.loads((run / "predictions.json").read_text())


def test_the_best_checkpoint_by_validation_is_measured_and_not_the_last(tmp_path):
    for step in (2, 4):
        checkpoints.step_folder(tmp_path, step).mkdir(parents=True)
    last = checkpoints.step_folder(tmp_path, 4)
    assert best_checkpoint(tmp_path, last) == last
    checkpoints.note_score(checkpoints.step_folder(tmp_path, 2), 0.5)
    assert best_checkpoint(tmp_path, last) == checkpoints.step_folder(tmp_path, 2)
