"""kill -9 at random moments: checkpoints stay whole, no process stays behind, and the run ends as if unhurt."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from hurt_run import HurtRun, errors_on, losses, whole_checkpoints, write_recipe
from processes import run_on_processes
from small_runs import weights_of
from tiny_run import ds_config

from modstruct import checkpoints

STEPS, EVERY = 100, 5
MOMENTS = ["starting", "step", "checkpoint", "step", "checkpoint"]


def half_written(output: Path) -> bool:
    return any(checkpoints.folder(output).glob("*.part"))


def wait_for(moment: str, run: HurtRun, reached: int, draw: random.Random) -> None:
    if moment == "starting":
        time.sleep(draw.uniform(0, 25))
    elif moment == "step":
        run.wait_for_step(reached + draw.randint(1, 9))
        time.sleep(draw.uniform(0, 0.2))
    else:
        run.wait_for_step(reached + 1)
        run.wait_until(lambda: half_written(run.output), "a checkpoint was being written")
        time.sleep(draw.choice([0, draw.uniform(0, 0.02)]))


def kill_and_check(run: HurtRun, moment: str, victims: str, before: list[int], draw: random.Random) -> list[int]:
    """Returns the checkpoints there are afterwards, all whole."""
    wait_for(moment, run, before[-1] if before else 0, draw)
    ranks = run.ranks()
    if victims == "all" or not ranks:
        run.signal_group(signal.SIGKILL)
    else:
        ranks[draw.choice(sorted(ranks))].kill()
    status, screen = run.end()
    assert status != 0
    left = run.left_over(60)  # the launcher looks once a second, and a loader worker ends with its process
    assert left == []
    if victims == "one" and moment != "starting":
        assert "another process has ended" in screen, screen[-3000:]
        assert len(errors_on(screen)) == 1, screen[-3000:]
    after = whole_checkpoints(run.output)
    assert not before or after[-1] >= before[-1]
    return after


def assert_as_unhurt(hurt: Path, unhurt: Path) -> None:
    """The same losses in every step, and the same last weights, to the bit."""
    assert losses(hurt) == losses(unhurt)
    assert sorted(losses(hurt)) == list(range(1, max(losses(unhurt)) + 1))
    assert (weights_of(hurt) == weights_of(unhurt)).all()


def kills(folder: Path, tried, count: int, steps: int, moments: list[str]) -> None:
    draw = random.Random(0)
    recipe = write_recipe(folder, steps=steps, every_steps=EVERY)
    output = folder / "hurt"
    saved: list[int] = []
    for number in range(count):
        moment, victims = moments[number % len(moments)], draw.choice(["one", "all"])
        workers = str(draw.choice([0, 0, 1]))
        with tried(f"kill -9 of {victims}, {moment}"):
            run = HurtRun(recipe, output, "--resume", "latest", "--data.workers", workers)
            saved = kill_and_check(run, moment, victims, saved, draw)
            print(f"kill {number + 1}: {victims}, {moment}, {workers} workers; checkpoints now {saved}", flush=True)
    status, screen = HurtRun(recipe, output, "--resume", "latest").end()
    assert status == 0, screen[-3000:]
    assert not half_written(output)
    status, screen = HurtRun(recipe, folder / "unhurt").end()
    assert status == 0, screen[-3000:]
    assert_as_unhurt(output, folder / "unhurt")


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path, tried):
    kills(tmp_path, tried, 20, 4 * STEPS, MOMENTS)  # on a machine that is not busy each kill comes some steps late


def test_a_kill_during_a_checkpoint(tmp_path, tried):
    """Compared with a run of the same two processes without the launcher."""
    recipe = write_recipe(tmp_path, steps=12, every_steps=EVERY)
    with tried("kill -9 of one, checkpoint"):
        run = HurtRun(recipe, tmp_path / "hurt", "--resume", "latest")
        kill_and_check(run, "checkpoint", "one", [], random.Random(1))
        status, screen = HurtRun(recipe, tmp_path / "hurt", "--resume", "latest").end()
        assert status == 0, screen[-3000:]
        run_on_processes(unhurt_run, 2, recipe, str(tmp_path / "unhurt"))
        assert_as_unhurt(tmp_path / "hurt", tmp_path / "unhurt")


DEATHS = [("pieces", 0), ("pieces", 1), ("piece", 1), ("piece", 0), ("index", 0), ("name", 0), ("old", 0)]
"""Moments inside the writer, and the process that is killed there."""


@pytest.mark.slow
def test_a_kill_at_every_moment_of_the_writer(tmp_path, tried):
    """Each run, which goes on from the last, is killed in its second checkpoint; the one before is whole."""
    recipe, output = write_recipe(tmp_path, steps=STEPS, every_steps=EVERY), tmp_path / "hurt"
    saved = [0]
    for moment, rank in DEATHS:
        with tried(f"kill -9 inside the writer: {moment}"):
            run = HurtRun(recipe, output, "--resume", "latest", faults=f"die:{moment}:2:{rank}")
            status, screen = run.end()
            assert status != 0, screen[-3000:]
            assert run.left_over(60) == []
            first, second = saved[-1] + EVERY, saved[-1] + 2 * EVERY
            # Only the last moment leaves the second one, too, before anything older is removed.
            expected = {first, second} if moment == "old" else {first}
            saved = whole_checkpoints(output)
            assert expected == {step for step in saved if step >= first}, screen[-3000:]
            assert half_written(output) == (moment != "old")
    status, screen = HurtRun(recipe, output, "--resume", "latest").end()
    assert status == 0, screen[-3000:]
    run_on_processes(unhurt_run, 2, recipe, str(tmp_path / "unhurt"))
    assert_as_unhurt(output, tmp_path / "unhurt")


def unhurt_run(recipe_file: str, output: str) -> None:
    from modstruct.cli import parse, recipe_parser
    from modstruct.training.pretrain import Pretraining

    recipe, _ = parse(recipe_parser("", ""), ["--recipe", recipe_file, "--output", output])
    run = Pretraining(recipe, ds_config("zero2"), None).build()
    run.train()
    run.telemetry.close()
