"""A sample of the fuzzing in every test run; the long one is slow. Both start from the emoji shards where these are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMOJI = sorted(Path("/work/shared/data/emoji").glob("train-0000[0-2].tar"))


def fuzz(folder: Path, *options: str) -> str:
    command = [sys.executable, "tools/fuzz_readers.py", "--findings", str(folder), *options]
    command += ["--shards", *map(str, EMOJI)] if EMOJI else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 inputs" not in done.stdout
    return done.stdout


def test_five_seconds_of_hostile_task_files_find_nothing(tmp_path):
    assert fuzz(tmp_path, "--minutes", str(5 / 60), "--readers", "task").count(" 0 findings") == 1


def test_ten_seconds_of_hostile_shards_and_images_find_nothing(tmp_path):
    assert fuzz(tmp_path, "--minutes", str(10 / 60), "--readers", "tar", "image").count(" 0 findings") == 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["mutation", "atheris"])
def test_minutes_of_hostile_files_of_every_kind_find_nothing(tmp_path, engine):
    if engine == "atheris":
        pytest.importorskip("atheris", reason="pip install 'modstruct[fuzz]'")
    assert fuzz(tmp_path, "--minutes", "10", "--engine", engine).count(" 0 findings") == 9
