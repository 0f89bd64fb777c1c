"""The real commands under the real launcher: to the table, through a SIGTERM, through kill -9, and on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import ROOT, ds_config, tiny_recipe

from modstruct import checkpoints
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.distributed.run_lock import RunLock

LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
SECONDS = 240


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> str:
    """The tiny recipe with validation, a final table, and enough steps to be interrupted in."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = recipe_to_dict(tiny_recipe("set by each test", folder / "cache", steps=400))
    recipe["data"] |= {"validation": "scenes", "eval": "scenes", "zero_shot": "scenes", "workers": 1}
    recipe["checkpoints"] |= {"every_steps": 5, "keep_last": 2}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def start(processes: int, script: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    port = ["--master_port", str(29600 + os.getpid() % 300)]
    command = [LAUNCHER, "--num_gpus", str(processes), *port, f"launch_scripts/{script}.py", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group of its own, to be signalled as a scheduler does
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for_checkpoint(output: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while not checkpoints.list_checkpoints(output):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.05)


def test_from_start_to_table_through_two_interruptions(tmp_path, recipe_file):
    output = tmp_path / "run"
    arguments = ["--recipe", recipe_file, "--ds_config", ds_config("zero2"), "--output", str(output)]

    killed = start(2, "pretrain", *arguments)
    wait_for_checkpoint(output, killed)
    os.killpg(killed.pid, signal.SIGKILL)  # every process of the run at once
    killed.communicate(timeout=SECONDS)
    after_kill = checkpoints.list_checkpoints(output)[-1]
    reached = checkpoints.read(after_kill).state.step

    stopped = start(2, "pretrain", *arguments, "--resume", "latest")
    while stopped.poll() is None and checkpoints.list_checkpoints(output)[-1] == after_kill:
        time.sleep(0.05)
    with pytest.raises(ValueError, match="has been writing there since"):
        RunLock(output, "output").acquire()
    os.killpg(stopped.pid, signal.SIGTERM)
    text, _ = stopped.communicate(timeout=SECONDS)
    assert "Stopped by SIGTERM" in text, text[-3000:]
    state = checkpoints.read(checkpoints.list_checkpoints(output)[-1]).state
    assert reached < state.step < 400
    assert f"Stopped by SIGTERM after step {state.step};" in text
    assert "has ended without giving it up: taken over" in text
    assert not (output / "run.lock").exists()

    end = str(state.step + 3)
    text = finish(start(2, "pretrain", *arguments, "--resume", "latest", "--train.steps", end))
    for expected in ("Text → image", "R@10", "Zero-shot", "checkpoint:", "exported weights:", "TensorBoard:"):
        assert expected in text.replace("->", "→"), text[-3000:]
    assert len(checkpoints.list_checkpoints(output)) <= 3
    assert not list(checkpoints.folder(output).glob("*.part"))
    values = json.loads((output / "metrics.json").read_text())["results"]["retrieval"]["values"]
    assert values["text_to_image/recall_at_1"]["chance"] == pytest.approx(1 / 24)

    refused = start(1, "pretrain", *arguments)
    text, _ = refused.communicate(timeout=SECONDS)
    assert refused.returncode != 0
    assert "--resume latest" in text

    again = finish(start(1, "evaluate", "--checkpoint", str(output), "--out", str(tmp_path / "again.json")))
    assert "R@10" in again
    assert json.loads((tmp_path / "again.json").read_text())["results"]["retrieval"]["values"] == values


def test_a_run_without_a_launcher_trains_alone(tmp_path, recipe_file):
    arguments = ["--recipe", recipe_file, "--ds_config", ds_config("zero0"), "--output", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "compiled")
    done = subprocess.run(
        [sys.executable, "launch_scripts/pretrain.py", *arguments, "--train.steps", "2", "--train.precision", "bf16"],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = checkpoints.read_weights(checkpoints.list_checkpoints(tmp_path / "run")[-1])
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # The screen: ours from the first line on; the log: all of it, the losses and the table too.
    screen = done.stderr.replace("\r", "\n").splitlines()
    assert screen[0] == f"Starting on one process; log: {tmp_path / 'run' / 'log.txt'}"
    assert not [line for line in screen if re.search(r"Warning|\[W|\w+\.py:\d+", line)]
    logged = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"Started: launch_scripts/pretrain\.py --recipe .*torch \d", logged)
    assert re.search(r"step 2 of 2: loss \d.*, contrastive \d.*; rate \S+, [\d.]+ samples/s", logged)
    assert "validation after step 2: retrieval/" in logged
    assert re.search(r"Text -> image +R@1 ", logged)
    assert not (tmp_path / "compiled").exists()
