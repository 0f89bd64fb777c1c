"""The SLURM template queues its job again where the time was up, and only there; SLURM's commands are played."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCONTROL = """[ "$1" = requeue ] && echo "requeued $2" || printf '%s\\n' 10.0.0.1 10.0.0.2"""
SAVES_ON_SIGTERM = "trap 'exit 143' TERM; kill -TERM $$; sleep 10"
"""srun gives the exit status of a process that saved on its SIGTERM."""


@pytest.mark.parametrize(
    ("srun", "seconds_left", "variables", "status", "requeued"),
    [
        (SAVES_ON_SIGTERM, 170, {}, 143, True),
        (SAVES_ON_SIGTERM, 3600, {}, 143, False),  # cancelled
        (SAVES_ON_SIGTERM, 170, {"REQUEUE": "0"}, 143, False),
        ("exit 1", 170, {}, 1, False),
        ("exit 0", 170, {}, 0, False),
    ],
)
def test_a_job_whose_time_is_up_queues_itself_again(tmp_path, srun, seconds_left, variables, status, requeued):
    for name, does in (("srun", srun), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "host[0-1]", "INTERFACE": "eth0"}
    job |= {"SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "launch_scripts" / "hosts_slurm.sh"), "--recipe", "scenes"]
    ended = subprocess.run(command, env=job | variables, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status, ended.stderr
    assert ("requeued 77" in ended.stdout) == requeued
