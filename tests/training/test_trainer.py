"""The learning rate over a run: up in a line, down in half a cosine; what a resumed run reads."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modstruct.checkpoints import TrainState
from modstruct.config import FinetuneRecipe, OptimizerConfig, Recipe, TrainConfig
from modstruct.training.pretrain import Pretraining
from modstruct.training.trainer import Start, check_length, learning_rate


@st.composite
def runs(draw) -> tuple[OptimizerConfig, int]:
    steps = draw(st.integers(1, 200))
    peak = draw(st.floats(1e-6, 1.0))
    final = peak * draw(st.floats(0, 1))
    return OptimizerConfig(learning_rate=peak, final_learning_rate=final, warmup_steps=draw(st.integers(0, 250))), steps


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


@given(runs())
def test_every_step_learns_and_none_beyond_the_peak(run):
    config, steps = run
    assert all(0 < rate <= config.learning_rate * (1 + 1e-12) for rate in rates(config, steps))


@given(runs())
def test_it_rises_by_equal_amounts_and_then_never_again(run):
    config, steps = run
    values = rates(config, steps)
    warmup = min(config.warmup_steps, steps)
    for step, value in enumerate(values[:warmup]):
        assert value == pytest.approx(config.learning_rate * (step + 1) / warmup)
    after = values[max(0, warmup - 1) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))


@given(runs())
def test_it_ends_at_the_final_rate_and_stays_there(run):
    config, steps = run
    if config.warmup_steps < steps:
        assert learning_rate(config, steps, steps) == pytest.approx(config.final_learning_rate, abs=1e-15)
        assert learning_rate(config, steps + 7, steps) == pytest.approx(config.final_learning_rate, abs=1e-15)


def test_half_way_through_the_cosine_is_half_the_way_down():
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=10)
    assert learning_rate(config, 10, 110) == pytest.approx(1.0)
    assert learning_rate(config, 60, 110) == pytest.approx(0.6)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(OptimizerConfig(learning_rate=0.3, warmup_steps=0), 0, 5) == 0.3


@pytest.mark.parametrize(
    ("before", "now", "remedy"),
    [
        ("a1 None", "a1 lines 1 None", "give data.caption_lines: false, as it was read before"),
        ("a1 lines 1 None", "a1 None", "give data.caption_lines: true, as it was read before"),
        ("a1 None", "b2 None", "holds other samples"),
    ],
)
def test_a_resumed_run_reads_the_captions_that_it_was_trained_on(before, now, remedy):
    start = Start({}, None, SimpleNamespace(state=TrainState(data_fingerprint=before)), None)
    assert start.samples == "a1"
    with pytest.raises(ValueError, match=remedy):
        start.state(now, "x.tar")
    assert start.state(before, "x.tar").data_fingerprint == before


def test_a_resume_at_or_past_the_end_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", True)
    caplog.set_level(logging.INFO, "modstruct")
    by_steps = Recipe(train=TrainConfig(steps=7))
    by_epochs = FinetuneRecipe(train=TrainConfig(steps=None, epochs=2.5))
    check_length(by_steps, 7, 6)
    assert caplog.text == ""
    check_length(by_steps, 7, 7)
    assert "The checkpoint is at step 7, the last of train.steps = 7: nothing to train" in caplog.text
    with pytest.raises(ValueError, match=r"^train\.steps = 7: the checkpoint is at step 9, beyond the 7 steps"):
        check_length(by_steps, 7, 9)
    with pytest.raises(ValueError, match=r"^train\.epochs = 2\.5: .*step 1,001, .*2\.5 epochs, 1,000 .*raise"):
        check_length(by_epochs, 1000, 1001)


def test_pretrained_weights_learn_before_the_end():
    recipe = Recipe(optimizer=OptimizerConfig(new_first_steps=6))
    check_length(recipe, 7, 0)
    with pytest.raises(ValueError, match=r"^optimizer\.new_first_steps = 6: no other .* 6 steps: give fewer"):
        check_length(recipe, 6, 0)


def test_a_run_into_no_folder_is_refused():
    with pytest.raises(ValueError, match=r"^output = ' ': name a folder for the run"):
        Pretraining(Recipe(output=" "), "ds_configs/zero2.json", None).run()
