"""Two real processes of which one stops or hangs: both end by themselves, with one line that names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

SECONDS = 120
TIMEOUT_MINUTES = 0.1
# Steps with a collective in each, until the one named by argv: there this process hangs, or is stopped from outside.
RUN = """
import sys, time
import torch
import torch.distributed as dist
from modstruct import distributed
from modstruct.distributed.heartbeat import Heartbeat

hangs_at = int(sys.argv[1])
dist.init_process_group("gloo")
with Heartbeat({minutes}) as heartbeat:
    for step in heartbeat.following(range(1, 1_000_000), 0):
        if step == 3:
            print("under way", flush=True)
        while step == hangs_at and dist.get_rank() == 1:
            time.sleep(1)
        time.sleep(0.02)
        distributed.max_over_processes(torch.ones(1))
"""


def start(hangs_at: int) -> list[subprocess.Popen]:
    probe = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the system picks a free port
    port = str(probe.port)
    del probe
    processes = []
    for rank in range(2):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment = os.environ | names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", RUN.format(minutes=TIMEOUT_MINUTES), str(hangs_at)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe))
    return processes


@pytest.mark.parametrize("stopped", [None, 0, 1])
def test_the_process_that_hangs_is_named_and_all_end(stopped):
    """stopped: rank of the process that gets SIGSTOP; None: process 1 sleeps in step 40, its heart beating."""
    processes = start(hangs_at=40 if stopped is None else 0)
    try:
        assert processes[0].stdout.readline() == "under way\n"
        began = time.monotonic()
        if stopped is not None:
            processes[stopped].send_signal(signal.SIGSTOP)
        alive = [process for rank, process in enumerate(processes) if rank != stopped]
        said = [process.communicate(timeout=SECONDS)[1] for process in alive]
        lines = [line for text in said for line in text.splitlines() if line.startswith("error (process ")]
        assert len(lines) == 1, said
        expected = (
            "process 1 does not go on: it takes step 40" if stopped is None else f"process {stopped} gives no sign"
        )
        assert f"train.hang_timeout_minutes = {TIMEOUT_MINUTES}: {expected}" in lines[0]
        assert [process.returncode for process in alive] == [1] * len(alive)
        assert time.monotonic() - began > TIMEOUT_MINUTES * 60
    finally:
        for process in processes:
            process.kill()
            process.communicate()
