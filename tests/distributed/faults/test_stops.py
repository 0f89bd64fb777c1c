"""Ctrl-C at every stage, signals to a launcher alone, two runs at once: one line of ours, and nothing left.

The launchers' own tracebacks are not ours to hide: `deepspeed` and torchrun print one each when they are interrupted.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from hurt_run import INJECTING, HurtCommand, HurtRun, processes_that_mention, whole_checkpoints, write_recipe

pytestmark = pytest.mark.slow
STEPS = 30
SECONDS_LEFT = 30  # for what is left to end; on a quiet machine it is gone after three


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """With validation in step 8, and data and tokenizer made by the first run."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), steps=STEPS, every_steps=5, validation="scenes")


def press_ctrl_c(run: HurtCommand) -> None:
    """As a terminal sends it: to every process of its group."""
    run.signal_group(signal.SIGINT)


def own_words(screen: str) -> list[str]:
    """Lines of ours about a stop, and tracebacks that are not the launcher's."""
    stops = ("Ctrl-C", "SIGTERM:", "SIGHUP:", "the launcher (", "Stopped by", "error (")
    found = [line for line in screen.splitlines() if line.startswith(stops) or "Exception ignored" in line]
    tracebacks = re.findall(r"Traceback \(most recent call last\):\n(?:[ ~^].*\n)*.*", screen)
    return found + [t for t in tracebacks if "deepspeed/launcher/" not in t and "torch/distributed/run.py" not in t]


def ended(run: HurtCommand) -> list[str]:
    """What the run said of its stop, once nothing of it is left."""
    began = time.monotonic()
    run.popen.wait(timeout=120)
    left = run.left_over(SECONDS_LEFT)
    print(f"gone after {time.monotonic() - began:.1f} s")
    _, screen = run.end()
    assert left == [], screen[-3000:]
    assert not (run.output / "run.lock").exists()
    return own_words(screen)


AT_ONCE = {
    "data": "no step was taken, so there is nothing to save",
    "tokenizer": "no step was taken, so there is nothing to save",
    "first step": "no step was taken, so there is nothing to save",
    "validation": "step 8 is saved, and `--resume latest` resumes from there",
    "finish": "step 8 is saved, and `--resume latest` ends the run from there",
}


@pytest.mark.parametrize("stage", AT_ONCE)
def test_ctrl_c_where_nothing_is_unsaved_stops_at_once(tmp_path, recipe, tried, stage):
    own = write_recipe(tmp_path, steps=STEPS, every_steps=5, validation="scenes")  # nothing in its cache
    options = ["--train.steps", "8"] if stage == "finish" else ["--evaluation.every_steps", "8"]
    with tried(f"Ctrl-C: {stage}"):
        which = own if stage in ("data", "tokenizer") else recipe
        run = HurtRun(which, tmp_path / "run", *options, "--data.workers", "1", faults=f"hold:{stage}")
        run.wait_for(f"holds in {stage}")
        press_ctrl_c(run)
        assert ended(run) == [f"Ctrl-C: stopping; {AT_ONCE[stage]}"]
        assert whole_checkpoints(run.output) == ([5, 8] if stage in ("validation", "finish") else [])


def test_ctrl_c_while_everything_is_imported(tmp_path, recipe, tried):
    with tried("Ctrl-C: imports"):
        for seconds in (0.3, 1.5, 4):
            run = HurtRun(recipe, tmp_path / "run")
            run.wait_until(lambda run=run: len(run.ranks()) == 2, "the processes were started")
            time.sleep(seconds)
            press_ctrl_c(run)
            (line,) = ended(run)
            assert line.startswith("Ctrl-C: stopping")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "python"])
def test_ctrl_c_in_a_step_saves_it(tmp_path, recipe, tried, launcher):
    with tried(f"Ctrl-C: step, under {launcher}"):
        run = HurtRun(recipe, tmp_path / "run", "--data.workers", "1", launcher=launcher)
        run.wait_for_step(6)
        press_ctrl_c(run)
        said = ended(run)
        reached = whole_checkpoints(run.output)[-1]
        assert 6 <= reached < STEPS
        assert said == [
            "Ctrl-C: saving and stopping after this step; again to stop at once without saving",
            f"Stopped by Ctrl-C after step {reached}; `--resume latest` resumes from there",
        ]
        if launcher == "python":
            assert run.popen.returncode == 128 + signal.SIGINT


def test_ctrl_c_in_a_checkpoint_leaves_it_whole(tmp_path, recipe, tried):
    with tried("Ctrl-C: checkpoint"):
        run = HurtRun(recipe, tmp_path / "run", "--data.workers", "1", faults="hold:checkpoint")
        run.wait_for("holds in checkpoint")
        press_ctrl_c(run)
        last = ended(run)[-1]
        reached = whole_checkpoints(run.output)[-1]
        assert last.startswith(f"Stopped by Ctrl-C after step {reached};")
        assert whole_checkpoints(run.output) == [5, reached]


def test_a_second_ctrl_c_stops_at_once(tmp_path, recipe, tried):
    with tried("Ctrl-C twice"):
        run = HurtRun(recipe, tmp_path / "run", faults="hang:1:7")
        run.wait_for_step(6)
        time.sleep(1)
        press_ctrl_c(run)
        time.sleep(1.5)
        press_ctrl_c(run)
        assert ended(run)[1:] == ["Ctrl-C again: stopping at once, without saving"]
        assert whole_checkpoints(run.output) == [5]


@pytest.mark.parametrize(("launcher", "number"), [("deepspeed", signal.SIGTERM), ("torchrun", signal.SIGKILL)])
def test_a_launcher_that_is_ended_alone_leaves_no_orphans(tmp_path, recipe, tried, launcher, number):
    with tried(f"{number.name} to {launcher} alone"):
        run = HurtRun(recipe, tmp_path / "run", "--data.workers", "1", "--train.steps", "2000", launcher=launcher)
        run.wait_for_step(6)
        os.kill(run.popen.pid, number)
        *first, last = ended(run)  # the second process may notice first
        gone = r"the launcher \(.*\) is gone"
        assert all(re.fullmatch(f"{gone}: saving and stopping after this step", line) for line in first)
        assert len(first) <= 1
        assert re.match(f"Stopped by the end of the launcher after step|{gone}: stopping; step [0-9]+ is saved", last)
        assert whole_checkpoints(run.output)[-1] >= 6


def test_sigterm_to_deepspeed_alone_at_the_start(tmp_path, recipe, tried):
    with tried("SIGTERM to deepspeed alone"):
        run = HurtRun(recipe, tmp_path / "run")
        launcher, mine = "-m deepspeed.launcher.launch", str(run.output)
        run.wait_until(lambda: any(launcher in line for line in processes_that_mention(mine)), "it was started")
        # It imports torch now; the training processes come after its parent has gone.
        os.kill(run.popen.pid, signal.SIGTERM)
        said = ended(run)
        assert [line.partition(" (")[0] for line in said] == ["the launcher"]


def test_the_terminal_is_closed(tmp_path, recipe, tried):
    with tried("SIGHUP to the group"):
        run = HurtRun(recipe, tmp_path / "run", launcher="python")
        run.wait_for_step(6)
        run.signal_group(signal.SIGHUP)
        assert ended(run)[0] == "SIGHUP: saving and stopping after this step"
        assert whole_checkpoints(run.output)[-1] >= 6


def test_two_runs_on_one_output(tmp_path, recipe, tried):
    """The second is refused, whatever started it, and the first does not notice."""
    with tried("two runs on one output"):
        first = HurtRun(recipe, tmp_path / "run", "--train.steps", "100000")
        first.wait_for_step(3)
        main = first.ranks()[0].pid
        second = HurtRun(recipe, tmp_path / "run", "--resume", "latest", launcher="python")
        status, screen = second.end()
        assert status == 1
        (line,) = own_words(screen)
        assert f"output = {str(tmp_path / 'run')!r}: process {main} on host {os.uname().nodename} has been" in line
        assert line.endswith("stop it, or choose another folder")
        assert own_words(first.screen) == []
        first.signal_group(signal.SIGTERM)
        assert ended(first)[-1].startswith("Stopped by SIGTERM after step")
        assert whole_checkpoints(first.output)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> Path:
    run = HurtRun(recipe, tmp_path_factory.mktemp("trained") / "run", "--train.steps", "2", launcher="python")
    status, screen = run.end()
    assert status == 0, screen[-3000:]
    return run.output


def evaluate(out: Path, *words: str, launcher: str = "python", faults: str = "") -> HurtCommand:
    script = INJECTING if faults else "launch_scripts/evaluate.py"
    return HurtCommand(out, [script, *words], launcher=launcher, faults=faults)


def test_ctrl_c_and_a_second_command_while_sets_are_embedded_and_measured(tmp_path, trained, tried):
    out = tmp_path / "evaluation"
    embed = ["embed", "--checkpoint", str(trained), "--out", str(out), "--data.eval", "scenes", "--sets", "eval"]
    with tried("Ctrl-C: embedding"):
        run = evaluate(out, *embed, launcher="deepspeed", faults="hold:embedding")
        run.wait_for("holds in embedding")
        with tried("two embed commands on one folder"):
            status, screen = evaluate(out, *embed).end()
            assert status == 1
            (line,) = own_words(screen)
            assert f"--out = {str(out)!r}: process" in line
        press_ctrl_c(run)
        assert ended(run) == ["Ctrl-C: stopping; the same command resumes from what is embedded"]
        status, screen = evaluate(out, *embed).end()
        assert status == 0, screen[-3000:]
    with tried("Ctrl-C: measuring"):
        run = evaluate(out, "measure", str(out), faults="hold:measurement")
        run.wait_for("holds in measurement")
        press_ctrl_c(run)
        (line,) = ended(run)
        assert line == "Ctrl-C: stopping; what was measured is kept; the same command measures the rest"
        assert run.popen.returncode == 128 + signal.SIGINT
