"""A full disk, a process that hangs, SIGTERM, a gradient that is not a number: one clear word, and the run goes on."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from hurt_run import HurtRun, errors_on, losses, whole_checkpoints, write_recipe
from small_runs import weights_of

pytestmark = pytest.mark.slow
STEPS = 40
HANG_MINUTES = 1.0  # above the first step of a busy machine


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe"), steps=STEPS, every_steps=5)


def to_the_end(*words, **faults) -> str:
    status, screen = HurtRun(*words, **faults).end()
    assert status == 0, screen[-3000:]
    return screen


@pytest.fixture(scope="module")
def unhurt(recipe, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unhurt") / "run"
    to_the_end(recipe, output)
    return output


def goes_on_as(unhurt: Path, recipe: str, output: Path) -> None:
    """After `--resume latest`: the losses of every step and the last weights of the other run, to the bit."""
    to_the_end(recipe, output, "--resume", "latest")
    assert losses(output) == losses(unhurt)
    assert (weights_of(output) == weights_of(unhurt)).all()


def test_a_full_disk(tmp_path, recipe, unhurt, tried):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mounted)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with tried("full disk"):
            run = HurtRun(recipe, mounted / "run")
            run.wait_for_step(12)
            subprocess.run(["dd", "if=/dev/zero", f"of={mounted}/filler", "bs=4k"], check=False, capture_output=True)
            status, screen = run.end()
            print(errors_on(screen))
            assert status != 0
            assert "was not written: " in screen, screen[-3000:]
            assert "No space left on device" in screen
            assert "Free space or choose another --output" in screen
            assert len(errors_on(screen)) == 1, errors_on(screen)
            assert run.left_over() == []
            assert whole_checkpoints(run.output)[-1] >= 10
            (mounted / "filler").unlink()
            goes_on_as(unhurt, recipe, run.output)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped(tmp_path, recipe, unhurt, tried, rank):
    with tried("SIGSTOP of one process"):
        run = HurtRun(recipe, tmp_path / "run", "--train.hang_timeout_minutes", str(HANG_MINUTES))
        run.wait_for_step(7)
        run.ranks()[rank].suspend()
        status, screen = run.end()
        print(errors_on(screen))
        assert status != 0
        assert f"process {rank} gives no sign of life" in screen, screen[-3000:]
        assert len(errors_on(screen)) == 1, screen[-3000:]
        assert run.left_over() == []
        assert whole_checkpoints(run.output)[-1] >= 5
        goes_on_as(unhurt, recipe, run.output)


def test_a_process_that_hangs_in_a_step(tmp_path, recipe, unhurt, tried):
    with tried("one process hangs in a step"):
        minutes = ["--train.hang_timeout_minutes", str(HANG_MINUTES), "--data.workers", "1"]
        run = HurtRun(recipe, tmp_path / "run", *minutes, faults="hang:1:12")
        status, screen = run.end()
        print(errors_on(screen))
        assert status != 0
        assert "process 1 does not go on: it takes step 12" in screen, screen[-3000:]
        assert "process 0 does not" not in screen
        assert len(errors_on(screen)) == 1, screen[-3000:]
        assert run.left_over() == []
        assert whole_checkpoints(run.output)[-1] == 10
        goes_on_as(unhurt, recipe, run.output)


def test_sigterm_to_all_processes(tmp_path, recipe, unhurt, tried):
    output = tmp_path / "run"
    for step in (3, 17):
        with tried("SIGTERM as a scheduler sends it"):
            run = HurtRun(recipe, output, "--resume", "latest", "--data.workers", "1")
            run.wait_for_step(step)
            run.signal_group(signal.SIGTERM)
            status, screen = run.end()
            assert status != 0
            reached = whole_checkpoints(output)[-1]
            assert f"Stopped by SIGTERM after step {reached};" in screen, screen[-3000:]
            assert step <= reached < STEPS
            assert errors_on(screen) == []
            assert run.left_over() == []
    goes_on_as(unhurt, recipe, output)


def test_a_gradient_that_is_not_a_number(tmp_path, recipe, unhurt, tried):
    """Compared with a run that met the same gradient and was not interrupted."""
    fault = "nan:1:8"
    with tried("NaN in one gradient"):
        screen = to_the_end(recipe, tmp_path / "whole", faults=fault)
        assert "Step 8 skipped: the gradient is not finite" in screen
        assert losses(tmp_path / "whole") != losses(unhurt)
        run = HurtRun(recipe, tmp_path / "run", faults=fault)
        run.wait_for_step(13)
        run.signal_group(signal.SIGKILL)
        run.end()
        assert run.left_over() == []
        assert whole_checkpoints(run.output)[-1] >= 10
        goes_on_as(tmp_path / "whole", recipe, run.output)
