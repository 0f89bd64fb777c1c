"""What must be the same on every host is compared by value and refused by name, on every process alike."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from processes import run_on_processes
from tiny_run import ds_config, tiny_recipe

sys.path.insert(0, str(Path(__file__).parent / "data"))
from crafted_shards import write_shards

from modstruct import checkpoints
from modstruct.distributed import hosts
from modstruct.errors import RunError


def message(check, *arguments) -> str:
    try:
        check(*arguments)
    except (ValueError, RunError) as error:
        return str(error)
    return ""


def settings_that_differ(name: str) -> str:
    from modstruct.distributed import rank

    same = message(hosts.require_same, {"a": 1, "b": None, "c": [1.5]}, "remedy")
    return same or message(hosts.require_same, {"a": 1, name: rank()}, "remedy")


def test_a_value_that_differs_is_named_on_every_process():
    first, second = run_on_processes(settings_that_differ, 2, "train.seed")
    assert first == second
    assert re.fullmatch(r"train.seed is 0 on process 0 \(.+\) and 1 on process 1 \(.+\): remedy", first)


def shared_out_over_hosts(last_differs: bool) -> tuple[list[str], str]:
    """Three processes as two hosts' with one and two: they share out by what both have. Then as one host's."""
    from modstruct.distributed import rank

    os.environ["LOCAL_RANK"] = str((0, 0, 1)[rank()])
    mine = hosts.share_of_host(["a", "b", "c"])
    values = {name: rank() == 1 and name == "c" and last_differs for name in mine}
    found = message(lambda: hosts.require_same(values, "remedy", shared_out=True))
    os.environ["LOCAL_RANK"] = str(rank())
    return ["".join(mine), "".join(hosts.share_of_host(["a", "b", "c", "d"]))], found


def test_what_is_compared_is_shared_out_by_the_processes_of_each_host():
    assert run_on_processes(shared_out_over_hosts, 3, False) == [
        (["abc", "ad"], ""),
        (["abc", "b"], ""),
        (["", "c"], ""),
    ]
    for _, found in run_on_processes(shared_out_over_hosts, 3, True):
        assert re.fullmatch(r"c is False on process 0 \(.+\) and True on process 1 \(.+\): remedy", found)


def folders_that_differ(folder: str) -> list[str]:
    from modstruct.distributed import rank

    hosts.LAG_SECONDS = 0.3
    shared = message(hosts.require_shared_folder, f"{folder}/shared", "output")
    split = message(hosts.require_shared_folder, f"{folder}/{rank()}", "output")
    return [shared, split, message(hosts.require_shared_folder, f"{folder}/file/below", "output")]


def test_a_folder_that_is_not_shared_or_not_writable_is_refused_on_every_process(tmp_path):
    (tmp_path / "file").touch()
    for rank, (shared, split, below) in enumerate(run_on_processes(folders_that_differ, 2, str(tmp_path))):
        assert shared == ""
        assert re.match(rf"output = '.*/{rank}': process 1 \(.+\) cannot see what process 0 \(.+\) writes", split)
        assert "cannot be written: Not a directory: " in below
    assert [path.name for path in tmp_path.rglob(".shared-*")] == []


def failing_on_one(_: str) -> str:
    from modstruct.distributed import rank

    return message(hosts.on_all, lambda: checkpoints.find("/nowhere", "x") if rank() else 7)


def test_what_fails_on_one_process_fails_on_all(tmp_path):
    first, second = run_on_processes(failing_on_one, 2, "")
    assert first.startswith("another process failed first: process 1: --resume = '/nowhere'")
    assert second.startswith("--resume = '/nowhere'")


def hosts_that_differ(folder: str, what: str) -> str:
    """Start a run whose second process has another seed, or other shards under the path that its recipe names."""
    from modstruct.distributed import rank
    from modstruct.training.pretrain import Pretraining

    recipe = tiny_recipe(f"{folder}/run", f"{folder}/cache")
    recipe.data.train = f"{folder}/0/*.tar"
    if rank() == 1 and what == "data.train":
        recipe.data.train = f"{folder}/1/*.tar"
    elif rank() == 1:
        recipe.train.seed = 5
    return message(Pretraining(recipe, ds_config("zero1"), "latest").build)


@pytest.mark.parametrize("what", ["train.seed", "data.train"])
def test_a_run_on_hosts_that_differ_is_refused_before_the_first_step(tmp_path, what):
    for host, sizes in (("0", [20, 20]), ("1", [20, 21])):
        write_shards(tmp_path / host, sizes)
    first, second = run_on_processes(hosts_that_differ, 2, str(tmp_path), what)
    assert first == second
    assert first.startswith(f"{what} is ")
