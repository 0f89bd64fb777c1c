"""The learning rate over a run: up in a line, down in half a cosine; what a resumed run reads."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modstruct import checkpoints
from modstruct.checkpoints import TrainState
from modstruct.config import EvaluationConfig, FinetuneRecipe, OptimizerConfig, Recipe, TrainConfig
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
    by_steps = Recipe(train=TrainConfig(steps=7), optimizer=OptimizerConfig(warmup_steps=7))
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


def a_checkpoint(output: Path, step: int) -> Path:
    path = checkpoints.step_folder(output, step)
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    return path


def starting_point(output: Path, resume: str | None) -> Path | None:
    return Pretraining(Recipe(output=str(output)), "ds_configs/zero2.json", resume)._starting_point()


@pytest.mark.parametrize("resume", ["", " "])
def test_an_empty_resume_is_refused_and_no_fresh_run(tmp_path, resume):
    a_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=r"^--resume = ' *': give `latest`, `best` or a checkpoint's folder"):
        starting_point(tmp_path, resume)


def test_only_latest_begins_a_run_where_there_is_no_checkpoint(tmp_path):
    assert starting_point(tmp_path / "new", "latest") is None
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^--resume = .*empty.*holds no checkpoint; only `latest` may begin"):
        starting_point(tmp_path / "new", str(tmp_path / "empty"))


def test_another_runs_checkpoints_are_not_written_over(tmp_path):
    of_one, of_other = a_checkpoint(tmp_path / "one", 2), a_checkpoint(tmp_path / "other", 5)
    with pytest.raises(ValueError, match=r"^output = .*other.*: holds checkpoints of another run than .*step-00000002"):
        starting_point(tmp_path / "other", str(of_one))
    assert starting_point(tmp_path / "third", str(of_one)) == of_one
    assert starting_point(tmp_path / "other", "latest") == of_other


def test_a_resume_from_an_earlier_step_names_what_will_go(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", True)
    early, _, best = (a_checkpoint(tmp_path, step) for step in (4, 8, 10))
    checkpoints.note_score(best, 0.9)
    assert starting_point(tmp_path, "latest") == best
    assert caplog.text == ""
    assert starting_point(tmp_path, str(early)) == early
    assert "removed once the next is saved: step-00000008, step-00000010 (the best is step-00000010)" in caplog.text


@pytest.mark.parametrize(("step", "every", "noted", "again"), [(4, 2, 2, True), (4, 2, 4, False), (3, 2, 2, False)])
def test_a_validation_that_a_stop_cut_short_is_made_up_for(tmp_path, step, every, noted, again):
    recipe = Recipe(output=str(tmp_path), evaluation=EvaluationConfig(every_steps=every))
    run = Pretraining(recipe, "ds_configs/zero2.json", "latest")
    checkpoints.note_score(a_checkpoint(tmp_path, noted), 0.5)
    checkpoints.step_folder(tmp_path, step).mkdir(exist_ok=True)
    run.state, run.steps, run.has_validation = TrainState(step=step), 9, True
    run.validate = lambda: 0.7
    run._validate_again()
    best = checkpoints.read_best(tmp_path)
    assert (best["score"], best["validated"]) == ((0.7, step) if again else (0.5, noted))


def test_a_warm_up_that_the_run_cuts_short_is_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", True)
    caplog.set_level(logging.INFO, "modstruct")
    check_length(Recipe(train=TrainConfig(steps=7), optimizer=OptimizerConfig(warmup_steps=8)), 7, 0)
    assert "optimizer.warmup_steps = 8: the run has 7 steps" in caplog.text
