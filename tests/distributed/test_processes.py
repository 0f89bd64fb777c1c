"""The helper that starts real processes: results by rank, and failures that are not lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from processes import run_on_processes

from modstruct import distributed
from modstruct.distributed import processes
from modstruct.distributed.side_channel import SideChannel


def sums_over_ranks(offset: int) -> dict:
    value = torch.tensor([float(distributed.rank() + offset)])
    return {"rank": distributed.rank(), "sum": distributed.all_sum(value), "threads": torch.get_num_threads()}


def fails_on_one_rank() -> None:
    if distributed.rank() == 1:
        raise ArithmeticError("rank 1 gave up")
    distributed.barrier()


def test_results_come_back_in_order_of_rank():
    results = run_on_processes(sums_over_ranks, 2, 10)
    assert [r["rank"] for r in results] == [0, 1]
    assert all(r["sum"].item() == 21.0 and r["threads"] == 1 for r in results)


def test_a_failure_on_one_process_is_raised_here():
    with pytest.raises(Exception, match="rank 1 gave up"):
        run_on_processes(fails_on_one_rank, 2)


START = """
import os, socket, sys, torch
from modstruct import distributed

with socket.socket() as other:  # another program on the port
    other.bind(("", 0))
    other.listen()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(other.getsockname()[1])
    try:
        distributed.start_processes()
    except ValueError as error:
        print(error)
    os.environ["WORLD_SIZE"] = "1"
    distributed.start_processes()
    distributed.start_processes()  # again: nothing happens
    print(distributed.world_size(), distributed.gather_objects("mine"), "deepspeed" in sys.modules)

from modstruct.training.deepspeed_adapter import start_engine
for config in {}, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}:
    model = torch.nn.Linear(3, 3)
    settings = {"train_batch_size": 4, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    start_engine(model, torch.optim.AdamW(model.parameters()), settings | config)
left = [name for name in os.listdir("/dev/shm") if os.environ["MASTER_PORT"] in name]
print(left, os.path.exists(os.environ["TORCH_EXTENSIONS_DIR"]))
"""


def test_a_busy_port_is_named_and_one_process_needs_none_nor_a_compiler_nor_shared_memory(tmp_path):
    """DeepSpeed names its buffers in /dev/shm by MASTER_PORT, and compiles into TORCH_EXTENSIONS_DIR."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")}
    done = subprocess.run([sys.executable, "-c", START], env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"MASTER_PORT = '\d+': another program .*`--master_port`", lines[0])
    assert lines[1:] == ["1 ['mine'] False", "[] False"]


@pytest.mark.parametrize(("here", "means"), [("2", "those of this host are still starting"), ("1", "MASTER_ADDR")])
def test_who_waits_says_what_for_and_how_long(monkeypatch, capsys, here, means):
    """On one host the network is not the cause."""
    monkeypatch.setattr(processes, "WAIT_SECONDS", 0.05)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = threading.Event()
    waiting = threading.Thread(target=processes._say_while_waiting, args=[joined])
    waiting.start()
    waiting.join(0.5)
    joined.set()
    waiting.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert lines[0].startswith("process 1 still waits for the others of 2 through a:7 after 0.05 s: ")
    assert all(means in line for line in lines)
    assert ("MASTER_ADDR" in lines[0]) == (here == "1")


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    """libgomp reads OMP_WAIT_POLICY when torch is imported; it shows what it found."""
    code = "import modstruct.cli, sys; assert 'torch' not in sys.modules; import torch"
    for given, found in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert f"OMP_WAIT_POLICY = '{found}'" in done.stderr


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_command_in_this_process_leaves_nothing_to_the_next_test(time):
    """See conftest.py."""
    assert not distributed.is_distributed()
    assert not {"RANK", "WORLD_SIZE"} & os.environ.keys()
    distributed.start_processes()


def without_the_agent() -> list:
    """The second process holds the store through which all join, as torchrun's agent does, and lets go of it."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if distributed.rank() else None
    port = distributed.broadcast_object(agent.port if agent else 0, source=1)
    dist.destroy_process_group()
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    distributed.start_processes()
    channel = SideChannel()
    distributed.barrier()
    del agent
    with pytest.raises(RuntimeError):  # torch's own, which the process group does not need any more
        dist.distributed_c10d._get_default_store().get("anything")
    found = channel.gather(distributed.rank())
    distributed.barrier()
    return found


def test_processes_speak_to_each_other_after_the_end_of_torchrun():
    assert run_on_processes(without_the_agent, 2) == [[0, 1], []]


@pytest.mark.parametrize(
    ("name", "value", "remedy"), [("DEEPSPEED_TIMEOUT", "1h", "minutes"), ("MASTER_PORT", "a", "port")]
)
def test_a_launchers_variable_that_is_no_number_is_named(name, value, remedy):
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    command = [sys.executable, "-c", "from modstruct import distributed; distributed.start_processes()"]
    done = subprocess.run(command, env=os.environ | group | {name: value}, capture_output=True, text=True, timeout=120)
    assert re.search(f"ValueError: {name} = '{value}': .*{remedy}", done.stderr), done.stderr
