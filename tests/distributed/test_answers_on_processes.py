"""VQA on 1 and 2 processes: one loss, gradients, weights and answers, however many answers each process has."""

from __future__ import annotations

import pytest
import torch
from processes import run_on_processes
from tiny_answers import ANSWER_LIST, ANSWERS, QUESTIONS, answer_model, answer_recipe, answer_tokenizer, question_batch
from tiny_answers import with_answers as answered
from tiny_run import ds_config
from torch import Tensor

from modstruct import distributed
from modstruct.checkpoints import Piece
from modstruct.config import OptimizerConfig, TrainConfig
from modstruct.losses.distillation import Distillation
from modstruct.losses.objective import Objective
from modstruct.training.ds_config import read_ds_config, resolve_ds_config
from modstruct.training.step import train_step
from modstruct.training.trainer import build_engine


def rows_here() -> slice:
    """This process's questions; of two, the second has one answer, and without the last question none at all."""
    own = len(QUESTIONS) // distributed.world_size()
    return slice(distributed.rank() * own, (distributed.rank() + 1) * own)


def objective() -> Objective:
    return Objective({"task": Distillation(0.4, 0)}, {"task": 1.0})


def loss_and_gradients(answers: list[dict[str, float]]) -> dict[str, Tensor]:
    """The loss, its terms, and the mean over the processes of every gradient."""
    rows, model = rows_here(), answer_model()
    outputs = model(answered(question_batch(rows), answers[rows]))
    total, terms = objective()(outputs, 0)
    total.backward()
    found = {"total": total.detach()} | {name: value.detach() for name, value in terms.items()}
    for name, parameter in model.named_parameters():
        found[name] = distributed.sum_over_processes(parameter.grad) / distributed.world_size()
    return found


@pytest.mark.parametrize("answers", [ANSWERS, [*ANSWERS[:3], {}]], ids=["uneven", "none on the second"])
def test_two_processes_give_the_loss_and_gradients_of_one(answers):
    expected = loss_and_gradients(answers)
    for found in run_on_processes(loss_and_gradients, 2, answers):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def whole(piece: Piece) -> torch.Tensor:
    """What all processes' pieces make up."""
    pieces = sorted(distributed.gather_objects((piece.start, piece.values)), key=lambda one: one[0])
    return torch.cat([values for _, values in pieces]).view(piece.shape)


def trained(stage: int, answers: list[dict[str, float]]) -> dict[str, Tensor]:
    """Whole weights, momentum weights too, after two steps at a ZeRO stage; and what the model then answers."""
    recipe = answer_recipe()
    recipe.optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-4)
    recipe.train = TrainConfig(steps=2, global_batch=len(QUESTIONS))
    config = resolve_ds_config(read_ds_config(ds_config(f"zero{stage}")), recipe, distributed.world_size())
    model = answer_model(recipe)
    engine = build_engine(model, recipe, config)
    rows, loss = rows_here(), objective()
    batch = answered(question_batch(rows), answers[rows])
    model.train()
    for step in range(2):
        report = train_step(engine, loss, [batch], step, 1e-2)
        assert report.skipped is None
    model.eval()
    listed = answer_tokenizer(6)(ANSWER_LIST)
    # In measuring the processes have different questions, and another number of them.
    mine = question_batch(slice(rows.start, rows.start + 1 + distributed.rank()))
    numbers, likelihoods = model.rank(mine, listed, 7, 3)
    written = model.generate(mine)
    report = train_step(engine, loss, [batch], 2, 1e-2)  # and training goes on
    assert report.skipped is None
    weights = {name: whole(engine.pieces(parameter)["weight"]) for name, parameter in engine.parameters()}
    momentum = {name: whole(piece) for name, piece in model.ema_pieces().items()}
    return weights | momentum | {"numbers": numbers[:1], "likelihoods": likelihoods[:1], "written": written[:1]}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_steps_and_answers_are_the_same_at_every_stage(stage):
    answers = [*ANSWERS[:3], {}]
    expected = run_on_processes(trained, 1, 0, answers)[0]
    found, other = run_on_processes(trained, 2, stage, answers)
    for name in ("numbers", "likelihoods", "written"):
        assert name in other
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
